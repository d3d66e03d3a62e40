//! A row of table `services` each second: who is alive. No promise rests on it; it expires by itself. What becomes of the
//! write is also how a service learns, busy or idle, whether Cassandra is there. A row of table `refusals` says why an instance
//! ended with exit code 3; the instance empties it when it starts again.

use crate::admin::Health;
use crate::config::CommonArgs;
use crate::schema::SERVICE_TTL_SECONDS;
use crate::shutdown::Shutdown;
use scylla::client::session::Session;
use scylla::value::CqlTimestamp;
use std::sync::Arc;
use std::time::Duration;

const EVERY: Duration = Duration::from_secs(1);
/// Failures in a row before Cassandra counts as down: one lost packet is no outage.
const FAILURES_TO_UNREADY: u32 = 2;
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
    /// Instance name.
    pub instance: String,
}

impl Instance {
    /// An instance of `service` with these settings.
    pub fn new(settings: &CommonArgs, service: &'static str) -> Instance {
        Instance { keyspace: settings.keyspace.clone(), service, instance: settings.instance_name() }
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

fn now() -> CqlTimestamp {
    CqlTimestamp(chrono::Utc::now().timestamp_millis())
}

/// Announces `who` until shutdown, and keeps the readiness of `cassandra` true to what it finds.
pub async fn announce(session: Arc<Session>, who: Instance, health: Arc<Health>, shutdown: Shutdown) {
    let insert = format!(
        "INSERT INTO {}.services (service, instance, version, started_at, seen_at, ready) VALUES (?, ?, ?, ?, ?, ?) \
         USING TTL {SERVICE_TTL_SECONDS}",
        who.keyspace
    );
    let started_at = now();
    let (mut failures, mut refusal_is_empty) = (0, false);
    while !shutdown.has_begun() {
        let version = env!("CARGO_PKG_VERSION");
        let values = (who.service, &who.instance, version, started_at, now(), health.is_ready());
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
    let who = Instance::new(settings, service);
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
