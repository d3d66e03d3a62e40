//! The bare driver's turn: the rows of the preloaded topic, decoded beforehand and grouped into same-partition
//! unlogged batches like the processor's, written as fast as the driver can. No guarantees, nothing else.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use common::cassandra::{Failure, classify};
use common::event;
use common::schema;
use common::stream::{CqlType, Definition};
use futures::StreamExt;
use rdkafka::message::{Headers, Message};
use scylla::client::session::Session;
use scylla::statement::Consistency;
use scylla::statement::batch::{Batch, BatchType};
use scylla::value::{CqlTimestamp, CqlValue};

use crate::cli::BenchArgs;
use crate::config::Settings;
use crate::error::{Error, Result};
use crate::servers::cassandra::{connect, failed};
use crate::servers::kafka::Reader;
use crate::services;
use crate::terminal::Terminal;

/// Records taken from a partition at a time before they are grouped, as the processor takes them.
const TAKE: usize = 4_000;

/// Rows written before anything is measured: the JVM compiles, the driver opens its connections.
const WARM_UP_ROWS: usize = 300_000;

/// How often one batch is tried; a node that starts on a busy machine times out at first.
const ATTEMPTS: u32 = 10;

type Row = Vec<Option<CqlValue>>;

/// Rows in memory, ready to be written.
pub(super) struct Bare {
    session: Arc<Session>,
    statement: scylla::statement::prepared::PreparedStatement,
    truncate: String,
    batches: Vec<Vec<Row>>,
    in_flight: usize,
}

impl Bare {
    /// Reads the topic into memory and makes a keyspace of its own with the same event table.
    pub(super) async fn prepare(
        private: &Settings,
        topic: &str,
        args: &BenchArgs,
        terminal: Terminal,
    ) -> Result<Self> {
        let since = Instant::now();
        let definition = services::definition(private)?;
        let reader = Reader::new(private, topic)?;
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

    /// Writes some of the rows without measuring.
    pub(super) async fn warm_up(&self, terminal: Terminal) -> Result<()> {
        let since = Instant::now();
        let enough = (WARM_UP_ROWS / schema::MAX_BATCH_ROWS).min(self.batches.len());
        self.write(&self.batches[..enough]).await?;
        terminal.done("warm-up", "not measured", since.elapsed());
        Ok(())
    }

    /// Writes every row into the emptied table; gives rows per second.
    pub(super) async fn run(&self, title: &str, terminal: Terminal) -> Result<f64> {
        self.session.query_unpaged(self.truncate.as_str(), ()).await.map_err(failed)?;
        let since = Instant::now();
        let rows = self.write(&self.batches).await?;
        let took = since.elapsed();
        let rate = rows as f64 / took.as_secs_f64();
        terminal.done(title, &format!("{rows} rows, {rate:.0} a second"), took);
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

impl Bare {
    /// Writes one batch; an overloaded node is asked again, as the processor does it.
    async fn send(&self, batch: &Batch, rows: &[Row]) -> Result<()> {
        let mut attempt = 1;
        loop {
            match self.session.batch(batch, rows).await {
                Ok(_) => return Ok(()),
                Err(error) if attempt == ATTEMPTS || classify(&error) == Failure::Refused => {
                    return Err(failed(error));
                }
                Err(_) => attempt += 1,
            }
        }
    }
}

fn read_topic(reader: &Reader, definition: &Definition) -> Result<Vec<Vec<Row>>> {
    let mut batches = Vec::new();
    for partition in 0..reader.partitions()? {
        let mut taken = Vec::with_capacity(TAKE);
        reader.read(partition, |message| {
            taken.extend(row(definition, partition, message));
            if taken.len() == TAKE {
                group(&mut taken, &mut batches);
            }
        })?;
        group(&mut taken, &mut batches);
    }
    Ok(batches)
}

/// Splits what was taken into batches of one Cassandra partition each.
fn group(taken: &mut Vec<Row>, batches: &mut Vec<Vec<Row>>) {
    let mut partitions: BTreeMap<(i64, i32), Vec<Row>> = BTreeMap::new();
    for row in taken.drain(..) {
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

/// The values of `schema::insert_event`; nothing for a record that is no event of the producer's.
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
        CqlType::Text => CqlValue::Text(text.map_or_else(|| value.to_string(), str::to_owned)),
        CqlType::Int => CqlValue::Int(value.as_i64()? as i32),
        CqlType::Bigint => CqlValue::BigInt(value.as_i64()?),
        CqlType::Double => CqlValue::Double(value.as_f64()?),
        CqlType::Boolean => CqlValue::Boolean(value.as_bool()?),
        CqlType::Uuid => CqlValue::Uuid(text?.parse().ok()?),
        CqlType::Timestamp => {
            let parsed = text.and_then(|text| chrono::DateTime::parse_from_rfc3339(text).ok());
            CqlValue::Timestamp(CqlTimestamp(parsed.map(|at| at.timestamp_millis()).or(value.as_i64())?))
        }
    })
}
