//! Produces records to Kafka. Acknowledgements are counted, not awaited one by one. If the local queue is full, the
//! publisher waits; it never drops a record.

use crate::error::AttemptError;
use crate::metrics::Metrics;
use crate::source::extract::Outgoing;
use async_trait::async_trait;
use chrono::{DateTime, SecondsFormat, Utc};
use common::contracts::event;
use common::runtime::admin::Health;
use common::runtime::kafka::{self, Replaced};
use prometheus::IntCounter;
use rdkafka::client::ClientContext;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, Message, OwnedHeaders};
use rdkafka::producer::{BaseRecord, DeliveryResult, Producer, ProducerContext, ThreadedProducer};
use rdkafka::statistics::Statistics;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;

/// Name of Kafka among the dependencies of `/readyz`.
pub const DEPENDENCY: &str = "kafka";
/// How long the Kafka client tries to deliver a record.
const DELIVERY_TIMEOUT_MS: u64 = 120_000;
/// Maximum records in the client's queue, shared by all runs.
const QUEUE_RECORDS: u64 = 200_000;
/// Maximum size of the client's queue in kilobytes.
const QUEUE_KBYTES: u64 = 131_072;
/// Pause before sending to a full queue is retried. Acknowledgements free space within a linger interval.
const FULL_QUEUE_PAUSE: Duration = Duration::from_millis(5);
/// Interval of the client's statistics, which report whether brokers are connected.
const STATISTICS_MS: u64 = 1000;

/// The headers that all records of a run share.
#[derive(Debug, Clone)]
pub struct RunHeaders {
    /// `ce_source`.
    pub source: String,
    /// `ce_type`.
    pub event_type: String,
    /// `run_id`.
    pub run_id: String,
    /// `traceparent`.
    pub traceparent: String,
}

impl RunHeaders {
    /// Creates the headers of a run. The trace id is the run id.
    pub fn new(source: String, event_type: String, run_id: &uuid::Uuid) -> RunHeaders {
        let (trace, span) = (run_id.simple().to_string(), &uuid::Uuid::new_v4().simple().to_string()[..16]);
        RunHeaders {
            source,
            event_type,
            run_id: run_id.to_string(),
            traceparent: format!("00-{trace}-{span}-01"),
        }
    }

    /// Adds the headers of one record.
    fn with(&self, outgoing: &Outgoing, produced_at_us: i64) -> OwnedHeaders {
        let add =
            |headers: OwnedHeaders, key, value: &str| headers.insert(Header { key, value: Some(value) });
        let mut headers = OwnedHeaders::new_with_capacity(9);
        match outgoing {
            Outgoing::Event(found) => {
                let time = DateTime::from_timestamp_millis(found.time_ms).unwrap_or_default();
                let time = time.to_rfc3339_opts(SecondsFormat::Millis, true);
                headers = add(headers, event::HEADER_ID, &found.id);
                headers = add(headers, event::HEADER_TIME, &time);
            }
            Outgoing::Refused(refused) => headers = add(headers, event::HEADER_REFUSED, &refused.reason),
        }
        headers = add(headers, event::HEADER_SOURCE, &self.source);
        headers = add(headers, event::HEADER_TYPE, &self.event_type);
        headers = add(headers, event::HEADER_SPEC_VERSION, event::SPEC_VERSION);
        headers = add(headers, event::HEADER_CONTENT_TYPE, "application/json");
        headers = add(headers, event::HEADER_RUN_ID, &self.run_id);
        headers = add(headers, event::HEADER_TRACEPARENT, &self.traceparent);
        add(headers, event::HEADER_PRODUCED_AT, &produced_at_us.to_string())
    }
}

/// Counts the delivery results of a run's records.
#[derive(Debug, Default)]
pub struct Acks {
    sent: AtomicU64,
    acked: AtomicU64,
    failed: AtomicU64,
    first_failure: Mutex<Option<String>>,
    changed: Notify,
}

impl Acks {
    /// The number of records acknowledged so far.
    pub fn acked(&self) -> u64 {
        self.acked.load(Ordering::Acquire)
    }

    /// Counts a record that is handed to the client.
    pub fn sent(&self) {
        self.sent.fetch_add(1, Ordering::AcqRel);
    }

    /// Counts the delivery result of one record.
    pub fn settled(&self, outcome: Result<(), String>) {
        match outcome {
            Ok(()) => self.acked.fetch_add(1, Ordering::AcqRel),
            Err(cause) => {
                self.first_failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(cause);
                self.failed.fetch_add(1, Ordering::AcqRel)
            }
        };
        self.changed.notify_one();
    }

    /// Waits for the delivery result of every record sent. Fails if any record was not delivered.
    pub async fn all(&self) -> Result<(), AttemptError> {
        loop {
            let (sent, acked) = (self.sent.load(Ordering::Acquire), self.acked());
            let failed = self.failed.load(Ordering::Acquire);
            if acked + failed >= sent {
                if failed == 0 {
                    return Ok(());
                }
                let cause = self.first_failure.lock().unwrap_or_else(PoisonError::into_inner).clone();
                let cause = cause.unwrap_or_default();
                return Err(AttemptError::retryable(format!(
                    "{failed} of {sent} records not delivered: {cause}"
                )));
            }
            // `notify_one` stores a permit, so an acknowledgement between the check and this line is not missed.
            self.changed.notified().await;
        }
    }
}

/// Publishes records. Implemented for Kafka and by fakes in tests.
#[async_trait]
pub trait Publish: Send + Sync {
    /// Queues all records, waiting while the queue is full. Delivery results are counted in `acks`.
    async fn publish(
        &self,
        run: &RunHeaders,
        records: &[Outgoing],
        acks: &Arc<Acks>,
    ) -> Result<(), AttemptError>;
}

/// The state that the client keeps with a record until its acknowledgement.
#[derive(Debug)]
pub struct InFlight {
    acks: Arc<Acks>,
    produced_at_us: i64,
}

/// Client callbacks that count acknowledgements and report whether brokers are connected.
#[derive(Debug)]
pub struct AckContext {
    metrics: Metrics,
    health: Arc<Health>,
    brokers: String,
}

impl ClientContext for AckContext {
    fn stats(&self, statistics: Statistics) {
        let records = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        self.metrics.queue_records.set(records(statistics.msg_cnt));
        self.metrics.queue_limit.set(records(statistics.msg_max));
        // Bootstrap entries are placeholders. They are replaced when a broker reports its id.
        let up = statistics.brokers.values().any(|broker| broker.state == "UP");
        let down = || format!("no broker of {} is connected", self.brokers);
        self.health.set(DEPENDENCY, if up { Ok(()) } else { Err(down()) });
    }

    fn error(&self, error: KafkaError, reason: &str) {
        if error.rdkafka_error_code() == Some(RDKafkaErrorCode::AllBrokersDown) {
            self.health.set(DEPENDENCY, Err(format!("no broker of {} is connected", self.brokers)));
        } else {
            tracing::debug!(%error, reason, "kafka client error");
        }
    }
}

impl ProducerContext for AckContext {
    type DeliveryOpaque = Box<InFlight>;

    fn delivery(&self, result: &DeliveryResult<'_>, sent: Box<InFlight>) {
        match result {
            Ok(_) => {
                self.metrics.records_acked.inc();
                let waited_us = Utc::now().timestamp_micros() - sent.produced_at_us;
                self.metrics.ack_seconds.observe(waited_us.max(0) as f64 / 1e6);
                sent.acks.settled(Ok(()));
            }
            Err((error, message)) => {
                self.metrics.records_failed.inc();
                tracing::debug!(%error, partition = message.partition(), "a record was not delivered");
                sent.acks.settled(Err(error.to_string()));
            }
        }
    }
}

/// Produces to one topic.
pub struct KafkaPublisher {
    client: Replaced<ThreadedProducer<AckContext>>,
    brokers: String,
    topic: String,
    /// Number of partitions that keys are distributed over. While it is 0 (unknown), the client chooses the partition.
    partitions: AtomicI32,
    queue_full: IntCounter,
}

impl KafkaPublisher {
    /// Creates a client, which connects lazily. Use [`KafkaPublisher::describe`] to check the connection.
    pub fn new(
        brokers: &str,
        client_id: &str,
        topic: &str,
        metrics: Metrics,
        health: Arc<Health>,
    ) -> Result<KafkaPublisher, kafka::KafkaError> {
        let queue_full = metrics.queue_full.clone();
        let (servers, client_id) = (brokers.to_owned(), client_id.to_owned());
        let build = move || {
            let (metrics, health, brokers) = (metrics.clone(), health.clone(), servers.clone());
            kafka::producer_config(&servers, &client_id)
                .set("message.timeout.ms", DELIVERY_TIMEOUT_MS.to_string())
                .set("queue.buffering.max.messages", QUEUE_RECORDS.to_string())
                .set("queue.buffering.max.kbytes", QUEUE_KBYTES.to_string())
                .set("statistics.interval.ms", STATISTICS_MS.to_string())
                .create_with_context(AckContext { metrics, health, brokers })
                .map_err(|e| kafka::KafkaError::Client(e.to_string()))
        };
        Ok(KafkaPublisher {
            client: Replaced::new(build)?,
            brokers: brokers.to_owned(),
            topic: topic.to_owned(),
            partitions: AtomicI32::new(0),
            queue_full,
        })
    }

    /// Name of the topic.
    pub fn topic(&self) -> &str {
        &self.topic
    }

    /// Describes the topic within `deadline`. The error names the brokers or the topic, and how to fix it. Blocking.
    pub fn describe(&self, deadline: Duration) -> Result<kafka::Topic, kafka::KafkaError> {
        let described = kafka::describe(self.client.get()?.client(), &self.brokers, &self.topic, deadline);
        if let Err(error @ kafka::KafkaError::Unreachable { .. }) = &described {
            self.client.doubt(error);
        }
        described
    }

    /// Sets the number of partitions that keys are distributed over, regardless of how many the topic has.
    pub fn set_partitions(&self, partitions: i32) {
        self.partitions.store(partitions, Ordering::Relaxed);
    }

    /// Waits up to `deadline` for queued records to be delivered. Blocking.
    pub fn flush(&self, deadline: Duration) {
        let Ok(client) = self.client.get() else { return };
        if let Err(e) = client.flush(deadline) {
            tracing::warn!(error = %e, records = client.in_flight_count(), "flushing queued records failed");
        }
    }

    /// Queues a record. Returns `false` if the queue is full.
    fn try_send(
        &self,
        client: &ThreadedProducer<AckContext>,
        run: &RunHeaders,
        record: &Outgoing,
        acks: &Arc<Acks>,
    ) -> Result<bool, AttemptError> {
        let produced_at_us = Utc::now().timestamp_micros();
        let in_flight = Box::new(InFlight { acks: acks.clone(), produced_at_us });
        let mut message = BaseRecord::with_opaque_to(&self.topic, in_flight)
            .key(record.key().as_bytes())
            .payload(record.value())
            .headers(run.with(record, produced_at_us));
        let partitions = self.partitions.load(Ordering::Relaxed);
        if partitions > 0 {
            message = message.partition(event::partition_of(record.key().as_bytes(), partitions));
        }
        // Counted before the send, because the acknowledgement may arrive before `send` returns.
        acks.sent();
        match client.send(message) {
            Ok(()) => Ok(true),
            Err((error, _)) => {
                acks.sent.fetch_sub(1, Ordering::AcqRel);
                match error.rdkafka_error_code() {
                    Some(RDKafkaErrorCode::QueueFull) => Ok(false),
                    Some(RDKafkaErrorCode::MessageSizeTooLarge) => {
                        let bytes = record.value().len();
                        Err(AttemptError::fatal(format!(
                            "a record of {bytes} bytes exceeds the maximum message size of the kafka client"
                        )))
                    }
                    _ => Err(AttemptError::retryable(format!("the kafka client rejected a record: {error}"))),
                }
            }
        }
    }
}

#[async_trait]
impl Publish for KafkaPublisher {
    async fn publish(
        &self,
        run: &RunHeaders,
        records: &[Outgoing],
        acks: &Arc<Acks>,
    ) -> Result<(), AttemptError> {
        let client = self.client.get().map_err(|e| AttemptError::retryable(e.to_string()))?;
        for record in records {
            while !self.try_send(&client, run, record, acks)? {
                self.queue_full.inc();
                tokio::time::sleep(FULL_QUEUE_PAUSE).await;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::extract::{Event, Refused};
    use rdkafka::consumer::{BaseConsumer, Consumer};
    use rdkafka::message::{Headers, OwnedMessage};
    use rdkafka::mocking::MockCluster;
    use rdkafka::producer::DefaultProducerContext;
    use rdkafka::types::RDKafkaApiKey;
    use rdkafka::types::RDKafkaRespErr;
    use rdkafka::{Offset, TopicPartitionList};

    const TOPIC: &str = "events";

    fn cluster() -> MockCluster<'static, DefaultProducerContext> {
        let cluster = MockCluster::new(1).unwrap();
        cluster.create_topic(TOPIC, 3, 1).unwrap();
        cluster
    }

    fn publisher(brokers: &str) -> (KafkaPublisher, Metrics) {
        let metrics = Metrics::new().unwrap();
        let health = Health::new(Duration::from_secs(10), &[DEPENDENCY]);
        (KafkaPublisher::new(brokers, "test", TOPIC, metrics.clone(), health).unwrap(), metrics)
    }

    fn events(count: usize) -> Vec<Outgoing> {
        let event = |n| Event {
            id: format!("id-{n}"),
            time_ms: 1_767_225_600_123,
            key: format!("id-{n}"),
            value: format!("{{\"n\":{n}}}").into_bytes(),
        };
        (0..count).map(|n| Outgoing::Event(event(n))).collect()
    }

    fn headers() -> RunHeaders {
        RunHeaders::new("http://h/api".into(), "user.created".into(), &uuid::Uuid::from_u128(7))
    }

    #[tokio::test]
    async fn every_record_is_acknowledged_and_counted_once() {
        let cluster = cluster();
        let (publisher, metrics) = publisher(&cluster.bootstrap_servers());
        assert_eq!(publisher.describe(Duration::from_secs(10)).unwrap().partitions, 3);
        let acks = Arc::new(Acks::default());
        publisher.publish(&headers(), &events(5000), &acks).await.unwrap();
        acks.all().await.unwrap();
        assert_eq!(
            (acks.acked(), metrics.records_acked.get(), metrics.records_failed.get()),
            (5000, 5000, 0)
        );
        assert_eq!(metrics.ack_seconds.get_sample_count(), 5000);
    }

    /// Publishes one record and reads it back.
    async fn sent(record: Outgoing) -> OwnedMessage {
        let cluster = cluster();
        let (publisher, _) = publisher(&cluster.bootstrap_servers());
        let acks = Arc::new(Acks::default());
        publisher.publish(&headers(), &[record], &acks).await.unwrap();
        acks.all().await.unwrap();
        let consumer: BaseConsumer = kafka::client_config(&cluster.bootstrap_servers(), "reader")
            .set("group.id", "g")
            .create()
            .unwrap();
        let mut everything = TopicPartitionList::new();
        for partition in 0..3 {
            everything.add_partition_offset(TOPIC, partition, Offset::Beginning).unwrap();
        }
        consumer.assign(&everything).unwrap();
        consumer.poll(Duration::from_secs(20)).expect("a record").unwrap().detach()
    }

    #[tokio::test]
    async fn an_event_carries_these_headers() {
        let message = sent(events(1).remove(0)).await;
        let found: Vec<(String, String)> = message
            .headers()
            .unwrap()
            .iter()
            .map(|h| (h.key.to_owned(), String::from_utf8(h.value.unwrap().to_vec()).unwrap()))
            .filter(|(key, _)| key != event::HEADER_PRODUCED_AT && key != event::HEADER_TRACEPARENT)
            .collect();
        insta::assert_debug_snapshot!(found);
        assert_eq!(message.headers().unwrap().count(), 9);
        assert_eq!(message.key(), Some("id-0".as_bytes()));
    }

    #[tokio::test]
    async fn a_refused_record_carries_its_reason_and_neither_id_nor_time() {
        let (reason, key, value) = ("not valid JSON".to_owned(), "k".to_owned(), b"\xff{".to_vec());
        let message = sent(Outgoing::Refused(Refused { reason, key, value })).await;
        let header = |name: &str| {
            message.headers().unwrap().iter().find(|h| h.key == name).map(|h| h.value.unwrap().to_vec())
        };
        assert_eq!((message.key(), message.payload()), (Some(b"k".as_slice()), Some(b"\xff{".as_slice())));
        assert_eq!(header(event::HEADER_REFUSED), Some(b"not valid JSON".to_vec()));
        assert_eq!((header(event::HEADER_ID), header(event::HEADER_TIME)), (None, None));
        assert!(header(event::HEADER_RUN_ID).is_some());
    }

    #[tokio::test]
    async fn an_undelivered_record_fails_only_its_own_run() {
        let cluster = cluster();
        let (publisher, metrics) = publisher(&cluster.bootstrap_servers());
        let errors = [RDKafkaRespErr::RD_KAFKA_RESP_ERR_MSG_SIZE_TOO_LARGE];
        cluster.request_errors(RDKafkaApiKey::Produce, &errors);
        let (first, second) = (Arc::new(Acks::default()), Arc::new(Acks::default()));
        publisher.publish(&headers(), &events(1), &first).await.unwrap();
        let error = first.all().await.unwrap_err();
        assert!(error.cause.starts_with("1 of 1 records not delivered"), "{error}");
        publisher.publish(&headers(), &events(10), &second).await.unwrap();
        second.all().await.unwrap();
        assert_eq!((metrics.records_failed.get(), metrics.records_acked.get()), (1, 10));
    }

    #[tokio::test]
    async fn the_error_for_a_missing_topic_names_the_topic_and_the_fix() {
        let cluster: MockCluster<'static, DefaultProducerContext> = MockCluster::new(1).unwrap();
        cluster.topic_error(TOPIC, RDKafkaRespErr::RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART).unwrap();
        let (publisher, _) = publisher(&cluster.bootstrap_servers());
        let error = publisher.describe(Duration::from_secs(10)).unwrap_err().to_string();
        assert!(error.contains("`events`") && error.contains("stream-processor init"), "{error}");
    }

    #[tokio::test]
    async fn an_unusable_client_is_replaced() {
        let cluster = cluster();
        // The broker denies the first producer an id. The client library treats this as fatal.
        let errors = [RDKafkaRespErr::RD_KAFKA_RESP_ERR_CLUSTER_AUTHORIZATION_FAILED];
        cluster.request_errors(RDKafkaApiKey::InitProducerId, &errors);
        let (publisher, metrics) = publisher(&cluster.bootstrap_servers());
        let first = Arc::new(Acks::default());
        publisher.publish(&headers(), &events(1), &first).await.unwrap();
        let unusable = publisher.client.get().unwrap();
        while unusable.client().fatal_error().is_none() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        drop(unusable);
        let second = Arc::new(Acks::default());
        publisher.publish(&headers(), &events(10), &second).await.unwrap();
        second.all().await.unwrap();
        assert!(first.all().await.is_err(), "records in the unusable client are reported as not delivered");
        assert_eq!((metrics.records_failed.get(), metrics.records_acked.get()), (1, 10));
    }

    #[tokio::test]
    async fn keys_keep_their_partition_when_partitions_are_added() {
        let cluster = cluster();
        let (publisher, _) = publisher(&cluster.bootstrap_servers());
        publisher.set_partitions(2);
        let acks = Arc::new(Acks::default());
        publisher.publish(&headers(), &events(200), &acks).await.unwrap();
        acks.all().await.unwrap();
        let consumer: BaseConsumer = kafka::client_config(&cluster.bootstrap_servers(), "reader")
            .set("group.id", "g")
            .create()
            .unwrap();
        let ends = [0, 1, 2].map(|p| consumer.fetch_watermarks(TOPIC, p, Duration::from_secs(20)).unwrap().1);
        assert_eq!((ends[0] + ends[1], ends[2]), (200, 0), "{ends:?}");
        assert!(ends[0] > 50 && ends[1] > 50, "{ends:?}");
    }

    #[tokio::test]
    async fn waiting_returns_at_once_if_nothing_was_sent() {
        Acks::default().all().await.unwrap();
    }
}
