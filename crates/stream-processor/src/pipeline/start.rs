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
    /// From the progress row, because the state file is missing or behind it. All panes that may have events are cold.
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
mod tests;
