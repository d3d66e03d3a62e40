//! Decides where a partition starts: observed facts → decision. Pure. Every refusal names both sides and the ways on.

use crate::partition::{LastRecord, Position};
use common::stream::layout::Layout;
use std::ops::Range;

/// What to do where the state file is missing, or behind what Cassandra holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RecoverPolicy {
    /// Recover from the progress row: exact, so it is the default.
    Auto,
    /// Stop and let an operator look first.
    Refuse,
}

/// What a state file says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateFacts {
    /// Its position.
    pub position: Position,
    /// The layout it was made for, as stored.
    pub layout: String,
    /// The Kafka cluster it was made for.
    pub cluster_id: String,
}

/// What Cassandra holds about a partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// The position that was published last.
    pub position: Position,
    /// Every row and pane of the log below this offset was acknowledged. Written before each commit, so a state file never
    /// runs ahead of it. `None`: the row was written by a version that did not note it.
    pub written_to: Option<i64>,
}

/// Everything the decision rests on.
#[derive(Debug, Clone)]
pub struct Facts<'a> {
    /// The partition.
    pub partition: i32,
    /// The state file, where there is one.
    pub state: Option<StateFacts>,
    /// The progress row, where there is one.
    pub progress: Option<Progress>,
    /// First offset of the log.
    pub low: i64,
    /// Offset after the last record of the log.
    pub high: i64,
    /// The definition's layout.
    pub layout: &'a Layout,
    /// The cluster connected to.
    pub cluster_id: &'a str,
    /// Offsets that an operator wants skipped.
    pub skips: &'a [Range<i64>],
    /// What to do without a usable state file.
    pub recover: RecoverPolicy,
    /// Process the log again from its earliest offset.
    pub replay: bool,
}

/// How a partition starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// From its state file.
    Resume,
    /// From the progress row, because the state file is lost or behind it; nothing up to `seen_to` is hot.
    Recover,
    /// From the progress row, because Cassandra has lost what the state file says it had acknowledged.
    StoreBehind,
    /// Like recover, but from the earliest offset.
    Replay,
    /// From the earliest offset: nobody has processed this partition before.
    Earliest,
}

impl How {
    /// All of them.
    pub const ALL: [How; 5] = [How::Resume, How::Recover, How::StoreBehind, How::Replay, How::Earliest];

    /// As a label.
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
    /// Where from.
    pub how: How,
    /// Position to start with.
    pub position: Position,
    /// Offset to fetch from: that of the last record taken, where it is still in the log and can be compared.
    pub fetch_from: i64,
    /// The record that must be found at `fetch_from`.
    pub expected: Option<LastRecord>,
    /// The record to compare before anything is done, where fetching would reach it only after rows were written.
    pub compare_first: Option<LastRecord>,
    /// Offsets to skip before the first record is taken.
    pub skip: Option<Range<i64>>,
    /// The note `written_to` that Cassandra holds; `None`: none, or one of a version that did not write it.
    pub written_to: Option<i64>,
}

/// History is lost, or of another log: nothing is skipped silently.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("partition {partition}: {what}; {ways_on}")]
pub struct Refusal {
    /// The partition.
    pub partition: i32,
    /// Both sides.
    pub what: String,
    /// What can be done.
    pub ways_on: &'static str,
}

/// The refusal of a log whose record at `expected.offset` is not the one that was processed; `found`: its fingerprint, `None`:
/// there is no record at that offset.
pub fn another_record(partition: i32, expected: LastRecord, found: Option<i64>) -> Refusal {
    let LastRecord { offset, fingerprint } = expected;
    let found =
        found.map_or_else(|| "there is none".to_owned(), |found| format!("its fingerprint is {found:x}"));
    Refusal {
        partition,
        what: format!(
            "the record at offset {offset} is not the one that was processed ({found}, expected {fingerprint:x}): the topic was \
             deleted and created again"
        ),
        ways_on: "bring the old topic back, or give the stream a new name",
    }
}

/// Decides, or refuses.
pub fn decide(facts: &Facts<'_>) -> Result<Start, Refusal> {
    if let Some(state) = &facts.state {
        check_made_for_this(facts, state)?;
    }
    let (how, position) = match store_lost_history(facts) {
        // A replay recovers on its way what the store lost; but it needs a progress row to count from.
        Some(state) if !facts.replay || facts.progress.is_none() => {
            (How::StoreBehind, after_lost_history(facts, state)?)
        }
        _ => undisturbed(facts)?,
    };
    check_log(facts, &position)?;
    Ok(start(facts, how, position))
}

/// The start where Cassandra holds everything it has acknowledged.
fn undisturbed(facts: &Facts<'_>) -> Result<(How, Position), Refusal> {
    let progress = facts.progress.map(|progress| progress.position);
    let known_to = progress.map_or(0, |p| p.next_offset);
    let current = facts.state.as_ref().filter(|s| is_current(&s.position, known_to, facts.low));
    Ok(match (current, progress) {
        (_, Some(progress)) if facts.replay => {
            let (next_offset, count_from) = (facts.low, progress.next_offset);
            (How::Replay, Position { next_offset, count_from, last_record: None, ..progress })
        }
        (Some(state), _) if !facts.replay => (How::Resume, state.position),
        (_, None) => (How::Earliest, beginning_at(facts.low)),
        (None, Some(_)) if facts.recover == RecoverPolicy::Refuse => {
            return refuse(
                facts,
                format!(
                    "no state file at or after offset {known_to}, which cassandra's progress row has reached"
                ),
                "bring the checkpoint volume back, or start with --recover auto to go on exactly from the progress row",
            );
        }
        (_, Some(progress)) => (How::Recover, progress),
    })
}

/// How fetching begins at `position`.
fn start(facts: &Facts<'_>, how: How, position: Position) -> Start {
    let next_offset = position.next_offset;
    let in_log = |record: &LastRecord| record.offset >= facts.low;
    let skip = facts.skips.iter().find(|skip| skip.contains(&next_offset));
    let skip = skip.map(|skip| next_offset..skip.end.min(facts.high));
    let last = position.last_record.filter(in_log);
    // Fetching passes the last record on its way only where nothing that cannot be read lies between it and the next one.
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

fn beginning_at(low: i64) -> Position {
    Position { next_offset: low, first_offset: low, count_from: low, ..Position::default() }
}

fn refuse<T>(facts: &Facts<'_>, what: String, ways_on: &'static str) -> Result<T, Refusal> {
    Err(Refusal { partition: facts.partition, what, ways_on })
}

/// A state file belongs to one layout and one Kafka cluster.
fn check_made_for_this(facts: &Facts<'_>, state: &StateFacts) -> Result<(), Refusal> {
    if let Err(differences) = survives(&state.layout, facts.layout) {
        return refuse(
            facts,
            format!("the state file was made for another layout than the stream file has:\n{differences}\n"),
            "put the old stream definition back, or give the changed one a new stream name",
        );
    }
    if state.cluster_id != facts.cluster_id {
        return refuse(
            facts,
            format!(
                "the state file is of kafka cluster {}, but this is {}",
                state.cluster_id, facts.cluster_id
            ),
            "point PIPELINE_KAFKA_BROKERS at that cluster, or use another checkpoint folder and stream name",
        );
    }
    Ok(())
}

/// Whether what was stored for layout `stored` can be used with `now`: it was made for that one, or for an earlier one from
/// which `now` came by changes that stored data survives. If not, the differences.
pub fn survives(stored: &str, now: &Layout) -> Result<(), String> {
    let changes = Layout::parse(stored).map_err(|error| format!("  - {error}"))?.changes_to(now);
    if changes.refused.is_empty() { Ok(()) } else { Err(changes.to_string()) }
}

/// The state file, if it says that Cassandra acknowledged more than Cassandra now holds: an older snapshot was restored, or the
/// keyspace was emptied.
fn store_lost_history<'a>(facts: &'a Facts<'_>) -> Option<&'a StateFacts> {
    let state = facts.state.as_ref()?;
    let has_taken_anything = state.position.totals.records() + state.position.totals.skipped > 0;
    let written_to = facts.progress.map_or(Some(i64::MIN), |progress| progress.written_to);
    let is_behind = written_to.is_some_and(|written_to| written_to < reached(&state.position));
    (has_taken_anything && is_behind).then_some(state)
}

/// Where to go on after Cassandra has lost history: from what it still holds, if Kafka has everything since.
fn after_lost_history(facts: &Facts<'_>, state: &StateFacts) -> Result<Position, Refusal> {
    let reached = reached(&state.position);
    let held = match facts.progress {
        None => "it has no progress row".to_owned(),
        Some(progress) => format!("its progress row is at {}", progress.position.next_offset),
    };
    let both =
        format!("cassandra acknowledged everything below offset {reached}, but now {held}: it lost history");
    if facts.recover == RecoverPolicy::Refuse {
        return refuse(
            facts,
            both,
            "restore a newer snapshot of cassandra, or start with --recover auto to process again from kafka what is missing",
        );
    }
    let next = facts.progress.map_or(state.position.first_offset, |progress| progress.position.next_offset);
    if facts.low > next {
        return refuse(
            facts,
            format!("{both}; kafka no longer holds offsets {next} to {}", facts.low - 1),
            "restore a newer snapshot of cassandra, or give the stream a new name and start it from what kafka holds",
        );
    }
    if reached > facts.high {
        return refuse(
            facts,
            format!("{both}; and kafka's log ends at {}", facts.high),
            "bring the topic back, or give the stream a new name",
        );
    }
    Ok(facts.progress.map_or_else(|| beginning_at(facts.low), |progress| progress.position))
}

/// The offset below which everything is counted.
fn reached(position: &Position) -> i64 {
    position.next_offset.max(position.count_from)
}

/// Whether a state file can be resumed: not behind the progress row, and not in the middle of a replay whose remaining records
/// retention has removed. Giving up such a replay loses nothing, because everything below `count_from` is counted already.
fn is_current(state: &Position, known_to: i64, low: i64) -> bool {
    let replays = state.next_offset < state.count_from;
    reached(state) >= known_to && !(replays && state.next_offset < low)
}

/// The log must still hold what comes next, and must reach as far as it did.
fn check_log(facts: &Facts<'_>, position: &Position) -> Result<(), Refusal> {
    let reached = reached(position);
    if reached > facts.high {
        return refuse(
            facts,
            format!(
                "offset {reached} was reached, but the log ends at {}: the topic shrank or was created again",
                facts.high
            ),
            "bring the topic back, or give the stream a new name",
        );
    }
    if position.next_offset < facts.low {
        return refuse(
            facts,
            format!(
                "offset {} comes next, but the log begins at {}: records were removed unread",
                position.next_offset, facts.low
            ),
            "bring the records back, or accept the gap by giving the stream a new name",
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::partition::Totals;
    use common::stream::{Column, Definition};
    use std::sync::LazyLock;

    static LAYOUT: LazyLock<Layout> = LazyLock::new(layout);

    fn changed(edit: impl Fn(&mut Definition)) -> Layout {
        let text = include_str!("../../../streams/user_created.toml");
        let mut definition = Definition::parse("user_created.toml", text).unwrap();
        edit(&mut definition);
        definition.layout()
    }

    fn layout() -> Layout {
        changed(|_| {})
    }

    fn position(next_offset: i64) -> Position {
        let totals = Totals { events: next_offset, ..Totals::default() };
        let last_record = Some(LastRecord { offset: next_offset - 1, fingerprint: 9 });
        Position { next_offset, last_record, totals, seen_to: Some(5), ..Position::default() }
    }

    fn progress(next_offset: i64) -> Option<Progress> {
        Some(Progress { position: position(next_offset), written_to: Some(next_offset) })
    }

    /// Rows below `written_to` are acknowledged, as after a kill between commit and publication.
    fn unpublished(next_offset: i64, written_to: i64) -> Option<Progress> {
        Some(Progress { position: position(next_offset), written_to: Some(written_to) })
    }

    fn state(next_offset: i64) -> Option<StateFacts> {
        Some(StateFacts {
            position: position(next_offset),
            layout: layout().to_string(),
            cluster_id: "C".into(),
        })
    }

    fn facts<'a>(state: Option<StateFacts>, progress: Option<Progress>) -> Facts<'a> {
        Facts {
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

    fn check(facts: &Facts<'_>, how: How, next: i64, fetch: i64) {
        let start = decide(facts).unwrap();
        assert_eq!((start.how, start.position.next_offset, start.fetch_from), (how, next, fetch));
    }

    fn check_refusal(facts: &Facts<'_>, parts: &[&str]) {
        let refusal = decide(facts).unwrap_err().to_string();
        for part in parts {
            assert!(refusal.contains(part), "`{part}` is not in `{refusal}`");
        }
    }

    #[test]
    fn the_further_of_state_and_progress_row_decides() {
        check(&facts(state(50), unpublished(40, 50)), How::Resume, 50, 49);
        check(&facts(state(40), progress(50)), How::Recover, 50, 49);
        check(&facts(None, progress(50)), How::Recover, 50, 49);
        check(&facts(None, None), How::Earliest, 10, 10);
        check(&facts(state(10), progress(10)), How::Resume, 10, 10);
    }

    #[test]
    fn a_store_that_lost_what_it_acknowledged_is_brought_up_to_date_from_the_log() {
        check(&facts(state(50), progress(40)), How::StoreBehind, 40, 39);
        check(&Facts { low: 0, ..facts(state(50), None) }, How::StoreBehind, 0, 0);
        let start = decide(&facts(state(50), progress(40))).unwrap();
        let last_of_state = LastRecord { offset: 49, fingerprint: 9 };
        assert_eq!(start.compare_first, Some(last_of_state), "the log must be the one of the state file");
        let before_markers = Progress { written_to: None, ..progress(40).unwrap() };
        check(&facts(state(50), Some(before_markers)), How::Resume, 50, 49);
        check(&Facts { replay: true, ..facts(state(50), progress(40)) }, How::Replay, 10, 10);
        let nothing_taken = state(10).map(|s| StateFacts {
            position: Position { totals: Totals::default(), last_record: None, ..s.position },
            ..s
        });
        check(&facts(nothing_taken, None), How::Resume, 10, 10);
    }

    #[test]
    fn lost_history_of_the_store_that_the_log_no_longer_holds_is_refused_with_both_sides() {
        let behind = facts(state(50), progress(40));
        check_refusal(
            &Facts { low: 45, ..behind.clone() },
            &["below offset 50", "progress row is at 40", "kafka no longer holds offsets 40 to 44"],
        );
        check_refusal(&Facts { high: 49, ..behind.clone() }, &["below offset 50", "log ends at 49"]);
        check_refusal(&facts(state(50), None), &["no progress row", "no longer holds offsets 0 to 9"]);
        check_refusal(
            &Facts { recover: RecoverPolicy::Refuse, ..behind },
            &["restore a newer snapshot", "--recover auto"],
        );
    }

    #[test]
    fn a_state_file_of_an_earlier_layout_goes_on_where_stored_data_survives_the_change() {
        let mut optional = changed(|_| {});
        let mut check_both = |edit: fn(&mut Definition)| {
            optional = changed(edit);
            check(&Facts { layout: &optional, ..facts(state(50), progress(50)) }, How::Resume, 50, 49);
        };
        check_both(|d| {
            d.columns.push(Column { name: "phone".into(), required: false, ..d.columns[0].clone() })
        });
        check_both(|d| d.windows.lateness_ms += 1);
        check_both(|d| d.store.ttl_seconds = 0);
        let newer = changed(|d| drop(d.columns.pop()));
        let back = Facts { layout: &newer, ..facts(state(50), progress(50)) };
        check_refusal(&back, &["column `registered_at`: registered, but no longer declared"]);
    }

    #[test]
    fn a_replay_whose_rest_was_removed_counts_as_lost() {
        let mut halfway = state(60);
        halfway.iter_mut().for_each(|s| (s.position.next_offset, s.position.count_from) = (15, 60));
        halfway
            .iter_mut()
            .for_each(|s| s.position.last_record = Some(LastRecord { offset: 14, fingerprint: 9 }));
        check(&facts(halfway.clone(), progress(60)), How::Resume, 15, 14);
        let trimmed = Facts { low: 20, ..facts(halfway.clone(), progress(60)) };
        check(&trimmed, How::Recover, 60, 59);
        check_refusal(&Facts { low: 61, ..facts(halfway, progress(60)) }, &["the log begins at 61"]);
    }

    #[test]
    fn a_replay_counts_from_the_progress_row_on() {
        let facts = Facts { replay: true, ..facts(state(60), unpublished(50, 60)) };
        let start = decide(&facts).unwrap();
        assert_eq!((start.how, start.position.next_offset, start.position.count_from), (How::Replay, 10, 50));
        assert_eq!(start.position.totals.events, 50);
        let last = LastRecord { offset: 49, fingerprint: 9 };
        assert_eq!((start.expected, start.compare_first), (None, Some(last)));
        let trimmed = decide(&Facts { low: 50, ..facts }).unwrap();
        assert_eq!(trimmed.compare_first, None, "it is no longer in the log");
    }

    #[test]
    fn a_skip_that_covers_the_next_offset_moves_the_start_behind_it() {
        let skipping = |skip: Range<i64>| {
            let facts = facts(state(50), progress(50));
            decide(&Facts { skips: std::slice::from_ref(&skip), ..facts }).unwrap()
        };
        let start = skipping(48..60);
        assert_eq!((start.skip, start.fetch_from, start.expected), (Some(50..60), 60, None));
        assert_eq!(start.compare_first, Some(LastRecord { offset: 49, fingerprint: 9 }));
        assert_eq!(skipping(50..1000).skip, Some(50..100), "not beyond the end of the log");
        assert_eq!(skipping(51..60).skip, None, "the records before it are taken first");
        assert_eq!(skipping(40..49).skip, None);
        assert_eq!(skipping(40..49).expected, Some(LastRecord { offset: 49, fingerprint: 9 }));
    }

    #[test]
    fn fetching_does_not_begin_before_offsets_that_were_skipped() {
        let last = LastRecord { offset: 46, fingerprint: 9 };
        let after_skip = Position { last_record: Some(last), ..position(50) };
        let progress = Some(Progress { position: after_skip, written_to: Some(50) });
        let skip = 47..50;
        let start = decide(&Facts { skips: std::slice::from_ref(&skip), ..facts(None, progress) }).unwrap();
        assert_eq!((start.fetch_from, start.expected, start.skip), (50, None, None));
        assert_eq!(start.compare_first, Some(last));
    }

    #[test]
    fn transaction_markers_after_the_last_record_do_not_hide_it() {
        let mut after_markers = position(50);
        after_markers.last_record = Some(LastRecord { offset: 46, fingerprint: 9 });
        let progress = Some(Progress { position: after_markers, written_to: Some(50) });
        check(&facts(None, progress), How::Recover, 50, 46);
        check(&Facts { low: 47, ..facts(None, progress) }, How::Recover, 50, 50);
    }

    #[test]
    fn lost_history_is_refused_and_both_sides_are_named() {
        check_refusal(&facts(state(5), progress(5)), &["offset 5 comes next, but the log begins at 10"]);
        check_refusal(
            &facts(state(500), progress(500)),
            &["offset 500 was reached, but the log ends at 100"],
        );
        check_refusal(&facts(None, progress(101)), &["offset 101 was reached"]);
        let other = changed(|d| d.store.shards += 1);
        let of_other = Facts { layout: &other, ..facts(state(50), None) };
        check_refusal(&of_other, &["another layout", "`store.shards`", "now 5"]);
        let unreadable = state(50).map(|state| StateFacts { layout: "L".into(), ..state });
        check_refusal(&facts(unreadable, None), &["another layout", "cannot be read", ": L"]);
        check_refusal(
            &Facts { cluster_id: "D", ..facts(state(50), None) },
            &["kafka cluster C, but this is D"],
        );
        let refuse = Facts { recover: RecoverPolicy::Refuse, ..facts(None, progress(50)) };
        check_refusal(&refuse, &["--recover auto"]);
    }
}
