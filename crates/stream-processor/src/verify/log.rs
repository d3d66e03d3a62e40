//! `verify --kafka`: rows and totals compared with Kafka's own log, as far as it is retained. Where the keys of all rows do not
//! fit into the given memory, log and rows are read several times, each time for another slice of the keys.

use super::compare::may_have_expired;
use super::{Differences, Outcome, Sources, Standing, Verifier, begin, now_ms, spelled};
use crate::chunk::Chunk;
use crate::decode::{Decoder, Record};
use crate::error::ProcessorError;
use crate::fetch::readable_headers;
use crate::log_reader::LogReader;
use crate::partition::Position;
use crate::store::Store;
use common::event::seen_hash;
use indicatif::ProgressBar;
use rdkafka::Message;
use std::collections::HashSet;
use std::ops::Range;

/// Records decoded at a time.
const CHUNK_RECORDS: usize = 4000;
/// Bytes of one stored key in memory: [`Stored`], whether it was confirmed, and room for uneven slices.
const KEY_BYTES: usize = 28;
/// Keys that the table lacks, remembered so that a copy of one is not reported again; beyond that many, it is.
const MISSING_MOST: usize = 100_000;

/// The key of an event row and the offset it came from. The id is known by its hash only.
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

/// The keys that one pass looks at.
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

/// As many slices as it takes for the keys of one to fit into `memory_bytes`.
fn slices(rows: u64, memory_bytes: usize) -> impl Iterator<Item = Slice> {
    let keys = (memory_bytes / KEY_BYTES).max(1) as u64;
    let of = rows.div_ceil(keys).max(1);
    (0..of).map(move |number| Slice { number, of })
}

/// What of `log` is left without the skipped ranges, in order.
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

/// The log as it was found, by what became of each record.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Tally {
    events: i64,
    duplicates: i64,
    dead_letters: i64,
}

/// One pass over the log.
struct Pass<'a> {
    slice: Slice,
    /// Sorted by key.
    stored: Vec<Stored>,
    /// Whether the log has the event of the stored key of the same index at its offset.
    confirmed: Vec<bool>,
    missing: HashSet<(i64, u64)>,
    tally: &'a mut Tally,
    partition: i32,
    differences: &'a mut Differences,
}

impl Pass<'_> {
    fn take(&mut self, chunk: &Chunk) {
        if self.slice.number == 0 {
            self.tally.dead_letters += chunk.poison.len() as i64;
        }
        for event in chunk.events.iter().filter(|event| self.slice.has(event.hash)) {
            let key = (event.time_ms, event.hash);
            let partition = self.partition;
            let shown = || {
                let id = String::from_utf8_lossy(chunk.id(event));
                format!("partition {partition}, offset {}: {id} at {}", event.offset, spelled(event.time_ms))
            };
            match self.stored.binary_search_by_key(&key, Stored::key) {
                Ok(index) => match self.stored[index].offset {
                    offset if offset == event.offset => {
                        self.confirmed[index] = true;
                        self.tally.events += 1;
                    }
                    offset if offset < event.offset => self.tally.duplicates += 1,
                    offset => {
                        self.differences.note(|| format!("{} is stored with the later {offset}", shown()));
                    }
                },
                Err(_) if self.missing.contains(&key) => self.tally.duplicates += 1,
                Err(_) => {
                    self.differences.note(|| format!("{} is not in the table", shown()));
                    if self.missing.len() < MISSING_MOST {
                        self.missing.insert(key);
                    }
                }
            }
        }
    }

    /// Rows of offsets in `read` that the log should have and has not.
    fn close(self, read: &[Range<i64>]) {
        for (row, confirmed) in self.stored.iter().zip(self.confirmed) {
            if !confirmed && read.iter().any(|offsets| offsets.contains(&row.offset)) {
                self.differences.note(|| {
                    let (at, offset) = (spelled(row.time_ms), row.offset);
                    format!(
                        "partition {}, row at {at} of offset {offset}: the log has no such event there",
                        self.partition
                    )
                });
            }
        }
    }
}

/// With a whole log, the totals must be those of the progress row.
fn compare_totals(partition: i32, found: Tally, position: &Position, differences: &mut Differences) {
    let totals = position.totals;
    let counted =
        Tally { events: totals.events, duplicates: totals.duplicates, dead_letters: totals.dead_letters };
    if found != counted {
        differences.note(|| {
            format!(
                "partition {partition}: the log holds {} events, {} duplicates, {} dead letters below offset {}; the progress \
                 row says {}, {}, {}",
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
    /// Compares the event rows and totals of one partition below its next offset with the log. `rows`: how many event rows
    /// the partition has, about. The standing must be that of all times.
    pub async fn compare_log(
        &self,
        standing: &Standing,
        rows: u64,
        progress: &ProgressBar,
    ) -> Result<Outcome, ProcessorError> {
        let (mut outcome, mut tally, mut read) = (Outcome::default(), Tally::default(), Vec::new());
        let (partition, position) = (standing.partition, &standing.position);
        let skips = self.sources.store.skips(partition).await?;
        begin(progress, partition, "log", 0);
        for slice in slices(rows, self.memory_bytes) {
            let stored = self.stored(standing, slice, rows).await?;
            let mut pass = Pass {
                slice,
                confirmed: vec![false; stored.len()],
                stored,
                missing: HashSet::new(),
                tally: &mut tally,
                partition,
                differences: &mut outcome.differences,
            };
            let reading = || self.read_log(standing, &skips, &mut pass, progress);
            (read, outcome.expired_records) = tokio::task::block_in_place(reading)?;
            pass.close(&read);
            outcome.log_passes += 1;
        }
        let offsets: i64 = read.iter().map(|offsets| offsets.end - offsets.start).sum();
        outcome.records = offsets.unsigned_abs();
        // Without the whole log, or with a range that was recorded but never skipped, the totals say more than was read.
        if offsets + position.totals.skipped == position.next_offset {
            compare_totals(partition, tally, position, &mut outcome.differences);
        }
        Ok(outcome)
    }

    /// The stored keys of a slice, sorted.
    async fn stored(
        &self,
        standing: &Standing,
        slice: Slice,
        rows: u64,
    ) -> Result<Vec<Stored>, ProcessorError> {
        let expected = rows / slice.of;
        let mut stored = Vec::with_capacity((expected + expected / 32) as usize);
        for stretch in &standing.stretches {
            let take = |time_ms: i64, id: &[u8], offset: i64| {
                let hash = seen_hash(time_ms, id);
                if slice.has(hash) {
                    stored.push(Stored { time_ms, hash, offset });
                }
            };
            self.reader.keys(stretch, take).await?;
        }
        stored.sort_unstable_by_key(Stored::key);
        Ok(stored)
    }

    /// Reads the log up to the position, without what was skipped. Returns the offsets that were compared, and how many records
    /// before them were not, because their rows may have expired. Blocking.
    fn read_log(
        &self,
        standing: &Standing,
        skips: &[Range<i64>],
        pass: &mut Pass<'_>,
        progress: &ProgressBar,
    ) -> Result<(Vec<Range<i64>>, u64), ProcessorError> {
        let (partition, next_offset) = (standing.partition, standing.position.next_offset);
        let Sources { brokers, topic, definition, .. } = &self.sources;
        let log = LogReader::open(brokers, topic, partition, None)?;
        let (low, high) = (log.low, log.end);
        if next_offset > high {
            return Err(ProcessorError::Refused(format!(
                "partition {partition}: the next offset is {next_offset}, the log ends at {high}: another log"
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
                // Time stamps rise with offsets, so these records come first.
                if offset == offsets.start && may_have_expired(timestamp_ms, self.ttl_ms(), now_ms()) {
                    (offsets.start, expired) = (offset + 1, expired + 1);
                    continue;
                }
                let headers = message.headers().map(readable_headers).unwrap_or_default();
                let (key, value) = (message.key(), message.payload());
                decoder.decode(&Record { offset, timestamp_ms, key, value, headers: &headers }, &mut chunk);
                if chunk.len() == CHUNK_RECORDS {
                    pass.take(&chunk);
                    progress.inc(CHUNK_RECORDS as u64);
                    chunk = decoder.chunk();
                }
            }
        }
        pass.take(&chunk);
        Ok((read, expired))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::partition::Totals;
    use common::stream::Definition;
    use proptest::prelude::*;

    const NOW: i64 = 1_800_000_000_000;
    const NEXT_OFFSET: i64 = 4;

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

    /// Compares `log` with rows of these ids and offsets, in passes of as many keys as fit into `memory_bytes`.
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
            let mut pass = Pass {
                slice,
                confirmed: vec![false; stored.len()],
                stored,
                missing: HashSet::new(),
                tally: &mut tally,
                partition: 0,
                differences: &mut differences,
            };
            pass.take(&chunk(log));
            pass.close(std::slice::from_ref(&(low..NEXT_OFFSET)));
        }
        (tally, differences)
    }

    #[test]
    fn rows_and_totals_are_compared_with_the_log() {
        let totals = Totals { events: 2, duplicates: 1, dead_letters: 1, ..Totals::default() };
        let check = |rows: &[(&str, i64)], totals, parts: &[&str]| {
            let log = [Some("a"), Some("b"), Some("a"), None];
            let (tally, mut found) = compare(&log, rows, 0, usize::MAX);
            let position = Position { next_offset: NEXT_OFFSET, totals, ..Position::default() };
            compare_totals(0, tally, &position, &mut found);
            assert_eq!((found.count, found.shown.len()), (parts.len() as u64, parts.len()), "{found:?}");
            for part in parts {
                assert!(found.shown.iter().any(|line| line.contains(part)), "{part}: {found:?}");
            }
        };
        check(&[("a", 0), ("b", 1)], totals, &[]);
        check(&[("a", 0), ("b", 1), ("later", 4)], totals, &[]);
        check(&[("a", 0)], totals, &["offset 1: b at 2027-01-15T08:00:00Z", "the log holds 1 events"]);
        check(&[("a", 2), ("b", 1)], Totals { duplicates: 0, ..totals }, &["with the later 2"]);
        check(&[("a", 0), ("b", 1), ("c", 3)], totals, &["of offset 3: the log has no such event"]);
        check(&[("a", 0), ("b", 1)], Totals { events: 3, ..totals }, &["says 3, 1, 1"]);
    }

    #[test]
    fn what_retention_removed_is_not_held_against_the_rows() {
        let log = [Some("a"), Some("b"), Some("a"), None];
        let (_, differences) = compare(&log, &[("old", 1), ("a", 0), ("b", 1)], 2, usize::MAX);
        assert_eq!(differences, Differences::default());
    }

    #[test]
    fn what_is_left_of_a_log_without_its_skipped_ranges() {
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
        fn several_passes_find_what_one_finds(
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
