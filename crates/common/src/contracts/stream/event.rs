//! `[event]`: how a source record is mapped to an event.

use crate::contracts::event::DEFAULT_AHEAD_MS;
use crate::contracts::time::TimeReading;
use serde::{Deserialize, Serialize};

/// `[event]`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct EventMapping {
    /// Pointers to the values that identify a record. Empty to derive the id from stream, interval start and index.
    pub id: Vec<String>,
    /// Origin of the event time.
    pub time: EventTime,
    /// CloudEvents type.
    pub event_type: String,
    /// Pointer to the Kafka key. `None` to use the event id. Records with equal ids must have equal keys.
    pub key: Option<String>,
    /// Content modes of the records that the processor decodes, in the order of [`ContentMode::ALL`].
    pub accept: Vec<ContentMode>,
    /// How far an event time may be ahead of the record's timestamp in Kafka, in milliseconds. At least
    /// [`DEFAULT_AHEAD_MS`].
    pub ahead_ms: i64,
}

impl EventMapping {
    /// Whether the processor decodes records in this mode.
    pub fn accepts(&self, mode: ContentMode) -> bool {
        self.accept.contains(&mode)
    }

    /// How far an event advances the watermark of its partition, in Unix milliseconds: to its time. In a stream with
    /// events ahead of time, at most to the timestamp of its record, so that events of the present are not late.
    pub fn watermark_of(&self, time_ms: i64, timestamp_ms: i64) -> i64 {
        if self.has_events_ahead() { time_ms.min(timestamp_ms) } else { time_ms }
    }

    /// Upper bound of the event times of a log that has advanced the watermark to `watermark_ms`. It holds for
    /// [`EventMapping::watermark_of`] with this `ahead` or a shorter one.
    pub fn latest_time(&self, watermark_ms: i64) -> i64 {
        let ahead_ms = if self.has_events_ahead() { self.ahead_ms } else { 0 };
        watermark_ms.saturating_add(ahead_ms)
    }

    fn has_events_ahead(&self) -> bool {
        self.ahead_ms > DEFAULT_AHEAD_MS
    }
}

/// How a Kafka record carries an event. The first two are the content modes of the CloudEvents 1.0 Kafka protocol
/// binding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ContentMode {
    /// Id and time are `ce_` headers, and the value is the object of the declared columns. The producer writes it.
    Binary,
    /// The value is an envelope: a JSON object with the members `id`, `time` and `data`.
    Structured,
    /// The value is a record of the source. Id, time and columns are at the pointers of the definition.
    Plain,
}

impl ContentMode {
    /// All modes and their names in a definition.
    pub const ALL: [(&'static str, ContentMode); 3] = [
        ("binary", ContentMode::Binary),
        ("structured", ContentMode::Structured),
        ("plain", ContentMode::Plain),
    ];

    /// The name in a definition.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, mode)| *mode == self).map_or("", |(name, _)| name)
    }
}

/// Origin of the event time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(from = "StoredTime", into = "StoredTime")]
pub enum EventTime {
    /// Derived from stream, interval and id: a point within the interval.
    Interval,
    /// A value of the record.
    Field {
        /// Pointer to the value.
        pointer: String,
        /// How the value is read.
        reading: TimeReading,
    },
}

/// The form of [`EventTime`] in stored layouts. The first three variants are those of earlier versions.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum StoredTime {
    Interval,
    Pointer(String),
    Seconds(String),
    Field { pointer: String, reading: TimeReading },
}

impl From<StoredTime> for EventTime {
    fn from(stored: StoredTime) -> EventTime {
        match stored {
            StoredTime::Interval => EventTime::Interval,
            StoredTime::Pointer(pointer) => EventTime::Field { pointer, reading: TimeReading::default() },
            StoredTime::Seconds(pointer) => EventTime::Field { pointer, reading: TimeReading::seconds() },
            StoredTime::Field { pointer, reading } => EventTime::Field { pointer, reading },
        }
    }
}

impl From<EventTime> for StoredTime {
    fn from(time: EventTime) -> StoredTime {
        match time {
            EventTime::Interval => StoredTime::Interval,
            EventTime::Field { pointer, reading } if reading == TimeReading::default() => {
                StoredTime::Pointer(pointer)
            }
            EventTime::Field { pointer, reading } if reading == TimeReading::seconds() => {
                StoredTime::Seconds(pointer)
            }
            EventTime::Field { pointer, reading } => StoredTime::Field { pointer, reading },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HOUR: i64 = DEFAULT_AHEAD_MS;

    fn mapping(ahead_ms: i64) -> EventMapping {
        let (id, event_type) = (vec![], String::new());
        EventMapping { id, time: EventTime::Interval, event_type, key: None, accept: vec![], ahead_ms }
    }

    #[test]
    fn only_a_longer_ahead_holds_the_watermark_at_the_timestamp_of_the_record() {
        let check = |ahead_ms, time_ms, expected| {
            assert_eq!(mapping(ahead_ms).watermark_of(time_ms, 5 * HOUR), expected, "{ahead_ms} {time_ms}");
        };
        check(HOUR, 6 * HOUR, 6 * HOUR);
        check(2 * HOUR, 6 * HOUR, 5 * HOUR);
        check(2 * HOUR, 4 * HOUR, 4 * HOUR);
    }

    proptest! {
        #[test]
        fn no_event_is_later_than_the_bound_even_if_ahead_was_raised_in_between(
            events in prop::collection::vec((0..50i64, -20..=9i64), 1..20),
            raised_at in 0..20usize, ahead in 1..8i64, more in 0..3i64,
        ) {
            let (before, after) = (mapping(ahead * HOUR), mapping((ahead + more) * HOUR));
            let (mut watermark, mut latest) = (i64::MIN, i64::MIN);
            for (index, (timestamp, offset)) in events.into_iter().enumerate() {
                let now = if index < raised_at { &before } else { &after };
                let (timestamp, time) = (timestamp * HOUR, (timestamp + offset) * HOUR);
                if time <= timestamp + now.ahead_ms {
                    watermark = watermark.max(now.watermark_of(time, timestamp));
                    latest = latest.max(time);
                    prop_assert!(latest <= now.latest_time(watermark));
                }
            }
        }
    }
}
