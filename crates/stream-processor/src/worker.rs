//! One partition's loop, and the one file that orders the processor's effects:
//!
//! look up → apply → write rows and dead letters → write panes → note how far → commit → publish.
//!
//! Every write is acknowledged before the commit, and nothing is published before it. The steps before the commit only
//! change memory that dies with an error, and write what a repetition would write again.

use crate::chunk::Chunk;
use crate::error::ProcessorError;
use crate::metrics::{self, Metrics};
use crate::partition::{Applied, Partition, Position};
use crate::poison_gate::PoisonLimits;
use crate::stages::StageState;
use crate::state::{Checkpoint, Commit, StateFile};
use crate::store::{Assumed, BatchRecord, DeadLetters, StepTimes, Store};
use crate::write_plan::{group_events, group_panes};
use common::admin::Health;
use common::event::Bucket;
use common::presence::{Hold, Holdings, partition_dependency};
use fail::fail_point;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// How often a paused partition asks whether its poison was accepted.
const ACCEPTED_POLL: Duration = Duration::from_millis(500);

/// What a fetcher hands to its worker.
#[derive(Debug)]
pub enum Fetched {
    /// The next stretch of the log.
    Chunk(Box<Chunk>),
    /// There has been nothing to fetch for a while.
    Quiet,
}

/// Decoded chunks on their way to a worker; at most one waits.
pub type Chunks = mpsc::Receiver<Result<Fetched, ProcessorError>>;

/// Everything one partition's loop needs.
pub struct Worker<S, D, C = StateFile> {
    /// Kafka partition.
    pub id: i32,
    /// Span of the event table's partitions.
    pub bucket: Bucket,
    /// The checkpoint.
    pub state: C,
    /// Where the partition stands.
    pub partition: Partition,
    /// What Cassandra must still hold.
    pub assumed: Assumed,
    /// Cassandra.
    pub store: Arc<S>,
    /// The dead-letter topic.
    pub dead_letters: Arc<D>,
    /// How much poison pauses the partition.
    pub limits: PoisonLimits,
    /// Readiness: a paused partition is not ready.
    pub health: Arc<Health>,
    /// What this instance holds, as it tells the others.
    pub holdings: Holdings,
    /// Metrics.
    pub metrics: Arc<Metrics>,
    /// Follows the committed next offset, for the consumer group's own offset.
    pub committed: Arc<AtomicI64>,
}

impl<S: Store + 'static, D: DeadLetters, C: Checkpoint> Worker<S, D, C> {
    /// Takes chunks until `stop`, the end of `chunks` or an error. What was committed before is always published.
    pub async fn run(mut self, mut chunks: Chunks, stop: CancellationToken) -> Result<(), ProcessorError> {
        // What was committed last may not have been published; a new state shows itself before its first batch.
        if !self.replays() {
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
            // A partition that is paused by poison is held back.
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
            if let Err(e) = finish(publishing.take()).await {
                break Err(e);
            }
            publishing = Some(self.publish(batch));
        };
        let published = finish(publishing).await;
        ended.and(published)
    }

    /// Counts the chunk's poison against the limits. Over them, waits until an operator accepts it; returns `false` if `stop`
    /// was cancelled first.
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

    /// One batch up to and including its commit.
    async fn batch(&mut self, chunk: &Chunk) -> Result<BatchRecord, ProcessorError> {
        let mut times = StepTimes { decode: chunk.decode_us as f64 / 1e6, ..StepTimes::default() };
        fail_point!("before_look_up");
        let (asked, found) = timed(&mut times.lookup, self.look_up(chunk)).await?;
        fail_point!("before_apply");
        let before = self.partition.position;
        let started = Instant::now();
        let applied = self.partition.apply(chunk, &asked, &found)?;
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
        self.show(chunk, &before, &applied, &times);
        Ok(BatchRecord { first_offset: chunk.first_offset, rows: applied.rows.len(), times })
    }

    /// Asks what the chunk needs to know; the last write is acknowledged.
    async fn look_up(&mut self, chunk: &Chunk) -> Result<(Vec<u32>, Vec<Option<i64>>), ProcessorError> {
        let questions = self.partition.questions(chunk);
        if questions.keys.is_empty() {
            return Ok((Vec::new(), Vec::new()));
        }
        let groups = group_events(chunk, &questions.keys, self.bucket);
        let (stored, panes) = futures::try_join!(
            self.store.look_up(chunk, &groups),
            self.store.load_panes(self.id, &questions.panes)
        )?;
        // Answers from an older snapshot would be written into panes as if they were complete.
        self.store.confirm(self.id, self.assumed).await?;
        for (start, pane) in panes {
            self.partition.panes.put_cold(start, pane);
        }
        let mut found = vec![None; questions.keys.len()];
        for (number, offset) in stored {
            if let Ok(at) = questions.keys.binary_search(&number) {
                found[at] = Some(offset);
            }
        }
        Ok((questions.keys, found))
    }

    /// Rows and dead letters, then panes, then the note that they are written: all acknowledged when it returns.
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

    /// Notes in Cassandra that everything up to here is written. The commit comes after it, so a state file that is ahead of the
    /// note proves that Cassandra lost history. A replay is behind the note until it has caught up.
    async fn note_written(&mut self) -> Result<(), ProcessorError> {
        fail_point!("before_note");
        let written_to = self.partition.position.next_offset;
        self.store.note_written(self.id, written_to, self.assumed).await?;
        self.assumed.noted = self.assumed.noted.max(Some(written_to));
        Ok(())
    }

    /// Metrics of a committed batch.
    fn show(&self, chunk: &Chunk, before: &Position, applied: &Applied, times: &StepTimes) {
        let position = &self.partition.position;
        self.committed.store(position.next_offset, Ordering::Release);
        self.metrics.committed(self.id, &before.totals, &position.totals, position.next_offset);
        self.metrics.batch(times, applied.rows.len());
        self.metrics.looked_up.inc_by(applied.looked_up as u64);
        self.metrics.cold_events.inc_by(applied.cold as u64);
        self.metrics.partition(self.id, &self.partition);
        let oldest = chunk.events.first().map_or(0, |e| e.produced_at_us);
        if oldest > 0 {
            let micros = chrono::Utc::now().timestamp_micros().saturating_sub(oldest).max(0);
            let histogram = self.metrics.latency.with_label_values(&[] as &[&str]);
            histogram.observe(micros as f64 / 1e6);
        }
    }

    /// Whether a replay has not caught up. Meanwhile nothing is published: below `count_from` the totals are those of a later
    /// offset.
    fn replays(&self) -> bool {
        let position = &self.partition.position;
        position.next_offset < position.count_from
    }

    /// Publishes in the background: it may fall behind the commit by one batch, and never runs ahead of it.
    fn publish(&self, batch: BatchRecord) -> JoinHandle<Result<(), ProcessorError>> {
        let (store, id) = (Arc::clone(&self.store), self.id);
        let (position, assumed) = (self.partition.position, self.assumed);
        let replays = self.replays();
        tokio::spawn(async move {
            fail_point!("in_publish");
            if replays { Ok(()) } else { store.publish(id, &position, assumed, Some(&batch)).await }
        })
    }
}

async fn finish(publishing: Option<JoinHandle<Result<(), ProcessorError>>>) -> Result<(), ProcessorError> {
    match publishing {
        None => Ok(()),
        Some(task) => task.await.unwrap_or_else(|e| Err(ProcessorError::Fatal(format!("publishing: {e}")))),
    }
}

async fn timed<T>(seconds: &mut f64, work: impl Future<Output = T>) -> T {
    let started = Instant::now();
    let done = work.await;
    *seconds = started.elapsed().as_secs_f64();
    done
}
