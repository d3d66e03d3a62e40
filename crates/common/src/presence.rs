//! A row of table `services` each second: who is alive. No promise rests on it; it expires by itself. What becomes of the
//! write is also how a service learns, busy or idle, whether Cassandra is there.

use crate::admin::Health;
use crate::schema::SERVICE_TTL_SECONDS;
use crate::shutdown::Shutdown;
use scylla::client::session::Session;
use scylla::value::CqlTimestamp;
use std::sync::Arc;
use std::time::Duration;

const EVERY: Duration = Duration::from_secs(1);
/// Failures in a row before Cassandra counts as down: one lost packet is no outage.
const FAILURES_TO_UNREADY: u32 = 2;

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

/// Announces `who` until shutdown, and keeps the readiness of `cassandra` true to what it finds.
pub async fn announce(session: Arc<Session>, who: Instance, health: Arc<Health>, shutdown: Shutdown) {
    let insert = format!(
        "INSERT INTO {}.services (service, instance, version, started_at, seen_at, ready) VALUES (?, ?, ?, ?, ?, ?) \
         USING TTL {SERVICE_TTL_SECONDS}",
        who.keyspace
    );
    let started_at = CqlTimestamp(chrono::Utc::now().timestamp_millis());
    let mut failures = 0;
    while !shutdown.has_begun() {
        let now = CqlTimestamp(chrono::Utc::now().timestamp_millis());
        let version = env!("CARGO_PKG_VERSION");
        let values = (who.service, &who.instance, version, started_at, now, health.is_ready());
        let written = tokio::select! {
            () = shutdown.begun() => return,
            written = session.query_unpaged(insert.as_str(), values) => written,
        };
        match written {
            Ok(_) => {
                failures = 0;
                health.set("cassandra", Ok(()));
            }
            Err(error) => {
                failures += 1;
                if failures >= FAILURES_TO_UNREADY {
                    health.set("cassandra", Err(error.to_string()));
                }
            }
        }
        tokio::select! {
            () = shutdown.begun() => return,
            () = tokio::time::sleep(EVERY) => {}
        }
    }
}
