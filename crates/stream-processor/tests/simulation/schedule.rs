//! Schedules decide which process runs its next step and which faults happen. They are drawn from a seed or written by
//! hand.

use super::choices::Choices;
use super::life::{Environment, Life, StartOptions, new_volume};
use super::log::{Log, Rec, definition, random};
use super::machine::{Machine, SimCheckpoint, Volume};
use super::mutations::{self, Mutation};
use super::world::{MAX_FAULTS, Shared, World};
use crate::count::partition::Totals;
use crate::count::windows::hot::MAX_COLD_PANES;
use crate::error::ProcessorError;
use crate::io::state::Checkpoint;
use crate::metrics::Metrics;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

const MACHINES: usize = 3;
const MAX_STEPS: usize = 20_000;
const MEMORY: [usize; 3] = [usize::MAX, 0, 700];
const COLD: [usize; 3] = [MAX_COLD_PANES, 0, 1];

/// Options of a run.
#[derive(Debug, Clone, Copy, Default)]
pub struct Case {
    /// The mutation of the protocol, if any.
    pub mutation: Option<Mutation>,
    /// Whether to use real state files on simulated disks instead of checkpoints in memory.
    pub on_disk: bool,
    /// Whether to keep the trace.
    pub trace: bool,
    /// Whether to check only the end state, not the state that readers see in between.
    pub end_only: bool,
}

/// The processes and machines of one partition, and their world.
pub struct Sim {
    /// Everything that the processes share.
    pub environment: Environment,
    /// The machines with their checkpoint volumes.
    pub machines: Vec<Arc<Mutex<Machine>>>,
    /// The process that owns the partition.
    pub owner: Option<Life>,
    /// Former owners that are still running.
    pub zombies: Vec<Life>,
    /// Options for the next process.
    pub start_options: StartOptions,
    lives: usize,
}

fn metrics() -> Arc<Metrics> {
    static METRICS: OnceLock<Arc<Metrics>> = OnceLock::new();
    Arc::clone(METRICS.get_or_init(|| Arc::new(Metrics::new().unwrap())))
}

impl Sim {
    /// Creates a simulation in which no process has started.
    pub fn new(records: Vec<Rec>, choices: Choices, case: Case) -> Sim {
        mutations::activate(case.mutation);
        let log = Log::new(records);
        let mut definition = definition(if log.leap().is_some() { 365 * 86_400 } else { 0 });
        definition.event.ahead_ms = log.ahead_ms();
        let mut world = World::new(log, choices, case.mutation);
        world.watch = !case.end_only;
        world.trace = case.trace.then(Vec::new);
        let log = format!("log {:?}", world.log.records);
        world.note(|| log);
        let machines = (0..MACHINES).map(|_| Arc::new(Mutex::new(Machine::new(new_volume(case.on_disk)))));
        Sim {
            environment: Environment {
                world: Shared(Arc::new(Mutex::new(world))),
                definition: Arc::new(definition),
                metrics: metrics(),
            },
            machines: machines.collect(),
            owner: None,
            zombies: Vec::new(),
            start_options: StartOptions::default(),
            lives: 0,
        }
    }

    /// Locks the world.
    pub fn world(&self) -> std::sync::MutexGuard<'_, World> {
        self.environment.world.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Locks a machine.
    pub fn machine(&self, machine: usize) -> std::sync::MutexGuard<'_, Machine> {
        self.machines[machine].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, line: impl FnOnce() -> String) {
        self.world().note(line);
    }

    /// Number of the machine on which the owner runs.
    pub fn current_machine(&self) -> usize {
        self.owner.as_ref().map_or(0, |owner| owner.machine)
    }

    /// Starts a new process on `machine`, which becomes the owner.
    pub fn start(&mut self, machine: usize) {
        // A state file cannot be open twice, so zombies on this machine are killed first.
        while let Some(at) = self.zombies.iter().position(|zombie| zombie.machine == machine) {
            self.zombies.remove(at).kill();
        }
        let disk = Arc::clone(&self.machines[machine]);
        self.owner = Some(Life::start(&self.environment, self.lives, machine, disk, self.start_options));
        self.lives += 1;
        self.start_options.replay = false;
    }

    pub(super) fn kill_zombies(&mut self) {
        self.zombies.drain(..).for_each(|mut zombie| zombie.kill());
    }

    /// Kills the owner.
    pub fn crash(&mut self) {
        self.note(|| "CRASH".into());
        if let Some(mut owner) = self.owner.take() {
            owner.kill();
        }
    }

    /// Replaces the volume of `machine` with an empty one.
    pub fn wipe(&mut self, machine: usize) {
        self.note(|| format!("the volume of machine {machine} is lost"));
        let mut machine = self.machine(machine);
        let wiped = machine.volume.wiped();
        machine.replace(wiped);
    }

    /// Starts a new owner on `machine`. The previous owner keeps running as a zombie.
    pub fn move_to(&mut self, machine: usize) {
        self.note(|| format!("MOVE to machine {machine}: the previous owner keeps running"));
        self.zombies.extend(self.owner.take());
        self.start(machine);
    }

    /// Runs all processes until all their tasks wait.
    pub fn settle(&mut self) {
        self.owner.iter_mut().for_each(Life::settle);
        self.zombies.iter_mut().for_each(Life::settle);
        self.zombies.retain(|zombie| zombie.ended.is_none());
    }

    /// Runs one waiting step of process `life`. Returns `false` if none waits.
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

    /// Runs the owner until it ends or `until` returns true. Returns `true` if the owner ended.
    pub fn run_until(&mut self, mut until: impl FnMut(&World) -> bool) -> bool {
        for _ in 0..MAX_STEPS {
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
                self.world().violate("a worker is stuck", || format!("{id}"));
                return true;
            }
        }
        true
    }

    /// Runs the owner to the end of the log, applies all delayed writes, and checks the end state.
    pub fn finish(&mut self) {
        self.run_until(|_| false);
        self.expect_end();
        self.apply_all_writes();
        let totals = self.totals();
        self.world().check_end(totals);
    }

    fn expect_end(&mut self) {
        if let Some(Err(error)) = self.owner.as_ref().and_then(|owner| owner.ended.as_ref()) {
            let shown = error.to_string();
            self.world().violate("a worker ended", || shown);
        }
    }

    fn apply_all_writes(&mut self) {
        while let Some(zombie) = self.zombies.first().map(|zombie| zombie.id) {
            let advances = self.world().choices.pick(2, 95) == 1 && self.step(zombie);
            if !advances {
                self.zombies.remove(0).kill();
            }
            self.settle();
        }
        let mut world = self.world();
        while !world.delayed.is_empty() {
            let count = world.delayed.len();
            let at = world.choices.index(count, 50);
            let op = world.delayed.remove(at);
            world.apply(&op, "takes effect late");
        }
    }

    /// Stops the owner and returns the totals in its state file.
    pub fn totals(&mut self) -> Totals {
        let machine = self.current_machine();
        // Dropping the owner closes the file.
        self.owner = None;
        let world = self.environment.world.clone();
        let opened = SimCheckpoint::open(world, usize::MAX, Arc::clone(&self.machines[machine]));
        opened.ok().and_then(|state| state.facts()).map(|facts| facts.position.totals).unwrap_or_default()
    }
}

/// The result of running a schedule.
pub struct SimulatedRun {
    /// The violated guarantee, if any.
    pub violation: Option<String>,
    /// All choices of the schedule.
    pub made: Vec<u32>,
    /// Description of everything that happened. Empty if no trace was kept.
    pub trace: Vec<String>,
    /// Number of trace lines, counted even if no trace was kept.
    pub trace_len: usize,
    /// Number of faults.
    pub faults: u32,
}

/// Runs the schedule determined by `choices`.
pub fn run(mut choices: Choices, case: Case) -> SimulatedRun {
    let records = random(&mut choices);
    let mut sim = Sim::new(records, choices, case);
    {
        let mut world = sim.world();
        world.hash_mask = [u64::MAX, 3, 0][world.choices.index(3, 30)];
    }
    sim.choose_start();
    sim.start(0);
    let done = (0..MAX_STEPS).any(|_| sim.advance());
    if !done {
        sim.world().violate("the partition does not reach the end of the log", String::new);
    }
    if sim.world().violation.is_none() {
        sim.apply_all_writes();
        let totals = sim.totals();
        sim.world().check_end(totals);
    }
    let mut world = sim.world();
    SimulatedRun {
        violation: world.violation.clone(),
        made: std::mem::take(&mut world.choices.made),
        trace: world.trace.take().unwrap_or_default(),
        trace_len: world.trace_len,
        faults: world.faults,
    }
}

impl Sim {
    fn choose_start(&mut self) {
        let mut world = self.environment.world.lock();
        let max_memory_bytes = MEMORY[world.choices.index(3, 30)];
        let max_cold = COLD[world.choices.index(3, 30)];
        self.start_options = StartOptions { max_memory_bytes, max_cold, ..self.start_options };
    }

    pub(super) fn restart(&mut self, machine: usize) {
        let is_expired = {
            let log = &self.world().log;
            log.leap().is_some_and(|leap| leap <= log.low)
        };
        if is_expired {
            // No process outlives a row.
            self.kill_zombies();
            self.world().expire();
        }
        self.choose_start();
        self.start(machine);
    }

    /// Runs one step or fault. Returns `true` at the end of the schedule.
    fn advance(&mut self) -> bool {
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
                // At a later `Quiet`, the process would detect the restored tables. A restart has the same effect.
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
                let reopens = matches!(error, ProcessorError::Reopen(_));
                if !reopens && !self.world().failing.contains(&id) {
                    self.world().violate("a worker ended", || shown);
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
        if !self.apply_action(action) && !self.step(id) {
            self.world().violate("a worker is stuck", || format!("{id}"));
        }
        false
    }

    /// Performs `action`. Returns `false` if it is a normal step or not possible now.
    fn apply_action(&mut self, action: u32) -> bool {
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
                world.apply(&op, "takes effect late");
                true
            }
            3.. => {
                let mut world = self.world();
                if world.faults >= MAX_FAULTS || world.choices.pick(2, 40) == 0 {
                    return false;
                }
                world.faults += 1;
                drop(world);
                self.apply_fault(action);
                true
            }
            _ => false,
        }
    }

    fn apply_fault(&mut self, action: u32) {
        let machine = self.current_machine();
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
                self.start_options.replay = replay;
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
                    self.note(|| format!("machine {machine} is restored from a backup"));
                } else {
                    drop(disk);
                }
                self.restart(machine);
            }
            7 => {
                self.note(|| "graceful stop".into());
                self.owner.iter().for_each(|owner| owner.stop.cancel());
            }
            8 => self.trim(),
            9 => self.recreate_topic(machine),
            11 => self.restore(machine),
            12 => self.damage(),
            _ => {
                self.crash();
                self.start_options.replay = true;
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
            self.note(|| "with a power loss".into());
            disk.power_loss(&mut u64::from(seed));
        }
    }
}
