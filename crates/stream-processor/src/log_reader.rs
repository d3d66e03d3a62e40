//! Reads one partition of a topic beside the consumer group, from an offset to the end as it was at the beginning. Blocking.

use crate::error::ProcessorError;
use common::kafka::client_config;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{BorrowedMessage, Message};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use std::time::Duration;

/// How long an answer or a record may take.
const DEADLINE: Duration = Duration::from_secs(20);
/// Most KiB of records that wait unread in the client; its default is 64 MiB.
const QUEUED_KIB: &str = "8192";

/// A partition's log as it was when it was opened.
pub struct LogReader {
    consumer: BaseConsumer,
    topic: String,
    next: i64,
    /// First offset of the log.
    pub low: i64,
    /// Offset after its last record.
    pub end: i64,
}

fn failed(cause: &dyn std::fmt::Display) -> ProcessorError {
    ProcessorError::Retryable(format!("kafka: {cause}"))
}

impl LogReader {
    /// Of the log as it is now; the first record will be the one at `from`, or its lowest.
    pub fn open(
        brokers: &str,
        topic: &str,
        partition: i32,
        from: Option<i64>,
    ) -> Result<LogReader, ProcessorError> {
        let mut config = client_config(brokers, "stream-processor-reader");
        config.set("group.id", "stream-processor.reader");
        config.set("enable.auto.commit", "false").set("auto.offset.reset", "error");
        config.set("queued.max.messages.kbytes", QUEUED_KIB);
        let consumer: BaseConsumer = config.create().map_err(|e| failed(&e))?;
        let (low, end) = consumer.fetch_watermarks(topic, partition, DEADLINE).map_err(|e| failed(&e))?;
        let next = from.unwrap_or(low);
        let mut list = TopicPartitionList::new();
        list.add_partition_offset(topic, partition, Offset::Offset(next))
            .and_then(|()| consumer.assign(&list))
            .map_err(|e| failed(&e))?;
        Ok(LogReader { consumer, topic: topic.to_owned(), next, low, end })
    }

    /// The next record; none at the end.
    pub fn next_record(&mut self) -> Result<Option<BorrowedMessage<'_>>, ProcessorError> {
        if self.next >= self.end {
            return Ok(None);
        }
        let polled = self.consumer.poll(DEADLINE);
        let message =
            polled.ok_or_else(|| failed(&format!("no record at offset {} of {}", self.next, self.topic)))?;
        let message = message.map_err(|e| failed(&e))?;
        self.next = message.offset() + 1;
        Ok(Some(message))
    }
}
