//! Faults of the servers: restored snapshots, damaged offsets, recreated topics, and retention.

use super::choices::Choices;
use super::log::{Log, event};
use super::schedule::{Case, Sim};
use super::world::{Tables, Target, World, number, position_of, progress_of};
use crate::error::ProcessorError;

impl World {
    /// Takes a snapshot of the tables.
    pub fn take_snapshot(&mut self) {
        if self.snapshots.len() < 16 {
            self.snapshots.push(Tables {
                rows: self.rows.clone(),
                panes: self.panes.clone(),
                progress: self.progress.clone(),
                throughput: self.throughput.clone(),
            });
        }
    }

    /// Restores a snapshot of the tables and drops all writes in flight. Returns `false` if no snapshot is recent
    /// enough to be brought up to date from the log.
    pub fn restore_snapshot(&mut self) -> bool {
        let low = self.log.low;
        let usable = |tables: &Tables| low == 0 || number(&tables.progress, "next_offset") >= Some(low);
        let usable: Vec<usize> =
            (0..self.snapshots.len()).filter(|at| usable(&self.snapshots[*at])).collect();
        if usable.is_empty() {
            return false;
        }
        let at = usable[usable.len() - 1 - self.choices.index(usable.len(), 60)];
        let Tables { rows, panes, progress, throughput } = self.snapshots[at].clone();
        (self.rows, self.panes, self.progress, self.throughput) = (rows, panes, progress, throughput);
        self.snapshots.truncate(at + 1);
        if let Some(before) = self.expired_before {
            self.rows.retain(|(at, _), _| *at >= before);
        }
        self.delayed.retain(|op| matches!(op.target, Target::Dead(_)));
        self.restores += 1;
        let shown = position_of(&self.progress).next_offset;
        self.note(|| format!("the tables are restored to a snapshot with next offset {shown}"));
        true
    }
}

impl Sim {
    /// An operator marks some or all of the damaged offsets to be skipped, or does nothing.
    pub(super) fn skip_or_try_again(&mut self, offset: i64) {
        let mut world = self.world();
        let end = world.log.damaged.end;
        let skipped = match world.choices.pick(3, 40) {
            0 => end,
            1 => offset + 1,
            _ => return,
        };
        world.note(|| format!("an operator marks offsets {offset} to {skipped} to be skipped"));
        world.skips.push(offset..skipped);
    }

    /// Restores an older snapshot of the tables, either while processes run or after they were killed.
    pub(super) fn restore(&mut self, machine: usize) {
        let is_stopped = self.world().choices.pick(2, 50) == 1;
        if is_stopped {
            self.crash();
            self.kill_zombies();
        }
        self.world().restore_snapshot();
        if is_stopped {
            self.restart(machine);
        }
    }

    /// Damages a range of offsets that no process has fetched yet.
    pub(super) fn damage(&mut self) {
        let mut world = self.world();
        let (from, high) = (world.fetched_to, world.log.high());
        if world.log.damaged.is_empty() && from < high {
            let start = from + i64::from(world.choices.pick((high - from) as u32, 50));
            let end = start + 1 + i64::from(world.choices.pick((high - start) as u32, 50));
            world.log.damage(start..end);
            world.note(|| format!("offsets {start} to {end} are damaged"));
        }
    }

    /// Recreates the topic with the same number of records until a process refuses it. No record of it may be
    /// processed.
    pub(super) fn recreate_topic(&mut self, machine: usize) {
        self.crash();
        self.kill_zombies();
        if self.world().choices.pick(2, 50) == 1 {
            self.wipe(machine);
        }
        let is_known = {
            let progress = progress_of(&self.world().progress);
            progress.is_some_and(|progress| progress.position.last_record.is_some())
        };
        if is_known {
            self.start_on_recreated_topic(machine);
        }
        self.restart(machine);
    }

    /// Starts a process on the recreated topic and checks that it refuses the topic without any write.
    fn start_on_recreated_topic(&mut self, machine: usize) {
        let written = |world: &World| (world.rows.clone(), world.panes.clone(), world.dead.clone());
        let (before, replay) = {
            let mut world = self.world();
            world.note(|| "the topic is recreated".into());
            world.replacement = Some(Log { broker: 77, ..Log::new(world.log.records.clone()) });
            (written(&world), world.choices.pick(2, 30) == 1)
        };
        self.start_options.replay = replay;
        self.start(machine);
        self.run_until(|_| false);
        let ended = self.owner.take().and_then(|owner| Some((owner.id, owner.ended?)));
        let mut world = self.world();
        let is_refused = ended.is_some_and(|(id, ended)| {
            ended.is_err_and(|error| error.exit_code() == 3 || world.failing.contains(&id))
        });
        if !is_refused || written(&world) != before {
            world.violate("a recreated topic is not refused at once", String::new);
        }
        world.replacement = None;
    }

    /// Removes records below the next offset of the progress row, as retention does.
    pub(super) fn trim(&mut self) {
        let mut world = self.world();
        let Some(progress) = progress_of(&world.progress) else { return };
        let passed = progress.position.next_offset;
        let low = world.log.low.max(i64::from(world.choices.pick(passed as u32 + 1, 40)));
        world.log.low = low;
        world.note(|| format!("the log starts at {low}"));
    }
}

#[test]
fn a_snapshot_restored_while_cassandra_stays_up_is_detected_before_written_to_is_stored() {
    let records = [event(0, 1), event(1, 2), event(2, 3)];
    let mut sim = Sim::new(records.to_vec(), Choices::given(&[]), Case::default());
    {
        let mut world = sim.world();
        world.batches = Some(vec![1, 1, 1]);
        // A batch in progress writes on top of the snapshot, so only the end state is checked.
        world.watch = false;
        world.take_snapshot();
    }
    sim.start(0);
    sim.run_until(|world| number(&world.progress, "next_offset") == Some(1));
    {
        let mut world = sim.world();
        world.restore_snapshot();
        world.restores = 0;
    }
    sim.run_until(|_| false);
    let ended = sim.owner.take().and_then(|owner| owner.ended);
    assert!(matches!(ended, Some(Err(ProcessorError::Reopen(_)))), "{ended:?}");
    assert_eq!(number(&sim.world().progress, "written_to"), None);
    sim.start(0);
    sim.finish();
    assert_eq!(sim.world().violation, None);
}
