//! Recomputes panes and totals from the event rows and compares them with what is stored, in bounded memory and a time that grows
//! with the rows: both tables are read in the order of time, and one pane is held at a time. Works beside a running
//! processor: each pane row is compared with the event rows below its own `upto`.
//!
//! [`Verifier`] is what a service calls, partition by partition; [`command`] is `stream-processor verify`. `compare` says what
//! a difference is, `rows` reads Cassandra, `log` compares with Kafka's log, and `rebuild` rewrites panes.

pub mod command;
mod compare;
mod log;
mod rebuild;
mod rows;

use crate::error::ProcessorError;
use crate::partition::Position;
use crate::store::Store;
use crate::store::cassandra::CassandraStore;
use crate::windows::pane::{Pane, PaneShape};
use chrono::{DateTime, SecondsFormat};
use common::event::floor_to;
use common::stream::Definition;
use compare::{EventRow, Lowest, differences, fold, limits, may_have_expired};
use indicatif::ProgressBar;
use rows::Reader;
use scylla::client::session::Session;
use std::ops::Range;
use std::sync::Arc;

/// Differences kept in words; the rest is only counted.
const SHOWN_MOST: usize = 50;

/// Where a stream is.
pub struct Sources {
    /// Session.
    pub session: Arc<Session>,
    /// Keyspace.
    pub keyspace: String,
    /// Definition.
    pub definition: Definition,
    /// Kafka, for the log.
    pub brokers: String,
    /// Events topic.
    pub topic: String,
    /// Store, for progress rows and for writing rebuilt panes.
    pub store: CassandraStore,
}

/// Verifies one stream.
pub struct Verifier {
    sources: Sources,
    reader: Reader,
    shape: PaneShape,
    /// Bytes that the event rows of one pane, or the keys of one pass over the log, may take.
    memory_bytes: usize,
}

/// Differences between what is stored and what it was made from.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Differences {
    /// How many there are.
    pub count: u64,
    /// The first of them in words.
    pub shown: Vec<String>,
}

impl Differences {
    fn note(&mut self, line: impl FnOnce() -> String) {
        self.count += 1;
        if self.shown.len() < SHOWN_MOST {
            self.shown.push(line());
        }
    }
}

/// The result of verifying one partition or several.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Outcome {
    /// Event rows read.
    pub rows: u64,
    /// Rows of panes compared or rebuilt.
    pub pane_rows: u64,
    /// Span of the panes compared, in Unix milliseconds; `None`: no pane was.
    pub covered: Option<(i64, i64)>,
    /// Panes that could not be compared, because event rows of them may have expired.
    pub expired_panes: u64,
    /// Partitions whose total could not be compared, because some of their event rows may have expired. That the table
    /// holds no more events than were counted is checked all the same.
    pub expired_totals: u64,
    /// Panes of more event rows than memory may hold, read in several parts.
    pub panes_in_parts: u64,
    /// Records of Kafka's log compared.
    pub records: u64,
    /// Records of Kafka's log that could not be compared, because the row of each may have expired.
    pub expired_records: u64,
    /// Times that the log and its rows were read, so that memory holds the keys of one pass.
    pub log_passes: u64,
    /// What differs.
    pub differences: Differences,
}

impl Outcome {
    /// Adds the outcome of another partition.
    pub fn add(&mut self, other: Outcome) {
        self.rows += other.rows;
        self.pane_rows += other.pane_rows;
        self.covered = match (self.covered, other.covered) {
            (Some(a), Some(b)) => Some((a.0.min(b.0), a.1.max(b.1))),
            (a, b) => a.or(b),
        };
        self.expired_panes += other.expired_panes;
        self.expired_totals += other.expired_totals;
        self.panes_in_parts += other.panes_in_parts;
        self.records += other.records;
        self.expired_records += other.expired_records;
        self.log_passes += other.log_passes;
        self.differences.count += other.differences.count;
        let room = SHOWN_MOST.saturating_sub(self.differences.shown.len());
        self.differences.shown.extend(other.differences.shown.into_iter().take(room));
    }

    fn cover(&mut self, pane: Range<i64>) {
        let (from, to) = self.covered.unwrap_or((pane.start, pane.end));
        self.covered = Some((from.min(pane.start), to.max(pane.end)));
    }
}

/// A span of event times within one bucket of one Kafka partition, in Unix milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stretch {
    partition: i32,
    /// Start of the bucket.
    bucket: i64,
    from_ms: i64,
    to_ms: i64,
}

/// Where a partition stands, and the stretches of time that hold anything of it.
pub struct Standing {
    partition: i32,
    position: Position,
    stretches: Vec<Stretch>,
    /// Whether the stretches are all there are.
    whole: bool,
}

fn failed(cause: impl std::fmt::Display) -> ProcessorError {
    ProcessorError::Retryable(format!("cassandra: {cause}"))
}

fn now_ms() -> i64 {
    chrono::Utc::now().timestamp_millis()
}

/// Unix milliseconds as people read them.
fn spelled(ms: i64) -> String {
    DateTime::from_timestamp_millis(ms).unwrap_or_default().to_rfc3339_opts(SecondsFormat::AutoSi, true)
}

impl Verifier {
    /// Prepares the reads. `memory_bytes` bounds the event rows or keys held at once.
    pub async fn new(sources: Sources, memory_bytes: usize) -> Result<Verifier, ProcessorError> {
        let session = Arc::clone(&sources.session);
        let reader = Reader::new(session, &sources.keyspace, &sources.definition).await?;
        let shape = PaneShape::new(&sources.definition);
        Ok(Verifier { sources, reader, shape, memory_bytes })
    }

    /// Where each of `partitions` stands, over all event times or over those of `span` (Unix milliseconds, widened to whole
    /// panes). Positions are read before the buckets, so the rows of all events below a position are in them.
    pub async fn standings(
        &self,
        partitions: impl Iterator<Item = i32>,
        span: Option<Range<i64>>,
    ) -> Result<Vec<Standing>, ProcessorError> {
        let mut standings = Vec::new();
        for partition in partitions {
            let progress = self.sources.store.progress(partition).await?;
            let position = progress.map(|progress| progress.position).unwrap_or_default();
            standings.push(Standing { partition, position, stretches: Vec::new(), whole: span.is_none() });
        }
        let mut buckets = self.reader.buckets().await?;
        let definition = &self.sources.definition;
        let (pane_ms, bucket_ms) = (definition.windows.pane_ms, definition.store.bucket.millis());
        let (from, to) = span.map_or((i64::MIN, i64::MAX), |span| {
            let last = floor_to(span.end.saturating_sub(1), pane_ms);
            (floor_to(span.start, pane_ms), last.saturating_add(pane_ms))
        });
        for standing in &mut standings {
            let partition = standing.partition;
            let clipped = buckets.remove(&partition).unwrap_or_default().into_iter().map(|bucket| {
                let (from_ms, to_ms) = (bucket.max(from), bucket.saturating_add(bucket_ms).min(to));
                Stretch { partition, bucket, from_ms, to_ms }
            });
            standing.stretches = clipped.filter(|stretch| stretch.from_ms < stretch.to_ms).collect();
        }
        Ok(standings)
    }

    /// Compares the stored panes of one partition with its event rows, and the total where the standing is that of all times.
    pub async fn compare(
        &self,
        standing: &Standing,
        progress: &ProgressBar,
    ) -> Result<Outcome, ProcessorError> {
        let mut outcome = Outcome::default();
        let mut counted = 0;
        begin(progress, standing.partition, "panes", standing.stretches.len() as u64);
        for stretch in &standing.stretches {
            counted += self.compare_stretch(stretch, standing.position.next_offset, &mut outcome).await?;
            progress.inc(1);
        }
        if standing.whole {
            self.compare_total(standing, counted, &mut outcome).await?;
        }
        Ok(outcome)
    }

    /// Returns how many event rows lie below `next_offset`.
    async fn compare_stretch(
        &self,
        stretch: &Stretch,
        next_offset: i64,
        outcome: &mut Outcome,
    ) -> Result<i64, ProcessorError> {
        let (ttl_ms, pane_ms) = (self.ttl_ms(), self.sources.definition.windows.pane_ms);
        let mut panes = self.reader.panes(stretch).await?;
        let mut events = self.reader.events(stretch).await?;
        let mut counted = 0;
        while let Some(start) = [panes.next_start(), events.next_start()].into_iter().flatten().min() {
            let stored = panes.take(start).await?;
            let mut lowest = self.lowest(i64::MIN);
            let take = |row: EventRow| {
                outcome.rows += 1;
                counted += i64::from(row.offset < next_offset);
                lowest.push(row);
            };
            events.take(start, take).await?;
            if may_have_expired(start, ttl_ms, now_ms()) {
                outcome.expired_panes += 1;
                continue;
            }
            outcome.pane_rows += self.shape.names.len() as u64;
            outcome.cover(start..start.saturating_add(pane_ms));
            let (rows, rest) = lowest.into_rows();
            outcome.panes_in_parts += u64::from(rest.is_some());
            let mut expected = Pane::empty(&self.shape);
            fold(&self.shape, &mut expected, &limits(&self.shape, &stored, next_offset), &rows);
            if rest.is_none() && differences(&self.shape, &stored, &expected).is_empty() {
                continue;
            }
            for line in self.compare_again(stretch, start, next_offset).await? {
                let at = spelled(start);
                outcome.differences.note(|| format!("partition {}, pane {at}: {line}", stretch.partition));
            }
        }
        Ok(counted)
    }

    /// Compares one pane by itself. Its stored rows are read first: what a running processor adds afterwards lies above
    /// their `upto`, while the pages of a whole stretch may be older than the pane rows beside them.
    async fn compare_again(
        &self,
        stretch: &Stretch,
        start: i64,
        next_offset: i64,
    ) -> Result<Vec<String>, ProcessorError> {
        let mut stored = self.sources.store.load_panes(stretch.partition, &[start].into()).await?;
        let stored = stored.remove(&start).unwrap_or_else(|| Pane::empty(&self.shape));
        let limits = limits(&self.shape, &stored, next_offset);
        let expected = self.read_pane(stretch, start, &limits).await?;
        Ok(differences(&self.shape, &stored, &expected))
    }

    /// What the event rows of one pane say. A pane of more rows than memory may hold is read once for each part of them, in
    /// the order of the log: sums of floats depend on it.
    async fn read_pane(&self, stretch: &Stretch, start: i64, limits: &[i64]) -> Result<Pane, ProcessorError> {
        let to_ms = start.saturating_add(self.sources.definition.windows.pane_ms);
        let stretch = Stretch { from_ms: start, to_ms, ..*stretch };
        let mut expected = Pane::empty(&self.shape);
        let mut from = Some(i64::MIN);
        while let Some(offset) = from {
            let mut lowest = self.lowest(offset);
            self.reader.events(&stretch).await?.take(start, |row| lowest.push(row)).await?;
            let (rows, rest) = lowest.into_rows();
            fold(&self.shape, &mut expected, limits, &rows);
            from = rest;
        }
        Ok(expected)
    }

    async fn compare_total(
        &self,
        standing: &Standing,
        counted: i64,
        outcome: &mut Outcome,
    ) -> Result<(), ProcessorError> {
        let created_at = self.reader.created_at().await?.unwrap_or(0);
        let expired = may_have_expired(created_at, self.ttl_ms(), now_ms());
        outcome.expired_totals += u64::from(expired);
        let (events, next_offset) = (standing.position.totals.events, standing.position.next_offset);
        if counted > events || (counted < events && !expired) {
            outcome.differences.note(|| {
                format!(
                    "partition {}: the progress row counts {events} events below offset {next_offset}, the table holds {counted}",
                    standing.partition
                )
            });
        }
        Ok(())
    }

    fn ttl_ms(&self) -> i64 {
        self.sources.definition.store.least_ttl_seconds().saturating_mul(1000)
    }

    fn lowest(&self, from: i64) -> Lowest {
        let row = EventRow::bytes(self.sources.definition.windows.measures.len());
        // Twice as many are held while more come in.
        Lowest::new(from, self.memory_bytes / (2 * row))
    }
}

fn begin(progress: &ProgressBar, partition: i32, what: &str, steps: u64) {
    progress.reset();
    progress.set_length(steps);
    progress.set_message(format!("partition {partition}, {what}"));
}
