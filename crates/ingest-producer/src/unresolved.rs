//! Tracks the failed and missed intervals before the planner's range. They are read infrequently and filtered by
//! state, so that an interval that fails for days costs only its own row.

use crate::ledger::{Ledger, LedgerError};
use crate::planner::Run;
use common::contracts::run_ledger::RunState;

/// Refresh interval of recent runs, which are retried automatically.
const RECENT_EVERY_MS: i64 = 10_000;
/// Refresh interval of old runs. Only a command changes them, and it updates `stream_state` unless it is killed.
const OLD_EVERY_MS: i64 = 600_000;
/// Old runs are read in ranges of this length and only counted, to bound memory.
const PIECE_MS: i64 = 86_400_000;

/// The unfinished runs as last read from the ledger.
#[derive(Debug, Default)]
pub struct Unresolved {
    /// Number of runs that start before `recent_from_ms`.
    old: Count,
    old_read_ms: Option<i64>,
    /// Start of the catch-up range when the old runs were counted.
    recent_from_ms: i64,
    recent: Vec<Run>,
    recent_read_ms: Option<i64>,
}

/// The time range of unfinished runs, in Unix milliseconds.
#[derive(Debug, Clone, Copy)]
pub struct Span {
    /// Start of the timeline.
    pub start_ms: i64,
    /// Start of the catch-up range.
    pub catch_up_from_ms: i64,
    /// Start of the planner's range, which ends the range of unfinished runs.
    pub settled_to_ms: i64,
}

/// Numbers of intervals whose data is missing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    /// Attempted without success.
    pub failed: u64,
    /// Never attempted.
    pub missed: u64,
}

impl Count {
    fn add<'a>(&mut self, runs: impl IntoIterator<Item = &'a Run>) {
        for run in runs {
            *if run.is_missed() { &mut self.missed } else { &mut self.failed } += 1;
        }
    }
}

impl Unresolved {
    /// Reads the runs whose refresh interval has passed, or all runs if `all` is set.
    pub async fn refresh(
        &mut self,
        ledger: &dyn Ledger,
        span: Span,
        now_ms: i64,
        all: bool,
    ) -> Result<(), LedgerError> {
        let is_due = |read_ms: Option<i64>, every_ms: i64| {
            all || read_ms.is_none_or(|read_ms| (now_ms - read_ms).abs() >= every_ms)
        };
        if is_due(self.old_read_ms, OLD_EVERY_MS) {
            let recent_from_ms = span.catch_up_from_ms.min(span.settled_to_ms);
            let (mut old, mut from_ms) = (Count::default(), span.start_ms);
            while from_ms < recent_from_ms {
                let to_ms = (from_ms + PIECE_MS).min(recent_from_ms);
                old.add(&unresolved(ledger, from_ms, to_ms).await?);
                from_ms = to_ms;
            }
            (self.old, self.old_read_ms) = (old, Some(now_ms));
            (self.recent_from_ms, self.recent_read_ms) = (recent_from_ms, None);
        }
        if is_due(self.recent_read_ms, RECENT_EVERY_MS) {
            self.recent = unresolved(ledger, self.recent_from_ms, span.settled_to_ms).await?;
            self.recent_read_ms = Some(now_ms);
        }
        Ok(())
    }

    /// Makes the next refresh read the recent runs.
    pub fn invalidate_recent(&mut self) {
        self.recent_read_ms = None;
    }

    /// Unfinished runs within the catch-up range.
    pub fn recent(&self) -> &[Run] {
        &self.recent
    }

    /// The number of unresolved intervals, including the failed runs of `later`.
    pub fn count(&self, later: &[Run]) -> Count {
        let mut count = self.old;
        count.add(&self.recent);
        count.add(later.iter().filter(|run| run.state == RunState::Failed));
        count
    }
}

/// Reads the unresolved runs of a time range before the planner's range. There, an active or due run is the retry of a
/// failed one.
async fn unresolved(ledger: &dyn Ledger, from_ms: i64, to_ms: i64) -> Result<Vec<Run>, LedgerError> {
    let mut runs = ledger.unfinished(from_ms, to_ms).await?;
    runs.retain(|run| run.state != RunState::GivenUp);
    Ok(runs)
}
