//! The bare driver writes the rows of the preloaded topic as fast as it can, without any guarantees. The rows are
//! decoded in advance and grouped into unlogged batches of one Cassandra partition each, like those of the processor.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use common::contracts::event;
use common::contracts::schema;
use common::contracts::stream::{CqlType, Definition};
use common::runtime::cassandra::{Failure, classify};
use futures::StreamExt;
use local_stack::config::Settings;
use local_stack::error::{Error, Result};
use local_stack::servers::cassandra::{connect, failed};
use local_stack::services;
use local_stack::terminal::Terminal;
use rdkafka::message::{Headers, Message};
use scylla::client::session::Session;
use scylla::statement::Consistency;
use scylla::statement::batch::{Batch, BatchType};
use scylla::value::{CqlTimestamp, CqlValue};

use crate::cli::BenchArgs;
use crate::kafka::TopicReader;

/// Number of records of a partition that are grouped together, as in the processor.
const CHUNK_RECORDS: usize = 4_000;

/// Number of rows written before the measurement, to warm up the JVM and open the connections of the driver.
const WARM_UP_ROWS: usize = 300_000;

/// Maximum number of attempts per batch. A node that has just started on a busy machine may time out at first.
const MAX_ATTEMPTS: u32 = 10;

type Row = Vec<Option<CqlValue>>;

/// A session and all rows in memory, ready to be written.
pub(super) struct BareDriver {
    session: Arc<Session>,
    statement: scylla::statement::prepared::PreparedStatement,
    truncate: String,
    batches: Vec<Vec<Row>>,
    in_flight: usize,
}

impl BareDriver {
    /// Reads the topic into memory, and creates a separate keyspace with the same event table.
    pub(super) async fn prepare(
        private: &Settings,
        topic: &str,
        args: &BenchArgs,
        terminal: Terminal,
    ) -> Result<Self> {
        let since = Instant::now();
        let definition = services::definition(private)?;
        let reader = TopicReader::new(private, topic)?;
        let of_topic = definition.clone();
        let batches = tokio::task::spawn_blocking(move || read_topic(&reader, &of_topic))
            .await
            .map_err(|error| Error::Refused(error.to_string()))??;
        let session = Arc::new(connect(private).await?);
        let keyspace = "bench_bare";
        let replication = "{'class': 'SimpleStrategy', 'replication_factor': 1}";
        let create = format!("CREATE KEYSPACE IF NOT EXISTS {keyspace} WITH replication = {replication}");
        session.query_unpaged(create, ()).await.map_err(failed)?;
        for table in schema::stream_tables(&definition) {
            session.query_unpaged(table.create(keyspace), ()).await.map_err(failed)?;
        }
        let insert = schema::insert_event(keyspace, &definition);
        let statement = session.prepare(insert).await.map_err(failed)?;
        let rows: usize = batches.iter().map(Vec::len).sum();
        terminal.done(
            "bare driver",
            &format!("{rows} rows in {} batches in memory", batches.len()),
            since.elapsed(),
        );
        let truncate = format!("TRUNCATE {keyspace}.{}", definition.stream.name);
        Ok(Self { session, statement, truncate, batches, in_flight: args.in_flight as usize })
    }

    /// Writes the first [`WARM_UP_ROWS`] without measuring.
    pub(super) async fn warm_up(&self, terminal: Terminal) -> Result<()> {
        let since = Instant::now();
        let enough = (WARM_UP_ROWS / schema::MAX_BATCH_ROWS).min(self.batches.len());
        self.write(&self.batches[..enough]).await?;
        terminal.done("warm-up", "not measured", since.elapsed());
        Ok(())
    }

    /// Truncates the table, writes every row, and returns the rows per second.
    pub(super) async fn run(&self, title: &str, terminal: Terminal) -> Result<f64> {
        self.session.query_unpaged(self.truncate.as_str(), ()).await.map_err(failed)?;
        let since = Instant::now();
        let rows = self.write(&self.batches).await?;
        let took = since.elapsed();
        let rate = rows as f64 / took.as_secs_f64();
        terminal.done(title, &format!("{rows} rows, {rate:.0} per second"), took);
        Ok(rate)
    }

    async fn write(&self, batches: &[Vec<Row>]) -> Result<usize> {
        let written: Vec<Result<usize>> = futures::stream::iter(batches)
            .map(|rows| async move {
                let mut batch = Batch::new(BatchType::Unlogged);
                batch.set_consistency(Consistency::LocalQuorum);
                for _ in rows {
                    batch.append_statement(self.statement.clone());
                }
                self.send(&batch, rows).await?;
                Ok(rows.len())
            })
            .buffer_unordered(self.in_flight)
            .collect()
            .await;
        written.into_iter().sum()
    }
}

impl BareDriver {
    /// Writes one batch. Retries if the node is overloaded, like the processor.
    async fn send(&self, batch: &Batch, rows: &[Row]) -> Result<()> {
        let mut attempt = 1;
        loop {
            match self.session.batch(batch, rows).await {
                Ok(_) => return Ok(()),
                Err(error) if attempt == MAX_ATTEMPTS || classify(&error) == Failure::Refused => {
                    return Err(failed(error));
                }
                Err(_) => attempt += 1,
            }
        }
    }
}

fn read_topic(reader: &TopicReader, definition: &Definition) -> Result<Vec<Vec<Row>>> {
    let mut batches = Vec::new();
    for partition in 0..reader.partitions()? {
        let mut chunk = Vec::with_capacity(CHUNK_RECORDS);
        reader.read(partition, |message| {
            chunk.extend(row(definition, partition, message));
            if chunk.len() == CHUNK_RECORDS {
                group(&mut chunk, &mut batches);
            }
        })?;
        group(&mut chunk, &mut batches);
    }
    Ok(batches)
}

/// Splits a chunk into batches of one Cassandra partition each. Leaves the chunk empty.
fn group(chunk: &mut Vec<Row>, batches: &mut Vec<Vec<Row>>) {
    let mut partitions: BTreeMap<(i64, i32), Vec<Row>> = BTreeMap::new();
    for row in chunk.drain(..) {
        if let (Some(CqlValue::Timestamp(CqlTimestamp(bucket))), Some(CqlValue::Int(shard))) =
            (&row[0], &row[1])
        {
            partitions.entry((*bucket, *shard)).or_default().push(row);
        }
    }
    for rows in partitions.into_values() {
        let mut rows = rows.into_iter().peekable();
        while rows.peek().is_some() {
            batches.push(rows.by_ref().take(schema::MAX_BATCH_ROWS).collect());
        }
    }
}

/// Returns the values of `schema::insert_event`, or `None` if the record is not an event of the producer.
fn row(definition: &Definition, partition: i32, message: &impl Message) -> Option<Row> {
    let headers = message.headers()?;
    let header = |name: &str| {
        let header = headers.iter().find(|header| header.key == name)?;
        std::str::from_utf8(header.value?).ok().map(str::to_owned)
    };
    let id = header(event::HEADER_ID)?;
    let time_ms = chrono::DateTime::parse_from_rfc3339(&header(event::HEADER_TIME)?).ok()?.timestamp_millis();
    let timestamp = |ms: i64| Some(CqlValue::Timestamp(CqlTimestamp(ms)));
    let value: serde_json::Value = serde_json::from_slice(message.payload()?).ok()?;
    let mut row = vec![
        timestamp(definition.store.bucket.start_of(time_ms)),
        Some(CqlValue::Int(event::shard(partition, definition.store.shards, id.as_bytes()))),
        timestamp(time_ms),
        Some(CqlValue::Text(id)),
        Some(CqlValue::BigInt(message.offset())),
        header(event::HEADER_RUN_ID).map(CqlValue::Text),
    ];
    row.extend(definition.columns.iter().map(|column| cql_value(column.cql_type, value.get(&column.name)?)));
    row.push(Some(CqlValue::BigInt(time_ms * 1000)));
    Some(row)
}

fn cql_value(cql_type: CqlType, value: &serde_json::Value) -> Option<CqlValue> {
    let text = value.as_str();
    Some(match cql_type {
        CqlType::Text | CqlType::Json => {
            CqlValue::Text(text.map_or_else(|| value.to_string(), str::to_owned))
        }
        CqlType::Int => CqlValue::Int(value.as_i64()? as i32),
        CqlType::Bigint => CqlValue::BigInt(value.as_i64()?),
        CqlType::Double => CqlValue::Double(value.as_f64()?),
        CqlType::Boolean => CqlValue::Boolean(value.as_bool()?),
        // The benchmarks use the shipped definitions, which have no such columns.
        CqlType::Varint | CqlType::Decimal => return None,
        CqlType::Uuid => CqlValue::Uuid(text?.parse().ok()?),
        CqlType::Timestamp => {
            let parsed = text.and_then(|text| chrono::DateTime::parse_from_rfc3339(text).ok());
            CqlValue::Timestamp(CqlTimestamp(parsed.map(|at| at.timestamp_millis()).or(value.as_i64())?))
        }
    })
}
