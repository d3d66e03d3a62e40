//! Sends events from outside the pipeline, as another program would: to chosen partitions, or in transactions. All
//! calls block.

use std::time::Duration;

use local_stack::error::Result;
use rdkafka::ClientConfig;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseRecord, DefaultProducerContext, Producer, ThreadedProducer};

use super::failed;

/// Time limit for one step: the acknowledgement of all records, or the start or end of a transaction.
const STEP_TIMEOUT: Duration = Duration::from_secs(20);

/// `linger.ms`, long enough that the records sent to one partition at the same time form a single batch.
const LINGER_MILLIS: u32 = 200;

/// `transaction.timeout.ms`, after which Kafka aborts an open transaction.
const TRANSACTION_MILLIS: u32 = 30_000;

/// Sends events to one topic.
pub struct Sender {
    producer: ThreadedProducer<DefaultProducerContext>,
    topic: String,
}

/// Events that differ only in their ids.
#[derive(Clone, Copy, Debug)]
pub struct Events<'a> {
    /// Ids of the events, one event per id.
    pub ids: &'a [String],
    /// Event time of all events, in RFC 3339 format.
    pub time: &'a str,
    /// Record value of all events.
    pub value: &'a [u8],
}

impl Sender {
    /// Creates a sender without transactions.
    pub fn new(brokers: &str, topic: &str) -> Result<Self> {
        let producer = config(brokers).create().map_err(failed)?;
        Ok(Self { producer, topic: topic.to_owned() })
    }

    /// Creates a sender and begins a transaction. Kafka aborts a transaction that an earlier sender with the same id
    /// left open.
    pub fn begin(brokers: &str, topic: &str, id: &str) -> Result<Self> {
        let producer: ThreadedProducer<DefaultProducerContext> = config(brokers)
            .set("transactional.id", id)
            .set("transaction.timeout.ms", TRANSACTION_MILLIS.to_string())
            .create()
            .map_err(failed)?;
        producer.init_transactions(STEP_TIMEOUT).map_err(failed)?;
        producer.begin_transaction().map_err(failed)?;
        Ok(Self { producer, topic: topic.to_owned() })
    }

    /// Sends events and waits for all acknowledgements. Without a partition, the id of each event determines its
    /// partition.
    pub fn send(&self, partition: Option<i32>, events: Events<'_>) -> Result<()> {
        for id in events.ids {
            let headers = [("ce_id", id.as_str()), ("ce_time", events.time)];
            let headers = headers.into_iter().fold(OwnedHeaders::new(), |headers, (key, value)| {
                headers.insert(Header { key, value: Some(value) })
            });
            let mut record = BaseRecord::to(&self.topic).key(id).payload(events.value).headers(headers);
            record.partition = partition;
            self.producer.send(record).map_err(|(error, _)| failed(error))?;
        }
        self.producer.flush(STEP_TIMEOUT).map_err(failed)
    }

    /// Commits the transaction if `commit` is true, otherwise aborts it.
    pub fn end(self, commit: bool) -> Result<()> {
        let ended = if commit {
            self.producer.commit_transaction(STEP_TIMEOUT)
        } else {
            self.producer.abort_transaction(STEP_TIMEOUT)
        };
        ended.map_err(failed)
    }
}

fn config(brokers: &str) -> ClientConfig {
    let mut config = common::runtime::kafka::producer_config(brokers, "system-tests");
    config.set("linger.ms", LINGER_MILLIS.to_string());
    config
}
