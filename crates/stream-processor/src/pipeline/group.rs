//! The consumer group, run by one blocking thread: joins, processes until the client is lost, and rejoins with a new
//! client. A lost session or a dead client does not end the process. The new client takes over the membership through
//! its static member name, and every partition continues from its checkpoint.

pub mod client;
mod membership;
pub mod ownership;
mod slot;

use crate::count::poison_gate::PoisonLimits;
use crate::error::ProcessorError;
use crate::io::store::{DeadLetters, Store};
use crate::metrics::Metrics;
use crate::pipeline::fetch::ChunkLimits;
use crate::pipeline::open::Opener;
use client::MemberSettings;
use common::runtime::admin::Health;
use common::runtime::presence::{Announced, Holdings, Instance, announced};
use common::runtime::shutdown::Shutdown;
use membership::{End, Membership};
use ownership::{Ownership, Verdict};
use scylla::client::session::Session;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::runtime::Handle;

/// Initial backoff before rejoining; doubles with each client that is lost within [`STABLE_AFTER`].
const INITIAL_REJOIN_BACKOFF: Duration = Duration::from_millis(200);
/// Maximum backoff before rejoining.
const MAX_REJOIN_BACKOFF: Duration = Duration::from_secs(10);
/// A client that lived for this long resets the backoff.
const STABLE_AFTER: Duration = Duration::from_secs(60);
/// How long to look for another process with the same instance name. A live process announces itself every second.
const NAME_CHECK_DURATION: Duration = Duration::from_secs(4);
const NAME_CHECK_INTERVAL: Duration = Duration::from_millis(250);

/// Settings of this instance's group membership and partitions.
#[derive(Debug, Clone)]
pub struct GroupSettings {
    /// Settings of the Kafka client.
    pub member: MemberSettings,
    /// Events topic.
    pub topic: String,
    /// When a chunk is full.
    pub limits: ChunkLimits,
    /// How many undecodable records pause a partition.
    pub poison: PoisonLimits,
    /// How long a partition may take to stop.
    pub revoke_deadline: Duration,
}

/// What every membership and partition of this instance needs.
pub struct Parts<S, D> {
    /// Settings.
    pub settings: GroupSettings,
    /// Opens partitions.
    pub opener: Opener<S>,
    /// The dead-letter topic.
    pub dead_letters: Arc<D>,
    /// Cassandra session, used to look for other processes with the same instance name.
    pub session: Arc<Session>,
    /// This process.
    pub who: Instance,
    /// Partitions that this instance holds.
    pub holdings: Holdings,
    /// Observations about the partitions of all instances.
    pub ownership: Arc<Ownership>,
    /// Readiness.
    pub health: Arc<Health>,
    /// Metrics.
    pub metrics: Arc<Metrics>,
    /// Ends the memberships and all partitions.
    pub shutdown: Shutdown,
}

/// Why a Kafka client was replaced.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Lost {
    /// Other members may own its partitions already.
    #[error("the group coordinator ended the member's session")]
    Session,
    /// The other member may be an earlier process of this instance.
    #[error("another member joined under the same name")]
    Fenced,
    /// librdkafka reported a fatal error.
    #[error("the kafka client failed: {0}")]
    Fatal(String),
    /// librdkafka reported nothing, but a partition has no owner or makes no progress.
    #[error("{0}")]
    Watchdog(Verdict),
}

impl Lost {
    /// Every value of the metric label.
    pub(crate) const LABELS: [&str; 5] = ["session", "fenced", "fatal", "unowned", "stuck"];

    /// Value of the metric label.
    fn label(&self) -> &'static str {
        match self {
            Lost::Session => "session",
            Lost::Fenced => "fenced",
            Lost::Fatal(_) => "fatal",
            Lost::Watchdog(Verdict::Unowned(_)) => "unowned",
            Lost::Watchdog(Verdict::Stuck(_)) => "stuck",
        }
    }
}

/// Keeps this instance in the group until shutdown or an error. Blocking; `runtime` runs the workers.
pub fn run<S: Store + 'static, D: DeadLetters + 'static>(
    parts: &Arc<Parts<S, D>>,
    runtime: &Handle,
) -> Result<(), ProcessorError> {
    let mut failures = 0u32;
    loop {
        let joined = Instant::now();
        let lost = match Membership::join(Arc::clone(parts), runtime.clone())?.run()? {
            End::Shutdown => return Ok(()),
            End::Lost(lost) => lost,
        };
        tracing::warn!(reason = %lost, "rejoining the group with a new client");
        parts.metrics.client_rebuilt(lost.label());
        if matches!(lost, Lost::Fenced) {
            runtime.block_on(parts.check_for_duplicate())?;
        }
        failures = if joined.elapsed() >= STABLE_AFTER { 0 } else { failures.saturating_add(1) };
        let backoff = INITIAL_REJOIN_BACKOFF.saturating_mul(1 << failures.min(10)).min(MAX_REJOIN_BACKOFF);
        runtime.block_on(async {
            tokio::select! {
                () = parts.shutdown.begun() => {}
                () = tokio::time::sleep(backoff) => {}
            }
        });
        if parts.shutdown.has_begun() {
            return Ok(());
        }
    }
}

impl<S, D> Parts<S, D> {
    /// Checks whether another process with this instance name is alive. Of two live processes, the one that started
    /// later fails and the other continues. An earlier process of this instance no longer announces itself, so it is
    /// never mistaken for a live one.
    async fn check_for_duplicate(&self) -> Result<(), ProcessorError> {
        let (mut first, started) = (None, Instant::now());
        while started.elapsed() < NAME_CHECK_DURATION && !self.shutdown.has_begun() {
            self.health.beat();
            let rows = announced(&self.session, &self.who).await.unwrap_or_default();
            let other =
                rows.into_iter().find(|row| row.instance == self.who.instance && row.life != self.who.life);
            match (other, &first) {
                (Some(other), None) => first = Some(other),
                (Some(other), Some(first)) if is_alive(first, &other) => return self.refuse_if_later(&other),
                _ => {}
            }
            tokio::time::sleep(NAME_CHECK_INTERVAL).await;
        }
        Ok(())
    }

    /// Fails if `other` started before this process.
    fn refuse_if_later(&self, other: &Announced) -> Result<(), ProcessorError> {
        let name = &self.who.instance;
        let own_start = self.who.started_at_ms;
        if (other.started_at_ms, &other.life) > (own_start, &self.who.life) {
            tracing::warn!(
                instance = name,
                "another process with this instance name is alive; it started later and must stop"
            );
            return Ok(());
        }
        Err(ProcessorError::Refused(format!(
            "another process with the instance name `{name}` is alive and started earlier: the two processes would \
             fence each other in the consumer group; set PIPELINE_INSTANCE to a unique name"
        )))
    }
}

/// Whether two announcements show that the same process was alive in between.
fn is_alive(first: &Announced, later: &Announced) -> bool {
    first.life == later.life && later.seen_at_ms > first.seen_at_ms
}
