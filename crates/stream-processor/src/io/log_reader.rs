//! Reads one partition of a topic outside the consumer group, from an offset to the end as it was when the reader was
//! opened. Blocking.

use crate::error::ProcessorError;
use common::runtime::kafka::client_config;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Message};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use std::time::{Duration, Instant};

/// Maximum time to wait for a response or a record.
const DEADLINE: Duration = Duration::from_secs(20);
/// Maximum duration of one attempt to read a record after a damaged offset.
const PROBE_DEADLINE: Duration = Duration::from_secs(2);
/// Maximum KiB of records prefetched by the client. The default of librdkafka is 64 MiB.
const QUEUED_KIB: &str = "8192";

/// Reads the log of a partition up to the end at the time of opening.
pub struct LogReader {
    consumer: BaseConsumer,
    topic: String,
    next: i64,
    /// First offset of the log.
    pub low: i64,
    /// Offset at which the reader stops: the end of the log, past any transaction markers. Callers may lower it.
    pub end: i64,
}

fn failed(cause: &dyn std::fmt::Display) -> ProcessorError {
    ProcessorError::Retryable(format!("kafka: {cause}"))
}

impl LogReader {
    /// Opens the log with its current bounds. Reading starts at offset `from`, or at the first offset of the log.
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

    /// Returns the next record, or `None` at the end. Fails with `Reopen` if the log no longer has the offset.
    pub fn next_record(&mut self) -> Result<Option<BorrowedMessage<'_>>, ProcessorError> {
        if self.next >= self.end {
            return Ok(None);
        }
        let polled = self.consumer.poll(DEADLINE);
        let message =
            polled.ok_or_else(|| failed(&format!("no record at offset {} of {}", self.next, self.topic)))?;
        let message = match message {
            Ok(message) => message,
            // Only transaction markers are left before the end.
            Err(KafkaError::PartitionEOF(_)) => return Ok(None),
            Err(e) if is_out_of_range(&e) => {
                let (offset, topic) = (self.next, &self.topic);
                let text = format!("kafka: offset {offset} of {topic} is not in the log: {e}");
                return Err(ProcessorError::Reopen(text));
            }
            Err(e) => return Err(failed(&format!("offset {} of {}: {e}", self.next, self.topic))),
        };
        self.next = message.offset() + 1;
        // If the last offsets below the end are transaction markers, the next record is past the end.
        Ok(Some(message).filter(|message| message.offset() < self.end))
    }
}

/// Returns the first offset above `damaged` from which records can be read, or `None` if it is not found by `deadline`.
/// Kafka does not report where a damaged batch ends, so this function tries offsets at increasing distances and then
/// bisects. Each attempt uses a new client, because librdkafka loses its position in a batch that it cannot read.
pub fn first_readable_after(
    brokers: &str,
    topic: &str,
    partition: i32,
    damaged: i64,
    deadline: Instant,
) -> Option<i64> {
    let can_read = |offset| {
        let reader = LogReader::open(brokers, topic, partition, Some(offset)).ok()?;
        let polled = reader.consumer.poll(PROBE_DEADLINE)?;
        let in_time = Instant::now() < deadline;
        in_time.then_some(matches!(polled, Ok(_) | Err(KafkaError::PartitionEOF(_))))
    };
    let end = LogReader::open(brokers, topic, partition, Some(damaged)).ok()?.end;
    let (mut unreadable, mut step) = (damaged, 1);
    let mut readable = loop {
        let candidate = (damaged + step).min(end);
        if candidate == end || can_read(candidate)? {
            break candidate;
        }
        unreadable = candidate;
        step *= 2;
    };
    while readable - unreadable > 1 {
        let candidate = unreadable + (readable - unreadable) / 2;
        if can_read(candidate)? { readable = candidate } else { unreadable = candidate }
    }
    Some(readable)
}

/// Whether an error means that the requested offset is not in the log.
pub fn is_out_of_range(error: &KafkaError) -> bool {
    matches!(
        error.rdkafka_error_code(),
        Some(RDKafkaErrorCode::OffsetOutOfRange | RDKafkaErrorCode::AutoOffsetReset)
    )
}
