//! Where a partition starts: observed facts → decision. Pure; every refusal names both sides and the ways on.

use crate::partition::Position;

/// What to do where the state file is missing or behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RecoverPolicy {
    /// Recover from the progress row: exact, so it is the default.
    Auto,
    /// Stop and let somebody look first.
    Refuse,
}

/// What a state file says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateFacts {
    /// Its position.
    pub position: Position,
    /// The layout it was made for.
    pub layout: String,
    /// The Kafka cluster it was made for.
    pub cluster_id: String,
}

/// Everything the decision rests on.
#[derive(Debug, Clone)]
pub struct Facts<'a> {
    /// The partition.
    pub partition: i32,
    /// The state file, where there is one.
    pub state: Option<StateFacts>,
    /// The progress row, where there is one.
    pub progress: Option<Position>,
    /// First offset of the log.
    pub low: i64,
    /// Offset after the last record of the log.
    pub high: i64,
    /// The definition's layout.
    pub layout: &'a str,
    /// The cluster connected to.
    pub cluster_id: &'a str,
    /// What to do without a state.
    pub recover: RecoverPolicy,
    /// Walk again from the earliest offset.
    pub replay: bool,
}

/// How a partition starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// From its state file.
    Resume,
    /// From the progress row; nothing up to `seen_to` is hot.
    Recover,
    /// Like recover, but walking again from the earliest offset.
    Replay,
    /// From the earliest offset: nobody processed this partition before.
    Earliest,
}

/// The decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Start {
    /// Where from.
    pub how: How,
    /// Position to start with.
    pub position: Position,
    /// Offset to fetch from: one before the next, where the record there is still in the log and can be checked.
    pub fetch_from: i64,
    /// Fingerprint the record at `fetch_from` must have.
    pub expected: Option<i64>,
    /// Without it: offset and fingerprint of the last record that was counted, to be compared before anything is done. Who walks
    /// again would come by it only after having written.
    pub last_counted: Option<(i64, i64)>,
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

/// The refusal of a log in which the record at `offset` is not the one that was processed.
pub fn another_record(partition: i32, offset: i64, found: i64, expected: i64) -> Refusal {
    Refusal {
        partition,
        what: format!(
            "the record at offset {offset} is not the one that was processed (fingerprint {found:x}, expected \
             {expected:x}): the topic was made anew"
        ),
        ways_on: "bring the old topic back, or give the stream a new name",
    }
}

/// Decides, or refuses.
pub fn decide(facts: &Facts<'_>) -> Result<Start, Refusal> {
    let refuse = |what: String, ways_on| Err(Refusal { partition: facts.partition, what, ways_on });
    if let Some(state) = &facts.state {
        if state.layout != facts.layout {
            return refuse(
                format!(
                    "the state file was made for another layout\n  file:       {}\n  definition: {}",
                    state.layout, facts.layout
                ),
                "put the old stream definition back, or give the changed one a new stream name",
            );
        }
        if state.cluster_id != facts.cluster_id {
            return refuse(
                format!(
                    "the state file is of kafka cluster {}, but this is {}",
                    state.cluster_id, facts.cluster_id
                ),
                "point PIPELINE_KAFKA_BROKERS at that cluster, or use another checkpoint folder and stream name",
            );
        }
        if facts.progress.is_none() && state.position.totals.records() > 0 {
            return refuse(
                format!(
                    "the state file has taken {} records, but cassandra has no progress row",
                    state.position.totals.records()
                ),
                "bring cassandra's data back, or remove the state file to process the log again from its beginning",
            );
        }
    }
    let known_to = facts.progress.map_or(0, |p| p.next_offset);
    let current = facts.state.as_ref().filter(|s| is_current(&s.position, known_to, facts.low));
    let (how, position) = match (current, facts.progress) {
        (_, Some(progress)) if facts.replay => {
            let position = Position {
                next_offset: facts.low,
                count_from: progress.next_offset,
                fingerprint: None,
                ..progress
            };
            (How::Replay, position)
        }
        (Some(state), _) if !facts.replay => (How::Resume, state.position),
        (_, None) => {
            (How::Earliest, Position { next_offset: facts.low, count_from: facts.low, ..Position::default() })
        }
        (None, Some(_)) if facts.recover == RecoverPolicy::Refuse => {
            return refuse(
                format!(
                    "no state file at or after offset {known_to}, which cassandra's progress row has reached"
                ),
                "bring the checkpoint volume back, or start with --recover auto to go on exactly from the progress row",
            );
        }
        (_, Some(progress)) => (How::Recover, progress),
    };
    check_log(facts, &position)?;
    let checkable = how != How::Replay && position.fingerprint.is_some() && position.next_offset > facts.low;
    let counted = facts.progress.filter(|progress| !checkable && progress.next_offset > facts.low);
    Ok(Start {
        how,
        position,
        fetch_from: if checkable { position.next_offset - 1 } else { position.next_offset },
        expected: position.fingerprint.filter(|_| checkable),
        last_counted: counted.and_then(|progress| Some((progress.next_offset - 1, progress.fingerprint?))),
    })
}

/// Whether a state can be gone on with: not behind the progress row, and not in the midst of a replay whose rest retention has
/// removed. That loses nothing, as what lies below `count_from` is counted already.
fn is_current(state: &Position, known_to: i64, low: i64) -> bool {
    let replays = state.next_offset < state.count_from;
    state.next_offset.max(state.count_from) >= known_to && !(replays && state.next_offset < low)
}

/// The log must still hold what comes next, and must reach as far as it did.
fn check_log(facts: &Facts<'_>, position: &Position) -> Result<(), Refusal> {
    let refuse = |what: String, ways_on| Err(Refusal { partition: facts.partition, what, ways_on });
    let reached = position.next_offset.max(position.count_from);
    if reached > facts.high {
        return refuse(
            format!(
                "offset {reached} was reached, but the log ends at {}: the topic shrank or was made anew",
                facts.high
            ),
            "bring the topic back, or give the stream a new name",
        );
    }
    if position.next_offset < facts.low {
        return refuse(
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

    fn position(next_offset: i64) -> Position {
        let totals = Totals { events: next_offset, ..Totals::default() };
        Position { next_offset, fingerprint: Some(9), totals, seen_to: Some(5), ..Position::default() }
    }

    fn state(next_offset: i64) -> Option<StateFacts> {
        Some(StateFacts { position: position(next_offset), layout: "L".into(), cluster_id: "C".into() })
    }

    fn facts<'a>(state: Option<StateFacts>, progress: Option<Position>) -> Facts<'a> {
        Facts {
            partition: 3,
            state,
            progress,
            low: 10,
            high: 100,
            layout: "L",
            cluster_id: "C",
            recover: RecoverPolicy::Auto,
            replay: false,
        }
    }

    fn check(facts: &Facts<'_>, how: How, next: i64, fetch: i64) {
        let start = decide(facts).unwrap();
        assert_eq!((start.how, start.position.next_offset, start.fetch_from), (how, next, fetch));
    }

    #[test]
    fn the_further_of_state_and_progress_row_decides() {
        check(&facts(state(50), Some(position(40))), How::Resume, 50, 49);
        check(&facts(state(40), Some(position(50))), How::Recover, 50, 49);
        check(&facts(None, Some(position(50))), How::Recover, 50, 49);
        check(&facts(None, None), How::Earliest, 10, 10);
        check(&facts(state(10), Some(position(10))), How::Resume, 10, 10);
    }

    #[test]
    fn a_replay_whose_rest_was_removed_counts_as_lost() {
        let mut halfway = state(60);
        halfway.iter_mut().for_each(|s| (s.position.next_offset, s.position.count_from) = (15, 60));
        check(&facts(halfway.clone(), Some(position(60))), How::Resume, 15, 14);
        let trimmed = Facts { low: 20, ..facts(halfway.clone(), Some(position(60))) };
        check(&trimmed, How::Recover, 60, 59);
        check_refusal(&Facts { low: 61, ..facts(halfway, Some(position(60))) }, "the log begins at 61");
    }

    #[test]
    fn a_replay_counts_from_the_progress_row_on() {
        let facts = Facts { replay: true, ..facts(state(60), Some(position(50))) };
        let start = decide(&facts).unwrap();
        assert_eq!((start.how, start.position.next_offset, start.position.count_from), (How::Replay, 10, 50));
        assert_eq!(start.position.totals.events, 50);
        assert_eq!((start.expected, start.last_counted), (None, Some((49, 9))));
        let trimmed = decide(&Facts { low: 50, ..facts }).unwrap();
        assert_eq!(trimmed.last_counted, None, "it is no longer in the log");
    }

    fn check_refusal(facts: &Facts<'_>, part: &str) {
        let refusal = decide(facts).unwrap_err().to_string();
        assert!(refusal.contains(part), "{refusal}");
    }

    #[test]
    fn lost_history_is_refused_and_both_sides_are_named() {
        check_refusal(&facts(state(5), Some(position(5))), "offset 5 comes next, but the log begins at 10");
        check_refusal(
            &facts(state(500), Some(position(5))),
            "offset 500 was reached, but the log ends at 100",
        );
        check_refusal(&facts(None, Some(position(101))), "offset 101 was reached");
        check_refusal(&facts(state(50), None), "no progress row");
        check_refusal(&Facts { layout: "M", ..facts(state(50), None) }, "another layout");
        check_refusal(&Facts { cluster_id: "D", ..facts(state(50), None) }, "kafka cluster C, but this is D");
        let refuse = Facts { recover: RecoverPolicy::Refuse, ..facts(None, Some(position(50))) };
        check_refusal(&refuse, "--recover auto");
    }
}
