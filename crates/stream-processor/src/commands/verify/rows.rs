//! Reads event rows and pane rows in time order, one page at a time. `compare.rs` compares them.

use super::compare::EventRow;
use super::{Span, failed};
use crate::count::windows::pane::{Measure, Pane, PaneShape};
use crate::error::ProcessorError;
use crate::io::store::cassandra::pane_row;
use crate::record::decode::{GroupIndex, number};
use common::contracts::event::floor_to;
use common::contracts::schema::panes_table;
use common::contracts::stream::{CqlType, Definition, MAX_GROUP_BY};
use futures::TryStreamExt;
use scylla::client::pager::TypedRowStream;
use scylla::client::session::Session;
use scylla::deserialize::row::{ColumnIterator, DeserializeRow};
use scylla::deserialize::{DeserializationError, TypeCheckError};
use scylla::frame::response::result::ColumnSpec;
use scylla::statement::Statement;
use scylla::statement::prepared::PreparedStatement;
use scylla::value::{CqlTimestamp, Row};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

/// Rows per page. The driver buffers about three pages of each shard.
const PAGE_ROWS: i32 = 2000;

/// The prepared reads of one stream.
pub struct RowReader {
    session: Arc<Session>,
    events: PreparedStatement,
    keys: PreparedStatement,
    panes: PreparedStatement,
    event_buckets: PreparedStatement,
    pane_buckets: PreparedStatement,
    created_at: PreparedStatement,
    stream: String,
    /// Type and groups of each group-by column.
    groups: Vec<(GroupIndex, CqlType)>,
    /// Column type of each measure.
    measures: Vec<CqlType>,
    shards: i32,
    pane_ms: i64,
    shape: PaneShape,
}

impl RowReader {
    /// Prepares the statements.
    pub async fn new(
        session: Arc<Session>,
        keyspace: &str,
        definition: &Definition,
    ) -> Result<RowReader, ProcessorError> {
        let (stream, windows) = (&definition.stream.name, &definition.windows);
        let panes = panes_table(definition);
        let grouped = windows.group_by.iter().map(|g| &g.column);
        let columns: String = grouped.chain(&windows.measures).map(|c| format!(", {c}")).collect();
        let measures: String =
            windows.measures.iter().map(|m| format!(", {m}_count, {m}_sum, {m}_min, {m}_max")).collect();
        let prepare = async |cql: String| {
            let statement = Statement::new(cql).with_page_size(PAGE_ROWS);
            session.prepare(statement).await.map_err(failed)
        };
        let of_shard = format!(
            "FROM {keyspace}.{stream} WHERE bucket = ? AND shard = ? AND event_time >= ? AND event_time < ?"
        );
        let cql_type = |name: &String| {
            definition.column_index(name).map_or(CqlType::Text, |index| definition.columns[index].cql_type)
        };
        Ok(RowReader {
            events: prepare(format!("SELECT kafka_offset, event_time{columns} {of_shard}")).await?,
            keys: prepare(format!("SELECT event_time, event_id, kafka_offset {of_shard}")).await?,
            panes: prepare(format!(
                "SELECT pane_start, dimension, value, count, upto{measures} FROM {keyspace}.{panes} \
                 WHERE bucket = ? AND kafka_partition = ? AND pane_start >= ? AND pane_start < ?"
            ))
            .await?,
            event_buckets: prepare(format!("SELECT DISTINCT bucket, shard FROM {keyspace}.{stream}")).await?,
            pane_buckets: prepare(format!("SELECT DISTINCT bucket, kafka_partition FROM {keyspace}.{panes}"))
                .await?,
            created_at: prepare(format!("SELECT created_at FROM {keyspace}.streams WHERE stream = ?"))
                .await?,
            stream: stream.clone(),
            groups: windows
                .group_by
                .iter()
                .map(|g| (GroupIndex::new(&g.groups), cql_type(&g.column)))
                .collect(),
            measures: windows.measures.iter().map(cql_type).collect(),
            shards: definition.store.shards as i32,
            pane_ms: windows.pane_ms,
            shape: PaneShape::new(definition),
            session,
        })
    }

    /// Returns when `init` registered the stream, in Unix milliseconds. `None` if it is not registered.
    pub async fn created_at(&self) -> Result<Option<i64>, ProcessorError> {
        let found = self.session.execute_unpaged(&self.created_at, (&self.stream,)).await.map_err(failed)?;
        let found = found.into_rows_result().map_err(failed)?;
        let row = found.maybe_first_row::<(Option<CqlTimestamp>,)>().map_err(failed)?;
        Ok(row.and_then(|(at,)| at).map(|at| at.0))
    }

    /// Returns the starts of the buckets that have event rows or pane rows, by Kafka partition.
    pub async fn buckets(&self) -> Result<BTreeMap<i32, BTreeSet<i64>>, ProcessorError> {
        let mut buckets: BTreeMap<i32, BTreeSet<i64>> = BTreeMap::new();
        for (statement, divisor) in [(&self.event_buckets, self.shards), (&self.pane_buckets, 1)] {
            let pages = self.session.execute_iter(statement.clone(), ()).await.map_err(failed)?;
            let mut rows = pages.rows_stream::<(CqlTimestamp, i32)>().map_err(failed)?;
            while let Some((bucket, shard)) = rows.try_next().await.map_err(failed)? {
                buckets.entry(shard / divisor).or_default().insert(bucket.0);
            }
        }
        Ok(buckets)
    }

    /// Reads the event rows of a span.
    pub async fn events(&self, span: &Span) -> Result<Events<'_>, ProcessorError> {
        let mut shards = Vec::new();
        for shard in self.shards_of(span.partition) {
            let rows = self.read(&self.events, span, shard).await?;
            let mut shard = Shard { rows, head: None };
            shard.advance(self).await?;
            shards.push(shard);
        }
        Ok(Events { reader: self, shards })
    }

    /// Passes event time, id and offset of each event row of a span to `take`.
    pub async fn keys(
        &self,
        span: &Span,
        mut take: impl FnMut(i64, &[u8], i64),
    ) -> Result<(), ProcessorError> {
        for shard in self.shards_of(span.partition) {
            let mut rows = self.read::<(CqlTimestamp, String, i64)>(&self.keys, span, shard).await?;
            while let Some((time, id, offset)) = rows.try_next().await.map_err(failed)? {
                take(time.0, id.as_bytes(), offset);
            }
        }
        Ok(())
    }

    /// Reads the stored panes of a span.
    pub async fn panes(&self, span: &Span) -> Result<StoredPanes<'_>, ProcessorError> {
        let rows = self.read(&self.panes, span, span.partition).await?;
        let mut panes = StoredPanes { reader: self, rows, head: None };
        panes.advance().await?;
        Ok(panes)
    }

    fn shards_of(&self, partition: i32) -> Range<i32> {
        partition * self.shards..(partition + 1) * self.shards
    }

    async fn read<T: for<'frame, 'metadata> DeserializeRow<'frame, 'metadata>>(
        &self,
        statement: &PreparedStatement,
        span: &Span,
        shard: i32,
    ) -> Result<TypedRowStream<T>, ProcessorError> {
        let (from, to) = (CqlTimestamp(span.from_ms), CqlTimestamp(span.to_ms));
        let key = (CqlTimestamp(span.bucket), shard, from, to);
        let pages = self.session.execute_iter(statement.clone(), key).await.map_err(failed)?;
        pages.rows_stream().map_err(failed)
    }

    /// Parses an event row. Returns its event time and the row, or `None` if it does not match the layout.
    fn event(&self, cells: &Cells) -> Option<(i64, EventRow)> {
        let big = |index: usize| cells.get(index)?.try_into().ok().map(i64::from_be_bytes);
        let mut groups = [0; MAX_GROUP_BY];
        for (at, (slot, (index, cql_type))) in (2..).zip(groups.iter_mut().zip(&self.groups)) {
            *slot = index.group(*cql_type, cells.get(at));
        }
        let values = (2 + self.groups.len()..).zip(&self.measures);
        let measures = values
            .map(|(at, cql_type)| cells.get(at).and_then(|cell| number(*cql_type, cell)).unwrap_or(f64::NAN));
        Some((big(1)?, EventRow { offset: big(0)?, groups, measures: measures.collect() }))
    }
}

/// Streams the event rows of one Kafka partition, one pane at a time.
pub struct Events<'a> {
    reader: &'a RowReader,
    shards: Vec<Shard>,
}

/// The event rows of one Cassandra partition, sorted by event time.
struct Shard {
    rows: TypedRowStream<Cells>,
    head: Option<(i64, EventRow)>,
}

impl Shard {
    async fn advance(&mut self, reader: &RowReader) -> Result<(), ProcessorError> {
        self.head = match self.rows.try_next().await.map_err(failed)? {
            Some(cells) => Some(
                reader
                    .event(&cells)
                    .ok_or_else(|| failed("an event row does not match the layout of the stream"))?,
            ),
            None => None,
        };
        Ok(())
    }
}

impl Events<'_> {
    /// Returns the start of the first pane with unread rows.
    pub fn next_start(&self) -> Option<i64> {
        let heads = self.shards.iter().filter_map(|shard| shard.head.as_ref());
        heads.map(|(time_ms, _)| floor_to(*time_ms, self.reader.pane_ms)).min()
    }

    /// Passes the rows of the pane that starts at `start` to `take`, in no particular order. Earlier panes must have no
    /// unread rows.
    pub async fn take(&mut self, start: i64, mut take: impl FnMut(EventRow)) -> Result<(), ProcessorError> {
        let end = start.saturating_add(self.reader.pane_ms);
        for shard in &mut self.shards {
            while let Some((_, row)) = shard.head.take_if(|(time_ms, _)| *time_ms < end) {
                take(row);
                shard.advance(self.reader).await?;
            }
        }
        Ok(())
    }
}

/// Row index within the pane, count, `upto`, and measures.
type PaneValues = (usize, i64, i64, Vec<Measure>);

/// Streams the stored panes of one Kafka partition.
pub struct StoredPanes<'a> {
    reader: &'a RowReader,
    rows: TypedRowStream<Row>,
    head: Option<(i64, PaneValues)>,
}

impl StoredPanes<'_> {
    async fn advance(&mut self) -> Result<(), ProcessorError> {
        self.head = match self.rows.try_next().await.map_err(failed)? {
            Some(row) => {
                let (start, index, count, upto, measures) = pane_row(&self.reader.shape, &row.columns)
                    .ok_or_else(|| failed("a pane row does not match the layout of the stream"))?;
                Some((start, (index, count, upto, measures)))
            }
            None => None,
        };
        Ok(())
    }

    /// Returns the start of the next stored pane.
    pub fn next_start(&self) -> Option<i64> {
        self.head.as_ref().map(|(start, _)| *start)
    }

    /// Returns the pane that starts at `start`, or an empty pane if none is stored. Earlier panes must have been taken.
    pub async fn take(&mut self, start: i64) -> Result<Pane, ProcessorError> {
        let mut pane = Pane::empty(&self.reader.shape);
        while let Some((_, (index, count, upto, measures))) = self.head.take_if(|(at, _)| *at == start) {
            pane.load(index, count, upto, &measures);
            self.advance().await?;
        }
        Ok(pane)
    }
}

/// The undecoded cells of one row, in one allocation.
struct Cells {
    bytes: Vec<u8>,
    /// Range of each cell in `bytes`. `None` for null.
    places: Vec<Option<Range<usize>>>,
}

impl Cells {
    fn get(&self, index: usize) -> Option<&[u8]> {
        self.bytes.get(self.places.get(index)?.clone()?)
    }
}

impl<'frame, 'metadata> DeserializeRow<'frame, 'metadata> for Cells {
    fn type_check(_specs: &[ColumnSpec]) -> Result<(), TypeCheckError> {
        Ok(())
    }

    fn deserialize(row: ColumnIterator<'frame, 'metadata>) -> Result<Self, DeserializationError> {
        let mut cells = Cells { bytes: Vec::new(), places: Vec::with_capacity(row.size_hint().0) };
        for column in row {
            let place = column?.slice.map(|slice| {
                let start = cells.bytes.len();
                cells.bytes.extend_from_slice(slice.as_slice());
                start..cells.bytes.len()
            });
            cells.places.push(place);
        }
        Ok(cells)
    }
}
