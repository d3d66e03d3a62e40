//! Derives the expected result from the log in Kafka alone: every key counts once, at its first offset. Compares it
//! with rows, totals and panes, partition by partition. Shares no code with the processor.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use chrono::DateTime;
use common::contracts::stream::Definition;
use futures::TryStreamExt;
use local_stack::config::Settings;
use local_stack::error::{Error, Result};
use local_stack::servers::cassandra::{connect, failed};
use local_stack::services;
use rdkafka::message::{Headers, Message};
use scylla::client::session::Session;
use scylla::statement::Statement;
use scylla::value::CqlTimestamp;

use super::{MAX_EXAMPLES, NAME};
use crate::kafka::TopicReader;

/// Time limit for reading the few progress rows from Cassandra.
const PROGRESS_TIMEOUT: Duration = Duration::from_secs(2);

/// Time limit for requesting the end offset of a partition from Kafka.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// Event time in milliseconds, and event id.
type Key = (i64, Box<[u8]>);

/// Dimension of a pane, and its start in milliseconds.
type PaneKey = (String, i64);

/// Summary of the log of one Kafka partition.
#[derive(Debug, Default)]
struct Log {
    /// First offset of each key.
    first: HashMap<Key, i64>,
    /// Number of records without an id or a time, which the processor cannot decode.
    undecodable: i64,
    records: i64,
    end: i64,
}

/// A row of `partition_progress`.
#[derive(Clone, Copy, Debug, Default)]
struct ProgressRow {
    next_offset: i64,
    events: i64,
    duplicates: i64,
    dead_letters: i64,
}

/// Result of the comparison.
#[derive(Debug, Default)]
pub(super) struct Comparison {
    /// Number of distinct keys in the log.
    pub(super) events: u64,
    /// Number of records that repeat an earlier key.
    pub(super) copies: u64,
    /// Number of missing rows, and of events missing from totals or panes.
    pub(super) lost: u64,
    /// Number of rows without a record or from a later copy, and of surplus events in totals or panes.
    pub(super) doubled: u64,
    /// Descriptions of the first differences.
    pub(super) differences: Vec<String>,
}

impl Comparison {
    fn record_difference(&mut self, lost: u64, doubled: u64, what: impl FnOnce() -> String) {
        self.lost += lost;
        self.doubled += doubled;
        if lost + doubled > 0 && self.differences.len() < MAX_EXAMPLES {
            self.differences.push(what());
        }
    }

    fn compare_count(&mut self, place: &str, log: i64, stored: i64) {
        let (lost, doubled) = ((log - stored).max(0), (stored - log).max(0));
        self.record_difference(lost as u64, doubled as u64, || {
            format!("{place}: expected {log} from the log, found {stored}")
        });
    }

    /// Compares one row of the event table with the log, and removes its key from the log.
    fn match_row(&mut self, partition: i32, log: &mut Log, key: Key, offset: i64) {
        let id = String::from_utf8_lossy(&key.1).into_owned();
        match log.first.remove(&key) {
            Some(first) if first == offset => {}
            Some(first) => self.record_difference(0, 1, || {
                format!(
                    "partition {partition}: {id} has first offset {first}, but its row has offset {offset}"
                )
            }),
            None => self.record_difference(0, 1, || {
                format!("partition {partition}: the row of {id} at offset {offset} has no record")
            }),
        }
    }

    /// Records the remaining keys of the log, which have no row.
    fn unmatched_events(&mut self, partition: i32, log: &Log) {
        let Some(((_, id), offset)) = log.first.iter().min_by_key(|(_, offset)| **offset) else { return };
        let (missing, id) = (log.first.len() as u64, String::from_utf8_lossy(id));
        let last = log.first.values().max().unwrap_or(offset);
        self.record_difference(missing, 0, || {
            format!(
                "partition {partition}: {missing} events have no row, from {id} at offset {offset} to {last}"
            )
        });
    }

    fn totals(&mut self, partition: i32, log: &Log, progress: ProgressRow) {
        let events = log.first.len() as i64;
        let copies = log.records - log.undecodable - events;
        self.events += events as u64;
        self.copies += copies as u64;
        let place = |what: &str| format!("partition {partition}, {what} of the progress row");
        self.compare_count(&place("next offset"), log.end, progress.next_offset);
        self.compare_count(&place("events"), events, progress.events);
        self.compare_count(&place("duplicates"), copies, progress.duplicates);
        self.compare_count(&place("dead letters"), log.undecodable, progress.dead_letters);
    }

    /// Records data that is stored for partitions for which the stream is not registered.
    fn unregistered(&mut self, partitions: impl Iterator<Item = i32>) {
        let partitions: BTreeSet<i32> = partitions.collect();
        self.record_difference(0, partitions.len() as u64, || {
            format!("unregistered partitions {partitions:?} have stored data")
        });
    }

    fn panes(&mut self, partition: i32, log: &BTreeMap<PaneKey, i64>, stored: &BTreeMap<PaneKey, i64>) {
        let all: BTreeSet<&PaneKey> = log.keys().chain(stored.keys()).collect();
        for pane in all {
            let of = |panes: &BTreeMap<PaneKey, i64>| panes.get(pane).copied().unwrap_or(0);
            self.compare_count(&format!("partition {partition}, pane {pane:?}"), of(log), of(stored));
        }
    }
}

/// Compares all data of the registered partitions with the log, and checks that no data is stored for other partitions.
/// The processor must have handled the whole log, and nothing may write during the comparison.
pub(super) async fn compare(settings: &Settings, partitions: i32) -> Result<Comparison> {
    let definition = services::definition(settings)?;
    let (session, reader) = (connect(settings).await?, TopicReader::new(settings, NAME)?);
    let progress = progress(&session).await?;
    let stored = stored_panes(&session, &definition).await?;
    let tables = cassandra_partitions(&session, &definition.stream.name).await?;
    let mut comparison = Comparison::default();
    let shards = definition.store.shards as i32;
    let in_rows = tables.iter().map(|(_, shard)| shard.div_euclid(shards));
    let others = progress.keys().chain(stored.keys()).copied().chain(in_rows);
    comparison.unregistered(others.filter(|partition| *partition >= partitions));
    for partition in 0..partitions {
        let of_log = reader.clone();
        let mut log = blocking(move || read(&of_log, partition)).await?;
        comparison.totals(partition, &log, progress.get(&partition).copied().unwrap_or_default());
        let empty = BTreeMap::new();
        comparison.panes(partition, &panes(&log, &definition), stored.get(&partition).unwrap_or(&empty));
        for (bucket, shard) in tables.iter().filter(|(_, shard)| shard.div_euclid(shards) == partition) {
            let cql = format!(
                "SELECT event_time, event_id, kafka_offset FROM {NAME}.{} WHERE bucket = ? AND shard = ?",
                definition.stream.name
            );
            let pages = session.query_iter(cql, (CqlTimestamp(*bucket), *shard)).await.map_err(failed)?;
            let mut rows = pages.rows_stream::<(CqlTimestamp, String, i64)>().map_err(failed)?;
            while let Some((time, id, offset)) = rows.try_next().await.map_err(failed)? {
                comparison.match_row(partition, &mut log, (time.0, id.into_bytes().into()), offset);
            }
        }
        comparison.unmatched_events(partition, &log);
    }
    Ok(comparison)
}

/// Returns whether the progress rows of the registered partitions have reached the end of the log, and the sum of their
/// next offsets.
pub(super) async fn drained(session: &Session, settings: &Settings, partitions: i32) -> Result<(bool, i64)> {
    let next = next_offsets(session, partitions).await?;
    let ends = end_offsets(settings, partitions, END_TIMEOUT).await?;
    Ok((next.iter().zip(&ends).all(|(next, end)| next >= end), next.iter().sum()))
}

/// Returns the next offset of each registered partition, read from the progress rows.
pub(super) async fn next_offsets(session: &Session, partitions: i32) -> Result<Vec<i64>> {
    let progress = progress(session).await?;
    Ok((0..partitions).map(|partition| progress.get(&partition).map_or(0, |row| row.next_offset)).collect())
}

/// Returns the end offset of each registered partition. Every call creates a new client, because a client may never
/// reconnect after the broker was paused.
pub(super) async fn end_offsets(settings: &Settings, partitions: i32, timeout: Duration) -> Result<Vec<i64>> {
    let settings = settings.clone();
    blocking(move || {
        let reader = TopicReader::new(&settings, NAME)?;
        (0..partitions).map(|partition| reader.end(partition, timeout)).collect()
    })
    .await
}

/// Returns the number of partitions of the events topic.
pub(super) async fn partitions(settings: &Settings) -> Result<i32> {
    let reader = TopicReader::new(settings, NAME)?;
    blocking(move || reader.partitions()).await
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|error| Error::Refused(error.to_string()))?
}

fn read(reader: &TopicReader, partition: i32) -> Result<Log> {
    let mut log = Log::default();
    let end = reader.read(partition, |message| {
        log.records += 1;
        match key(message) {
            Some(key) => {
                log.first.entry(key).or_insert(message.offset());
            }
            None => log.undecodable += 1,
        }
    })?;
    log.end = end;
    Ok(log)
}

fn key(message: &impl Message) -> Option<Key> {
    let headers = message.headers()?;
    let header = |name: &str| headers.iter().find(|header| header.key == name)?.value;
    let time = DateTime::parse_from_rfc3339(std::str::from_utf8(header("ce_time")?).ok()?).ok()?;
    Some((time.timestamp_millis(), header("ce_id")?.into()))
}

/// Returns the number of events per pane, for all events and for each dimension. An event has one value in every
/// dimension.
fn panes(log: &Log, definition: &Definition) -> BTreeMap<PaneKey, i64> {
    let pane_ms = definition.windows.pane_ms;
    let mut counts: BTreeMap<i64, i64> = BTreeMap::new();
    for (time, _) in log.first.keys() {
        *counts.entry(time.div_euclid(pane_ms) * pane_ms).or_default() += 1;
    }
    let columns = definition.windows.group_by.iter().map(|group_by| group_by.column.clone());
    let dimensions: Vec<String> = std::iter::once(String::new()).chain(columns).collect();
    let of = |(start, count): (&i64, &i64)| {
        dimensions.iter().map(|d| ((d.clone(), *start), *count)).collect::<Vec<_>>()
    };
    counts.iter().flat_map(of).collect()
}

async fn progress(session: &Session) -> Result<HashMap<i32, ProgressRow>> {
    let mut query = Statement::new(format!(
        "SELECT kafka_partition, next_offset, events, duplicates, dead_letters FROM {NAME}.partition_progress"
    ));
    // A paused node must not block the measurements.
    query.set_request_timeout(Some(PROGRESS_TIMEOUT));
    let rows = session.query_unpaged(query, ()).await.map_err(failed)?.into_rows_result().map_err(failed)?;
    let rows = rows.rows::<(i32, i64, Option<i64>, Option<i64>, Option<i64>)>().map_err(failed)?;
    let mut progress = HashMap::new();
    for row in rows {
        let (partition, next_offset, events, duplicates, dead_letters) = row.map_err(failed)?;
        let number = Option::unwrap_or_default;
        progress.insert(
            partition,
            ProgressRow {
                next_offset,
                events: number(events),
                duplicates: number(duplicates),
                dead_letters: number(dead_letters),
            },
        );
    }
    Ok(progress)
}

/// Returns the counts in the pane table by Kafka partition, summed over the values of each dimension.
async fn stored_panes(
    session: &Session,
    definition: &Definition,
) -> Result<BTreeMap<i32, BTreeMap<PaneKey, i64>>> {
    let query = format!(
        "SELECT kafka_partition, pane_start, dimension, count FROM {NAME}.{}_panes",
        definition.stream.name
    );
    let pages = session.query_iter(query, ()).await.map_err(failed)?;
    let mut rows = pages.rows_stream::<(i32, CqlTimestamp, String, i64)>().map_err(failed)?;
    let mut panes: BTreeMap<i32, BTreeMap<PaneKey, i64>> = BTreeMap::new();
    while let Some((partition, start, dimension, count)) = rows.try_next().await.map_err(failed)? {
        *panes.entry(partition).or_default().entry((dimension, start.0)).or_default() += count;
    }
    Ok(panes)
}

/// Returns the bucket and shard of every Cassandra partition of the event table.
pub(super) async fn cassandra_partitions(session: &Session, table: &str) -> Result<Vec<(i64, i32)>> {
    let query = format!("SELECT DISTINCT bucket, shard FROM {NAME}.{table}");
    let pages = session.query_iter(query, ()).await.map_err(failed)?;
    let rows = pages.rows_stream::<(CqlTimestamp, i32)>().map_err(failed)?;
    rows.map_ok(|(bucket, shard)| (bucket.0, shard)).try_collect().await.map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(keys: &[(i64, &str, i64)], records: i64) -> Log {
        let first = keys.iter().map(|(time, id, offset)| ((*time, id.as_bytes().into()), *offset)).collect();
        Log { first, records, end: records, undecodable: 0 }
    }

    fn check(rows: &[(i64, &str, i64)], lost: u64, doubled: u64) {
        let (mut log, mut comparison) = (log(&[(5, "a", 0), (6, "b", 1)], 3), Comparison::default());
        for (time, id, offset) in rows {
            comparison.match_row(0, &mut log, (*time, id.as_bytes().into()), *offset);
        }
        comparison.unmatched_events(0, &log);
        assert_eq!((comparison.lost, comparison.doubled), (lost, doubled), "{:?}", comparison.differences);
    }

    #[test]
    fn every_key_must_have_one_row_at_its_first_offset() {
        check(&[(5, "a", 0), (6, "b", 1)], 0, 0);
        check(&[(5, "a", 0)], 1, 0);
        check(&[(5, "a", 2), (6, "b", 1)], 0, 1);
        check(&[(5, "a", 0), (6, "b", 1), (7, "b", 1)], 0, 1);
        check(&[(5, "a", 0), (6, "b", 1), (6, "b", 1)], 0, 1);
    }

    #[test]
    fn data_of_unregistered_partitions_counts_as_doubled() {
        let check = |partitions: &[i32], doubled| {
            let mut comparison = Comparison::default();
            comparison.unregistered(partitions.iter().copied());
            assert_eq!((comparison.lost, comparison.doubled), (0, doubled), "{:?}", comparison.differences);
        };
        check(&[], 0);
        check(&[6, 7, 6], 2);
    }

    #[test]
    fn totals_must_match_the_log() {
        let check = |progress, lost, doubled| {
            let mut comparison = Comparison::default();
            comparison.totals(0, &log(&[(5, "a", 0), (6, "b", 1)], 3), progress);
            assert_eq!(
                (comparison.lost, comparison.doubled),
                (lost, doubled),
                "{:?}",
                comparison.differences
            );
            assert_eq!((comparison.events, comparison.copies), (2, 1));
        };
        let right = ProgressRow { next_offset: 3, events: 2, duplicates: 1, dead_letters: 0 };
        check(right, 0, 0);
        check(ProgressRow { events: 3, duplicates: 0, ..right }, 1, 1);
        check(ProgressRow::default(), 6, 0);
    }

    #[test]
    fn panes_count_every_event_once_in_each_dimension() {
        let definition =
            Definition::parse("user_created.toml", include_str!("../../../../streams/user_created.toml"));
        let expected = panes(&log(&[(59_999, "a", 0), (60_000, "b", 1)], 2), &definition.unwrap());
        assert_eq!(expected.get(&(String::new(), 0)), Some(&1));
        assert_eq!(expected.get(&("gender".to_owned(), 60_000)), Some(&1));
        let mut comparison = Comparison::default();
        comparison.panes(0, &expected, &expected);
        assert_eq!((comparison.lost, comparison.doubled), (0, 0));
        let mut stored = expected.clone();
        stored.remove(&(String::new(), 0));
        stored.insert((String::new(), 120_000), 4);
        comparison.panes(0, &expected, &stored);
        assert_eq!((comparison.lost, comparison.doubled), (1, 4));
    }
}
