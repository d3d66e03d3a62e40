//! Reads pane rows, and the event time up to which panes are complete. [`crate::readers::windows`] computes windows from them.

use crate::contracts::event::floor_to;
use crate::contracts::schema::panes_table;
use crate::contracts::stream::Definition;
use crate::readers::windows::{InvalidWindowQuery, Measure, PaneSums, Sum, WindowParameters, WindowQuery};
use futures::{StreamExt, TryStreamExt};
use scylla::client::session::Session;
use scylla::errors::{ExecutionError, IntoRowsResultError, PrepareError, RowsError};
use scylla::statement::prepared::PreparedStatement;
use scylla::value::{CqlTimestamp, CqlValue, Row};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Concurrent requests of one query.
const IN_FLIGHT: usize = 8;
/// Most panes read by one request.
const PANES_PER_REQUEST: usize = 200;

/// Why panes could not be read.
#[derive(Debug, thiserror::Error)]
pub enum PaneReadError {
    /// The tables do not exist.
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

/// The prepared statements that read the panes of one stream.
#[derive(Debug)]
pub struct PaneReader {
    session: Arc<Session>,
    definition: Definition,
    panes: PreparedStatement,
    progress: PreparedStatement,
    partitions: i32,
}

/// Panes of one Kafka partition in one Cassandra partition.
struct Request<'a> {
    bucket: i64,
    partition: i32,
    starts: &'a [CqlTimestamp],
}

impl PaneReader {
    /// Prepares the statements. Fails if `init` has not run for the stream.
    pub async fn new(
        session: Arc<Session>,
        keyspace: &str,
        definition: &Definition,
    ) -> Result<PaneReader, PaneReadError> {
        let measures = definition.windows.measures.iter();
        let measures: String = measures.map(|m| format!(", {m}_count, {m}_sum, {m}_min, {m}_max")).collect();
        let panes = format!(
            "SELECT pane_start, value, count{measures} FROM {keyspace}.{} \
             WHERE bucket = ? AND kafka_partition = ? AND pane_start IN ? AND dimension = ?",
            panes_table(definition)
        );
        let progress = format!("SELECT seen_to FROM {keyspace}.partition_progress WHERE stream = ?");
        let registered = format!("SELECT partitions FROM {keyspace}.streams WHERE stream = ?");
        let registered = session.prepare(registered).await?;
        let found = session.execute_unpaged(&registered, (&definition.stream.name,)).await?;
        let found = found.into_rows_result()?.maybe_first_row::<(Option<i32>,)>();
        let partitions = found.map_err(|e| PaneReadError::Failed(e.to_string()))?.and_then(|(n,)| n);
        let partitions = partitions.ok_or_else(|| {
            PaneReadError::Failed(format!(
                "stream `{}` is not registered; run `stream-processor init`",
                definition.stream.name
            ))
        })?;
        Ok(PaneReader {
            panes: session.prepare(panes).await?,
            progress: session.prepare(progress).await?,
            session,
            definition: definition.clone(),
            partitions,
        })
    }

    /// The definition of the stream.
    pub fn definition(&self) -> &Definition {
        &self.definition
    }

    /// Validates a query. Fails if it does not fit the stream or would read or return too many values.
    pub fn query(
        &self,
        parameters: &WindowParameters<'_>,
        now_ms: i64,
    ) -> Result<WindowQuery, InvalidWindowQuery> {
        WindowQuery::new(&self.definition, self.partitions, parameters, now_ms)
    }

    /// Reads all panes that `query` needs.
    pub async fn panes(&self, query: &WindowQuery) -> Result<PaneSums, PaneReadError> {
        let (span, pane_ms, bucket) =
            (query.panes(), self.definition.windows.pane_ms, self.definition.store.bucket);
        let mut starts: BTreeMap<i64, Vec<CqlTimestamp>> = BTreeMap::new();
        let mut start = floor_to(span.start, pane_ms);
        while start < span.end {
            starts.entry(bucket.start_of(start)).or_default().push(CqlTimestamp(start));
            start += pane_ms;
        }
        let mut requests = Vec::new();
        for (bucket, starts) in &starts {
            for starts in starts.chunks(PANES_PER_REQUEST) {
                requests.extend((0..self.partitions).map(|partition| Request {
                    bucket: *bucket,
                    partition,
                    starts,
                }));
            }
        }
        let reads: Vec<_> =
            requests.into_iter().map(|request| self.read(request, &query.dimension)).collect();
        // The order of the requests is fixed, so sums of floats are reproducible.
        let read = futures::stream::iter(reads).buffered(IN_FLIGHT);
        read.try_fold(PaneSums::new(), async |mut panes, rows| {
            for (start, value, sum) in rows {
                panes.entry((value, start)).or_default().add(&sum);
            }
            Ok(panes)
        })
        .await
    }

    async fn read(
        &self,
        request: Request<'_>,
        dimension: &str,
    ) -> Result<Vec<(i64, String, Sum)>, PaneReadError> {
        let failed = |cause: &dyn std::fmt::Display| PaneReadError::Failed(cause.to_string());
        let key = (CqlTimestamp(request.bucket), request.partition, request.starts, dimension);
        let pages = self.session.execute_iter(self.panes.clone(), key).await.map_err(|e| failed(&e))?;
        let mut rows = pages.rows_stream::<Row>().map_err(|e| failed(&e))?;
        let mut read = Vec::new();
        while let Some(row) = rows.try_next().await.map_err(|e| failed(&e))? {
            read.push(pane_row(&row).ok_or_else(|| failed(&"a pane row of another layout"))?);
        }
        Ok(read)
    }

    /// The time up to which panes are complete, in Unix milliseconds: the lowest watermark of all partitions, minus
    /// the allowed lateness. `None` if no partition has seen an event.
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

/// Decodes the start, the group value and the sums of a pane row. `None` if the columns do not match the statement.
fn pane_row(row: &Row) -> Option<(i64, String, Sum)> {
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
    let measures = (3..row.columns.len()).step_by(4).map(measure).collect::<Option<_>>()?;
    let sum = Sum { count: column(2)?.as_bigint()?, measures };
    Some((column(0)?.as_cql_timestamp()?.0, column(1)?.as_text()?.clone(), sum))
}
