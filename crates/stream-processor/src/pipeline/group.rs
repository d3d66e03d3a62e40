//! The consumer group, run by one blocking thread: joins, processes until the client is lost, and rejoins with a new
//! client. A lost session or a dead client does not end the process. The new client takes over the membership through
//! its static member name, and every partition continues from its checkpoint.

pub mod client;
mod membership;
pub mod ownership;
pub mod parts;
mod slot;

use crate::error::ProcessorError;
use crate::io::store::{DeadLetters, Store};
use common::runtime::presence::{Announced, announced};
use membership::{End, Membership};
use parts::{Lost, Parts};
use std::sync::Arc;
use std::sync::atomic::Ordering;
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
            parts.who.silent.store(true, Ordering::Release);
            let checked = runtime.block_on(parts.check_for_duplicate());
            parts.who.silent.store(false, Ordering::Release);
            checked?;
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
    /// never mistaken for a live one. The heartbeats of this process must be suspended meanwhile: both processes write
    /// the same row.
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
