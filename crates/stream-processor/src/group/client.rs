//! The Kafka client of one membership in the consumer group: how it is set up, what it reports, and how it is closed without
//! waiting forever.

use crate::error::ProcessorError;
use common::admin::Health;
use common::kafka::client_config;
use rdkafka::client::ClientContext;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer, ConsumerContext};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use rdkafka::types::RDKafkaRespErr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

/// Pre-fetched bytes per partition.
const QUEUED_KBYTES: &str = "4096";
/// How long a client may take to close before it is left behind.
const CLOSE_DEADLINE: Duration = Duration::from_secs(3);
/// Clients that may be left behind unclosed before the process ends, to be started afresh.
const ABANDONED_MOST: usize = 8;

/// Clients whose close has not returned: each keeps its memory and threads.
static ABANDONED: AtomicUsize = AtomicUsize::new(0);

/// How an instance joins the group.
#[derive(Debug, Clone)]
pub struct MemberSettings {
    /// Bootstrap servers.
    pub brokers: String,
    /// Consumer group.
    pub group_id: String,
    /// Static member name: an instance that was killed is back without waiting for its session to end.
    pub instance: String,
}

/// A change of what this member owns.
pub enum Change {
    /// The group gives it these partitions.
    Assign(TopicPartitionList),
    /// The group takes these partitions away.
    Revoke(TopicPartitionList),
    /// The member's session ended without it: other members may own its partitions already.
    Lost,
    /// The rebalance failed.
    Error(String),
}

/// Passes what librdkafka reports on to the group's own thread, which alone acts on it.
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
            // The workers have ended: nothing is left to stop before the partitions are given up.
            if let Err(error) = consumer.unassign() {
                tracing::debug!(%error, "leaving the group");
            }
            return;
        }
        let change = match err {
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS => Change::Assign(tpl.clone()),
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__REVOKE_PARTITIONS if consumer.assignment_lost() => {
                Change::Lost
            }
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__REVOKE_PARTITIONS => Change::Revoke(tpl.clone()),
            other => Change::Error(RDKafkaErrorCode::from(other).to_string()),
        };
        // The receiver lives as long as the membership; a client that is being closed has nobody to tell.
        let _received = self.changes.send(change);
    }
}

/// A consumer that is not yet subscribed, and the changes it will report.
pub fn build(
    settings: &MemberSettings,
    health: &Arc<Health>,
) -> Result<(Arc<BaseConsumer<GroupContext>>, mpsc::Receiver<Change>), ProcessorError> {
    let (sender, changes) = mpsc::channel();
    let context =
        GroupContext { changes: sender, closing: AtomicBool::new(false), health: Arc::clone(health) };
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
    Ok((Arc::new(consumer), changes))
}

/// Commits `offsets` and closes the client, on a thread of its own: librdkafka can wait forever for a group that does not answer
/// (rust-rdkafka#611). A client that does not close in time is left behind. Fails once too many are.
pub fn close(
    consumer: Arc<BaseConsumer<GroupContext>>,
    offsets: Option<TopicPartitionList>,
) -> Result<(), ProcessorError> {
    consumer.context().closing.store(true, Ordering::SeqCst);
    let (closed, is_closed) = mpsc::channel();
    ABANDONED.fetch_add(1, Ordering::SeqCst);
    let closing = std::thread::Builder::new().name("close".into()).spawn(move || {
        if let Some(offsets) = offsets
            && let Err(error) = consumer.commit(&offsets, CommitMode::Sync)
        {
            tracing::debug!(%error, "group offsets not committed");
        }
        drop(consumer);
        ABANDONED.fetch_sub(1, Ordering::SeqCst);
        // Nobody waits any more where it took too long.
        let _in_time = closed.send(());
    });
    closing.map_err(|e| ProcessorError::Fatal(format!("starting a thread: {e}")))?;
    if is_closed.recv_timeout(CLOSE_DEADLINE).is_err() {
        tracing::warn!("a kafka client did not close in time and is left behind");
    }
    match ABANDONED.load(Ordering::SeqCst) {
        abandoned if abandoned > ABANDONED_MOST => Err(ProcessorError::Fatal(format!(
            "{abandoned} kafka clients could not be closed: this process must start afresh"
        ))),
        _ => Ok(()),
    }
}

/// A list of offsets for the group coordinator or for an assignment.
pub fn offset_list(
    topic: &str,
    offsets: impl IntoIterator<Item = (i32, i64)>,
) -> Result<TopicPartitionList, ProcessorError> {
    let mut list = TopicPartitionList::new();
    for (partition, offset) in offsets {
        list.add_partition_offset(topic, partition, Offset::Offset(offset))
            .map_err(|e| ProcessorError::Fatal(format!("kafka: partition {partition} of {topic}: {e}")))?;
    }
    Ok(list)
}
