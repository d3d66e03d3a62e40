//! Opens one partition: gathers the facts (state file, progress row, log), has `start` decide, and makes or restores the
//! state. Blocking: a partition is not fetched before this is done.

use crate::error::ProcessorError;
use crate::fetch::fingerprint_of;
use crate::log_reader::LogReader;
use crate::metrics::Metrics;
use crate::partition::{LastRecord, Partition};
use crate::start::{self, Facts, How, Progress, RecoverPolicy, Start};
use crate::state::{self, Checkpoint, FORMAT, Head, StateError, StateFile};
use crate::store::{Assumed, Store};
use crate::windows::hot::Panes;
use crate::windows::pane::PaneShape;
use common::admin::Health;
use common::kafka::Replaced;
use common::stream::Definition;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::Message;
use std::collections::BTreeSet;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

/// Pause between tries of what another process or a server has to make possible.
const TRY_AGAIN: Duration = Duration::from_millis(100);
const WATERMARK_DEADLINE: Duration = Duration::from_secs(5);

/// What all partitions of this instance share.
pub struct Opener<S> {
    /// Stream definition.
    pub definition: Arc<Definition>,
    /// Bootstrap servers.
    pub brokers: String,
    /// A client that is no member of the group, for questions about the log.
    pub probe: Arc<Replaced<BaseConsumer>>,
    /// Events topic.
    pub topic: String,
    /// Partitions that the stream was registered with.
    pub partitions: i32,
    /// Kafka cluster.
    pub cluster_id: String,
    /// Folder of the state files.
    pub checkpoints: PathBuf,
    /// Noted beside the state files, for an instance that finds them held.
    pub holder: String,
    /// What to do without a usable state file.
    pub recover: RecoverPolicy,
    /// Which partitions to process again from the earliest offset.
    pub replays: Replays,
    /// Bytes of panes and filters per partition.
    pub memory_most: usize,
    /// How long another owner may take to close a file before readiness tells of it.
    pub held_deadline: Duration,
    /// Cassandra.
    pub store: Arc<S>,
    /// Metrics.
    pub metrics: Arc<Metrics>,
    /// Readiness.
    pub health: Arc<Health>,
}

/// The partitions that `--replay` still asks for: each once, so that a rebalance does not start a replay over.
#[derive(Debug)]
pub struct Replays {
    wanted: bool,
    begun: Mutex<BTreeSet<i32>>,
}

impl Replays {
    /// `wanted`: as the command line says.
    pub fn new(wanted: bool) -> Replays {
        Replays { wanted, begun: Mutex::default() }
    }

    fn asks_for(&self, partition: i32) -> bool {
        self.wanted && !self.begun.lock().unwrap_or_else(PoisonError::into_inner).contains(&partition)
    }

    /// Its state says from now on how far the replay is.
    fn begun(&self, partition: i32) {
        self.begun.lock().unwrap_or_else(PoisonError::into_inner).insert(partition);
    }
}

/// A partition ready to be fetched.
pub struct Opened {
    /// Kafka partition.
    pub partition_id: i32,
    /// Where it starts.
    pub start: Start,
    /// What it was found with.
    pub assumed: Assumed,
    /// Its state file.
    pub state: StateFile,
    /// Its state in memory.
    pub partition: Partition,
}

struct Stored {
    outages: u64,
    progress: Option<Progress>,
    skips: Vec<Range<i64>>,
}

impl<S: Store> Opener<S> {
    /// Opens `partition`, or refuses. Tries until `stop` is cancelled.
    pub fn open(
        &self,
        partition: i32,
        stop: &CancellationToken,
        runtime: &Handle,
    ) -> Result<Opened, ProcessorError> {
        let mut state = self.state_file(partition, stop)?;
        let asked = async {
            tokio::select! {
                biased;
                () = stop.cancelled() => Err(ProcessorError::Stopped),
                stored = self.stored(partition) => stored,
            }
        };
        let Stored { outages, progress, skips } = runtime.block_on(asked)?;
        let (low, high) = self.watermarks(partition, stop)?;
        let layout = self.definition.layout();
        let facts = Facts {
            partition,
            state: state.facts(),
            progress,
            low,
            high,
            layout: &layout,
            cluster_id: &self.cluster_id,
            skips: &skips,
            recover: self.recover,
            replay: self.replays.asks_for(partition),
        };
        let look = |offset| self.fingerprint_at(partition, offset, stop);
        let (start, partition_state) = begin(&mut state, &facts, &self.definition, self.memory_most, look)?;
        self.replays.begun(partition);
        self.tell(partition, &start);
        let assumed = Assumed { noted: start.written_to, outages };
        Ok(Opened { partition_id: partition, start, assumed, state, partition: partition_state })
    }

    /// What Cassandra holds of the partition, all of it read without an outage in between.
    async fn stored(&self, partition: i32) -> Result<Stored, ProcessorError> {
        loop {
            let outages = self.store.outages();
            let (progress, skips) =
                (self.store.progress(partition).await?, self.store.skips(partition).await?);
            if self.store.outages() == outages {
                return Ok(Stored { outages, progress, skips });
            }
        }
    }

    fn tell(&self, partition: i32, start: &Start) {
        let (position, totals) = (start.position, start.position.totals);
        let (next_offset, how) = (position.next_offset, start.how.name());
        match start.how {
            How::Recover => tracing::warn!(
                partition,
                next_offset,
                ?totals,
                "state file lost or behind: recovering from the progress row"
            ),
            How::StoreBehind => tracing::warn!(
                partition,
                next_offset,
                ?totals,
                "cassandra has lost what it had acknowledged: processing it again from the log"
            ),
            _ => tracing::info!(partition, next_offset, how, ?totals, "partition starts"),
        }
        if let Some(skip) = &start.skip {
            tracing::warn!(
                partition,
                from = skip.start,
                to = skip.end,
                "skipping offsets, as an operator asked"
            );
        }
    }

    /// Opens the state file, waiting for its last owner to close it.
    fn state_file(&self, partition: i32, stop: &CancellationToken) -> Result<StateFile, ProcessorError> {
        let path = state::path_of(&self.checkpoints, &self.definition.stream.name, partition);
        let name = format!("state of partition {partition}");
        let asked = Instant::now();
        let opened = loop {
            match StateFile::open(&path, &self.holder) {
                Err(StateError::Held { .. }) if stop.is_cancelled() => break Err(ProcessorError::Stopped),
                Err(error @ StateError::Held { .. }) => {
                    if asked.elapsed() > self.held_deadline {
                        self.health.set(&name, Err(error.to_string()));
                    }
                    std::thread::sleep(TRY_AGAIN);
                }
                opened => break opened.map_err(broken),
            }
        };
        self.health.forget(&name);
        opened
    }

    /// Fingerprint of the record at `offset` of the log; `None`: there is no record at that offset.
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
                    tracing::warn!(partition, offset, %error, "the record that was counted last is not yet read");
                    std::thread::sleep(TRY_AGAIN);
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
                    tracing::warn!(partition, %error, "the log's first and last offset are not yet known");
                    std::thread::sleep(TRY_AGAIN);
                }
            }
        }
    }
}

/// Decides where the partition starts, and makes the state in memory and on the disk that goes with the decision. `memory_most`
/// bounds the bytes of panes and filters; `look` gives the fingerprint of the log's record at an offset, if there is one.
pub fn begin<C: Checkpoint>(
    checkpoint: &mut C,
    facts: &Facts<'_>,
    definition: &Definition,
    memory_most: usize,
    look: impl FnOnce(i64) -> Result<Option<i64>, ProcessorError>,
) -> Result<(Start, Partition), ProcessorError> {
    let start = start::decide(facts)?;
    if let Some(expected @ LastRecord { offset, fingerprint }) = start.compare_first {
        let found = look(offset)?;
        if found != Some(fingerprint) {
            return Err(start::another_record(facts.partition, expected, found).into());
        }
    }
    let windows = &definition.windows;
    let times = (windows.pane_ms, windows.lateness_ms);
    let mut panes = Panes::new(PaneShape::new(definition), times, memory_most, i64::MIN);
    if start.how == How::Resume {
        checkpoint.restore(&mut panes).map_err(broken)?;
    } else {
        // Without a state nothing is known of the panes up to the highest event time: they are cold.
        panes.hot_from = start.position.seen_to.map_or(i64::MIN, |seen_to| panes.start_after(seen_to));
        let head = Head {
            format: FORMAT,
            layout: facts.layout.to_string(),
            cluster_id: facts.cluster_id.to_owned(),
            partition: facts.partition,
            hot_from: panes.hot_from,
            position: start.position,
        };
        checkpoint.reset(head).map_err(broken)?;
    }
    let partition = Partition::new(start.position, panes, windows.lateness_ms);
    Ok((start, partition))
}

fn broken(error: StateError) -> ProcessorError {
    match error {
        StateError::NewerFormat { .. } => ProcessorError::Refused(error.to_string()),
        // The file is as good as before.
        StateError::DiskFull { .. } => ProcessorError::Fatal(error.to_string()),
        error => ProcessorError::Fatal(format!("{error}; remove the file to recover exactly from cassandra")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partition_is_replayed_once_however_often_it_comes_back() {
        let replays = Replays::new(true);
        assert!(replays.asks_for(1));
        replays.begun(1);
        assert!(!replays.asks_for(1) && replays.asks_for(2));
        assert!(!Replays::new(false).asks_for(1));
    }

    #[test]
    fn a_full_disk_asks_for_space_and_not_for_the_files_removal() {
        let file = "checkpoints/user_created-0.redb".to_owned();
        let full = broken(StateError::DiskFull { file: file.clone() }).to_string();
        assert!(full.contains("free space") && !full.contains("remove"), "{full}");
        let damaged = broken(StateError::Broken { file, cause: "checksum".into() }).to_string();
        assert!(damaged.contains("remove the file"), "{damaged}");
    }
}
