//! The Kafka client of one membership in the consumer group: its settings, the rebalance events it reports, and how it
//! is closed within a bounded time.

use crate::error::ProcessorError;
use common::runtime::admin::Health;
use common::runtime::kafka::client_config;
use rdkafka::client::ClientContext;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer, ConsumerContext};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use rdkafka::types::RDKafkaRespErr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

/// Maximum pre-fetched data per partition, in KiB.
const QUEUED_KBYTES: &str = "4096";
/// How long a client may take to close before it is abandoned.
const CLOSE_DEADLINE: Duration = Duration::from_secs(3);
/// Maximum number of abandoned clients. With more, the process exits, so that its supervisor restarts it.
const MAX_ABANDONED: usize = 8;

/// Number of clients whose close has not returned. Each keeps its memory and threads.
static ABANDONED: AtomicUsize = AtomicUsize::new(0);

/// How an instance joins the group.
#[derive(Debug, Clone)]
pub struct MemberSettings {
    /// Bootstrap servers.
    pub brokers: String,
    /// Consumer group.
    pub group_id: String,
    /// Static member name. An instance that was killed rejoins under it without waiting for its session to expire.
    pub instance: String,
}

/// A change of the partitions that this member owns.
pub enum Change {
    /// The group assigned these partitions.
    Assign(TopicPartitionList),
    /// The group revoked these partitions.
    Revoke(TopicPartitionList),
    /// The member's session expired. Other members may already own its partitions.
    Lost,
    /// The rebalance failed.
    Error(String),
}

/// Forwards librdkafka's rebalance events to the group's thread. Only that thread acts on them.
pub struct GroupContext {
    changes: mpsc::Sender<Change>,
    closing: AtomicBool,
    health: Arc<Health>,
}

impl ClientContext for GroupContext {
    fn error(&self, error: KafkaError, reason: &str) {
        if error.rdkafka_error_code() == Some(RDKafkaErrorCode::AllBrokersDown) {
            self.health.set("kafka", Err(format!("no broker is reachable: {reason}")));
        } else {
            tracing::debug!(%error, reason, "kafka client error");
        }
    }
}

impl ConsumerContext for GroupContext {
    fn rebalance(&self, consumer: &BaseConsumer<Self>, err: RDKafkaRespErr, tpl: &mut TopicPartitionList) {
        if self.closing.load(Ordering::SeqCst) {
            // The workers have already ended, so the partitions can be given up at once.
            if let Err(error) = consumer.unassign() {
                tracing::debug!(%error, "cannot unassign while closing");
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
        // Fails only while the client is being closed: the receiver lives as long as the membership.
        let _sent = self.changes.send(change);
    }
}

/// Creates a consumer that is not yet subscribed, and the channel of the changes it reports.
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
        .map_err(|e| ProcessorError::Fatal(format!("cannot create the kafka consumer: {e}")))?;
    Ok((Arc::new(consumer), changes))
}

/// Commits `offsets` and closes the client on a separate thread, because librdkafka can wait forever for a group
/// coordinator that does not answer (rust-rdkafka#611). A client that does not close in time is abandoned. Fails once
/// too many are.
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
            tracing::debug!(%error, "cannot commit the group offsets");
        }
        drop(consumer);
        ABANDONED.fetch_sub(1, Ordering::SeqCst);
        // Fails if the deadline has passed and the receiver is gone.
        let _in_time = closed.send(());
    });
    closing.map_err(|e| {
        ProcessorError::Fatal(format!("cannot start the thread that closes the kafka client: {e}"))
    })?;
    if is_closed.recv_timeout(CLOSE_DEADLINE).is_err() {
        tracing::warn!("kafka client abandoned: it did not close in time");
    }
    match ABANDONED.load(Ordering::SeqCst) {
        abandoned if abandoned > MAX_ABANDONED => Err(ProcessorError::Fatal(format!(
            "{abandoned} kafka clients could not be closed: the process must be restarted"
        ))),
        _ => Ok(()),
    }
}

/// Builds a list of offsets, for a commit or an assignment.
pub fn offset_list(
    topic: &str,
    offsets: impl IntoIterator<Item = (i32, i64)>,
) -> Result<TopicPartitionList, ProcessorError> {
    let mut list = TopicPartitionList::new();
    for (partition, offset) in offsets {
        list.add_partition_offset(topic, partition, Offset::Offset(offset)).map_err(|e| {
            ProcessorError::Fatal(format!("invalid offset {offset} for partition {partition}: {e}"))
        })?;
    }
    Ok(list)
}
