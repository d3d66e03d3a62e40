//! Heartbeats. Each instance writes a row to table `services` every second, with the partitions it holds. The rows have
//! a TTL. The result of the write also tells an instance, even an idle one, whether Cassandra is up. A row of table
//! `refusals` says why an instance exited with code 3. The instance clears the row when it starts again.

use crate::contracts::schema::SERVICE_TTL_SECONDS;
use crate::runtime::admin::Health;
use crate::runtime::config::CommonArgs;
use crate::runtime::shutdown::Shutdown;
use futures::TryStreamExt;
use scylla::client::session::Session;
use scylla::errors::PagerExecutionError;
use scylla::value::CqlTimestamp;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(1);
/// How often a silent instance checks whether it may write heartbeats again.
const SILENCE_CHECK_INTERVAL: Duration = Duration::from_millis(100);
/// Consecutive failures after which Cassandra counts as down: a single lost packet is not an outage.
const FAILURES_TO_UNREADY: u32 = 2;
/// An instance counts as dead if its row has not changed for this long.
pub const ALIVE_FOR: Duration = Duration::from_secs(5);
/// How long a process that refuses to run may take to write the reason.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(3);
/// Most characters that are stored of a reason.
const MAX_REFUSAL_CHARACTERS: usize = 2000;

/// An instance of a service.
#[derive(Debug, Clone)]
pub struct Instance {
    /// Keyspace of tables `services` and `refusals`.
    pub keyspace: String,
    /// Name of the service, such as `stream-processor`.
    pub service: &'static str,
    /// Name of the stream that it works on.
    pub stream: String,
    /// Name of the instance.
    pub instance: String,
    /// A UUID generated at each start. It distinguishes this process from a restarted one and from a second process
    /// with the same instance name.
    pub life: String,
    /// When the process started, in Unix milliseconds.
    pub started_at_ms: i64,
    /// Suspends the heartbeats while set. A process with the same instance name writes the same row of `services`, so it
    /// can be seen reliably only while this process does not write. Clones share the flag.
    pub silent: Arc<AtomicBool>,
}

impl Instance {
    /// Describes this process, started now, as an instance of `service`.
    pub fn new(settings: &CommonArgs, service: &'static str, stream: &str) -> Instance {
        Instance {
            keyspace: settings.keyspace.clone(),
            service,
            stream: stream.to_owned(),
            instance: settings.instance_name(),
            life: uuid::Uuid::new_v4().to_string(),
            started_at_ms: chrono::Utc::now().timestamp_millis(),
            silent: Arc::default(),
        }
    }

    /// Writes why this instance refuses to run. An empty `reason` clears an earlier refusal.
    async fn put_refusal(&self, session: &Session, reason: &str) -> Result<(), String> {
        let insert = format!(
            "INSERT INTO {}.refusals (service, instance, reason, at) VALUES (?, ?, ?, ?)",
            self.keyspace
        );
        let values = (self.service, &self.instance, reason, now());
        session.query_unpaged(insert, values).await.map(drop).map_err(|e| e.to_string())
    }
}

/// State of a partition that an instance holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hold {
    /// The instance determines the start position.
    Opening,
    /// The instance processes the partition.
    Running,
    /// The instance waits until an operator accepts the dead letters.
    Paused,
    /// The instance cannot get past an offset, and retries.
    Halted,
    /// The instance ignores the partition, because the stream was registered with fewer partitions.
    Unregistered,
}

impl Hold {
    /// The name stored in `services.partitions`.
    pub fn name(self) -> &'static str {
        match self {
            Hold::Opening => "opening",
            Hold::Running => "running",
            Hold::Paused => "paused",
            Hold::Halted => "halted",
            Hold::Unregistered => "unregistered",
        }
    }
}

/// The partitions that an instance holds. Clones share the same state.
#[derive(Debug, Clone, Default)]
pub struct Holdings(Arc<Mutex<BTreeMap<i32, Held>>>);

#[derive(Debug, Clone)]
struct Held {
    hold: Hold,
    committed: Option<Arc<AtomicI64>>,
}

impl Holdings {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<i32, Held>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds `partition`, or changes its state.
    pub fn set(&self, partition: i32, hold: Hold) {
        let mut held = self.lock();
        held.entry(partition).and_modify(|held| held.hold = hold).or_insert(Held { hold, committed: None });
    }

    /// Marks `partition` as running. `committed` holds its committed next offset, and the caller keeps it up to date.
    pub fn runs(&self, partition: i32, committed: Arc<AtomicI64>) {
        self.lock().insert(partition, Held { hold: Hold::Running, committed: Some(committed) });
    }

    /// Removes `partition`.
    pub fn remove(&self, partition: i32) {
        self.lock().remove(&partition);
    }

    /// All partitions that the instance holds, with their states.
    pub fn all(&self) -> BTreeMap<i32, Hold> {
        self.lock().iter().map(|(partition, held)| (*partition, held.hold)).collect()
    }

    /// The committed next offset of each running partition.
    pub fn committed(&self) -> BTreeMap<i32, i64> {
        let held = self.lock();
        let running = held.iter().filter(|(_, held)| held.hold == Hold::Running);
        running.filter_map(|(p, held)| Some((*p, held.committed.as_ref()?.load(Ordering::Acquire)))).collect()
    }
}

/// Name of the [`Health`] dependency that tracks the readiness of a partition.
pub fn partition_dependency(partition: i32) -> String {
    format!("partition {partition}")
}

fn now() -> CqlTimestamp {
    CqlTimestamp(chrono::Utc::now().timestamp_millis())
}

/// Writes a heartbeat of `who` every second until shutdown, and keeps the `cassandra` dependency of `health` up to
/// date.
pub async fn announce(
    session: Arc<Session>,
    who: Instance,
    holdings: Holdings,
    health: Arc<Health>,
    shutdown: Shutdown,
) {
    let insert = format!(
        "INSERT INTO {}.services (service, instance, version, started_at, seen_at, ready, stream, life, partitions) \
         VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) USING TTL {SERVICE_TTL_SECONDS}",
        who.keyspace
    );
    let started_at = CqlTimestamp(who.started_at_ms);
    let (mut failures, mut refusal_is_empty) = (0, false);
    while !shutdown.has_begun() {
        if who.silent.load(Ordering::Acquire) {
            tokio::time::sleep(SILENCE_CHECK_INTERVAL).await;
            continue;
        }
        let version = env!("CARGO_PKG_VERSION");
        let partitions: BTreeMap<i32, String> = holdings
            .all()
            .into_iter()
            .map(|(partition, hold)| (partition, describe_hold(partition, hold, &health)))
            .collect();
        let Instance { service, instance, stream, life, .. } = &who;
        let values =
            (service, instance, version, started_at, now(), health.is_ready(), stream, life, partitions);
        let write = async {
            if !refusal_is_empty {
                who.put_refusal(&session, "").await?;
            }
            session.query_unpaged(insert.as_str(), values).await.map(drop).map_err(|e| e.to_string())
        };
        let written = tokio::select! {
            () = shutdown.begun() => return,
            written = write => written,
        };
        match written {
            Ok(()) => {
                (failures, refusal_is_empty) = (0, true);
                health.set("cassandra", Ok(()));
            }
            Err(error) => {
                failures += 1;
                if failures >= FAILURES_TO_UNREADY {
                    health.set("cassandra", Err(error));
                }
            }
        }
        tokio::select! {
            () = shutdown.begun() => return,
            () = tokio::time::sleep(HEARTBEAT_INTERVAL) => {}
        }
    }
}

/// Stores why this process refuses to run, so that the dashboard can show it. Gives up after a few seconds and logs the
/// failure.
pub async fn refuse(settings: &CommonArgs, service: &'static str, reason: &str) {
    let who = Instance::new(settings, service, "");
    let reason: String = reason.chars().take(MAX_REFUSAL_CHARACTERS).collect();
    let write = async {
        let session =
            crate::runtime::cassandra::connect(settings, REFUSAL_TIMEOUT, &Shutdown::default()).await;
        who.put_refusal(&*session.map_err(|e| e.to_string())?, &reason).await
    };
    let written = tokio::select! {
        written = write => written,
        // The process exits, so it does not matter that the dropped request keeps its stream id.
        () = tokio::time::sleep(REFUSAL_TIMEOUT) => Err("timed out".to_owned()),
    };
    if let Err(error) = written {
        tracing::warn!(error, "cannot write the refusal to table refusals");
    }
}

/// The state of a partition, with the problem that its [`Health`] dependency reports, if any.
fn describe_hold(partition: i32, hold: Hold, health: &Health) -> String {
    match health.problem(&partition_dependency(partition)) {
        Some(problem) => format!("{}: {problem}", hold.name()),
        None => hold.name().to_owned(),
    }
}

/// A row of `services`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Announced {
    /// Name of the instance.
    pub instance: String,
    /// See [`Instance::life`].
    pub life: String,
    /// When the process started, in Unix milliseconds on its own clock.
    pub started_at_ms: i64,
    /// When the process wrote the row, in Unix milliseconds on its own clock.
    pub seen_at_ms: i64,
    /// The partitions that the instance holds: the name of the [`Hold`], then `: ` and a reason if there is one.
    pub partitions: BTreeMap<i32, String>,
}

/// The instances that work on the same service and stream as `who` and wrote a heartbeat within the last minute.
pub async fn announced(session: &Session, who: &Instance) -> Result<Vec<Announced>, PagerExecutionError> {
    type Row =
        (String, CqlTimestamp, CqlTimestamp, Option<String>, Option<String>, Option<BTreeMap<i32, String>>);
    let select = format!(
        "SELECT instance, started_at, seen_at, stream, life, partitions FROM {}.services WHERE service = ?",
        who.keyspace
    );
    let rows = session.query_iter(select, (who.service,)).await?;
    let Ok(rows) = rows.rows_stream::<Row>() else { return Ok(Vec::new()) };
    let rows: Vec<Row> = rows.try_collect().await.unwrap_or_default();
    let of_stream = rows.into_iter().filter(|row| row.3.as_ref() == Some(&who.stream));
    let announced = of_stream.map(|(instance, started_at, seen_at, _, life, partitions)| Announced {
        instance,
        life: life.unwrap_or_default(),
        started_at_ms: started_at.0,
        seen_at_ms: seen_at.0,
        partitions: partitions.unwrap_or_default(),
    });
    Ok(announced.collect())
}

/// Tracks when the row of each instance last changed. It uses the clock of the reader, because the clocks of the
/// instances may differ.
#[derive(Debug, Default)]
pub struct Sightings(HashMap<String, (i64, Instant)>);

impl Sightings {
    /// Records a row read at `now` and returns the time since it last changed. A row that was not seen before counts as
    /// changed.
    pub fn age(&mut self, instance: &str, seen_at_ms: i64, now: Instant) -> Duration {
        let seen = self.0.entry(instance.to_owned()).or_insert((seen_at_ms, now));
        if seen.0 != seen_at_ms {
            *seen = (seen_at_ms, now);
        }
        now.saturating_duration_since(seen.1)
    }

    /// Forgets instances whose rows have expired.
    pub fn keep(&mut self, rows: &[Announced]) {
        self.0.retain(|instance, _| rows.iter().any(|row| row.instance == *instance));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_age_of_an_instance_is_measured_on_the_clock_of_the_reader() {
        let (mut sightings, start) = (Sightings::default(), Instant::now());
        let mut age =
            |seen_at_ms, after| sightings.age("a", seen_at_ms, start + Duration::from_secs(after)).as_secs();
        assert_eq!(age(-5_000_000, 0), 0, "an instance whose clock is behind is still alive");
        assert_eq!(age(-5_000_000, 4), 4);
        assert_eq!(age(-4_999_000, 5), 0);
        assert_eq!(age(-4_999_000, 11), 6);
    }

    #[test]
    fn the_state_of_a_partition_includes_the_reason_why_it_does_not_run() {
        let health = Health::new(Duration::from_secs(1), &[]);
        assert_eq!(describe_hold(3, Hold::Running, &health), "running");
        health.set(&partition_dependency(3), Err("stuck at offset 7".into()));
        assert_eq!(describe_hold(3, Hold::Halted, &health), "halted: stuck at offset 7");
    }
}
