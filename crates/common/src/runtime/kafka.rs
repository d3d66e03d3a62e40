//! Kafka client settings that all services share, metadata requests, and the replacement of broken clients. Each
//! service decides what it sends and reads.

use rdkafka::ClientConfig;
use rdkafka::client::{Client, ClientContext};
use rdkafka::consumer::{BaseConsumer, Consumer, StreamConsumer};
use rdkafka::producer::{FutureProducer, Producer, ProducerContext, ThreadedProducer};
use std::fmt::Display;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The partitioner of every producer. It places keyed records like the Java client does, so equal keys always go to the
/// same partition.
pub const PARTITIONER: &str = "murmur2_random";
/// A suspected client is replaced only after this time: while no broker responds, a new client would not help.
const MIN_CLIENT_AGE: Duration = Duration::from_secs(5);
/// Most replaced clients that may still be closing.
const MAX_CLOSING_CLIENTS: usize = 4;
/// Largest record value and batch in bytes.
pub const MAX_MESSAGE_BYTES: usize = 4 << 20;

/// A request to Kafka failed.
#[derive(Debug, thiserror::Error)]
pub enum KafkaError {
    /// No broker responded.
    #[error(
        "kafka at {brokers} does not answer ({cause}); is it running, and is PIPELINE_KAFKA_BROKERS right?"
    )]
    Unreachable {
        /// Bootstrap servers.
        brokers: String,
        /// The error of librdkafka.
        cause: String,
    },
    /// A topic is missing.
    #[error("kafka topic `{topic}` does not exist; run `stream-processor init` first")]
    NoTopic {
        /// Name of the topic.
        topic: String,
    },
    /// The client could not be created.
    #[error("kafka client: {0}")]
    Client(String),
    /// The brokers did not report a cluster id in time.
    #[error("kafka at {0} does not report its cluster id")]
    NoClusterId(String),
}

/// Settings of every client.
pub fn client_config(brokers: &str, client_id: &str) -> ClientConfig {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", brokers)
        .set("client.id", client_id)
        .set("message.max.bytes", MAX_MESSAGE_BYTES.to_string())
        .set("socket.keepalive.enable", "true")
        .set("reconnect.backoff.ms", "100")
        .set("reconnect.backoff.max.ms", "2000")
        // Brokers change their addresses in tests and in Compose. A cached address would be stale.
        .set("broker.address.ttl", "1000")
        .set("topic.metadata.refresh.interval.ms", "30000");
    config
}

/// Settings of every producer: idempotent, `acks=all`, and [`PARTITIONER`].
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

/// Fetches the number of partitions of `topic`. Blocks for at most `deadline`.
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

/// What identifies the topic of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topic {
    /// Id of the Kafka cluster.
    pub cluster_id: String,
    /// Number of partitions.
    pub partitions: i32,
}

/// Fetches the cluster id and the number of partitions of `topic`. Blocks for at most twice `deadline`, once per
/// request.
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

/// A client that can fail permanently. An idempotent producer never sends again after a fatal error, for example after
/// a gap in its sequence numbers, after it was fenced, or after it lost its permissions.
pub trait FallibleClient {
    /// The fatal error of the client. `None` if the client is usable.
    fn fatal_error(&self) -> Option<String>;
}

fn fatal_error<C: ClientContext>(client: &Client<C>) -> Option<String> {
    client.fatal_error().map(|(code, reason)| format!("{code}: {reason}"))
}

impl<C: ProducerContext + 'static> FallibleClient for ThreadedProducer<C> {
    fn fatal_error(&self) -> Option<String> {
        fatal_error(self.client())
    }
}

impl FallibleClient for FutureProducer {
    fn fatal_error(&self) -> Option<String> {
        fatal_error(self.client())
    }
}

impl FallibleClient for BaseConsumer {
    fn fatal_error(&self) -> Option<String> {
        fatal_error(self.client())
    }
}

impl FallibleClient for StreamConsumer {
    fn fatal_error(&self) -> Option<String> {
        fatal_error(self.client())
    }
}

/// A client that is replaced by a new one after a fatal error, or if it no longer reaches any broker. The latter
/// happens when a suspended broker resumes: it is fenced, and its first metadata response contains the topic but no
/// brokers. librdkafka 2.12 then forgets all brokers and never contacts a bootstrap server again.
pub struct Replaced<P> {
    build: Box<dyn Fn() -> Result<P, KafkaError> + Send + Sync>,
    current: Mutex<Current<P>>,
    /// Each thread that closes a replaced client holds a clone, so the strong count bounds their number.
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

impl<P: FallibleClient + Send + Sync + 'static> Replaced<P> {
    /// Builds the first client. `build` is called again for each replacement.
    pub fn new(
        build: impl Fn() -> Result<P, KafkaError> + Send + Sync + 'static,
    ) -> Result<Replaced<P>, KafkaError> {
        let current = Mutex::new(Current::new(build()?));
        Ok(Replaced { build: Box::new(build), current, closing: Arc::default() })
    }

    fn lock(&self) -> MutexGuard<'_, Current<P>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The current client, replaced first if it is broken. A replaced producer reports its queued records as not
    /// delivered.
    pub fn get(&self) -> Result<Arc<P>, KafkaError> {
        let mut current = self.lock();
        let doubt = current.doubt.clone().filter(|_| current.built.elapsed() >= MIN_CLIENT_AGE);
        if let Some(cause) = current.client.fatal_error().or(doubt)
            && Arc::strong_count(&self.closing) <= MAX_CLOSING_CLIENTS
        {
            tracing::warn!(cause, "replacing a kafka client that no longer works");
            let replaced = std::mem::replace(&mut *current, Current::new((self.build)()?));
            let closing = Arc::clone(&self.closing);
            // Dropping a client waits for its threads, which may wait for brokers.
            std::thread::spawn(move || {
                drop(replaced);
                drop(closing);
            });
        }
        Ok(Arc::clone(&current.client))
    }

    /// Marks the current client as suspect because a request timed out. [`Replaced::get`] replaces it once it is at
    /// least five seconds old.
    pub fn doubt(&self, cause: &impl Display) {
        self.lock().doubt.get_or_insert_with(|| cause.to_string());
    }
}

/// A consumer that only fetches offsets and metadata.
pub fn plain_consumer(brokers: &str, client_id: &str) -> Result<Replaced<BaseConsumer>, KafkaError> {
    let config = client_config(brokers, client_id);
    Replaced::new(move || config.create().map_err(|e| KafkaError::Client(e.to_string())))
}

/// Waits for a broker to respond. Blocks for at most `deadline`. The error names the brokers.
pub fn wait_for_broker(brokers: &str, deadline: Duration) -> Result<BaseConsumer, KafkaError> {
    let consumer: BaseConsumer =
        client_config(brokers, "pipeline-probe").create().map_err(|e| KafkaError::Client(e.to_string()))?;
    consumer
        .fetch_metadata(None, deadline)
        .map_err(|e| KafkaError::Unreachable { brokers: brokers.to_owned(), cause: e.to_string() })?;
    Ok(consumer)
}
