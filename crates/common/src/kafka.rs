//! Kafka clients set up the one right way, and the names of things in Kafka. What to send or read is each service's own.

use rdkafka::ClientConfig;
use rdkafka::client::{Client, ClientContext};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::producer::{FutureProducer, Producer, ProducerContext, ThreadedProducer};
use std::sync::{Arc, Mutex, PoisonError};
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
    /// The cluster has no name.
    #[error("kafka at {0} does not tell its cluster id")]
    NoClusterId(String),
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

/// A topic as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topic {
    /// Its cluster.
    pub cluster_id: String,
    /// How many partitions it has.
    pub partitions: i32,
}

/// Cluster and number of partitions of `topic`, asked anew, each with a deadline. Blocking.
pub fn describe<C: ClientContext>(
    client: &Client<C>,
    brokers: &str,
    topic: &str,
    deadline: Duration,
) -> Result<Topic, KafkaError> {
    let partitions = partition_count(client, brokers, topic, deadline)?;
    let cluster_id = client.fetch_cluster_id(deadline);
    let cluster_id = cluster_id.ok_or_else(|| KafkaError::NoClusterId(brokers.to_owned()))?;
    Ok(Topic { cluster_id, partitions })
}

/// A client that can become unusable for good: an idempotent producer that lost count of its sequence, was fenced off or has
/// lost its rights never sends again, whatever is asked of it.
pub trait Mortal {
    /// Why it will never work again; `None`: it may.
    fn fatal_error(&self) -> Option<String>;
}

impl<C: ProducerContext + 'static> Mortal for ThreadedProducer<C> {
    fn fatal_error(&self) -> Option<String> {
        self.client().fatal_error().map(|(code, reason)| format!("{code}: {reason}"))
    }
}

impl Mortal for FutureProducer {
    fn fatal_error(&self) -> Option<String> {
        self.client().fatal_error().map(|(code, reason)| format!("{code}: {reason}"))
    }
}

/// A client that is replaced by a new one once it has become unusable.
pub struct Replaced<P> {
    build: Box<dyn Fn() -> Result<P, KafkaError> + Send + Sync>,
    current: Mutex<Arc<P>>,
}

impl<P: Mortal + Send + Sync + 'static> Replaced<P> {
    /// Builds the first client; `build` is called again for each that follows.
    pub fn new(
        build: impl Fn() -> Result<P, KafkaError> + Send + Sync + 'static,
    ) -> Result<Replaced<P>, KafkaError> {
        let current = Mutex::new(Arc::new(build()?));
        Ok(Replaced { build: Box::new(build), current })
    }

    /// The client to use now. What an unusable one still held is reported as not delivered.
    pub fn get(&self) -> Result<Arc<P>, KafkaError> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(cause) = current.fatal_error() {
            tracing::error!(cause, "a kafka client has become unusable and is replaced");
            let unusable = std::mem::replace(&mut *current, Arc::new((self.build)()?));
            // Its destructor waits for its threads.
            std::thread::spawn(move || drop(unusable));
        }
        Ok(current.clone())
    }
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
