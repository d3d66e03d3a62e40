//! Which instances of the services are alive, and which have refused to run. An instance is judged by how long its row has stood
//! still while it could be looked at: neither clocks that differ nor an outage of Cassandra makes it silent. Pure; the rows
//! are [`crate::store`]'s.

use serde::Serialize;
use std::collections::BTreeMap;
use std::time::Duration;

/// An instance writes its row every second; after this long without a new one it is silent.
const SILENT_AFTER: Duration = Duration::from_secs(3);
/// Two looks further apart than this had an outage between them, of which nothing is known.
const LOOK_AT_MOST: Duration = Duration::from_secs(2);

/// What a processor does with a partition as a rule.
const RUNNING: &str = "running";

/// Service and instance.
type Name = (String, String);

/// A row of table `services`; times in Unix milliseconds.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ServiceRow {
    /// Name of the service.
    pub service: String,
    /// Name of the instance.
    pub instance: String,
    /// Its version.
    pub version: Option<String>,
    /// Since when it runs, on its own clock.
    pub started_at: Option<i64>,
    /// When it last said so, on its own clock.
    pub seen_at: Option<i64>,
    /// Whether it is ready.
    pub ready: bool,
    /// The partitions of the stream that it holds, with what it does with each.
    pub partitions: BTreeMap<i32, String>,
}

/// A row of table `refusals`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RefusalRow {
    /// Name of the service.
    pub service: String,
    /// Name of the instance.
    pub instance: String,
    /// Why it ended with exit code 3; empty: it has started since.
    pub reason: String,
    /// When, in Unix milliseconds on its own clock.
    pub at: i64,
}

/// What is known of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It says that it is ready.
    Ready,
    /// It says that it is not ready.
    NotReady,
    /// It has said nothing for some seconds: killed, stopped, or cut off from Cassandra.
    Silent,
    /// It ended with exit code 3.
    Refused,
}

/// An instance as `GET /api/v1/services` lists it; times in Unix milliseconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Instance {
    /// Name of the service.
    pub service: String,
    /// Name of the instance.
    pub instance: String,
    /// Its version.
    pub version: Option<String>,
    /// Since when it runs, or ran.
    pub started_at: Option<i64>,
    /// When it last gave a sign of life.
    pub seen_at: Option<i64>,
    /// What is known of it.
    pub state: State,
    /// Why it refused.
    pub reason: Option<String>,
    /// The partitions of the stream that it holds, with what it does with each (and why, where it does not process).
    pub partitions: BTreeMap<i32, String>,
}

/// Who holds a partition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Holder {
    /// Name of the processor's instance.
    pub instance: String,
    /// What it does with the partition: `running`, or another word and the reason.
    pub does: String,
}

/// By partition, the processor that holds it. Where two rows claim one, as for a moment during a rebalance, the one that processes
/// it counts.
pub fn holders(instances: &[Instance]) -> BTreeMap<i32, Holder> {
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

/// How long each instance has been quiet.
#[derive(Debug, Default)]
pub struct Listening {
    heard: BTreeMap<Name, Heard>,
}

#[derive(Debug)]
struct Heard {
    seen_at: Option<i64>,
    quiet: Duration,
}

impl Listening {
    /// Judges the rows as they are now. `since_last`: time since the last call; `now_ms` judges only what is seen for the first
    /// time.
    pub fn look(
        &mut self,
        rows: Vec<ServiceRow>,
        refusals: Vec<RefusalRow>,
        (now_ms, since_last): (i64, Duration),
    ) -> Vec<Instance> {
        let mut heard = BTreeMap::new();
        let mut instances = BTreeMap::new();
        for row in rows {
            let name = (row.service.clone(), row.instance.clone());
            let quiet = match self.heard.remove(&name) {
                Some(before) if before.seen_at == row.seen_at => before.quiet + since_last.min(LOOK_AT_MOST),
                Some(_) => Duration::ZERO,
                None => {
                    let age_ms = row.seen_at.map_or(0, |seen_at| now_ms.saturating_sub(seen_at));
                    Duration::from_millis(u64::try_from(age_ms).unwrap_or(0))
                }
            };
            heard.insert(name.clone(), Heard { seen_at: row.seen_at, quiet });
            let state = match row.ready {
                _ if quiet >= SILENT_AFTER => State::Silent,
                true => State::Ready,
                false => State::NotReady,
            };
            let ServiceRow { service, instance, version, started_at, seen_at, partitions, .. } = row;
            let reason = None;
            let one = Instance { service, instance, version, started_at, seen_at, state, reason, partitions };
            instances.insert(name, one);
        }
        self.heard = heard;
        for refusal in refusals.into_iter().filter(|refusal| !refusal.reason.is_empty()) {
            let RefusalRow { service, instance, reason, at } = refusal;
            let name = (service.clone(), instance.clone());
            let one = instances.entry(name).or_insert(Instance {
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

    fn states(instances: &[Instance]) -> Vec<State> {
        instances.iter().map(|instance| instance.state).collect()
    }

    #[test]
    fn an_instance_whose_row_stands_still_is_silent_after_three_seconds_and_back_at_its_next_sign() {
        let mut listening = Listening::default();
        let mut look = |seen_at| states(&listening.look(vec![row("a", seen_at)], vec![], (NOW, SECOND)));
        assert_eq!(look(NOW), [State::Ready]);
        assert_eq!(look(NOW + 1_000), [State::Ready]);
        for expected in [State::Ready, State::Ready, State::Silent, State::Silent] {
            assert_eq!(look(NOW + 1_000), [expected]);
        }
        assert_eq!(look(NOW + 2_000), [State::Ready]);
    }

    #[test]
    fn a_time_without_looks_makes_nobody_silent_and_a_clock_that_is_behind_neither() {
        let mut listening = Listening::default();
        let skewed = NOW - 100_000;
        let mut look = |seen_at, since| {
            states(&listening.look(vec![row("a", seen_at)], vec![], (NOW, Duration::from_secs(since))))
        };
        assert_eq!(look(skewed, 0), [State::Silent], "at first there is only its age");
        assert_eq!(look(skewed + 1_000, 1), [State::Ready]);
        assert_eq!(look(skewed + 1_000, 90), [State::Ready], "Cassandra was away");
        assert_eq!(look(skewed + 2_000, 1), [State::Ready]);
    }

    #[test]
    fn a_partition_is_held_by_an_instance_that_is_not_silent_and_rather_by_the_one_that_processes_it() {
        let holding = |name: &str, age_ms, held: &[(i32, &str)]| ServiceRow {
            partitions: held.iter().map(|(partition, does)| (*partition, (*does).to_owned())).collect(),
            ..row(name, NOW - age_ms)
        };
        let rows = vec![
            holding("a", 0, &[(0, "running"), (1, "opening")]),
            holding("b", 0, &[(1, "running"), (2, "halted: damaged")]),
            holding("c", 9_000, &[(2, "running"), (3, "running")]),
        ];
        let found = holders(&Listening::default().look(rows, vec![], (NOW, SECOND)));
        let found: Vec<(i32, &str, &str)> =
            found.iter().map(|(p, holder)| (*p, holder.instance.as_str(), holder.does.as_str())).collect();
        assert_eq!(found, [(0, "a", "running"), (1, "b", "running"), (2, "b", "halted: damaged")]);
    }

    #[test]
    fn a_refusal_is_shown_until_the_instance_has_started_again() {
        let look = |rows, refusals| {
            let instances = Listening::default().look(rows, refusals, (NOW, SECOND));
            instances.into_iter().map(|i| (i.instance, i.state, i.reason)).collect::<Vec<_>>()
        };
        let refused = |name: &str| (name.to_owned(), State::Refused, Some("lost history".to_owned()));
        let ready = |name: &str| (name.to_owned(), State::Ready, None);
        let why = |name: &str, at| refusal(name, "lost history", at);
        assert_eq!(look(vec![], vec![why("a", NOW)]), [refused("a")]);
        assert_eq!(look(vec![row("a", NOW)], vec![why("a", NOW - 1)]), [refused("a")]);
        assert_eq!(look(vec![row("a", NOW)], vec![why("a", NOW - 60_001)]), [ready("a")]);
        assert_eq!(look(vec![row("b", NOW)], vec![why("a", NOW)]), [refused("a"), ready("b")]);
        assert_eq!(look(vec![], vec![refusal("a", "", NOW)]), []);
    }
}
