//! Opens one partition: gathers the facts (state file, progress row, log), has `start` decide, and makes or restores the
//! state. Blocking: a partition is not fetched before this is done.

use crate::error::ProcessorError;
use crate::fetch::fingerprint_of;
use crate::log_reader::LogReader;
use crate::metrics::Metrics;
use crate::partition::Partition;
use crate::start::{self, Facts, How, RecoverPolicy, Start};
use crate::state::{self, Checkpoint, FORMAT, Head, StateError, StateFile};
use crate::store::Store;
use crate::windows::hot::Panes;
use crate::windows::pane::PaneShape;
use common::admin::Health;
use common::shutdown::Shutdown;
use common::stream::Definition;
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;

const HELD_POLL: Duration = Duration::from_millis(100);
const WATERMARK_DEADLINE: Duration = Duration::from_secs(5);

/// What all partitions of this instance share.
pub struct Opener<S> {
    /// Stream definition.
    pub definition: Arc<Definition>,
    /// Bootstrap servers.
    pub brokers: String,
    /// Events topic.
    pub topic: String,
    /// Kafka cluster.
    pub cluster_id: String,
    /// Folder of the state files.
    pub checkpoints: PathBuf,
    /// Noted beside the state files, for whoever finds them held.
    pub holder: String,
    /// What to do without a state.
    pub recover: RecoverPolicy,
    /// Which partitions walk again from the earliest offset.
    pub replays: Replays,
    /// Bytes of panes and filters per partition.
    pub memory_most: usize,
    /// How long another owner may take to close a file before it is called out.
    pub held_deadline: Duration,
    /// Cassandra.
    pub store: Arc<S>,
    /// Metrics.
    pub metrics: Arc<Metrics>,
    /// Readiness.
    pub health: Arc<Health>,
    /// Ends waiting.
    pub shutdown: Shutdown,
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
    /// Its state file.
    pub state: StateFile,
    /// Its state in memory.
    pub partition: Partition,
}

impl<S: Store> Opener<S> {
    /// Opens `partition`, or refuses.
    pub fn open<C: ConsumerContext>(
        &self,
        partition: i32,
        consumer: &BaseConsumer<C>,
        runtime: &Handle,
    ) -> Result<Opened, ProcessorError> {
        let mut state = self.state_file(partition)?;
        let progress = runtime.block_on(self.store.progress(partition))?;
        let (low, high) = self.watermarks(partition, consumer)?;
        let layout = self.definition.layout();
        let facts = Facts {
            partition,
            state: state.facts(),
            progress,
            low,
            high,
            layout: &layout,
            cluster_id: &self.cluster_id,
            recover: self.recover,
            replay: self.replays.asks_for(partition),
        };
        let look = |offset| self.fingerprint_at(partition, offset);
        let (start, partition_state) = begin(&mut state, &facts, &self.definition, self.memory_most, look)?;
        self.replays.begun(partition);
        self.tell(partition, &start);
        Ok(Opened { partition_id: partition, start, state, partition: partition_state })
    }

    fn tell(&self, partition: i32, start: &Start) {
        let (position, totals) = (start.position, start.position.totals);
        let next_offset = position.next_offset;
        let how = match start.how {
            How::Resume => "resume",
            How::Recover => "recover",
            How::Replay => "replay",
            How::Earliest => "earliest",
        };
        if start.how == How::Recover {
            tracing::warn!(
                partition,
                next_offset,
                ?totals,
                "state lost or behind: recovering from the progress row"
            );
        } else {
            tracing::info!(partition, next_offset, how, ?totals, "partition starts");
        }
        self.metrics.started(partition, how, &totals, next_offset);
    }

    /// Opens the state file, waiting for its last owner to close it.
    fn state_file(&self, partition: i32) -> Result<StateFile, ProcessorError> {
        let path = state::path_of(&self.checkpoints, &self.definition.stream.name, partition);
        let name = format!("state of partition {partition}");
        let asked = Instant::now();
        loop {
            match StateFile::open(&path, &self.holder) {
                Err(error @ StateError::Held { .. }) => {
                    if self.shutdown.has_begun() {
                        return Err(ProcessorError::Stopped);
                    }
                    if asked.elapsed() > self.held_deadline {
                        self.health.set(&name, Err(error.to_string()));
                    }
                    self.health.beat();
                    std::thread::sleep(HELD_POLL);
                }
                opened => {
                    self.health.forget(&name);
                    return opened.map_err(broken);
                }
            }
        }
    }

    /// Fingerprint of the record at `offset` of the log.
    fn fingerprint_at(&self, partition: i32, offset: i64) -> Result<i64, ProcessorError> {
        loop {
            let read = LogReader::open(&self.brokers, &self.topic, partition, Some(offset))
                .and_then(|mut reader| Ok(reader.next_record()?.map(|record| fingerprint_of(&record))));
            match read {
                Ok(Some(fingerprint)) => return Ok(fingerprint),
                _ if self.shutdown.has_begun() => return Err(ProcessorError::Stopped),
                read => {
                    tracing::warn!(partition, offset, ?read, "last record that was counted not yet read");
                    self.health.beat();
                    std::thread::sleep(HELD_POLL);
                }
            }
        }
    }

    fn watermarks<C: ConsumerContext>(
        &self,
        partition: i32,
        consumer: &BaseConsumer<C>,
    ) -> Result<(i64, i64), ProcessorError> {
        loop {
            match consumer.fetch_watermarks(&self.topic, partition, WATERMARK_DEADLINE) {
                Ok(watermarks) => return Ok(watermarks),
                Err(_) if self.shutdown.has_begun() => return Err(ProcessorError::Stopped),
                Err(error) => {
                    tracing::warn!(partition, %error, "watermarks not yet known");
                    self.health.beat();
                    std::thread::sleep(HELD_POLL);
                }
            }
        }
    }
}

/// What follows from the facts: the decision, and the state in memory and on the disk that goes with it. `memory_most` bounds
/// the bytes of panes and filters, `look` gives the fingerprint of the log's record at an offset.
pub fn begin<C: Checkpoint>(
    checkpoint: &mut C,
    facts: &Facts<'_>,
    definition: &Definition,
    memory_most: usize,
    look: impl FnOnce(i64) -> Result<i64, ProcessorError>,
) -> Result<(Start, Partition), ProcessorError> {
    let start = start::decide(facts)?;
    if let Some((offset, expected)) = start.last_counted {
        let found = look(offset)?;
        if found != expected {
            return Err(start::another_record(facts.partition, offset, found, expected).into());
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
            layout: facts.layout.to_owned(),
            cluster_id: facts.cluster_id.to_owned(),
            partition: facts.partition,
            hot_from: panes.hot_from,
            position: start.position,
        };
        checkpoint.reset(head).map_err(broken)?;
    }
    Ok((start, Partition::new(start.position, panes, windows.lateness_ms)))
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
