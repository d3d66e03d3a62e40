//! Sends undecodable records to the dead-letter topic, with Kafka Connect's header names. They are acknowledged before
//! the commit that includes them. Key, value and headers are unchanged, with two exceptions. Headers whose names are
//! not UTF-8 are left out, because the client library cannot read them. Parts that are too large for the topic are left
//! out, and the reason names them.

use crate::error::ProcessorError;
use crate::io::store::DeadLetters;
use crate::record::chunk::{Chunk, Poison};
use common::contracts::topics::dead_letter_topic;
use common::runtime::admin::Health;
use common::runtime::kafka::{KafkaError, Replaced, producer_config};
use futures::future::try_join_all;
use rdkafka::error::RDKafkaErrorCode;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord};
use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Maximum length of the error message header, in characters.
const MAX_MESSAGE_CHARS: usize = 1024;
/// Maximum number of dead letters in flight per partition.
const MAX_IN_FLIGHT: usize = 256;
const RETRY_INTERVAL: Duration = Duration::from_millis(500);
/// How long a record may wait for space in the client's queue.
const QUEUE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the client retries before it reports a failure, in milliseconds.
const DELIVERY_TIMEOUT_MS: &str = "10000";
/// Name of the readiness check.
const DEPENDENCY: &str = "dead letters";
const SOURCE_TOPIC: &str = "__connect.errors.topic";
const SOURCE_PARTITION: &str = "__connect.errors.partition";
const SOURCE_OFFSET: &str = "__connect.errors.offset";
const STAGE: &str = "__connect.errors.stage";
const CLASS: &str = "__connect.errors.exception.class.name";
const MESSAGE: &str = "__connect.errors.exception.message";

/// Producer for the dead-letter topic of one events topic.
pub struct DeadLetterTopic {
    producer: Replaced<FutureProducer>,
    health: Arc<Health>,
    source_topic: String,
    topic: String,
    abandon: CancellationToken,
}

impl DeadLetterTopic {
    /// Creates the producer for the dead letters of `source_topic`. `abandon` aborts all retries. `health` is not ready
    /// while a dead letter is not acknowledged.
    pub fn new(
        brokers: &str,
        source_topic: &str,
        health: Arc<Health>,
        abandon: CancellationToken,
    ) -> Result<DeadLetterTopic, KafkaError> {
        let mut config = producer_config(brokers, "stream-processor-dlq");
        config.set("linger.ms", "5").set("queue.buffering.max.kbytes", "32768");
        config.set("message.timeout.ms", DELIVERY_TIMEOUT_MS);
        let build = move || config.create().map_err(|e| KafkaError::Client(e.to_string()));
        Ok(DeadLetterTopic {
            producer: Replaced::new(build)?,
            health,
            source_topic: source_topic.to_owned(),
            topic: dead_letter_topic(source_topic),
            abandon,
        })
    }

    async fn try_to_send(&self, partition: i32, poison: &Poison) -> Result<(), SendError> {
        let producer =
            self.producer.get().map_err(|e| SendError { too_large: false, cause: e.to_string() })?;
        let mut record: FutureRecord<'_, [u8], [u8]> =
            FutureRecord::to(&self.topic).headers(headers(&self.source_topic, partition, poison));
        record.key = poison.key.as_deref();
        record.payload = poison.value.as_deref();
        let sent = producer.send(record, QUEUE_TIMEOUT).await;
        sent.map(drop).map_err(|(error, _)| {
            if error.rdkafka_error_code() == Some(RDKafkaErrorCode::MessageTimedOut) {
                self.producer.doubt(&error);
            }
            SendError {
                too_large: error.rdkafka_error_code() == Some(RDKafkaErrorCode::MessageSizeTooLarge),
                cause: error.to_string(),
            }
        })
    }

    /// Sends one record and retries until it is acknowledged.
    async fn send_one(&self, partition: i32, poison: &Poison) -> Result<(), ProcessorError> {
        let mut poison = Cow::Borrowed(poison);
        loop {
            let sent = tokio::select! {
                biased;
                () = self.abandon.cancelled() => return Err(ProcessorError::Stopped),
                sent = self.try_to_send(partition, &poison) => sent,
            };
            let Err(SendError { too_large, cause }) = sent else {
                self.health.forget(DEPENDENCY);
                return Ok(());
            };
            if too_large && let Some(smaller) = without_largest_part(&poison) {
                poison = Cow::Owned(smaller);
                continue;
            }
            tracing::warn!(
                partition,
                offset = poison.offset,
                cause,
                "dead letter not acknowledged, retrying"
            );
            let topic = &self.topic;
            let text =
                format!("topic `{topic}` does not accept dead letters, and partitions wait for it: {cause}");
            self.health.set(DEPENDENCY, Err(text));
            tokio::select! {
                () = self.abandon.cancelled() => return Err(ProcessorError::Stopped),
                () = tokio::time::sleep(RETRY_INTERVAL) => {}
            }
        }
    }
}

/// Why a dead letter was not acknowledged.
struct SendError {
    too_large: bool,
    cause: String,
}

/// Removes the largest part of a record that is too large for the dead-letter topic: first the value, then the key and
/// the headers. The source offset still identifies the complete record. `None` if nothing is left to remove.
fn without_largest_part(poison: &Poison) -> Option<Poison> {
    let mut smaller = poison.clone();
    let left_out = match &poison.value {
        Some(value) => format!("the value of {} bytes", value.len()),
        None if poison.key.is_some() || !poison.headers.is_empty() => "key and headers".to_owned(),
        None => return None,
    };
    if smaller.value.take().is_none() {
        (smaller.key, smaller.headers) = (None, Vec::new());
    }
    smaller.reason.message =
        format!("omitted {left_out} (too large for this topic): {}", poison.reason.message);
    Some(smaller)
}

/// The record's headers, followed by its origin and the reason it could not be decoded.
fn headers(topic: &str, partition: i32, poison: &Poison) -> OwnedHeaders {
    let mut headers = OwnedHeaders::new_with_capacity(poison.headers.len() + 6);
    for (key, value) in &poison.headers {
        headers = headers.insert(Header { key, value: value.as_deref() });
    }
    let message: String = poison.reason.message.chars().take(MAX_MESSAGE_CHARS).collect();
    let (partition, offset) = (partition.to_string(), poison.offset.to_string());
    let origin = [
        (SOURCE_TOPIC, topic),
        (SOURCE_PARTITION, &partition),
        (SOURCE_OFFSET, &offset),
        (STAGE, "VALUE_CONVERTER"),
        (CLASS, poison.reason.class),
        (MESSAGE, &message),
    ];
    origin
        .into_iter()
        .fold(headers, |headers, (key, value)| headers.insert(Header { key, value: Some(value) }))
}

impl DeadLetters for DeadLetterTopic {
    async fn send(&self, partition: i32, chunk: &Chunk) -> Result<(), ProcessorError> {
        for part in chunk.poison.chunks(MAX_IN_FLIGHT) {
            try_join_all(part.iter().map(|poison| self.send_one(partition, poison))).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::chunk::Reason;
    use rdkafka::message::Headers;

    #[test]
    fn a_dead_letter_too_large_for_its_topic_loses_its_value_then_its_key_and_headers() {
        let poison = Poison {
            offset: 1,
            timestamp_ms: 0,
            key: Some(vec![1]),
            value: Some(vec![0; 9]),
            headers: vec![("a".into(), None)],
            reason: Reason { class: "TooLarge", message: "big".into() },
        };
        let first = without_largest_part(&poison).unwrap();
        assert_eq!((first.value.as_deref(), first.headers.len()), (None, 1));
        assert_eq!(first.reason.message, "omitted the value of 9 bytes (too large for this topic): big");
        let second = without_largest_part(&first).unwrap();
        assert_eq!((second.key.as_deref(), second.headers.len(), second.offset), (None, 0, 1));
        assert_eq!(without_largest_part(&second), None);
    }

    #[test]
    fn a_dead_letter_names_its_origin_and_reason() {
        let poison = Poison {
            offset: 42,
            timestamp_ms: 0,
            key: None,
            value: Some(vec![0xff]),
            headers: vec![("ce_id".into(), Some(b"x".to_vec()))],
            reason: Reason { class: "InvalidJson", message: "ß".repeat(5000) },
        };
        let headers = headers("user_created", 3, &poison);
        let all: Vec<_> = headers.iter().map(|h| (h.key.to_owned(), h.value.map(<[u8]>::len))).collect();
        assert_eq!(all[0], ("ce_id".to_owned(), Some(1)));
        assert_eq!(all[3], (SOURCE_OFFSET.to_owned(), Some(2)));
        assert_eq!(
            all[6],
            (MESSAGE.to_owned(), Some(2 * MAX_MESSAGE_CHARS)),
            "truncated at a character boundary"
        );
    }
}
