//! `verify --kafka` compares rows and totals with the retained part of the Kafka log. If the keys of all rows exceed
//! the memory bound, log and rows are read in several passes, each for a different slice of the keys.

use super::{Differences, Outcome, Scope, Sources, Verifier, now_ms, rfc3339, start_progress};
use crate::count::partition::LogPosition;
use crate::error::ProcessorError;
use crate::io::log_reader::LogReader;
use crate::io::store::Store;
use crate::pipeline::fetch::readable_headers;
use crate::record::chunk::Chunk;
use crate::record::decode::{Decoder, Record};
use common::contracts::event::seen_hash;
use indicatif::ProgressBar;
use rdkafka::Message;
use std::collections::HashSet;
use std::ops::Range;

/// Number of records per decoded chunk.
const CHUNK_RECORDS: usize = 4000;
/// Bytes per stored key: [`Stored`], its flag in `confirmed`, and a margin for uneven slices.
const KEY_BYTES: usize = 28;
/// Maximum number of missing keys to remember. A copy of a remembered key is not reported again.
const MAX_MISSING: usize = 100_000;

/// The key of an event row and the offset in the row. The event id is represented by its hash only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stored {
    time_ms: i64,
    hash: u64,
    offset: i64,
}

impl Stored {
    fn key(&self) -> (i64, u64) {
        (self.time_ms, self.hash)
    }
}

/// The part of the keys that one pass compares, selected by hash.
#[derive(Debug, Clone, Copy)]
struct Slice {
    number: u64,
    of: u64,
}

impl Slice {
    fn has(&self, hash: u64) -> bool {
        hash % self.of == self.number
    }
}

/// Divides the keys of `rows` rows into slices, so that the keys of one slice fit into `memory_bytes`.
fn slices(rows: u64, memory_bytes: usize) -> impl Iterator<Item = Slice> {
    let keys = (memory_bytes / KEY_BYTES).max(1) as u64;
    let of = rows.div_ceil(keys).max(1);
    (0..of).map(move |number| Slice { number, of })
}

/// Returns the ranges of `log` that are not skipped, in order.
fn unskipped(log: Range<i64>, skips: &[Range<i64>]) -> Vec<Range<i64>> {
    let mut skips = skips.to_vec();
    skips.sort_unstable_by_key(|skip| skip.start);
    let (mut left, mut from) = (Vec::new(), log.start);
    for skip in skips {
        left.push(from..skip.start.min(log.end));
        from = from.max(skip.end);
    }
    left.push(from..log.end);
    left.retain(|offsets| !offsets.is_empty());
    left
}

/// Counts of the log's records by kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Tally {
    events: i64,
    duplicates: i64,
    dead_letters: i64,
}

/// One pass over the log.
struct Pass<'a> {
    slice: Slice,
    /// The keys of this pass in the table, sorted by key.
    stored: Vec<Stored>,
    /// For each key in `stored`: whether the log has its event at the stored offset.
    confirmed: Vec<bool>,
    /// Keys in the log that the table lacks.
    missing: HashSet<(i64, u64)>,
    tally: &'a mut Tally,
    partition: i32,
    differences: &'a mut Differences,
}

impl<'a> Pass<'a> {
    /// A pass that has read nothing yet. `stored` must be sorted by key.
    fn new(
        slice: Slice,
        stored: Vec<Stored>,
        partition: i32,
        tally: &'a mut Tally,
        differences: &'a mut Differences,
    ) -> Pass<'a> {
        let (confirmed, missing) = (vec![false; stored.len()], HashSet::new());
        Pass { slice, stored, confirmed, missing, tally, partition, differences }
    }

    /// Compares the events of a chunk with the stored keys.
    fn compare(&mut self, chunk: &Chunk) {
        if self.slice.number == 0 {
            self.tally.dead_letters += chunk.poison.len() as i64;
        }
        for event in chunk.events.iter().filter(|event| self.slice.has(event.hash)) {
            let key = (event.time_ms, event.hash);
            let partition = self.partition;
            let shown = || {
                let id = String::from_utf8_lossy(chunk.id(event));
                format!("partition {partition}, offset {}: {id} at {}", event.offset, rfc3339(event.time_ms))
            };
            match self.stored.binary_search_by_key(&key, Stored::key) {
                Ok(index) => match self.stored[index].offset {
                    offset if offset == event.offset => {
                        self.confirmed[index] = true;
                        self.tally.events += 1;
                    }
                    offset if offset < event.offset => self.tally.duplicates += 1,
                    offset => {
                        self.differences
                            .note(|| format!("{} is stored with the later offset {offset}", shown()));
                    }
                },
                Err(_) if self.missing.contains(&key) => self.tally.duplicates += 1,
                Err(_) => {
                    self.differences.note(|| format!("{} is not in the table", shown()));
                    if self.missing.len() < MAX_MISSING {
                        self.missing.insert(key);
                    }
                }
            }
        }
    }

    /// Reports the rows with offsets in `read` for which the log has no event.
    fn report_unconfirmed(self, read: &[Range<i64>]) {
        for (row, confirmed) in self.stored.iter().zip(self.confirmed) {
            if !confirmed && read.iter().any(|offsets| offsets.contains(&row.offset)) {
                self.differences.note(|| {
                    let (at, offset) = (rfc3339(row.time_ms), row.offset);
                    format!(
                        "partition {}, row at {at} with offset {offset}: the log has no such event at this offset",
                        self.partition
                    )
                });
            }
        }
    }
}

/// Compares the counts of a complete log with the totals of the progress row.
fn compare_totals(partition: i32, found: Tally, position: &LogPosition, differences: &mut Differences) {
    let totals = position.totals;
    let counted =
        Tally { events: totals.events, duplicates: totals.duplicates, dead_letters: totals.dead_letters };
    if found != counted {
        differences.note(|| {
            format!(
                "partition {partition}: the log has {} events, {} duplicates, {} dead letters below offset {}; \
                 the progress row counts {}, {}, {}",
                found.events,
                found.duplicates,
                found.dead_letters,
                position.next_offset,
                totals.events,
                totals.duplicates,
                totals.dead_letters
            )
        });
    }
}

impl Verifier {
    /// Compares the event rows and totals of one partition below its next offset with the log. `rows` is the
    /// approximate number of event rows of the partition. The scope must cover all event times.
    pub async fn compare_log(
        &self,
        scope: &Scope,
        rows: u64,
        progress: &ProgressBar,
    ) -> Result<Outcome, ProcessorError> {
        let (mut outcome, mut tally, mut read) = (Outcome::default(), Tally::default(), Vec::new());
        let (partition, position) = (scope.partition, &scope.position);
        let skips = self.sources.store.skips(partition).await?;
        start_progress(progress, partition, "log", 0);
        for slice in slices(rows, self.memory_bytes) {
            let stored = self.stored(scope, slice, rows).await?;
            let mut pass = Pass::new(slice, stored, partition, &mut tally, &mut outcome.differences);
            let reading = || self.read_log(scope, &skips, &mut pass, progress);
            (read, outcome.expired_records) = tokio::task::block_in_place(reading)?;
            pass.report_unconfirmed(&read);
            outcome.log_passes += 1;
        }
        let offsets: i64 = read.iter().map(|offsets| offsets.end - offsets.start).sum();
        outcome.records = offsets.unsigned_abs();
        // The totals cover more offsets than were read if the log is trimmed or a recorded range was never skipped.
        if offsets + position.totals.skipped == position.next_offset {
            compare_totals(partition, tally, position, &mut outcome.differences);
        }
        Ok(outcome)
    }

    /// Reads the stored keys of a slice and sorts them.
    async fn stored(&self, scope: &Scope, slice: Slice, rows: u64) -> Result<Vec<Stored>, ProcessorError> {
        let expected = rows / slice.of;
        let mut stored = Vec::with_capacity((expected + expected / 32) as usize);
        for span in &scope.spans {
            let take = |time_ms: i64, id: &[u8], offset: i64| {
                let hash = seen_hash(time_ms, id);
                if slice.has(hash) {
                    stored.push(Stored { time_ms, hash, offset });
                }
            };
            self.reader.keys(span, take).await?;
        }
        stored.sort_unstable_by_key(Stored::key);
        Ok(stored)
    }

    /// Reads the log up to the position, except for skipped ranges. Returns the ranges that were compared, and the
    /// number of earlier records that were not, because their rows may have expired. Blocking.
    fn read_log(
        &self,
        scope: &Scope,
        skips: &[Range<i64>],
        pass: &mut Pass<'_>,
        progress: &ProgressBar,
    ) -> Result<(Vec<Range<i64>>, u64), ProcessorError> {
        let (partition, next_offset) = (scope.partition, scope.position.next_offset);
        let Sources { brokers, topic, definition, .. } = &self.sources;
        let log = LogReader::open(brokers, topic, partition, None)?;
        let (low, high) = (log.low, log.end);
        if next_offset > high {
            return Err(ProcessorError::Refused(format!(
                "partition {partition}: the next offset is {next_offset}, but the log ends at {high}: \
                 the topic was truncated or recreated"
            )));
        }
        let mut read = unskipped(low..next_offset, skips);
        progress.set_length(pass.slice.of * next_offset.saturating_sub(low).max(0) as u64);
        let decoder = Decoder::new(definition, partition);
        let (mut chunk, mut expired) = (decoder.chunk(), 0);
        for offsets in &mut read {
            let mut reader = LogReader::open(brokers, topic, partition, Some(offsets.start))?;
            reader.end = offsets.end;
            while let Some(message) = reader.next_record()? {
                let (offset, timestamp_ms) = (message.offset(), message.timestamp().to_millis().unwrap_or(0));
                // Timestamps increase with offsets, so these records come first.
                if offset == offsets.start && self.expiry().is_possible(timestamp_ms, now_ms()) {
                    (offsets.start, expired) = (offset + 1, expired + 1);
                    continue;
                }
                let headers = message.headers().map(readable_headers).unwrap_or_default();
                let (key, value) = (message.key(), message.payload());
                decoder.decode(&Record { offset, timestamp_ms, key, value, headers: &headers }, &mut chunk);
                if chunk.len() == CHUNK_RECORDS {
                    pass.compare(&chunk);
                    progress.inc(CHUNK_RECORDS as u64);
                    chunk = decoder.chunk();
                }
            }
        }
        pass.compare(&chunk);
        Ok((read, expired))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::count::partition::Totals;
    use common::contracts::stream::Definition;
    use proptest::prelude::*;

    const NOW: i64 = 1_800_000_000_000;
    const NEXT_OFFSET: i64 = 4;

    /// Builds a chunk of events with these ids from offset 0 on. `None` is an undecodable record.
    fn chunk(ids: &[Option<&str>]) -> Chunk {
        let text = include_str!("../../../../../streams/user_created.toml");
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

    /// Compares `log` with rows of these ids and offsets, in passes whose keys fit into `memory_bytes`.
    fn compare(
        log: &[Option<&str>],
        rows: &[(&str, i64)],
        low: i64,
        memory_bytes: usize,
    ) -> (Tally, Differences) {
        let (mut tally, mut differences) = (Tally::default(), Differences::default());
        for slice in slices(rows.len() as u64, memory_bytes) {
            let stored = rows.iter().map(|(id, offset)| Stored {
                time_ms: NOW,
                hash: seen_hash(NOW, id.as_bytes()),
                offset: *offset,
            });
            let mut stored: Vec<Stored> = stored.filter(|row| slice.has(row.hash)).collect();
            stored.sort_unstable_by_key(Stored::key);
            let mut pass = Pass::new(slice, stored, 0, &mut tally, &mut differences);
            pass.compare(&chunk(log));
            pass.report_unconfirmed(std::slice::from_ref(&(low..NEXT_OFFSET)));
        }
        (tally, differences)
    }

    #[test]
    fn rows_and_totals_are_compared_with_the_log() {
        let totals = Totals { events: 2, duplicates: 1, dead_letters: 1, ..Totals::default() };
        let check = |rows: &[(&str, i64)], totals, parts: &[&str]| {
            let log = [Some("a"), Some("b"), Some("a"), None];
            let (tally, mut found) = compare(&log, rows, 0, usize::MAX);
            let position = LogPosition { next_offset: NEXT_OFFSET, totals, ..LogPosition::default() };
            compare_totals(0, tally, &position, &mut found);
            assert_eq!((found.count, found.shown.len()), (parts.len() as u64, parts.len()), "{found:?}");
            for part in parts {
                assert!(found.shown.iter().any(|line| line.contains(part)), "{part}: {found:?}");
            }
        };
        check(&[("a", 0), ("b", 1)], totals, &[]);
        check(&[("a", 0), ("b", 1), ("later", 4)], totals, &[]);
        check(&[("a", 0)], totals, &["offset 1: b at 2027-01-15T08:00:00Z", "the log has 1 events"]);
        check(&[("a", 2), ("b", 1)], Totals { duplicates: 0, ..totals }, &["with the later offset 2"]);
        check(&[("a", 0), ("b", 1), ("c", 3)], totals, &["with offset 3: the log has no such event"]);
        check(&[("a", 0), ("b", 1)], Totals { events: 3, ..totals }, &["counts 3, 1, 1"]);
    }

    #[test]
    fn rows_of_records_removed_by_retention_are_not_reported() {
        let log = [Some("a"), Some("b"), Some("a"), None];
        let (_, differences) = compare(&log, &[("old", 1), ("a", 0), ("b", 1)], 2, usize::MAX);
        assert_eq!(differences, Differences::default());
    }

    #[test]
    fn skipped_ranges_are_cut_out_of_the_log() {
        let ranges = |ends: &[(i64, i64)]| ends.iter().map(|(from, to)| *from..*to).collect::<Vec<_>>();
        let check = |skips: &[(i64, i64)], left: &[(i64, i64)]| {
            assert_eq!(unskipped(10..50, &ranges(skips)), ranges(left));
        };
        check(&[], &[(10, 50)]);
        check(&[(20, 25), (0, 12), (22, 30)], &[(12, 20), (30, 50)]);
        check(&[(40, 60)], &[(10, 40)]);
        check(&[(60, 70)], &[(10, 50)]);
        check(&[(0, 50)], &[]);
    }

    proptest! {
        #[test]
        fn several_passes_find_the_same_differences_as_one(
            log in proptest::collection::vec(0usize..12, 4), rows in proptest::collection::btree_set((0usize..12, 0i64..4), 0..12),
            keys in 1usize..5,
        ) {
            const IDS: [&str; 12] = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", ""];
            let log: Vec<Option<&str>> = log.iter().map(|n| Some(IDS[*n]).filter(|id| !id.is_empty())).collect();
            let mut rows: Vec<(&str, i64)> = rows.iter().map(|(n, offset)| (IDS[*n], *offset)).collect();
            rows.dedup_by_key(|(id, _)| *id);
            let (tally, differences) = compare(&log, &rows, 0, usize::MAX);
            let (tally_in_parts, mut in_parts) = compare(&log, &rows, 0, keys * KEY_BYTES);
            prop_assert_eq!((tally, differences.count), (tally_in_parts, in_parts.count));
            let mut shown = differences.shown;
            shown.sort();
            in_parts.shown.sort();
            prop_assert_eq!(shown, in_parts.shown);
        }
    }
}
