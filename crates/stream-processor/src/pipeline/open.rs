//! Opens one partition: reads the facts (state file, progress row, log), lets `start` decide, and creates or restores
//! the state. Blocking; fetching starts afterwards.

use crate::count::partition::Partition;
use crate::count::windows::hot::Panes;
use crate::count::windows::pane::PaneShape;
use crate::error::ProcessorError;
use crate::io::log_reader::LogReader;
use crate::io::state::{self, Checkpoint, FORMAT, Head, StateError, StateFile};
use crate::io::store::{Assumed, Store};
use crate::metrics::Metrics;
use crate::pipeline::fetch::fingerprint_of;
use crate::pipeline::start::{self, How, ProgressFacts, RecoverPolicy, Start, StartFacts};
use crate::record::chunk::LastRecord;
use common::contracts::stream::Definition;
use common::runtime::admin::Health;
use common::runtime::kafka::Replaced;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::Message;
use std::collections::BTreeSet;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

/// Interval between attempts while another process holds the state file or a server does not answer.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);
const WATERMARK_DEADLINE: Duration = Duration::from_secs(5);

/// Opens the partitions of this instance. Holds what they share.
pub struct Opener<S> {
    /// Stream definition.
    pub definition: Arc<Definition>,
    /// Bootstrap servers.
    pub brokers: String,
    /// Client outside the consumer group that reads the log's first and last offsets.
    pub probe: Arc<Replaced<BaseConsumer>>,
    /// Events topic.
    pub topic: String,
    /// Number of partitions that the stream was registered with.
    pub partitions: i32,
    /// Id of the Kafka cluster.
    pub cluster_id: String,
    /// Folder of the state files.
    pub checkpoints: PathBuf,
    /// Description of this process, written next to each state file for other processes that find the file locked.
    pub holder: String,
    /// What to do without a usable state file.
    pub recover: RecoverPolicy,
    /// Which partitions still have to be replayed.
    pub replays: Replays,
    /// Maximum memory for the panes and filters of one partition.
    pub max_memory_bytes: usize,
    /// How long another process may hold a state file before this instance is not ready.
    pub held_deadline: Duration,
    /// Store in Cassandra.
    pub store: Arc<S>,
    /// Metrics.
    pub metrics: Arc<Metrics>,
    /// Readiness.
    pub health: Arc<Health>,
}

/// The replays of `--replay`. Each partition is replayed once per process, so that a rebalance does not restart its
/// replay.
#[derive(Debug)]
pub struct Replays {
    requested: bool,
    started: Mutex<BTreeSet<i32>>,
}

impl Replays {
    /// `requested` is the value of `--replay`.
    pub fn new(requested: bool) -> Replays {
        Replays { requested, started: Mutex::default() }
    }

    fn is_due(&self, partition: i32) -> bool {
        self.requested && !self.started.lock().unwrap_or_else(PoisonError::into_inner).contains(&partition)
    }

    /// Marks the replay of `partition` as started. Its state file now records the replay's progress.
    fn mark_started(&self, partition: i32) {
        self.started.lock().unwrap_or_else(PoisonError::into_inner).insert(partition);
    }
}

/// A partition ready to be fetched.
pub struct Opened {
    /// Kafka partition.
    pub partition_id: i32,
    /// Where it starts.
    pub start: Start,
    /// What Cassandra held when the partition was opened.
    pub assumed: Assumed,
    /// State file.
    pub state: StateFile,
    /// State in memory.
    pub partition: Partition,
}

/// What Cassandra holds about a partition.
struct StoredFacts {
    outages: u64,
    progress: Option<ProgressFacts>,
    skips: Vec<Range<i64>>,
}

impl<S: Store> Opener<S> {
    /// Opens `partition`. Retries until `stop` is cancelled; fails if `start` refuses the facts.
    pub fn open(
        &self,
        partition: i32,
        stop: &CancellationToken,
        runtime: &Handle,
    ) -> Result<Opened, ProcessorError> {
        let mut state = self.state_file(partition, stop)?;
        let read = async {
            tokio::select! {
                biased;
                () = stop.cancelled() => Err(ProcessorError::Stopped),
                stored = self.read_stored(partition) => stored,
            }
        };
        let StoredFacts { outages, progress, skips } = runtime.block_on(read)?;
        let (low, high) = self.watermarks(partition, stop)?;
        let layout = self.definition.layout();
        let facts = StartFacts {
            partition,
            state: state.facts(),
            progress,
            low,
            high,
            layout: &layout,
            cluster_id: &self.cluster_id,
            skips: &skips,
            recover: self.recover,
            replay: self.replays.is_due(partition),
        };
        let fingerprint_at = |offset| self.fingerprint_at(partition, offset, stop);
        let (start, partition_state) =
            begin(&mut state, &facts, &self.definition, self.max_memory_bytes, fingerprint_at)?;
        self.replays.mark_started(partition);
        self.log_start(partition, &start);
        let assumed = Assumed { noted: start.written_to, outages };
        Ok(Opened { partition_id: partition, start, assumed, state, partition: partition_state })
    }

    /// Reads what Cassandra holds about the partition. Reads it again if an outage ended in between.
    async fn read_stored(&self, partition: i32) -> Result<StoredFacts, ProcessorError> {
        loop {
            let outages = self.store.outages();
            let (progress, skips) =
                (self.store.progress(partition).await?, self.store.skips(partition).await?);
            if self.store.outages() == outages {
                return Ok(StoredFacts { outages, progress, skips });
            }
        }
    }

    fn log_start(&self, partition: i32, start: &Start) {
        let (position, totals) = (start.position, start.position.totals);
        let (next_offset, how) = (position.next_offset, start.how.name());
        match start.how {
            How::Recover => tracing::warn!(
                partition,
                next_offset,
                ?totals,
                "state file is missing or behind: recovering from the progress row"
            ),
            How::StoreBehind => tracing::warn!(
                partition,
                next_offset,
                ?totals,
                "cassandra has lost acknowledged writes: reprocessing them from the log"
            ),
            _ => tracing::info!(partition, next_offset, how, ?totals, "starting the partition"),
        }
        if let Some(skip) = &start.skip {
            tracing::warn!(
                partition,
                from = skip.start,
                to = skip.end,
                "skipping offsets as requested by an operator"
            );
        }
    }

    /// Opens the state file. Waits while another process holds it.
    fn state_file(&self, partition: i32, stop: &CancellationToken) -> Result<StateFile, ProcessorError> {
        let path = state::path_of(&self.checkpoints, &self.definition.stream.name, partition);
        let name = format!("state of partition {partition}");
        let waiting_since = Instant::now();
        let opened = loop {
            match StateFile::open(&path, &self.holder) {
                Err(StateError::Held { .. }) if stop.is_cancelled() => break Err(ProcessorError::Stopped),
                Err(error @ StateError::Held { .. }) => {
                    if waiting_since.elapsed() > self.held_deadline {
                        self.health.set(&name, Err(error.to_string()));
                    }
                    std::thread::sleep(RETRY_INTERVAL);
                }
                opened => break opened.map_err(state_error),
            }
        };
        self.health.forget(&name);
        opened
    }

    /// Fingerprint of the log's record at `offset`; `None` if no record has that offset.
    fn fingerprint_at(
        &self,
        partition: i32,
        offset: i64,
        stop: &CancellationToken,
    ) -> Result<Option<i64>, ProcessorError> {
        loop {
            let read = LogReader::open(&self.brokers, &self.topic, partition, Some(offset))
                .and_then(|mut reader| Ok(reader.next_record()?.map(|r| (r.offset(), fingerprint_of(&r)))));
            match read {
                Ok(found) => {
                    return Ok(found.filter(|(at, _)| *at == offset).map(|(_, fingerprint)| fingerprint));
                }
                Err(error @ ProcessorError::Reopen(_)) => return Err(error),
                Err(_) if stop.is_cancelled() => return Err(ProcessorError::Stopped),
                Err(error) => {
                    tracing::warn!(partition, offset, %error, "cannot read the last processed record, retrying");
                    std::thread::sleep(RETRY_INTERVAL);
                }
            }
        }
    }

    fn watermarks(&self, partition: i32, stop: &CancellationToken) -> Result<(i64, i64), ProcessorError> {
        loop {
            let probe = self.probe.get().map_err(|e| ProcessorError::Fatal(e.to_string()))?;
            match probe.fetch_watermarks(&self.topic, partition, WATERMARK_DEADLINE) {
                Ok(watermarks) => return Ok(watermarks),
                Err(_) if stop.is_cancelled() => return Err(ProcessorError::Stopped),
                Err(error) => {
                    self.probe.doubt(&error);
                    tracing::warn!(partition, %error, "cannot read the first and last offset of the log, retrying");
                    std::thread::sleep(RETRY_INTERVAL);
                }
            }
        }
    }
}

/// Decides where the partition starts, and creates or restores its state in memory and on disk. `max_memory_bytes`
/// bounds the panes and filters. `fingerprint_at` returns the fingerprint of the log's record at an offset, or `None`
/// if no record has it.
pub fn begin<C: Checkpoint>(
    checkpoint: &mut C,
    facts: &StartFacts<'_>,
    definition: &Definition,
    max_memory_bytes: usize,
    fingerprint_at: impl FnOnce(i64) -> Result<Option<i64>, ProcessorError>,
) -> Result<(Start, Partition), ProcessorError> {
    let start = start::decide(facts)?;
    if let Some(expected @ LastRecord { offset, fingerprint }) = start.compare_first {
        let found = fingerprint_at(offset)?;
        if found != Some(fingerprint) {
            return Err(start::record_mismatch(facts.partition, expected, found).into());
        }
    }
    let windows = &definition.windows;
    let shape = PaneShape::new(definition);
    let mut panes = Panes::new(shape, windows.pane_ms, windows.lateness_ms, max_memory_bytes, i64::MIN);
    if start.how == How::Resume {
        checkpoint.restore(&mut panes).map_err(state_error)?;
    } else {
        // Without a state file, all panes that may have events are cold: their keys are unknown.
        let latest = start.position.seen_to.map(|seen_to| definition.event.latest_time(seen_to));
        panes.hot_from = latest.map_or(i64::MIN, |latest| panes.start_after(latest));
        let head = Head {
            format: FORMAT,
            layout: facts.layout.to_string(),
            cluster_id: facts.cluster_id.to_owned(),
            partition: facts.partition,
            hot_from: panes.hot_from,
            position: start.position,
        };
        checkpoint.reset(head).map_err(state_error)?;
    }
    let partition = Partition::new(start.position, panes, windows.lateness_ms);
    Ok((start, partition))
}

fn state_error(error: StateError) -> ProcessorError {
    match error {
        StateError::NewerFormat { .. } => ProcessorError::Refused(error.to_string()),
        // The file is intact: removing it would not help.
        StateError::DiskFull { .. } => ProcessorError::Fatal(error.to_string()),
        error => {
            ProcessorError::Fatal(format!("{error}; remove the file to recover from cassandra without loss"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partition_is_replayed_once_even_if_it_is_assigned_again() {
        let replays = Replays::new(true);
        assert!(replays.is_due(1));
        replays.mark_started(1);
        assert!(!replays.is_due(1) && replays.is_due(2));
        assert!(!Replays::new(false).is_due(1));
    }

    #[test]
    fn a_full_disk_error_asks_to_free_space_and_not_to_remove_the_file() {
        let file = "checkpoints/user_created-0.redb".to_owned();
        let full = state_error(StateError::DiskFull { file: file.clone() }).to_string();
        assert!(full.contains("free space") && !full.contains("remove"), "{full}");
        let damaged = state_error(StateError::Broken { file, cause: "checksum".into() }).to_string();
        assert!(damaged.contains("remove the file"), "{damaged}");
    }
}
