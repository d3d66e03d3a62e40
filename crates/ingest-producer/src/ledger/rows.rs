//! The rows of the run ledger's tables.

use super::cassandra::unreadable;
use super::{Attempt, Counts, LedgerError};
use crate::planner::Run;
use common::contracts::run_ledger::Interval;
use scylla::value::{CqlTimestamp, MaybeUnset};
use scylla::{DeserializeRow, SerializeRow};

pub(super) const DAY_MS: i64 = 86_400_000;

#[derive(Debug, DeserializeRow)]
pub(super) struct RunRow {
    pub(super) interval_start: CqlTimestamp,
    pub(super) interval_end: Option<CqlTimestamp>,
    pub(super) state: Option<String>,
    pub(super) run_type: Option<String>,
    pub(super) run_id: Option<String>,
    pub(super) attempt: Option<i32>,
    pub(super) owner: Option<String>,
    pub(super) epoch: Option<i64>,
    pub(super) lease_until: Option<CqlTimestamp>,
    pub(super) pages: Option<i32>,
    pub(super) records: Option<i64>,
    pub(super) acked: Option<i64>,
    pub(super) bytes: Option<i64>,
    pub(super) error: Option<String>,
    pub(super) started_at: Option<CqlTimestamp>,
    pub(super) finished_at: Option<CqlTimestamp>,
    pub(super) retry_at: Option<CqlTimestamp>,
}

#[derive(Debug, SerializeRow)]
pub(super) struct NewRun<'a> {
    pub(super) stream: &'a str,
    pub(super) day: CqlTimestamp,
    pub(super) interval_start: CqlTimestamp,
    pub(super) interval_end: CqlTimestamp,
    pub(super) state: &'a str,
    pub(super) run_type: &'a str,
    pub(super) run_id: &'a str,
    pub(super) attempt: i32,
    pub(super) owner: &'a str,
    pub(super) epoch: i64,
    pub(super) lease_until: CqlTimestamp,
    pub(super) error: &'a str,
    pub(super) created_at: CqlTimestamp,
    pub(super) started_at: MaybeUnset<CqlTimestamp>,
    pub(super) finished_at: MaybeUnset<CqlTimestamp>,
}

#[derive(Debug, DeserializeRow)]
pub(super) struct AttemptRow {
    pub(super) interval_start: CqlTimestamp,
    pub(super) attempt: i32,
    pub(super) run_id: Option<String>,
    pub(super) owner: Option<String>,
    pub(super) outcome: Option<String>,
    pub(super) cause: Option<String>,
    pub(super) http_status: Option<i32>,
    pub(super) pages: Option<i32>,
    pub(super) records: Option<i64>,
    pub(super) bytes: Option<i64>,
    pub(super) started_at: Option<CqlTimestamp>,
    pub(super) milliseconds: Option<i64>,
}

pub(super) fn day(start_ms: i64) -> CqlTimestamp {
    CqlTimestamp(common::contracts::event::floor_to(start_ms, DAY_MS))
}

pub(super) fn set_if(holds: bool, at: CqlTimestamp) -> MaybeUnset<CqlTimestamp> {
    if holds { MaybeUnset::Set(at) } else { MaybeUnset::Unset }
}

pub(super) fn ms(time: Option<CqlTimestamp>) -> i64 {
    time.map_or(0, |t| t.0)
}

impl RunRow {
    pub(super) fn read(self) -> Result<Run, LedgerError> {
        Ok(Run {
            interval: Interval { start_ms: self.interval_start.0, end_ms: ms(self.interval_end) },
            state: self.state.unwrap_or_default().parse().map_err(unreadable)?,
            run_type: self.run_type.unwrap_or_default().parse().map_err(unreadable)?,
            run_id: self.run_id.unwrap_or_default(),
            attempt: self.attempt.unwrap_or(0),
            owner: self.owner.unwrap_or_default(),
            epoch: self.epoch.unwrap_or(0),
            lease_until_ms: ms(self.lease_until),
            retry_at_ms: ms(self.retry_at),
            started_at_ms: ms(self.started_at),
            finished_at_ms: ms(self.finished_at),
            pages: self.pages.unwrap_or(0),
            records: self.records.unwrap_or(0),
            acked: self.acked.unwrap_or(0),
            bytes: self.bytes.unwrap_or(0),
            error: self.error.unwrap_or_default(),
        })
    }
}

impl AttemptRow {
    pub(super) fn read(self) -> Attempt {
        let start_ms = self.interval_start.0;
        Attempt {
            interval: Interval { start_ms, end_ms: start_ms },
            number: self.attempt,
            run_id: self.run_id.unwrap_or_default(),
            owner: self.owner.unwrap_or_default(),
            outcome: self.outcome.unwrap_or_default(),
            cause: self.cause.unwrap_or_default(),
            http_status: self.http_status,
            counts: Counts {
                pages: self.pages.unwrap_or(0),
                records: self.records.unwrap_or(0),
                acked: 0,
                bytes: self.bytes.unwrap_or(0),
            },
            started_ms: ms(self.started_at),
            milliseconds: self.milliseconds.unwrap_or(0),
        }
    }
}

impl NewRun<'_> {
    /// The row of a run without attempts.
    pub(super) fn of(stream: &str, interval: Interval, now_ms: i64) -> NewRun<'_> {
        let now = CqlTimestamp(now_ms);
        NewRun {
            stream,
            day: day(interval.start_ms),
            interval_start: CqlTimestamp(interval.start_ms),
            interval_end: CqlTimestamp(interval.end_ms),
            state: "",
            run_type: "",
            run_id: "",
            attempt: 0,
            owner: "",
            epoch: 1,
            lease_until: now,
            error: "",
            created_at: now,
            started_at: MaybeUnset::Unset,
            finished_at: MaybeUnset::Unset,
        }
    }
}
