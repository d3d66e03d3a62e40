//! Types of the run ledger. The producer writes the ledger and the dashboard shows it. Pure; the producer owns the
//! statements.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// A half-open span of time `[start, end)` in Unix milliseconds, UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Interval {
    /// First millisecond of the interval.
    pub start_ms: i64,
    /// First millisecond after the interval.
    pub end_ms: i64,
}

/// State of the run of an interval: `scheduled → running → succeeded | retrying | failed`. A `retrying` or `failed` run
/// can return to `running`. An operator can move a run from every state except `succeeded` to `given_up`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    /// Planned, but not started.
    Scheduled,
    /// A producer holds its lease.
    Running,
    /// An attempt failed. The next one starts at `retry_at`.
    Retrying,
    /// Every page was fetched, and Kafka acknowledged every record.
    Succeeded,
    /// The retries are exhausted, or the error is permanent, so an operator should look at it. The run is still retried
    /// at long intervals while it is within the catch-up limit of the stream. A failed run without attempts was missed.
    Failed,
    /// An operator decided to leave the interval without data. Only `clear` or a backfill runs it again.
    GivenUp,
}

/// Why a run was created.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunType {
    /// The interval has just ended.
    Scheduled,
    /// The interval ended earlier and was missed.
    CatchUp,
    /// An operator requested a backfill.
    Backfill,
    /// The interval has succeeded and is fetched again, because the stream looks back.
    Lookback,
}

/// Which finished runs a backfill repeats.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Reprocess {
    /// Only intervals without a run
    #[default]
    None,
    /// Failed runs as well
    Failed,
    /// Failed, given-up and succeeded runs as well
    Completed,
}

impl RunState {
    /// All variants.
    pub const ALL: [RunState; 6] = [
        RunState::Scheduled,
        RunState::Running,
        RunState::Retrying,
        RunState::Succeeded,
        RunState::Failed,
        RunState::GivenUp,
    ];

    /// The name stored in the ledger.
    pub fn name(self) -> &'static str {
        match self {
            RunState::Scheduled => "scheduled",
            RunState::Running => "running",
            RunState::Retrying => "retrying",
            RunState::Succeeded => "succeeded",
            RunState::Failed => "failed",
            RunState::GivenUp => "given_up",
        }
    }
}

impl RunType {
    /// All variants.
    pub const ALL: [RunType; 4] =
        [RunType::Scheduled, RunType::CatchUp, RunType::Backfill, RunType::Lookback];

    /// The name stored in the ledger.
    pub fn name(self) -> &'static str {
        match self {
            RunType::Scheduled => "scheduled",
            RunType::CatchUp => "catch_up",
            RunType::Backfill => "backfill",
            RunType::Lookback => "lookback",
        }
    }
}

/// A text that does not name a run state or a run type.
#[derive(Debug, thiserror::Error)]
#[error("`{found}` is not a {what}; use one of {known}")]
pub struct UnknownName {
    found: String,
    what: &'static str,
    known: String,
}

impl FromStr for RunState {
    type Err = UnknownName;
    fn from_str(s: &str) -> Result<Self, UnknownName> {
        let known = || Self::ALL.map(Self::name).join(", ");
        Self::ALL.into_iter().find(|variant| variant.name() == s).ok_or_else(|| UnknownName {
            found: s.to_owned(),
            what: "run state",
            known: known(),
        })
    }
}

impl FromStr for RunType {
    type Err = UnknownName;
    fn from_str(s: &str) -> Result<Self, UnknownName> {
        let known = || Self::ALL.map(Self::name).join(", ");
        Self::ALL.into_iter().find(|variant| variant.name() == s).ok_or_else(|| UnknownName {
            found: s.to_owned(),
            what: "run type",
            known: known(),
        })
    }
}

impl fmt::Display for RunState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for RunType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_names_are_parsed_back() {
        for state in RunState::ALL {
            assert_eq!(state.name().parse::<RunState>().unwrap(), state);
        }
        for run_type in RunType::ALL {
            assert_eq!(run_type.name().parse::<RunType>().unwrap(), run_type);
        }
        let others = RunState::ALL.into_iter().filter(|state| *state != RunState::Succeeded);
        assert!(
            others.map(RunState::name).all(|name| name < "succeeded"),
            "the queries of the ledger rely on this order"
        );
        let error = "done".parse::<RunState>().unwrap_err().to_string();
        assert!(error.starts_with("`done` is not a run state; use one of scheduled, running"), "{error}");
    }
}
