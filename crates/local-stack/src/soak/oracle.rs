//! What is true, from Kafka's log alone: every key counts once, at its first offset. Compared with rows, totals and panes,
//! partition by partition. Shares no code with the processor.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use chrono::DateTime;
use common::stream::Definition;
use futures::TryStreamExt;
use rdkafka::message::{Headers, Message};
use scylla::client::session::Session;
use scylla::statement::Statement;
use scylla::value::CqlTimestamp;

use super::{NAME, THINGS};
use crate::config::Settings;
use crate::error::{Error, Result};
use crate::servers::cassandra::{connect, failed};
use crate::servers::kafka::Reader;
use crate::services;

/// How long Cassandra may take for the progress rows, of which there are few.
const PROGRESS_WITHIN: Duration = Duration::from_secs(2);

/// How long Kafka may take to tell the end of a partition.
const END_WITHIN: Duration = Duration::from_secs(10);

/// Event time in ms and event id.
type Key = (i64, Box<[u8]>);

/// Dimension and start of a pane, in ms.
type PaneKey = (String, i64);

/// What one Kafka partition's log says.
#[derive(Debug, Default)]
struct Log {
    /// Where each key stands first.
    first: HashMap<Key, i64>,
    /// Records without id or time: the processor cannot take them.
    unreadable: i64,
    records: i64,
    end: i64,
}

/// A row of `partition_progress`.
#[derive(Clone, Copy, Debug, Default)]
struct Progress {
    next_offset: i64,
    events: i64,
    duplicates: i64,
    dead_letters: i64,
}

/// The comparison.
#[derive(Debug, Default)]
pub(super) struct Truth {
    /// Distinct keys of the log.
    pub(super) events: u64,
    /// Records that repeat an earlier one.
    pub(super) copies: u64,
    /// Rows that are missing, and events that totals or panes lack.
    pub(super) lost: u64,
    /// Rows without a record or of another copy, and events that totals or panes have too many.
    pub(super) doubled: u64,
    /// The first differences in words.
    pub(super) differences: Vec<String>,
}

impl Truth {
    fn differs(&mut self, lost: u64, doubled: u64, what: impl FnOnce() -> String) {
        self.lost += lost;
        self.doubled += doubled;
        if lost + doubled > 0 && self.differences.len() < THINGS {
            self.differences.push(what());
        }
    }

    fn number(&mut self, place: &str, log: i64, stored: i64) {
        let (lost, doubled) = ((log - stored).max(0), (stored - log).max(0));
        self.differs(lost as u64, doubled as u64, || {
            format!("{place}: the log says {log}, stored is {stored}")
        });
    }

    /// Takes one row of the event table and strikes its key from the log's.
    fn row(&mut self, partition: i32, log: &mut Log, key: Key, offset: i64) {
        let id = String::from_utf8_lossy(&key.1).into_owned();
        match log.first.remove(&key) {
            Some(first) if first == offset => {}
            Some(first) => self.differs(0, 1, || {
                format!("partition {partition}: {id} stands first at {first}, its row says {offset}")
            }),
            None => self.differs(0, 1, || {
                format!("partition {partition}: the row of {id} at {offset} has no record")
            }),
        }
    }

    /// What is left of the log has no row.
    fn rows_end(&mut self, partition: i32, log: &Log) {
        let Some(((_, id), offset)) = log.first.iter().min_by_key(|(_, offset)| **offset) else { return };
        let (missing, id) = (log.first.len() as u64, String::from_utf8_lossy(id));
        let last = log.first.values().max().unwrap_or(offset);
        self.differs(missing, 0, || {
            format!("partition {partition}: {missing} events have no row, from {id} at {offset} to {last}")
        });
    }

    fn totals(&mut self, partition: i32, log: &Log, progress: Progress) {
        let events = log.first.len() as i64;
        let copies = log.records - log.unreadable - events;
        self.events += events as u64;
        self.copies += copies as u64;
        let place = |what: &str| format!("partition {partition}, {what} of the progress row");
        self.number(&place("next offset"), log.end, progress.next_offset);
        self.number(&place("events"), events, progress.events);
        self.number(&place("duplicates"), copies, progress.duplicates);
        self.number(&place("dead letters"), log.unreadable, progress.dead_letters);
    }

    /// Partitions that something is stored of though the stream is not registered with them.
    fn others(&mut self, partitions: impl Iterator<Item = i32>) {
        let partitions: BTreeSet<i32> = partitions.collect();
        self.differs(0, partitions.len() as u64, || {
            format!("something is stored of partitions {partitions:?}")
        });
    }

    fn panes(&mut self, partition: i32, log: &BTreeMap<PaneKey, i64>, stored: &BTreeMap<PaneKey, i64>) {
        let all: BTreeSet<&PaneKey> = log.keys().chain(stored.keys()).collect();
        for pane in all {
            let of = |panes: &BTreeMap<PaneKey, i64>| panes.get(pane).copied().unwrap_or(0);
            self.number(&format!("partition {partition}, pane {pane:?}"), of(log), of(stored));
        }
    }
}

/// Compares everything of the registered partitions, and that nothing is stored of others. The processor must have dealt
/// with the whole log, and nothing may write meanwhile.
pub(super) async fn compare(settings: &Settings, partitions: i32) -> Result<Truth> {
    let definition = services::definition(settings)?;
    let (session, reader) = (connect(settings).await?, Reader::new(settings, NAME)?);
    let progress = progress(&session).await?;
    let stored = stored_panes(&session, &definition).await?;
    let tables = cassandra_partitions(&session, &definition.stream.name).await?;
    let mut truth = Truth::default();
    let shards = definition.store.shards as i32;
    let in_rows = tables.iter().map(|(_, shard)| shard.div_euclid(shards));
    let others = progress.keys().chain(stored.keys()).copied().chain(in_rows);
    truth.others(others.filter(|partition| *partition >= partitions));
    for partition in 0..partitions {
        let of_log = reader.clone();
        let mut log = blocking(move || read(&of_log, partition)).await?;
        truth.totals(partition, &log, progress.get(&partition).copied().unwrap_or_default());
        let empty = BTreeMap::new();
        truth.panes(partition, &panes(&log, &definition), stored.get(&partition).unwrap_or(&empty));
        for (bucket, shard) in tables.iter().filter(|(_, shard)| shard.div_euclid(shards) == partition) {
            let cql = format!(
                "SELECT event_time, event_id, kafka_offset FROM {NAME}.{} WHERE bucket = ? AND shard = ?",
                definition.stream.name
            );
            let pages = session.query_iter(cql, (CqlTimestamp(*bucket), *shard)).await.map_err(failed)?;
            let mut rows = pages.rows_stream::<(CqlTimestamp, String, i64)>().map_err(failed)?;
            while let Some((time, id, offset)) = rows.try_next().await.map_err(failed)? {
                truth.row(partition, &mut log, (time.0, id.into_bytes().into()), offset);
            }
        }
        truth.rows_end(partition, &log);
    }
    Ok(truth)
}

/// Whether the progress rows of the registered partitions have reached the log's end, and how many records they have
/// passed together.
pub(super) async fn drained(session: &Session, settings: &Settings, partitions: i32) -> Result<(bool, i64)> {
    let next = positions(session, partitions).await?;
    let ends = ends(settings, partitions, END_WITHIN).await?;
    Ok((next.iter().zip(&ends).all(|(next, end)| next >= end), next.iter().sum()))
}

/// The next offset of each registered partition, as the progress rows say it.
pub(super) async fn positions(session: &Session, partitions: i32) -> Result<Vec<i64>> {
    let progress = progress(session).await?;
    Ok((0..partitions).map(|partition| progress.get(&partition).map_or(0, |row| row.next_offset)).collect())
}

/// Where the log of each registered partition ends. Each question has a client of its own: one that lived through a pause of the
/// broker may never find it again.
pub(super) async fn ends(settings: &Settings, partitions: i32, within: Duration) -> Result<Vec<i64>> {
    let settings = settings.clone();
    blocking(move || {
        let reader = Reader::new(&settings, NAME)?;
        (0..partitions).map(|partition| reader.end(partition, within)).collect()
    })
    .await
}

/// How many partitions the events topic has.
pub(super) async fn partitions(settings: &Settings) -> Result<i32> {
    let reader = Reader::new(settings, NAME)?;
    blocking(move || reader.partitions()).await
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|error| Error::Refused(error.to_string()))?
}

fn read(reader: &Reader, partition: i32) -> Result<Log> {
    let mut log = Log::default();
    let end = reader.read(partition, |message| {
        log.records += 1;
        match key(message) {
            Some(key) => {
                log.first.entry(key).or_insert(message.offset());
            }
            None => log.unreadable += 1,
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

/// Events per pane: of all, and of each dimension, in which every event has one value.
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

async fn progress(session: &Session) -> Result<HashMap<i32, Progress>> {
    let mut query = Statement::new(format!(
        "SELECT kafka_partition, next_offset, events, duplicates, dead_letters FROM {NAME}.partition_progress"
    ));
    // A node that stands still must not hold up those who measure.
    query.set_request_timeout(Some(PROGRESS_WITHIN));
    let rows = session.query_unpaged(query, ()).await.map_err(failed)?.into_rows_result().map_err(failed)?;
    let rows = rows.rows::<(i32, i64, Option<i64>, Option<i64>, Option<i64>)>().map_err(failed)?;
    let mut progress = HashMap::new();
    for row in rows {
        let (partition, next_offset, events, duplicates, dead_letters) = row.map_err(failed)?;
        let number = Option::unwrap_or_default;
        progress.insert(
            partition,
            Progress {
                next_offset,
                events: number(events),
                duplicates: number(duplicates),
                dead_letters: number(dead_letters),
            },
        );
    }
    Ok(progress)
}

/// What the pane table counts, per Kafka partition, the values of a dimension together.
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

/// Bucket and shard of every Cassandra partition of the event table.
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
        Log { first, records, end: records, unreadable: 0 }
    }

    fn check(rows: &[(i64, &str, i64)], lost: u64, doubled: u64) {
        let (mut log, mut truth) = (log(&[(5, "a", 0), (6, "b", 1)], 3), Truth::default());
        for (time, id, offset) in rows {
            truth.row(0, &mut log, (*time, id.as_bytes().into()), *offset);
        }
        truth.rows_end(0, &log);
        assert_eq!((truth.lost, truth.doubled), (lost, doubled), "{:?}", truth.differences);
    }

    #[test]
    fn every_key_has_one_row_at_its_first_offset() {
        check(&[(5, "a", 0), (6, "b", 1)], 0, 0);
        check(&[(5, "a", 0)], 1, 0);
        check(&[(5, "a", 2), (6, "b", 1)], 0, 1);
        check(&[(5, "a", 0), (6, "b", 1), (7, "b", 1)], 0, 1);
        check(&[(5, "a", 0), (6, "b", 1), (6, "b", 1)], 0, 1);
    }

    #[test]
    fn whatever_is_stored_of_other_partitions_is_too_much() {
        let check = |partitions: &[i32], doubled| {
            let mut truth = Truth::default();
            truth.others(partitions.iter().copied());
            assert_eq!((truth.lost, truth.doubled), (0, doubled), "{:?}", truth.differences);
        };
        check(&[], 0);
        check(&[6, 7, 6], 2);
    }

    #[test]
    fn totals_must_be_the_logs() {
        let check = |progress, lost, doubled| {
            let mut truth = Truth::default();
            truth.totals(0, &log(&[(5, "a", 0), (6, "b", 1)], 3), progress);
            assert_eq!((truth.lost, truth.doubled), (lost, doubled), "{:?}", truth.differences);
            assert_eq!((truth.events, truth.copies), (2, 1));
        };
        let right = Progress { next_offset: 3, events: 2, duplicates: 1, dead_letters: 0 };
        check(right, 0, 0);
        check(Progress { events: 3, duplicates: 0, ..right }, 1, 1);
        check(Progress::default(), 6, 0);
    }

    #[test]
    fn panes_count_every_event_once_in_each_dimension() {
        let definition =
            Definition::parse("user_created.toml", include_str!("../../../../streams/user_created.toml"));
        let expected = panes(&log(&[(59_999, "a", 0), (60_000, "b", 1)], 2), &definition.unwrap());
        assert_eq!(expected.get(&(String::new(), 0)), Some(&1));
        assert_eq!(expected.get(&("gender".to_owned(), 60_000)), Some(&1));
        let mut truth = Truth::default();
        truth.panes(0, &expected, &expected);
        assert_eq!((truth.lost, truth.doubled), (0, 0));
        let mut stored = expected.clone();
        stored.remove(&(String::new(), 0));
        stored.insert((String::new(), 120_000), 4);
        truth.panes(0, &expected, &stored);
        assert_eq!((truth.lost, truth.doubled), (1, 4));
    }
}
