//! One simulated process (a "life"): the real start decision, decoder, first-record check and worker on a separate
//! runtime. The runtime is dropped when the process is killed.

use super::fakes::FakeServers;
use super::log::Rec;
use super::machine::{Machine, SimCheckpoint, Volume};
use super::mutations::Mutation;
use super::world::Shared;
use crate::count::poison_gate::PoisonLimits;
use crate::count::windows::hot::MAX_COLD_PANES;
use crate::count::windows::pane::PaneShape;
use crate::error::{Halt, ProcessorError};
use crate::io::state::Checkpoint;
use crate::io::store::Assumed;
use crate::metrics::Metrics;
use crate::pipeline::fetch::{Chunks, Fetched, FirstRecord};
use crate::pipeline::open::begin;
use crate::pipeline::start::{How, RecoverPolicy, Start, StartFacts};
use crate::pipeline::worker::PartitionWorker;
use crate::record::chunk::Chunk;
use crate::record::decode::Decoder;
use common::contracts::stream::Definition;
use common::runtime::admin::Health;
use common::runtime::presence::Holdings;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Everything that all processes of a run share.
#[derive(Clone)]
pub struct Environment {
    /// The world.
    pub world: Shared,
    /// Definition of the stream.
    pub definition: Arc<Definition>,
    /// Metrics, which are not read.
    pub metrics: Arc<Metrics>,
}

/// How a process is started.
#[derive(Debug, Clone, Copy)]
pub struct StartOptions {
    /// Whether to start with `--replay`.
    pub replay: bool,
    /// Maximum bytes for hot panes and filters.
    pub max_memory_bytes: usize,
    /// Maximum number of cold panes kept between batches.
    pub max_cold: usize,
}

impl Default for StartOptions {
    fn default() -> StartOptions {
        StartOptions { replay: false, max_memory_bytes: usize::MAX, max_cold: MAX_COLD_PANES }
    }
}

/// A running process.
pub struct Life {
    /// Number of the process.
    pub id: usize,
    /// Number of the machine it runs on.
    pub machine: usize,
    /// Requests a graceful stop.
    pub stop: CancellationToken,
    /// The result, once the process has ended.
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
        environment: &Environment,
        id: usize,
        machine: usize,
        disk: Arc<Mutex<Machine>>,
        options: StartOptions,
    ) -> Life {
        let runtime = Builder::new_current_thread().build().unwrap();
        let stop = CancellationToken::new();
        let committed = Arc::new(AtomicI64::new(0));
        let skew = [0, -1_000_000, 1_000_000][machine % 3];
        let servers = FakeServers {
            world: environment.world.clone(),
            life: id,
            who: format!("{id}@{machine}"),
            shape: PaneShape::new(&environment.definition),
            epoch: 2_000_000 + environment.world.lock().clock * 1000 + skew,
            before_write: Mutex::default(),
            deferred: Mutex::default(),
            machine: Arc::clone(&disk),
        };
        let process = Process {
            environment: environment.clone(),
            servers: Arc::new(servers),
            committed: Arc::clone(&committed),
            stop: stop.clone(),
            options,
        };
        let handle = runtime.spawn(process.run());
        let world = environment.world.clone();
        Life { id, machine, stop, ended: None, committed, disk, world, runtime: Some(runtime), handle }
    }

    /// Runs the process until all its tasks wait.
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
        let group_offset = self.committed.load(Ordering::Acquire);
        let mut world = self.world.lock();
        let committed = world.committed.get(&self.id).copied().unwrap_or(group_offset);
        if world.watch && group_offset > committed {
            world.violate("the group's offset is ahead of the commit", || {
                format!("{group_offset} > {committed}")
            });
        }
    }

    /// Kills the process like `kill -9`. Writes that it has already sent may still take effect.
    pub fn kill(&mut self) {
        if let Volume::Disk(disk) = &self.disk.lock().unwrap_or_else(PoisonError::into_inner).volume {
            disk.kill();
        }
        self.runtime = None;
        self.world.lock().remove_process(self.id);
    }
}

struct Process {
    environment: Environment,
    servers: Arc<FakeServers>,
    committed: Arc<AtomicI64>,
    stop: CancellationToken,
    options: StartOptions,
}

impl Process {
    async fn run(self) -> Result<(), ProcessorError> {
        let Environment { world, definition, metrics } = self.environment.clone();
        let machine = Arc::clone(&self.servers.machine);
        let checkpoint = SimCheckpoint::open(world.clone(), self.servers.life, machine);
        let mut state = checkpoint.map_err(|e| ProcessorError::Fatal(e.to_string()))?;
        let outages = crate::io::store::Store::outages(&*self.servers);
        let mut progress = crate::io::store::Store::progress(&*self.servers, 0).await?;
        let (low, high, mutation) = {
            let world = world.lock();
            (world.topic().low, world.topic().high(), world.mutation)
        };
        let found = state.facts();
        let stale = mutation == Some(Mutation::StaleState) && !self.options.replay;
        if let (true, Some(progress), Some(found)) = (stale, &mut progress, &found) {
            let next_offset = &mut progress.position.next_offset;
            *next_offset = (*next_offset).min(found.position.next_offset);
        }
        if let (Some(Mutation::StoreBehind | Mutation::NoteWritten), Some(progress)) =
            (mutation, &mut progress)
        {
            progress.written_to = None;
        }
        let skips = crate::io::store::Store::skips(&*self.servers, 0).await?;
        let layout = definition.layout();
        let from_zero = self.options.replay && mutation == Some(Mutation::ReplayHot);
        let facts = StartFacts {
            partition: 0,
            state: found.filter(|_| !from_zero),
            progress: progress.filter(|_| !from_zero),
            low,
            high,
            layout: &layout,
            cluster_id: "simulated",
            skips: &skips,
            recover: RecoverPolicy::Auto,
            replay: self.options.replay,
        };
        let look = |offset| Ok(Some(world.lock().found_fingerprint(offset)));
        let (start, mut partition) =
            begin(&mut state, &facts, &definition, self.options.max_memory_bytes, look)?;
        if let (Some(Mutation::AheadRecovery), Some(seen_to)) = (mutation, start.position.seen_to)
            && start.how != How::Resume
        {
            partition.panes.hot_from = partition.panes.start_after(seen_to);
        }
        partition.panes.max_cold = self.options.max_cold;
        let who = &self.servers.who;
        world.lock().note(|| format!("{who} starts: {start:?}, hot from {}", partition.panes.hot_from));
        self.committed.store(start.position.next_offset, Ordering::Release);
        world.lock().committed.insert(self.servers.life, start.position.next_offset);
        let worker = PartitionWorker {
            id: 0,
            bucket: definition.store.bucket,
            state,
            partition,
            assumed: Assumed { noted: start.written_to, outages },
            store: Arc::clone(&self.servers),
            dead_letters: Arc::clone(&self.servers),
            limits: PoisonLimits { consecutive: u32::MAX, window_poison: u32::MAX },
            health: Health::new(Duration::from_secs(60), &[]),
            holdings: Holdings::default(),
            metrics,
            committed: self.committed,
        };
        worker.run(fetch(world, self.servers.life, &definition, start), self.stop).await
    }
}

/// Starts a fetcher that decodes batches of sizes chosen by the schedule. It is at most one batch ahead of the worker.
fn fetch(world: Shared, life: usize, definition: &Definition, start: Start) -> Chunks {
    let (sender, chunks) = mpsc::channel(1);
    let decoder = Decoder::new(definition, 0);
    tokio::spawn(async move {
        let mut fetcher =
            Fetcher { world, life, decoder, first: FirstRecord::new(&start), next: start.fetch_from };
        if let Some(skip) = start.skip {
            let is_active = fetcher.world.lock().mutation == Some(Mutation::RecordSkips);
            let (first_offset, next_offset) = (skip.end, skip.end);
            let skipped = Some(skip).filter(|_| !is_active);
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
    /// Returns the next chunk, or `Quiet` at the end of the log.
    fn next(&mut self) -> Result<Fetched, ProcessorError> {
        let (mut world, life) = (self.world.lock(), self.life);
        loop {
            let (next, high) = (self.next, world.topic().high());
            if next >= high {
                return Ok(Fetched::Quiet);
            }
            if next < world.topic().low {
                // Kafka reports an offset that retention has removed as out of range.
                world.failing.insert(life);
                world.note(|| format!("{life}: offset {next} is out of range"));
                return Err(ProcessorError::Reopen("out of range".into()));
            }
            let damaged = world.topic().damaged.clone();
            if damaged.contains(&next) {
                world.failing.insert(life);
                world.note(|| format!("{life}: offset {next} cannot be read"));
                let halt = Halt { partition: 0, offset: next, cause: "damaged".into(), readable_from: None };
                return Err(halt.into());
            }
            let is_marker = matches!(world.topic().records[next as usize], Rec::Marker);
            let admitted = if is_marker {
                self.first.passed(0, next + 1).map(|()| next >= self.first.next_offset())
            } else {
                self.first.admit(0, next, || world.found_fingerprint(next))
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

/// Masks the hashes so that they collide, and applies the mutations `IdOnly` and `CopiesInOneBatch`.
fn change_keys(chunk: &mut Chunk, hash_mask: u64, mutation: Option<Mutation>) {
    for index in 0..chunk.events.len() {
        let id = chunk.id(&chunk.events[index]).to_vec();
        let event = &mut chunk.events[index];
        if mutation == Some(Mutation::IdOnly) {
            event.hash = common::contracts::event::seen_hash(0, &id);
        }
        event.hash &= hash_mask;
        if mutation == Some(Mutation::CopiesInOneBatch) {
            // A mark makes the id of each copy unique. The tables store the id without it.
            let marked = [id, vec![1; index]].concat();
            event.id = (chunk.arena.len() as u32, marked.len() as u32);
            chunk.arena.extend_from_slice(&marked);
        }
    }
}

/// Creates an empty volume, either in memory or for a real state file on a simulated disk.
pub fn new_volume(on_disk: bool) -> Volume {
    if on_disk { Volume::Disk(super::disk::Disk::default()) } else { Volume::Memory(Box::default()) }
}
