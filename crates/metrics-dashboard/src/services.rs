//! Determines which instances of the services are alive, and which refused to run. An instance is silent if its row did
//! not change for a while during which the rows could be read. Neither differing clocks nor an outage of Cassandra make
//! an instance silent. Pure; [`crate::cassandra_view`] reads the rows.

use serde::Serialize;
use std::collections::BTreeMap;
use std::time::Duration;

/// An instance is silent if its row does not change for this long. Instances write their rows every second.
const SILENT_AFTER: Duration = Duration::from_secs(3);
/// Longest time between two reads that counts as silence. A longer gap means that Cassandra could not be read, so it
/// says nothing about the instances.
const MAX_READ_GAP: Duration = Duration::from_secs(2);

/// State of a partition that a processor processes normally.
const RUNNING: &str = "running";

/// Name of the service, name of the instance.
type Name = (String, String);

/// A row of table `services`; times in Unix milliseconds.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ServiceRow {
    /// Name of the service.
    pub service: String,
    /// Name of the instance.
    pub instance: String,
    /// Version of the program.
    pub version: Option<String>,
    /// When it started, on its own clock.
    pub started_at: Option<i64>,
    /// When it wrote the row, on its own clock.
    pub seen_at: Option<i64>,
    /// Whether it is ready.
    pub ready: bool,
    /// The partitions of the stream that it holds, with their states.
    pub partitions: BTreeMap<i32, String>,
}

/// A row of table `refusals`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RefusalRow {
    /// Name of the service.
    pub service: String,
    /// Name of the instance.
    pub instance: String,
    /// Why it exited with code 3. Empty if it has started again since.
    pub reason: String,
    /// When it exited, in Unix milliseconds on its own clock.
    pub at: i64,
}

/// State of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It reports ready.
    Ready,
    /// It reports not ready.
    NotReady,
    /// It has sent no heartbeat for some seconds: it was killed, stopped, or cut off from Cassandra.
    Silent,
    /// It exited with code 3.
    Refused,
}

/// An instance as `GET /api/v1/services` lists it; times in Unix milliseconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct InstanceStatus {
    /// Name of the service.
    pub service: String,
    /// Name of the instance.
    pub instance: String,
    /// Version of the program.
    pub version: Option<String>,
    /// When it last started.
    pub started_at: Option<i64>,
    /// Time of its last heartbeat or of its refusal.
    pub seen_at: Option<i64>,
    /// Its state.
    pub state: State,
    /// Why it refused to run. `None` in all other states.
    pub reason: Option<String>,
    /// The partitions of the stream that it holds, with their states (and the reason if one is not processed).
    pub partitions: BTreeMap<i32, String>,
}

/// The processor that holds a partition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Holder {
    /// Name of the instance.
    pub instance: String,
    /// State of the partition: `running`, or another state with a reason.
    pub does: String,
}

/// The processor that holds each partition. If two instances claim a partition, as they briefly do during a rebalance,
/// the one that processes it wins.
pub fn holders(instances: &[InstanceStatus]) -> BTreeMap<i32, Holder> {
    let mut holders: BTreeMap<i32, Holder> = BTreeMap::new();
    for one in instances.iter().filter(|one| matches!(one.state, State::Ready | State::NotReady)) {
        for (partition, does) in &one.partitions {
            if does == RUNNING || !holders.contains_key(partition) {
                holders.insert(*partition, Holder { instance: one.instance.clone(), does: does.clone() });
            }
        }
    }
    holders
}

/// Tracks how long the row of each instance has not changed.
#[derive(Debug, Default)]
pub struct LivenessTracker {
    last_rows: BTreeMap<Name, LastRow>,
}

#[derive(Debug)]
struct LastRow {
    seen_at: Option<i64>,
    /// Time for which the row has not changed, without outages of Cassandra.
    unchanged_for: Duration,
}

impl LivenessTracker {
    /// Takes the current rows and returns the state of every instance. `since_last` is the time since the last call.
    /// `now_ms` is only used for rows that were not seen before.
    pub fn update(
        &mut self,
        rows: Vec<ServiceRow>,
        refusals: Vec<RefusalRow>,
        now_ms: i64,
        since_last: Duration,
    ) -> Vec<InstanceStatus> {
        let mut last_rows = BTreeMap::new();
        let mut instances = BTreeMap::new();
        for row in rows {
            let name = (row.service.clone(), row.instance.clone());
            let unchanged_for = match self.last_rows.remove(&name) {
                Some(before) if before.seen_at == row.seen_at => {
                    before.unchanged_for + since_last.min(MAX_READ_GAP)
                }
                Some(_) => Duration::ZERO,
                None => {
                    let age_ms = row.seen_at.map_or(0, |seen_at| now_ms.saturating_sub(seen_at));
                    Duration::from_millis(u64::try_from(age_ms).unwrap_or(0))
                }
            };
            last_rows.insert(name.clone(), LastRow { seen_at: row.seen_at, unchanged_for });
            let state = match row.ready {
                _ if unchanged_for >= SILENT_AFTER => State::Silent,
                true => State::Ready,
                false => State::NotReady,
            };
            let ServiceRow { service, instance, version, started_at, seen_at, partitions, .. } = row;
            let reason = None;
            let one =
                InstanceStatus { service, instance, version, started_at, seen_at, state, reason, partitions };
            instances.insert(name, one);
        }
        self.last_rows = last_rows;
        for refusal in refusals.into_iter().filter(|refusal| !refusal.reason.is_empty()) {
            let RefusalRow { service, instance, reason, at } = refusal;
            let name = (service.clone(), instance.clone());
            let one = instances.entry(name).or_insert(InstanceStatus {
                service,
                instance,
                version: None,
                started_at: None,
                seen_at: Some(at),
                state: State::Refused,
                reason: None,
                partitions: BTreeMap::new(),
            });
            if one.started_at.is_none_or(|started_at| started_at <= at) {
                (one.state, one.reason) = (State::Refused, Some(reason));
            }
        }
        instances.into_values().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const NOW: i64 = 1_800_000_000_000;

    fn row(instance: &str, seen_at: i64) -> ServiceRow {
        let (service, instance) = ("stream-processor".to_owned(), instance.to_owned());
        let (started_at, seen_at) = (Some(NOW - 60_000), Some(seen_at));
        ServiceRow { service, instance, started_at, seen_at, ready: true, ..ServiceRow::default() }
    }

    fn refusal(instance: &str, reason: &str, at: i64) -> RefusalRow {
        let (service, instance) = ("stream-processor".to_owned(), instance.to_owned());
        RefusalRow { service, instance, reason: reason.to_owned(), at }
    }

    fn states(instances: &[InstanceStatus]) -> Vec<State> {
        instances.iter().map(|instance| instance.state).collect()
    }

    #[test]
    fn an_instance_is_silent_three_seconds_after_its_last_heartbeat_and_ready_again_at_the_next() {
        let mut tracker = LivenessTracker::default();
        let mut update = |seen_at| states(&tracker.update(vec![row("a", seen_at)], vec![], NOW, SECOND));
        assert_eq!(update(NOW), [State::Ready]);
        assert_eq!(update(NOW + 1_000), [State::Ready]);
        for expected in [State::Ready, State::Ready, State::Silent, State::Silent] {
            assert_eq!(update(NOW + 1_000), [expected]);
        }
        assert_eq!(update(NOW + 2_000), [State::Ready]);
    }

    #[test]
    fn neither_a_gap_between_reads_nor_a_slow_clock_makes_an_instance_silent() {
        let mut tracker = LivenessTracker::default();
        let skewed = NOW - 100_000;
        let mut update = |seen_at, since| {
            states(&tracker.update(vec![row("a", seen_at)], vec![], NOW, Duration::from_secs(since)))
        };
        assert_eq!(update(skewed, 0), [State::Silent], "only the age of the first row is known");
        assert_eq!(update(skewed + 1_000, 1), [State::Ready]);
        assert_eq!(update(skewed + 1_000, 90), [State::Ready], "Cassandra could not be read");
        assert_eq!(update(skewed + 2_000, 1), [State::Ready]);
    }

    #[test]
    fn the_holder_of_a_partition_is_not_silent_and_preferably_the_one_that_processes_it() {
        let holding = |name: &str, age_ms, held: &[(i32, &str)]| ServiceRow {
            partitions: held.iter().map(|(partition, does)| (*partition, (*does).to_owned())).collect(),
            ..row(name, NOW - age_ms)
        };
        let rows = vec![
            holding("a", 0, &[(0, "running"), (1, "opening")]),
            holding("b", 0, &[(1, "running"), (2, "halted: damaged")]),
            holding("c", 9_000, &[(2, "running"), (3, "running")]),
        ];
        let found = holders(&LivenessTracker::default().update(rows, vec![], NOW, SECOND));
        let found: Vec<(i32, &str, &str)> =
            found.iter().map(|(p, holder)| (*p, holder.instance.as_str(), holder.does.as_str())).collect();
        assert_eq!(found, [(0, "a", "running"), (1, "b", "running"), (2, "b", "halted: damaged")]);
    }

    #[test]
    fn a_refusal_is_shown_until_the_instance_starts_again() {
        let states = |rows, refusals| {
            let instances = LivenessTracker::default().update(rows, refusals, NOW, SECOND);
            instances.into_iter().map(|i| (i.instance, i.state, i.reason)).collect::<Vec<_>>()
        };
        let refused = |name: &str| (name.to_owned(), State::Refused, Some("lost history".to_owned()));
        let ready = |name: &str| (name.to_owned(), State::Ready, None);
        let why = |name: &str, at| refusal(name, "lost history", at);
        assert_eq!(states(vec![], vec![why("a", NOW)]), [refused("a")]);
        assert_eq!(states(vec![row("a", NOW)], vec![why("a", NOW - 1)]), [refused("a")]);
        assert_eq!(states(vec![row("a", NOW)], vec![why("a", NOW - 60_001)]), [ready("a")]);
        assert_eq!(states(vec![row("b", NOW)], vec![why("a", NOW)]), [refused("a"), ready("b")]);
        assert_eq!(states(vec![], vec![refusal("a", "", NOW)]), []);
    }
}
