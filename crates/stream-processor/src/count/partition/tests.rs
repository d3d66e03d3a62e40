//! Schedules of the protocol that need no I/O: copies in one batch, a moving hot/cold boundary, and offset fences.

use super::{LogPosition, Partition};
use crate::count::windows::hot::Panes;
use crate::count::windows::pane::PaneShape;
use crate::record::chunk::Chunk;
use crate::record::decode::{Decoder, Record};
use common::contracts::stream::Definition;

const MINUTE: i64 = 60_000;
const BASE: i64 = 1_800_000_000_000;

fn definition() -> Definition {
    let text = include_str!("../../../../../streams/user_created.toml");
    Definition::parse("user_created.toml", text).unwrap()
}

fn partition(hot_from: i64) -> Partition {
    let panes = Panes::new(PaneShape::new(&definition()), MINUTE, 10 * MINUTE, usize::MAX, hot_from);
    Partition::new(LogPosition::default(), panes, 10 * MINUTE)
}

/// Builds a chunk of events `(minute, id)` that starts at offset `first`. An event with an empty id is undecodable.
fn chunk(first: i64, events: &[(i64, &str)]) -> Chunk {
    let decoder = Decoder::new(&definition(), 0);
    let mut chunk = decoder.chunk();
    for (offset, (minute, id)) in (first..).zip(events) {
        let time = chrono::DateTime::from_timestamp_millis(BASE + minute * MINUTE).unwrap().to_rfc3339();
        let headers = [("ce_id", Some(id.as_bytes())), ("ce_time", Some(time.as_bytes()))];
        let value = Some(br#"{"first_name":"A","last_name":"B","age":30}"#.as_slice());
        let record = Record { offset, timestamp_ms: BASE + 30 * MINUTE, key: None, value, headers: &headers };
        decoder.decode(&record, &mut chunk);
    }
    chunk
}

fn totals(p: &Partition) -> [i64; 4] {
    let t = p.position.totals;
    [t.events, t.duplicates, t.late, t.dead_letters]
}

#[test]
fn copies_in_one_batch_count_once_in_hot_and_cold_panes() {
    for hot_from in [i64::MIN, i64::MAX] {
        let mut p = partition(hot_from);
        let chunk = chunk(0, &[(0, "a"), (0, "a"), (1, "a"), (0, "")]);
        let lookups = p.questions(&chunk).keys;
        assert_eq!(lookups.len(), if hot_from == i64::MAX { 3 } else { 0 });
        let applied = p.apply(&chunk, &lookups, &vec![None; lookups.len()]).unwrap();
        assert_eq!(applied.rows, [0, 2], "the same id at a different time is a different event");
        assert_eq!(totals(&p), [2, 1, 0, 1]);
    }
}

#[test]
fn a_seen_key_is_looked_up_and_the_stored_offset_decides_whether_it_is_a_copy() {
    let mut p = partition(i64::MIN);
    p.apply(&chunk(0, &[(0, "a")]), &[], &[]).unwrap();
    let copy = chunk(1, &[(0, "a"), (0, "b")]);
    assert_eq!(p.questions(&copy).keys, [0]);
    p.apply(&copy, &[0], &[Some(0)]).unwrap();
    assert_eq!(totals(&p), [2, 1, 0, 0]);
    let false_hit = chunk(3, &[(0, "a")]);
    p.apply(&false_hit, &[0], &[None]).unwrap();
    assert_eq!(
        totals(&p),
        [3, 1, 0, 0],
        "without a row it is a first copy, even if the filter reports a hit"
    );
}

#[test]
fn a_row_with_the_same_offset_is_written_and_counted_again() {
    let mut p = partition(i64::MAX);
    let applied = p.apply(&chunk(0, &[(0, "a")]), &[0], &[Some(0)]).unwrap();
    assert_eq!((applied.rows, totals(&p)), (vec![0], [1, 0, 0, 0]));
}

#[test]
fn a_later_stored_offset_is_rejected_as_a_different_log() {
    let mut p = partition(i64::MAX);
    let error = p.apply(&chunk(4, &[(0, "a")]), &[0], &[Some(9)]).unwrap_err();
    assert_eq!((error.offset, error.found), (4, 9));
}

#[test]
fn hot_from_moves_only_between_batches() {
    let mut p = partition(i64::MIN);
    let chunk = chunk(0, &[(0, "a"), (25, "b"), (0, "a")]);
    p.apply(&chunk, &[], &[]).unwrap();
    assert_eq!(totals(&p), [2, 1, 0, 0]);
    assert_eq!(p.advance(), [BASE], "the pane of minute 0 becomes cold after the batch");
}

#[test]
fn a_replay_adds_only_records_at_or_after_count_from_to_the_totals() {
    let mut p = partition(i64::MAX);
    p.position.count_from = 2;
    p.position.totals.events = 2;
    p.apply(&chunk(0, &[(0, "a"), (0, "b"), (0, "c")]), &[0, 1, 2], &[Some(0), Some(1), None]).unwrap();
    assert_eq!(totals(&p), [3, 0, 0, 0]);
}

#[test]
fn whether_an_event_is_late_depends_on_the_log_before_it() {
    let mut p = partition(i64::MIN);
    p.apply(&chunk(0, &[(0, "a"), (20, "b"), (9, "c"), (10, "d")]), &[], &[]).unwrap();
    assert_eq!(totals(&p), [4, 0, 1, 0]);
}
