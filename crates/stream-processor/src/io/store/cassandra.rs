//! The store in Cassandra. Writes event rows and pane rows in batches of one Cassandra partition each, and the progress
//! row that notes up to which offset they are written.

use super::progress::{LostHistory, ProgressRow, StoredProgress};
use super::requests::{Requests, StoreContext, backoff};
use super::rows::{EventRow, PaneRowValues, StoredEvent};
use super::statements::Statements;
use super::{Assumed, BatchRecord, Store};
use crate::count::partition::{LogPosition, StoredCopy};
use crate::count::windows::hot::Panes;
use crate::count::windows::pane::{Measure, Pane, PaneShape};
use crate::count::write_plan::{EventGroup, PaneGroup};
use crate::error::ProcessorError;
use crate::pipeline::start::ProgressFacts;
use crate::record::chunk::Chunk;
use common::contracts::event::{Bucket, floor_to};
use common::contracts::schema::{MAX_BATCH_ROWS, Resolution};
use common::contracts::stream::Definition;
use common::runtime::cassandra::Failure;
use common::runtime::shutdown::Shutdown;
use futures::future::try_join_all;
use scylla::errors::ExecutionError;
use scylla::response::query_result::QueryResult;
use scylla::value::CqlTimestamp;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::future::Future;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

const AFTER_OUTAGE: &str = "cassandra was unavailable: an older snapshot may have been restored";
/// Minimum time between two rows of a partition in table `batches`.
const BATCH_RECORD_INTERVAL: Duration = Duration::from_secs(1);
/// How often to check for each partition that Cassandra has not lost history. Restoring a snapshot takes longer than
/// this.
const HISTORY_CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// Maximum size of the panes loaded by one request. The driver holds a whole response in memory.
const LOAD_BYTES: usize = 256 << 10;
/// Maximum number of requests in flight that load panes, per partition.
const MAX_CONCURRENT_LOADS: usize = 4;

/// Reads and writes the tables of one stream.
pub struct CassandraStore {
    requests: Requests,
    statements: Statements,
    stream: String,
    bucket: Bucket,
    shape: PaneShape,
    recorded_at: PerPartition,
    checked_at: PerPartition,
}

/// Limits how often something is done for each partition.
struct PerPartition {
    interval: Duration,
    last: Mutex<HashMap<i32, Instant>>,
}

impl PerPartition {
    fn new(interval: Duration) -> PerPartition {
        PerPartition { interval, last: Mutex::default() }
    }

    fn is_due(&self, partition: i32) -> bool {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.get(&partition).is_none_or(|at| at.elapsed() >= self.interval)
    }

    fn done(&self, partition: i32) {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).insert(partition, Instant::now());
    }
}

fn now_ms() -> i64 {
    chrono::Utc::now().timestamp_millis()
}

impl CassandraStore {
    /// Checks once a second whether Cassandra answers, until shutdown, so that no outage is missed.
    pub async fn watch(&self, shutdown: &Shutdown) {
        self.requests.watch(shutdown).await;
    }

    /// Prepares every statement. Fails if `stream-processor init` has not been run.
    pub async fn new(
        keyspace: &str,
        definition: &Definition,
        context: StoreContext,
    ) -> Result<CassandraStore, ProcessorError> {
        Ok(CassandraStore {
            statements: Statements::prepare(keyspace, definition, &context).await?,
            requests: Requests::new(context),
            stream: definition.stream.name.clone(),
            bucket: definition.store.bucket,
            shape: PaneShape::new(definition),
            recorded_at: PerPartition::new(BATCH_RECORD_INTERVAL),
            checked_at: PerPartition::new(HISTORY_CHECK_INTERVAL),
        })
    }

    async fn look_up_group(
        &self,
        chunk: &Chunk,
        group: &EventGroup,
    ) -> Result<Vec<(u32, StoredCopy)>, ProcessorError> {
        let keys: Vec<(CqlTimestamp, &str)> = group
            .events
            .iter()
            .map(|number| &chunk.events[*number as usize])
            .map(|e| (CqlTimestamp(e.time_ms), std::str::from_utf8(chunk.id(e)).unwrap_or_default()))
            .collect();
        let values = (CqlTimestamp(group.bucket), group.shard, keys);
        let session = self.requests.session();
        let result = self
            .requests
            .until_acknowledged(|| session.execute_unpaged(&self.statements.look_up, &values))
            .await?;
        let rows = result.into_rows_result().map_err(unreadable)?;
        let mut stored: HashMap<(i64, &str), StoredEvent<'_>> = HashMap::new();
        for row in rows.rows::<StoredEvent<'_>>().map_err(unreadable)? {
            let row = row.map_err(unreadable)?;
            stored.insert((row.time_ms, row.id), row);
        }
        let found = group.events.iter().zip(&values.2).filter_map(|(number, (time, id))| {
            let row = stored.get(&(time.0, *id))?;
            let differs = chunk.columns_of(*number as usize).ne(row.columns.iter().copied());
            Some((*number, StoredCopy { offset: row.offset, differs }))
        });
        Ok(found.collect())
    }

    /// Loads panes of one bucket. After a timeout, halves the number of panes per request, because a smaller response
    /// may arrive in time.
    async fn load_bucket(
        &self,
        partition: i32,
        bucket: i64,
        starts: &[CqlTimestamp],
    ) -> Result<Vec<(i64, Pane)>, ProcessorError> {
        let (mut backoff, mut size, mut left) = (backoff(), starts.len(), starts);
        let mut panes = Vec::with_capacity(starts.len());
        while !left.is_empty() {
            let piece = &left[..size.min(left.len())];
            let values = (CqlTimestamp(bucket), partition, piece);
            match self
                .requests
                .attempt(self.requests.session().execute_unpaged(&self.statements.load_panes, &values))
                .await?
            {
                Ok(found) => {
                    panes.extend(self.panes_of(piece, found)?);
                    left = &left[piece.len()..];
                }
                Err(failure) => {
                    if failure == Failure::Overloaded {
                        size = (size / 2).max(1);
                    }
                    self.requests.wait(&mut backoff).await?;
                }
            }
        }
        Ok(panes)
    }

    fn panes_of(
        &self,
        starts: &[CqlTimestamp],
        found: QueryResult,
    ) -> Result<BTreeMap<i64, Pane>, ProcessorError> {
        let rows = found.into_rows_result().map_err(unreadable)?;
        let mut panes: BTreeMap<i64, Pane> = starts.iter().map(|s| (s.0, Pane::empty(&self.shape))).collect();
        for row in rows.rows::<scylla::value::Row>().map_err(unreadable)? {
            let row = row.map_err(unreadable)?;
            let (start, index, count, upto, measures) = pane_row(&self.shape, &row.columns)
                .ok_or_else(|| unreadable("a pane row has another layout"))?;
            if let Some(pane) = panes.get_mut(&start) {
                pane.load(index, count, upto, &measures);
            }
        }
        Ok(panes)
    }

    /// Performs `write` if `assumed` is still true. Checks before each attempt, because a write after a restore would
    /// hide that the snapshot is older. The progress row is read at most once per [`HISTORY_CHECK_INTERVAL`].
    async fn if_confirmed<F>(
        &self,
        partition: i32,
        assumed: Assumed,
        write: impl Fn() -> F,
    ) -> Result<(), ProcessorError>
    where
        F: Future<Output = Result<(), ExecutionError>>,
    {
        let session = self.requests.session();
        let attempt = async || {
            if self.checked_at.is_due(partition) {
                let found =
                    session.execute_unpaged(&self.statements.progress, (&self.stream, partition)).await?;
                self.requests.outages.succeeded(Instant::now());
                let row = found.into_rows_result().ok();
                let row = row.and_then(|rows| rows.maybe_first_row::<StoredProgress>().ok().flatten());
                let stored = row.and_then(|row| row.written_to);
                if let Some(noted) = assumed.noted.filter(|noted| stored.is_none_or(|stored| stored < *noted))
                {
                    return Ok(Some(LostHistory { partition, noted, stored }.to_string()));
                }
                self.checked_at.done(partition);
            }
            if self.requests.outages.count() != assumed.outages {
                return Ok(Some(AFTER_OUTAGE.to_owned()));
            }
            write().await.map(|()| None)
        };
        match self.requests.until_acknowledged(attempt).await? {
            None => Ok(()),
            Some(lost) => Err(ProcessorError::Reopen(lost)),
        }
    }

    async fn put_throughput(&self, partition: i32, position: &LogPosition) -> Result<(), ProcessorError> {
        let now = now_ms();
        let session = self.requests.session();
        let writes =
            [Resolution::SECONDS, Resolution::MINUTES].map(async |Resolution { step, slot, ttl }| {
                let at = floor_to(now, i64::from(step) * 1000);
                let slot = CqlTimestamp(floor_to(at, slot * 1000));
                let total = position.totals.records();
                let values =
                    (&self.stream, step, slot, CqlTimestamp(at), partition, total, position.next_offset, ttl);
                self.requests
                    .until_acknowledged(|| session.execute_unpaged(&self.statements.put_throughput, &values))
                    .await
            });
        try_join_all(writes).await.map(drop)
    }

    async fn put_batch(
        &self,
        partition: i32,
        position: &LogPosition,
        batch: &BatchRecord,
    ) -> Result<(), ProcessorError> {
        if !self.recorded_at.is_due(partition) {
            return Ok(());
        }
        self.recorded_at.done(partition);
        let now = now_ms();
        let (hour, times) = (CqlTimestamp(floor_to(now, 3_600_000)), batch.times);
        let values = (
            &self.stream,
            hour,
            CqlTimestamp(now),
            partition,
            batch.first_offset,
            position.next_offset,
            i32::try_from(batch.rows).unwrap_or(i32::MAX),
            times.decode * 1000.0,
            times.lookup * 1000.0,
            times.write * 1000.0,
            times.commit * 1000.0,
        );
        let session = self.requests.session();
        self.requests
            .until_acknowledged(|| session.execute_unpaged(&self.statements.put_batch, &values))
            .await
            .map(drop)
    }
}

fn unreadable(cause: impl std::fmt::Display) -> ProcessorError {
    ProcessorError::Fatal(format!("cannot decode a response from cassandra: {cause}"))
}

/// Decodes a row of the pane table into (pane start, row number, count, upto, measures). `None` if it has another
/// layout.
pub(crate) fn pane_row(
    shape: &PaneShape,
    columns: &[Option<scylla::value::CqlValue>],
) -> Option<(i64, usize, i64, i64, Vec<Measure>)> {
    let column = |i: usize| columns.get(i).and_then(Option::as_ref);
    let start = column(0)?.as_cql_timestamp()?.0;
    let index = shape.row_of(column(1)?.as_text()?, column(2)?.as_text()?)?;
    let measures = (0..shape.measures).map(|m| 5 + 4 * m).map(|at| {
        let count = column(at)?.as_bigint()?;
        let bound = |i: usize| column(i).and_then(scylla::value::CqlValue::as_double);
        Some(Measure {
            count,
            sum: column(at + 1)?.as_double()?,
            min: bound(at + 2).unwrap_or(Measure::EMPTY.min),
            max: bound(at + 3).unwrap_or(Measure::EMPTY.max),
        })
    });
    Some((start, index, column(3)?.as_bigint()?, column(4)?.as_bigint()?, measures.collect::<Option<_>>()?))
}

impl Store for CassandraStore {
    async fn look_up(
        &self,
        chunk: &Chunk,
        groups: &[EventGroup],
    ) -> Result<BTreeMap<u32, StoredCopy>, ProcessorError> {
        let found = try_join_all(groups.iter().map(|group| self.look_up_group(chunk, group))).await?;
        Ok(found.into_iter().flatten().collect())
    }

    async fn load_panes(
        &self,
        partition: i32,
        starts: &BTreeSet<i64>,
    ) -> Result<BTreeMap<i64, Pane>, ProcessorError> {
        let mut buckets: BTreeMap<i64, Vec<CqlTimestamp>> = BTreeMap::new();
        for start in starts {
            buckets.entry(self.bucket.start_of(*start)).or_default().push(CqlTimestamp(*start));
        }
        let at_once = (LOAD_BYTES / Pane::empty(&self.shape).bytes()).clamp(1, MAX_BATCH_ROWS);
        let pieces: Vec<(i64, &[CqlTimestamp])> = buckets
            .iter()
            .flat_map(|(bucket, starts)| starts.chunks(at_once).map(|piece| (*bucket, piece)))
            .collect();
        let mut panes = BTreeMap::new();
        for group in pieces.chunks(MAX_CONCURRENT_LOADS) {
            let loads = group.iter().map(|(bucket, piece)| self.load_bucket(partition, *bucket, piece));
            panes.extend(try_join_all(loads).await?.into_iter().flatten());
        }
        Ok(panes)
    }

    async fn write_rows(&self, chunk: &Chunk, groups: &[EventGroup]) -> Result<(), ProcessorError> {
        let writes = groups.iter().map(async |group| {
            let rows: Vec<EventRow<'_>> = group
                .events
                .iter()
                .map(|index| EventRow { chunk, index: *index, bucket: group.bucket })
                .collect();
            let batch = self.statements.rows.of_size(rows.len());
            self.requests.until_acknowledged(|| self.requests.session().batch(batch, rows.as_slice())).await
        });
        try_join_all(writes).await.map(drop)
    }

    async fn write_panes(
        &self,
        partition: i32,
        next_offset: i64,
        groups: &[PaneGroup],
        panes: &Panes,
    ) -> Result<(), ProcessorError> {
        let writes = groups.iter().map(async |group| {
            let rows: Vec<PaneRowValues<'_>> = group
                .rows
                .iter()
                .map(|(start, index)| {
                    let pane = panes.pane(*start).ok_or_else(|| {
                        ProcessorError::Fatal(format!(
                            "pane {start} is not in memory, so it cannot be written"
                        ))
                    })?;
                    Ok(PaneRowValues {
                        bucket: group.bucket,
                        partition,
                        start: *start,
                        name: &self.shape.names[*index],
                        row: pane.row(*index),
                        measures: pane.measures(*index),
                        stamp: next_offset,
                    })
                })
                .collect::<Result<_, ProcessorError>>()?;
            let batch = self.statements.panes.of_size(rows.len());
            self.requests.until_acknowledged(|| self.requests.session().batch(batch, rows.as_slice())).await
        });
        try_join_all(writes).await.map(drop)
    }

    async fn progress(&self, partition: i32) -> Result<Option<ProgressFacts>, ProcessorError> {
        let values = (&self.stream, partition);
        let session = self.requests.session();
        let result = self
            .requests
            .until_acknowledged(|| session.execute_unpaged(&self.statements.progress, &values))
            .await?;
        let rows = result.into_rows_result().map_err(unreadable)?;
        let row = rows.maybe_first_row::<StoredProgress>().map_err(unreadable)?;
        Ok(row.and_then(StoredProgress::progress))
    }

    fn outages(&self) -> u64 {
        self.requests.outages.count()
    }

    async fn confirm(&self, partition: i32, assumed: Assumed) -> Result<(), ProcessorError> {
        self.if_confirmed(partition, assumed, async || Ok(())).await
    }

    async fn note_written(
        &self,
        partition: i32,
        written_to: i64,
        assumed: Assumed,
    ) -> Result<(), ProcessorError> {
        let values = (&self.stream, partition, written_to, written_to);
        let session = self.requests.session();
        let write = async || session.execute_unpaged(&self.statements.note_written, &values).await.map(drop);
        self.if_confirmed(partition, assumed, write).await
    }

    async fn skips(&self, partition: i32) -> Result<Vec<Range<i64>>, ProcessorError> {
        let values = (&self.stream, partition);
        let session = self.requests.session();
        let result = self
            .requests
            .until_acknowledged(|| session.execute_unpaged(&self.statements.skips, &values))
            .await?;
        let rows = result.into_rows_result().map_err(unreadable)?;
        let ranges = rows.rows::<(i64, i64)>().map_err(unreadable)?;
        ranges.map(|row| row.map(|(from, to)| from..to).map_err(unreadable)).collect()
    }

    async fn accepted_up_to(&self, partition: i32) -> Result<i64, ProcessorError> {
        let values = (&self.stream, partition);
        let session = self.requests.session();
        let result = self
            .requests
            .until_acknowledged(|| session.execute_unpaged(&self.statements.accepted, &values))
            .await?;
        let rows = result.into_rows_result().map_err(unreadable)?;
        Ok(rows.maybe_first_row::<(i64,)>().map_err(unreadable)?.map_or(0, |(up_to,)| up_to))
    }

    async fn publish(
        &self,
        partition: i32,
        position: &LogPosition,
        assumed: Assumed,
        batch: Option<&BatchRecord>,
    ) -> Result<(), ProcessorError> {
        let row = ProgressRow::new(&self.stream, partition, position, now_ms());
        let session = self.requests.session();
        let write = async || session.execute_unpaged(&self.statements.put_progress, &row).await.map(drop);
        self.if_confirmed(partition, assumed, write).await?;
        if let Some(batch) = batch {
            self.put_throughput(partition, position).await?;
            self.put_batch(partition, position, batch).await?;
        }
        Ok(())
    }
}
