//! Events sent from outside the pipeline, as other programs may do: to a partition of one's choice, in transactions. All
//! calls block.

use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseRecord, DefaultProducerContext, Producer, ThreadedProducer};

use super::failed;
use crate::error::Result;

/// How long Kafka may take for one step: all records acknowledged, a transaction begun or ended.
const STEP_WITHIN: Duration = Duration::from_secs(20);

/// How long a batch waits for more records: what is sent at once to one partition becomes one batch.
const LINGER_MILLIS: u32 = 200;

/// Kafka aborts a transaction that is open for longer.
const TRANSACTION_MILLIS: u32 = 30_000;

/// A producer of events of one topic.
pub struct Sender {
    producer: ThreadedProducer<DefaultProducerContext>,
    topic: String,
}

/// Events that share everything but their ids.
#[derive(Clone, Copy, Debug)]
pub struct Events<'a> {
    /// One event each.
    pub ids: &'a [String],
    /// Event time, RFC 3339.
    pub time: &'a str,
    /// The record's value.
    pub value: &'a [u8],
}

impl Sender {
    /// A producer without transactions.
    pub fn new(brokers: &str, topic: &str) -> Result<Self> {
        let producer = config(brokers).create().map_err(failed)?;
        Ok(Self { producer, topic: topic.to_owned() })
    }

    /// A producer that has begun a transaction. A transaction that an earlier producer of the same id left open is aborted.
    pub fn begin(brokers: &str, topic: &str, id: &str) -> Result<Self> {
        let producer: ThreadedProducer<DefaultProducerContext> = config(brokers)
            .set("transactional.id", id)
            .set("transaction.timeout.ms", TRANSACTION_MILLIS.to_string())
            .create()
            .map_err(failed)?;
        producer.init_transactions(STEP_WITHIN).map_err(failed)?;
        producer.begin_transaction().map_err(failed)?;
        Ok(Self { producer, topic: topic.to_owned() })
    }

    /// Sends events, to one partition or each to that of its id, and waits until Kafka has answered.
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
        self.producer.flush(STEP_WITHIN).map_err(failed)
    }

    /// Ends the transaction.
    pub fn end(self, commits: bool) -> Result<()> {
        let ended = if commits {
            self.producer.commit_transaction(STEP_WITHIN)
        } else {
            self.producer.abort_transaction(STEP_WITHIN)
        };
        ended.map_err(failed)
    }
}

fn config(brokers: &str) -> ClientConfig {
    let mut config = common::kafka::producer_config(brokers, "local-stack");
    config.set("linger.ms", LINGER_MILLIS.to_string());
    config
}
