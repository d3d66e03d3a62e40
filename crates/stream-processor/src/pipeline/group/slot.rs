//! The state of one assigned partition: opening, running, halted or unregistered.

use super::client::GroupContext;
use super::parts::Parts;
use crate::error::{Halt, ProcessorError};
use crate::io::store::{DeadLetters, Store};
use crate::metrics;
use crate::pipeline::fetch::{self, AssignedPartition};
use crate::pipeline::open::Opened;
use crate::pipeline::worker::PartitionWorker;
use crate::record::decode::Decoder;
use common::runtime::presence::partition_dependency;
use rdkafka::consumer::BaseConsumer;
use rdkafka::consumer::base_consumer::PartitionQueue;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Initial backoff before a halted partition is retried; doubles with each attempt.
const INITIAL_HALT_BACKOFF: Duration = Duration::from_secs(2);
/// Maximum backoff before a halted partition is retried.
const MAX_HALT_BACKOFF: Duration = Duration::from_secs(60);
/// A partition that has run for this long without an error is no longer halted, even if its log has no new records.
const RECOVERED_AFTER: Duration = Duration::from_secs(30);
/// Consecutive times that a partition is reopened without a backoff.
const IMMEDIATE_REOPENS: u32 = 1;

/// Why a partition is halted, and when it is retried.
#[derive(Debug, Clone)]
pub(super) struct HaltRetry {
    pub(super) halt: Halt,
    attempts: u32,
    retry_at: Instant,
}

impl HaltRetry {
    fn new(halt: Halt, attempts: u32, backoff: Duration) -> HaltRetry {
        HaltRetry { halt, attempts, retry_at: Instant::now() + backoff }
    }

    /// The retry after `halt`. `previous` is the retry that led to it; `None` if the partition was not halted before.
    pub(super) fn after_halt(previous: Option<HaltRetry>, halt: Halt) -> HaltRetry {
        let attempts = previous.map_or(1, |previous| previous.attempts.saturating_add(1));
        HaltRetry::new(halt, attempts, backoff_after(attempts))
    }

    /// The retry of a partition that must be reopened because of `cause`: immediate at first, then with a backoff.
    pub(super) fn after_reopen(previous: Option<HaltRetry>, partition: i32, cause: String) -> HaltRetry {
        let (attempts, offset) =
            previous.map_or((1, 0), |previous| (previous.attempts.saturating_add(1), previous.halt.offset));
        let backoff = if attempts <= IMMEDIATE_REOPENS { Duration::ZERO } else { backoff_after(attempts) };
        HaltRetry::new(Halt { partition, offset, cause, readable_from: None }, attempts, backoff)
    }

    /// Whether the backoff has not yet elapsed.
    pub(super) fn is_waiting(&self) -> bool {
        self.retry_at > Instant::now()
    }
}

fn backoff_after(attempts: u32) -> Duration {
    INITIAL_HALT_BACKOFF.saturating_mul(1 << (attempts - 1).min(10)).min(MAX_HALT_BACKOFF)
}

/// The state of an assigned partition.
pub(super) enum Slot {
    /// The partition is being opened in the background. `retry` is set if it was halted or reopened before.
    Opening {
        opening: JoinHandle<Result<Box<Opened>, ProcessorError>>,
        stop: CancellationToken,
        retry: Option<HaltRetry>,
    },
    /// The partition is being fetched and processed.
    Running(Running),
    /// The partition cannot continue. It is reopened after a backoff.
    Halted(HaltRetry),
    /// The stream was registered with fewer partitions, so this one is not processed.
    Unregistered,
}

/// A partition with its fetch thread and worker.
pub(super) struct Running {
    /// Set until the partition has recovered from the halt.
    pub(super) retry: Option<HaltRetry>,
    worker: JoinHandle<Result<(), ProcessorError>>,
    fetcher: std::thread::JoinHandle<()>,
    stop: CancellationToken,
    committed: Arc<AtomicI64>,
    /// When the partition started, and its next offset then.
    started: (Instant, i64),
}

impl Slot {
    /// Whether the membership must act on the slot.
    pub(super) fn is_ready(&self, now: Instant) -> bool {
        match self {
            Slot::Opening { opening, .. } => opening.is_finished(),
            Slot::Running(running) => running.worker.is_finished(),
            Slot::Halted(retry) => retry.retry_at <= now,
            Slot::Unregistered => false,
        }
    }

    /// Requests the partition to stop, without waiting.
    pub(super) fn cancel(&self) {
        match self {
            Slot::Opening { stop, .. } | Slot::Running(Running { stop, .. }) => stop.cancel(),
            Slot::Halted(_) | Slot::Unregistered => {}
        }
    }

    /// Waits until the partition has stopped. Returns its committed next offset if it was running.
    pub(super) fn stop<S: Store, D: DeadLetters>(
        self,
        partition: i32,
        parts: &Parts<S, D>,
        runtime: &Handle,
        deadline: tokio::time::Instant,
    ) -> (Option<i64>, Result<(), ProcessorError>) {
        let stopped = match self {
            Slot::Running(running) => {
                let (offset, ended) = running.stop(partition, parts, runtime, deadline);
                (Some(offset), fatal_only(partition, ended))
            }
            Slot::Opening { opening, .. } => {
                let ended = match runtime.block_on(opening) {
                    Ok(Err(error @ ProcessorError::Refused(_))) => Err(error),
                    _ => Ok(()),
                };
                (None, ended)
            }
            Slot::Halted(_) => (None, Ok(())),
            Slot::Unregistered => {
                parts.metrics.unregistered_partitions.dec();
                (None, Ok(()))
            }
        };
        parts.metrics.released(partition);
        parts.health.forget(&partition_dependency(partition));
        parts.holdings.remove(partition);
        stopped
    }
}

/// Drops an error that only requires the partition to be reopened or halted: it is being released anyway, and its next owner
/// reads everything again.
fn fatal_only(partition: i32, ended: Result<(), ProcessorError>) -> Result<(), ProcessorError> {
    match ended {
        Err(error @ (ProcessorError::Reopen(_) | ProcessorError::Halted(_))) => {
            tracing::warn!(partition, %error, "released after an error");
            Ok(())
        }
        ended => ended,
    }
}

impl Running {
    /// Starts the fetch thread and the worker of an opened partition.
    pub(super) fn start<S: Store + 'static, D: DeadLetters + 'static>(
        parts: &Parts<S, D>,
        queue: PartitionQueue<GroupContext>,
        consumer: &Arc<BaseConsumer<GroupContext>>,
        opened: Opened,
        runtime: &Handle,
    ) -> Result<Running, ProcessorError> {
        let id = opened.partition_id;
        let stop = CancellationToken::new();
        let opener = &parts.opener;
        let clock = opener.metrics.stage(id, metrics::FETCH);
        let source = AssignedPartition {
            queue,
            consumer: Arc::clone(consumer),
            brokers: opener.brokers.clone(),
            topic: opener.topic.clone(),
            id,
            decoder: Decoder::new(&opener.definition, id),
        };
        let limits = parts.settings.limits;
        let (chunks, fetcher) = fetch::spawn(source, &opened.start, limits, stop.clone(), clock)
            .map_err(|e| ProcessorError::Fatal(format!("cannot start a fetch thread: {e}")))?;
        let position = opened.start.position;
        opener.metrics.started(id, opened.start.how.name(), &position.totals, position.next_offset);
        let started = (Instant::now(), opened.start.position.next_offset);
        let committed = Arc::new(AtomicI64::new(started.1));
        parts.holdings.runs(id, Arc::clone(&committed));
        let worker = PartitionWorker {
            id,
            bucket: opener.definition.store.bucket,
            state: opened.state,
            partition: opened.partition,
            assumed: opened.assumed,
            store: Arc::clone(&opener.store),
            dead_letters: Arc::clone(&parts.dead_letters),
            limits: parts.settings.poison,
            health: Arc::clone(&parts.health),
            holdings: parts.holdings.clone(),
            metrics: Arc::clone(&opener.metrics),
            committed: Arc::clone(&committed),
        };
        let worker = runtime.spawn(worker.run(chunks, stop.clone()));
        Ok(Running { retry: None, worker, fetcher, stop, committed, started })
    }

    /// The partition's committed next offset.
    pub(super) fn committed(&self) -> i64 {
        self.committed.load(Ordering::Acquire)
    }

    /// Whether a halted partition has continued past the offset where it was halted.
    pub(super) fn has_recovered(&self) -> bool {
        let (since, offset) = self.started;
        self.retry.as_ref().is_some_and(|retry| {
            self.committed() > retry.halt.offset.max(offset) || since.elapsed() >= RECOVERED_AFTER
        })
    }

    /// Waits for the worker until `deadline`, then aborts it; an aborted batch is not committed. Returns the
    /// partition's committed next offset.
    pub(super) fn stop<S: Store, D: DeadLetters>(
        mut self,
        partition: i32,
        parts: &Parts<S, D>,
        runtime: &Handle,
        deadline: tokio::time::Instant,
    ) -> (i64, Result<(), ProcessorError>) {
        self.stop.cancel();
        let ended = runtime.block_on(async {
            tokio::select! {
                biased;
                ended = &mut self.worker => Some(ended),
                () = tokio::time::sleep_until(deadline) => None,
            }
        });
        let ended = ended.unwrap_or_else(|| {
            tracing::warn!(partition, "batch aborted: it did not finish before the revoke deadline");
            self.worker.abort();
            runtime.block_on(&mut self.worker)
        });
        let mut result = match ended {
            Ok(Err(ProcessorError::Stopped)) => Ok(()),
            Ok(ended) => ended,
            Err(error) if error.is_cancelled() => Ok(()),
            Err(error) => {
                Err(ProcessorError::Fatal(format!("the worker of partition {partition} failed: {error}")))
            }
        };
        if self.fetcher.join().is_err() {
            result =
                Err(ProcessorError::Fatal(format!("the fetch thread of partition {partition} panicked")));
        }
        parts.opener.metrics.stopped(partition);
        (self.committed.load(Ordering::Acquire), result)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn halt(offset: i64) -> Halt {
        Halt { partition: 0, offset, cause: "x".into(), readable_from: None }
    }

    #[test]
    fn only_a_fatal_error_of_a_released_partition_ends_the_process() {
        let check = |error: ProcessorError, ends: bool| assert_eq!(fatal_only(0, Err(error)).is_err(), ends);
        check(ProcessorError::Reopen("x".into()), false);
        check(halt(7).into(), false);
        check(ProcessorError::Refused("x".into()), true);
        check(ProcessorError::Fatal("x".into()), true);
        assert!(fatal_only(0, Ok(())).is_ok());
    }

    #[test]
    fn the_backoff_grows_up_to_its_maximum() {
        let seconds: Vec<u64> = [1, 2, 3, 6, 7, 40].map(|attempts| backoff_after(attempts).as_secs()).into();
        assert_eq!(seconds, [2, 4, 8, 60, 60, 60]);
    }

    #[test]
    fn a_partition_is_reopened_without_a_backoff_only_the_first_time() {
        let first = HaltRetry::after_reopen(None, 0, "x".into());
        assert!(!first.is_waiting());
        assert!(HaltRetry::after_reopen(Some(first), 0, "x".into()).is_waiting());
        let halted = HaltRetry::after_halt(None, halt(7));
        assert!(halted.is_waiting());
        assert_eq!(HaltRetry::after_halt(Some(halted), halt(7)).attempts, 2);
    }
}
