//! Reads one partition of a topic outside the consumer group, from an offset to the end as it was at the beginning. Blocking.

use crate::error::ProcessorError;
use common::kafka::client_config;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Message};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use std::time::{Duration, Instant};

/// How long an answer or a record may take.
const DEADLINE: Duration = Duration::from_secs(20);
/// How long one look for a readable record may take.
const PROBE_DEADLINE: Duration = Duration::from_secs(2);

/// A partition's log as it was when it was opened.
pub struct LogReader {
    consumer: BaseConsumer,
    topic: String,
    partition: i32,
    next: i64,
    /// First offset of the log.
    pub low: i64,
    /// Offset after its last record, or after the transaction markers that follow it.
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
        config.set("enable.partition.eof", "true").set("check.crcs", "true");
        let consumer: BaseConsumer = config.create().map_err(|e| failed(&e))?;
        let (low, end) = consumer.fetch_watermarks(topic, partition, DEADLINE).map_err(|e| failed(&e))?;
        let next = from.unwrap_or(low);
        let mut reader = LogReader { consumer, topic: topic.to_owned(), partition, next, low, end };
        reader.seek(next)?;
        Ok(reader)
    }

    /// The next record; none at the end.
    pub fn next_record(&mut self) -> Result<Option<BorrowedMessage<'_>>, ProcessorError> {
        if self.next >= self.end {
            return Ok(None);
        }
        let polled = self.consumer.poll(DEADLINE);
        let message =
            polled.ok_or_else(|| failed(&format!("no record at offset {} of {}", self.next, self.topic)))?;
        let message = match message {
            Ok(message) => message,
            // Only transaction markers are left.
            Err(KafkaError::PartitionEOF(_)) => return Ok(None),
            Err(e) if is_out_of_range(&e) => {
                let (offset, topic) = (self.next, &self.topic);
                let text = format!("kafka: offset {offset} of {topic} is not in the log: {e}");
                return Err(ProcessorError::Reopen(text));
            }
            Err(e) => return Err(failed(&format!("offset {} of {}: {e}", self.next, self.topic))),
        };
        self.next = message.offset() + 1;
        Ok(Some(message))
    }

    /// The first offset above `damaged` at which reading can go on, looked for at most until `deadline`. Kafka gives no way to
    /// ask where a damaged batch ends, so offsets are tried: further and further ahead, then closer.
    pub fn first_readable_after(&mut self, damaged: i64, deadline: Instant) -> Option<i64> {
        let (mut unreadable, mut step) = (damaged, 1);
        let mut readable = loop {
            let tried = (damaged + step).min(self.end);
            if tried == self.end || self.can_read(tried) {
                break tried;
            }
            if Instant::now() > deadline {
                return None;
            }
            unreadable = tried;
            step *= 2;
        };
        while readable - unreadable > 1 {
            if Instant::now() > deadline {
                return None;
            }
            let tried = unreadable + (readable - unreadable) / 2;
            if self.can_read(tried) { readable = tried } else { unreadable = tried }
        }
        Some(readable)
    }

    fn can_read(&mut self, offset: i64) -> bool {
        let began = Instant::now();
        if self.seek(offset).is_err() {
            return false;
        }
        while let Some(rest) = PROBE_DEADLINE.checked_sub(began.elapsed()) {
            match self.consumer.poll(rest) {
                // A rest of what an earlier assignment had fetched.
                Some(Ok(message)) if message.offset() < offset => {}
                Some(Ok(_)) | Some(Err(KafkaError::PartitionEOF(_))) => return true,
                Some(Err(_)) => return false,
                None => {}
            }
        }
        false
    }

    fn seek(&mut self, offset: i64) -> Result<(), ProcessorError> {
        let mut list = TopicPartitionList::new();
        list.add_partition_offset(&self.topic, self.partition, Offset::Offset(offset))
            .and_then(|()| self.consumer.assign(&list))
            .map_err(|e| failed(&e))?;
        self.next = offset;
        Ok(())
    }
}

/// Whether an error says that the log holds no record at the offset asked for.
pub fn is_out_of_range(error: &KafkaError) -> bool {
    matches!(
        error.rdkafka_error_code(),
        Some(RDKafkaErrorCode::OffsetOutOfRange | RDKafkaErrorCode::AutoOffsetReset)
    )
}
