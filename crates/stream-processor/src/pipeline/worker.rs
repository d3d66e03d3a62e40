//! The processing loop of one partition, and the only file that orders the processor's effects:
//!
//! look up → apply → write rows and dead letters → write panes → note `written_to` → commit → publish.
//!
//! Every write is acknowledged before the commit, and nothing is published before the commit. The steps before the
//! commit change only memory that an error discards, and perform only writes that a retry repeats identically.

use crate::count::partition::{Applied, LogPosition, Partition, StoredCopy};
use crate::count::poison_gate::PoisonLimits;
use crate::count::write_plan::{group_events, group_panes};
use crate::error::ProcessorError;
use crate::io::state::{Checkpoint, Commit, StateFile};
use crate::io::store::{Assumed, BatchRecord, DeadLetters, StepTimes, Store};
use crate::metrics::{self, Metrics};
use crate::pipeline::fetch::{Chunks, Fetched};
use crate::pipeline::stages::StageState;
use crate::record::chunk::Chunk;
use common::contracts::event::Bucket;
use common::runtime::admin::Health;
use common::runtime::presence::{Hold, Holdings, partition_dependency};
use fail::fail_point;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Poll interval of a paused partition, to see whether an operator has accepted its undecodable records.
const ACCEPTED_POLL: Duration = Duration::from_millis(500);

/// The processing loop of one partition.
pub struct PartitionWorker<S, D, C = StateFile> {
    /// Kafka partition.
    pub id: i32,
    /// Time span of one Cassandra partition of the event and pane tables.
    pub bucket: Bucket,
    /// The checkpoint.
    pub state: C,
    /// State in memory.
    pub partition: Partition,
    /// What Cassandra must still hold for writes to be valid.
    pub assumed: Assumed,
    /// Store in Cassandra.
    pub store: Arc<S>,
    /// The dead-letter topic.
    pub dead_letters: Arc<D>,
    /// How many undecodable records pause the partition.
    pub limits: PoisonLimits,
    /// Readiness. A paused partition is not ready.
    pub health: Arc<Health>,
    /// Partitions that this instance announces to hold.
    pub holdings: Holdings,
    /// Metrics.
    pub metrics: Arc<Metrics>,
    /// The committed next offset, read by the group's thread.
    pub committed: Arc<AtomicI64>,
}

impl<S: Store + 'static, D: DeadLetters, C: Checkpoint> PartitionWorker<S, D, C> {
    /// Processes chunks until `stop` is cancelled, `chunks` ends or an error occurs. Waits for the publish of the last
    /// commit before it returns.
    pub async fn run(mut self, mut chunks: Chunks, stop: CancellationToken) -> Result<(), ProcessorError> {
        // The last commit may not have been published, and a new state must be published before its first batch.
        if !self.is_replaying() {
            self.store.publish(self.id, &self.partition.position, self.assumed, None).await?;
        }
        self.assumed.noted = self.assumed.noted.max(Some(self.partition.position.next_offset));
        let mut publishing: Option<JoinHandle<Result<(), ProcessorError>>> = None;
        let clock = self.metrics.stage(self.id, metrics::WORK);
        let ended = loop {
            clock.enter(StageState::Idle);
            let chunk = tokio::select! {
                biased;
                () = stop.cancelled() => break Ok(()),
                chunk = chunks.recv() => chunk,
            };
            // Waiting here counts as backpressured: the partition may be paused, or Cassandra may not answer.
            clock.enter(StageState::Backpressured);
            let batch = match chunk {
                None => break Ok(()),
                Some(Err(e)) => break Err(e),
                Some(Ok(Fetched::Quiet)) => match self.store.confirm(self.id, self.assumed).await {
                    Ok(()) => continue,
                    Err(e) => break Err(e),
                },
                Some(Ok(Fetched::Chunk(chunk))) => match self.admit(&chunk, &stop).await {
                    Ok(true) => {
                        clock.enter(StageState::Busy);
                        self.batch(&chunk).await
                    }
                    Ok(false) => break Ok(()),
                    Err(e) => Err(e),
                },
            };
            let batch = match batch {
                Ok(batch) => batch,
                Err(e) => break Err(e),
            };
            clock.enter(StageState::Backpressured);
            if let Err(e) = join_publish(publishing.take()).await {
                break Err(e);
            }
            publishing = Some(self.publish(batch));
        };
        let published = join_publish(publishing).await;
        ended.and(published)
    }

    /// Counts the chunk's undecodable records against the limits. Above a limit, waits until an operator accepts them.
    /// Returns `false` if `stop` was cancelled first.
    async fn admit(&mut self, chunk: &Chunk, stop: &CancellationToken) -> Result<bool, ProcessorError> {
        let counts = self.partition.position.poison;
        if let Ok(counts) = counts.after(chunk, self.id, &self.limits, 0) {
            self.partition.position.poison = counts;
            return Ok(true);
        }
        let name = partition_dependency(self.id);
        self.metrics.paused(self.id, true);
        self.holdings.set(self.id, Hold::Paused);
        loop {
            let accepted = self.store.accepted_up_to(self.id).await?;
            match counts.after(chunk, self.id, &self.limits, accepted) {
                Ok(counts) => {
                    self.partition.position.poison = counts;
                    self.health.forget(&name);
                    self.metrics.paused(self.id, false);
                    self.holdings.set(self.id, Hold::Running);
                    return Ok(true);
                }
                Err(paused) => self.health.set(&name, Err(paused.to_string())),
            }
            tokio::select! {
                () = stop.cancelled() => return Ok(false),
                () = tokio::time::sleep(ACCEPTED_POLL) => {}
            }
        }
    }

    /// Processes one batch, up to and including its commit.
    async fn batch(&mut self, chunk: &Chunk) -> Result<BatchRecord, ProcessorError> {
        let mut times = StepTimes { decode: chunk.decode_us as f64 / 1e6, ..StepTimes::default() };
        fail_point!("before_look_up");
        let stored = timed(&mut times.lookup, self.look_up(chunk)).await?;
        fail_point!("before_apply");
        let before = self.partition.position;
        let started = Instant::now();
        let applied = self.partition.apply(chunk, &stored)?;
        times.apply = started.elapsed().as_secs_f64();
        timed(&mut times.write, self.write(chunk, &applied)).await?;
        let dropped = self.partition.advance();
        fail_point!("before_commit");
        let started = Instant::now();
        let touched: Vec<i64> = applied.panes.keys().copied().collect();
        let commit =
            Commit { partition: &self.partition, touched: &touched, seen: &applied.seen, dropped: &dropped };
        self.state.commit(&commit).map_err(|e| ProcessorError::Fatal(e.to_string()))?;
        times.commit = started.elapsed().as_secs_f64();
        fail_point!("before_publish");
        self.record_metrics(chunk, &before, &applied, &times);
        Ok(BatchRecord { first_offset: chunk.first_offset, rows: applied.rows.len(), times })
    }

    /// Reads what must be known before the chunk is applied, and returns the stored rows by the index of the event.
    /// All earlier writes are acknowledged at this point.
    async fn look_up(&mut self, chunk: &Chunk) -> Result<BTreeMap<u32, StoredCopy>, ProcessorError> {
        let questions = self.partition.questions(chunk);
        if questions.keys.is_empty() {
            return Ok(BTreeMap::new());
        }
        let groups = group_events(chunk, &questions.keys, self.bucket);
        let (stored, panes) = futures::try_join!(
            self.store.look_up(chunk, &groups),
            self.store.load_panes(self.id, &questions.panes)
        )?;
        // If the answers came from an older snapshot, the panes would be incomplete.
        self.store.confirm(self.id, self.assumed).await?;
        for (start, pane) in panes {
            self.partition.panes.put_cold(start, pane);
        }
        self.metrics.looked_up.inc_by(questions.keys.len() as u64);
        Ok(stored)
    }

    /// Writes rows and dead letters, then panes, then `written_to`. All writes are acknowledged when this returns.
    async fn write(&mut self, chunk: &Chunk, applied: &Applied) -> Result<(), ProcessorError> {
        fail_point!("before_rows");
        let rows = group_events(chunk, &applied.rows, self.bucket);
        futures::try_join!(self.store.write_rows(chunk, &rows), self.dead_letters.send(self.id, chunk))?;
        fail_point!("before_panes");
        let panes = group_panes(&applied.panes, self.bucket, self.partition.panes.shape.row_bytes());
        self.store
            .write_panes(self.id, self.partition.position.next_offset, &panes, &self.partition.panes)
            .await?;
        self.note_written().await
    }

    /// Notes the next offset as `written_to` in Cassandra. This happens before the commit, so a state file ahead of
    /// `written_to` proves that Cassandra lost history. A replay is behind `written_to` until it has caught up.
    async fn note_written(&mut self) -> Result<(), ProcessorError> {
        fail_point!("before_note");
        let written_to = self.partition.position.next_offset;
        self.store.note_written(self.id, written_to, self.assumed).await?;
        self.assumed.noted = self.assumed.noted.max(Some(written_to));
        Ok(())
    }

    /// Records the metrics of a committed batch.
    fn record_metrics(&self, chunk: &Chunk, before: &LogPosition, applied: &Applied, times: &StepTimes) {
        let position = &self.partition.position;
        self.committed.store(position.next_offset, Ordering::Release);
        self.metrics.committed(self.id, &before.totals, &position.totals, position.next_offset);
        self.metrics.batch(times, applied.rows.len());
        self.metrics.cold_events.inc_by(applied.cold as u64);
        self.metrics.partition(self.id, &self.partition);
        for column in &chunk.misfits {
            self.metrics.misfits.with_label_values(&[&**column]).inc();
        }
        let oldest = chunk.events.first().map_or(0, |e| e.produced_at_us);
        if oldest > 0 {
            let micros = chrono::Utc::now().timestamp_micros().saturating_sub(oldest).max(0);
            let histogram = self.metrics.latency.with_label_values(&[] as &[&str]);
            histogram.observe(micros as f64 / 1e6);
        }
    }

    /// Whether a replay has not caught up yet. Nothing is published until then, because below `count_from` the totals
    /// belong to a later offset.
    fn is_replaying(&self) -> bool {
        let position = &self.partition.position;
        position.next_offset < position.count_from
    }

    /// Publishes in the background. A publish may be one batch behind the commit and is never ahead of it.
    fn publish(&self, batch: BatchRecord) -> JoinHandle<Result<(), ProcessorError>> {
        let (store, id) = (Arc::clone(&self.store), self.id);
        let (position, assumed) = (self.partition.position, self.assumed);
        let is_replaying = self.is_replaying();
        tokio::spawn(async move {
            fail_point!("in_publish");
            if is_replaying { Ok(()) } else { store.publish(id, &position, assumed, Some(&batch)).await }
        })
    }
}

async fn join_publish(
    publishing: Option<JoinHandle<Result<(), ProcessorError>>>,
) -> Result<(), ProcessorError> {
    match publishing {
        None => Ok(()),
        Some(task) => {
            task.await.unwrap_or_else(|e| Err(ProcessorError::Fatal(format!("the publish task failed: {e}"))))
        }
    }
}

async fn timed<T>(seconds: &mut f64, work: impl Future<Output = T>) -> T {
    let started = Instant::now();
    let output = work.await;
    *seconds = started.elapsed().as_secs_f64();
    output
}
