//! The state of one partition and the pure step that applies a decoded chunk to it. The step decides which records are
//! first copies, updates panes and totals, and returns the rows to write. It uses no clock and no I/O, so its result
//! depends on the log alone.

use crate::count::poison_gate::PoisonCounts;
use crate::count::windows::filter::BuildAlreadyHashed;
use crate::count::windows::hot::Panes;
use crate::record::chunk::{Chunk, LastRecord};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// Counts of the records below the next offset, by kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Totals {
    /// First copies. Each has one row in the event table.
    pub events: i64,
    /// Later copies of an event that was already counted.
    pub duplicates: i64,
    /// Duplicates with other values in the declared columns than the first copy. The row keeps those of the first copy.
    #[serde(default)]
    pub revised: i64,
    /// First copies whose event time is more than the allowed lateness behind the watermark.
    pub late: i64,
    /// Records sent to the dead-letter topic.
    pub dead_letters: i64,
    /// Unreadable offsets skipped at an operator's request.
    #[serde(default)]
    pub skipped: i64,
}

impl Totals {
    /// All records counted. Skipped offsets are not records.
    pub fn records(&self) -> i64 {
        self.events + self.duplicates + self.dead_letters
    }
}

/// How far a partition's log has been processed. Every value is exact for the log below `next_offset`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LogPosition {
    /// Next offset to process.
    pub next_offset: i64,
    /// Offset at which counting started.
    #[serde(default)]
    pub first_offset: i64,
    /// Last record below `next_offset`. Transaction markers may follow it. `None` if no record was processed.
    pub last_record: Option<LastRecord>,
    /// Totals of the records below `next_offset`, or below `count_from` during a replay.
    pub totals: Totals,
    /// The watermark in Unix milliseconds. `None` before the first event.
    pub seen_to: Option<i64>,
    /// Undecodable records counted against the limits.
    #[serde(default)]
    pub poison: PoisonCounts,
    /// First offset that adds to the totals. It is above `next_offset` only during a replay.
    pub count_from: i64,
}

/// The reads required before a chunk can be applied.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Questions {
    /// Indexes of the events whose key must be looked up, in ascending order.
    pub keys: Vec<u32>,
    /// Starts of the cold panes whose rows must be loaded, in Unix milliseconds.
    pub panes: BTreeSet<i64>,
}

/// The result of applying a chunk: rows to write, changed panes, and keys seen for the first time. Nothing has been
/// written yet.
#[derive(Debug, Default, PartialEq)]
pub struct Applied {
    /// Indexes of the events that are first copies.
    pub rows: Vec<u32>,
    /// Pane start → indexes of the pane's rows to write.
    pub panes: BTreeMap<i64, Vec<usize>>,
    /// Start of a hot pane → hashes of the keys first seen in this chunk.
    pub seen: BTreeMap<i64, Vec<u64>>,
    /// Number of first copies counted in cold panes.
    pub cold: usize,
}

/// The row of an event that was looked up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoredCopy {
    /// Offset of the record that the row was written for.
    pub offset: i64,
    /// Whether the row has other values than the event.
    pub differs: bool,
}

/// A lookup found a row with a later offset than the record's own, so the rows belong to a different log.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the event at offset {offset} is already stored with the later offset {found}, \
     so the rows belong to a different log"
)]
pub struct LaterOffset {
    /// Offset of the record.
    pub offset: i64,
    /// Offset in the stored row.
    pub found: i64,
}

/// Events whose key is new in this chunk, by key hash. Full keys are compared because hashes may collide.
#[derive(Default)]
struct FirstInChunk(HashMap<u64, u32, BuildAlreadyHashed>);

impl FirstInChunk {
    /// Adds event `index`. If the chunk already has an event with the same key, returns its index instead.
    fn insert(&mut self, chunk: &Chunk, index: u32) -> Option<u32> {
        let event = &chunk.events[index as usize];
        let mut slot = event.hash;
        while let Some(first) = self.0.get(&slot) {
            let other = &chunk.events[*first as usize];
            if other.time_ms == event.time_ms && chunk.id(other) == chunk.id(event) {
                return Some(*first);
            }
            slot = slot.wrapping_add(1);
        }
        self.0.insert(slot, index);
        None
    }
}

/// The state of one partition: its position and the panes in memory.
#[derive(Debug)]
pub struct Partition {
    /// How far the log has been processed.
    pub position: LogPosition,
    /// Panes in memory.
    pub panes: Panes,
    lateness_ms: i64,
}

impl Partition {
    /// Creates a partition at `position`. `panes` are restored from a checkpoint, or empty.
    pub fn new(position: LogPosition, panes: Panes, lateness_ms: i64) -> Partition {
        Partition { position, panes, lateness_ms }
    }

    /// Returns the reads required before `chunk` can be applied. Perform them only after the last write is
    /// acknowledged.
    pub fn questions(&self, chunk: &Chunk) -> Questions {
        let mut questions = Questions::default();
        for (index, event) in (0u32..).zip(&chunk.events) {
            let start = self.panes.start_of(event.time_ms);
            if !self.panes.is_hot(start) {
                questions.keys.push(index);
                if self.panes.must_load(start) {
                    questions.panes.insert(start);
                }
            } else if self.panes.may_have_seen(start, event.hash) {
                questions.keys.push(index);
            }
        }
        questions
    }

    /// Applies `chunk` to the state in memory and writes nothing. `stored` holds the row of each event that was looked up
    /// and has one, by the index of the event.
    pub fn apply(
        &mut self,
        chunk: &Chunk,
        stored: &BTreeMap<u32, StoredCopy>,
    ) -> Result<Applied, LaterOffset> {
        let mut applied = Applied::default();
        let mut first_in_chunk = FirstInChunk::default();
        for (index, event) in (0u32..).zip(&chunk.events) {
            let counts = event.offset >= self.position.count_from;
            let found = stored.get(&index).copied();
            if let Some(found) = found.filter(|found| found.offset > event.offset) {
                return Err(LaterOffset { offset: event.offset, found: found.offset });
            }
            // Whether the first copy has other values; `None` if this is the first copy.
            let revised = match found.filter(|found| found.offset < event.offset) {
                Some(found) => Some(found.differs),
                None => first_in_chunk
                    .insert(chunk, index)
                    .map(|first| chunk.columns_of(first as usize).ne(chunk.columns_of(index as usize))),
            };
            let is_first = revised.is_none();
            let adds_to_pane = is_first;
            #[cfg(test)]
            let adds_to_pane = adds_to_pane
                && !crate::simulation::mutations::omits_from_pane(
                    found.map(|found| found.offset),
                    event.offset,
                );
            if adds_to_pane {
                self.count_first(chunk, index, &mut applied);
            }
            let totals = &mut self.position.totals;
            let late =
                self.position.seen_to.is_some_and(|w| event.time_ms < w.saturating_sub(self.lateness_ms));
            totals.events += i64::from(counts && is_first);
            totals.duplicates += i64::from(counts && !is_first);
            totals.revised += i64::from(counts && revised == Some(true));
            totals.late += i64::from(counts && is_first && late);
            self.position.seen_to = self.position.seen_to.max(Some(event.watermark_ms));
            #[cfg(test)]
            crate::simulation::mutations::move_hot_from(self);
        }
        let dead = chunk.poison.iter().filter(|p| p.offset >= self.position.count_from).count();
        self.position.totals.dead_letters += dead as i64;
        self.position.totals.skipped += chunk.skipped_from(self.position.count_from);
        self.position.next_offset = chunk.next_offset;
        self.position.last_record = chunk.last_record.or(self.position.last_record);
        self.settle(&mut applied);
        Ok(applied)
    }

    /// Adds a first copy to its pane.
    fn count_first(&mut self, chunk: &Chunk, index: u32, applied: &mut Applied) {
        let event = &chunk.events[index as usize];
        let measures = chunk.measures_of(index as usize);
        let start = self.panes.start_of(event.time_ms);
        if self.panes.is_hot(start) {
            let (shape, hot) = self.panes.hot_mut(start);
            hot.pane.add(shape, event.offset, &event.groups, measures);
            hot.seen.insert(event.hash);
            applied.seen.entry(start).or_default().push(event.hash);
        } else {
            let (shape, pane) = self.panes.cold_mut(start);
            pane.add(shape, event.offset, &event.groups, measures);
            applied.cold += 1;
        }
        applied.rows.push(index);
    }

    /// Marks the changed pane rows as exact up to the next offset and collects them.
    fn settle(&mut self, applied: &mut Applied) {
        let next_offset = self.position.next_offset;
        let hot = self.panes.hot.iter_mut().map(|(start, hot)| (*start, &mut hot.pane));
        let cold = self.panes.cold.iter_mut().map(|(start, pane)| (*start, pane));
        for (start, pane) in hot.chain(cold) {
            let rows = pane.settle(next_offset);
            if !rows.is_empty() {
                applied.panes.insert(start, rows);
            }
        }
    }

    /// Moves `hot_from`; call it between batches only. Returns the starts of the panes that are no longer hot.
    pub fn advance(&mut self) -> Vec<i64> {
        self.panes.advance(self.position.seen_to)
    }
}

#[cfg(test)]
mod tests {
    use super::{LogPosition, Partition, StoredCopy};
    use crate::count::windows::hot::Panes;
    use crate::count::windows::pane::PaneShape;
    use crate::record::chunk::Chunk;
    use crate::record::decode::{Decoder, Record};
    use common::contracts::stream::Definition;
    use std::collections::BTreeMap;

    const MINUTE: i64 = 60_000;
    const BASE: i64 = 1_800_000_000_000;

    fn definition() -> Definition {
        let text = include_str!("../../../../streams/user_created.toml");
        Definition::parse("user_created.toml", text).unwrap()
    }

    fn partition(hot_from: i64) -> Partition {
        let panes = Panes::new(PaneShape::new(&definition()), MINUTE, 10 * MINUTE, usize::MAX, hot_from);
        Partition::new(LogPosition::default(), panes, 10 * MINUTE)
    }

    /// Builds a chunk of events `(minute, id)` that starts at offset `first`. An event with an empty id is undecodable.
    fn chunk(first: i64, events: &[(i64, &str)]) -> Chunk {
        let decoder = Decoder::new(&definition(), 0);
        let mut chunk = decoder.chunk();
        for (offset, (minute, id)) in (first..).zip(events) {
            let time = chrono::DateTime::from_timestamp_millis(BASE + minute * MINUTE).unwrap().to_rfc3339();
            let headers = [("ce_id", Some(id.as_bytes())), ("ce_time", Some(time.as_bytes()))];
            let value = Some(br#"{"first_name":"A","last_name":"B","age":30}"#.as_slice());
            let record =
                Record { offset, timestamp_ms: BASE + 30 * MINUTE, key: None, value, headers: &headers };
            decoder.decode(&record, &mut chunk);
        }
        chunk
    }

    fn at(offset: i64) -> StoredCopy {
        StoredCopy { offset, differs: false }
    }

    fn totals(p: &Partition) -> [i64; 4] {
        let t = p.position.totals;
        [t.events, t.duplicates, t.late, t.dead_letters]
    }

    #[test]
    fn copies_in_one_batch_count_once_in_hot_and_cold_panes() {
        for hot_from in [i64::MIN, i64::MAX] {
            let mut p = partition(hot_from);
            let chunk = chunk(0, &[(0, "a"), (0, "a"), (1, "a"), (0, "")]);
            let lookups = p.questions(&chunk).keys;
            assert_eq!(lookups.len(), if hot_from == i64::MAX { 3 } else { 0 });
            let applied = p.apply(&chunk, &BTreeMap::new()).unwrap();
            assert_eq!(applied.rows, [0, 2], "the same id at a different time is a different event");
            assert_eq!(totals(&p), [2, 1, 0, 1]);
        }
    }

    #[test]
    fn a_seen_key_is_looked_up_and_the_stored_offset_decides_whether_it_is_a_copy() {
        let mut p = partition(i64::MIN);
        p.apply(&chunk(0, &[(0, "a")]), &BTreeMap::new()).unwrap();
        let copy = chunk(1, &[(0, "a"), (0, "b")]);
        assert_eq!(p.questions(&copy).keys, [0]);
        p.apply(&copy, &[(0, at(0))].into()).unwrap();
        assert_eq!(totals(&p), [2, 1, 0, 0]);
        let false_hit = chunk(3, &[(0, "a")]);
        p.apply(&false_hit, &BTreeMap::new()).unwrap();
        assert_eq!(
            totals(&p),
            [3, 1, 0, 0],
            "without a row it is a first copy, even if the filter reports a hit"
        );
    }

    #[test]
    fn a_row_with_the_same_offset_is_written_and_counted_again() {
        let mut p = partition(i64::MAX);
        let applied = p.apply(&chunk(0, &[(0, "a")]), &[(0, at(0))].into()).unwrap();
        assert_eq!((applied.rows, totals(&p)), (vec![0], [1, 0, 0, 0]));
    }

    #[test]
    fn a_later_stored_offset_is_rejected_as_a_different_log() {
        let mut p = partition(i64::MAX);
        let error = p.apply(&chunk(4, &[(0, "a")]), &[(0, at(9))].into()).unwrap_err();
        assert_eq!((error.offset, error.found), (4, 9));
    }

    #[test]
    fn hot_from_moves_only_between_batches() {
        let mut p = partition(i64::MIN);
        let chunk = chunk(0, &[(0, "a"), (25, "b"), (0, "a")]);
        p.apply(&chunk, &BTreeMap::new()).unwrap();
        assert_eq!(totals(&p), [2, 1, 0, 0]);
        assert_eq!(p.advance(), [BASE], "the pane of minute 0 becomes cold after the batch");
    }

    #[test]
    fn a_replay_adds_only_records_at_or_after_count_from_to_the_totals() {
        let mut p = partition(i64::MAX);
        p.position.count_from = 2;
        p.position.totals.events = 2;
        p.apply(&chunk(0, &[(0, "a"), (0, "b"), (0, "c")]), &[(0, at(0)), (1, at(1))].into()).unwrap();
        assert_eq!(totals(&p), [3, 0, 0, 0]);
    }

    #[test]
    fn whether_an_event_is_late_depends_on_the_log_before_it() {
        let mut p = partition(i64::MIN);
        p.apply(&chunk(0, &[(0, "a"), (20, "b"), (9, "c"), (10, "d")]), &BTreeMap::new()).unwrap();
        assert_eq!(totals(&p), [4, 0, 1, 0]);
    }
}
