//! Recomputes panes and totals from the event rows and compares them with the stored ones. Both tables are read in time
//! order and one pane is held at a time, so memory is bounded and the duration is linear in the number of rows.
//! Verification can run beside a processor, because each pane row is compared only with the event rows below its
//! `upto`.
//!
//! [`Verifier`] works one partition at a time. [`command`] is `stream-processor verify`, and [`daily`] verifies one day.
//! `compare` defines the differences, `rows` reads Cassandra, `log` compares with the Kafka log, and `rebuild` rewrites
//! panes.

pub mod command;
mod compare;
pub mod daily;
mod log;
mod rebuild;
mod rows;

use crate::count::partition::LogPosition;
use crate::count::windows::pane::{Pane, PaneShape};
use crate::error::ProcessorError;
use crate::io::store::Store;
use crate::io::store::cassandra::CassandraStore;
use chrono::{DateTime, SecondsFormat};
use common::contracts::event::floor_to;
use common::contracts::stream::Definition;
use compare::{EventRow, Expiry, Lowest, differences, fold, limits};
use indicatif::ProgressBar;
use rows::RowReader;
use scylla::client::session::Session;
use std::ops::Range;
use std::sync::Arc;

/// Maximum number of differences that are described. Further ones are only counted.
const MAX_SHOWN: usize = 50;

/// The servers and names from which a stream is read.
pub struct Sources {
    /// Session for reading rows.
    pub session: Arc<Session>,
    /// Keyspace of the stream's tables.
    pub keyspace: String,
    /// Definition of the stream.
    pub definition: Definition,
    /// Kafka bootstrap servers, for reading the log.
    pub brokers: String,
    /// Events topic.
    pub topic: String,
    /// Store for reading progress rows and writing rebuilt panes.
    pub store: CassandraStore,
}

/// Verifies one stream.
pub struct Verifier {
    sources: Sources,
    reader: RowReader,
    shape: PaneShape,
    /// Maximum bytes for the event rows of one pane, or for the keys of one pass over the log.
    memory_bytes: usize,
}

/// Differences between the stored values and the values recomputed from their source.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Differences {
    /// Number of all differences.
    pub count: u64,
    /// Descriptions of the first ones.
    pub shown: Vec<String>,
}

impl Differences {
    fn note(&mut self, line: impl FnOnce() -> String) {
        self.count += 1;
        if self.shown.len() < MAX_SHOWN {
            self.shown.push(line());
        }
    }
}

/// The result of verifying one or more partitions.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Outcome {
    /// Number of event rows read.
    pub rows: u64,
    /// Number of pane rows compared or rebuilt.
    pub pane_rows: u64,
    /// Start of the first and end of the last compared pane, in Unix milliseconds. `None` if no pane was compared.
    pub covered: Option<(i64, i64)>,
    /// Number of panes that were not compared, because some of their event rows may have expired.
    pub expired_panes: u64,
    /// Number of partitions whose total was only checked as an upper bound of the rows, because some event rows may
    /// have expired.
    pub expired_totals: u64,
    /// Number of panes read in several parts, because their event rows exceed the memory bound.
    pub panes_in_parts: u64,
    /// Number of records of the Kafka log compared.
    pub records: u64,
    /// Number of records of the Kafka log that were not compared, because their rows may have expired.
    pub expired_records: u64,
    /// Number of passes over the log and its rows. Memory holds the keys of one pass at a time.
    pub log_passes: u64,
    /// The differences found.
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
        let room = MAX_SHOWN.saturating_sub(self.differences.shown.len());
        self.differences.shown.extend(other.differences.shown.into_iter().take(room));
    }

    fn cover(&mut self, pane: Range<i64>) {
        let (from, to) = self.covered.unwrap_or((pane.start, pane.end));
        self.covered = Some((from.min(pane.start), to.max(pane.end)));
    }
}

/// A range of event times within one bucket of one Kafka partition, in Unix milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Span {
    partition: i32,
    /// Start of the bucket.
    bucket: i64,
    from_ms: i64,
    to_ms: i64,
}

/// What to verify of a partition: its position, and the spans of time that have event rows or pane rows.
pub struct Scope {
    partition: i32,
    position: LogPosition,
    spans: Vec<Span>,
    /// Whether the spans cover all event times. Totals can only be compared then.
    is_complete: bool,
}

fn failed(cause: impl std::fmt::Display) -> ProcessorError {
    ProcessorError::Retryable(format!("cassandra: {cause}"))
}

fn now_ms() -> i64 {
    chrono::Utc::now().timestamp_millis()
}

/// Formats Unix milliseconds as RFC 3339.
fn rfc3339(ms: i64) -> String {
    DateTime::from_timestamp_millis(ms).unwrap_or_default().to_rfc3339_opts(SecondsFormat::AutoSi, true)
}

impl Verifier {
    /// Prepares the statements. `memory_bytes` bounds the event rows or keys held in memory.
    pub async fn new(sources: Sources, memory_bytes: usize) -> Result<Verifier, ProcessorError> {
        let session = Arc::clone(&sources.session);
        let reader = RowReader::new(session, &sources.keyspace, &sources.definition).await?;
        let shape = PaneShape::new(&sources.definition);
        Ok(Verifier { sources, reader, shape, memory_bytes })
    }

    /// Determines what to verify of each of `partitions`: all event times, or those in `times` (Unix milliseconds,
    /// extended to whole panes). Positions are read before the buckets, so the buckets contain the rows of all events
    /// below a position.
    pub async fn scopes(
        &self,
        partitions: impl Iterator<Item = i32>,
        times: Option<Range<i64>>,
    ) -> Result<Vec<Scope>, ProcessorError> {
        let mut scopes = Vec::new();
        for partition in partitions {
            let progress = self.sources.store.progress(partition).await?;
            let position = progress.map(|progress| progress.position).unwrap_or_default();
            scopes.push(Scope { partition, position, spans: Vec::new(), is_complete: times.is_none() });
        }
        let mut buckets = self.reader.buckets().await?;
        let definition = &self.sources.definition;
        let (pane_ms, bucket_ms) = (definition.windows.pane_ms, definition.store.bucket.millis());
        let (from, to) = times.map_or((i64::MIN, i64::MAX), |times| {
            let last = floor_to(times.end.saturating_sub(1), pane_ms);
            (floor_to(times.start, pane_ms), last.saturating_add(pane_ms))
        });
        for scope in &mut scopes {
            let partition = scope.partition;
            let clipped = buckets.remove(&partition).unwrap_or_default().into_iter().map(|bucket| {
                let (from_ms, to_ms) = (bucket.max(from), bucket.saturating_add(bucket_ms).min(to));
                Span { partition, bucket, from_ms, to_ms }
            });
            scope.spans = clipped.filter(|span| span.from_ms < span.to_ms).collect();
        }
        Ok(scopes)
    }

    /// Compares the stored panes of one partition with its event rows. Also compares the total if the scope covers all
    /// event times.
    pub async fn compare(&self, scope: &Scope, progress: &ProgressBar) -> Result<Outcome, ProcessorError> {
        let mut outcome = Outcome::default();
        let mut counted = 0;
        start_progress(progress, scope.partition, "panes", scope.spans.len() as u64);
        for span in &scope.spans {
            counted += self.compare_span(span, scope.position.next_offset, &mut outcome).await?;
            progress.inc(1);
        }
        if scope.is_complete {
            self.compare_total(scope, counted, &mut outcome).await?;
        }
        Ok(outcome)
    }

    /// Compares the panes of one span. Returns the number of event rows below `next_offset`.
    async fn compare_span(
        &self,
        span: &Span,
        next_offset: i64,
        outcome: &mut Outcome,
    ) -> Result<i64, ProcessorError> {
        let (expiry, pane_ms) = (self.expiry(), self.sources.definition.windows.pane_ms);
        let mut panes = self.reader.panes(span).await?;
        let mut events = self.reader.events(span).await?;
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
            if expiry.is_possible(start, now_ms()) {
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
            for line in self.compare_again(span, start, next_offset).await? {
                let at = rfc3339(start);
                outcome.differences.note(|| format!("partition {}, pane {at}: {line}", span.partition));
            }
        }
        Ok(counted)
    }

    /// Compares one pane again, with fresh reads. The stored rows are read first, so all events that a running
    /// processor adds afterwards are above their `upto`. Pages of event rows of a whole span may be older than the pane
    /// rows.
    async fn compare_again(
        &self,
        span: &Span,
        start: i64,
        next_offset: i64,
    ) -> Result<Vec<String>, ProcessorError> {
        let mut stored = self.sources.store.load_panes(span.partition, &[start].into()).await?;
        let stored = stored.remove(&start).unwrap_or_else(|| Pane::empty(&self.shape));
        let limits = limits(&self.shape, &stored, next_offset);
        let expected = self.read_pane(span, start, &limits).await?;
        Ok(differences(&self.shape, &stored, &expected))
    }

    /// Recomputes one pane from its event rows. If they exceed the memory bound, they are read once for each part.
    /// Parts are in log order, because the order affects floating-point sums.
    async fn read_pane(&self, span: &Span, start: i64, limits: &[i64]) -> Result<Pane, ProcessorError> {
        let to_ms = start.saturating_add(self.sources.definition.windows.pane_ms);
        let span = Span { from_ms: start, to_ms, ..*span };
        let mut expected = Pane::empty(&self.shape);
        let mut from = Some(i64::MIN);
        while let Some(offset) = from {
            let mut lowest = self.lowest(offset);
            self.reader.events(&span).await?.take(start, |row| lowest.push(row)).await?;
            let (rows, rest) = lowest.into_rows();
            fold(&self.shape, &mut expected, limits, &rows);
            from = rest;
        }
        Ok(expected)
    }

    async fn compare_total(
        &self,
        scope: &Scope,
        counted: i64,
        outcome: &mut Outcome,
    ) -> Result<(), ProcessorError> {
        let created_at = self.reader.created_at().await?.unwrap_or(0);
        let expired = self.expiry().is_possible(created_at, now_ms());
        outcome.expired_totals += u64::from(expired);
        let (events, next_offset) = (scope.position.totals.events, scope.position.next_offset);
        if counted > events || (counted < events && !expired) {
            outcome.differences.note(|| {
                format!(
                    "partition {}: the progress row counts {events} events below offset {next_offset}, \
                     the table has {counted}",
                    scope.partition
                )
            });
        }
        Ok(())
    }

    fn expiry(&self) -> Expiry {
        let definition = &self.sources.definition;
        let ttl_ms = definition.store.least_ttl_seconds().saturating_mul(1000);
        Expiry { ttl_ms, ahead_ms: definition.event.ahead_ms }
    }

    fn lowest(&self, from: i64) -> Lowest {
        let row = EventRow::bytes(self.sources.definition.windows.measures.len());
        // `Lowest` holds up to twice its capacity while it reads.
        Lowest::new(from, self.memory_bytes / (2 * row))
    }
}

/// Resets the progress bar for the next step of a partition.
fn start_progress(progress: &ProgressBar, partition: i32, what: &str, steps: u64) {
    progress.reset();
    progress.set_length(steps);
    progress.set_message(format!("partition {partition}, {what}"));
}
