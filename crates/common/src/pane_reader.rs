//! Reads pane rows and how far they are settled. What is made of them is [`crate::windows`]'s.

use crate::schema::panes_table;
use crate::stream::Definition;
use crate::windows::{Measure, Panes, Question, Sum};
use futures::{StreamExt, TryStreamExt};
use scylla::client::session::Session;
use scylla::errors::{ExecutionError, IntoRowsResultError, PrepareError, RowsError};
use scylla::statement::prepared::PreparedStatement;
use scylla::value::{CqlTimestamp, CqlValue, Row};
use std::sync::Arc;

/// Requests in flight for one question.
const IN_FLIGHT: usize = 8;

/// Panes cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum PaneReadError {
    /// The tables are not there.
    #[error("cassandra: {0}; run `stream-processor init` for this stream first")]
    NotPrepared(#[from] PrepareError),
    /// A request failed.
    #[error("cassandra: {0}")]
    Failed(String),
}

impl From<ExecutionError> for PaneReadError {
    fn from(cause: ExecutionError) -> PaneReadError {
        PaneReadError::Failed(cause.to_string())
    }
}

impl From<IntoRowsResultError> for PaneReadError {
    fn from(cause: IntoRowsResultError) -> PaneReadError {
        PaneReadError::Failed(cause.to_string())
    }
}

impl From<RowsError> for PaneReadError {
    fn from(cause: RowsError) -> PaneReadError {
        PaneReadError::Failed(cause.to_string())
    }
}

/// The prepared reads of one stream.
#[derive(Debug)]
pub struct PaneReader {
    session: Arc<Session>,
    definition: Definition,
    panes: PreparedStatement,
    progress: PreparedStatement,
    partitions: i32,
}

impl PaneReader {
    /// Prepares them; fails where `init` has not run for the stream.
    pub async fn new(
        session: Arc<Session>,
        keyspace: &str,
        definition: &Definition,
    ) -> Result<PaneReader, PaneReadError> {
        let measures = definition.windows.measures.iter();
        let measures: String = measures.map(|m| format!(", {m}_count, {m}_sum, {m}_min, {m}_max")).collect();
        let panes = format!(
            "SELECT pane_start, dimension, value, count{measures} FROM {keyspace}.{} \
             WHERE bucket = ? AND kafka_partition = ? AND pane_start >= ? AND pane_start < ?",
            panes_table(definition)
        );
        let progress = format!("SELECT seen_to FROM {keyspace}.partition_progress WHERE stream = ?");
        let of_stream = format!("SELECT partitions FROM {keyspace}.streams WHERE stream = ?");
        let of_stream = session.prepare(of_stream).await?;
        let found = session.execute_unpaged(&of_stream, (&definition.stream.name,)).await?;
        let found = found.into_rows_result()?.maybe_first_row::<(Option<i32>,)>();
        let partitions = found.map_err(|e| PaneReadError::Failed(e.to_string()))?.and_then(|(n,)| n);
        let partitions = partitions.ok_or_else(|| {
            PaneReadError::Failed(format!("stream `{}` is not registered", definition.stream.name))
        })?;
        Ok(PaneReader {
            panes: session.prepare(panes).await?,
            progress: session.prepare(progress).await?,
            session,
            definition: definition.clone(),
            partitions,
        })
    }

    /// The stream whose panes it reads.
    pub fn definition(&self) -> &Definition {
        &self.definition
    }

    /// Every pane that `question` needs.
    pub async fn panes(&self, question: &Question) -> Result<Panes, PaneReadError> {
        let (span, bucket) = (question.panes(), self.definition.store.bucket);
        let mut buckets = Vec::new();
        let mut start = bucket.start_of(span.start);
        while start < span.end {
            buckets.push(start);
            start += bucket.millis();
        }
        let keys = buckets.iter().flat_map(|bucket| (0..self.partitions).map(move |p| (*bucket, p)));
        let reads: Vec<_> = keys.map(|key| self.of_partition(key, question)).collect();
        let parts: Vec<Panes> =
            futures::stream::iter(reads).buffer_unordered(IN_FLIGHT).try_collect().await?;
        let mut panes = Panes::new();
        for (key, sum) in parts.into_iter().flatten() {
            panes.entry(key).or_default().add(&sum);
        }
        Ok(panes)
    }

    async fn of_partition(
        &self,
        (bucket, partition): (i64, i32),
        question: &Question,
    ) -> Result<Panes, PaneReadError> {
        let span = question.panes();
        let key = (CqlTimestamp(bucket), partition, CqlTimestamp(span.start), CqlTimestamp(span.end));
        let pages = self.session.execute_iter(self.panes.clone(), key).await;
        let pages = pages.map_err(|e| PaneReadError::Failed(e.to_string()))?;
        let mut rows = pages.rows_stream::<Row>().map_err(|e| PaneReadError::Failed(e.to_string()))?;
        let mut panes = Panes::new();
        while let Some(row) = rows.try_next().await.map_err(|e| PaneReadError::Failed(e.to_string()))? {
            let (start, dimension, value, sum) = pane_row(&row)
                .ok_or_else(|| PaneReadError::Failed("a pane row of another layout".to_owned()))?;
            if dimension == question.dimension {
                panes.entry((value, start)).or_default().add(&sum);
            }
        }
        Ok(panes)
    }

    /// Until when no event is expected any more, in Unix milliseconds: the slowest partition's highest event time less the allowed
    /// lateness. `None`: no partition has seen an event.
    pub async fn settled_ms(&self) -> Result<Option<i64>, PaneReadError> {
        let found = self.session.execute_unpaged(&self.progress, (&self.definition.stream.name,)).await?;
        let found = found.into_rows_result()?;
        let mut slowest: Option<i64> = None;
        for row in found.rows::<(Option<i64>,)>()? {
            let (seen_to,) = row.map_err(|e| PaneReadError::Failed(e.to_string()))?;
            slowest = match (slowest, seen_to) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            };
        }
        Ok(slowest.map(|seen_to| seen_to - self.definition.windows.lateness_ms))
    }
}

fn pane_row(row: &Row) -> Option<(i64, String, String, Sum)> {
    let column = |i: usize| row.columns.get(i).and_then(Option::as_ref);
    let measure = |at: usize| {
        let number = |i: usize| column(i).and_then(CqlValue::as_double);
        Some(Measure {
            count: column(at)?.as_bigint()?,
            sum: number(at + 1)?,
            min: number(at + 2),
            max: number(at + 3),
        })
    };
    let measures = (4..row.columns.len()).step_by(4).map(measure).collect::<Option<_>>()?;
    let sum = Sum { count: column(3)?.as_bigint()?, measures };
    let (start, dimension, value) = (column(0)?.as_cql_timestamp()?.0, column(1)?, column(2)?);
    Some((start, dimension.as_text()?.clone(), value.as_text()?.clone(), sum))
}
