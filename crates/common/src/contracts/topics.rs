//! The topics: how long Kafka keeps their records, and their names.

use crate::contracts::event::DAY_MS;

/// How long Kafka keeps events: 7 days (`retention.ms` of the events topic).
pub const TOPIC_RETENTION_MS: i64 = 7 * DAY_MS;
/// How long dead letters are kept: 30 days.
pub const DEAD_LETTER_RETENTION_MS: i64 = 30 * DAY_MS;
/// How long commands are kept in the control topic: 1 day.
pub const CONTROL_RETENTION_MS: i64 = DAY_MS;
/// Longest time a log segment stays open: 1 day. Retention only removes closed segments.
pub const SEGMENT_MS: i64 = DAY_MS;

/// Name of the dead-letter topic of an events topic.
pub fn dead_letter_topic(topic: &str) -> String {
    format!("{topic}.dlq")
}
