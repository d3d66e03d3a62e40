//! Simulated logs and their oracle. The oracle computes the exact state for the log below an offset from the records,
//! without code of the processor's decoder and windows.

use super::choices::Choices;
use super::mutations::{self, Mutation};
use crate::count::partition::Totals;
use crate::record::chunk::{Chunk, LastRecord};
use crate::record::decode::{Decoder, Record};
use common::contracts::event::{DEFAULT_AHEAD_MS, fingerprint};
use common::contracts::stream::Definition;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// Pane length in milliseconds.
pub const PANE_MS: i64 = 10_000;
/// Allowed lateness in milliseconds: half a pane, as in the protocol model.
pub const LATENESS_MS: i64 = 5_000;
/// Size of a leap in time, after which earlier rows have expired. A multiple of the pane and bucket lengths.
pub const LEAP_MS: i64 = 400 * 86_400_000;
/// How far events may be ahead of their records in a log that has such events.
const MAX_AHEAD_MS: i64 = 3 * DEFAULT_AHEAD_MS;
/// Start of the panes of events ahead of time, in milliseconds after [`BASE_MS`]. A multiple of the pane length.
pub const AHEAD_MS: i64 = 2 * DEFAULT_AHEAD_MS;
/// Event time that is too far ahead of any record's timestamp.
const FAR_MS: i64 = 70 * 365 * 86_400_000;
/// Start of pane 0 in Unix milliseconds. A ten-minute bucket ends two panes later, so the panes are in two buckets.
pub const BASE_MS: i64 = 1_800_000_000_000 - 2 * PANE_MS;
const KINDS: [Option<&str>; 4] = [Some("a"), Some("b"), Some("else"), None];
const SCORES: [Option<f64>; 5] = [Some(5.1), Some(12.3), Some(-3.7), Some(0.1), None];

const DEFINITION: &str = r#"
[stream]
name = "simulated"
schedule = { every = "1s" }
[source]
url = "http://127.0.0.1:1/"
allow_private = true
records = "/r"
[event]
id = "/id"
time = "/at"
type = "simulated"
[[column]]
name = "kind"
type = "text"
pointer = "/kind"
[[column]]
name = "score"
type = "double"
pointer = "/score"
[store]
bucket = "10m"
shards = 2
ttl = "0"
[windows]
pane = "10s"
lateness = "5s"
measures = ["score"]
[[windows.group_by]]
column = "kind"
values = ["a", "b"]
[[windows.group_by]]
column = "score"
step = 10
count = 2
"#;

/// Returns the stream definition of simulated logs. With a `ttl_seconds` of 0, rows never expire.
pub fn definition(ttl_seconds: i64) -> Definition {
    let mut definition = Definition::parse("simulated.toml", DEFINITION).unwrap();
    definition.store.ttl_seconds = ttl_seconds;
    definition
}

/// One event of a log.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SimEvent {
    /// Event time in milliseconds after [`BASE_MS`].
    pub at: i64,
    /// Number of the id, see [`id_of`].
    pub id: u32,
    /// Index in `KINDS`.
    pub kind: usize,
    /// Index in `SCORES`.
    pub score: usize,
}

/// One record of a log.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rec {
    /// A valid event.
    Event(SimEvent),
    /// A record that is not JSON.
    Poison,
    /// An event whose rows may have expired, according to its record's timestamp. Undecodable.
    TooOld(SimEvent),
    /// An event too far ahead of its record's timestamp. Undecodable.
    TooFar(SimEvent),
    /// A transaction marker or a record of an aborted transaction. It has an offset but is never delivered.
    Marker,
}

/// Returns an event with id number `id` at `at` milliseconds. Kind and score follow from the id.
pub fn event(at: i64, id: u32) -> Rec {
    Rec::Event(SimEvent { at, id, kind: id as usize % 4, score: id as usize % 5 })
}

/// Generates 2 to 12 records over three to five panes: copies, disorder, very late events, events ahead of time, one id
/// at several times, undecodable records of each kind, and transaction markers.
pub fn random(choices: &mut Choices) -> Vec<Rec> {
    let count = 2 + choices.pick(11, 85);
    let mut log = Vec::new();
    let mut seen: Vec<SimEvent> = Vec::new();
    let mut leap = 0;
    for id in 0..count {
        let sort = if seen.is_empty() { 2 * choices.pick(2, 10) } else { choices.pick(9, 60) };
        let earlier = |choices: &mut Choices| seen[choices.index(seen.len(), 60)];
        let event = match sort {
            1 => {
                // A copy may differ from the first record in everything except its key.
                let copy = earlier(choices);
                SimEvent { score: (copy.score + choices.index(2, 20)) % SCORES.len(), ..copy }
            }
            2 => {
                log.push(Rec::Poison);
                continue;
            }
            3 => {
                let other = earlier(choices);
                SimEvent { at: other.at / PANE_MS * PANE_MS + (other.at + 3_000) % PANE_MS, ..other }
            }
            4 => {
                let other = earlier(choices);
                let era = other.at / LEAP_MS * LEAP_MS;
                SimEvent { at: era + (other.at - era + PANE_MS) % (3 * PANE_MS), ..other }
            }
            5 => {
                log.push(Rec::TooFar(SimEvent { at: FAR_MS, ..earlier(choices) }));
                continue;
            }
            6 => {
                leap = LEAP_MS;
                earlier(choices)
            }
            7 => {
                log.push(Rec::Marker);
                continue;
            }
            sort => {
                let pane = i64::from(choices.pick(5, 70) % 4);
                let ahead = if sort == 8 { AHEAD_MS } else { 0 };
                let at = leap + ahead + pane * PANE_MS + i64::from(choices.pick(3, 50)) * 4_999;
                SimEvent {
                    at,
                    id,
                    kind: choices.index(KINDS.len(), 60),
                    score: choices.index(SCORES.len(), 60),
                }
            }
        };
        seen.push(event);
        log.push(if event.at < leap { Rec::TooOld(event) } else { Rec::Event(event) });
    }
    log
}

/// The exact values of a pane row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PaneRow {
    /// Number of events.
    pub count: i64,
    /// Number of events with a score.
    pub scored: i64,
    /// Sum of the scores, added in log order.
    pub sum: f64,
    /// Minimum and maximum score. `None` without a score.
    pub bounds: Option<(f64, f64)>,
}

/// Pane start, dimension and value of a pane row.
pub type PaneKey = (i64, String, String);

/// The exact state for a log.
#[derive(Debug, Clone, Default)]
pub struct Exact {
    /// All pane rows.
    pub panes: BTreeMap<PaneKey, PaneRow>,
    /// Totals of the progress row.
    pub totals: Totals,
    /// The watermark.
    pub seen_to: Option<i64>,
    /// (event time, id) → first offset and the event in its row.
    pub rows: BTreeMap<(i64, String), (i64, SimEvent)>,
    /// Offsets of the dead letters.
    pub dead: Vec<i64>,
}

impl Exact {
    fn take(&mut self, offset: i64, rec: &Rec, timestamp_ms: i64) {
        let event = match rec {
            Rec::Event(event) => event,
            Rec::Marker => return,
            Rec::Poison | Rec::TooOld(_) | Rec::TooFar(_) => {
                self.totals.dead_letters += 1;
                self.dead.push(offset);
                return;
            }
        };
        let time = BASE_MS + event.at;
        let key = (time, id_of(event.id));
        let late = self.seen_to.is_some_and(|seen_to| time < seen_to - LATENESS_MS);
        // Without events ahead of time, no event time is above the timestamp of its record.
        let advanced = time.min(timestamp_ms);
        self.seen_to = Some(self.seen_to.map_or(advanced, |seen_to| seen_to.max(advanced)));
        if let Some((_, first)) = self.rows.get(&key) {
            self.totals.duplicates += 1;
            self.totals.revised += i64::from(columns_of(first) != columns_of(event));
            return;
        }
        self.rows.insert(key, (offset, *event));
        self.totals.events += 1;
        self.totals.late += i64::from(late);
        let kind = KINDS[event.kind].filter(|kind| ["a", "b"].contains(kind)).unwrap_or("(other)");
        let score = match SCORES[event.score] {
            Some(score) if (0.0..10.0).contains(&score) => "0",
            Some(score) if (10.0..20.0).contains(&score) => "10",
            _ => "(other)",
        };
        let start = BASE_MS + event.at / PANE_MS * PANE_MS;
        for (dimension, value) in [("", ""), ("kind", kind), ("score", score)] {
            let empty = PaneRow { count: 0, scored: 0, sum: 0.0, bounds: None };
            let row = self.panes.entry((start, dimension.to_owned(), value.to_owned())).or_insert(empty);
            row.count += 1;
            if let Some(score) = SCORES[event.score] {
                row.scored += 1;
                row.sum += score;
                let (least, greatest) = row.bounds.unwrap_or((score, score));
                row.bounds = Some((least.min(score), greatest.max(score)));
            }
        }
    }
}

/// Returns the event id with number `id`.
pub fn id_of(id: u32) -> String {
    format!("e{id}")
}

/// Returns the CQL bytes of an event's declared columns. `None` means unset.
pub fn columns_of(event: &SimEvent) -> [Option<Vec<u8>>; 2] {
    [
        KINDS[event.kind].map(|kind| kind.as_bytes().to_vec()),
        SCORES[event.score].map(|score| score.to_be_bytes().to_vec()),
    ]
}

/// The log of one partition, with the exact state for each prefix.
pub struct Log {
    /// All records, from offset 0 on. Retention only raises `low`.
    pub records: Vec<Rec>,
    /// First offset that retention has not removed.
    pub low: i64,
    /// The exact state after each number of records.
    pub exact: Vec<Arc<Exact>>,
    /// Offset added to all timestamps. It distinguishes logs with the same records.
    pub broker: i64,
    /// Offsets that cannot be read.
    pub damaged: Range<i64>,
}

impl Log {
    /// Creates a log from which no record was removed.
    pub fn new(records: Vec<Rec>) -> Log {
        let mut log = Log { records, low: 0, exact: Vec::new(), broker: 0, damaged: 0..0 };
        log.recompute();
        log
    }

    fn recompute(&mut self) {
        let mut next = Exact::default();
        self.exact = vec![Arc::new(next.clone())];
        for (offset, rec) in (0..).zip(&self.records) {
            if self.damaged.contains(&offset) {
                next.totals.skipped += 1;
            } else {
                next.take(offset, rec, self.timestamp(offset));
            }
            self.exact.push(Arc::new(next.clone()));
        }
    }

    /// Makes a range of unfetched offsets unreadable. An operator will mark them to be skipped.
    pub fn damage(&mut self, damaged: Range<i64>) {
        self.damaged = damaged;
        self.recompute();
    }

    /// Returns the last readable record below `offset`.
    pub fn last_record_below(&self, offset: i64) -> Option<LastRecord> {
        let is_record =
            |at: &i64| !matches!(self.records[*at as usize], Rec::Marker) && !self.damaged.contains(at);
        let offset = (0..offset).rev().find(is_record)?;
        Some(LastRecord { offset, fingerprint: self.fingerprint(offset) })
    }

    /// Returns the offset after the last record.
    pub fn high(&self) -> i64 {
        self.records.len() as i64
    }

    /// Returns the exact state for the log below `offset`.
    pub fn below(&self, offset: i64) -> &Arc<Exact> {
        &self.exact[offset as usize]
    }

    /// Returns the exact state for the whole log.
    pub fn all(&self) -> &Arc<Exact> {
        self.below(self.high())
    }

    /// Returns the offset of the leap in time, which is that of the first event whose rows may have expired.
    pub fn leap(&self) -> Option<i64> {
        self.records.iter().position(|rec| matches!(rec, Rec::TooOld(_))).map(|at| at as i64)
    }

    /// How far the definition of the log allows events to be ahead, in milliseconds.
    pub fn ahead_ms(&self) -> i64 {
        let is_ahead = |event: &SimEvent| event.at % LEAP_MS >= AHEAD_MS;
        let has_events_ahead = self.records.iter().any(|rec| matches!(rec, Rec::Event(e) if is_ahead(e)));
        if has_events_ahead { MAX_AHEAD_MS } else { DEFAULT_AHEAD_MS }
    }

    fn timestamp(&self, offset: i64) -> i64 {
        let leap = if self.leap().is_some_and(|leap| leap <= offset) { LEAP_MS } else { 0 };
        // With events ahead of time, the present is within the panes of the other events.
        let present = if self.ahead_ms() == MAX_AHEAD_MS { 20_000 } else { 60_000 };
        BASE_MS + present + self.broker + offset + leap
    }

    fn value(&self, offset: i64) -> Vec<u8> {
        match &self.records[offset as usize] {
            Rec::Poison | Rec::Marker => b"no json".to_vec(),
            Rec::Event(event) | Rec::TooOld(event) | Rec::TooFar(event) => {
                let (kind, score) = (KINDS[event.kind], SCORES[event.score]);
                serde_json::json!({"kind": kind, "score": score, "more": offset}).to_string().into_bytes()
            }
        }
    }

    /// Returns the fingerprint of the record at `offset`.
    pub fn fingerprint(&self, offset: i64) -> i64 {
        fingerprint(b"", &self.value(offset), self.timestamp(offset))
    }

    /// Decodes the records of `offsets` with the real decoder, as the fetcher does.
    pub fn chunk(&self, decoder: &Decoder, offsets: Range<i64>) -> Chunk {
        let mut chunk = Chunk { first_offset: offsets.start, ..decoder.chunk() };
        for offset in offsets.clone() {
            let (id, at) = match &self.records[offset as usize] {
                Rec::Event(e) | Rec::TooOld(e) | Rec::TooFar(e) => (id_of(e.id), e.at),
                Rec::Poison => ("poison".to_owned(), 0),
                Rec::Marker => continue,
            };
            let time = chrono::DateTime::from_timestamp_millis(BASE_MS + at).unwrap().to_rfc3339();
            let headers = [("ce_id", Some(id.as_bytes())), ("ce_time", Some(time.as_bytes()))];
            let value = self.value(offset);
            let record = Record {
                offset,
                timestamp_ms: mutations::record_time(self.timestamp(offset), BASE_MS + at),
                key: None,
                value: Some(&value),
                headers: &headers,
            };
            decoder.decode(&record, &mut chunk);
        }
        chunk.events.iter_mut().for_each(mutations::advance_to_event_time);
        chunk.last_record =
            self.last_record_below(offsets.end).filter(|record| record.offset >= offsets.start);
        if !mutations::is_active(Mutation::FollowPosition) {
            chunk.next_offset = offsets.end;
        }
        chunk
    }
}
