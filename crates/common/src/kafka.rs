//! Kafka clients set up the one right way, and the names of things in Kafka. What to send or read is each service's own.

use rdkafka::ClientConfig;
use rdkafka::client::{Client, ClientContext};
use rdkafka::consumer::{BaseConsumer, Consumer, StreamConsumer};
use rdkafka::producer::{FutureProducer, Producer, ProducerContext, ThreadedProducer};
use std::fmt::Display;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The partitioner of every producer: Java's own for keyed records, so that one id always lands in one partition.
pub const PARTITIONER: &str = "murmur2_random";
/// A client is kept at least this long: while no broker answers, a new one would fare no better.
const KEPT_AT_LEAST: Duration = Duration::from_secs(5);
/// Most replaced clients that are still closing.
const CLOSING_MOST: usize = 4;
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

/// Asks for the cluster and the number of partitions of `topic`; each question has the deadline. Blocking.
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

fn fatal_error<C: ClientContext>(client: &Client<C>) -> Option<String> {
    client.fatal_error().map(|(code, reason)| format!("{code}: {reason}"))
}

impl<C: ProducerContext + 'static> Mortal for ThreadedProducer<C> {
    fn fatal_error(&self) -> Option<String> {
        fatal_error(self.client())
    }
}

impl Mortal for FutureProducer {
    fn fatal_error(&self) -> Option<String> {
        fatal_error(self.client())
    }
}

impl Mortal for BaseConsumer {
    fn fatal_error(&self) -> Option<String> {
        fatal_error(self.client())
    }
}

impl Mortal for StreamConsumer {
    fn fatal_error(&self) -> Option<String> {
        fatal_error(self.client())
    }
}

/// A client that is replaced by a new one once it has become unusable or deaf. A broker that stood still is fenced when it
/// continues, and answers once with the topic and no broker at all; librdkafka 2.12 then forgets every broker it knew and
/// never asks a bootstrap server again.
pub struct Replaced<P> {
    build: Box<dyn Fn() -> Result<P, KafkaError> + Send + Sync>,
    current: Mutex<Current<P>>,
    /// Shared with the threads that close replaced clients.
    closing: Arc<()>,
}

struct Current<P> {
    client: Arc<P>,
    built: Instant,
    doubt: Option<String>,
}

impl<P> Current<P> {
    fn new(client: P) -> Current<P> {
        Current { client: Arc::new(client), built: Instant::now(), doubt: None }
    }
}

impl<P: Mortal + Send + Sync + 'static> Replaced<P> {
    /// Builds the first client; `build` is called again for each that follows.
    pub fn new(
        build: impl Fn() -> Result<P, KafkaError> + Send + Sync + 'static,
    ) -> Result<Replaced<P>, KafkaError> {
        let current = Mutex::new(Current::new(build()?));
        Ok(Replaced { build: Box::new(build), current, closing: Arc::default() })
    }

    fn lock(&self) -> MutexGuard<'_, Current<P>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The client to use now. What a replaced one still held is reported as not delivered.
    pub fn get(&self) -> Result<Arc<P>, KafkaError> {
        let mut current = self.lock();
        let doubt = current.doubt.clone().filter(|_| current.built.elapsed() >= KEPT_AT_LEAST);
        if let Some(cause) = current.client.fatal_error().or(doubt)
            && Arc::strong_count(&self.closing) <= CLOSING_MOST
        {
            tracing::warn!(cause, "a kafka client no longer works and is replaced");
            let replaced = std::mem::replace(&mut *current, Current::new((self.build)()?));
            let closing = Arc::clone(&self.closing);
            // Its destructor waits for its threads, and they for brokers.
            std::thread::spawn(move || {
                drop(replaced);
                drop(closing);
            });
        }
        Ok(Arc::clone(&current.client))
    }

    /// The client has had no answer within its time: it may be deaf. [`Replaced::get`] replaces it, but not one that is new.
    pub fn doubt(&self, cause: &impl Display) {
        self.lock().doubt.get_or_insert_with(|| cause.to_string());
    }
}

/// A consumer that only asks for offsets and metadata, replaced as needed.
pub fn plain_consumer(brokers: &str, client_id: &str) -> Result<Replaced<BaseConsumer>, KafkaError> {
    let config = client_config(brokers, client_id);
    Replaced::new(move || config.create().map_err(|e| KafkaError::Client(e.to_string())))
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
