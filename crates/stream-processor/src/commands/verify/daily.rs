//! Verifies one partition and one UTC day beside a running processor, and stores the outcome in table `verifications`.
//! `housekeeping.rs` decides when.

use super::{Outcome, Sources, Span, Verifier, failed, now_ms, rfc3339};
use crate::error::ProcessorError;
use crate::io::store::Store;
use common::contracts::event::{Bucket, floor_to};
use scylla::client::session::Session;
use scylla::statement::prepared::PreparedStatement;
use scylla::value::CqlTimestamp;
use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

/// Length of the parts of a day between which the verification rests.
const PART_MS: i64 = 3_600_000;
/// Memory for the event rows of one pane. A pane that needs more is read in several passes.
const MEMORY_BYTES: usize = 16 << 20;
/// Maximum number of differences that are logged and stored.
const MAX_STORED: usize = 10;

/// The stored outcome of verifying one partition for one day.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verification {
    /// Start of the day in Unix milliseconds.
    pub day_ms: i64,
    /// Number of event rows read.
    pub rows: i64,
    /// Number of differences between stored panes and event rows.
    pub differences: i64,
    /// When the verification finished, in Unix milliseconds.
    pub finished_at_ms: i64,
}

/// Verifies days and keeps the outcomes. Tests use a fake.
pub trait VerifyDay: Send + Sync {
    /// Returns the stored outcome of a day that starts at `day_ms`, if there is one.
    fn stored(
        &self,
        partition: i32,
        day_ms: i64,
    ) -> impl Future<Output = Result<Option<Verification>, ProcessorError>> + Send;

    /// Verifies a day and stores the outcome.
    fn verify(
        &self,
        partition: i32,
        day_ms: i64,
    ) -> impl Future<Output = Result<Verification, ProcessorError>> + Send;
}

/// Verifies days of one stream in Cassandra.
pub struct DayVerifier {
    verifier: Verifier,
    session: Arc<Session>,
    stream: String,
    instance: String,
    select: PreparedStatement,
    insert: PreparedStatement,
}

impl DayVerifier {
    /// Prepares the statements. `instance` is the name stored with the outcomes.
    pub async fn new(sources: Sources, instance: String) -> Result<DayVerifier, ProcessorError> {
        let (session, keyspace) = (Arc::clone(&sources.session), sources.keyspace.clone());
        let prepare = async |cql: String| session.prepare(cql).await.map_err(failed);
        Ok(DayVerifier {
            select: prepare(format!(
                "SELECT rows, differences, finished_at FROM {keyspace}.verifications \
                 WHERE stream = ? AND day = ? AND kafka_partition = ?"
            ))
            .await?,
            insert: prepare(format!(
                "INSERT INTO {keyspace}.verifications (stream, day, kafka_partition, rows, pane_rows, differences, \
                 first_differences, verified_by, started_at, finished_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
            ))
            .await?,
            stream: sources.definition.stream.name.clone(),
            instance,
            session: Arc::clone(&sources.session),
            verifier: Verifier::new(sources, MEMORY_BYTES).await?,
        })
    }

    /// Compares a day part by part. After each part it rests for as long as the part took, so that it uses at most half
    /// of what one client can read.
    async fn compare(&self, partition: i32, day: Range<i64>) -> Result<Outcome, ProcessorError> {
        let pane_ms = self.verifier.sources.definition.windows.pane_ms;
        let part_ms = (PART_MS / pane_ms).max(1) * pane_ms;
        let (mut outcome, mut from_ms) = (Outcome::default(), day.start);
        while from_ms < day.end {
            let to_ms = (from_ms + part_ms).min(day.end);
            let started = Instant::now();
            self.verifier.compare_times(partition, from_ms..to_ms, &mut outcome).await?;
            tokio::time::sleep(started.elapsed()).await;
            from_ms = to_ms;
        }
        Ok(outcome)
    }

    async fn store(
        &self,
        partition: i32,
        outcome: &Outcome,
        verification: &Verification,
        started_at_ms: i64,
    ) -> Result<(), ProcessorError> {
        let pane_rows = i64::try_from(outcome.pane_rows).unwrap_or(i64::MAX);
        let shown = &outcome.differences.shown;
        let values = (
            &self.stream,
            CqlTimestamp(verification.day_ms),
            partition,
            verification.rows,
            pane_rows,
            verification.differences,
            shown[..shown.len().min(MAX_STORED)].join("\n"),
            &self.instance,
            CqlTimestamp(started_at_ms),
            CqlTimestamp(verification.finished_at_ms),
        );
        self.session.execute_unpaged(&self.insert, values).await.map(drop).map_err(failed)
    }
}

impl VerifyDay for DayVerifier {
    async fn stored(&self, partition: i32, day_ms: i64) -> Result<Option<Verification>, ProcessorError> {
        let key = (&self.stream, CqlTimestamp(day_ms), partition);
        let found = self.session.execute_unpaged(&self.select, key).await.map_err(failed)?;
        let found = found.into_rows_result().map_err(failed)?;
        let row = found.maybe_first_row::<(i64, i64, CqlTimestamp)>().map_err(failed)?;
        Ok(row.map(|(rows, differences, finished_at)| Verification {
            day_ms,
            rows,
            differences,
            finished_at_ms: finished_at.0,
        }))
    }

    async fn verify(&self, partition: i32, day_ms: i64) -> Result<Verification, ProcessorError> {
        let started_at_ms = now_ms();
        let outcome = self.compare(partition, day_ms..day_ms + Bucket::Day.millis()).await?;
        let verification = Verification {
            day_ms,
            rows: i64::try_from(outcome.rows).unwrap_or(i64::MAX),
            differences: i64::try_from(outcome.differences.count).unwrap_or(i64::MAX),
            finished_at_ms: now_ms(),
        };
        self.store(partition, &outcome, &verification, started_at_ms).await?;
        let Verification { rows, differences, .. } = verification;
        tracing::info!(partition, day = rfc3339(day_ms), rows, differences, "verified a day");
        for difference in outcome.differences.shown.iter().take(MAX_STORED) {
            tracing::error!(difference, "a stored pane differs from its event rows");
        }
        Ok(verification)
    }
}

impl Verifier {
    /// Compares the panes of one partition that start in `times`, a range of whole panes in Unix milliseconds. Reads only
    /// the buckets of this range.
    async fn compare_times(
        &self,
        partition: i32,
        times: Range<i64>,
        outcome: &mut Outcome,
    ) -> Result<(), ProcessorError> {
        let progress = self.sources.store.progress(partition).await?;
        let next_offset = progress.map_or(0, |progress| progress.position.next_offset);
        let bucket_ms = self.sources.definition.store.bucket.millis();
        let mut bucket = floor_to(times.start, bucket_ms);
        while bucket < times.end {
            let (from_ms, to_ms) = (bucket.max(times.start), (bucket + bucket_ms).min(times.end));
            let span = Span { partition, bucket, from_ms, to_ms };
            self.compare_span(&span, next_offset, outcome).await?;
            bucket += bucket_ms;
        }
        Ok(())
    }
}
