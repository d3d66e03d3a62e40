//! What is left unfinished before the intervals that the planner looks at: failed and missed ones. They are read seldom and by
//! their state alone, so that an interval that fails for days costs no more than its own row.

use crate::ledger::{Ledger, LedgerError};
use crate::planner::Run;
use common::run_ledger::RunState;

/// How often those that are tried again by themselves are read.
const RECENT_EVERY_MS: i64 = 10_000;
/// How often the others are read: only a person changes them, and `stream_state` tells unless the command was killed.
const OLD_EVERY_MS: i64 = 600_000;
/// The others are read in pieces of this length and counted, never held.
const PIECE_MS: i64 = 86_400_000;

/// Unfinished runs as last read from the ledger.
#[derive(Debug, Default)]
pub struct Unresolved {
    /// How many begin before `recent_from_ms`.
    old: Count,
    old_read_ms: Option<i64>,
    /// Where catching up began when the old ones were counted.
    recent_from_ms: i64,
    recent: Vec<Run>,
    recent_read_ms: Option<i64>,
}

/// Where to look for unfinished runs, in Unix milliseconds.
#[derive(Debug, Clone, Copy)]
pub struct Span {
    /// Start of the timeline.
    pub start_ms: i64,
    /// Where catching up begins.
    pub catch_up_from_ms: i64,
    /// Where the intervals begin that the planner looks at.
    pub settled_to_ms: i64,
}

/// Numbers of intervals without their data.
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
    /// Reads again what may have changed; `all`: everything.
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

    /// Those that are recent are read again at the next opportunity.
    pub fn changed(&mut self) {
        self.recent_read_ms = None;
    }

    /// Unfinished runs from the catch-up limit on.
    pub fn recent(&self) -> &[Run] {
        &self.recent
    }

    /// How many there are with those of `later` runs that have failed.
    pub fn count(&self, later: &[Run]) -> Count {
        let mut count = self.old;
        count.add(&self.recent);
        count.add(later.iter().filter(|run| run.state == RunState::Failed));
        count
    }
}

/// Before the intervals that the planner looks at, a run that is going on or due is one that failed and is tried again.
async fn unresolved(ledger: &dyn Ledger, from_ms: i64, to_ms: i64) -> Result<Vec<Run>, LedgerError> {
    let mut runs = ledger.unfinished(from_ms, to_ms).await?;
    runs.retain(|run| run.state != RunState::GivenUp);
    Ok(runs)
}
