//! The world around the workers: tables whose cells keep the value of the highest stamp, writes on their way, machines'
//! disks, and the gates at which a schedule decides who moves next. Everything a reader could see is checked as it lands.

use super::choices::Choices;
use super::log::{BASE_MS, LEAP_MS, Log, PaneRow, columns_of};
use super::mutations::Mutation;
use crate::partition::{LastRecord, Position, Totals};
use crate::start::Progress;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::oneshot;

/// Faults of one schedule at most.
pub const FAULTS_MOST: u32 = 4;

/// A name of a column.
pub type Name = &'static str;
/// Column → (stamp, value).
pub type Cells = BTreeMap<Name, (i64, Vec<u8>)>;

/// What a write changes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Target {
    /// Event time, id.
    Row(i64, String),
    /// Pane start, row number, dimension and value.
    Pane(i64, String, String),
    /// The progress row.
    Progress,
    /// A second of the running total.
    Throughput(i64),
    /// Offset of a dead letter.
    Dead(i64),
}

/// One write of one row.
#[derive(Debug, Clone)]
pub struct Op {
    /// What it changes.
    pub target: Target,
    /// `USING TIMESTAMP`.
    pub stamp: i64,
    /// What it binds; an unset column is not among them.
    pub cells: Vec<(Name, Vec<u8>)>,
}

/// Everything the tables hold.
#[derive(Clone)]
pub struct Tables {
    pub(super) rows: BTreeMap<(i64, String), Cells>,
    pub(super) panes: BTreeMap<(i64, String, String), Cells>,
    pub(super) progress: Cells,
    pub(super) throughput: BTreeMap<i64, Cells>,
}

/// A worker's step that waits to be let through.
pub struct Gate {
    /// Whose.
    pub life: usize,
    sender: oneshot::Sender<()>,
}

/// Everything outside the processes.
pub struct World {
    /// The partition's log.
    pub log: Log,
    /// The log that is found in its place while the topic is another.
    pub other: Option<Log>,
    /// What happens next.
    pub choices: Choices,
    /// The repair that is taken out.
    pub mutation: Option<Mutation>,
    /// Whether what lands is checked, not only the end.
    pub watch: bool,
    /// What happened, where somebody wants to read it.
    pub story: Option<Vec<String>>,
    /// How many lines the story has, or would have.
    pub moments: usize,
    /// The first promise that was broken.
    pub violation: Option<String>,
    /// Event rows.
    pub rows: BTreeMap<(i64, String), Cells>,
    /// Pane rows.
    pub panes: BTreeMap<(i64, String, String), Cells>,
    /// The progress row.
    pub progress: Cells,
    /// Running totals by second.
    pub throughput: BTreeMap<i64, Cells>,
    /// The second that clocks show.
    pub second: i64,
    /// Dead letters, by source offset: how many.
    pub dead: BTreeMap<i64, u32>,
    /// Writes that may land at any later time.
    pub delayed: Vec<Op>,
    /// Steps that wait.
    pub gates: Vec<Gate>,
    /// Per process: writes sent and not acknowledged.
    pub in_flight: BTreeMap<usize, Vec<Op>>,
    /// Faults so far.
    pub faults: u32,
    /// Per process: last committed next offset.
    pub committed: BTreeMap<usize, i64>,
    /// Processes that were told to fail.
    pub failing: BTreeSet<usize>,
    /// Sizes of the next batches, where a test sets them.
    pub batches: Option<Vec<i64>>,
    /// Rows before this event time have expired.
    pub expired_before: Option<i64>,
    /// Ranges that an operator wants skipped.
    pub skips: Vec<Range<i64>>,
    /// Offset after the last record that anybody has fetched.
    pub fetched_to: i64,
    /// Snapshots of the tables, oldest first.
    pub snapshots: Vec<Tables>,
    /// How often a snapshot was restored.
    pub restores: u32,
    /// Per process: `restores` when it last confirmed that the tables hold what they acknowledged.
    pub confirmed: BTreeMap<usize, u32>,
    /// Moves with everything that lands: what a clock would show.
    pub clock: i64,
    /// What the hashes of seen keys are cut down to, so that they collide.
    pub hash_mask: u64,
    /// Steps let through, and the one at which a fault strikes.
    pub steps: u64,
    /// The process and the step at which a write fails forever.
    pub fail_at: Option<u64>,
}

/// The world, as processes share it.
#[derive(Clone)]
pub struct Shared(pub Arc<Mutex<World>>);

impl Shared {
    /// Enters it.
    pub fn lock(&self) -> MutexGuard<'_, World> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the schedule lets `life` go on.
    pub async fn gate(&self, life: usize) {
        let (sender, opened) = oneshot::channel();
        self.lock().gates.push(Gate { life, sender });
        // A closed gate is a process that was killed: it is never polled again.
        let _opened = opened.await;
    }
}

/// The number in a column.
pub fn number(cells: &Cells, name: Name) -> Option<i64> {
    cells.get(name).map(|(_, bytes)| i64::from_be_bytes(bytes.as_slice().try_into().unwrap()))
}

fn float(cells: &Cells, name: Name) -> Option<f64> {
    number(cells, name).map(|bits| f64::from_bits(bits as u64))
}

impl World {
    /// Around `log`, empty.
    pub fn new(log: Log, choices: Choices, mutation: Option<Mutation>) -> World {
        World {
            log,
            other: None,
            choices,
            mutation,
            watch: true,
            story: None,
            moments: 0,
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

    /// What a fetch finds under the topic's name.
    pub fn topic(&self) -> &Log {
        self.other.as_ref().unwrap_or(&self.log)
    }

    /// Fingerprint of the record that a fetch finds at `offset`; always the right one, where the comparison is taken out.
    pub fn compared(&self, offset: i64) -> i64 {
        let is_out = self.mutation == Some(Mutation::Fingerprint);
        if is_out { &self.log } else { self.topic() }.fingerprint(offset)
    }

    /// Tells the story on.
    pub fn say(&mut self, line: impl FnOnce() -> String) {
        self.moments += 1;
        if let Some(story) = &mut self.story {
            story.push(line());
        }
    }

    /// A promise is broken; `what` names it, `detail` the case.
    pub fn bad(&mut self, what: &str, detail: impl FnOnce() -> String) {
        if self.violation.is_none() {
            let detail = detail();
            self.say(|| format!("!! {what}: {detail}"));
            self.violation = Some(what.to_owned());
        }
    }

    /// Whether `life` has confirmed since the last restore that the tables hold what they acknowledged.
    pub fn has_confirmed(&self, life: usize) -> bool {
        self.restores == 0 || self.confirmed.get(&life) == Some(&self.restores)
    }

    /// Whether another fault is allowed, and drawn.
    pub fn fault(&mut self, kinds: u32, percent: u64) -> u32 {
        if self.faults >= FAULTS_MOST {
            return 0;
        }
        let kind = self.choices.pick(kinds, percent);
        self.faults += u32::from(kind > 0);
        kind
    }

    /// Lets number `index` of the waiting steps through.
    pub fn open(&mut self, index: usize) {
        let gate = self.gates.remove(index);
        self.steps += 1;
        // Nobody listens where a sibling of the step has failed meanwhile.
        let _heard = gate.sender.send(());
    }

    /// Forgets what `life` was about to do; what it had sent may still land.
    pub fn died(&mut self, life: usize) {
        self.gates.retain(|gate| gate.life != life);
        for op in self.in_flight.remove(&life).unwrap_or_default() {
            if self.choices.pick(2, 15) == 1 {
                self.delayed.push(op);
            }
        }
    }

    /// A write takes effect: cell by cell the higher stamp wins, on a tie the larger value.
    pub fn land(&mut self, op: &Op, who: &str) {
        self.clock += 1;
        let shown = op.clone();
        self.say(|| format!("{who}: {}", describe(&shown)));
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
            self.bad("an event went to the dead letters", || offset.to_string());
        }
    }

    fn check_row(&mut self, at: i64, id: &str, cells: &Cells) {
        let Some((offset, event)) = self.log.all().rows.get(&(at, id.to_owned())).copied() else {
            return self.bad("a row of no event", || format!("{} {id}", at - BASE_MS));
        };
        if number(cells, "kafka_offset") != Some(offset) {
            self.bad("a row holds the offset of a later copy", || {
                format!("{id}: {:?}, first at {offset}", number(cells, "kafka_offset"))
            });
        }
        let held = ["kind", "score"].map(|name| cells.get(name).map(|(_, bytes)| bytes.clone()));
        if held != columns_of(&event) {
            self.bad("a row holds other columns than the first copy's", || format!("{id}: {held:?}"));
        }
    }

    fn check_pane(&mut self, (start, dimension, value): (i64, &str, &str), before: &Cells, after: &Cells) {
        let (row, upto) = pane_row(after);
        let key = (start, dimension.to_owned(), value.to_owned());
        let exact = self.log.below(upto.clamp(0, self.log.high())).panes.get(&key).copied();
        if exact != Some(row) {
            self.bad("a pane row is not the exact value for the log below its offset", || {
                format!("{key:?} upto {upto}: {row:?}, exact {exact:?}")
            });
        }
        let end = start + super::log::PANE_MS;
        let below = self.log.below(upto.clamp(0, self.log.high()));
        let of_pane = below.rows.iter().filter(|((at, _), _)| (start..end).contains(at));
        // A batch that was under way when a snapshot was restored writes panes whose rows are gone, until they are written again.
        let settled_to = if self.restores == 0 { upto } else { position_of(&self.progress).next_offset };
        let missing = of_pane
            .filter(|(key, (offset, _))| *offset < settled_to && !self.rows.contains_key(*key))
            .map(|(key, _)| key)
            .find(|(at, _)| !self.is_expired(*at));
        if let Some(missing) = missing.cloned() {
            self.bad("a pane is ahead of its rows", || format!("{missing:?} upto {upto}"));
        }
        if !before.is_empty() {
            let (old, old_upto) = pane_row(before);
            if row.count < old.count || upto < old_upto {
                self.bad("a pane row goes back", || format!("{key:?}: {old:?} -> {row:?}"));
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
            return self.bad("the progress row's totals are not those of its offset", || {
                format!("{position:?}, exact {exact:?}")
            });
        }
        if position.last_record != self.log.last_record_below(next) {
            self.bad("the progress row's fingerprint is of another record", || format!("{position:?}"));
        }
        if number(before, "next_offset").is_some_and(|before| next < before) {
            self.bad("the progress row goes back", || format!("{position:?}"));
        }
        self.check_written(next, "progress");
    }

    fn check_throughput(&mut self, cells: &Cells) {
        let (next, total) = (cells["total"].0, number(cells, "total"));
        let exact = self.log.below(next.clamp(0, self.log.high())).totals.records();
        if total != Some(exact) {
            self.bad("a running total is not that of its offset", || format!("{total:?} at {next}"));
        }
    }

    /// Rows from before time leapt expire: their records are long gone.
    pub fn expire(&mut self) {
        let before = BASE_MS + LEAP_MS;
        self.say(|| "rows expire".into());
        self.rows.retain(|(at, _), _| *at >= before);
        self.expired_before = Some(before);
    }

    fn is_expired(&self, at: i64) -> bool {
        self.expired_before.is_some_and(|before| at < before)
    }

    /// Everything below `next` must be readable: rows, dead letters and panes.
    pub fn check_written(&mut self, next: i64, what: &str) {
        let exact = Arc::clone(self.log.below(next.clamp(0, self.log.high())));
        for ((at, id), (offset, _)) in &exact.rows {
            if !self.is_expired(*at) && !self.rows.contains_key(&(*at, id.clone())) {
                return self.bad(&format!("{what} is ahead of the rows"), || format!("{id} at {offset}"));
            }
        }
        if let Some(offset) = exact.dead.iter().find(|offset| !self.dead.contains_key(offset)) {
            return self.bad(&format!("{what} is ahead of the dead letters"), || offset.to_string());
        }
        for (key, row) in &exact.panes {
            let shown = self.panes.get(key).map_or(0, |cells| pane_row(cells).0.count);
            if shown < row.count {
                return self.bad(&format!("{what} is ahead of the panes"), || {
                    format!("{key:?}: {shown} of {}", row.count)
                });
            }
        }
    }

    /// The end: everything there is equals what the log says.
    pub fn check_end(&mut self, totals: Totals) {
        let exact = Arc::clone(self.log.all());
        let high = self.log.high();
        self.check_written(high, "the end");
        if totals != exact.totals {
            self.bad("totals are wrong at the end", || format!("{totals:?}, exact {:?}", exact.totals));
        }
        let position = position_of(&self.progress.clone());
        if (position.next_offset, position.totals) != (high, exact.totals) {
            self.bad("the progress row is wrong at the end", || format!("{position:?}"));
        }
        for (key, cells) in self.panes.clone() {
            let row = pane_row(&cells).0;
            if exact.panes.get(&key) != Some(&row) {
                self.bad("a pane is wrong at the end", || format!("{key:?}: {row:?}"));
            }
        }
        self.throughput.clone().values().for_each(|cells| self.check_throughput(cells));
        if let Some(extra) = self.rows.keys().find(|key| !exact.rows.contains_key(key)).cloned() {
            self.bad("a row too many at the end", || format!("{extra:?}"));
        }
    }
}

/// What a pane row's cells hold, and its `upto`.
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

/// What the progress row's cells hold.
pub fn position_of(cells: &Cells) -> Position {
    let of = |name| number(cells, name).unwrap_or(-1);
    Position {
        next_offset: of("next_offset"),
        totals: Totals {
            events: of("events"),
            duplicates: of("duplicates"),
            late: of("late"),
            dead_letters: of("dead_letters"),
            skipped: of("skipped"),
        },
        seen_to: number(cells, "seen_to"),
        last_record: number(cells, "last_offset")
            .zip(number(cells, "fingerprint"))
            .map(|(offset, fingerprint)| LastRecord { offset, fingerprint }),
        ..Position::default()
    }
}

/// The progress row as the store reads it; none before anything was published.
pub fn progress_of(cells: &Cells) -> Option<Progress> {
    number(cells, "next_offset")?;
    Some(Progress { position: position_of(cells), written_to: number(cells, "written_to") })
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
