//! One process of the processor: the real start decision, decoder, first-record check and worker on a runtime of its own,
//! which is dropped when the process is killed.

use super::fakes::Outside;
use super::log::Rec;
use super::machine::{Machine, SimCheckpoint, Volume};
use super::mutations::Mutation;
use super::world::Shared;
use crate::chunk::Chunk;
use crate::decode::Decoder;
use crate::error::{Halt, ProcessorError};
use crate::fetch::FirstRecord;
use crate::metrics::Metrics;
use crate::open::begin;
use crate::poison_gate::PoisonLimits;
use crate::start::{Facts, RecoverPolicy, Start};
use crate::state::Checkpoint;
use crate::store::Assumed;
use crate::windows::hot::COLD_PANES_MOST;
use crate::windows::pane::PaneShape;
use crate::worker::{Chunks, Fetched, Worker};
use common::admin::Health;
use common::presence::Holdings;
use common::stream::Definition;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// What every process of a run shares.
#[derive(Clone)]
pub struct Setting {
    /// The world.
    pub world: Shared,
    /// The stream.
    pub definition: Arc<Definition>,
    /// Metrics; nobody reads them.
    pub metrics: Arc<Metrics>,
}

/// How a process is started.
#[derive(Debug, Clone, Copy)]
pub struct StartWith {
    /// `--replay`.
    pub replay: bool,
    /// Bytes of panes and filters.
    pub memory_most: usize,
    /// Cold panes kept between batches.
    pub cold_most: usize,
}

impl Default for StartWith {
    fn default() -> StartWith {
        StartWith { replay: false, memory_most: usize::MAX, cold_most: COLD_PANES_MOST }
    }
}

/// A running process.
pub struct Life {
    /// Its number.
    pub id: usize,
    /// The machine it runs on.
    pub machine: usize,
    /// Asks it to stop.
    pub stop: CancellationToken,
    /// How it ended, once it has.
    pub ended: Option<Result<(), ProcessorError>>,
    committed: Arc<AtomicI64>,
    disk: Arc<Mutex<Machine>>,
    world: Shared,
    runtime: Option<Runtime>,
    handle: JoinHandle<Result<(), ProcessorError>>,
}

impl Life {
    /// Starts process `id` on machine number `machine`.
    pub fn start(
        setting: &Setting,
        id: usize,
        (machine, disk): (usize, Arc<Mutex<Machine>>),
        with: StartWith,
    ) -> Life {
        let runtime = Builder::new_current_thread().build().unwrap();
        let stop = CancellationToken::new();
        let committed = Arc::new(AtomicI64::new(0));
        let skew = [0, -1_000_000, 1_000_000][machine % 3];
        let outside = Outside {
            world: setting.world.clone(),
            life: id,
            who: format!("{id}@{machine}"),
            shape: PaneShape::new(&setting.definition),
            epoch: 2_000_000 + setting.world.lock().clock * 1000 + skew,
            before_write: Mutex::default(),
            put_off: Mutex::default(),
            machine: Arc::clone(&disk),
        };
        let process = Process {
            setting: setting.clone(),
            outside: Arc::new(outside),
            committed: Arc::clone(&committed),
            stop: stop.clone(),
            with,
        };
        let handle = runtime.spawn(process.run());
        let world = setting.world.clone();
        Life { id, machine, stop, ended: None, committed, disk, world, runtime: Some(runtime), handle }
    }

    /// Lets it run until every task of it waits.
    pub fn settle(&mut self) {
        let Some(runtime) = &self.runtime else { return };
        runtime.block_on(async {
            for _ in 0..3 {
                tokio::task::yield_now().await;
            }
        });
        if self.handle.is_finished() && self.ended.is_none() {
            let ended = runtime.block_on(&mut self.handle);
            let ended = ended.unwrap_or_else(|e| Err(ProcessorError::Fatal(format!("panicked: {e}"))));
            self.ended = Some(ended);
        }
        let told = self.committed.load(Ordering::Acquire);
        let mut world = self.world.lock();
        let committed = world.committed.get(&self.id).copied().unwrap_or(told);
        if world.watch && told > committed {
            world.bad("the group's offset is ahead of the commit", || format!("{told} > {committed}"));
        }
    }

    /// `kill -9`: nothing of it goes on, but what it has sent may still land.
    pub fn kill(&mut self) {
        if let Volume::Disk(disk) = &self.disk.lock().unwrap_or_else(PoisonError::into_inner).volume {
            disk.kill();
        }
        self.runtime = None;
        self.world.lock().died(self.id);
    }
}

struct Process {
    setting: Setting,
    outside: Arc<Outside>,
    committed: Arc<AtomicI64>,
    stop: CancellationToken,
    with: StartWith,
}

impl Process {
    async fn run(self) -> Result<(), ProcessorError> {
        let Setting { world, definition, metrics } = self.setting.clone();
        let machine = Arc::clone(&self.outside.machine);
        let checkpoint = SimCheckpoint::open(world.clone(), self.outside.life, machine);
        let mut state = checkpoint.map_err(|e| ProcessorError::Fatal(e.to_string()))?;
        let outages = crate::store::Store::outages(&*self.outside);
        let mut progress = crate::store::Store::progress(&*self.outside, 0).await?;
        let (low, high, mutation) = {
            let world = world.lock();
            (world.topic().low, world.topic().high(), world.mutation)
        };
        let found = state.facts();
        let stale = mutation == Some(Mutation::StaleState) && !self.with.replay;
        if let (true, Some(progress), Some(found)) = (stale, &mut progress, &found) {
            let next_offset = &mut progress.position.next_offset;
            *next_offset = (*next_offset).min(found.position.next_offset);
        }
        if let (Some(Mutation::StoreBehind | Mutation::NoteWritten), Some(progress)) =
            (mutation, &mut progress)
        {
            progress.written_to = None;
        }
        let skips = crate::store::Store::skips(&*self.outside, 0).await?;
        let layout = definition.layout();
        let from_zero = self.with.replay && mutation == Some(Mutation::ReplayHot);
        let facts = Facts {
            partition: 0,
            state: found.filter(|_| !from_zero),
            progress: progress.filter(|_| !from_zero),
            low,
            high,
            layout: &layout,
            cluster_id: "simulated",
            skips: &skips,
            recover: RecoverPolicy::Auto,
            replay: self.with.replay,
        };
        let look = |offset| Ok(Some(world.lock().compared(offset)));
        let (start, mut partition) = begin(&mut state, &facts, &definition, self.with.memory_most, look)?;
        partition.panes.cold_most = self.with.cold_most;
        let who = &self.outside.who;
        world.lock().say(|| format!("{who} starts: {start:?}, hot from {}", partition.panes.hot_from));
        self.committed.store(start.position.next_offset, Ordering::Release);
        world.lock().committed.insert(self.outside.life, start.position.next_offset);
        let worker = Worker {
            id: 0,
            bucket: definition.store.bucket,
            state,
            partition,
            assumed: Assumed { noted: start.written_to, outages },
            store: Arc::clone(&self.outside),
            dead_letters: Arc::clone(&self.outside),
            limits: PoisonLimits { consecutive: u32::MAX, window_poison: u32::MAX },
            health: Health::new(Duration::from_secs(60), &[]),
            holdings: Holdings::default(),
            metrics,
            committed: self.committed,
        };
        worker.run(fetch(world, self.outside.life, &definition, start), self.stop).await
    }
}

/// Decodes batches of a size the schedule chooses, at most one ahead.
fn fetch(world: Shared, life: usize, definition: &Definition, start: Start) -> Chunks {
    let (sender, chunks) = mpsc::channel(1);
    let decoder = Decoder::new(definition, 0);
    tokio::spawn(async move {
        let mut fetcher =
            Fetcher { world, life, decoder, first: FirstRecord::new(&start), next: start.fetch_from };
        if let Some(skip) = start.skip {
            let is_out = fetcher.world.lock().mutation == Some(Mutation::RecordSkips);
            let (first_offset, next_offset) = (skip.end, skip.end);
            let skipped = Some(skip).filter(|_| !is_out);
            let chunk = Chunk { first_offset, next_offset, skipped, ..fetcher.decoder.chunk() };
            if sender.send(Ok(Fetched::Chunk(Box::new(chunk)))).await.is_err() {
                return;
            }
        }
        loop {
            let fetched = fetcher.next();
            let is_last = !matches!(fetched, Ok(Fetched::Chunk(_)));
            if sender.send(fetched).await.is_err() || is_last {
                return;
            }
        }
    });
    chunks
}

struct Fetcher {
    world: Shared,
    life: usize,
    decoder: Decoder,
    first: FirstRecord,
    next: i64,
}

impl Fetcher {
    /// The next chunk; quiet at the end of the log.
    fn next(&mut self) -> Result<Fetched, ProcessorError> {
        let (mut world, life) = (self.world.lock(), self.life);
        loop {
            let (next, high) = (self.next, world.topic().high());
            if next >= high {
                return Ok(Fetched::Quiet);
            }
            if next < world.topic().low {
                // What Kafka says of an offset that retention has removed.
                world.failing.insert(life);
                world.say(|| format!("{life}: offset {next} is out of range"));
                return Err(ProcessorError::Reopen("out of range".into()));
            }
            let damaged = world.topic().damaged.clone();
            if damaged.contains(&next) {
                world.failing.insert(life);
                world.say(|| format!("{life}: offset {next} cannot be read"));
                let halt = Halt { partition: 0, offset: next, cause: "damaged".into(), readable_from: None };
                return Err(halt.into());
            }
            let is_marker = matches!(world.topic().records[next as usize], Rec::Marker);
            let admitted = if is_marker {
                self.first.passed(0, next + 1).map(|()| next >= self.first.next_offset())
            } else {
                self.first.admit(0, next, || world.compared(next))
            };
            if !admitted? {
                self.next += 1;
                continue;
            }
            let size = match &mut world.batches {
                Some(sizes) if sizes.is_empty() => high,
                Some(sizes) => sizes.remove(0),
                None => 1 + i64::from(world.choices.pick(5, 65)),
            };
            let readable = if damaged.start > next { damaged.start } else { high };
            let end = (next + size).min(high).min(readable);
            world.fetched_to = world.fetched_to.max(end);
            let mut chunk = world.topic().chunk(&self.decoder, next..end);
            change_keys(&mut chunk, world.hash_mask, world.mutation);
            self.next = end;
            return Ok(Fetched::Chunk(Box::new(chunk)));
        }
    }
}

/// Lets hashes collide; and takes out what recognises copies, where that is to be shown.
fn change_keys(chunk: &mut Chunk, hash_mask: u64, mutation: Option<Mutation>) {
    for index in 0..chunk.events.len() {
        let id = chunk.id(&chunk.events[index]).to_vec();
        let event = &mut chunk.events[index];
        if mutation == Some(Mutation::IdOnly) {
            event.hash = common::event::seen_hash(0, &id);
        }
        event.hash &= hash_mask;
        if mutation == Some(Mutation::CopiesInOneBatch) {
            // Each copy gets an id of its own, which the tables do not see.
            let marked = [id, vec![1; index]].concat();
            event.id = (chunk.arena.len() as u32, marked.len() as u32);
            chunk.arena.extend_from_slice(&marked);
        }
    }
}

/// A new machine's volume: in memory, or a real state file on a simulated disk that is as new.
pub fn new_volume(on_disk: bool) -> Volume {
    if on_disk { Volume::Disk(super::disk::Disk::default()) } else { Volume::Memory(Box::default()) }
}
