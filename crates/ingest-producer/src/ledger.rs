//! The interface of the run ledger. It is implemented on Cassandra ([`cassandra`]) and, for tests, in memory. Every
//! write is a compare-and-set on the row's epoch. Of two producers one wins, and a producer that has lost its lease
//! changes nothing.

pub mod cassandra;
#[cfg(test)]
pub(crate) mod memory;
mod rows;
#[cfg(test)]
mod suite;

use crate::planner::Run;
use async_trait::async_trait;
use common::contracts::run_ledger::{Interval, RunState, RunType};

/// A call of the ledger failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LedgerError {
    /// A retry may succeed.
    #[error("the run ledger is unavailable: {0}")]
    Unavailable(String),
    /// A retry does not help: the schema, the permissions or a row are wrong.
    #[error("the run ledger rejected a request: {0}")]
    Refused(String),
}

/// The state that the instances of a stream share, besides its runs.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StreamState {
    /// If set, no run is started.
    pub paused: bool,
    /// The timeline as JSON, or `None` if no producer has run yet.
    pub schedules: Option<String>,
    /// Changes whenever a command modifies old runs, so that producers read them again.
    pub updated_at_ms: i64,
}

/// A request for a lease.
#[derive(Debug, Clone)]
pub struct Lease {
    /// Id of the attempt.
    pub run_id: String,
    /// The instance that claims the lease.
    pub owner: String,
    /// The current time.
    pub now_ms: i64,
    /// When the lease expires without renewal.
    pub until_ms: i64,
}

/// A granted lease, which covers one attempt.
#[derive(Debug, Clone, PartialEq)]
pub struct Claim {
    /// The interval to run.
    pub interval: Interval,
    /// What started the run.
    pub run_type: RunType,
    /// Id of this attempt.
    pub run_id: String,
    /// The instance that holds the lease.
    pub owner: String,
    /// Number of the attempt, starting at 1.
    pub attempt: i32,
    /// Fencing token of every write.
    pub epoch: i64,
    /// Start of the first attempt since the run was scheduled or cleared; see [`claim_values`].
    pub first_started_ms: i64,
    /// Start of this attempt.
    pub started_ms: i64,
}

/// A row for an interval that is not started now.
#[derive(Debug, Clone, PartialEq)]
pub struct Note {
    /// The interval of the run.
    pub interval: Interval,
    /// `Scheduled`, or `Failed` if the interval was missed.
    pub state: RunState,
    /// What will start the run.
    pub run_type: RunType,
    /// Why the interval was missed; otherwise empty.
    pub cause: String,
}

/// What an attempt has processed.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Counts {
    /// Pages fetched.
    pub pages: i32,
    /// Records found in the pages.
    pub records: i64,
    /// Records that Kafka acknowledged.
    pub acked: i64,
    /// Bytes fetched, before decompression.
    pub bytes: i64,
}

/// The state of a run after an attempt.
#[derive(Debug, Clone, PartialEq)]
pub struct Ending {
    /// `Succeeded`, `Retrying` or `Failed`.
    pub state: RunState,
    /// What the attempt processed.
    pub counts: Counts,
    /// Cause of the failure; empty if there is none.
    pub error: String,
    /// The current time.
    pub now_ms: i64,
    /// When a retrying or failed run is due again.
    pub retry_at_ms: i64,
}

/// A row of `ingest_attempts`.
#[derive(Debug, Clone, PartialEq)]
pub struct Attempt {
    /// The interval of the run.
    pub interval: Interval,
    /// Number of the attempt.
    pub number: i32,
    /// Id of the attempt.
    pub run_id: String,
    /// The instance that ran it.
    pub owner: String,
    /// One of the `OUTCOME_…` constants, such as [`OUTCOME_FAILED`].
    pub outcome: String,
    /// Cause of the failure; empty if there is none.
    pub cause: String,
    /// HTTP status of an unsuccessful response of the source.
    pub http_status: Option<i32>,
    /// What the attempt processed.
    pub counts: Counts,
    /// When the attempt started.
    pub started_ms: i64,
    /// Duration of the attempt.
    pub milliseconds: i64,
}

/// Outcome of an attempt: every record was acknowledged.
pub const OUTCOME_SUCCEEDED: &str = "succeeded";
/// Outcome of an attempt: it failed, which counts toward the limit of attempts.
pub const OUTCOME_FAILED: &str = "failed";
/// Outcome of an attempt: its owner crashed or lost the lease.
pub const OUTCOME_LOST: &str = "lost";
/// Outcome of an attempt: its producer was stopped.
pub const OUTCOME_INTERRUPTED: &str = "interrupted";
/// Not an attempt: the run was made due again, and failures before this record no longer count.
pub const OUTCOME_CLEARED: &str = "cleared";

/// The number of failed attempts since the run was last cleared. `attempts` must be in ascending order.
pub fn failures(attempts: &[Attempt]) -> u32 {
    let recent = attempts.iter().rev().take_while(|a| a.outcome != OUTCOME_CLEARED);
    u32::try_from(recent.filter(|a| a.outcome == OUTCOME_FAILED).count()).unwrap_or(u32::MAX)
}

/// Returns the attempt number, the epoch and the start of the first attempt after a claim of a run as `seen`. A run
/// that starts over skips one attempt number, which the [`OUTCOME_CLEARED`] record takes. Time in which the run was
/// due but no producer ran does not count toward its deadline: the start of the first attempt moves forward by that
/// time.
pub fn claim_values(seen: Option<&Run>, run_type: RunType, now_ms: i64) -> (i32, i64, i64) {
    let Some(run) = seen else { return (1, 1, now_ms) };
    let due_ms = match run.state {
        RunState::Running => run.lease_until_ms,
        _ => run.retry_at_ms,
    };
    let starts_over = run.starts_over(run_type);
    let continues = !starts_over && run.state != RunState::Scheduled && run.started_at_ms > 0;
    let idle_ms = if due_ms > 0 { (now_ms - due_ms).max(0) } else { 0 };
    let first_started_ms = if continues { run.started_at_ms + idle_ms } else { now_ms };
    (run.attempt + 1 + i32::from(starts_over), run.epoch + 1, first_started_ms)
}

/// The run ledger of one stream.
#[async_trait]
pub trait Ledger: Send + Sync {
    /// Reads the shared state of the stream.
    async fn stream_state(&self) -> Result<StreamState, LedgerError>;

    /// Replaces the schedules if they are still `old`, where `None` means not set. Returns `false` if they are not.
    async fn set_schedules(&self, old: Option<&str>, new: &str, now_ms: i64) -> Result<bool, LedgerError>;

    /// Pauses or resumes the stream. Returns `false` if no producer has planned it yet.
    async fn set_paused(&self, paused: bool) -> Result<bool, LedgerError>;

    /// Makes every producer read old runs again.
    async fn touch(&self, now_ms: i64) -> Result<(), LedgerError>;

    /// All runs whose interval starts in `[from_ms, to_ms)`, oldest first.
    async fn runs(&self, from_ms: i64, to_ms: i64) -> Result<Vec<Run>, LedgerError>;

    /// Like [`Ledger::runs`], but only runs that have not succeeded.
    async fn unfinished(&self, from_ms: i64, to_ms: i64) -> Result<Vec<Run>, LedgerError>;

    /// Reads one run with serial consistency, so that every completed compare-and-set is visible.
    async fn run(&self, start_ms: i64) -> Result<Option<Run>, LedgerError>;

    /// Claims the lease of a run that is still as `seen`, where `None` means that it has no row. Returns `None` if it
    /// is not.
    async fn claim(
        &self,
        interval: Interval,
        run_type: RunType,
        seen: Option<&Run>,
        lease: &Lease,
    ) -> Result<Option<Claim>, LedgerError>;

    /// Writes the row of a run that is not started now. Does nothing if the run has a row.
    async fn note(&self, note: &Note, now_ms: i64) -> Result<(), LedgerError>;

    /// Extends the lease. Returns `false` if it is lost.
    async fn renew(&self, claim: &Claim, until_ms: i64) -> Result<bool, LedgerError>;

    /// Records the end of an attempt in its run. Returns `false` and changes nothing if the lease was lost.
    async fn finish(&self, claim: &Claim, ending: &Ending) -> Result<bool, LedgerError>;

    /// Records an attempt. Only the first record of an attempt number is kept.
    async fn record(&self, attempt: &Attempt) -> Result<(), LedgerError>;

    /// The attempts of a run in ascending order.
    async fn attempts(&self, start_ms: i64) -> Result<Vec<Attempt>, LedgerError>;

    /// Sets the state of a run for an operator if the run is still as `seen`. The owner of a lease loses it.
    async fn overrule(
        &self,
        seen: &Run,
        state: RunState,
        cause: &str,
        now_ms: i64,
    ) -> Result<bool, LedgerError>;
}
