//! The consumer group. Runs on one blocking thread: joins, takes part until the client is lost, and joins again with a new
//! client. A lost session or a dead client ends the client and not the pipeline: the new client takes over the former one's
//! membership by its static name, and every partition goes on from its checkpoint.

pub mod client;
mod membership;
pub mod ownership;
mod slot;

use crate::error::ProcessorError;
use crate::fetch::ChunkLimits;
use crate::metrics::Metrics;
use crate::open::Opener;
use crate::poison_gate::PoisonLimits;
use crate::store::{DeadLetters, Store};
use client::MemberSettings;
use common::admin::Health;
use common::presence::{Announced, Holdings, Instance, announced};
use common::shutdown::Shutdown;
use membership::{End, Membership};
use ownership::{Ownership, Verdict};
use scylla::client::session::Session;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::runtime::Handle;

/// First pause before joining again; doubles with each client that is lost soon.
const REJOIN_PAUSE: Duration = Duration::from_millis(200);
/// Longest pause.
const REJOIN_PAUSE_MOST: Duration = Duration::from_secs(10);
/// A client that lived so long was no failed attempt.
const LIVED_LONG: Duration = Duration::from_secs(60);
/// How long to look for another process of the same name: it announces itself each second.
const RIVAL_WITHIN: Duration = Duration::from_secs(4);
const RIVAL_POLL: Duration = Duration::from_millis(250);

/// How this instance takes part.
#[derive(Debug, Clone)]
pub struct GroupSettings {
    /// How its client joins.
    pub member: MemberSettings,
    /// Events topic.
    pub topic: String,
    /// When a chunk is full.
    pub limits: ChunkLimits,
    /// How much poison pauses a partition.
    pub poison: PoisonLimits,
    /// How long a partition may take to stop.
    pub revoke_deadline: Duration,
}

/// What every membership and partition of this instance needs.
pub struct Parts<S, D> {
    /// How it takes part.
    pub settings: GroupSettings,
    /// Opens partitions.
    pub opener: Opener<S>,
    /// The dead-letter topic.
    pub dead_letters: Arc<D>,
    /// Cassandra, to look for other processes of the same name.
    pub session: Arc<Session>,
    /// This process.
    pub who: Instance,
    /// What this instance holds.
    pub holdings: Holdings,
    /// What is observed of all instances.
    pub ownership: Arc<Ownership>,
    /// Readiness.
    pub health: Arc<Health>,
    /// Metrics.
    pub metrics: Arc<Metrics>,
    /// Ends everything.
    pub shutdown: Shutdown,
}

/// Why a client was given up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Lost {
    /// Other members may own its partitions already.
    #[error("the group coordinator ended the member's session")]
    Session,
    /// It may have been this instance's former self.
    #[error("another member joined under the same name")]
    Fenced,
    /// librdkafka says so.
    #[error("the client cannot be used any more: {0}")]
    Fatal(String),
    /// Nothing was reported.
    #[error("{0}")]
    Watchdog(Verdict),
}

impl Lost {
    /// All labels.
    pub(crate) const LABELS: [&str; 5] = ["session", "fenced", "fatal", "unowned", "stuck"];

    /// As a label.
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

/// Takes part in the group until shutdown or an error. Blocking; `runtime` runs the workers.
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
        tracing::warn!(reason = %lost, "joining the group with a new client");
        parts.metrics.client_rebuilt(lost.label());
        if matches!(lost, Lost::Fenced) {
            runtime.block_on(parts.give_way())?;
        }
        failures = if joined.elapsed() >= LIVED_LONG { 0 } else { failures.saturating_add(1) };
        let pause = REJOIN_PAUSE.saturating_mul(1 << failures.min(10)).min(REJOIN_PAUSE_MOST);
        runtime.block_on(async {
            tokio::select! {
                () = parts.shutdown.begun() => {}
                () = tokio::time::sleep(pause) => {}
            }
        });
        if parts.shutdown.has_begun() {
            return Ok(());
        }
    }
}

impl<S, D> Parts<S, D> {
    /// Looks whether another process of this name is alive. The one that started later gives way, by an error; the other one goes
    /// on. A former process of this instance does not announce itself any more, so it is never taken for a rival.
    async fn give_way(&self) -> Result<(), ProcessorError> {
        let (mut first, began) = (None, Instant::now());
        while began.elapsed() < RIVAL_WITHIN && !self.shutdown.has_begun() {
            self.health.beat();
            let rows = announced(&self.session, &self.who).await.unwrap_or_default();
            let rival =
                rows.into_iter().find(|row| row.instance == self.who.instance && row.life != self.who.life);
            match (rival, &first) {
                (Some(rival), None) => first = Some(rival),
                (Some(rival), Some(first)) if is_alive(first, &rival) => return self.yield_to(&rival),
                _ => {}
            }
            tokio::time::sleep(RIVAL_POLL).await;
        }
        Ok(())
    }

    fn yield_to(&self, rival: &Announced) -> Result<(), ProcessorError> {
        let name = &self.who.instance;
        let own_start = self.who.started_at_ms;
        if (rival.started_at_ms, &rival.life) > (own_start, &self.who.life) {
            tracing::warn!(instance = name, "a second process of this name is alive; it has to give way");
            return Ok(());
        }
        Err(ProcessorError::Refused(format!(
            "another process with the instance name `{name}` is alive and started earlier: the two would take the group's \
             partitions from each other; set PIPELINE_INSTANCE to another name"
        )))
    }
}

/// Whether a process has announced itself twice.
fn is_alive(first: &Announced, later: &Announced) -> bool {
    first.life == later.life && later.seen_at_ms > first.seen_at_ms
}
