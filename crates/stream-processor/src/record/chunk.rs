//! The unit that the fetcher passes to a worker: consecutive decoded records of one partition, stored in one arena.
//! Plain data without decisions.

use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::sync::Arc;

/// Length of a cell whose column is absent from the event. Such a column is bound as *unset*, never as null.
pub const UNSET: i32 = -2;

/// One decoded event. Its bytes are in the chunk's arena.
#[derive(Debug, Clone, PartialEq)]
pub struct DecodedEvent {
    /// Offset in the partition's log.
    pub offset: i64,
    /// Event time in Unix milliseconds.
    pub time_ms: i64,
    /// How far the event advances the watermark, in Unix milliseconds.
    pub watermark_ms: i64,
    /// Hash of (event time, id), the key in the seen filters.
    pub hash: u64,
    /// Shard of the event table.
    pub shard: i32,
    /// Group index in each group-by column.
    pub groups: [u16; common::contracts::stream::MAX_GROUP_BY],
    /// Time at which the producer sent the event, in Unix microseconds by its clock. 0 if unknown.
    pub produced_at_us: i64,
    pub(crate) id: (u32, u32),
    pub(crate) run_id: (u32, i32),
}

/// A record that cannot be decoded, with everything that its dead letter preserves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Poison {
    /// Offset in the partition's log.
    pub offset: i64,
    /// The broker's timestamp in Unix milliseconds.
    pub timestamp_ms: i64,
    /// Key bytes, if the record has a key.
    pub key: Option<Vec<u8>>,
    /// Value bytes. `None` for a tombstone.
    pub value: Option<Vec<u8>>,
    /// Header names and values, in the record's order.
    pub headers: Vec<(String, Option<Vec<u8>>)>,
    /// Why the record cannot be decoded.
    pub reason: Reason,
}

/// Why a record cannot be decoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{class}: {message}")]
pub struct Reason {
    /// Error class from a fixed set, such as `InvalidJson`.
    pub class: &'static str,
    /// Details for the operator, including the header or column.
    pub message: String,
}

/// Identity of one record. A different record at the same offset shows that the log was replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastRecord {
    /// Offset of the record.
    pub offset: i64,
    /// Hash of the record's key, value and timestamp.
    pub fingerprint: i64,
}

/// Consecutive decoded records of one partition.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Chunk {
    /// Offset of the first record.
    pub first_offset: i64,
    /// Offset at which the next chunk starts. It is past the last record and any transaction markers that follow it.
    pub next_offset: i64,
    /// The last record. `None` if the chunk only advances past offsets without records.
    pub last_record: Option<LastRecord>,
    /// Offsets before the first record that are skipped at an operator's request.
    pub skipped: Option<Range<i64>>,
    /// Decode time in microseconds.
    pub decode_us: u64,
    /// Decoded events in offset order.
    pub events: Vec<DecodedEvent>,
    /// Undecodable records in offset order.
    pub poison: Vec<Poison>,
    /// For each value that did not fit its column and is null instead, the name of the column.
    pub misfits: Vec<Arc<str>>,
    pub(crate) arena: Vec<u8>,
    /// Total size of keys, values and headers in `poison`.
    pub(crate) poison_bytes: usize,
    /// One cell for each event and declared column: start in the arena, and length or [`UNSET`].
    pub(crate) cells: Vec<(u32, i32)>,
    /// One value for each event and measure, NaN if absent.
    pub(crate) measures: Vec<f64>,
    pub(crate) columns: usize,
    pub(crate) measure_count: usize,
}

impl Chunk {
    /// Creates an empty chunk for events with `columns` declared columns and `measures` measures.
    pub fn new(columns: usize, measures: usize) -> Chunk {
        Chunk { columns, measure_count: measures, ..Chunk::default() }
    }

    /// Number of records, decodable or not.
    pub fn len(&self) -> usize {
        self.events.len() + self.poison.len()
    }

    /// Whether the chunk has no records. It may still skip offsets.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of skipped offsets at or after `from`.
    pub fn skipped_from(&self, from: i64) -> i64 {
        self.skipped.as_ref().map_or(0, |skipped| (skipped.end - skipped.start.max(from)).max(0))
    }

    /// Approximate size in bytes of all events and undecodable records.
    pub fn bytes(&self) -> usize {
        self.arena.len() + self.poison_bytes
    }

    /// Returns the id of an event of this chunk.
    pub fn id(&self, event: &DecodedEvent) -> &[u8] {
        &self.arena[event.id.0 as usize..(event.id.0 + event.id.1) as usize]
    }

    /// Returns the run id of an event of this chunk. `None` if the record has no usable run id.
    pub fn run_id(&self, event: &DecodedEvent) -> Option<&[u8]> {
        self.slice(event.run_id)
    }

    /// Returns the CQL bytes of the declared columns of event `index`, in declaration order. `None` means unset.
    pub fn columns_of(&self, index: usize) -> impl Iterator<Item = Option<&[u8]>> {
        self.cells[self.cell_range(index)].iter().map(|cell| self.slice(*cell))
    }

    /// Returns the measures of event `index`. A value is NaN if absent.
    pub fn measures_of(&self, index: usize) -> &[f64] {
        &self.measures[index * self.measure_count..(index + 1) * self.measure_count]
    }

    /// Approximate size in bytes of the row of event `index` in a statement.
    pub fn row_bytes(&self, index: usize) -> usize {
        let values: i32 = self.cells[self.cell_range(index)].iter().map(|c| c.1.max(0)).sum();
        values.unsigned_abs() as usize + self.events[index].id.1 as usize + 4 * self.columns + 80
    }

    pub(crate) fn cell_range(&self, index: usize) -> Range<usize> {
        index * self.columns..(index + 1) * self.columns
    }

    fn slice(&self, (start, len): (u32, i32)) -> Option<&[u8]> {
        (len >= 0).then(|| &self.arena[start as usize..start as usize + len.unsigned_abs() as usize])
    }
}
