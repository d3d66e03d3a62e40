//! Machines with checkpoint volumes, and the checkpoint of one process. A volume is either in memory or a real state
//! file on a simulated disk.

use super::disk::Disk;
use super::log::{BASE_MS, LATENESS_MS, PANE_MS};
use super::mutations::Mutation;
use super::world::{Shared, World};
use crate::count::windows::hot::Panes;
use crate::count::windows::pane::Pane;
use crate::io::state::{Checkpoint, Commit, Head, StateError, StateFile, never_finished};
use crate::pipeline::start::StateFacts;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Locks a mutex, even if it is poisoned.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The contents of a state file, in memory.
#[derive(Debug, Clone, Default)]
pub struct Image {
    head: Option<Head>,
    panes: BTreeMap<i64, Vec<u8>>,
    seen: BTreeMap<(i64, i64), Vec<u64>>,
}

/// The checkpoint volume of a machine.
#[derive(Debug)]
pub enum Volume {
    /// A state file without redb, which is fast.
    Memory(Box<Image>),
    /// A real state file on a simulated disk.
    Disk(Disk),
}

impl Volume {
    fn copy(&self) -> Volume {
        match self {
            Volume::Memory(image) => Volume::Memory(image.clone()),
            Volume::Disk(disk) => Volume::Disk(disk.copy()),
        }
    }

    /// Returns an empty volume of the same variant.
    pub fn wiped(&self) -> Volume {
        match self {
            Volume::Memory(_) => Volume::Memory(Box::default()),
            Volume::Disk(_) => Volume::Disk(Disk::default()),
        }
    }
}

/// A machine: its volume and backups of the volume.
#[derive(Debug)]
pub struct Machine {
    /// The current volume.
    pub volume: Volume,
    /// Earlier contents of the volume, oldest first.
    pub backups: Vec<Volume>,
    /// A commit that is not on the volume yet, for the mutation `PublishBeforeCommit`.
    pending: Option<Image>,
}

impl Machine {
    /// Creates a machine without backups.
    pub fn new(volume: Volume) -> Machine {
        Machine { volume, backups: Vec::new(), pending: None }
    }

    /// Replaces the volume.
    pub fn replace(&mut self, volume: Volume) {
        self.volume = volume;
        self.pending = None;
    }

    /// Moves a deferred commit to the volume.
    pub fn settle(&mut self) {
        if let Some(image) = self.pending.take() {
            self.volume = Volume::Memory(Box::new(image));
        }
    }
}

/// Opens the state file on a disk in the same way as `StateFile::open`.
pub fn open_file(disk: &Disk) -> Result<StateFile, StateError> {
    let opened = StateFile::with_backend("simulated", disk.attach());
    if opened.is_err() && never_finished(&disk.bytes()) {
        disk.clear();
        return StateFile::with_backend("simulated", disk.attach());
    }
    opened
}

/// The checkpoint that one process uses.
pub struct SimCheckpoint {
    world: Shared,
    life: usize,
    machine: Arc<Mutex<Machine>>,
    image: Image,
    file: Option<StateFile>,
}

impl SimCheckpoint {
    /// Opens the state file on the volume of `machine`.
    pub fn open(
        world: Shared,
        life: usize,
        machine: Arc<Mutex<Machine>>,
    ) -> Result<SimCheckpoint, StateError> {
        let (image, file) = match &lock(&machine).volume {
            Volume::Memory(image) => ((**image).clone(), None),
            Volume::Disk(disk) => (Image::default(), Some(open_file(disk)?)),
        };
        Ok(SimCheckpoint { world, life, machine, image, file })
    }

    fn save(&self, is_batch: bool) {
        let mut machine = lock(&self.machine);
        if machine.backups.len() < 16 {
            let backup = machine.volume.copy();
            machine.backups.push(backup);
        }
        if self.file.is_some() {
            return;
        }
        if is_batch && self.world.lock().mutation == Some(Mutation::PublishBeforeCommit) {
            machine.pending = Some(self.image.clone());
        } else {
            machine.volume = Volume::Memory(Box::new(self.image.clone()));
        }
    }

    fn change(&mut self, commit: &Commit<'_>) -> Result<(), StateError> {
        if let Some(file) = &mut self.file {
            return file.commit(commit);
        }
        let (panes, image) = (&commit.partition.panes, &mut self.image);
        if let Some(head) = &mut image.head {
            (head.hot_from, head.position) = (panes.hot_from, commit.partition.position);
        }
        for start in commit.touched {
            if let Some(hot) = panes.hot.get(start) {
                image.panes.insert(*start, hot.pane.encode());
            }
        }
        for (start, hashes) in commit.seen.iter().filter(|(start, _)| **start >= panes.hot_from) {
            image.seen.insert((*start, commit.partition.position.next_offset), hashes.clone());
        }
        for start in commit.dropped {
            image.panes.remove(start);
            image.seen.retain(|(of, _), _| of != start);
        }
        let kept = image.panes.keys().chain(image.seen.keys().map(|(start, _)| start));
        if let Some(start) = kept.into_iter().find(|start| **start < panes.hot_from) {
            return Err(broken(&format!("pane {start} is cold, but was never dropped")));
        }
        Ok(())
    }
}

/// Checks that a commit moves `hot_from` as far as its position requires, and keeps no pane below it. Otherwise the
/// file would only grow.
fn check_hot_from(world: &mut World, commit: &Commit<'_>) {
    let panes = &commit.partition.panes;
    let required = commit.partition.position.seen_to.map_or(i64::MIN, |seen_to| {
        BASE_MS + (seen_to - LATENESS_MS - BASE_MS).div_euclid(PANE_MS) * PANE_MS
    });
    if panes.hot_from < required {
        world.violate("the committed hot_from is behind its position", || {
            format!("{} < {required}", panes.hot_from)
        });
    }
    if panes.hot.keys().any(|start| *start < panes.hot_from) {
        world.violate("a pane below hot_from is still hot", || format!("{}", panes.hot_from));
    }
}

fn broken(cause: &str) -> StateError {
    StateError::Broken { file: "simulated".into(), cause: cause.into() }
}

impl Checkpoint for SimCheckpoint {
    fn facts(&self) -> Option<StateFacts> {
        if let Some(file) = &self.file {
            return file.facts();
        }
        let head = self.image.head.as_ref()?;
        let (layout, cluster_id) = (head.layout.clone(), head.cluster_id.clone());
        Some(StateFacts { position: head.position, layout, cluster_id })
    }

    fn restore(&self, panes: &mut Panes) -> Result<(), StateError> {
        if let Some(file) = &self.file {
            return file.restore(panes);
        }
        panes.hot_from = self.image.head.as_ref().map_or(i64::MIN, |head| head.hot_from);
        for (start, bytes) in &self.image.panes {
            let pane = Pane::decode(&panes.shape, bytes).ok_or_else(|| broken("a pane cannot be decoded"))?;
            panes.hot_mut(*start).1.pane = pane;
        }
        for ((start, _), hashes) in &self.image.seen {
            hashes.iter().for_each(|hash| panes.hot_mut(*start).1.seen.insert(*hash));
        }
        Ok(())
    }

    fn reset(&mut self, head: Head) -> Result<(), StateError> {
        match &mut self.file {
            Some(file) => file.reset(head)?,
            None => self.image = Image { head: Some(head), ..Image::default() },
        }
        self.save(false);
        Ok(())
    }

    fn commit(&mut self, commit: &Commit<'_>) -> Result<(), StateError> {
        let position = commit.partition.position;
        let (life, next) = (self.life, position.next_offset);
        let failure = {
            let mut world = self.world.lock();
            // A commit on top of lost history is detected when the process next reads the tables.
            if world.watch && world.has_confirmed(life) {
                world.check_written(next, "the commit");
            }
            let exact = world.log.below(next).totals;
            if world.watch && next >= position.count_from && position.totals != exact {
                world.violate("committed totals are not those of the offset", || {
                    format!("{position:?}, {exact:?}")
                });
            }
            if world.watch {
                check_hot_from(&mut world, commit);
            }
            world.steps += 1;
            if world.fail_at == Some(world.steps) { 1 } else { world.draw_fault(3, 3) }
        };
        if failure != 1 {
            self.change(commit)?;
            self.save(true);
        }
        let mut world = self.world.lock();
        if failure > 0 {
            world.failing.insert(life);
            world.note(|| {
                format!("{life}: the commit fails{}", if failure == 2 { ", but is on disk" } else { "" })
            });
            return Err(broken("injected failure"));
        }
        world.note(|| format!("{life}: commit {position:?} hot from {}", commit.partition.panes.hot_from));
        if !(world.watch && world.mutation == Some(Mutation::PublishBeforeCommit)) {
            world.committed.insert(life, next);
        }
        Ok(())
    }
}
