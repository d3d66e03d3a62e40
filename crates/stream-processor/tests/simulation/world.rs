//! The environment of the workers: tables in which the write with the highest stamp wins, writes in flight, and the
//! gates at which a schedule decides which step runs next. Every write that readers could see is checked when it takes
//! effect.

use super::choices::Choices;
use super::log::{BASE_MS, LEAP_MS, Log, PaneRow, columns_of};
use super::mutations::Mutation;
use crate::count::partition::{LogPosition, Totals};
use crate::pipeline::start::ProgressFacts;
use crate::record::chunk::LastRecord;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::oneshot;

/// Maximum number of faults in one schedule.
pub const MAX_FAULTS: u32 = 4;

/// Name of a column.
pub type Name = &'static str;
/// The cells of a row: column → (stamp, value).
pub type Cells = BTreeMap<Name, (i64, Vec<u8>)>;

/// The row that a write changes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Target {
    /// An event row, by event time and id.
    Row(i64, String),
    /// A pane row, by pane start, dimension and value.
    Pane(i64, String, String),
    /// The progress row.
    Progress,
    /// The running total at a second.
    Throughput(i64),
    /// A dead letter, by the offset of its source record.
    Dead(i64),
}

/// A write to one row.
#[derive(Debug, Clone)]
pub struct Op {
    /// The row that is written.
    pub target: Target,
    /// `USING TIMESTAMP`.
    pub stamp: i64,
    /// Bound columns. Unset columns are left out.
    pub cells: Vec<(Name, Vec<u8>)>,
}

/// A snapshot of all tables.
#[derive(Clone)]
pub struct Tables {
    pub(super) rows: BTreeMap<(i64, String), Cells>,
    pub(super) panes: BTreeMap<(i64, String, String), Cells>,
    pub(super) progress: Cells,
    pub(super) throughput: BTreeMap<i64, Cells>,
}

/// A step of a process that waits for permission to run.
pub struct Gate {
    /// Number of the process.
    pub life: usize,
    sender: oneshot::Sender<()>,
}

/// The state of everything servers the processes.
pub struct World {
    /// The partition's log.
    pub log: Log,
    /// The log of the recreated topic, while the topic is recreated.
    pub replacement: Option<Log>,
    /// Source of all decisions.
    pub choices: Choices,
    /// The mutation of the protocol, if any.
    pub mutation: Option<Mutation>,
    /// Whether every write is checked. If `false`, only the end state is checked.
    pub watch: bool,
    /// Description of everything that happened. `None` if no trace is kept.
    pub trace: Option<Vec<String>>,
    /// Number of trace lines, counted even if no trace is kept.
    pub trace_len: usize,
    /// The first violation of a guarantee.
    pub violation: Option<String>,
    /// Event rows.
    pub rows: BTreeMap<(i64, String), Cells>,
    /// Pane rows.
    pub panes: BTreeMap<(i64, String, String), Cells>,
    /// The progress row.
    pub progress: Cells,
    /// Running totals by second.
    pub throughput: BTreeMap<i64, Cells>,
    /// The current second, for running totals.
    pub second: i64,
    /// Number of dead letters by source offset.
    pub dead: BTreeMap<i64, u32>,
    /// Writes that timed out and may take effect at any later time.
    pub delayed: Vec<Op>,
    /// Waiting steps.
    pub gates: Vec<Gate>,
    /// Writes that were sent but not acknowledged, by process.
    pub in_flight: BTreeMap<usize, Vec<Op>>,
    /// Number of faults so far.
    pub faults: u32,
    /// Last committed next offset, by process.
    pub committed: BTreeMap<usize, i64>,
    /// Processes that are expected to end with an error, because a fault was injected.
    pub failing: BTreeSet<usize>,
    /// Sizes of the next batches, if a test sets them.
    pub batches: Option<Vec<i64>>,
    /// Rows before this event time have expired.
    pub expired_before: Option<i64>,
    /// Ranges that an operator has marked to be skipped.
    pub skips: Vec<Range<i64>>,
    /// Offset after the last record that any process has fetched.
    pub fetched_to: i64,
    /// Snapshots of the tables, oldest first.
    pub snapshots: Vec<Tables>,
    /// Number of restored snapshots.
    pub restores: u32,
    /// Value of `restores` when a process last confirmed that the tables have all acknowledged writes, by process.
    pub confirmed: BTreeMap<usize, u32>,
    /// A logical clock that advances with every write.
    pub clock: i64,
    /// Mask for the hashes of seen keys. A small mask makes them collide.
    pub hash_mask: u64,
    /// Number of steps executed so far.
    pub steps: u64,
    /// Step at which a write or commit fails permanently.
    pub fail_at: Option<u64>,
}

/// A handle to the world that all processes share.
#[derive(Clone)]
pub struct Shared(pub Arc<Mutex<World>>);

impl Shared {
    /// Locks the world.
    pub fn lock(&self) -> MutexGuard<'_, World> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the schedule runs this step of process `life`.
    pub async fn gate(&self, life: usize) {
        let (sender, opened) = oneshot::channel();
        self.lock().gates.push(Gate { life, sender });
        // The sender is dropped only if the process was killed, and then this task is never polled again.
        let _opened = opened.await;
    }
}

/// Reads a column as a number. `None` if it is unset.
pub fn number(cells: &Cells, name: Name) -> Option<i64> {
    cells.get(name).map(|(_, bytes)| i64::from_be_bytes(bytes.as_slice().try_into().unwrap()))
}

fn float(cells: &Cells, name: Name) -> Option<f64> {
    number(cells, name).map(|bits| f64::from_bits(bits as u64))
}

impl World {
    /// Creates a world with `log` and empty tables.
    pub fn new(log: Log, choices: Choices, mutation: Option<Mutation>) -> World {
        World {
            log,
            replacement: None,
            choices,
            mutation,
            watch: true,
            trace: None,
            trace_len: 0,
            violation: None,
            rows: BTreeMap::new(),
            panes: BTreeMap::new(),
            progress: Cells::new(),
            throughput: BTreeMap::new(),
            second: 0,
            dead: BTreeMap::new(),
            delayed: Vec::new(),
            gates: Vec::new(),
            in_flight: BTreeMap::new(),
            faults: 0,
            committed: BTreeMap::new(),
            failing: BTreeSet::new(),
            batches: None,
            expired_before: None,
            skips: Vec::new(),
            fetched_to: 0,
            snapshots: Vec::new(),
            restores: 0,
            confirmed: BTreeMap::new(),
            clock: 0,
            hash_mask: u64::MAX,
            steps: 0,
            fail_at: None,
        }
    }

    /// The log that a fetch reads.
    pub fn topic(&self) -> &Log {
        self.replacement.as_ref().unwrap_or(&self.log)
    }

    /// Fingerprint of the record that a fetch finds at `offset`. The mutation `Fingerprint` always returns the expected
    /// one.
    pub fn found_fingerprint(&self, offset: i64) -> i64 {
        let is_active = self.mutation == Some(Mutation::Fingerprint);
        if is_active { &self.log } else { self.topic() }.fingerprint(offset)
    }

    /// Appends a line to the trace.
    pub fn note(&mut self, line: impl FnOnce() -> String) {
        self.trace_len += 1;
        if let Some(trace) = &mut self.trace {
            trace.push(line());
        }
    }

    /// Records the violation of a guarantee. Only the first one is kept.
    pub fn violate(&mut self, what: &str, detail: impl FnOnce() -> String) {
        if self.violation.is_none() {
            let detail = detail();
            self.note(|| format!("!! {what}: {detail}"));
            self.violation = Some(what.to_owned());
        }
    }

    /// Whether `life` has confirmed since the last restore that the tables have all acknowledged writes.
    pub fn has_confirmed(&self, life: usize) -> bool {
        self.restores == 0 || self.confirmed.get(&life) == Some(&self.restores)
    }

    /// Draws one of `kinds` outcomes. 0 means no fault, which is the only outcome once [`MAX_FAULTS`] is reached.
    pub fn draw_fault(&mut self, kinds: u32, percent: u64) -> u32 {
        if self.faults >= MAX_FAULTS {
            return 0;
        }
        let kind = self.choices.pick(kinds, percent);
        self.faults += u32::from(kind > 0);
        kind
    }

    /// Runs the waiting step at `index`.
    pub fn open(&mut self, index: usize) {
        let gate = self.gates.remove(index);
        self.steps += 1;
        // The receiver is gone if a concurrent step of the same process has failed.
        let _sent = gate.sender.send(());
    }

    /// Removes the waiting steps of a killed process. Its writes in flight may still take effect later.
    pub fn remove_process(&mut self, life: usize) {
        self.gates.retain(|gate| gate.life != life);
        for op in self.in_flight.remove(&life).unwrap_or_default() {
            if self.choices.pick(2, 15) == 1 {
                self.delayed.push(op);
            }
        }
    }

    /// Applies a write. In each cell the higher stamp wins, and the larger value on a tie.
    pub fn apply(&mut self, op: &Op, who: &str) {
        self.clock += 1;
        let shown = op.clone();
        self.note(|| format!("{who}: {}", describe(&shown)));
        let cells = match &op.target {
            Target::Dead(offset) => {
                *self.dead.entry(*offset).or_default() += 1;
                return self.check_dead(*offset);
            }
            Target::Throughput(second) => self.throughput.entry(*second).or_default(),
            Target::Row(at, id) => self.rows.entry((*at, id.clone())).or_default(),
            Target::Pane(start, dimension, value) => {
                self.panes.entry((*start, dimension.clone(), value.clone())).or_default()
            }
            Target::Progress => &mut self.progress,
        };
        let before = cells.clone();
        for (name, value) in &op.cells {
            let new = (op.stamp, value.clone());
            if cells.get(name).is_none_or(|old| new > *old) {
                cells.insert(name, new);
            }
        }
        let after = cells.clone();
        match &op.target {
            _ if !self.watch => {}
            Target::Row(at, id) => self.check_row(*at, id, &after),
            Target::Pane(start, dimension, value) => {
                self.check_pane((*start, dimension, value), &before, &after);
            }
            Target::Throughput(_) => self.check_throughput(&after),
            _ => self.check_progress(&before, &after),
        }
    }

    fn check_dead(&mut self, offset: i64) {
        if !self.log.all().dead.contains(&offset) {
            self.violate("an event was sent to the dead letters", || offset.to_string());
        }
    }

    fn check_row(&mut self, at: i64, id: &str, cells: &Cells) {
        let Some((offset, event)) = self.log.all().rows.get(&(at, id.to_owned())).copied() else {
            return self.violate("a row without an event", || format!("{} {id}", at - BASE_MS));
        };
        if number(cells, "kafka_offset") != Some(offset) {
            self.violate("a row holds the offset of a later copy", || {
                format!("{id}: {:?}, first at {offset}", number(cells, "kafka_offset"))
            });
        }
        let held = ["kind", "score"].map(|name| cells.get(name).map(|(_, bytes)| bytes.clone()));
        if held != columns_of(&event) {
            self.violate("a row holds other columns than the first copy", || format!("{id}: {held:?}"));
        }
    }

    fn check_pane(&mut self, (start, dimension, value): (i64, &str, &str), before: &Cells, after: &Cells) {
        let (row, upto) = pane_row(after);
        let key = (start, dimension.to_owned(), value.to_owned());
        let exact = self.log.below(upto.clamp(0, self.log.high())).panes.get(&key).copied();
        if exact != Some(row) {
            self.violate("a pane row is not the exact value for the log below its offset", || {
                format!("{key:?} upto {upto}: {row:?}, exact {exact:?}")
            });
        }
        let end = start + super::log::PANE_MS;
        let below = self.log.below(upto.clamp(0, self.log.high()));
        let of_pane = below.rows.iter().filter(|((at, _), _)| (start..end).contains(at));
        // A batch in progress during a restore writes panes whose rows are gone. The rows are written again later.
        let settled_to = if self.restores == 0 { upto } else { position_of(&self.progress).next_offset };
        let missing = of_pane
            .filter(|(key, (offset, _))| *offset < settled_to && !self.rows.contains_key(*key))
            .map(|(key, _)| key)
            .find(|(at, _)| !self.is_expired(*at));
        if let Some(missing) = missing.cloned() {
            self.violate("a pane is ahead of its rows", || format!("{missing:?} upto {upto}"));
        }
        if !before.is_empty() {
            let (old, old_upto) = pane_row(before);
            if row.count < old.count || upto < old_upto {
                self.violate("a pane row goes back", || format!("{key:?}: {old:?} -> {row:?}"));
            }
        }
    }

    fn check_progress(&mut self, before: &Cells, after: &Cells) {
        if number(after, "next_offset").is_none() {
            return;
        }
        let position = position_of(after);
        let next = position.next_offset;
        let exact = self.log.below(next.clamp(0, self.log.high()));
        if (position.totals, position.seen_to) != (exact.totals, exact.seen_to) {
            let exact = (exact.totals, exact.seen_to);
            return self.violate("the progress row's totals are not those of its offset", || {
                format!("{position:?}, exact {exact:?}")
            });
        }
        if position.last_record != self.log.last_record_below(next) {
            self.violate("the progress row's fingerprint is of another record", || format!("{position:?}"));
        }
        if number(before, "next_offset").is_some_and(|before| next < before) {
            self.violate("the progress row goes back", || format!("{position:?}"));
        }
        self.check_written(next, "progress");
    }

    fn check_throughput(&mut self, cells: &Cells) {
        let (next, total) = (cells["total"].0, number(cells, "total"));
        let exact = self.log.below(next.clamp(0, self.log.high())).totals.records();
        if total != Some(exact) {
            self.violate("a running total is not that of its offset", || format!("{total:?} at {next}"));
        }
    }

    /// Expires all rows from before the leap in time. Their records are no longer in the log.
    pub fn expire(&mut self) {
        let before = BASE_MS + LEAP_MS;
        self.note(|| "rows expire".into());
        self.rows.retain(|(at, _), _| *at >= before);
        self.expired_before = Some(before);
    }

    fn is_expired(&self, at: i64) -> bool {
        self.expired_before.is_some_and(|before| at < before)
    }

    /// Checks that rows, dead letters and panes include everything below `next`.
    pub fn check_written(&mut self, next: i64, what: &str) {
        let exact = Arc::clone(self.log.below(next.clamp(0, self.log.high())));
        for ((at, id), (offset, _)) in &exact.rows {
            if !self.is_expired(*at) && !self.rows.contains_key(&(*at, id.clone())) {
                return self.violate(&format!("{what} is ahead of the rows"), || format!("{id} at {offset}"));
            }
        }
        if let Some(offset) = exact.dead.iter().find(|offset| !self.dead.contains_key(offset)) {
            return self.violate(&format!("{what} is ahead of the dead letters"), || offset.to_string());
        }
        for (key, row) in &exact.panes {
            let shown = self.panes.get(key).map_or(0, |cells| pane_row(cells).0.count);
            if shown < row.count {
                return self.violate(&format!("{what} is ahead of the panes"), || {
                    format!("{key:?}: {shown} of {}", row.count)
                });
            }
        }
    }

    /// Checks that the end state is exactly the one determined by the log.
    pub fn check_end(&mut self, totals: Totals) {
        let exact = Arc::clone(self.log.all());
        let high = self.log.high();
        self.check_written(high, "the end");
        if totals != exact.totals {
            self.violate("totals are wrong at the end", || format!("{totals:?}, exact {:?}", exact.totals));
        }
        let position = position_of(&self.progress.clone());
        if (position.next_offset, position.totals) != (high, exact.totals) {
            self.violate("the progress row is wrong at the end", || format!("{position:?}"));
        }
        for (key, cells) in self.panes.clone() {
            let row = pane_row(&cells).0;
            if exact.panes.get(&key) != Some(&row) {
                self.violate("a pane is wrong at the end", || format!("{key:?}: {row:?}"));
            }
        }
        self.throughput.clone().values().for_each(|cells| self.check_throughput(cells));
        if let Some(extra) = self.rows.keys().find(|key| !exact.rows.contains_key(key)).cloned() {
            self.violate("an extra row at the end", || format!("{extra:?}"));
        }
    }
}

/// Reads a pane row and its `upto` from its cells.
pub fn pane_row(cells: &Cells) -> (PaneRow, i64) {
    let scored = number(cells, "scored").unwrap_or(-1);
    let bounds = float(cells, "min").zip(float(cells, "max"));
    let row = PaneRow {
        count: number(cells, "count").unwrap_or(-1),
        scored,
        sum: float(cells, "sum").unwrap_or(f64::NAN),
        bounds: bounds.filter(|_| scored > 0),
    };
    (row, number(cells, "upto").unwrap_or(-1))
}

/// Reads the position from the cells of the progress row.
pub fn position_of(cells: &Cells) -> LogPosition {
    let of = |name| number(cells, name).unwrap_or(-1);
    LogPosition {
        next_offset: of("next_offset"),
        totals: Totals {
            events: of("events"),
            duplicates: of("duplicates"),
            revised: of("revised"),
            late: of("late"),
            dead_letters: of("dead_letters"),
            skipped: of("skipped"),
        },
        seen_to: number(cells, "seen_to"),
        last_record: number(cells, "last_offset")
            .zip(number(cells, "fingerprint"))
            .map(|(offset, fingerprint)| LastRecord { offset, fingerprint }),
        ..LogPosition::default()
    }
}

/// Returns the progress row as the store reads it. `None` before the first publication.
pub fn progress_of(cells: &Cells) -> Option<ProgressFacts> {
    number(cells, "next_offset")?;
    Some(ProgressFacts { position: position_of(cells), written_to: number(cells, "written_to") })
}

fn describe(op: &Op) -> String {
    let cells: Cells = op.cells.iter().map(|(name, value)| (*name, (op.stamp, value.clone()))).collect();
    let minus_base = |at: &i64| at - BASE_MS;
    match &op.target {
        Target::Row(at, id) => {
            format!("row ({}, {id}) offset {:?}", minus_base(at), number(&cells, "kafka_offset"))
        }
        Target::Pane(start, dimension, value) => {
            let (row, upto) = pane_row(&cells);
            let start = minus_base(start);
            format!("pane {start} {dimension}={value} {row:?} upto {upto} stamp {}", op.stamp)
        }
        Target::Progress if number(&cells, "next_offset").is_none() => format!("note {}", op.stamp),
        Target::Progress => format!("progress {:?} stamp {}", position_of(&cells), op.stamp),
        Target::Throughput(second) => format!("total at second {second}: {:?}", number(&cells, "total")),
        Target::Dead(offset) => format!("dead letter {offset}"),
    }
}
