//! What the fetcher hands to a worker: the decoded records of one stretch of one partition's log, in one arena. Plain data,
//! no decisions.

use crate::partition::LastRecord;
use std::ops::Range;

/// A column's value that the event does not have; bound as *unset*, never as null.
pub const UNSET: i32 = -2;

/// One decoded event; its bytes lie in the chunk's arena.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Offset in the partition's log.
    pub offset: i64,
    /// Event time in Unix milliseconds.
    pub time_ms: i64,
    /// Hash of (event time, id), by which the filters know it.
    pub hash: u64,
    /// Cassandra shard.
    pub shard: i32,
    /// Group of each group-by column.
    pub groups: [u16; common::stream::MAX_GROUP_BY],
    /// Microseconds on the producer's clock when it was handed over; 0: unknown.
    pub produced_at_us: i64,
    pub(crate) id: (u32, u32),
    pub(crate) run_id: (u32, i32),
}

/// A record that cannot become an event, with everything a dead letter keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Poison {
    /// Offset in the partition's log.
    pub offset: i64,
    /// The broker's time stamp in Unix milliseconds.
    pub timestamp_ms: i64,
    /// The record's key.
    pub key: Option<Vec<u8>>,
    /// The record's value.
    pub value: Option<Vec<u8>>,
    /// The record's headers.
    pub headers: Vec<(String, Option<Vec<u8>>)>,
    /// What is wrong with it.
    pub reason: Reason,
}

/// Why a record is poison.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{class}: {message}")]
pub struct Reason {
    /// A fixed word per kind of mistake, such as `InvalidJson`.
    pub class: &'static str,
    /// What exactly, naming the header or column.
    pub message: String,
}

/// A stretch of one partition's log, decoded.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Chunk {
    /// Offset of the first record.
    pub first_offset: i64,
    /// Offset at which the next chunk begins: after the last record, or after the transaction markers that follow it.
    pub next_offset: i64,
    /// The last record; `None`: the chunk only moves past offsets that hold no record.
    pub last_record: Option<LastRecord>,
    /// Offsets at its beginning that an operator had the processor skip.
    pub skipped: Option<Range<i64>>,
    /// Time it took to decode, in microseconds.
    pub decode_us: u64,
    /// The events, by offset.
    pub events: Vec<Event>,
    /// The records that are no events, by offset.
    pub poison: Vec<Poison>,
    pub(crate) arena: Vec<u8>,
    pub(crate) poison_bytes: usize,
    /// Per event and declared column: start in the arena and length, or [`UNSET`].
    pub(crate) cells: Vec<(u32, i32)>,
    /// Per event and measure: its value, NaN where absent.
    pub(crate) measures: Vec<f64>,
    pub(crate) columns: usize,
    pub(crate) measure_count: usize,
}

impl Chunk {
    /// An empty chunk for events of `columns` columns and `measures` measures.
    pub fn new(columns: usize, measures: usize) -> Chunk {
        Chunk { columns, measure_count: measures, ..Chunk::default() }
    }

    /// Records in it.
    pub fn len(&self) -> usize {
        self.events.len() + self.poison.len()
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many offsets at or after `from` it skips.
    pub fn skipped_from(&self, from: i64) -> i64 {
        self.skipped.as_ref().map_or(0, |skipped| (skipped.end - skipped.start.max(from)).max(0))
    }

    /// Bytes it holds, of events and of poison, about.
    pub fn bytes(&self) -> usize {
        self.arena.len() + self.poison_bytes
    }

    /// An event's id.
    pub fn id(&self, event: &Event) -> &[u8] {
        &self.arena[event.id.0 as usize..(event.id.0 + event.id.1) as usize]
    }

    /// An event's run id.
    pub fn run_id(&self, event: &Event) -> Option<&[u8]> {
        self.slice(event.run_id)
    }

    /// The CQL bytes of the declared columns of event number `index`, in their order; `None`: unset.
    pub fn columns_of(&self, index: usize) -> impl Iterator<Item = Option<&[u8]>> {
        self.cells[self.cell_range(index)].iter().map(|cell| self.slice(*cell))
    }

    /// The measures of event number `index`; NaN where absent.
    pub fn measures_of(&self, index: usize) -> &[f64] {
        &self.measures[index * self.measure_count..(index + 1) * self.measure_count]
    }

    /// Bytes event number `index` takes in a statement, about.
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
