//! A watchdog for failures that Kafka does not report: a partition that no live instance holds, or one that this
//! instance holds but fetches nothing from although its log has more records. Reads the instances' announcements in
//! Cassandra and the end offsets of the log. The group's thread acts on the verdict.

use crate::metrics::Metrics;
use common::runtime::admin::Health;
use common::runtime::kafka::Replaced;
use common::runtime::presence::{ALIVE_FOR, Announced, Holdings, Instance, Sightings, announced};
use common::runtime::shutdown::Shutdown;
use rdkafka::consumer::{BaseConsumer, Consumer};
use scylla::client::session::Session;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

const WATCH_INTERVAL: Duration = Duration::from_secs(2);
/// How long a partition may have no owner before this instance is not ready. A rebalance can take this long.
const UNREADY_AFTER: Duration = Duration::from_secs(10);
/// How long a partition may have no owner, or make no progress, before the client is replaced.
const REBUILD_AFTER: Duration = Duration::from_secs(30);
/// Older observations yield no verdict.
const FRESH_FOR: Duration = Duration::from_secs(10);
const LOG_END_DEADLINE: Duration = Duration::from_secs(2);
/// Name of the readiness check for partitions without an owner.
const DEPENDENCY: &str = "ownership";

/// Inputs of the watchdog.
pub struct Watched {
    /// Cassandra session.
    pub session: Arc<Session>,
    /// This instance.
    pub who: Instance,
    /// Client that reads the end offsets of the log.
    pub probe: Arc<Replaced<BaseConsumer>>,
    /// Events topic.
    pub topic: String,
    /// Number of partitions that the stream was registered with.
    pub partitions: i32,
    /// Partitions that this instance holds.
    pub holdings: Holdings,
    /// Readiness.
    pub health: Arc<Health>,
    /// Metrics.
    pub metrics: Arc<Metrics>,
}

/// The latest observations. Shared with the group's thread.
#[derive(Debug, Default)]
pub struct Ownership(Mutex<Observed>);

#[derive(Debug, Default)]
struct Observed {
    at: Option<Instant>,
    /// Partitions that no live instance holds, and since when.
    unowned: BTreeMap<i32, Instant>,
    /// Partitions of this instance that fetch nothing although their log has more records: committed next offset, and
    /// since when.
    stuck: BTreeMap<i32, (i64, Instant)>,
}

/// Why a client must be replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Verdict {
    /// No instance holds the partition although this one is a member of the group.
    #[error("partition {0} has had no owner for too long")]
    Unowned(i32),
    /// The partition fetches nothing although its log has more records.
    #[error("partition {0} has fetched nothing for too long")]
    Stuck(i32),
}

impl Ownership {
    /// Returns why the client that joined at `joined` must be replaced; `None` if it need not be. Time before `joined`
    /// does not count.
    pub fn verdict(&self, joined: Instant, now: Instant) -> Option<Verdict> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).verdict(joined, now)
    }
}

impl Observed {
    fn verdict(&self, joined: Instant, now: Instant) -> Option<Verdict> {
        let age = |since: Instant| now.saturating_duration_since(since.max(joined));
        if self.at.is_none_or(|at| now.saturating_duration_since(at) > FRESH_FOR) {
            return None;
        }
        let too_long = |since: &Instant| age(*since) > REBUILD_AFTER;
        let unowned = self.unowned.iter().find(|(_, since)| too_long(since));
        let stuck = self.stuck.iter().find(|(_, (_, since))| too_long(since));
        unowned
            .map(|(partition, _)| Verdict::Unowned(*partition))
            .or(stuck.map(|(partition, _)| Verdict::Stuck(*partition)))
    }

    fn note_owners(&mut self, partitions: i32, held: &BTreeSet<i32>, now: Instant) {
        self.at = Some(now);
        self.unowned.retain(|partition, _| !held.contains(partition));
        for partition in (0..partitions).filter(|partition| !held.contains(partition)) {
            self.unowned.entry(partition).or_insert(now);
        }
    }

    /// `waiting` holds the committed next offset and the log's end offset of each partition here that waits for
    /// records.
    fn note_progress(&mut self, waiting: &BTreeMap<i32, (i64, i64)>, now: Instant) {
        let behind = |partition: &i32| waiting.get(partition).filter(|(committed, end)| committed < end);
        self.stuck
            .retain(|partition, (at, _)| behind(partition).is_some_and(|(committed, _)| committed == at));
        for (partition, (committed, _)) in waiting.iter().filter(|(_, (committed, end))| committed < end) {
            self.stuck.entry(*partition).or_insert((*committed, now));
        }
    }

    fn unowned_for(&self, at_least: Duration, now: Instant) -> Vec<i32> {
        let old = self.unowned.iter().filter(|(_, since)| now.saturating_duration_since(**since) >= at_least);
        old.map(|(partition, _)| *partition).collect()
    }
}

/// Runs the watchdog until shutdown.
pub async fn watch(watched: Watched, ownership: Arc<Ownership>, shutdown: Shutdown) {
    let mut sightings = Sightings::default();
    loop {
        tokio::select! {
            () = shutdown.begun() => return,
            () = tokio::time::sleep(WATCH_INTERVAL) => {}
        }
        let ends = log_ends(&watched).await;
        let rows = match announced(&watched.session, &watched.who).await {
            Ok(rows) => rows,
            Err(error) => {
                tracing::debug!(%error, "cannot read the instances' announcements");
                continue;
            }
        };
        let now = Instant::now();
        let held = held_by_anyone(&rows, &watched, &mut sightings, now);
        let unowned = {
            let mut observed = ownership.0.lock().unwrap_or_else(PoisonError::into_inner);
            observed.note_owners(watched.partitions, &held, now);
            observed.note_progress(&ends, now);
            observed.unowned_for(UNREADY_AFTER, now)
        };
        watched.metrics.unowned_partitions.set(unowned.len() as i64);
        let list = unowned.iter().map(i32::to_string).collect::<Vec<_>>().join(", ");
        let state =
            if unowned.is_empty() { Ok(()) } else { Err(format!("no instance holds partition {list}")) };
        watched.health.set(DEPENDENCY, state);
    }
}

/// The partitions that live instances hold, including this one.
fn held_by_anyone(
    rows: &[Announced],
    watched: &Watched,
    sightings: &mut Sightings,
    now: Instant,
) -> BTreeSet<i32> {
    sightings.keep(rows);
    let others = rows.iter().filter(|row| row.life != watched.who.life);
    let alive = others.filter(|row| sightings.age(&row.instance, row.seen_at_ms, now) < ALIVE_FOR);
    alive.flat_map(|row| row.partitions.keys().copied()).chain(watched.holdings.all().into_keys()).collect()
}

/// The committed next offset and the log's end offset of each partition here whose worker waits for records.
async fn log_ends(watched: &Watched) -> BTreeMap<i32, (i64, i64)> {
    let mut waiting = watched.holdings.committed();
    waiting.retain(|partition, _| watched.metrics.waits_for_records(*partition));
    if waiting.is_empty() {
        return BTreeMap::new();
    }
    let (probe, topic) = (Arc::clone(&watched.probe), watched.topic.clone());
    let request = tokio::task::spawn_blocking(move || {
        let mut ends = BTreeMap::new();
        let Ok(client) = probe.get() else { return ends };
        for (partition, committed) in waiting {
            match client.fetch_watermarks(&topic, partition, LOG_END_DEADLINE) {
                Ok((_, end)) => drop(ends.insert(partition, (committed, end))),
                Err(error) => {
                    probe.doubt(&error);
                    break;
                }
            }
        }
        ends
    });
    request.await.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(start: Instant, seconds: u64) -> Instant {
        start + Duration::from_secs(seconds)
    }

    #[test]
    fn a_partition_without_an_owner_is_reported_once_a_rebalance_would_have_ended() {
        let (mut observed, start) = (Observed::default(), Instant::now());
        let mut note = |held: &[i32], seconds| {
            observed.note_owners(3, &held.iter().copied().collect(), after(start, seconds));
            let verdict = observed.verdict(start, after(start, seconds));
            (observed.unowned_for(UNREADY_AFTER, after(start, seconds)), verdict)
        };
        assert_eq!(note(&[0, 2], 0), (vec![], None));
        assert_eq!(note(&[0, 2], 10), (vec![1], None));
        assert_eq!(note(&[0, 1], 20), (vec![], None), "1 has an owner again, 2 has just lost its owner");
        assert_eq!(note(&[0, 1], 51), (vec![2], Some(Verdict::Unowned(2))));
    }

    #[test]
    fn a_new_client_gets_its_full_time_and_old_observations_yield_no_verdict() {
        let (mut observed, start) = (Observed::default(), Instant::now());
        observed.note_owners(1, &BTreeSet::new(), start);
        observed.note_owners(1, &BTreeSet::new(), after(start, 31));
        assert_eq!(observed.verdict(start, after(start, 31)), Some(Verdict::Unowned(0)));
        assert_eq!(observed.verdict(after(start, 30), after(start, 31)), None);
        assert_eq!(observed.verdict(start, after(start, 60)), None, "nothing was observed for 29 s");
    }

    #[test]
    fn a_partition_that_waits_at_one_offset_below_the_end_of_its_log_is_stuck() {
        let (mut observed, start) = (Observed::default(), Instant::now());
        observed.note_owners(1, &BTreeSet::from([0]), start);
        let mut note = |committed, end, seconds| {
            observed.note_owners(1, &BTreeSet::from([0]), after(start, seconds));
            observed.note_progress(&BTreeMap::from([(0, (committed, end))]), after(start, seconds));
            observed.verdict(start, after(start, seconds))
        };
        assert_eq!(note(5, 5, 0), None);
        assert_eq!(note(5, 9, 40), None, "it has just fallen behind");
        assert_eq!(note(6, 9, 60), None, "it moved");
        assert_eq!(note(6, 9, 91), Some(Verdict::Stuck(0)));
        assert_eq!(note(9, 9, 95), None);
    }
}
