//! One partition's state and the pure step from a decoded chunk to everything that follows from it: which records are
//! first copies, what the panes and totals become, what must be written. No clock, no I/O: a function of the log.

use crate::chunk::Chunk;
use crate::poison_gate::PoisonCounts;
use crate::windows::filter::BuildAlreadyHashed;
use crate::windows::hot::Panes;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// What the records below the next offset were.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Totals {
    /// First copies: rows in the event table.
    pub events: i64,
    /// Further copies of an event.
    pub duplicates: i64,
    /// First copies behind the watermark less the allowed lateness.
    pub late: i64,
    /// Records that went to the dead-letter topic.
    pub dead_letters: i64,
    /// Offsets an operator had the processor skip because they could not be read.
    #[serde(default)]
    pub skipped: i64,
}

impl Totals {
    /// Records counted in all.
    pub fn records(&self) -> i64 {
        self.events + self.duplicates + self.dead_letters
    }
}

/// Identity of one record of the log, by which another log is recognised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastRecord {
    /// Its offset.
    pub offset: i64,
    /// Hash of its key, value and time stamp.
    pub fingerprint: i64,
}

/// How far a partition's log has been taken, exact for the log below `next_offset`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Position {
    /// Next offset to take.
    pub next_offset: i64,
    /// Offset at which counting began.
    #[serde(default)]
    pub first_offset: i64,
    /// The last record below it; transaction markers may lie between the two. `None`: no record was taken.
    pub last_record: Option<LastRecord>,
    /// Totals of the records below `next_offset` (during a replay: below `count_from`).
    pub totals: Totals,
    /// Highest event time so far; `None`: no event.
    pub seen_to: Option<i64>,
    /// Poison counted against the limits.
    #[serde(default)]
    pub poison: PoisonCounts,
    /// Only records from here on add to the totals; above `next_offset` only during a replay.
    pub count_from: i64,
}

/// What must be read before a chunk can be applied.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Questions {
    /// Numbers of the events whose key must be looked up, ascending.
    pub keys: Vec<u32>,
    /// Starts of the cold panes whose rows must be loaded.
    pub panes: BTreeSet<i64>,
}

/// The result of applying a chunk: rows to write, changed panes, keys first seen. Nothing of it is visible to anyone yet.
#[derive(Debug, Default, PartialEq)]
pub struct Applied {
    /// Numbers of the events that are first copies.
    pub rows: Vec<u32>,
    /// Per pane start: its rows to write.
    pub panes: BTreeMap<i64, Vec<usize>>,
    /// Per hot pane start: hashes of the keys first seen.
    pub seen: BTreeMap<i64, Vec<u64>>,
    /// Events that went through a look-up.
    pub looked_up: usize,
    /// First copies counted in cold panes.
    pub cold: usize,
}

/// A look-up found a later offset than the record's own: the rows are of another log.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the event at offset {offset} is already stored with the later offset {found}: the rows are of another log"
)]
pub struct LaterOffset {
    /// The record's.
    pub offset: i64,
    /// The row's.
    pub found: i64,
}

/// The keys first seen in this chunk, whole.
#[derive(Default)]
struct FirstHere(HashMap<u64, u32, BuildAlreadyHashed>);

impl FirstHere {
    /// Notes event `index`; false where the same key was noted before.
    fn insert(&mut self, chunk: &Chunk, index: u32) -> bool {
        let event = &chunk.events[index as usize];
        let mut slot = event.hash;
        while let Some(other) = self.0.get(&slot) {
            let other = &chunk.events[*other as usize];
            if other.time_ms == event.time_ms && chunk.id(other) == chunk.id(event) {
                return false;
            }
            slot = slot.wrapping_add(1);
        }
        self.0.insert(slot, index);
        true
    }
}

/// One partition: where it stands and the panes in memory.
#[derive(Debug)]
pub struct Partition {
    /// Exact for the log below its next offset.
    pub position: Position,
    /// Panes in memory.
    pub panes: Panes,
    lateness_ms: i64,
}

impl Partition {
    /// At `position`, with `panes` restored or empty.
    pub fn new(position: Position, panes: Panes, lateness_ms: i64) -> Partition {
        Partition { position, panes, lateness_ms }
    }

    /// What must be read before `chunk` can be applied: asked only when the last write is acknowledged.
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

    /// Takes `chunk`: `found` holds, for each key asked for, the offset its row was stored with. The state in memory moves
    /// on; nothing is written.
    pub fn apply(
        &mut self,
        chunk: &Chunk,
        asked: &[u32],
        found: &[Option<i64>],
    ) -> Result<Applied, LaterOffset> {
        let mut applied = Applied { looked_up: asked.len(), ..Applied::default() };
        let mut first_here = FirstHere::default();
        let mut answers = asked.iter().zip(found).peekable();
        for (index, event) in (0u32..).zip(&chunk.events) {
            let counts = event.offset >= self.position.count_from;
            let answer = answers.next_if(|(asked, _)| **asked == index).and_then(|(_, found)| *found);
            if let Some(found) = answer.filter(|f| *f > event.offset) {
                return Err(LaterOffset { offset: event.offset, found });
            }
            let stored_before = answer.is_some_and(|f| f < event.offset);
            let is_first = !stored_before && first_here.insert(chunk, index);
            let is_offered = is_first;
            #[cfg(test)]
            let is_offered = is_offered && !crate::simulation::mutations::skips(answer, event.offset);
            if is_offered {
                self.count_first(chunk, index, &mut applied);
            }
            let totals = &mut self.position.totals;
            let late =
                self.position.seen_to.is_some_and(|w| event.time_ms < w.saturating_sub(self.lateness_ms));
            totals.events += i64::from(counts && is_first);
            totals.duplicates += i64::from(counts && !is_first);
            totals.late += i64::from(counts && is_first && late);
            self.position.seen_to = self.position.seen_to.max(Some(event.time_ms));
            #[cfg(test)]
            crate::simulation::mutations::move_border(self);
        }
        let dead = chunk.poison.iter().filter(|p| p.offset >= self.position.count_from).count();
        self.position.totals.dead_letters += dead as i64;
        self.position.totals.skipped += chunk.skipped_from(self.position.count_from);
        self.position.next_offset = chunk.next_offset;
        self.position.last_record = chunk.last_record.or(self.position.last_record);
        self.settle(&mut applied);
        Ok(applied)
    }

    /// Adds a first copy to its pane rows.
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

    /// Between batches: moves `hot_from`. Returns the starts of the panes that are hot no more.
    pub fn advance(&mut self) -> Vec<i64> {
        self.panes.advance(self.position.seen_to)
    }
}

#[cfg(test)]
mod tests;
