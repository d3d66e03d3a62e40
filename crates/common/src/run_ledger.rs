//! The words of the run ledger, shared by the producer that writes it and the dashboard that shows it. Pure types; the
//! statements are the producer's.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// A half-open span of time `[start, end)` in Unix milliseconds, UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Interval {
    /// First millisecond that belongs to it.
    pub start_ms: i64,
    /// First millisecond that does not.
    pub end_ms: i64,
}

/// Where an interval stands. `scheduled → running → succeeded | retrying | failed`, and from the last two to `running` again;
/// from any but `succeeded` a person leads to `given_up`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    /// Known, not begun.
    Scheduled,
    /// A producer holds its lease.
    Running,
    /// An attempt failed; another follows at `retry_at`.
    Retrying,
    /// Every page fetched and every record acknowledged by Kafka.
    Succeeded,
    /// Its attempts failed for so long, or so surely, that somebody should look; it is tried again now and then while it is
    /// within the stream's catch-up limit. Without an attempt: it was missed.
    Failed,
    /// Somebody decided that it stays without data; only `clear` or a backfill runs it again.
    GivenUp,
}

/// Why an interval is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunType {
    /// It ended just now.
    Scheduled,
    /// It ended a while ago.
    CatchUp,
    /// Somebody asked for it.
    Backfill,
}

/// Which runs that are over a backfill runs again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Reprocess {
    /// None: only intervals without a run
    #[default]
    None,
    /// Failed ones
    Failed,
    /// Failed, given up and succeeded ones
    Completed,
}

impl RunState {
    /// All of them.
    pub const ALL: [RunState; 6] = [
        RunState::Scheduled,
        RunState::Running,
        RunState::Retrying,
        RunState::Succeeded,
        RunState::Failed,
        RunState::GivenUp,
    ];

    /// As stored.
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
    /// All of them.
    pub const ALL: [RunType; 3] = [RunType::Scheduled, RunType::CatchUp, RunType::Backfill];

    /// As stored.
    pub fn name(self) -> &'static str {
        match self {
            RunType::Scheduled => "scheduled",
            RunType::CatchUp => "catch_up",
            RunType::Backfill => "backfill",
        }
    }
}

/// A word that is no state or type of a run.
#[derive(Debug, thiserror::Error)]
#[error("`{found}` is no {what}; one of {known}")]
pub struct UnknownWord {
    found: String,
    what: &'static str,
    known: String,
}

impl FromStr for RunState {
    type Err = UnknownWord;
    fn from_str(s: &str) -> Result<Self, UnknownWord> {
        let known = || Self::ALL.map(Self::name).join(", ");
        Self::ALL.into_iter().find(|w| w.name() == s).ok_or_else(|| UnknownWord {
            found: s.to_owned(),
            what: "run state",
            known: known(),
        })
    }
}

impl FromStr for RunType {
    type Err = UnknownWord;
    fn from_str(s: &str) -> Result<Self, UnknownWord> {
        let known = || Self::ALL.map(Self::name).join(", ");
        Self::ALL.into_iter().find(|w| w.name() == s).ok_or_else(|| UnknownWord {
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
    fn stored_words_are_read_back() {
        for state in RunState::ALL {
            assert_eq!(state.name().parse::<RunState>().unwrap(), state);
        }
        for kind in RunType::ALL {
            assert_eq!(kind.name().parse::<RunType>().unwrap(), kind);
        }
        let others = RunState::ALL.into_iter().filter(|state| *state != RunState::Succeeded);
        assert!(others.map(RunState::name).all(|name| name < "succeeded"), "the ledger's queries rely on it");
        let error = "done".parse::<RunState>().unwrap_err().to_string();
        assert!(error.starts_with("`done` is no run state; one of scheduled, running"), "{error}");
    }
}
