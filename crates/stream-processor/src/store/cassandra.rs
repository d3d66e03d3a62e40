//! The store on Cassandra: prepared once, batches of one Cassandra partition each, tried until acknowledged. The driver
//! itself never retries; a timed-out write that lands later only writes what is there already.

use super::in_flight::InFlight;
use super::rows::{EventRow, PaneRowValues};
use super::{BatchRecord, Store};
use crate::chunk::Chunk;
use crate::error::ProcessorError;
use crate::metrics::Metrics;
use crate::partition::{Position, Totals};
use crate::windows::hot::Panes;
use crate::windows::pane::{Measure, Pane, PaneShape};
use crate::write_plan::{EventGroup, PaneGroup};
use backon::{BackoffBuilder, ExponentialBuilder};
use common::cassandra::{Failure, classify};
use common::event::{Bucket, floor_to};
use common::schema::{self, MAX_BATCH_ROWS, THROUGHPUT_RESOLUTIONS};
use common::stream::Definition;
use futures::future::try_join_all;
use scylla::client::session::Session;
use scylla::errors::ExecutionError;
use scylla::response::query_result::QueryResult;
use scylla::statement::batch::{Batch, BatchStatement, BatchType};
use scylla::statement::prepared::PreparedStatement;
use scylla::value::{CqlTimestamp, MaybeUnset};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::future::Future;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// At most one row of `batches` per partition in this time.
const BATCH_RECORD_EVERY: Duration = Duration::from_secs(1);

/// Where the store is and what it tells.
#[derive(Debug)]
pub struct StoreContext {
    /// The session.
    pub session: Arc<Session>,
    /// Retries and in-flight.
    pub metrics: Arc<Metrics>,
    /// Ends every retry loop.
    pub abandon: CancellationToken,
    /// Most requests in flight.
    pub in_flight: usize,
}

/// Statements of one stream.
pub struct CassandraStore {
    context: StoreContext,
    flight: InFlight,
    stream: String,
    bucket: Bucket,
    shape: PaneShape,
    rows: Batches,
    panes: Batches,
    look_up: PreparedStatement,
    load_panes: PreparedStatement,
    progress: PreparedStatement,
    accepted: PreparedStatement,
    put_progress: PreparedStatement,
    put_throughput: PreparedStatement,
    put_batch: PreparedStatement,
    recorded_at: Mutex<HashMap<i32, Instant>>,
}

/// One prepared insert as unlogged batches of every size, each made once.
struct Batches {
    insert: PreparedStatement,
    sizes: Vec<OnceLock<Batch>>,
}

impl Batches {
    fn new(insert: PreparedStatement) -> Batches {
        Batches { insert, sizes: (0..=MAX_BATCH_ROWS).map(|_| OnceLock::new()).collect() }
    }

    fn of(&self, size: usize) -> &Batch {
        self.sizes[size].get_or_init(|| {
            let statement = BatchStatement::PreparedStatement(self.insert.clone());
            let mut batch = Batch::new_with_statements(BatchType::Unlogged, vec![statement; size]);
            batch.set_is_idempotent(true);
            batch
        })
    }
}

fn now_ms() -> i64 {
    chrono::Utc::now().timestamp_millis()
}

impl CassandraStore {
    /// Prepares every statement; fails where `stream-processor init` has not run.
    pub async fn new(
        keyspace: &str,
        definition: &Definition,
        context: StoreContext,
    ) -> Result<CassandraStore, ProcessorError> {
        let (stream, panes_table) = (&definition.stream.name, schema::panes_table(definition));
        let measures: String = definition
            .windows
            .measures
            .iter()
            .map(|m| format!(", {m}_count, {m}_sum, {m}_min, {m}_max"))
            .collect();
        let look_up = format!(
            "SELECT event_time, event_id, kafka_offset FROM {keyspace}.{stream} \
             WHERE bucket = ? AND shard = ? AND (event_time, event_id) IN ?"
        );
        let load_panes = format!(
            "SELECT pane_start, dimension, value, count, upto{measures} FROM {keyspace}.{panes_table} \
             WHERE bucket = ? AND kafka_partition = ? AND pane_start IN ?"
        );
        let progress = format!(
            "SELECT next_offset, events, duplicates, late, dead_letters, seen_to, fingerprint \
             FROM {keyspace}.partition_progress WHERE stream = ? AND kafka_partition = ?"
        );
        let accepted = format!(
            "SELECT up_to FROM {keyspace}.dead_letters_accepted WHERE stream = ? AND kafka_partition = ?"
        );
        let put_progress = format!(
            "INSERT INTO {keyspace}.partition_progress (stream, kafka_partition, next_offset, events, duplicates, late, \
             dead_letters, seen_to, fingerprint, updated_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) USING TIMESTAMP ?"
        );
        let put_throughput = format!(
            "INSERT INTO {keyspace}.throughput (stream, resolution, slot, at, kafka_partition, total) \
             VALUES (?, ?, ?, ?, ?, ?) USING TIMESTAMP ? AND TTL ?"
        );
        let put_batch = format!(
            "INSERT INTO {keyspace}.batches (stream, hour, finished_at, kafka_partition, first_offset, next_offset, rows, \
             decode_ms, lookup_ms, write_ms, commit_ms) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
        );
        context.metrics.in_flight_limit.set(context.in_flight as i64);
        let session = &context.session;
        let prepare = async |cql: String| {
            let mut statement = session.prepare(cql).await.map_err(|e| {
                ProcessorError::Fatal(format!(
                    "cassandra: {e}; run `stream-processor init` for this stream first"
                ))
            })?;
            statement.set_is_idempotent(true);
            Ok::<_, ProcessorError>(statement)
        };
        Ok(CassandraStore {
            rows: Batches::new(prepare(schema::insert_event(keyspace, definition)).await?),
            panes: Batches::new(prepare(schema::insert_pane(keyspace, definition)).await?),
            look_up: prepare(look_up).await?,
            load_panes: prepare(load_panes).await?,
            progress: prepare(progress).await?,
            accepted: prepare(accepted).await?,
            put_progress: prepare(put_progress).await?,
            put_throughput: prepare(put_throughput).await?,
            put_batch: prepare(put_batch).await?,
            flight: InFlight::new(context.in_flight),
            stream: stream.clone(),
            bucket: definition.store.bucket,
            shape: PaneShape::new(definition),
            recorded_at: Mutex::default(),
            context,
        })
    }

    /// One request, tried until acknowledged.
    async fn until_acknowledged<F>(
        &self,
        mut request: impl FnMut() -> F,
    ) -> Result<QueryResult, ProcessorError>
    where
        F: Future<Output = Result<QueryResult, ExecutionError>>,
    {
        let mut pauses = ExponentialBuilder::default()
            .with_min_delay(Duration::from_millis(20))
            .with_max_delay(Duration::from_secs(1))
            .with_jitter()
            .without_max_times()
            .build();
        loop {
            let permit = self.flight.enter().await;
            let in_flight = self.context.metrics.in_flight();
            let answer = tokio::select! {
                biased;
                () = self.context.abandon.cancelled() => return Err(ProcessorError::Stopped),
                answer = request() => answer,
            };
            drop(in_flight);
            let error = match answer {
                Ok(result) => {
                    self.context.metrics.store_requests.inc();
                    self.flight.succeeded();
                    self.context.metrics.in_flight_limit.set(self.flight.limit() as i64);
                    return Ok(result);
                }
                Err(error) => error,
            };
            self.context.metrics.store_retries.inc();
            match (classify(&error), permit) {
                (Failure::Refused, _) => {
                    return Err(ProcessorError::Fatal(format!("cassandra refuses: {error}")));
                }
                (Failure::Overloaded, Some(permit)) => self.flight.overloaded(permit),
                (_, permit) => drop(permit),
            }
            self.context.metrics.in_flight_limit.set(self.flight.limit() as i64);
            tokio::select! {
                () = self.context.abandon.cancelled() => return Err(ProcessorError::Stopped),
                () = tokio::time::sleep(pauses.next().unwrap_or(Duration::from_secs(1))) => {}
            }
        }
    }

    async fn look_up_group(
        &self,
        chunk: &Chunk,
        group: &EventGroup,
    ) -> Result<Vec<(u32, i64)>, ProcessorError> {
        let keys: Vec<(CqlTimestamp, &str)> = group
            .events
            .iter()
            .map(|number| &chunk.events[*number as usize])
            .map(|e| (CqlTimestamp(e.time_ms), std::str::from_utf8(chunk.id(e)).unwrap_or_default()))
            .collect();
        let values = (CqlTimestamp(group.bucket), group.shard, keys);
        let session = &self.context.session;
        let result = self.until_acknowledged(|| session.execute_unpaged(&self.look_up, &values)).await?;
        let rows = result.into_rows_result().map_err(unreadable)?;
        let mut stored: HashMap<(i64, &str), i64> = HashMap::new();
        for row in rows.rows::<(CqlTimestamp, &str, i64)>().map_err(unreadable)? {
            let (time, id, offset) = row.map_err(unreadable)?;
            stored.insert((time.0, id), offset);
        }
        let found =
            group.events.iter().zip(&values.2).filter_map(|(number, (time, id))| {
                stored.get(&(time.0, *id)).map(|offset| (*number, *offset))
            });
        Ok(found.collect())
    }

    async fn load_bucket(
        &self,
        partition: i32,
        bucket: i64,
        starts: &[CqlTimestamp],
    ) -> Result<Vec<(i64, Pane)>, ProcessorError> {
        let values = (CqlTimestamp(bucket), partition, starts);
        let session = &self.context.session;
        let result = self.until_acknowledged(|| session.execute_unpaged(&self.load_panes, &values)).await?;
        let rows = result.into_rows_result().map_err(unreadable)?;
        let mut panes: BTreeMap<i64, Pane> = starts.iter().map(|s| (s.0, Pane::empty(&self.shape))).collect();
        for row in rows.rows::<scylla::value::Row>().map_err(unreadable)? {
            let row = row.map_err(unreadable)?;
            let (start, index, count, upto, measures) = pane_row(&self.shape, &row.columns)
                .ok_or_else(|| unreadable("a pane row of another layout"))?;
            if let Some(pane) = panes.get_mut(&start) {
                pane.load(index, count, upto, &measures);
            }
        }
        Ok(panes.into_iter().collect())
    }

    async fn put_progress(&self, partition: i32, position: &Position) -> Result<(), ProcessorError> {
        let totals = position.totals;
        let values = (
            (&self.stream, partition, position.next_offset, totals.events, totals.duplicates, totals.late),
            (
                totals.dead_letters,
                MaybeUnset::from_option(position.seen_to),
                MaybeUnset::from_option(position.fingerprint),
                CqlTimestamp(now_ms()),
                position.next_offset,
            ),
        );
        let ((a, b, c, d, e, f), (g, h, i, j, k)) = values;
        let values = (a, b, c, d, e, f, g, h, i, j, k);
        let session = &self.context.session;
        self.until_acknowledged(|| session.execute_unpaged(&self.put_progress, &values)).await.map(drop)
    }

    async fn put_throughput(&self, partition: i32, position: &Position) -> Result<(), ProcessorError> {
        let now = now_ms();
        let session = &self.context.session;
        let writes = THROUGHPUT_RESOLUTIONS.map(async |(seconds, slot_seconds, ttl)| {
            let at = floor_to(now, i64::from(seconds) * 1000);
            let slot = CqlTimestamp(floor_to(at, slot_seconds * 1000));
            let total = position.totals.records();
            let ttl = ttl as i32;
            let values =
                (&self.stream, seconds, slot, CqlTimestamp(at), partition, total, position.next_offset, ttl);
            self.until_acknowledged(|| session.execute_unpaged(&self.put_throughput, &values)).await
        });
        try_join_all(writes).await.map(drop)
    }

    async fn put_batch(
        &self,
        partition: i32,
        position: &Position,
        batch: &BatchRecord,
    ) -> Result<(), ProcessorError> {
        {
            let mut recorded = self.recorded_at.lock().unwrap_or_else(PoisonError::into_inner);
            if recorded.get(&partition).is_some_and(|at| at.elapsed() < BATCH_RECORD_EVERY) {
                return Ok(());
            }
            recorded.insert(partition, Instant::now());
        }
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
        let session = &self.context.session;
        self.until_acknowledged(|| session.execute_unpaged(&self.put_batch, &values)).await.map(drop)
    }
}

fn unreadable(cause: impl std::fmt::Display) -> ProcessorError {
    ProcessorError::Fatal(format!("cassandra answers with rows this program cannot read: {cause}"))
}

/// A row of the pane table → (pane start, row number, count, upto, measures).
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
    async fn look_up(&self, chunk: &Chunk, groups: &[EventGroup]) -> Result<Vec<(u32, i64)>, ProcessorError> {
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
        let asked = buckets.iter().flat_map(|(bucket, starts)| {
            starts.chunks(MAX_BATCH_ROWS).map(|part| self.load_bucket(partition, *bucket, part))
        });
        Ok(try_join_all(asked).await?.into_iter().flatten().collect())
    }

    async fn write_rows(&self, chunk: &Chunk, groups: &[EventGroup]) -> Result<(), ProcessorError> {
        let writes = groups.iter().map(async |group| {
            let rows: Vec<EventRow<'_>> = group
                .events
                .iter()
                .map(|index| EventRow { chunk, index: *index, bucket: group.bucket })
                .collect();
            let batch = self.rows.of(rows.len());
            self.until_acknowledged(|| self.context.session.batch(batch, rows.as_slice())).await
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
                        ProcessorError::Fatal(format!("pane {start} was dropped before it was written"))
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
            let batch = self.panes.of(rows.len());
            self.until_acknowledged(|| self.context.session.batch(batch, rows.as_slice())).await
        });
        try_join_all(writes).await.map(drop)
    }

    async fn progress(&self, partition: i32) -> Result<Option<Position>, ProcessorError> {
        type Row = (i64, i64, i64, i64, i64, Option<i64>, Option<i64>);
        let values = (&self.stream, partition);
        let session = &self.context.session;
        let result = self.until_acknowledged(|| session.execute_unpaged(&self.progress, &values)).await?;
        let rows = result.into_rows_result().map_err(unreadable)?;
        let row = rows.maybe_first_row::<Row>().map_err(unreadable)?;
        Ok(row.map(|(next_offset, events, duplicates, late, dead_letters, seen_to, fingerprint)| Position {
            next_offset,
            fingerprint,
            totals: Totals { events, duplicates, late, dead_letters },
            seen_to,
            ..Position::default()
        }))
    }

    async fn accepted_up_to(&self, partition: i32) -> Result<i64, ProcessorError> {
        let values = (&self.stream, partition);
        let session = &self.context.session;
        let result = self.until_acknowledged(|| session.execute_unpaged(&self.accepted, &values)).await?;
        let rows = result.into_rows_result().map_err(unreadable)?;
        Ok(rows.maybe_first_row::<(i64,)>().map_err(unreadable)?.map_or(0, |(up_to,)| up_to))
    }

    async fn publish(
        &self,
        partition: i32,
        position: &Position,
        batch: Option<&BatchRecord>,
    ) -> Result<(), ProcessorError> {
        self.put_progress(partition, position).await?;
        if let Some(batch) = batch {
            self.put_throughput(partition, position).await?;
            self.put_batch(partition, position, batch).await?;
        }
        Ok(())
    }
}
