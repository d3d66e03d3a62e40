//! Schedules: who moves next and what goes wrong, drawn from a seed or written by hand.

use super::choices::Choices;
use super::life::{Life, Setting, StartWith, new_volume};
use super::log::{Log, Rec, definition, random};
use super::machine::{Machine, SimCheckpoint, Volume};
use super::mutations::{self, Mutation};
use super::world::{FAULTS_MOST, Shared, World};
use crate::error::ProcessorError;
use crate::metrics::Metrics;
use crate::partition::Totals;
use crate::state::Checkpoint;
use crate::windows::hot::COLD_PANES_MOST;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

const MACHINES: usize = 3;
const STEPS_MOST: usize = 20_000;
const MEMORY: [usize; 3] = [usize::MAX, 0, 700];
const COLD: [usize; 3] = [COLD_PANES_MOST, 0, 1];

/// What sort of run it is.
#[derive(Debug, Clone, Copy, Default)]
pub struct Case {
    /// The repair that is taken out.
    pub mutation: Option<Mutation>,
    /// Real state files on simulated disks, rather than in memory.
    pub on_disk: bool,
    /// Whether the story is kept.
    pub story: bool,
    /// Whether only the end is judged, not what a reader sees on the way.
    pub end_only: bool,
}

/// A partition's processes and machines in their world.
pub struct Sim {
    /// What they share.
    pub setting: Setting,
    /// Checkpoint volumes.
    pub machines: Vec<Arc<Mutex<Machine>>>,
    /// Who has the partition.
    pub owner: Option<Life>,
    /// Who had it and goes on.
    pub zombies: Vec<Life>,
    /// How the next process is started.
    pub with: StartWith,
    lives: usize,
}

fn metrics() -> Arc<Metrics> {
    static METRICS: OnceLock<Arc<Metrics>> = OnceLock::new();
    Arc::clone(METRICS.get_or_init(|| Arc::new(Metrics::new().unwrap())))
}

impl Sim {
    /// Nobody has started yet.
    pub fn new(records: Vec<Rec>, choices: Choices, case: Case) -> Sim {
        mutations::take_out(case.mutation);
        let log = Log::new(records);
        let ttl_seconds = if log.leap().is_some() { 365 * 86_400 } else { 0 };
        let mut world = World::new(log, choices, case.mutation);
        world.watch = !case.end_only;
        world.story = case.story.then(Vec::new);
        let log = format!("log {:?}", world.log.records);
        world.say(|| log);
        let machines = (0..MACHINES).map(|_| Arc::new(Mutex::new(Machine::new(new_volume(case.on_disk)))));
        Sim {
            setting: Setting {
                world: Shared(Arc::new(Mutex::new(world))),
                definition: Arc::new(definition(ttl_seconds)),
                metrics: metrics(),
            },
            machines: machines.collect(),
            owner: None,
            zombies: Vec::new(),
            with: StartWith::default(),
            lives: 0,
        }
    }

    /// The world.
    pub fn world(&self) -> std::sync::MutexGuard<'_, World> {
        self.setting.world.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A machine.
    pub fn machine(&self, machine: usize) -> std::sync::MutexGuard<'_, Machine> {
        self.machines[machine].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn say(&self, line: impl FnOnce() -> String) {
        self.world().say(line);
    }

    /// The machine the partition is on.
    pub fn place(&self) -> usize {
        self.owner.as_ref().map_or(0, |owner| owner.machine)
    }

    /// A new process on `machine` takes the partition.
    pub fn start(&mut self, machine: usize) {
        // A state file is never open twice: a zombie there must be dead first.
        while let Some(at) = self.zombies.iter().position(|zombie| zombie.machine == machine) {
            self.zombies.remove(at).kill();
        }
        let disk = (machine, Arc::clone(&self.machines[machine]));
        self.owner = Some(Life::start(&self.setting, self.lives, disk, self.with));
        self.lives += 1;
        self.with.replay = false;
    }

    pub(super) fn kill_zombies(&mut self) {
        self.zombies.drain(..).for_each(|mut zombie| zombie.kill());
    }

    /// `kill -9` of the owner.
    pub fn crash(&mut self) {
        self.say(|| "CRASH".into());
        if let Some(mut owner) = self.owner.take() {
            owner.kill();
        }
    }

    /// The volume of `machine` is empty.
    pub fn wipe(&mut self, machine: usize) {
        self.say(|| format!("the volume of machine {machine} is lost"));
        let mut machine = self.machine(machine);
        let wiped = machine.volume.wiped();
        machine.replace(wiped);
    }

    /// The owner goes on, but no longer owns.
    pub fn move_to(&mut self, machine: usize) {
        self.say(|| format!("MOVE to machine {machine}: the old owner goes on"));
        self.zombies.extend(self.owner.take());
        self.start(machine);
    }

    /// Lets everybody run until all wait.
    pub fn settle(&mut self) {
        self.owner.iter_mut().for_each(Life::settle);
        self.zombies.iter_mut().for_each(Life::settle);
        self.zombies.retain(|zombie| zombie.ended.is_none());
    }

    /// Lets one waiting step of `life` through; false where none waits.
    pub fn step(&mut self, life: usize) -> bool {
        let mut world = self.world();
        let own: Vec<usize> =
            world.gates.iter().enumerate().filter(|(_, gate)| gate.life == life).map(|(at, _)| at).collect();
        if own.is_empty() {
            return false;
        }
        let chosen = world.choices.index(own.len(), 40);
        world.open(own[chosen]);
        true
    }

    /// Lets the owner go on until it ends, or `until` says so; true where it ended.
    pub fn run_until(&mut self, mut until: impl FnMut(&World) -> bool) -> bool {
        for _ in 0..STEPS_MOST {
            self.settle();
            let Some(owner) = &self.owner else { return true };
            if owner.ended.is_some() {
                return true;
            }
            if until(&self.world()) {
                return false;
            }
            let id = owner.id;
            if !self.step(id) {
                self.world().bad("a worker is stuck", || format!("{id}"));
                return true;
            }
        }
        true
    }

    /// Runs the owner to its end, lets what is late land, and compares everything.
    pub fn finish(&mut self) {
        self.run_until(|_| false);
        self.expect_end();
        self.land_everything();
        let totals = self.totals();
        self.world().check_end(totals);
    }

    fn expect_end(&mut self) {
        if let Some(Err(error)) = self.owner.as_ref().and_then(|owner| owner.ended.as_ref()) {
            let shown = error.to_string();
            self.world().bad("a worker ended", || shown);
        }
    }

    fn land_everything(&mut self) {
        while let Some(zombie) = self.zombies.first().map(|zombie| zombie.id) {
            let goes_on = self.world().choices.pick(2, 95) == 1 && self.step(zombie);
            if !goes_on {
                self.zombies.remove(0).kill();
            }
            self.settle();
        }
        let mut world = self.world();
        while !world.delayed.is_empty() {
            let count = world.delayed.len();
            let at = world.choices.index(count, 50);
            let op = world.delayed.remove(at);
            world.land(&op, "lands late");
        }
    }

    /// The totals in the owner's state file.
    pub fn totals(&mut self) -> Totals {
        let machine = self.place();
        // Closes the file.
        self.owner = None;
        let world = self.setting.world.clone();
        let opened = SimCheckpoint::open(world, usize::MAX, Arc::clone(&self.machines[machine]));
        opened.ok().and_then(|state| state.facts()).map(|facts| facts.position.totals).unwrap_or_default()
    }
}

/// What came of a schedule.
pub struct Run {
    /// The promise that was broken.
    pub violation: Option<String>,
    /// Its choices.
    pub made: Vec<u32>,
    /// What happened.
    pub story: Vec<String>,
    /// Lines the story has, or would have.
    pub moments: usize,
    /// Faults in it.
    pub faults: u32,
}

/// Carries out the schedule that `choices` come to.
pub fn run(mut choices: Choices, case: Case) -> Run {
    let records = random(&mut choices);
    let mut sim = Sim::new(records, choices, case);
    {
        let mut world = sim.world();
        world.hash_mask = [u64::MAX, 3, 0][world.choices.index(3, 30)];
    }
    sim.choose_start();
    sim.start(0);
    let done = (0..STEPS_MOST).any(|_| sim.act());
    if !done {
        sim.world().bad("the partition does not come to its end", String::new);
    }
    if sim.world().violation.is_none() {
        sim.land_everything();
        let totals = sim.totals();
        sim.world().check_end(totals);
    }
    let mut world = sim.world();
    Run {
        violation: world.violation.clone(),
        made: std::mem::take(&mut world.choices.made),
        story: world.story.take().unwrap_or_default(),
        moments: world.moments,
        faults: world.faults,
    }
}

impl Sim {
    fn choose_start(&mut self) {
        let mut world = self.setting.world.lock();
        let memory_most = MEMORY[world.choices.index(3, 30)];
        let cold_most = COLD[world.choices.index(3, 30)];
        self.with = StartWith { memory_most, cold_most, ..self.with };
    }

    pub(super) fn restart(&mut self, machine: usize) {
        let is_expired = {
            let log = &self.world().log;
            log.leap().is_some_and(|leap| leap <= log.low)
        };
        if is_expired {
            // Nobody lives as long as a row.
            self.kill_zombies();
            self.world().expire();
        }
        self.choose_start();
        self.start(machine);
    }

    /// One move; true at the end.
    fn act(&mut self) -> bool {
        self.settle();
        if self.world().violation.is_some() {
            return true;
        }
        let Some(owner) = &self.owner else { return true };
        let (id, machine) = (owner.id, owner.machine);
        let at_the_end = {
            let world = self.world();
            world.committed.get(&id) == Some(&world.log.high())
        };
        match &owner.ended {
            Some(Ok(())) if at_the_end && self.world().has_confirmed(id) => return true,
            Some(Ok(())) if at_the_end => {
                // Told again later that the log is quiet, it would find that the tables went back.
                self.crash();
                self.restart(machine);
                return false;
            }
            Some(Ok(())) => {
                let next = self.world().choices.index(MACHINES, 60);
                self.owner = None;
                self.restart((machine + next) % MACHINES);
                return false;
            }
            Some(Err(error)) => {
                let shown = error.to_string();
                let opens_again = matches!(error, ProcessorError::Reopen(_));
                if !opens_again && !self.world().failing.contains(&id) {
                    self.world().bad("a worker ended", || shown);
                    return true;
                }
                if let ProcessorError::Halted(halt) = error {
                    let offset = halt.offset;
                    self.skip_or_try_again(offset);
                }
                self.crash();
                self.restart(machine);
                return false;
            }
            None => {}
        }
        if self.world().choices.pick(2, 8) == 1 {
            self.world().take_snapshot();
        }
        let action = self.world().choices.pick(13, 35);
        if !self.strike(action) && !self.step(id) {
            self.world().bad("a worker is stuck", || format!("{id}"));
        }
        false
    }

    /// Does what `action` says; false where it does not apply.
    fn strike(&mut self, action: u32) -> bool {
        match action {
            1 => {
                let count = self.zombies.len();
                if count == 0 {
                    return false;
                }
                let zombie = self.zombies[self.world().choices.index(count, 50)].id;
                self.step(zombie);
                true
            }
            2 => {
                let mut world = self.world();
                if world.delayed.is_empty() {
                    return false;
                }
                let count = world.delayed.len();
                let at = world.choices.index(count, 50);
                let op = world.delayed.remove(at);
                world.land(&op, "lands late");
                true
            }
            3.. => {
                let mut world = self.world();
                if world.faults >= FAULTS_MOST || world.choices.pick(2, 40) == 0 {
                    return false;
                }
                world.faults += 1;
                drop(world);
                self.disaster(action);
                true
            }
            _ => false,
        }
    }

    fn disaster(&mut self, action: u32) {
        let machine = self.place();
        match action {
            3 => {
                self.crash();
                self.lose_power(machine);
                self.restart(machine);
            }
            4 => {
                self.crash();
                self.wipe(machine);
                let replay = self.world().choices.pick(2, 50) == 1;
                self.with.replay = replay;
                self.trim();
                self.restart(machine);
            }
            5 => {
                let to = (machine + 1 + self.world().choices.index(MACHINES - 1, 40)) % MACHINES;
                self.choose_start();
                self.move_to(to);
            }
            6 => {
                self.crash();
                let mut disk = self.machine(machine);
                if !disk.backups.is_empty() {
                    let count = disk.backups.len();
                    let at = count - 1 - self.world().choices.index(count, 60);
                    let backup = disk.backups.remove(at);
                    disk.replace(backup);
                    drop(disk);
                    self.say(|| format!("machine {machine} gets back an old state"));
                } else {
                    drop(disk);
                }
                self.restart(machine);
            }
            7 => {
                self.say(|| "asked to stop".into());
                self.owner.iter().for_each(|owner| owner.stop.cancel());
            }
            8 => self.trim(),
            9 => self.recreate_topic(machine),
            11 => self.restore(machine),
            12 => self.damage(),
            _ => {
                self.crash();
                self.with.replay = true;
                self.restart(machine);
            }
        }
    }

    fn lose_power(&mut self, machine: usize) {
        let disk = match &self.machine(machine).volume {
            Volume::Disk(disk) => disk.clone(),
            Volume::Memory(_) => return,
        };
        let seed = self.world().choices.pick(1000, 50);
        if seed > 0 {
            self.say(|| "and the power fails".into());
            disk.power_loss(&mut u64::from(seed));
        }
    }
}
