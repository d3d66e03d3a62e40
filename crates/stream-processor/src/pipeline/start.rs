//! Decides from observed facts where a partition starts. Pure. Every refusal names the two facts that contradict each
//! other and what an operator can do.

use crate::count::partition::LogPosition;
use crate::record::chunk::LastRecord;
use common::contracts::stream::layout::Layout;
use std::ops::Range;

/// What to do if the state file is missing or behind Cassandra's progress row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RecoverPolicy {
    /// Recover from the progress row. Loses nothing and counts nothing twice, so it is the default.
    Auto,
    /// Refuse to start, so that an operator can look at it first.
    Refuse,
}

/// What a state file records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateFacts {
    /// Committed position.
    pub position: LogPosition,
    /// Layout that the file was created for, in its stored form.
    pub layout: String,
    /// Id of the Kafka cluster that the file was created for.
    pub cluster_id: String,
}

/// What Cassandra holds about a partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProgressFacts {
    /// The last published position.
    pub position: LogPosition,
    /// Every row and pane of the records below this offset was acknowledged. Written before each commit, so a state
    /// file is never ahead of it. `None` if a version that did not write it wrote the row.
    pub written_to: Option<i64>,
}

/// The facts that the decision is based on.
#[derive(Debug, Clone)]
pub struct StartFacts<'a> {
    /// Kafka partition.
    pub partition: i32,
    /// What the state file records; `None` if nothing was committed to it.
    pub state: Option<StateFacts>,
    /// The progress row; `None` if the partition has none.
    pub progress: Option<ProgressFacts>,
    /// First offset of the log.
    pub low: i64,
    /// Offset after the last record of the log.
    pub high: i64,
    /// Layout of the stream definition.
    pub layout: &'a Layout,
    /// Id of the Kafka cluster that this process is connected to.
    pub cluster_id: &'a str,
    /// Offset ranges to skip, as requested by operators.
    pub skips: &'a [Range<i64>],
    /// What to do without a usable state file.
    pub recover: RecoverPolicy,
    /// Whether to reprocess the log from its earliest offset.
    pub replay: bool,
}

/// The source of a partition's start position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// From its state file.
    Resume,
    /// From the progress row, because the state file is missing or behind it. All panes up to `seen_to` are cold.
    Recover,
    /// From the progress row, or from the earliest offset without one, because Cassandra has lost writes that it had
    /// acknowledged according to the state file.
    StoreBehind,
    /// From the earliest offset, with the totals of the progress row.
    Replay,
    /// From the earliest offset, because the partition has not been processed before.
    Earliest,
}

impl How {
    /// Every variant.
    pub const ALL: [How; 5] = [How::Resume, How::Recover, How::StoreBehind, How::Replay, How::Earliest];

    /// Value of the metric label.
    pub fn name(self) -> &'static str {
        match self {
            How::Resume => "resume",
            How::Recover => "recover",
            How::StoreBehind => "store_behind",
            How::Replay => "replay",
            How::Earliest => "earliest",
        }
    }
}

/// The decision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Start {
    /// Source of the position.
    pub how: How,
    /// Initial position.
    pub position: LogPosition,
    /// Offset to fetch from. This is the offset of the last processed record if that record can be compared, otherwise
    /// the next offset or the end of `skip`.
    pub fetch_from: i64,
    /// The record that must be found at `fetch_from`; `None` if none can be compared there.
    pub expected: Option<LastRecord>,
    /// The record to compare before the start, if fetching would reach it only after rows were written.
    pub compare_first: Option<LastRecord>,
    /// Offsets to skip before the first record is processed.
    pub skip: Option<Range<i64>>,
    /// `written_to` of the progress row; `None` if there is no row, or if a version that did not write it wrote the
    /// row.
    pub written_to: Option<i64>,
}

/// The facts contradict each other, because history is lost or belongs to another log. Nothing is skipped silently.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("partition {partition}: {problem}; {remedy}")]
pub struct Refusal {
    /// Kafka partition.
    pub partition: i32,
    /// The facts that contradict each other.
    pub problem: String,
    /// What an operator can do.
    pub remedy: &'static str,
}

/// The refusal of a log whose record at `expected.offset` is not the one that was processed. `found` is the fingerprint
/// of the log's record, `None` if no record has that offset.
pub fn record_mismatch(partition: i32, expected: LastRecord, found: Option<i64>) -> Refusal {
    let LastRecord { offset, fingerprint } = expected;
    let found = found.map_or_else(|| "no record".to_owned(), |found| format!("fingerprint {found:x}"));
    Refusal {
        partition,
        problem: format!(
            "the record at offset {offset} is not the one that was processed (found {found}, expected fingerprint \
             {fingerprint:x}): the topic was deleted and created again"
        ),
        remedy: "restore the original topic, or give the stream a new name",
    }
}

/// Decides where the partition starts.
pub fn decide(facts: &StartFacts<'_>) -> Result<Start, Refusal> {
    if let Some(state) = &facts.state {
        check_state_file_matches(facts, state)?;
    }
    let (how, position) = match store_lost_history(facts) {
        // A replay also restores what the store lost, but it needs a progress row to count from.
        Some(state) if !facts.replay || facts.progress.is_none() => {
            (How::StoreBehind, position_after_lost_history(facts, state)?)
        }
        _ => start_with_intact_store(facts)?,
    };
    check_log(facts, &position)?;
    Ok(start(facts, how, position))
}

/// Decides the start if Cassandra holds everything it has acknowledged.
fn start_with_intact_store(facts: &StartFacts<'_>) -> Result<(How, LogPosition), Refusal> {
    let progress = facts.progress.map(|progress| progress.position);
    let known_to = progress.map_or(0, |p| p.next_offset);
    let current = facts.state.as_ref().filter(|s| is_current(&s.position, known_to, facts.low));
    Ok(match (current, progress) {
        (_, Some(progress)) if facts.replay => {
            let (next_offset, count_from) = (facts.low, progress.next_offset);
            (How::Replay, LogPosition { next_offset, count_from, last_record: None, ..progress })
        }
        (Some(state), _) if !facts.replay => (How::Resume, state.position),
        (_, None) => (How::Earliest, position_at(facts.low)),
        (None, Some(_)) if facts.recover == RecoverPolicy::Refuse => {
            return refuse(
                facts,
                format!(
                    "no state file at or after offset {known_to}, the next offset of cassandra's progress row"
                ),
                "restore the checkpoint volume, or start with --recover auto to continue from the progress row",
            );
        }
        (_, Some(progress)) => (How::Recover, progress),
    })
}

/// Completes the decision: where to fetch from, what to skip and which record to compare.
fn start(facts: &StartFacts<'_>, how: How, position: LogPosition) -> Start {
    let next_offset = position.next_offset;
    let in_log = |record: &LastRecord| record.offset >= facts.low;
    let skip = facts.skips.iter().find(|skip| skip.contains(&next_offset));
    let skip = skip.map(|skip| next_offset..skip.end.min(facts.high));
    let last = position.last_record.filter(in_log);
    // Fetching can start at the last record only if no skipped range lies between it and the next offset.
    let skipped_since =
        |last: &LastRecord| facts.skips.iter().any(|skip| last.offset < skip.end && skip.start < next_offset);
    let expected = last.filter(|last| skip.is_none() && !skipped_since(last));
    let known = match how {
        How::StoreBehind => facts.state.as_ref().and_then(|state| state.position.last_record),
        _ => last.or(facts.progress.and_then(|progress| progress.position.last_record)),
    };
    let fetch_from = match (&skip, &expected) {
        (Some(skip), _) => skip.end,
        (None, Some(record)) => record.offset,
        (None, None) => next_offset,
    };
    let compare_first =
        if how == How::StoreBehind || expected.is_none() { known.filter(in_log) } else { None };
    let written_to = facts.progress.and_then(|progress| progress.written_to);
    Start { how, position, fetch_from, expected, compare_first, skip, written_to }
}

fn position_at(low: i64) -> LogPosition {
    LogPosition { next_offset: low, first_offset: low, count_from: low, ..LogPosition::default() }
}

fn refuse<T>(facts: &StartFacts<'_>, problem: String, remedy: &'static str) -> Result<T, Refusal> {
    Err(Refusal { partition: facts.partition, problem, remedy })
}

/// Checks that the state file was created for a compatible layout and for this Kafka cluster.
fn check_state_file_matches(facts: &StartFacts<'_>, state: &StateFacts) -> Result<(), Refusal> {
    if let Err(differences) = survives(&state.layout, facts.layout) {
        return refuse(
            facts,
            format!(
                "the state file was created with another layout than that of the stream file:\n{differences}\n"
            ),
            "restore the previous stream definition, or give the changed stream a new name",
        );
    }
    if state.cluster_id != facts.cluster_id {
        return refuse(
            facts,
            format!(
                "the state file belongs to kafka cluster {}, but this is cluster {}",
                state.cluster_id, facts.cluster_id
            ),
            "point PIPELINE_KAFKA_BROKERS at that cluster, or use another checkpoint folder and another stream name",
        );
    }
    Ok(())
}

/// Checks whether data stored for layout `stored` can be used with layout `now`: the two are equal, or differ only in
/// ways that stored data survives. Fails with the differences.
pub fn survives(stored: &str, now: &Layout) -> Result<(), String> {
    let changes = Layout::parse(stored).map_err(|error| format!("  - {error}"))?.changes_to(now);
    if changes.refused.is_empty() { Ok(()) } else { Err(changes.to_string()) }
}

/// Returns the state file if Cassandra had acknowledged more than it now holds, because an older snapshot was restored
/// or the keyspace was emptied.
fn store_lost_history<'a>(facts: &'a StartFacts<'_>) -> Option<&'a StateFacts> {
    let state = facts.state.as_ref()?;
    let has_processed_anything = state.position.totals.records() + state.position.totals.skipped > 0;
    let written_to = facts.progress.map_or(Some(i64::MIN), |progress| progress.written_to);
    let is_behind = written_to.is_some_and(|written_to| written_to < reached(&state.position));
    (has_processed_anything && is_behind).then_some(state)
}

/// The position to continue from after Cassandra has lost history: that of its progress row, if Kafka still holds every
/// later record.
fn position_after_lost_history(facts: &StartFacts<'_>, state: &StateFacts) -> Result<LogPosition, Refusal> {
    let reached = reached(&state.position);
    let held = match facts.progress {
        None => "it has no progress row".to_owned(),
        Some(progress) => format!("its progress row is at {}", progress.position.next_offset),
    };
    let problem =
        format!("cassandra acknowledged everything below offset {reached}, but now {held}: it lost history");
    if facts.recover == RecoverPolicy::Refuse {
        return refuse(
            facts,
            problem,
            "restore a newer snapshot of cassandra, or start with --recover auto to reprocess the records from kafka",
        );
    }
    let next = facts.progress.map_or(state.position.first_offset, |progress| progress.position.next_offset);
    if facts.low > next {
        return refuse(
            facts,
            format!("{problem}; kafka no longer holds offsets {next} to {}", facts.low - 1),
            "restore a newer snapshot of cassandra, or give the stream a new name to process only what kafka holds",
        );
    }
    if reached > facts.high {
        return refuse(
            facts,
            format!("{problem}; and kafka's log ends at {}", facts.high),
            "restore the topic, or give the stream a new name",
        );
    }
    Ok(facts.progress.map_or_else(|| position_at(facts.low), |progress| progress.position))
}

/// The offset below which every record is counted.
fn reached(position: &LogPosition) -> i64 {
    position.next_offset.max(position.count_from)
}

/// Whether a state file can be resumed: it is not behind the progress row, and not in the middle of a replay whose
/// remaining records retention has removed. Abandoning such a replay loses nothing, because all records below
/// `count_from` are counted.
fn is_current(state: &LogPosition, known_to: i64, low: i64) -> bool {
    let is_replaying = state.next_offset < state.count_from;
    reached(state) >= known_to && !(is_replaying && state.next_offset < low)
}

/// Checks that the log still holds the next record and has not become shorter.
fn check_log(facts: &StartFacts<'_>, position: &LogPosition) -> Result<(), Refusal> {
    let reached = reached(position);
    if reached > facts.high {
        return refuse(
            facts,
            format!(
                "offset {reached} was reached, but the log ends at {}: the topic was truncated or created again",
                facts.high
            ),
            "restore the topic, or give the stream a new name",
        );
    }
    if position.next_offset < facts.low {
        return refuse(
            facts,
            format!(
                "the next offset is {}, but the log starts at {}: records were removed before they were processed",
                position.next_offset, facts.low
            ),
            "restore the records, or accept the gap by giving the stream a new name",
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::count::partition::Totals;
    use common::contracts::stream::{Column, Definition};
    use std::sync::LazyLock;

    static LAYOUT: LazyLock<Layout> = LazyLock::new(layout);

    fn changed(edit: impl Fn(&mut Definition)) -> Layout {
        let text = include_str!("../../../../streams/user_created.toml");
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
        Some(StateFacts {
            position: position(next_offset),
            layout: layout().to_string(),
            cluster_id: "C".into(),
        })
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
        halfway
            .iter_mut()
            .for_each(|s| s.position.last_record = Some(LastRecord { offset: 14, fingerprint: 9 }));
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
        assert_eq!(trimmed.compare_first, None, "the last record is no longer in the log");
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
        let start =
            decide(&StartFacts { skips: std::slice::from_ref(&skip), ..facts(None, progress) }).unwrap();
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
        check_refusal(
            &facts(state(500), progress(500)),
            &["offset 500 was reached, but the log ends at 100"],
        );
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
}
