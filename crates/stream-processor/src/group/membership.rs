//! One membership in the consumer group, from joining to leaving: which partitions are this instance's, and what becomes of
//! each. A partition is given up only when its worker has ended and its state file is closed.

use super::client::{self, Change, GroupContext, offset_list};
use super::slot::{Running, Slot, Standing};
use super::{Lost, Parts};
use crate::error::{Halt, ProcessorError};
use crate::store::{DeadLetters, Store};
use common::presence::{Hold, partition_dependency};
use common::registry::RegistryError;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::topic_partition_list::{TopicPartitionList, TopicPartitionListElem};
use std::collections::BTreeMap;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

/// Poll interval of the client.
const POLL: Duration = Duration::from_millis(100);
/// How often the group's own offsets follow the checkpoints: they only inform other tools.
const COMMIT_EVERY: Duration = Duration::from_secs(1);
/// How often Kafka is asked whether it is back.
const PROBE_EVERY: Duration = Duration::from_secs(1);
const PROBE_DEADLINE: Duration = Duration::from_millis(500);
/// Errors that an earlier assignment can have left at most.
const STALE_MOST: usize = 10_000;
/// How long other partitions may still take to open once one is refused, so that all refusals are told at once.
const REFUSALS_WITHIN: Duration = Duration::from_secs(10);

/// How a membership ended, unless the process must end with it.
pub(super) enum End {
    /// Shutdown began.
    Shutdown,
    /// The client is of no use any more.
    Lost(Lost),
}

/// Refusals of single partitions, gathered to be told at once.
#[derive(Default)]
struct Refusals {
    since: Option<Instant>,
    texts: Vec<String>,
}

/// A member of the group.
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

    /// Takes part until shutdown begins, the client is lost or an error ends the process; then leaves.
    pub(super) fn run(mut self) -> Result<End, ProcessorError> {
        let ended = self.follow();
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
            (Err(first), Err(second)) => Err(graver(first, second)),
        };
        ended.and_then(|end| closed.map(|()| end))
    }

    fn follow(&mut self) -> Result<End, ProcessorError> {
        let (mut committed_at, mut probed_at) = (Instant::now(), Instant::now());
        while !self.parts.shutdown.has_begun() {
            self.parts.health.beat();
            match self.consumer.poll(POLL) {
                None => {}
                Some(Err(error)) => self.note(&error),
                Some(Ok(_)) => {
                    return Err(ProcessorError::Fatal(
                        "kafka: a record was delivered outside its partition's queue".into(),
                    ));
                }
            }
            if let Some(lost) = self.lost() {
                return Ok(End::Lost(lost));
            }
            while let Ok(change) = self.changes.try_recv() {
                if matches!(change, Change::Lost) {
                    return Ok(End::Lost(Lost::Session));
                }
                self.change(change)?;
            }
            self.tend()?;
            if committed_at.elapsed() >= COMMIT_EVERY {
                committed_at = Instant::now();
                self.commit();
            }
            if probed_at.elapsed() >= PROBE_EVERY && !self.parts.health.is_up("kafka") {
                probed_at = Instant::now();
                if self.is_answered() {
                    self.parts.health.set("kafka", Ok(()));
                }
            }
        }
        Ok(End::Shutdown)
    }

    /// Why the client must be built again, if it must.
    fn lost(&self) -> Option<Lost> {
        match self.consumer.client().fatal_error() {
            Some((RDKafkaErrorCode::FencedInstanceId, _)) => Some(Lost::Fenced),
            Some((_, text)) => Some(Lost::Fatal(text)),
            None => {
                let verdict = self.parts.ownership.verdict(self.joined, Instant::now());
                // Another client would fare no better with a broker that does not answer.
                verdict.filter(|_| self.is_answered()).map(Lost::Watchdog)
            }
        }
    }

    fn note(&self, error: &KafkaError) {
        match error.rdkafka_error_code() {
            Some(RDKafkaErrorCode::UnknownTopicOrPartition | RDKafkaErrorCode::UnknownTopic) => {
                let topic = &self.parts.settings.topic;
                let text = format!("topic `{topic}` does not exist; run `stream-processor init`");
                self.parts.health.set("kafka", Err(text));
            }
            _ => tracing::warn!(%error, "kafka"),
        }
    }

    /// Whether a broker answers now, and knows the topic.
    fn is_answered(&self) -> bool {
        let topic = &self.parts.settings.topic;
        let found = self.consumer.fetch_metadata(Some(topic), PROBE_DEADLINE);
        found.is_ok_and(|found| {
            found
                .topics()
                .iter()
                .any(|t| t.name() == topic && t.error().is_none() && !t.partitions().is_empty())
        })
    }

    fn change(&mut self, change: Change) -> Result<(), ProcessorError> {
        match change {
            Change::Assign(list) => self.assign(&partitions(&list)),
            Change::Revoke(list) => {
                let revoked = partitions(&list);
                tracing::info!(partitions = ?revoked, "revoked");
                self.commit();
                let assigned: Vec<i32> = revoked.iter().copied().filter(|p| self.is_assigned(*p)).collect();
                self.stop(&revoked).1?;
                self.unassign(assigned)
            }
            Change::Error(error) => {
                tracing::warn!(error, "rebalance");
                Ok(())
            }
            Change::Lost => Ok(()),
        }
    }

    /// Takes the partitions over from the group; each is fetched once it is open.
    fn assign(&mut self, assigned: &[i32]) -> Result<(), ProcessorError> {
        tracing::info!(partitions = ?assigned, "assigned");
        for partition in assigned {
            let slot = if *partition < self.parts.opener.partitions {
                self.open(*partition, None)
            } else {
                self.leave_alone(*partition)
            };
            self.slots.insert(*partition, slot);
        }
        self.consumer
            .incremental_assign(&TopicPartitionList::new())
            .map_err(|e| ProcessorError::Fatal(format!("kafka: taking partitions: {e}")))
    }

    /// Events in a partition that was added later have other copies elsewhere: to count them would count twice.
    fn leave_alone(&self, partition: i32) -> Slot {
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

    /// Opens a partition in the background: Cassandra or another owner may take their time, and the client must be polled.
    fn open(&self, partition: i32, standing: Option<Standing>) -> Slot {
        let stop = CancellationToken::new();
        let (parts, runtime, stopped) = (Arc::clone(&self.parts), self.runtime.clone(), stop.clone());
        let opening = self
            .runtime
            .spawn_blocking(move || parts.opener.open(partition, &stopped, &runtime).map(Box::new));
        self.parts.holdings.set(partition, standing.as_ref().map_or(Hold::Opening, |_| Hold::Halted));
        Slot::Opening { opening, stop, standing }
    }

    fn is_assigned(&self, partition: i32) -> bool {
        matches!(self.slots.get(&partition), Some(Slot::Running(_)))
    }

    /// Ends librdkafka's part of a revocation too, where `partitions` is empty.
    fn unassign(&self, partitions: Vec<i32>) -> Result<(), ProcessorError> {
        let list = offset_list(&self.parts.settings.topic, partitions.into_iter().map(|p| (p, 0)))?;
        self.consumer
            .incremental_unassign(&list)
            .map_err(|e| ProcessorError::Fatal(format!("kafka: giving up partitions: {e}")))
    }

    /// Moves every partition on that has something to do.
    fn tend(&mut self) -> Result<(), ProcessorError> {
        let now = Instant::now();
        let ready: Vec<i32> = self.slots.iter().filter(|(_, s)| s.is_ready(now)).map(|(p, _)| *p).collect();
        for partition in ready {
            let Some(slot) = self.slots.remove(&partition) else { continue };
            let next = match slot {
                Slot::Opening { opening, standing, .. } => {
                    let opened = self.runtime.block_on(opening);
                    let opened = opened.unwrap_or_else(|e| {
                        Err(ProcessorError::Fatal(format!("opening partition {partition}: {e}")))
                    });
                    match opened {
                        Ok(opened) => self.begin(*opened, standing).map(Some),
                        Err(error) => self.after(partition, error, standing),
                    }
                }
                Slot::Running(running) => self.ended(partition, running),
                Slot::Halted(standing) => Ok(Some(self.open(partition, Some(standing)))),
                Slot::Unregistered => Ok(Some(Slot::Unregistered)),
            };
            if let Some(next) = next? {
                self.slots.insert(partition, next);
            }
        }
        self.recovered();
        self.refused(now)
    }

    /// Starts to fetch: assigned with the offset to start at, never sought.
    fn begin(&self, opened: crate::open::Opened, standing: Option<Standing>) -> Result<Slot, ProcessorError> {
        let (topic, partition) = (&self.parts.settings.topic, opened.partition_id);
        let list = offset_list(topic, [(partition, opened.start.fetch_from)])?;
        // Split before it is assigned: no record can be delivered elsewhere.
        let queue = self.consumer.split_partition_queue(topic, partition).ok_or_else(|| {
            ProcessorError::Fatal(format!("kafka: no queue for partition {partition} of {topic}"))
        })?;
        // Errors of an earlier assignment may still wait there: librdkafka does not take them back.
        let _stale = std::iter::from_fn(|| queue.poll(Duration::ZERO)).take(STALE_MOST).count();
        let mut running = Running::start(&self.parts, (queue, &self.consumer), opened, &self.runtime)?;
        self.parts.metrics.halted(partition, standing.is_some());
        running.standing = standing;
        self.consumer
            .incremental_assign(&list)
            .map_err(|e| ProcessorError::Fatal(format!("kafka: taking partition {partition}: {e}")))?;
        Ok(Slot::Running(running))
    }

    /// A worker has ended by itself.
    fn ended(&mut self, partition: i32, running: Running) -> Result<Option<Slot>, ProcessorError> {
        self.unassign(vec![partition])?;
        let standing = running.standing.clone();
        let (_, ended) = running.stop(partition, &self.parts, &self.runtime, tokio::time::Instant::now());
        let error = ended.err().unwrap_or_else(|| {
            ProcessorError::Reopen(format!("partition {partition}: fetching ended without an error"))
        });
        self.after(partition, error, standing)
    }

    /// What follows an error of one partition; `None`: it is refused.
    fn after(
        &mut self,
        partition: i32,
        error: ProcessorError,
        standing: Option<Standing>,
    ) -> Result<Option<Slot>, ProcessorError> {
        match error {
            ProcessorError::Stopped => Ok(Some(self.open(partition, standing))),
            ProcessorError::Halted(halt) => Ok(Some(self.halt(Standing::after(standing, halt)))),
            ProcessorError::Reopen(cause) => {
                tracing::warn!(partition, cause, "opening the partition again");
                let again = Standing::reopened(standing, partition, cause);
                if again.waits() {
                    Ok(Some(self.halt(again)))
                } else {
                    Ok(Some(self.open(partition, Some(again))))
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

    fn halt(&self, standing: Standing) -> Slot {
        let Halt { partition, .. } = standing.halt;
        tracing::error!(partition, error = %standing.halt, "the partition stands still");
        self.parts.health.set(&partition_dependency(partition), Err(standing.halt.to_string()));
        self.parts.holdings.set(partition, Hold::Halted);
        self.parts.metrics.halted(partition, true);
        Slot::Halted(standing)
    }

    /// Partitions that have passed the offset they stood at.
    fn recovered(&mut self) {
        for (partition, slot) in &mut self.slots {
            if let Slot::Running(running) = slot
                && running.has_passed_its_halt()
            {
                running.standing = None;
                tracing::info!(partition, "the partition goes on");
                self.parts.health.forget(&partition_dependency(*partition));
                self.parts.metrics.halted(*partition, false);
            }
        }
    }

    /// Ends the process with all refusals, once every other partition has had time to be refused too.
    fn refused(&self, now: Instant) -> Result<(), ProcessorError> {
        let Some(since) = self.refusals.since else { return Ok(()) };
        let still_opening = self.slots.values().any(|slot| matches!(slot, Slot::Opening { .. }));
        if still_opening && now.saturating_duration_since(since) < REFUSALS_WITHIN {
            return Ok(());
        }
        Err(ProcessorError::Refused(self.refusals.texts.join("\n")))
    }

    /// Stops these partitions: each worker finishes its batch, or is cut off at the deadline; then its state file is closed.
    /// Gives the offsets at which they ended, and the gravest error.
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
                (Err(first), Err(second)) => Err(graver(first, second)),
                (first, Ok(())) => first,
            };
        }
        (offsets, result)
    }

    /// Tells the group coordinator how far the checkpoints are.
    fn commit(&self) {
        let running = self.slots.iter().filter_map(|(partition, slot)| match slot {
            Slot::Running(running) => Some((*partition, running.committed())),
            _ => None,
        });
        let Ok(list) = offset_list(&self.parts.settings.topic, running) else { return };
        if list.count() > 0
            && let Err(error) = self.consumer.commit(&list, CommitMode::Async)
        {
            tracing::debug!(%error, "group offsets not committed");
        }
    }
}

/// The error that the process ends with: the first, but lost history is never masked by another error.
fn graver(first: ProcessorError, second: ProcessorError) -> ProcessorError {
    let refused = |error: &ProcessorError| matches!(error, ProcessorError::Refused(_));
    let second_counts = refused(&second) && !refused(&first);
    let (kept, masked) = if second_counts { (second, first) } else { (first, second) };
    tracing::error!(error = %masked, "another partition ended too");
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
            assert_eq!(graver(first, second).exit_code(), code);
        }
    }
}
