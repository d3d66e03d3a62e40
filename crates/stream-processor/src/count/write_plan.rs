//! Assigns rows to statements. Each statement writes to one Cassandra partition and is bounded in rows and bytes. Pure.

use crate::record::chunk::Chunk;
use common::contracts::event::Bucket;
use common::contracts::schema::{MAX_BATCH_BYTES, MAX_BATCH_ROWS};
use std::collections::{BTreeMap, HashMap};

/// Events that share one Cassandra partition of the event table, either to write or to look up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventGroup {
    /// Start of the bucket in Unix milliseconds.
    pub bucket: i64,
    /// Shard within the bucket.
    pub shard: i32,
    /// Indexes of the chunk's events.
    pub events: Vec<u32>,
}

/// Pane rows that share one Cassandra partition of the pane table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PaneGroup {
    /// Start of the bucket in Unix milliseconds.
    pub bucket: i64,
    /// Pane start in Unix milliseconds and row index of each row.
    pub rows: Vec<(i64, usize)>,
}

/// Groups events by Cassandra partition and splits each group into statements.
pub fn group_events(chunk: &Chunk, events: &[u32], bucket: Bucket) -> Vec<EventGroup> {
    let mut index: HashMap<(i64, i32), usize, foldhash::fast::FixedState> = HashMap::default();
    let mut groups: Vec<(EventGroup, usize)> = Vec::new();
    let mut full = Vec::new();
    for number in events {
        let event = &chunk.events[*number as usize];
        let (start, shard) = (bucket.start_of(event.time_ms), event.shard);
        let at = *index.entry((start, shard)).or_insert_with(|| {
            groups.push((EventGroup { bucket: start, shard, events: Vec::new() }, 0));
            groups.len() - 1
        });
        let (group, bytes) = &mut groups[at];
        let more = chunk.row_bytes(*number as usize);
        if group.events.len() == MAX_BATCH_ROWS
            || (*bytes + more > MAX_BATCH_BYTES && !group.events.is_empty())
        {
            full.push(EventGroup { events: std::mem::take(&mut group.events), ..*group });
            *bytes = 0;
        }
        group.events.push(*number);
        *bytes += more;
    }
    full.extend(groups.into_iter().map(|(group, _)| group));
    full
}

/// Groups pane rows by Cassandra partition and splits each group into statements. `row_bytes` is the size of one row.
pub fn group_panes(panes: &BTreeMap<i64, Vec<usize>>, bucket: Bucket, row_bytes: usize) -> Vec<PaneGroup> {
    let max_rows = (MAX_BATCH_BYTES / row_bytes.max(1)).clamp(1, MAX_BATCH_ROWS);
    let mut groups: Vec<PaneGroup> = Vec::new();
    for (start, rows) in panes {
        let of = bucket.start_of(*start);
        for row in rows {
            match groups.last_mut() {
                Some(g) if g.bucket == of && g.rows.len() < max_rows => g.rows.push((*start, *row)),
                _ => groups.push(PaneGroup { bucket: of, rows: vec![(*start, *row)] }),
            }
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::chunk::DecodedEvent;
    use proptest::prelude::*;

    fn chunk(events: &[(i64, i32, u32)]) -> Chunk {
        let mut chunk = Chunk::new(1, 0);
        for (offset, (time_ms, shard, bytes)) in (0i64..).zip(events) {
            chunk.cells.push((0, *bytes as i32));
            chunk.events.push(DecodedEvent {
                offset,
                time_ms: *time_ms,
                watermark_ms: *time_ms,
                hash: 0,
                shard: *shard,
                groups: [0; 4],
                produced_at_us: 0,
                id: (0, 8),
                run_id: (0, -2),
            });
        }
        chunk
    }

    proptest! {
        #[test]
        fn every_event_is_in_one_statement_of_its_partition_and_no_statement_is_too_large(
            events in proptest::collection::vec((0i64..4_000_000, 0i32..3, 0u32..700_000), 0..900),
        ) {
            let chunk = chunk(&events);
            let all: Vec<u32> = (0..events.len() as u32).collect();
            let groups = group_events(&chunk, &all, Bucket::TenMinutes);
            let mut seen: Vec<u32> = groups.iter().flat_map(|g| g.events.clone()).collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, all);
            for group in &groups {
                let bytes: usize = group.events.iter().map(|e| chunk.row_bytes(*e as usize)).sum();
                prop_assert!(group.events.len() <= MAX_BATCH_ROWS);
                prop_assert!(bytes <= MAX_BATCH_BYTES || group.events.len() == 1);
                for event in &group.events {
                    let event = &chunk.events[*event as usize];
                    prop_assert_eq!((Bucket::TenMinutes.start_of(event.time_ms), event.shard), (group.bucket, group.shard));
                }
            }
        }
    }

    #[test]
    fn pane_rows_of_one_bucket_share_statements_within_the_bounds() {
        let panes =
            BTreeMap::from([(0, (0..150).collect()), (60_000, (0..100).collect()), (600_000, vec![0])]);
        let sizes = |row_bytes| -> Vec<_> {
            let groups = group_panes(&panes, Bucket::TenMinutes, row_bytes);
            groups.iter().map(|g| (g.bucket, g.rows.len())).collect()
        };
        assert_eq!(sizes(100), [(0, 200), (0, 50), (600_000, 1)]);
        assert_eq!(sizes(MAX_BATCH_BYTES / 125), [(0, 125), (0, 125), (600_000, 1)]);
        assert_eq!(
            sizes(2 * MAX_BATCH_BYTES).len(),
            251,
            "a row larger than the bound is in a statement without other rows"
        );
    }
}
