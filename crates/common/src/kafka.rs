//! Kafka clients set up the one right way, and the names of things in Kafka. What to send or read is each service's own.

use rdkafka::ClientConfig;
use rdkafka::client::{Client, ClientContext};
use rdkafka::consumer::{BaseConsumer, Consumer};
use std::time::Duration;

/// The partitioner of every producer: Java's own for keyed records, so that one id always lands in one partition.
pub const PARTITIONER: &str = "murmur2_random";
/// Longest record value and batch the pipeline handles.
pub const MAX_MESSAGE_BYTES: usize = 4 << 20;

/// Kafka could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum KafkaError {
    /// No broker answered.
    #[error(
        "kafka at {brokers} does not answer ({cause}); is it running, and is PIPELINE_KAFKA_BROKERS right?"
    )]
    Unreachable {
        /// Bootstrap servers.
        brokers: String,
        /// librdkafka's words.
        cause: String,
    },
    /// A topic is missing.
    #[error("kafka topic `{topic}` does not exist; run `stream-processor init` first")]
    NoTopic {
        /// Its name.
        topic: String,
    },
    /// The client could not be made.
    #[error("kafka client: {0}")]
    Client(String),
}

/// Settings that all clients share.
pub fn client_config(brokers: &str, client_id: &str) -> ClientConfig {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", brokers)
        .set("client.id", client_id)
        .set("message.max.bytes", MAX_MESSAGE_BYTES.to_string())
        .set("socket.keepalive.enable", "true")
        .set("reconnect.backoff.ms", "100")
        .set("reconnect.backoff.max.ms", "2000")
        // Brokers move in tests and in Compose: a cached address would outlive them.
        .set("broker.address.ttl", "1000")
        .set("topic.metadata.refresh.interval.ms", "30000");
    config
}

/// Settings of every producer: idempotent, all acks, the partitioner that all share.
pub fn producer_config(brokers: &str, client_id: &str) -> ClientConfig {
    let mut config = client_config(brokers, client_id);
    config
        .set("enable.idempotence", "true")
        .set("acks", "all")
        .set("partitioner", PARTITIONER)
        .set("compression.type", "lz4")
        .set("linger.ms", "10");
    config
}

/// Number of partitions of `topic`, asked with a deadline.
pub fn partition_count<C: ClientContext>(
    client: &Client<C>,
    brokers: &str,
    topic: &str,
    deadline: Duration,
) -> Result<i32, KafkaError> {
    let metadata = client
        .fetch_metadata(Some(topic), deadline)
        .map_err(|e| KafkaError::Unreachable { brokers: brokers.to_owned(), cause: e.to_string() })?;
    let found = metadata.topics().iter().find(|t| t.name() == topic && t.error().is_none());
    let count = found.map_or(0, |t| t.partitions().len());
    i32::try_from(count)
        .ok()
        .filter(|n| *n > 0)
        .ok_or_else(|| KafkaError::NoTopic { topic: topic.to_owned() })
}

/// Waits until a broker answers, at most `deadline`; the error names the brokers. Blocking.
pub fn wait_for_broker(brokers: &str, deadline: Duration) -> Result<BaseConsumer, KafkaError> {
    let consumer: BaseConsumer =
        client_config(brokers, "pipeline-probe").create().map_err(|e| KafkaError::Client(e.to_string()))?;
    consumer
        .fetch_metadata(None, deadline)
        .map_err(|e| KafkaError::Unreachable { brokers: brokers.to_owned(), cause: e.to_string() })?;
    Ok(consumer)
}
