//! A row of table `services` each second: which instances are alive, and which partitions each holds. Rows expire by
//! themselves. Whether the write succeeds is also how a service learns, busy or idle, that Cassandra answers. A row of table
//! `refusals` says why an instance ended with exit code 3; the instance empties it when it starts again.

use crate::admin::Health;
use crate::config::CommonArgs;
use crate::schema::SERVICE_TTL_SECONDS;
use crate::shutdown::Shutdown;
use futures::TryStreamExt;
use scylla::client::session::Session;
use scylla::errors::PagerExecutionError;
use scylla::value::CqlTimestamp;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

const EVERY: Duration = Duration::from_secs(1);
/// Failures in a row before Cassandra counts as down: one lost packet is no outage.
const FAILURES_TO_UNREADY: u32 = 2;
/// An instance whose row has not changed for this long is no longer alive.
pub const ALIVE_FOR: Duration = Duration::from_secs(5);
/// How long a process that refuses to run may take to leave word.
const REFUSAL_LIMIT: Duration = Duration::from_secs(3);
/// Characters of a refusal that are kept.
const REFUSAL_CHARACTERS: usize = 2000;

/// Who announces itself.
#[derive(Debug, Clone)]
pub struct Instance {
    /// Keyspace.
    pub keyspace: String,
    /// Service, such as `stream-processor`.
    pub service: &'static str,
    /// Stream it works on.
    pub stream: String,
    /// Instance name.
    pub instance: String,
    /// Differs with each start of the process: tells a restart, or a second process of the same name, from this one.
    pub life: String,
    /// When the process started, in Unix milliseconds.
    pub started_at_ms: i64,
}

impl Instance {
    /// This process, just started, of `service` with these settings.
    pub fn new(settings: &CommonArgs, service: &'static str, stream: &str) -> Instance {
        Instance {
            keyspace: settings.keyspace.clone(),
            service,
            stream: stream.to_owned(),
            instance: settings.instance_name(),
            life: uuid::Uuid::new_v4().to_string(),
            started_at_ms: chrono::Utc::now().timestamp_millis(),
        }
    }

    /// Writes why this instance refuses to run; empty: it runs.
    async fn put_refusal(&self, session: &Session, reason: &str) -> Result<(), String> {
        let insert = format!(
            "INSERT INTO {}.refusals (service, instance, reason, at) VALUES (?, ?, ?, ?)",
            self.keyspace
        );
        let values = (self.service, &self.instance, reason, now());
        session.query_unpaged(insert, values).await.map(drop).map_err(|e| e.to_string())
    }
}

/// What an instance does with a partition it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hold {
    /// It finds out where to start.
    Opening,
    /// It processes.
    Running,
    /// It waits until an operator accepts the poison.
    Paused,
    /// It cannot go on at an offset, and tries again.
    Halted,
    /// It leaves it alone, because the stream was registered with fewer partitions.
    Unregistered,
}

impl Hold {
    /// As stored.
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

/// The partitions that an instance holds. Cloning shares it.
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

    /// The instance holds `partition` now, or does something else with it.
    pub fn set(&self, partition: i32, hold: Hold) {
        let mut held = self.lock();
        held.entry(partition).and_modify(|held| held.hold = hold).or_insert(Held { hold, committed: None });
    }

    /// It processes `partition`; `committed` follows its committed next offset.
    pub fn runs(&self, partition: i32, committed: Arc<AtomicI64>) {
        self.lock().insert(partition, Held { hold: Hold::Running, committed: Some(committed) });
    }

    /// It holds `partition` no more.
    pub fn remove(&self, partition: i32) {
        self.lock().remove(&partition);
    }

    /// Every partition it holds.
    pub fn all(&self) -> BTreeMap<i32, Hold> {
        self.lock().iter().map(|(partition, held)| (*partition, held.hold)).collect()
    }

    /// The committed next offset of each partition that it processes.
    pub fn committed(&self) -> BTreeMap<i32, i64> {
        let held = self.lock();
        let running = held.iter().filter(|(_, held)| held.hold == Hold::Running);
        running.filter_map(|(p, held)| Some((*p, held.committed.as_ref()?.load(Ordering::Acquire)))).collect()
    }
}

/// The name under which a partition's readiness is kept in [`Health`].
pub fn partition_dependency(partition: i32) -> String {
    format!("partition {partition}")
}

fn now() -> CqlTimestamp {
    CqlTimestamp(chrono::Utc::now().timestamp_millis())
}

/// Announces `who` until shutdown, and keeps the readiness of `cassandra` true to what it finds.
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
        let version = env!("CARGO_PKG_VERSION");
        let partitions: BTreeMap<i32, String> = holdings
            .all()
            .into_iter()
            .map(|(partition, hold)| (partition, told(partition, hold, &health)))
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
            () = tokio::time::sleep(EVERY) => {}
        }
    }
}

/// Leaves word for the page that this instance ends because it refuses to run, if Cassandra takes it soon.
pub async fn refuse(settings: &CommonArgs, service: &'static str, reason: &str) {
    let who = Instance::new(settings, service, "");
    let reason: String = reason.chars().take(REFUSAL_CHARACTERS).collect();
    let write = async {
        let session = crate::cassandra::connect(settings, REFUSAL_LIMIT, &Shutdown::default()).await;
        who.put_refusal(&*session.map_err(|e| e.to_string())?, &reason).await
    };
    let written = tokio::select! {
        written = write => written,
        // The process ends: nobody misses the request that is dropped.
        () = tokio::time::sleep(REFUSAL_LIMIT) => Err("no answer".to_owned()),
    };
    if let Err(error) = written {
        tracing::warn!(error, "the refusal could not be left in table refusals");
    }
}

/// What is done with a partition, and why where it does not run.
fn told(partition: i32, hold: Hold, health: &Health) -> String {
    match health.problem(&partition_dependency(partition)) {
        Some(problem) => format!("{}: {problem}", hold.name()),
        None => hold.name().to_owned(),
    }
}

/// A row of `services`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Announced {
    /// Instance name.
    pub instance: String,
    /// Its process.
    pub life: String,
    /// When the process started, on its own clock, in Unix milliseconds.
    pub started_at_ms: i64,
    /// When it wrote the row, on its own clock, in Unix milliseconds.
    pub seen_at_ms: i64,
    /// The partitions it holds, and what it does with each.
    pub partitions: BTreeMap<i32, String>,
}

/// The instances of `who`'s service and stream that announced themselves within the last minute.
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

/// When each instance's row last changed, on the reader's own clock: instances' clocks may differ.
#[derive(Debug, Default)]
pub struct Sightings(HashMap<String, (i64, Instant)>);

impl Sightings {
    /// Notes a row read at `now`; gives how long it has not changed. A row that is new to the reader counts as changed.
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
    fn an_instance_is_as_old_as_its_last_change_on_the_readers_clock() {
        let (mut sightings, start) = (Sightings::default(), Instant::now());
        let mut age =
            |seen_at_ms, after| sightings.age("a", seen_at_ms, start + Duration::from_secs(after)).as_secs();
        assert_eq!(age(-5_000_000, 0), 0, "a clock that is behind is no sign of death");
        assert_eq!(age(-5_000_000, 4), 4);
        assert_eq!(age(-4_999_000, 5), 0);
        assert_eq!(age(-4_999_000, 11), 6);
    }

    #[test]
    fn a_partition_is_told_with_the_reason_why_it_does_not_run() {
        let health = Health::new(Duration::from_secs(1), &[]);
        assert_eq!(told(3, Hold::Running, &health), "running");
        health.set(&partition_dependency(3), Err("stands at offset 7".into()));
        assert_eq!(told(3, Hold::Halted, &health), "halted: stands at offset 7");
    }
}
