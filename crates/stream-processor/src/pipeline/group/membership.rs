//! One membership in the consumer group, from joining to leaving. Opens, runs, halts and stops the assigned partitions.
//! A partition is given up only after its worker has ended and its state file is closed.

use super::client::{self, Change, GroupContext, offset_list};
use super::parts::{Lost, Parts};
use super::slot::{HaltRetry, Running, Slot};
use crate::error::{Halt, ProcessorError};
use crate::io::store::{DeadLetters, Store};
use common::readers::registry::RegistryError;
use common::runtime::presence::{Hold, partition_dependency};
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::topic_partition_list::{TopicPartitionList, TopicPartitionListElem};
use std::collections::BTreeMap;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

/// Poll interval of the client.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// How often the checkpoints' offsets are committed to the group. Other tools read them; this program does not.
const COMMIT_INTERVAL: Duration = Duration::from_secs(1);
/// How often to check whether Kafka is available again.
const PROBE_INTERVAL: Duration = Duration::from_secs(1);
const PROBE_DEADLINE: Duration = Duration::from_millis(500);
/// Maximum number of errors of an earlier assignment to discard from a partition's queue.
const MAX_STALE_ERRORS: usize = 10_000;
/// How long to wait for the other partitions to open after one is refused, to report all refusals in one error.
const REFUSAL_GRACE: Duration = Duration::from_secs(10);

/// How a membership ended without an error.
pub(super) enum End {
    /// Shutdown started.
    Shutdown,
    /// The client must be replaced.
    Lost(Lost),
}

/// Refusals of partitions, collected to report them in one error.
#[derive(Default)]
struct Refusals {
    since: Option<Instant>,
    texts: Vec<String>,
}

/// This instance as a member of the group.
pub(super) struct Membership<S, D> {
    parts: Arc<Parts<S, D>>,
    runtime: Handle,
    consumer: Arc<BaseConsumer<GroupContext>>,
    changes: mpsc::Receiver<Change>,
    joined: Instant,
    slots: BTreeMap<i32, Slot>,
    refusals: Refusals,
}

impl<S: Store + 'static, D: DeadLetters + 'static> Membership<S, D> {
    /// Joins the group.
    pub(super) fn join(parts: Arc<Parts<S, D>>, runtime: Handle) -> Result<Membership<S, D>, ProcessorError> {
        let (consumer, changes) = client::build(&parts.settings.member, &parts.health)?;
        consumer
            .subscribe(&[&parts.settings.topic])
            .map_err(|e| ProcessorError::Fatal(format!("kafka: {e}")))?;
        let (slots, refusals) = (BTreeMap::new(), Refusals::default());
        Ok(Membership { parts, runtime, consumer, changes, joined: Instant::now(), slots, refusals })
    }

    /// Processes the assigned partitions until shutdown starts, the client is lost or an error occurs. Then stops them
    /// and leaves the group.
    pub(super) fn run(mut self) -> Result<End, ProcessorError> {
        let ended = self.poll_until_end();
        let is_member = !matches!(ended, Ok(End::Lost(_)));
        if is_member {
            self.commit();
        }
        let all: Vec<i32> = self.slots.keys().copied().collect();
        let (offsets, stopped) = self.stop(&all);
        let offsets = offset_list(&self.parts.settings.topic, offsets).ok().filter(|list| list.count() > 0);
        let closed = client::close(self.consumer, offsets.filter(|_| is_member));
        let ended = match (ended, stopped) {
            (Ok(end), Ok(())) => Ok(end),
            (Ok(_), Err(error)) | (Err(error), Ok(())) => Err(error),
            (Err(first), Err(second)) => Err(more_severe(first, second)),
        };
        ended.and_then(|end| closed.map(|()| end))
    }

    fn poll_until_end(&mut self) -> Result<End, ProcessorError> {
        let (mut committed_at, mut probed_at) = (Instant::now(), Instant::now());
        while !self.parts.shutdown.has_begun() {
            self.parts.health.beat();
            match self.consumer.poll(POLL_INTERVAL) {
                None => {}
                Some(Err(error)) => self.report(&error),
                Some(Ok(_)) => {
                    return Err(ProcessorError::Fatal(
                        "kafka delivered a record outside its partition's queue".into(),
                    ));
                }
            }
            if let Some(lost) = self.loss() {
                return Ok(End::Lost(lost));
            }
            while let Ok(change) = self.changes.try_recv() {
                if matches!(change, Change::Lost) {
                    return Ok(End::Lost(Lost::Session));
                }
                self.apply(change)?;
            }
            self.advance_slots()?;
            if committed_at.elapsed() >= COMMIT_INTERVAL {
                committed_at = Instant::now();
                self.commit();
            }
            if probed_at.elapsed() >= PROBE_INTERVAL && !self.parts.health.is_up("kafka") {
                probed_at = Instant::now();
                if self.broker_answers() {
                    self.parts.health.set("kafka", Ok(()));
                }
            }
        }
        Ok(End::Shutdown)
    }

    /// Why the client must be replaced; `None` if it is usable.
    fn loss(&self) -> Option<Lost> {
        match self.consumer.client().fatal_error() {
            Some((RDKafkaErrorCode::FencedInstanceId, _)) => Some(Lost::Fenced),
            Some((_, text)) => Some(Lost::Fatal(text)),
            None => {
                let verdict = self.parts.ownership.verdict(self.joined, Instant::now());
                // A new client would not help while no broker answers.
                verdict.filter(|_| self.broker_answers()).map(Lost::Watchdog)
            }
        }
    }

    fn report(&self, error: &KafkaError) {
        match error.rdkafka_error_code() {
            Some(RDKafkaErrorCode::UnknownTopicOrPartition | RDKafkaErrorCode::UnknownTopic) => {
                let topic = &self.parts.settings.topic;
                let text = format!("topic `{topic}` does not exist; run `stream-processor init`");
                self.parts.health.set("kafka", Err(text));
            }
            _ => tracing::warn!(%error, "kafka client error"),
        }
    }

    /// Whether a broker answers and knows the topic.
    fn broker_answers(&self) -> bool {
        let topic = &self.parts.settings.topic;
        let found = self.consumer.fetch_metadata(Some(topic), PROBE_DEADLINE);
        found.is_ok_and(|found| {
            found
                .topics()
                .iter()
                .any(|t| t.name() == topic && t.error().is_none() && !t.partitions().is_empty())
        })
    }

    fn apply(&mut self, change: Change) -> Result<(), ProcessorError> {
        match change {
            Change::Assign(list) => self.assign(&partitions(&list)),
            Change::Revoke(list) => {
                let revoked = partitions(&list);
                tracing::info!(partitions = ?revoked, "partitions revoked");
                self.commit();
                let assigned: Vec<i32> = revoked.iter().copied().filter(|p| self.is_assigned(*p)).collect();
                self.stop(&revoked).1?;
                self.unassign(assigned)
            }
            Change::Error(error) => {
                tracing::warn!(error, "rebalance failed");
                Ok(())
            }
            Change::Lost => Ok(()),
        }
    }

    /// Starts to open the assigned partitions. A partition is fetched once it is open.
    fn assign(&mut self, assigned: &[i32]) -> Result<(), ProcessorError> {
        tracing::info!(partitions = ?assigned, "partitions assigned");
        for partition in assigned {
            let slot = if *partition < self.parts.opener.partitions {
                self.open(*partition, None)
            } else {
                self.ignore_unregistered(*partition)
            };
            self.slots.insert(*partition, slot);
        }
        self.consumer
            .incremental_assign(&TopicPartitionList::new())
            .map_err(|e| ProcessorError::Fatal(format!("cannot accept the assigned partitions: {e}")))
    }

    /// Does not process a partition that was added to the topic later. The new partition count assigns keys to other
    /// partitions, so its events may have copies that another partition counts.
    fn ignore_unregistered(&self, partition: i32) -> Slot {
        let added = RegistryError::AddedPartition {
            stream: self.parts.who.stream.clone(),
            topic: self.parts.settings.topic.clone(),
            registered: self.parts.opener.partitions,
            partition,
        };
        self.parts.health.set(&partition_dependency(partition), Err(added.to_string()));
        self.parts.holdings.set(partition, Hold::Unregistered);
        self.parts.metrics.unregistered_partitions.inc();
        Slot::Unregistered
    }

    /// Opens a partition in the background, because it may wait for Cassandra or for the state file's previous owner
    /// while the client must be polled.
    fn open(&self, partition: i32, retry: Option<HaltRetry>) -> Slot {
        let stop = CancellationToken::new();
        let (parts, runtime, stopped) = (Arc::clone(&self.parts), self.runtime.clone(), stop.clone());
        let opening = self
            .runtime
            .spawn_blocking(move || parts.opener.open(partition, &stopped, &runtime).map(Box::new));
        self.parts.holdings.set(partition, retry.as_ref().map_or(Hold::Opening, |_| Hold::Halted));
        Slot::Opening { opening, stop, retry }
    }

    fn is_assigned(&self, partition: i32) -> bool {
        matches!(self.slots.get(&partition), Some(Slot::Running(_)))
    }

    /// Acknowledges a revocation to librdkafka. Also needed when `partitions` is empty.
    fn unassign(&self, partitions: Vec<i32>) -> Result<(), ProcessorError> {
        let list = offset_list(&self.parts.settings.topic, partitions.into_iter().map(|p| (p, 0)))?;
        self.consumer
            .incremental_unassign(&list)
            .map_err(|e| ProcessorError::Fatal(format!("cannot give up the revoked partitions: {e}")))
    }

    /// Acts on every slot that is ready.
    fn advance_slots(&mut self) -> Result<(), ProcessorError> {
        let now = Instant::now();
        let ready: Vec<i32> = self.slots.iter().filter(|(_, s)| s.is_ready(now)).map(|(p, _)| *p).collect();
        for partition in ready {
            let Some(slot) = self.slots.remove(&partition) else { continue };
            let next = match slot {
                Slot::Opening { opening, retry, .. } => {
                    let opened = self.runtime.block_on(opening);
                    let opened = opened.unwrap_or_else(|e| {
                        Err(ProcessorError::Fatal(format!("opening partition {partition} failed: {e}")))
                    });
                    match opened {
                        Ok(opened) => self.start_fetching(*opened, retry).map(Some),
                        Err(error) => self.handle_error(partition, error, retry),
                    }
                }
                Slot::Running(running) => self.handle_worker_end(partition, running),
                Slot::Halted(retry) => Ok(Some(self.open(partition, Some(retry)))),
                Slot::Unregistered => Ok(Some(Slot::Unregistered)),
            };
            if let Some(next) = next? {
                self.slots.insert(partition, next);
            }
        }
        self.clear_recovered_halts();
        self.check_refusals(now)
    }

    /// Starts to fetch an opened partition. The assignment carries the start offset, so no seek is needed.
    fn start_fetching(
        &self,
        opened: crate::pipeline::open::Opened,
        retry: Option<HaltRetry>,
    ) -> Result<Slot, ProcessorError> {
        let (topic, partition) = (&self.parts.settings.topic, opened.partition_id);
        let list = offset_list(topic, [(partition, opened.start.fetch_from)])?;
        // Split the queue before the assignment, so that no record is delivered to the consumer's main queue.
        let queue = self.consumer.split_partition_queue(topic, partition).ok_or_else(|| {
            ProcessorError::Fatal(format!("kafka has no queue for partition {partition} of {topic}"))
        })?;
        // The queue may still hold errors of an earlier assignment: librdkafka does not remove them.
        let _discarded = std::iter::from_fn(|| queue.poll(Duration::ZERO)).take(MAX_STALE_ERRORS).count();
        let mut running = Running::start(&self.parts, queue, &self.consumer, opened, &self.runtime)?;
        self.parts.metrics.halted(partition, retry.is_some());
        running.retry = retry;
        self.consumer.incremental_assign(&list).map_err(|e| {
            ProcessorError::Fatal(format!("cannot start to fetch partition {partition}: {e}"))
        })?;
        Ok(Slot::Running(running))
    }

    /// Handles a worker that ended although nobody asked it to stop.
    fn handle_worker_end(
        &mut self,
        partition: i32,
        running: Running,
    ) -> Result<Option<Slot>, ProcessorError> {
        self.unassign(vec![partition])?;
        let retry = running.retry.clone();
        let (_, ended) = running.stop(partition, &self.parts, &self.runtime, tokio::time::Instant::now());
        let error = ended.err().unwrap_or_else(|| {
            ProcessorError::Reopen(format!(
                "the fetch thread of partition {partition} ended without an error"
            ))
        });
        self.handle_error(partition, error, retry)
    }

    /// Returns the slot of a partition after an error; `None` if the partition is refused.
    fn handle_error(
        &mut self,
        partition: i32,
        error: ProcessorError,
        retry: Option<HaltRetry>,
    ) -> Result<Option<Slot>, ProcessorError> {
        match error {
            ProcessorError::Stopped => Ok(Some(self.open(partition, retry))),
            ProcessorError::Halted(halt) => Ok(Some(self.halt(HaltRetry::after_halt(retry, halt)))),
            ProcessorError::Reopen(cause) => {
                tracing::warn!(partition, cause, "reopening the partition");
                let next = HaltRetry::after_reopen(retry, partition, cause);
                if next.is_waiting() {
                    Ok(Some(self.halt(next)))
                } else {
                    Ok(Some(self.open(partition, Some(next))))
                }
            }
            ProcessorError::Refused(text) => {
                self.refusals.since.get_or_insert(Instant::now());
                self.refusals.texts.push(text);
                Ok(None)
            }
            error => Err(error),
        }
    }

    fn halt(&self, retry: HaltRetry) -> Slot {
        let Halt { partition, .. } = retry.halt;
        tracing::error!(partition, error = %retry.halt, "partition halted");
        self.parts.health.set(&partition_dependency(partition), Err(retry.halt.to_string()));
        self.parts.holdings.set(partition, Hold::Halted);
        self.parts.metrics.halted(partition, true);
        Slot::Halted(retry)
    }

    /// Marks halted partitions as running again once they have recovered.
    fn clear_recovered_halts(&mut self) {
        for (partition, slot) in &mut self.slots {
            if let Slot::Running(running) = slot
                && running.has_recovered()
            {
                running.retry = None;
                tracing::info!(partition, "partition continues after a halt");
                self.parts.health.forget(&partition_dependency(*partition));
                self.parts.metrics.halted(*partition, false);
            }
        }
    }

    /// Fails with all refusals once every other partition has opened or [`REFUSAL_GRACE`] has passed.
    fn check_refusals(&self, now: Instant) -> Result<(), ProcessorError> {
        let Some(since) = self.refusals.since else { return Ok(()) };
        let still_opening = self.slots.values().any(|slot| matches!(slot, Slot::Opening { .. }));
        if still_opening && now.saturating_duration_since(since) < REFUSAL_GRACE {
            return Ok(());
        }
        Err(ProcessorError::Refused(self.refusals.texts.join("\n")))
    }

    /// Stops `partitions`. Each worker finishes its batch or is aborted at the revoke deadline; then its state file is
    /// closed. Returns the committed next offsets and the most severe error.
    fn stop(&mut self, partitions: &[i32]) -> (Vec<(i32, i64)>, Result<(), ProcessorError>) {
        let stopping: Vec<(i32, Slot)> =
            partitions.iter().filter_map(|p| Some((*p, self.slots.remove(p)?))).collect();
        stopping.iter().for_each(|(_, slot)| slot.cancel());
        let deadline = tokio::time::Instant::now() + self.parts.settings.revoke_deadline;
        let (mut offsets, mut result) = (Vec::new(), Ok(()));
        for (partition, slot) in stopping {
            let (offset, ended) = slot.stop(partition, &self.parts, &self.runtime, deadline);
            offsets.extend(offset.map(|offset| (partition, offset)));
            result = match (result, ended) {
                (Ok(()), ended) => ended,
                (Err(first), Err(second)) => Err(more_severe(first, second)),
                (first, Ok(())) => first,
            };
        }
        (offsets, result)
    }

    /// Commits the checkpoints' next offsets to the group coordinator.
    fn commit(&self) {
        let running = self.slots.iter().filter_map(|(partition, slot)| match slot {
            Slot::Running(running) => Some((*partition, running.committed())),
            _ => None,
        });
        let Ok(list) = offset_list(&self.parts.settings.topic, running) else { return };
        if list.count() > 0
            && let Err(error) = self.consumer.commit(&list, CommitMode::Async)
        {
            tracing::debug!(%error, "cannot commit the group offsets");
        }
    }
}

/// Returns the error to exit with: the first one, unless only the second one is a refusal. Logs the other one.
fn more_severe(first: ProcessorError, second: ProcessorError) -> ProcessorError {
    let refused = |error: &ProcessorError| matches!(error, ProcessorError::Refused(_));
    let second_is_worse = refused(&second) && !refused(&first);
    let (kept, masked) = if second_is_worse { (second, first) } else { (first, second) };
    tracing::error!(error = %masked, "another error occurred while partitions stopped");
    kept
}

fn partitions(list: &TopicPartitionList) -> Vec<i32> {
    list.elements().iter().map(TopicPartitionListElem::partition).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_never_masked_by_another_error() {
        let refused = || ProcessorError::Refused("lost history".into());
        let fatal = || ProcessorError::Fatal("disk".into());
        for (first, second, code) in [(fatal(), refused(), 3), (refused(), fatal(), 3), (fatal(), fatal(), 1)]
        {
            assert_eq!(more_severe(first, second).exit_code(), code);
        }
    }
}
