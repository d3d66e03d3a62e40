//! Events → Kafka. Acknowledgements are counted, never awaited one by one; a full local queue means wait, never drop.

use crate::error::AttemptError;
use crate::metrics::Metrics;
use crate::source::extract::Event;
use async_trait::async_trait;
use chrono::{DateTime, SecondsFormat, Utc};
use common::admin::Health;
use common::event;
use common::kafka;
use rdkafka::client::ClientContext;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, Message, OwnedHeaders};
use rdkafka::producer::{BaseRecord, DeliveryResult, Producer, ProducerContext, ThreadedProducer};
use rdkafka::statistics::Statistics;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;

/// Name of Kafka among the dependencies of `/readyz`.
pub const DEPENDENCY: &str = "kafka";
/// How long Kafka's client tries to deliver one record.
const DELIVERY_TIMEOUT_MS: u64 = 120_000;
/// Records that wait in the client at most, over all runs.
const QUEUE_RECORDS: u64 = 200_000;
/// Kilobytes that wait in the client at most.
const QUEUE_KBYTES: u64 = 131_072;
/// How long a full queue is left alone; acknowledgements free it within a linger.
const FULL_QUEUE_PAUSE: Duration = Duration::from_millis(5);
/// How often the client says which brokers are connected.
const STATISTICS_MS: u64 = 1000;
/// Records handed over before other tasks get a turn.
const TURN: usize = 500;

/// The headers that all events of one run share.
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
    /// For a run; its trace takes the run's id.
    pub fn new(source: String, event_type: String, run_id: &uuid::Uuid) -> RunHeaders {
        let (trace, span) = (run_id.simple().to_string(), &uuid::Uuid::new_v4().simple().to_string()[..16]);
        RunHeaders {
            source,
            event_type,
            run_id: run_id.to_string(),
            traceparent: format!("00-{trace}-{span}-01"),
        }
    }

    /// All headers of one event.
    fn with(&self, found: &Event, produced_at_us: i64) -> OwnedHeaders {
        let add =
            |headers: OwnedHeaders, key, value: &str| headers.insert(Header { key, value: Some(value) });
        let mut headers = OwnedHeaders::new_with_capacity(9);
        if let Some(id) = &found.id {
            headers = add(headers, event::HEADER_ID, id);
        }
        headers = add(headers, event::HEADER_SOURCE, &self.source);
        headers = add(headers, event::HEADER_TYPE, &self.event_type);
        headers = add(headers, event::HEADER_SPEC_VERSION, event::SPEC_VERSION);
        if let Some(time) = found.time_ms.and_then(DateTime::from_timestamp_millis) {
            headers = add(headers, event::HEADER_TIME, &time.to_rfc3339_opts(SecondsFormat::Millis, true));
        }
        headers = add(headers, event::HEADER_CONTENT_TYPE, "application/json");
        headers = add(headers, event::HEADER_RUN_ID, &self.run_id);
        headers = add(headers, event::HEADER_TRACEPARENT, &self.traceparent);
        add(headers, event::HEADER_PRODUCED_AT, &produced_at_us.to_string())
    }
}

/// What became of the records of one run.
#[derive(Debug, Default)]
pub struct Acks {
    sent: AtomicU64,
    acked: AtomicU64,
    failed: AtomicU64,
    first_failure: Mutex<Option<String>>,
    changed: Notify,
}

impl Acks {
    /// Records acknowledged so far.
    pub fn acked(&self) -> u64 {
        self.acked.load(Ordering::Acquire)
    }

    /// One more record was handed to the client.
    pub fn sent(&self) {
        self.sent.fetch_add(1, Ordering::AcqRel);
    }

    /// One record's fate is known.
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

    /// Waits until the fate of every record sent is known; an error if one was not delivered.
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
            // `notify_one` keeps its permit: an acknowledgement between the check and this line is not missed.
            self.changed.notified().await;
        }
    }
}

/// Where events go: Kafka, or a fake.
#[async_trait]
pub trait Publish: Send + Sync {
    /// Hands all events over, waiting while the queue is full; their fate is counted in `acks`.
    async fn publish(&self, run: &RunHeaders, events: &[Event], acks: &Arc<Acks>)
    -> Result<(), AttemptError>;
}

/// What travels with a record until its acknowledgement.
#[derive(Debug)]
pub struct InFlight {
    acks: Arc<Acks>,
    produced_at_us: i64,
}

/// Counts acknowledgements and notes whether brokers are connected.
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
        // Bootstrap entries are placeholders until a broker has introduced itself.
        let up = statistics.brokers.values().any(|broker| broker.state == "UP");
        let down = || format!("no broker of {} is connected", self.brokers);
        self.health.set(DEPENDENCY, if up { Ok(()) } else { Err(down()) });
    }

    fn error(&self, error: KafkaError, reason: &str) {
        if error.rdkafka_error_code() == Some(RDKafkaErrorCode::AllBrokersDown) {
            self.health.set(DEPENDENCY, Err(format!("no broker of {} is connected", self.brokers)));
        } else {
            tracing::debug!(%error, reason, "kafka client");
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
                tracing::debug!(%error, partition = message.partition(), "record not delivered");
                sent.acks.settled(Err(error.to_string()));
            }
        }
    }
}

/// The producer of one topic.
pub struct KafkaPublisher {
    producer: ThreadedProducer<AckContext>,
    topic: String,
}

impl KafkaPublisher {
    /// Connects lazily; see [`KafkaPublisher::check`].
    pub fn new(
        brokers: &str,
        client_id: &str,
        topic: &str,
        metrics: Metrics,
        health: Arc<Health>,
    ) -> Result<KafkaPublisher, kafka::KafkaError> {
        let context = AckContext { metrics, health, brokers: brokers.to_owned() };
        let producer = kafka::producer_config(brokers, client_id)
            .set("message.timeout.ms", DELIVERY_TIMEOUT_MS.to_string())
            .set("queue.buffering.max.messages", QUEUE_RECORDS.to_string())
            .set("queue.buffering.max.kbytes", QUEUE_KBYTES.to_string())
            .set("statistics.interval.ms", STATISTICS_MS.to_string())
            .create_with_context(context)
            .map_err(|e| kafka::KafkaError::Client(e.to_string()))?;
        Ok(KafkaPublisher { producer, topic: topic.to_owned() })
    }

    /// Asks for the topic, at most `deadline`; the error names brokers or topic, and the way out. Blocking.
    pub fn check(&self, brokers: &str, deadline: Duration) -> Result<i32, kafka::KafkaError> {
        kafka::partition_count(self.producer.client(), brokers, &self.topic, deadline)
    }

    /// Waits for what is still in the queue, at most `deadline`. Blocking.
    pub fn flush(&self, deadline: Duration) {
        if let Err(e) = self.producer.flush(deadline) {
            tracing::warn!(error = %e, records = self.producer.in_flight_count(), "records not flushed");
        }
    }

    /// False: the queue is full.
    fn try_send(&self, run: &RunHeaders, event: &Event, acks: &Arc<Acks>) -> Result<bool, AttemptError> {
        let produced_at_us = Utc::now().timestamp_micros();
        let in_flight = Box::new(InFlight { acks: acks.clone(), produced_at_us });
        let record = BaseRecord::with_opaque_to(&self.topic, in_flight)
            .key(event.key.as_bytes())
            .payload(event.value.as_slice())
            .headers(run.with(event, produced_at_us));
        // Counted before the record is sent: its acknowledgement may come first.
        acks.sent();
        match self.producer.send(record) {
            Ok(()) => Ok(true),
            Err((error, _)) => {
                acks.sent.fetch_sub(1, Ordering::AcqRel);
                match error.rdkafka_error_code() {
                    Some(RDKafkaErrorCode::QueueFull) => Ok(false),
                    Some(RDKafkaErrorCode::MessageSizeTooLarge) => {
                        let bytes = event.value.len();
                        Err(AttemptError::fatal(format!("a record of {bytes} bytes is too large for kafka")))
                    }
                    _ => Err(AttemptError::retryable(format!("kafka refuses a record: {error}"))),
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
        events: &[Event],
        acks: &Arc<Acks>,
    ) -> Result<(), AttemptError> {
        for (index, event) in events.iter().enumerate() {
            while !self.try_send(run, event, acks)? {
                self.producer.client().context().metrics.queue_full.inc();
                tokio::time::sleep(FULL_QUEUE_PAUSE).await;
            }
            if index % TURN == TURN - 1 {
                tokio::task::yield_now().await;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rdkafka::consumer::{BaseConsumer, Consumer};
    use rdkafka::message::Headers;
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

    fn events(count: usize) -> Vec<Event> {
        (0..count)
            .map(|n| Event {
                id: Some(format!("id-{n}")),
                time_ms: Some(1_767_225_600_123),
                key: format!("id-{n}"),
                value: format!("{{\"n\":{n}}}").into_bytes(),
            })
            .collect()
    }

    fn headers() -> RunHeaders {
        RunHeaders::new("http://h/api".into(), "user.created".into(), &uuid::Uuid::from_u128(7))
    }

    #[tokio::test]
    async fn every_record_is_acknowledged_and_counted_once() {
        let cluster = cluster();
        let (publisher, metrics) = publisher(&cluster.bootstrap_servers());
        assert_eq!(publisher.check("mock", Duration::from_secs(10)).unwrap(), 3);
        let acks = Arc::new(Acks::default());
        publisher.publish(&headers(), &events(5000), &acks).await.unwrap();
        acks.all().await.unwrap();
        assert_eq!(
            (acks.acked(), metrics.records_acked.get(), metrics.records_failed.get()),
            (5000, 5000, 0)
        );
        assert_eq!(metrics.ack_seconds.get_sample_count(), 5000);
    }

    #[tokio::test]
    async fn an_event_carries_these_headers() {
        let cluster = cluster();
        let (publisher, _) = publisher(&cluster.bootstrap_servers());
        let acks = Arc::new(Acks::default());
        publisher.publish(&headers(), &events(1), &acks).await.unwrap();
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
        let message = consumer.poll(Duration::from_secs(20)).expect("a record").unwrap();
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
    async fn a_record_that_is_refused_fails_its_run_only() {
        let cluster = cluster();
        let (publisher, metrics) = publisher(&cluster.bootstrap_servers());
        let refused = [RDKafkaRespErr::RD_KAFKA_RESP_ERR_MSG_SIZE_TOO_LARGE];
        cluster.request_errors(RDKafkaApiKey::Produce, &refused);
        let (first, second) = (Arc::new(Acks::default()), Arc::new(Acks::default()));
        publisher.publish(&headers(), &events(1), &first).await.unwrap();
        let error = first.all().await.unwrap_err();
        assert!(error.cause.starts_with("1 of 1 records not delivered"), "{error}");
        publisher.publish(&headers(), &events(10), &second).await.unwrap();
        second.all().await.unwrap();
        assert_eq!((metrics.records_failed.get(), metrics.records_acked.get()), (1, 10));
    }

    #[tokio::test]
    async fn a_topic_that_is_missing_is_named_with_the_way_out() {
        let cluster: MockCluster<'static, DefaultProducerContext> = MockCluster::new(1).unwrap();
        cluster.topic_error(TOPIC, RDKafkaRespErr::RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART).unwrap();
        let (publisher, _) = publisher(&cluster.bootstrap_servers());
        let error = publisher.check("mock", Duration::from_secs(10)).unwrap_err().to_string();
        assert!(error.contains("`events`") && error.contains("stream-processor init"), "{error}");
    }

    #[tokio::test]
    async fn nothing_sent_is_nothing_to_wait_for() {
        Acks::default().all().await.unwrap();
    }
}
