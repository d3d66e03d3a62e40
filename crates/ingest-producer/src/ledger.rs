//! What the run ledger can do, as a trait: Cassandra ([`cassandra`]) or, in tests, memory. Every write is a compare and set
//! fenced by the row's epoch, so that of two producers one wins and one that has lost its lease changes nothing.

pub mod cassandra;
#[cfg(test)]
pub(crate) mod memory;
mod rows;
#[cfg(test)]
mod suite;

use crate::planner::Run;
use async_trait::async_trait;
use common::run_ledger::{Interval, RunState, RunType};

/// The ledger could not be asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LedgerError {
    /// It may work later.
    #[error("the run ledger does not answer: {0}")]
    Unavailable(String),
    /// It will never work: schema, rights or a row that nobody can read.
    #[error("the run ledger refuses: {0}")]
    Refused(String),
}

/// What a stream's instances share beside their runs.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StreamState {
    /// Nothing new begins.
    pub paused: bool,
    /// The timeline as JSON; `None`: no producer has ever run.
    pub schedules: Option<String>,
    /// Changes whenever somebody asks for old runs to be looked at again.
    pub updated_at_ms: i64,
}

/// A lease as asked for.
#[derive(Debug, Clone)]
pub struct Lease {
    /// Of the attempt to come.
    pub run_id: String,
    /// Who asks.
    pub owner: String,
    /// Now.
    pub now_ms: i64,
    /// How long it holds without renewal.
    pub until_ms: i64,
}

/// A lease that was granted: one attempt.
#[derive(Debug, Clone, PartialEq)]
pub struct Claim {
    /// What to run.
    pub interval: Interval,
    /// Why.
    pub run_type: RunType,
    /// Of this attempt.
    pub run_id: String,
    /// Who runs it.
    pub owner: String,
    /// Its number, from 1.
    pub attempt: i32,
    /// Fence of every write.
    pub epoch: i64,
    /// Start of the first attempt since it was scheduled or cleared; see [`taken_up`].
    pub first_started_ms: i64,
    /// Start of this attempt.
    pub started_ms: i64,
}

/// A run that is not begun now.
#[derive(Debug, Clone, PartialEq)]
pub struct Note {
    /// Which.
    pub interval: Interval,
    /// `Scheduled`, or `Failed` where it is missed.
    pub state: RunState,
    /// Why it is run.
    pub run_type: RunType,
    /// Why it is missed; else empty.
    pub cause: String,
}

/// What an attempt has done.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Counts {
    /// Pages fetched.
    pub pages: i32,
    /// Records taken out of them.
    pub records: i64,
    /// Records that Kafka acknowledged.
    pub acked: i64,
    /// Bytes fetched.
    pub bytes: i64,
}

/// How an attempt leaves its run.
#[derive(Debug, Clone, PartialEq)]
pub struct Ending {
    /// `Succeeded`, `Retrying` or `Failed`.
    pub state: RunState,
    /// What was done.
    pub counts: Counts,
    /// Cause; empty: none.
    pub error: String,
    /// Now.
    pub now_ms: i64,
    /// When a retrying or failed run is due.
    pub retry_at_ms: i64,
}

/// A row of `ingest_attempts`.
#[derive(Debug, Clone, PartialEq)]
pub struct Attempt {
    /// Whose.
    pub interval: Interval,
    /// Its number.
    pub number: i32,
    /// Its id.
    pub run_id: String,
    /// Who ran it.
    pub owner: String,
    /// [`OUTCOME_FAILED`] and so on.
    pub outcome: String,
    /// Cause; empty: none.
    pub cause: String,
    /// The source's status, where it answered badly.
    pub http_status: Option<i32>,
    /// What was done.
    pub counts: Counts,
    /// When it began.
    pub started_ms: i64,
    /// How long it took.
    pub milliseconds: i64,
}

/// Every record was acknowledged.
pub const OUTCOME_SUCCEEDED: &str = "succeeded";
/// Counts towards the attempt cap.
pub const OUTCOME_FAILED: &str = "failed";
/// Its owner vanished or lost the lease.
pub const OUTCOME_LOST: &str = "lost";
/// Its producer was asked to stop.
pub const OUTCOME_INTERRUPTED: &str = "interrupted";
/// Not an attempt: somebody made the run due again; failures before it no longer count.
pub const OUTCOME_CLEARED: &str = "cleared";

/// Failed attempts since the run was last cleared; `attempts` ascend by number.
pub fn failures(attempts: &[Attempt]) -> u32 {
    let recent = attempts.iter().rev().take_while(|a| a.outcome != OUTCOME_CLEARED);
    u32::try_from(recent.filter(|a| a.outcome == OUTCOME_FAILED).count()).unwrap_or(u32::MAX)
}

/// Attempt, epoch and start of the first attempt that a claim of that type gives a run as `seen`. One that starts over gets
/// the number after next: [`OUTCOME_CLEARED`] stands in between. Time in which it was due but no producer ran does not count
/// towards its deadline: its start moves forward by that time.
pub fn taken_up(seen: Option<&Run>, run_type: RunType, now_ms: i64) -> (i32, i64, i64) {
    let Some(run) = seen else { return (1, 1, now_ms) };
    let due_ms = match run.state {
        RunState::Running => run.lease_until_ms,
        _ => run.retry_at_ms,
    };
    let starts_over = run.starts_over(run_type);
    let goes_on = !starts_over && run.state != RunState::Scheduled && run.started_at_ms > 0;
    let idle_ms = if due_ms > 0 { (now_ms - due_ms).max(0) } else { 0 };
    let first_started_ms = if goes_on { run.started_at_ms + idle_ms } else { now_ms };
    (run.attempt + 1 + i32::from(starts_over), run.epoch + 1, first_started_ms)
}

/// The run ledger of one stream.
#[async_trait]
pub trait Ledger: Send + Sync {
    /// What the stream's instances share.
    async fn stream_state(&self) -> Result<StreamState, LedgerError>;

    /// Replaces the schedules if they are still `old` (`None`: there are none); false: somebody else was faster.
    async fn set_schedules(&self, old: Option<&str>, new: &str, now_ms: i64) -> Result<bool, LedgerError>;

    /// Pauses or resumes the stream; false: no producer has planned it yet.
    async fn set_paused(&self, paused: bool) -> Result<bool, LedgerError>;

    /// Lets every producer look at old runs again.
    async fn touch(&self, now_ms: i64) -> Result<(), LedgerError>;

    /// All runs whose interval begins in `[from_ms, to_ms)`, oldest first.
    async fn runs(&self, from_ms: i64, to_ms: i64) -> Result<Vec<Run>, LedgerError>;

    /// The runs among them that have not succeeded.
    async fn unfinished(&self, from_ms: i64, to_ms: i64) -> Result<Vec<Run>, LedgerError>;

    /// One run, read so that no compare and set that has been answered is missed.
    async fn run(&self, start_ms: i64) -> Result<Option<Run>, LedgerError>;

    /// Takes the lease of a run as `seen` (`None`: there is no row); `None`: somebody else was faster.
    async fn claim(
        &self,
        interval: Interval,
        run_type: RunType,
        seen: Option<&Run>,
        lease: &Lease,
    ) -> Result<Option<Claim>, LedgerError>;

    /// Writes the row of a run that is not begun now; nothing where there is a row.
    async fn note(&self, note: &Note, now_ms: i64) -> Result<(), LedgerError>;

    /// Extends the lease; false: it is lost.
    async fn renew(&self, claim: &Claim, until_ms: i64) -> Result<bool, LedgerError>;

    /// Ends an attempt; false: its lease was lost, nothing is changed.
    async fn finish(&self, claim: &Claim, ending: &Ending) -> Result<bool, LedgerError>;

    /// Records an attempt; the first record of a number stays.
    async fn record(&self, attempt: &Attempt) -> Result<(), LedgerError>;

    /// The attempts of a run, ascending.
    async fn attempts(&self, start_ms: i64) -> Result<Vec<Attempt>, LedgerError>;

    /// Sets the state of a run by hand if it is still as `seen`; any owner loses its lease.
    async fn overrule(
        &self,
        seen: &Run,
        state: RunState,
        cause: &str,
        now_ms: i64,
    ) -> Result<bool, LedgerError>;
}
