//! One partition of a membership: opening, running, standing still, or left alone.

use super::Parts;
use super::client::GroupContext;
use crate::decode::Decoder;
use crate::error::{Halt, ProcessorError};
use crate::fetch::{self, AssignedPartition};
use crate::metrics;
use crate::open::Opened;
use crate::store::{DeadLetters, Store};
use crate::worker::Worker;
use common::presence::partition_dependency;
use rdkafka::consumer::BaseConsumer;
use rdkafka::consumer::base_consumer::PartitionQueue;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// First pause of a partition that stands still; doubles with each try.
const HALT_PAUSE: Duration = Duration::from_secs(2);
/// Longest pause.
const HALT_PAUSE_MOST: Duration = Duration::from_secs(60);
/// A partition that runs so long without an error stands still no more, even where its log has nothing new.
const WELL_AFTER: Duration = Duration::from_secs(30);
/// How often in a row a partition is opened again at once, before it pauses as one that stands still.
const REOPENS_AT_ONCE: u32 = 1;

/// Why a partition stands still, and when it is tried again.
#[derive(Debug, Clone)]
pub(super) struct Standing {
    pub(super) halt: Halt,
    tries: u32,
    retry_at: Instant,
}

impl Standing {
    fn new(halt: Halt, tries: u32, pause: Duration) -> Standing {
        Standing { halt, tries, retry_at: Instant::now() + pause }
    }

    /// After `halt`, where `before` is what the partition stood still for until now.
    pub(super) fn after(before: Option<Standing>, halt: Halt) -> Standing {
        let tries = before.map_or(1, |before| before.tries.saturating_add(1));
        Standing::new(halt, tries, pause_after(tries))
    }

    /// After the partition had to be opened again: at once, but not endlessly.
    pub(super) fn reopened(before: Option<Standing>, partition: i32, cause: String) -> Standing {
        let (tries, offset) =
            before.map_or((1, 0), |before| (before.tries.saturating_add(1), before.halt.offset));
        let pause = if tries <= REOPENS_AT_ONCE { Duration::ZERO } else { pause_after(tries) };
        Standing::new(Halt { partition, offset, cause, readable_from: None }, tries, pause)
    }

    /// Whether there is a pause before the next try.
    pub(super) fn waits(&self) -> bool {
        self.retry_at > Instant::now()
    }
}

fn pause_after(tries: u32) -> Duration {
    HALT_PAUSE.saturating_mul(1 << (tries - 1).min(10)).min(HALT_PAUSE_MOST)
}

/// What is done with a partition.
pub(super) enum Slot {
    /// It finds out where to start.
    Opening {
        opening: JoinHandle<Result<Box<Opened>, ProcessorError>>,
        stop: CancellationToken,
        standing: Option<Standing>,
    },
    /// It is fetched and processed.
    Running(Running),
    /// It cannot go on, and is opened again after a pause.
    Halted(Standing),
    /// The stream was registered with fewer partitions.
    Unregistered,
}

/// A partition with its fetcher and worker.
pub(super) struct Running {
    pub(super) standing: Option<Standing>,
    worker: JoinHandle<Result<(), ProcessorError>>,
    fetcher: std::thread::JoinHandle<()>,
    stop: CancellationToken,
    committed: Arc<AtomicI64>,
    began: (Instant, i64),
}

impl Slot {
    /// Whether it has something to do.
    pub(super) fn is_ready(&self, now: Instant) -> bool {
        match self {
            Slot::Opening { opening, .. } => opening.is_finished(),
            Slot::Running(running) => running.worker.is_finished(),
            Slot::Halted(standing) => standing.retry_at <= now,
            Slot::Unregistered => false,
        }
    }

    /// Asks it to stop.
    pub(super) fn cancel(&self) {
        match self {
            Slot::Opening { stop, .. } | Slot::Running(Running { stop, .. }) => stop.cancel(),
            Slot::Halted(_) | Slot::Unregistered => {}
        }
    }

    /// Waits until it has stopped; gives its committed next offset, where it was running.
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
                (Some(offset), ended)
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
        parts.metrics.given_up(partition);
        parts.health.forget(&partition_dependency(partition));
        parts.holdings.remove(partition);
        stopped
    }
}

impl Running {
    /// Starts fetcher and worker of an opened partition.
    pub(super) fn start<S: Store + 'static, D: DeadLetters + 'static>(
        parts: &Parts<S, D>,
        (queue, consumer): (PartitionQueue<GroupContext>, &Arc<BaseConsumer<GroupContext>>),
        opened: Opened,
        runtime: &Handle,
    ) -> Result<Running, ProcessorError> {
        let id = opened.partition_id;
        let stop = CancellationToken::new();
        let opener = &parts.opener;
        let decoder = Decoder::new(&opener.definition, id);
        let clock = opener.metrics.stage(id, metrics::FETCH);
        let source = AssignedPartition {
            queue,
            consumer: Arc::clone(consumer),
            brokers: opener.brokers.clone(),
            topic: opener.topic.clone(),
            id,
        };
        let limits = parts.settings.limits;
        let (chunks, fetcher) =
            fetch::spawn(source, decoder, &opened.start, limits, (stop.clone(), clock))
                .map_err(|e| ProcessorError::Fatal(format!("starting a fetch thread: {e}")))?;
        let position = opened.start.position;
        opener.metrics.started(id, opened.start.how.name(), &position.totals, position.next_offset);
        let began = (Instant::now(), opened.start.position.next_offset);
        let committed = Arc::new(AtomicI64::new(began.1));
        parts.holdings.runs(id, Arc::clone(&committed));
        let worker = Worker {
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
        Ok(Running { standing: None, worker, fetcher, stop, committed, began })
    }

    /// Its committed next offset.
    pub(super) fn committed(&self) -> i64 {
        self.committed.load(Ordering::Acquire)
    }

    /// Whether it has gone on past the offset it stood still at.
    pub(super) fn has_passed_its_halt(&self) -> bool {
        let (since, offset) = self.began;
        self.standing.as_ref().is_some_and(|standing| {
            self.committed() > standing.halt.offset.max(offset) || since.elapsed() >= WELL_AFTER
        })
    }

    /// Waits for the worker until `deadline`, then cuts it off: nothing of its batch is committed. Gives its committed next
    /// offset.
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
            tracing::warn!(partition, "batch abandoned: it did not finish within the revoke deadline");
            self.worker.abort();
            runtime.block_on(&mut self.worker)
        });
        let mut result = match ended {
            Ok(Err(ProcessorError::Stopped)) => Ok(()),
            Ok(ended) => ended,
            Err(error) if error.is_cancelled() => Ok(()),
            Err(error) => Err(ProcessorError::Fatal(format!("worker of partition {partition}: {error}"))),
        };
        if self.fetcher.join().is_err() {
            result = Err(ProcessorError::Fatal(format!("fetcher of partition {partition} panicked")));
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
    fn pauses_grow_up_to_a_bound() {
        let seconds: Vec<u64> = [1, 2, 3, 6, 7, 40].map(|tries| pause_after(tries).as_secs()).into();
        assert_eq!(seconds, [2, 4, 8, 60, 60, 60]);
    }

    #[test]
    fn a_partition_is_opened_again_at_once_only_the_first_time() {
        let first = Standing::reopened(None, 0, "x".into());
        assert!(!first.waits());
        assert!(Standing::reopened(Some(first), 0, "x".into()).waits());
        let halted = Standing::after(None, halt(7));
        assert!(halted.waits());
        assert_eq!(Standing::after(Some(halted), halt(7)).tries, 2);
    }
}
