//! `verify --kafka`: rows and totals compared with Kafka's own log, as far as it is retained. Holds one partition's keys in memory:
//! about 150 bytes an event.

use super::{Outcome, Verifier, failed};
use crate::chunk::Chunk;
use crate::decode::{Decoder, Record};
use crate::error::ProcessorError;
use crate::fetch::readable_headers;
use crate::log_reader::LogReader;
use crate::partition::Position;
use futures::TryStreamExt;
use rdkafka::Message;
use scylla::value::CqlTimestamp;
use std::collections::{BTreeSet, HashMap, HashSet};

/// Records decoded at a time.
const CHUNK_RECORDS: usize = 4000;

/// Event time and id.
type Key = (i64, Vec<u8>);

/// What the log was found to hold, compared with the rows.
#[derive(Debug, Default)]
struct Comparison {
    /// Per stored key: its offset, and whether the log has the event there.
    stored: HashMap<Key, (i64, bool)>,
    missing: HashSet<Key>,
    events: i64,
    duplicates: i64,
    dead_letters: i64,
    differences: Vec<String>,
}

impl Comparison {
    fn take(&mut self, chunk: &Chunk, next_offset: i64) {
        self.dead_letters += chunk.poison.iter().filter(|p| p.offset < next_offset).count() as i64;
        for event in chunk.events.iter().filter(|e| e.offset < next_offset) {
            let key = (event.time_ms, chunk.id(event).to_vec());
            let shown = || format!("{} at {}", String::from_utf8_lossy(&key.1), key.0);
            match self.stored.get_mut(&key) {
                Some((offset, confirmed)) if *offset == event.offset => {
                    *confirmed = true;
                    self.events += 1;
                }
                Some((offset, _)) if *offset < event.offset => self.duplicates += 1,
                Some((offset, _)) => {
                    let line =
                        format!("offset {}: {} is stored with the later {offset}", event.offset, shown());
                    self.differences.push(line);
                }
                None if self.missing.contains(&key) => self.duplicates += 1,
                None => {
                    self.differences.push(format!(
                        "offset {}: {} is not in the table",
                        event.offset,
                        shown()
                    ));
                    self.missing.insert(key);
                }
            }
        }
    }

    /// Rows the log should have and has not; with a whole log, the totals too.
    fn close(&mut self, low: i64, position: &Position) {
        for ((time, id), (offset, confirmed)) in &self.stored {
            if !confirmed && (low..position.next_offset).contains(offset) {
                let id = String::from_utf8_lossy(id);
                self.differences
                    .push(format!("{id} at {time}: the log has no such event at offset {offset}"));
            }
        }
        let totals = position.totals;
        let found = (self.events, self.duplicates, self.dead_letters);
        if low == 0 && found != (totals.events, totals.duplicates, totals.dead_letters) {
            self.differences.push(format!(
                "the log holds {} events, {} duplicates, {} dead letters below offset {}; the progress row says {}, {}, {}",
                found.0, found.1, found.2, position.next_offset, totals.events, totals.duplicates, totals.dead_letters
            ));
        }
    }
}

impl Verifier {
    /// Compares one partition's rows and totals below its next offset with the log.
    pub(super) async fn compare_log(
        &self,
        partition: i32,
        outcome: &mut Outcome,
    ) -> Result<(), ProcessorError> {
        let (position, buckets) = self.standing(partition).await?;
        let stored = self.keys(partition, &buckets).await?;
        let read = || self.read_log(partition, &position, Comparison { stored, ..Comparison::default() });
        let (low, mut found) = tokio::task::block_in_place(read)?;
        found.close(low, &position);
        outcome.records += (position.next_offset - low).max(0) as u64;
        let lines = found.differences.into_iter().map(|line| format!("partition {partition}, {line}"));
        outcome.differences.extend(lines);
        Ok(())
    }

    async fn keys(
        &self,
        partition: i32,
        buckets: &BTreeSet<i64>,
    ) -> Result<HashMap<Key, (i64, bool)>, ProcessorError> {
        let cql = format!(
            "SELECT event_time, event_id, kafka_offset FROM {}.{} WHERE bucket = ? AND shard = ?",
            self.keyspace, self.definition.stream.name
        );
        let shards = self.definition.store.shards as i32;
        let mut stored = HashMap::new();
        for bucket in buckets {
            for shard in partition * shards..(partition + 1) * shards {
                let key = (CqlTimestamp(*bucket), shard);
                let pages = self.session.query_iter(cql.as_str(), key).await.map_err(failed)?;
                let mut rows = pages.rows_stream::<(CqlTimestamp, String, i64)>().map_err(failed)?;
                while let Some((time, id, offset)) = rows.try_next().await.map_err(failed)? {
                    stored.insert((time.0, id.into_bytes()), (offset, false));
                }
            }
        }
        Ok(stored)
    }

    /// Reads the log from its lowest offset to the position; gives that offset. Blocking.
    fn read_log(
        &self,
        partition: i32,
        position: &Position,
        mut found: Comparison,
    ) -> Result<(i64, Comparison), ProcessorError> {
        let mut reader = LogReader::open(&self.brokers, &self.topic, partition, None)?;
        let (low, high) = (reader.low, reader.end);
        if position.next_offset > high {
            return Err(ProcessorError::Refused(format!(
                "partition {partition}: the next offset is {}, the log ends at {high}: another log",
                position.next_offset
            )));
        }
        reader.end = position.next_offset;
        let decoder = Decoder::new(&self.definition, partition);
        let mut chunk = decoder.chunk();
        while let Some(message) = reader.next_record()? {
            let headers = message.headers().map(readable_headers).unwrap_or_default();
            let record = Record {
                offset: message.offset(),
                timestamp_ms: message.timestamp().to_millis().unwrap_or(0),
                key: message.key(),
                value: message.payload(),
                headers: &headers,
            };
            decoder.decode(&record, &mut chunk);
            if chunk.len() == CHUNK_RECORDS {
                found.take(&chunk, position.next_offset);
                chunk = decoder.chunk();
            }
        }
        found.take(&chunk, position.next_offset);
        Ok((low, found))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::partition::Totals;
    use common::stream::Definition;

    const NOW: i64 = 1_800_000_000_000;

    /// Ids at offsets 0, 1, …; `None`: no event.
    fn chunk(ids: &[Option<&str>]) -> Chunk {
        let text = include_str!("../../../../streams/user_created.toml");
        let decoder = Decoder::new(&Definition::parse("user_created.toml", text).unwrap(), 0);
        let mut chunk = decoder.chunk();
        for (offset, id) in (0..).zip(ids) {
            let headers =
                [("ce_id", id.map(str::as_bytes)), ("ce_time", Some(b"2027-01-15T08:00:00.000Z".as_slice()))];
            let value = Some(br#"{"first_name":"Ada","last_name":"L"}"#.as_slice());
            let record = Record { offset, timestamp_ms: NOW, key: None, value, headers: &headers };
            decoder.decode(&record, &mut chunk);
        }
        chunk
    }

    fn compare(stored: &[(&str, i64)], low: i64, totals: Totals) -> Vec<String> {
        let stored = stored.iter().map(|(id, offset)| ((NOW, id.as_bytes().to_vec()), (*offset, false)));
        let mut found = Comparison { stored: stored.collect(), ..Comparison::default() };
        let position = Position { next_offset: 4, totals, ..Position::default() };
        found.take(&chunk(&[Some("a"), Some("b"), Some("a"), None, Some("later")]), position.next_offset);
        found.close(low, &position);
        found.differences
    }

    #[test]
    fn rows_and_totals_are_compared_with_the_log() {
        let totals = Totals { events: 2, duplicates: 1, dead_letters: 1, ..Totals::default() };
        let check = |stored: &[(&str, i64)], totals, parts: &[&str]| {
            let differences = compare(stored, 0, totals);
            assert_eq!(differences.len(), parts.len(), "{differences:?}");
            for part in parts {
                assert!(differences.iter().any(|d| d.contains(part)), "{part}: {differences:?}");
            }
        };
        check(&[("a", 0), ("b", 1)], totals, &[]);
        check(&[("a", 0), ("b", 1), ("later", 4)], totals, &[]);
        check(&[("a", 0)], totals, &["offset 1: b", "the log holds 1 events"]);
        check(&[("a", 2), ("b", 1)], Totals { duplicates: 0, ..totals }, &["with the later 2"]);
        check(&[("a", 0), ("b", 1), ("c", 3)], totals, &["no such event at offset 3"]);
        check(&[("a", 0), ("b", 1)], Totals { events: 3, ..totals }, &["the progress row says 3, 1, 1"]);
    }

    #[test]
    fn what_retention_removed_is_not_held_against_the_rows() {
        let differences = compare(&[("old", 1), ("a", 0), ("b", 1)], 2, Totals::default());
        assert_eq!(differences, Vec::<String>::new());
    }
}
