//! The consumer group: which partitions are this instance's, one fetcher and one worker for each. Runs on one blocking
//! thread; a partition is given up only when its worker has ended and its state file is closed.

use crate::decode::Decoder;
use crate::error::ProcessorError;
use crate::fetch::{self, ChunkLimits};
use crate::metrics;
use crate::open::{Opened, Opener};
use crate::poison_gate::PoisonLimits;
use crate::store::{DeadLetters, Store};
use crate::worker::Worker;
use common::admin::Health;
use common::kafka::client_config;
use common::shutdown::Shutdown;
use rdkafka::client::ClientContext;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer, ConsumerContext};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use rdkafka::types::RDKafkaRespErr;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

const POLL: Duration = Duration::from_millis(100);
/// How often the group's own offset follows the checkpoint: it only informs other tools.
const COMMIT_EVERY: Duration = Duration::from_secs(1);
/// How often Kafka is asked whether it is back.
const PROBE_EVERY: Duration = Duration::from_secs(1);
/// Pre-fetched bytes per partition.
const QUEUED_KBYTES: &str = "4096";

/// How this instance joins.
#[derive(Debug, Clone)]
pub struct GroupSettings {
    /// Bootstrap servers.
    pub brokers: String,
    /// Events topic.
    pub topic: String,
    /// Consumer group.
    pub group_id: String,
    /// Static member name: a killed instance is back without waiting for its session to end.
    pub instance: String,
    /// When a chunk is full.
    pub limits: ChunkLimits,
    /// How much poison pauses a partition.
    pub poison: PoisonLimits,
    /// How long a partition may take to stop.
    pub revoke_deadline: Duration,
}

enum Change {
    Assign(TopicPartitionList),
    Revoke(TopicPartitionList),
    Error(String),
}

/// Passes what librdkafka says on to the group's own thread, which alone acts on it.
pub struct GroupContext {
    changes: mpsc::Sender<Change>,
    closing: AtomicBool,
    health: Arc<Health>,
}

impl ClientContext for GroupContext {
    fn error(&self, error: KafkaError, reason: &str) {
        if error.rdkafka_error_code() == Some(RDKafkaErrorCode::AllBrokersDown) {
            self.health.set("kafka", Err(format!("no broker answers: {reason}")));
        } else {
            tracing::debug!(%error, reason, "kafka");
        }
    }
}

impl ConsumerContext for GroupContext {
    fn rebalance(&self, consumer: &BaseConsumer<Self>, err: RDKafkaRespErr, tpl: &mut TopicPartitionList) {
        if self.closing.load(Ordering::SeqCst) {
            if let Err(error) = consumer.incremental_unassign(tpl) {
                tracing::warn!(%error, "leaving the group");
            }
            return;
        }
        let change = match err {
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS => Change::Assign(tpl.clone()),
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__REVOKE_PARTITIONS => Change::Revoke(tpl.clone()),
            other => Change::Error(RDKafkaErrorCode::from(other).to_string()),
        };
        // The receiver lives as long as the consumer.
        let _received = self.changes.send(change);
    }
}

struct Running {
    worker: tokio::task::JoinHandle<Result<(), ProcessorError>>,
    fetcher: std::thread::JoinHandle<()>,
    stop: CancellationToken,
    committed: Arc<AtomicI64>,
}

/// This instance's part of the group.
pub struct Group<S, D> {
    consumer: Arc<BaseConsumer<GroupContext>>,
    changes: mpsc::Receiver<Change>,
    settings: GroupSettings,
    opener: Opener<S>,
    dead_letters: Arc<D>,
    health: Arc<Health>,
    shutdown: Shutdown,
    running: BTreeMap<i32, Running>,
}

impl<S: Store + 'static, D: DeadLetters + 'static> Group<S, D> {
    /// Makes the consumer; joins with [`Group::run`].
    pub fn new(
        settings: GroupSettings,
        opener: Opener<S>,
        dead_letters: Arc<D>,
        health: Arc<Health>,
        shutdown: Shutdown,
    ) -> Result<Group<S, D>, ProcessorError> {
        let (sender, changes) = mpsc::channel();
        let context =
            GroupContext { changes: sender, closing: AtomicBool::new(false), health: Arc::clone(&health) };
        let mut config = client_config(&settings.brokers, &format!("stream-processor-{}", settings.instance));
        config
            .set("group.id", &settings.group_id)
            .set("group.instance.id", &settings.instance)
            .set("partition.assignment.strategy", "cooperative-sticky")
            .set("session.timeout.ms", "10000")
            .set("heartbeat.interval.ms", "1000")
            .set("max.poll.interval.ms", "600000")
            .set("auto.offset.reset", "error")
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            .set("queued.max.messages.kbytes", QUEUED_KBYTES)
            .set("queued.min.messages", "8000")
            .set("fetch.queue.backoff.ms", "5")
            .set("fetch.wait.max.ms", "100")
            .set("fetch.message.max.bytes", "1048576")
            .set("check.crcs", "true");
        let consumer: BaseConsumer<GroupContext> = config
            .create_with_context(context)
            .map_err(|e| ProcessorError::Fatal(format!("kafka consumer: {e}")))?;
        let (consumer, running) = (Arc::new(consumer), BTreeMap::new());
        Ok(Group { consumer, changes, settings, opener, dead_letters, health, shutdown, running })
    }

    /// Takes part until shutdown or an error. Blocking; `runtime` runs the workers.
    pub fn run(mut self, runtime: &Handle) -> Result<(), ProcessorError> {
        let joined = self.consumer.subscribe(&[&self.settings.topic]);
        let ended = joined
            .map_err(|e| ProcessorError::Fatal(format!("kafka: {e}")))
            .and_then(|()| self.follow(runtime));
        let all: Vec<i32> = self.running.keys().copied().collect();
        self.commit(CommitMode::Async);
        let stopped = self.stop(&all, runtime);
        self.commit(CommitMode::Sync);
        self.consumer.context().closing.store(true, Ordering::SeqCst);
        graver(ended, stopped)
    }

    fn follow(&mut self, runtime: &Handle) -> Result<(), ProcessorError> {
        let (mut committed_at, mut probed_at) = (Instant::now(), Instant::now());
        while !self.shutdown.has_begun() {
            self.health.beat();
            match self.consumer.poll(POLL) {
                None => {}
                Some(Err(error)) => self.check(&error)?,
                Some(Ok(_)) => {
                    return Err(ProcessorError::Fatal(
                        "kafka: a record came past its partition's queue".into(),
                    ));
                }
            }
            while let Ok(change) = self.changes.try_recv() {
                self.change(change, runtime)?;
            }
            let ended: Vec<i32> =
                self.running.iter().filter(|(_, r)| r.worker.is_finished()).map(|(p, _)| *p).collect();
            self.stop(&ended, runtime)?;
            if committed_at.elapsed() >= COMMIT_EVERY {
                committed_at = Instant::now();
                self.commit(CommitMode::Async);
            }
            if probed_at.elapsed() >= PROBE_EVERY && !self.health.is_up("kafka") {
                probed_at = Instant::now();
                if self
                    .consumer
                    .fetch_metadata(Some(&self.settings.topic), Duration::from_millis(500))
                    .is_ok()
                {
                    self.health.set("kafka", Ok(()));
                }
            }
        }
        Ok(())
    }

    fn check(&self, error: &KafkaError) -> Result<(), ProcessorError> {
        if let Some((code, text)) = self.consumer.client().fatal_error() {
            let way_out = match code {
                RDKafkaErrorCode::FencedInstanceId => "; two instances have one name: set PIPELINE_INSTANCE",
                _ => "",
            };
            return Err(ProcessorError::Fatal(format!("kafka: {text}{way_out}")));
        }
        match error.rdkafka_error_code() {
            Some(RDKafkaErrorCode::UnknownTopicOrPartition | RDKafkaErrorCode::UnknownTopic) => {
                Err(ProcessorError::Fatal(format!(
                    "kafka topic `{}` does not exist; run `stream-processor init` first",
                    self.settings.topic
                )))
            }
            _ => {
                tracing::warn!(%error, "kafka");
                Ok(())
            }
        }
    }

    fn change(&mut self, change: Change, runtime: &Handle) -> Result<(), ProcessorError> {
        match change {
            Change::Error(error) => {
                tracing::warn!(error, "rebalance");
                Ok(())
            }
            Change::Assign(tpl) => self.assign(&partitions(&tpl), runtime),
            Change::Revoke(tpl) => {
                let revoked = partitions(&tpl);
                tracing::info!(partitions = ?revoked, "revoked");
                self.commit(CommitMode::Async);
                self.stop(&revoked, runtime)?;
                self.consumer
                    .incremental_unassign(&tpl)
                    .map_err(|e| ProcessorError::Fatal(format!("kafka: giving up partitions: {e}")))
            }
        }
    }

    /// Opens every partition, then starts fetching: assigned with the offset to start at, never sought.
    fn assign(&mut self, assigned: &[i32], runtime: &Handle) -> Result<(), ProcessorError> {
        tracing::info!(partitions = ?assigned, "assigned");
        let topic = self.settings.topic.clone();
        let mut list = TopicPartitionList::new();
        let mut starting = Vec::new();
        for partition in assigned {
            let opened = self.opener.open(*partition, &self.consumer, runtime)?;
            // Split before it is assigned: nothing is fetched yet that could go another way.
            let queue = self.consumer.split_partition_queue(&topic, *partition).ok_or_else(|| {
                ProcessorError::Fatal(format!("kafka: no queue for partition {partition} of {topic}"))
            })?;
            list.add_partition_offset(&topic, *partition, Offset::Offset(opened.start.fetch_from))
                .map_err(|e| ProcessorError::Fatal(format!("kafka: {e}")))?;
            starting.push((opened, queue));
        }
        for (opened, queue) in starting {
            let partition = opened.partition_id;
            let stop = CancellationToken::new();
            let decoder = Decoder::new(&self.opener.definition, partition);
            let clock = self.opener.metrics.stage(partition, metrics::FETCH);
            let (chunks, fetcher) =
                fetch::spawn(queue, decoder, &opened.start, self.settings.limits, (stop.clone(), clock))
                    .map_err(|e| ProcessorError::Fatal(format!("starting a fetch thread: {e}")))?;
            let committed = Arc::new(AtomicI64::new(opened.start.position.next_offset));
            let worker = self.worker(opened, Arc::clone(&committed));
            let worker = runtime.spawn(worker.run(chunks, stop.clone()));
            self.running.insert(partition, Running { worker, fetcher, stop, committed });
        }
        self.consumer
            .incremental_assign(&list)
            .map_err(|e| ProcessorError::Fatal(format!("kafka: taking partitions: {e}")))
    }

    fn worker(&self, opened: Opened, committed: Arc<AtomicI64>) -> Worker<S, D> {
        Worker {
            id: opened.partition_id,
            bucket: self.opener.definition.store.bucket,
            state: opened.state,
            partition: opened.partition,
            store: Arc::clone(&self.opener.store),
            dead_letters: Arc::clone(&self.dead_letters),
            limits: self.settings.poison,
            health: Arc::clone(&self.health),
            metrics: Arc::clone(&self.opener.metrics),
            committed,
        }
    }

    /// Stops these partitions' workers: each finishes its batch, or is cut off at the deadline; then its state is closed.
    fn stop(&mut self, partitions: &[i32], runtime: &Handle) -> Result<(), ProcessorError> {
        let stopping: Vec<(i32, Running)> =
            partitions.iter().filter_map(|p| Some((*p, self.running.remove(p)?))).collect();
        stopping.iter().for_each(|(_, running)| running.stop.cancel());
        let deadline = tokio::time::Instant::now() + self.settings.revoke_deadline;
        let mut result = Ok(());
        for (partition, mut running) in stopping {
            let ended = runtime.block_on(async {
                tokio::select! {
                    ended = &mut running.worker => Some(ended),
                    () = tokio::time::sleep_until(deadline) => None,
                }
            });
            let ended = ended.unwrap_or_else(|| {
                tracing::warn!(partition, "batch abandoned: it did not finish within the revoke deadline");
                running.worker.abort();
                runtime.block_on(&mut running.worker)
            });
            match ended {
                Ok(Ok(())) | Ok(Err(ProcessorError::Stopped)) => {}
                Ok(Err(error)) => result = graver(result, Err(error)),
                Err(error) if error.is_cancelled() => {}
                Err(error) => {
                    let text = format!("worker of partition {partition}: {error}");
                    result = graver(result, Err(ProcessorError::Fatal(text)));
                }
            }
            if running.fetcher.join().is_err() {
                let text = format!("fetcher of partition {partition} panicked");
                result = graver(result, Err(ProcessorError::Fatal(text)));
            }
            self.health.forget(&format!("partition {partition}"));
            self.opener.metrics.stopped(partition);
        }
        result
    }

    /// Tells Kafka how far the checkpoints are.
    fn commit(&self, mode: CommitMode) {
        let mut list = TopicPartitionList::new();
        for (partition, running) in &self.running {
            let offset = Offset::Offset(running.committed.load(Ordering::Acquire));
            if list.add_partition_offset(&self.settings.topic, *partition, offset).is_err() {
                return;
            }
        }
        if list.count() > 0
            && let Err(error) = self.consumer.commit(&list, mode)
        {
            tracing::debug!(%error, "group offset not committed");
        }
    }
}

/// Of two ends the one that the process ends with: the first, but lost history is never masked by another error.
fn graver(
    first: Result<(), ProcessorError>,
    second: Result<(), ProcessorError>,
) -> Result<(), ProcessorError> {
    let refused = |end: &Result<(), ProcessorError>| matches!(end, Err(ProcessorError::Refused(_)));
    let (kept, masked) = if first.is_ok() || (refused(&second) && !refused(&first)) {
        (second, first)
    } else {
        (first, second)
    };
    if let Err(error) = masked {
        tracing::error!(%error, "another partition ended too");
    }
    kept
}

fn partitions(list: &TopicPartitionList) -> Vec<i32> {
    list.elements().iter().map(rdkafka::topic_partition_list::TopicPartitionListElem::partition).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_never_masked_by_another_error() {
        let refused = || Err(ProcessorError::Refused("lost history".into()));
        let fatal = || Err(ProcessorError::Fatal("disk".into()));
        let code = |end: Result<(), ProcessorError>| end.map_err(|e| e.exit_code());
        for (first, second, ends_with) in [
            (Ok(()), Ok(()), Ok(())),
            (fatal(), Ok(()), Err(1)),
            (Ok(()), fatal(), Err(1)),
            (fatal(), refused(), Err(3)),
            (refused(), fatal(), Err(3)),
            (Ok(()), refused(), Err(3)),
        ] {
            assert_eq!(code(graver(first, second)), ends_with);
        }
    }
}
