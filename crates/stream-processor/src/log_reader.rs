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
/// Most KiB of records that wait unread in the client; its default is 64 MiB.
const QUEUED_KIB: &str = "8192";

/// A partition's log as it was when it was opened.
pub struct LogReader {
    consumer: BaseConsumer,
    topic: String,
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
        // Where the last offsets below the end are transaction markers, the next record lies above it.
        Ok(Some(message).filter(|message| message.offset() < self.end))
    }
}

/// The first offset above `damaged` at which reading can go on, looked for at most until `deadline`. Kafka gives no way to ask
/// where a damaged batch ends, so offsets are tried: further and further ahead, then closer. Each try has a client of its own,
/// because librdkafka loses its place in a fetched batch that it cannot read.
pub fn first_readable_after(
    brokers: &str,
    topic: &str,
    (partition, damaged): (i32, i64),
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
        let tried = (damaged + step).min(end);
        if tried == end || can_read(tried)? {
            break tried;
        }
        unreadable = tried;
        step *= 2;
    };
    while readable - unreadable > 1 {
        let tried = unreadable + (readable - unreadable) / 2;
        if can_read(tried)? { readable = tried } else { unreadable = tried }
    }
    Some(readable)
}

/// Whether an error says that the log holds no record at the offset asked for.
pub fn is_out_of_range(error: &KafkaError) -> bool {
    matches!(
        error.rdkafka_error_code(),
        Some(RDKafkaErrorCode::OffsetOutOfRange | RDKafkaErrorCode::AutoOffsetReset)
    )
}
