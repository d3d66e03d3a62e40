//! Tables of facts and the start that they lead to, and of contradictions that are refused.

use super::*;
use crate::count::partition::Totals;
use common::contracts::stream::{Column, Definition};
use std::sync::LazyLock;

static LAYOUT: LazyLock<Layout> = LazyLock::new(layout);

fn changed(edit: impl Fn(&mut Definition)) -> Layout {
    let text = include_str!("../../../../../streams/user_created.toml");
    let mut definition = Definition::parse("user_created.toml", text).unwrap();
    edit(&mut definition);
    definition.layout()
}

fn layout() -> Layout {
    changed(|_| {})
}

fn position(next_offset: i64) -> LogPosition {
    let totals = Totals { events: next_offset, ..Totals::default() };
    let last_record = Some(LastRecord { offset: next_offset - 1, fingerprint: 9 });
    LogPosition { next_offset, last_record, totals, seen_to: Some(5), ..LogPosition::default() }
}

fn progress(next_offset: i64) -> Option<ProgressFacts> {
    Some(ProgressFacts { position: position(next_offset), written_to: Some(next_offset) })
}

/// Rows below `written_to` are acknowledged but not published, as after a kill between commit and publish.
fn unpublished(next_offset: i64, written_to: i64) -> Option<ProgressFacts> {
    Some(ProgressFacts { position: position(next_offset), written_to: Some(written_to) })
}

fn state(next_offset: i64) -> Option<StateFacts> {
    Some(StateFacts { position: position(next_offset), layout: layout().to_string(), cluster_id: "C".into() })
}

fn facts<'a>(state: Option<StateFacts>, progress: Option<ProgressFacts>) -> StartFacts<'a> {
    StartFacts {
        partition: 3,
        state,
        progress,
        low: 10,
        high: 100,
        layout: &LAYOUT,
        cluster_id: "C",
        skips: &[],
        recover: RecoverPolicy::Auto,
        replay: false,
    }
}

fn check(facts: &StartFacts<'_>, how: How, next: i64, fetch: i64) {
    let start = decide(facts).unwrap();
    assert_eq!((start.how, start.position.next_offset, start.fetch_from), (how, next, fetch));
}

fn check_refusal(facts: &StartFacts<'_>, parts: &[&str]) {
    let refusal = decide(facts).unwrap_err().to_string();
    for part in parts {
        assert!(refusal.contains(part), "`{part}` is missing in `{refusal}`");
    }
}

#[test]
fn a_partition_starts_from_whichever_of_state_file_and_progress_row_is_ahead() {
    check(&facts(state(50), unpublished(40, 50)), How::Resume, 50, 49);
    check(&facts(state(40), progress(50)), How::Recover, 50, 49);
    check(&facts(None, progress(50)), How::Recover, 50, 49);
    check(&facts(None, None), How::Earliest, 10, 10);
    check(&facts(state(10), progress(10)), How::Resume, 10, 10);
}

#[test]
fn writes_that_the_store_lost_are_reprocessed_from_the_log() {
    check(&facts(state(50), progress(40)), How::StoreBehind, 40, 39);
    check(&StartFacts { low: 0, ..facts(state(50), None) }, How::StoreBehind, 0, 0);
    let start = decide(&facts(state(50), progress(40))).unwrap();
    let last_of_state = LastRecord { offset: 49, fingerprint: 9 };
    assert_eq!(start.compare_first, Some(last_of_state), "the log must be the one of the state file");
    let before_markers = ProgressFacts { written_to: None, ..progress(40).unwrap() };
    check(&facts(state(50), Some(before_markers)), How::Resume, 50, 49);
    check(&StartFacts { replay: true, ..facts(state(50), progress(40)) }, How::Replay, 10, 10);
    let nothing_processed = state(10).map(|s| StateFacts {
        position: LogPosition { totals: Totals::default(), last_record: None, ..s.position },
        ..s
    });
    check(&facts(nothing_processed, None), How::Resume, 10, 10);
}

#[test]
fn lost_writes_that_the_log_no_longer_holds_are_refused_with_both_facts() {
    let behind = facts(state(50), progress(40));
    check_refusal(
        &StartFacts { low: 45, ..behind.clone() },
        &["below offset 50", "progress row is at 40", "kafka no longer holds offsets 40 to 44"],
    );
    check_refusal(&StartFacts { high: 49, ..behind.clone() }, &["below offset 50", "log ends at 49"]);
    check_refusal(&facts(state(50), None), &["no progress row", "no longer holds offsets 0 to 9"]);
    check_refusal(
        &StartFacts { recover: RecoverPolicy::Refuse, ..behind },
        &["restore a newer snapshot", "--recover auto"],
    );
}

#[test]
fn a_state_file_of_an_earlier_layout_is_resumed_if_stored_data_survives_the_change() {
    let mut optional = changed(|_| {});
    let mut check_survives = |edit: fn(&mut Definition)| {
        optional = changed(edit);
        check(&StartFacts { layout: &optional, ..facts(state(50), progress(50)) }, How::Resume, 50, 49);
    };
    check_survives(|d| {
        d.columns.push(Column { name: "phone".into(), required: false, ..d.columns[0].clone() })
    });
    check_survives(|d| d.windows.lateness_ms += 1);
    check_survives(|d| d.store.ttl_seconds = 0);
    let newer = changed(|d| drop(d.columns.pop()));
    let back = StartFacts { layout: &newer, ..facts(state(50), progress(50)) };
    check_refusal(&back, &["column `registered_at`: registered, but no longer declared"]);
}

#[test]
fn a_replay_whose_remaining_records_were_removed_is_abandoned() {
    let mut halfway = state(60);
    halfway.iter_mut().for_each(|s| (s.position.next_offset, s.position.count_from) = (15, 60));
    halfway.iter_mut().for_each(|s| s.position.last_record = Some(LastRecord { offset: 14, fingerprint: 9 }));
    check(&facts(halfway.clone(), progress(60)), How::Resume, 15, 14);
    let trimmed = StartFacts { low: 20, ..facts(halfway.clone(), progress(60)) };
    check(&trimmed, How::Recover, 60, 59);
    check_refusal(&StartFacts { low: 61, ..facts(halfway, progress(60)) }, &["the log starts at 61"]);
}

#[test]
fn a_replay_counts_only_records_that_the_progress_row_does_not_include() {
    let facts = StartFacts { replay: true, ..facts(state(60), unpublished(50, 60)) };
    let start = decide(&facts).unwrap();
    assert_eq!((start.how, start.position.next_offset, start.position.count_from), (How::Replay, 10, 50));
    assert_eq!(start.position.totals.events, 50);
    let last = LastRecord { offset: 49, fingerprint: 9 };
    assert_eq!((start.expected, start.compare_first), (None, Some(last)));
    let trimmed = decide(&StartFacts { low: 50, ..facts }).unwrap();
    assert_eq!(trimmed.compare_first, None, "retention has removed the last record");
}

#[test]
fn a_skip_that_covers_the_next_offset_moves_the_start_to_its_end() {
    let skipping = |skip: Range<i64>| {
        let facts = facts(state(50), progress(50));
        decide(&StartFacts { skips: std::slice::from_ref(&skip), ..facts }).unwrap()
    };
    let start = skipping(48..60);
    assert_eq!((start.skip, start.fetch_from, start.expected), (Some(50..60), 60, None));
    assert_eq!(start.compare_first, Some(LastRecord { offset: 49, fingerprint: 9 }));
    assert_eq!(skipping(50..1000).skip, Some(50..100), "a skip ends at the end of the log");
    assert_eq!(skipping(51..60).skip, None, "the records before the skip are processed first");
    assert_eq!(skipping(40..49).skip, None);
    assert_eq!(skipping(40..49).expected, Some(LastRecord { offset: 49, fingerprint: 9 }));
}

#[test]
fn fetching_does_not_start_before_skipped_offsets() {
    let last = LastRecord { offset: 46, fingerprint: 9 };
    let after_skip = LogPosition { last_record: Some(last), ..position(50) };
    let progress = Some(ProgressFacts { position: after_skip, written_to: Some(50) });
    let skip = 47..50;
    let start = decide(&StartFacts { skips: std::slice::from_ref(&skip), ..facts(None, progress) }).unwrap();
    assert_eq!((start.fetch_from, start.expected, start.skip), (50, None, None));
    assert_eq!(start.compare_first, Some(last));
}

#[test]
fn transaction_markers_after_the_last_record_do_not_hide_it() {
    let mut after_markers = position(50);
    after_markers.last_record = Some(LastRecord { offset: 46, fingerprint: 9 });
    let progress = Some(ProgressFacts { position: after_markers, written_to: Some(50) });
    check(&facts(None, progress), How::Recover, 50, 46);
    check(&StartFacts { low: 47, ..facts(None, progress) }, How::Recover, 50, 50);
}

#[test]
fn a_refusal_names_both_facts() {
    check_refusal(&facts(state(5), progress(5)), &["the next offset is 5, but the log starts at 10"]);
    check_refusal(&facts(state(500), progress(500)), &["offset 500 was reached, but the log ends at 100"]);
    check_refusal(&facts(None, progress(101)), &["offset 101 was reached"]);
    let other = changed(|d| d.store.shards += 1);
    let of_other = StartFacts { layout: &other, ..facts(state(50), None) };
    check_refusal(&of_other, &["another layout", "`store.shards`", "now 5"]);
    let unreadable = state(50).map(|state| StateFacts { layout: "L".into(), ..state });
    check_refusal(&facts(unreadable, None), &["another layout", "cannot be read", ": L"]);
    check_refusal(
        &StartFacts { cluster_id: "D", ..facts(state(50), None) },
        &["kafka cluster C, but this is cluster D"],
    );
    let refuse = StartFacts { recover: RecoverPolicy::Refuse, ..facts(None, progress(50)) };
    check_refusal(&refuse, &["--recover auto"]);
}
