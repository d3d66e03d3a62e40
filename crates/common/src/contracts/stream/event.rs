//! `[event]`: how a source record is mapped to an event.

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
}

impl EventMapping {
    /// Whether the processor decodes records in this mode.
    pub fn accepts(&self, mode: ContentMode) -> bool {
        self.accept.contains(&mode)
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
