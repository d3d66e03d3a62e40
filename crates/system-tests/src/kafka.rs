//! Reads and changes topics from outside the pipeline; `sender` writes to them.

pub mod sender;

use std::sync::Arc;
use std::time::Duration;

use local_stack::config::{Settings, loopback};
use local_stack::error::{Error, Result};
use rdkafka::admin::{AdminClient, AdminOptions, NewPartitions};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{BorrowedMessage, Message};
use rdkafka::{Offset, TopicPartitionList};

/// Time limit for one record below the high watermark, or for one request about a topic.
const RECORD_TIMEOUT: Duration = Duration::from_secs(10);

/// Reads a topic without joining a consumer group. All calls block.
#[derive(Clone)]
pub struct TopicReader {
    consumer: Arc<BaseConsumer>,
    topic: String,
}

impl TopicReader {
    /// Creates a reader of one topic.
    pub fn new(settings: &Settings, topic: &str) -> Result<Self> {
        let consumer = common::runtime::kafka::client_config(&loopback(settings.ports.kafka), "system-tests")
            .set("group.id", "system-tests")
            .set("enable.auto.commit", "false")
            .set("enable.partition.eof", "true")
            .create()
            .map_err(failed)?;
        Ok(Self { consumer: Arc::new(consumer), topic: topic.to_owned() })
    }

    /// Returns the number of partitions of the topic.
    pub fn partitions(&self) -> Result<i32> {
        let metadata = self.consumer.fetch_metadata(Some(&self.topic), RECORD_TIMEOUT).map_err(failed)?;
        Ok(metadata.topics().first().map_or(0, |topic| topic.partitions().len()) as i32)
    }

    /// Returns the end offset of a partition. Records of open transactions are not included.
    pub fn end(&self, partition: i32, timeout: Duration) -> Result<i64> {
        let watermarks = self.consumer.fetch_watermarks(&self.topic, partition, timeout);
        watermarks.map(|(_, high)| high).map_err(failed)
    }

    /// Returns the value of the first record of a partition.
    pub fn first_value(&self, partition: i32) -> Result<Vec<u8>> {
        let mut value = None;
        self.read_while(partition, |message| {
            value = message.payload().map(<[u8]>::to_vec);
            value.is_none()
        })?;
        value
            .ok_or_else(|| Error::Refused(format!("topic {}, partition {partition}: no records", self.topic)))
    }

    /// Passes every record of a partition to `handle`, up to the current end offset, which it returns. Aborted records
    /// and transaction markers occupy offsets but are not passed.
    pub fn read(&self, partition: i32, mut handle: impl FnMut(&BorrowedMessage<'_>)) -> Result<i64> {
        self.read_while(partition, |message| {
            handle(message);
            true
        })
    }

    /// Like [`TopicReader::read`], but stops when `handle` returns `false`.
    fn read_while(
        &self,
        partition: i32,
        mut handle: impl FnMut(&BorrowedMessage<'_>) -> bool,
    ) -> Result<i64> {
        let (consumer, topic) = (&self.consumer, &self.topic);
        let (low, high) = consumer.fetch_watermarks(topic, partition, RECORD_TIMEOUT).map_err(failed)?;
        let mut assignment = TopicPartitionList::new();
        assignment.add_partition_offset(topic, partition, Offset::Offset(low)).map_err(failed)?;
        consumer.assign(&assignment).map_err(failed)?;
        let mut next = low;
        while next < high {
            match consumer.poll(RECORD_TIMEOUT) {
                // Records that were fetched for an earlier assignment may still arrive.
                Some(Ok(message)) if message.partition() != partition => {}
                Some(Ok(message)) if handle(&message) => next = message.offset() + 1,
                Some(Ok(_)) => break,
                // The partition ends with transaction markers or aborted records.
                Some(Err(KafkaError::PartitionEOF(of))) if of == partition => break,
                Some(Err(KafkaError::PartitionEOF(_))) => {}
                Some(Err(error)) => return Err(failed(error)),
                None => {
                    let why =
                        format!("topic {topic}, partition {partition}: no record received at offset {next}");
                    return Err(Error::Refused(why));
                }
            }
        }
        Ok(high)
    }
}

/// Increases the number of partitions of a topic to `count`.
pub async fn add_partitions(brokers: &str, topic: &str, count: usize) -> Result<()> {
    let admin: AdminClient<DefaultClientContext> =
        common::runtime::kafka::client_config(brokers, "system-tests").create().map_err(failed)?;
    let more = NewPartitions::new(topic, count);
    let answers = admin.create_partitions([&more], &AdminOptions::new()).await.map_err(failed)?;
    for answer in answers {
        answer.map_err(|(topic, code)| {
            Error::Refused(format!("cannot increase topic {topic} to {count} partitions: {code}"))
        })?;
    }
    Ok(())
}

fn failed(error: KafkaError) -> Error {
    Error::Tool {
        tool: "kafka".to_owned(),
        cause: error.to_string(),
        hint: "see its log in the folder that is kept".to_owned(),
    }
}
