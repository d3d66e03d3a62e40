//! What every membership and every partition of this instance needs, and why a client is replaced. Plain data.

use super::client::MemberSettings;
use super::ownership::{Ownership, Verdict};
use crate::count::poison_gate::PoisonLimits;
use crate::metrics::Metrics;
use crate::pipeline::fetch::ChunkLimits;
use crate::pipeline::open::Opener;
use common::runtime::admin::Health;
use common::runtime::presence::{Holdings, Instance};
use common::runtime::shutdown::Shutdown;
use scylla::client::session::Session;
use std::sync::Arc;
use std::time::Duration;

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
pub(super) enum Lost {
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
    /// Value of the metric label, one of `metrics::REBUILD_REASONS`.
    pub(super) fn label(&self) -> &'static str {
        match self {
            Lost::Session => "session",
            Lost::Fenced => "fenced",
            Lost::Fatal(_) => "fatal",
            Lost::Watchdog(Verdict::Unowned(_)) => "unowned",
            Lost::Watchdog(Verdict::Stuck(_)) => "stuck",
        }
    }
}
