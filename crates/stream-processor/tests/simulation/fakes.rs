//! Fakes of Cassandra and the dead-letter topic. Each write of one row is a separate step. The schedule decides when it
//! happens, whether it times out, and whether a timed-out write takes effect later.

use super::log::LATENESS_MS;
use super::machine::{Machine, lock};
use super::mutations::Mutation;
use super::world::{Cells, Name, Op, Shared, Target, World, number, pane_row, progress_of};
use crate::count::partition::{LogPosition, StoredCopy};
use crate::count::windows::hot::Panes;
use crate::count::windows::pane::{Measure, Pane, PaneShape};
use crate::count::write_plan::{EventGroup, PaneGroup};
use crate::error::ProcessorError;
use crate::io::store::{Assumed, BatchRecord, DeadLetters, Store};
use crate::pipeline::start::ProgressFacts;
use crate::record::chunk::Chunk;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::{Arc, Mutex};

/// The connection of one process to the fake servers.
pub struct FakeServers {
    /// The world.
    pub world: Shared,
    /// Number of the process.
    pub life: usize,
    /// Name of the process in the trace.
    pub who: String,
    /// The rows of a pane.
    pub shape: PaneShape,
    /// Time of the process start, for the mutation `StampsByClock`.
    pub epoch: i64,
    /// Event rows before the last batch was written, for the mutation `LookUpsAhead`.
    pub before_write: Mutex<Option<BTreeMap<(i64, String), Cells>>>,
    /// Deferred writes, for the mutations that swap steps.
    pub deferred: Mutex<Vec<Op>>,
    /// Machine of the process, for the mutation `PublishBeforeCommit`.
    pub machine: Arc<Mutex<Machine>>,
}

impl FakeServers {
    fn is_active(&self, mutation: Mutation) -> bool {
        self.world.lock().mutation == Some(mutation)
    }

    /// Waits until the schedule runs this step. Fails if a fault is due at the step.
    async fn step(&self) -> Result<(), ProcessorError> {
        self.world.gate(self.life).await;
        let mut world = self.world.lock();
        if world.fail_at != Some(world.steps) {
            return Ok(());
        }
        world.failing.insert(self.life);
        world.note(|| format!("{}: injected failure", self.who));
        Err(ProcessorError::Stopped)
    }

    fn outages_in(&self, world: &World) -> u64 {
        let is_active = world.mutation == Some(Mutation::ReopenAfterOutage);
        if is_active { 0 } else { u64::from(world.restores) }
    }

    /// Fails if the tables may have lost acknowledged writes since the process made its assumptions.
    fn confirm_assumed(&self, world: &mut World, assumed: Assumed) -> Result<(), ProcessorError> {
        let Assumed { noted, outages } = assumed;
        let stored = number(&world.progress, "written_to");
        let is_active = world.mutation == Some(Mutation::NoteWritten);
        let is_lost = noted.is_some_and(|noted| stored.is_none_or(|stored| stored < noted)) && !is_active;
        if is_lost || self.outages_in(world) != outages {
            world.failing.insert(self.life);
            let who = self.who.clone();
            world.note(|| format!("{who}: the store may have lost history: {assumed:?}, holds {stored:?}"));
            return Err(ProcessorError::Reopen("the store may have lost history".into()));
        }
        let restores = world.restores;
        world.confirmed.insert(self.life, restores);
        Ok(())
    }

    /// Writes `ops` in an order that the schedule chooses. Returns when all are acknowledged.
    async fn write(&self, ops: Vec<Op>) -> Result<(), ProcessorError> {
        self.write_if(ops, None).await
    }

    /// Writes `ops` like [`FakeServers::write`]. If `assumed` is given, it is confirmed before each attempt.
    async fn write_if(&self, mut ops: Vec<Op>, assumed: Option<Assumed>) -> Result<(), ProcessorError> {
        if ops.is_empty() {
            return Ok(());
        }
        // A write that must be confirmed first is not sent before its step runs.
        if assumed.is_none() {
            self.world.lock().in_flight.entry(self.life).or_default().extend(ops.clone());
        }
        while !ops.is_empty() {
            self.world.gate(self.life).await;
            let mut world = self.world.lock();
            if let Some(assumed) = assumed {
                self.confirm_assumed(&mut world, assumed)?;
            }
            let at = world.choices.index(ops.len(), 30);
            let failing = world.fail_at == Some(world.steps);
            match if failing { 3 } else { world.draw_fault(4, 8) } {
                0 => {
                    let op = ops.remove(at);
                    self.acknowledge(&mut world.in_flight, &op);
                    world.apply(&op, &self.who);
                }
                3 => {
                    world.failing.insert(self.life);
                    let who = self.who.clone();
                    world.note(|| format!("{who}: a write fails permanently"));
                    return Err(ProcessorError::Stopped);
                }
                outcome => {
                    let (who, later) = (self.who.clone(), outcome == 2);
                    world.note(|| {
                        format!("{who}: a write timed out{}", if later { ", takes effect later" } else { "" })
                    });
                    if later && !matches!(ops[at].target, Target::Dead(_)) {
                        world.delayed.push(ops[at].clone());
                    }
                }
            }
        }
        // The writes took effect, but a crash may happen before the process knows it.
        self.step().await?;
        Ok(())
    }

    /// Removes a write from those in flight.
    fn acknowledge(&self, in_flight: &mut BTreeMap<usize, Vec<Op>>, op: &Op) {
        let of_life = in_flight.entry(self.life).or_default();
        if let Some(at) = of_life.iter().position(|o| o.target == op.target && o.stamp == op.stamp) {
            of_life.swap_remove(at);
        }
    }

    async fn write_or_defer(&self, ops: Vec<Op>, defer: bool) -> Result<(), ProcessorError> {
        if defer {
            lock(&self.deferred).extend(ops);
            return Ok(());
        }
        self.write(ops).await
    }

    fn stamp(&self, next_offset: i64) -> i64 {
        if self.is_active(Mutation::StampsByClock) { self.epoch + next_offset } else { next_offset }
    }

    fn row_ops(&self, chunk: &Chunk, groups: &[EventGroup]) -> Vec<Op> {
        let mut ops = Vec::new();
        for index in groups.iter().flat_map(|group| &group.events) {
            let event = &chunk.events[*index as usize];
            let mut cells: Vec<(Name, Vec<u8>)> = vec![("kafka_offset", event.offset.to_be_bytes().to_vec())];
            let columns = ["kind", "score"].into_iter().zip(chunk.columns_of(*index as usize));
            cells.extend(columns.filter_map(|(name, value)| Some((name, value?.to_vec()))));
            let target = Target::Row(event.time_ms, id_text(chunk.id(event)));
            ops.push(Op { target, stamp: event.time_ms * 1000, cells });
        }
        ops
    }

    fn pane_ops(&self, next_offset: i64, groups: &[PaneGroup], panes: &Panes) -> Vec<Op> {
        let mut ops = Vec::new();
        for (start, index) in groups.iter().flat_map(|group| &group.rows) {
            let pane = panes.pane(*start).unwrap_or_else(|| panic!("pane {start} to write is not in memory"));
            let (row, measure) = (pane.row(*index), pane.measures(*index)[0]);
            let mut cells: Vec<(Name, Vec<u8>)> = vec![
                ("count", row.count.to_be_bytes().to_vec()),
                ("upto", row.upto.to_be_bytes().to_vec()),
                ("scored", measure.count.to_be_bytes().to_vec()),
                ("sum", measure.sum.to_be_bytes().to_vec()),
            ];
            if measure.count > 0 {
                cells.push(("min", measure.min.to_be_bytes().to_vec()));
                cells.push(("max", measure.max.to_be_bytes().to_vec()));
            }
            let (dimension, value) = self.shape.names[*index].clone();
            let target = Target::Pane(*start, dimension, value);
            ops.push(Op { target, stamp: self.stamp(next_offset), cells });
        }
        ops
    }

    fn progress_op(&self, position: &LogPosition) -> Op {
        let totals = position.totals;
        let mut cells: Vec<(Name, Vec<u8>)> = vec![
            ("next_offset", position.next_offset.to_be_bytes().to_vec()),
            ("events", totals.events.to_be_bytes().to_vec()),
            ("duplicates", totals.duplicates.to_be_bytes().to_vec()),
            ("revised", totals.revised.to_be_bytes().to_vec()),
            ("late", totals.late.to_be_bytes().to_vec()),
            ("dead_letters", totals.dead_letters.to_be_bytes().to_vec()),
            ("skipped", totals.skipped.to_be_bytes().to_vec()),
            ("written_to", position.next_offset.to_be_bytes().to_vec()),
        ];
        cells.extend(position.seen_to.map(|at| ("seen_to", at.to_be_bytes().to_vec())));
        if let Some(record) = position.last_record {
            cells.push(("last_offset", record.offset.to_be_bytes().to_vec()));
            cells.push(("fingerprint", record.fingerprint.to_be_bytes().to_vec()));
        }
        Op { target: Target::Progress, stamp: self.stamp(position.next_offset), cells }
    }

    fn note_op(&self, written_to: i64) -> Op {
        let cells = vec![("written_to", written_to.to_be_bytes().to_vec())];
        Op { target: Target::Progress, stamp: self.stamp(written_to), cells }
    }

    /// Looks up the row of an event.
    fn stored_copy(&self, chunk: &Chunk, index: u32) -> Option<StoredCopy> {
        let event = &chunk.events[index as usize];
        let id = id_text(chunk.id(event));
        let world = self.world.lock();
        let earlier_rows = lock(&self.before_write);
        let rows = earlier_rows.as_ref().unwrap_or(&world.rows);
        let cells = match world.mutation {
            Some(Mutation::IdOnly) => {
                rows.iter().find(|((_, other), _)| *other == id).map(|(_, cells)| cells)
            }
            _ => rows.get(&(event.time_ms, id)),
        }?;
        let stored = ["kind", "score"].map(|name| cells.get(name).map(|(_, value)| value.as_slice()));
        let is_active = world.mutation == Some(Mutation::ComparedValues);
        let differs = chunk.columns_of(index as usize).ne(stored) && !is_active;
        let offset = i64::from_be_bytes(cells["kafka_offset"].1.as_slice().try_into().unwrap());
        Some(StoredCopy { offset, differs })
    }
}

/// Removes the mark that the mutation `CopiesInOneBatch` appends to ids. The tables store ids without it.
fn id_text(id: &[u8]) -> String {
    String::from_utf8_lossy(id).trim_end_matches('\u{1}').to_owned()
}

impl Store for FakeServers {
    async fn look_up(
        &self,
        chunk: &Chunk,
        groups: &[EventGroup],
    ) -> Result<BTreeMap<u32, StoredCopy>, ProcessorError> {
        let mut found = BTreeMap::new();
        for group in groups {
            self.step().await?;
            for number in &group.events {
                let event = &chunk.events[*number as usize];
                let copy = self.stored_copy(chunk, *number);
                let who = self.who.clone();
                self.world.lock().note(|| format!("{who}: looks up offset {}: {copy:?}", event.offset));
                found.extend(copy.map(|copy| (*number, copy)));
            }
        }
        Ok(found)
    }

    async fn load_panes(
        &self,
        _: i32,
        starts: &BTreeSet<i64>,
    ) -> Result<BTreeMap<i64, Pane>, ProcessorError> {
        let mut loaded = BTreeMap::new();
        for start in starts {
            self.step().await?;
            let world = self.world.lock();
            let mut pane = Pane::empty(&self.shape);
            for (index, (dimension, value)) in self.shape.names.iter().enumerate() {
                let Some(cells) = world.panes.get(&(*start, dimension.clone(), value.clone())) else {
                    continue;
                };
                let (row, upto) = pane_row(cells);
                let upto = if world.mutation == Some(Mutation::Fence) { 0 } else { upto };
                let (min, max) = row.bounds.unwrap_or((Measure::EMPTY.min, Measure::EMPTY.max));
                pane.load(index, row.count, upto, &[Measure { count: row.scored, sum: row.sum, min, max }]);
            }
            loaded.insert(*start, pane);
        }
        Ok(loaded)
    }

    async fn write_rows(&self, chunk: &Chunk, groups: &[EventGroup]) -> Result<(), ProcessorError> {
        if self.is_active(Mutation::LookUpsAhead) {
            *lock(&self.before_write) = Some(self.world.lock().rows.clone());
        }
        let defer = self.is_active(Mutation::CommitBeforeRows) || self.is_active(Mutation::PanesBeforeRows);
        self.write_or_defer(self.row_ops(chunk, groups), defer).await
    }

    async fn write_panes(
        &self,
        _: i32,
        next_offset: i64,
        groups: &[PaneGroup],
        panes: &Panes,
    ) -> Result<(), ProcessorError> {
        let ops = self.pane_ops(next_offset, groups, panes);
        self.write_or_defer(ops, self.is_active(Mutation::CommitBeforePanes)).await?;
        if self.is_active(Mutation::PanesBeforeRows) {
            let rows = std::mem::take(&mut *lock(&self.deferred));
            return self.write(rows).await;
        }
        Ok(())
    }

    async fn progress(&self, _: i32) -> Result<Option<ProgressFacts>, ProcessorError> {
        self.step().await?;
        let mut world = self.world.lock();
        let restores = world.restores;
        world.confirmed.insert(self.life, restores);
        let mut progress = progress_of(&world.progress);
        if let (Some(Mutation::RawWatermark), Some(progress)) = (world.mutation, &mut progress) {
            progress.position.seen_to = progress.position.seen_to.map(|seen_to| seen_to - LATENESS_MS);
        }
        Ok(progress)
    }

    fn outages(&self) -> u64 {
        self.outages_in(&self.world.lock())
    }

    async fn confirm(&self, _: i32, assumed: Assumed) -> Result<(), ProcessorError> {
        self.step().await?;
        self.confirm_assumed(&mut self.world.lock(), assumed)
    }

    async fn note_written(&self, _: i32, written_to: i64, assumed: Assumed) -> Result<(), ProcessorError> {
        if self.is_active(Mutation::NoteWritten) {
            return Ok(());
        }
        self.write_if(vec![self.note_op(written_to)], Some(assumed)).await
    }

    async fn skips(&self, _: i32) -> Result<Vec<Range<i64>>, ProcessorError> {
        Ok(self.world.lock().skips.clone())
    }

    async fn accepted_up_to(&self, _: i32) -> Result<i64, ProcessorError> {
        Ok(0)
    }

    async fn publish(
        &self,
        _: i32,
        position: &LogPosition,
        assumed: Assumed,
        batch: Option<&BatchRecord>,
    ) -> Result<(), ProcessorError> {
        if batch.is_none() && self.is_active(Mutation::FirstProgress) {
            return self.write_if(vec![self.note_op(position.next_offset)], Some(assumed)).await;
        }
        if batch.is_some() {
            let deferred = if self.is_active(Mutation::PanesBeforeRows) {
                Vec::new()
            } else {
                std::mem::take(&mut *lock(&self.deferred))
            };
            self.write(deferred).await?;
        }
        {
            let mut world = self.world.lock();
            // Before its first commit, a process publishes the position that it starts from.
            let committed = *world.committed.entry(self.life).or_insert(position.next_offset);
            if world.watch && committed < position.next_offset {
                world.violate("published before committed", || format!("{position:?}"));
            }
        }
        self.write_if(vec![self.progress_op(position)], Some(assumed)).await?;
        if let Some(batch) = batch {
            let second = self.world.lock().second;
            let records = position.totals.records();
            let total = if self.is_active(Mutation::RunningTotal) { batch.rows as i64 } else { records };
            let target = Target::Throughput(second);
            let cells = vec![("total", total.to_be_bytes().to_vec())];
            self.write(vec![Op { target, stamp: position.next_offset, cells }]).await?;
            lock(&self.machine).settle();
        }
        Ok(())
    }
}

impl DeadLetters for FakeServers {
    async fn send(&self, _: i32, chunk: &Chunk) -> Result<(), ProcessorError> {
        let dead = |offset| Op { target: Target::Dead(offset), stamp: 0, cells: Vec::new() };
        let ops = chunk.poison.iter().map(|poison| dead(poison.offset)).collect();
        self.write_or_defer(ops, self.is_active(Mutation::CommitBeforeDeadLetters)).await
    }
}
