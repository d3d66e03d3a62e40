//! The run ledger in memory, for tests. It has the same compare-and-set semantics and fails on request.

use super::{Attempt, Claim, Counts, Ending, Lease, Ledger, LedgerError, Note, StreamState, claim_values};
use crate::planner::Run;
use async_trait::async_trait;
use common::contracts::run_ledger::{Interval, RunState, RunType};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

/// A ledger that all producers of a test share.
#[derive(Debug, Default)]
pub(crate) struct MemoryLedger {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    state: StreamState,
    runs: BTreeMap<i64, Run>,
    attempts: BTreeMap<(i64, i32), Attempt>,
    /// Number of next calls that fail.
    outage: u32,
    /// Number of calls so far.
    calls: u64,
}

impl MemoryLedger {
    pub(crate) fn fail_next(&self, calls: u32) {
        self.inner.lock().unwrap().outage = calls;
    }

    pub(crate) fn calls(&self) -> u64 {
        self.inner.lock().unwrap().calls
    }

    pub(crate) fn all(&self) -> Vec<Run> {
        self.inner.lock().unwrap().runs.values().cloned().collect()
    }

    fn with<T>(&self, act: impl FnOnce(&mut Inner) -> T) -> Result<T, LedgerError> {
        let mut inner = self.inner.lock().unwrap();
        inner.calls += 1;
        if inner.outage > 0 {
            inner.outage -= 1;
            return Err(LedgerError::Unavailable("outage".to_owned()));
        }
        Ok(act(&mut inner))
    }

    fn fenced(&self, claim: &Claim, act: impl FnOnce(&mut Run)) -> Result<bool, LedgerError> {
        self.with(|i| match i.runs.get_mut(&claim.interval.start_ms).filter(|run| run.epoch == claim.epoch) {
            Some(run) => {
                act(run);
                true
            }
            None => false,
        })
    }
}

/// A run without attempts.
fn empty(interval: Interval) -> Run {
    Run {
        run_type: RunType::Scheduled,
        attempt: 0,
        owner: String::new(),
        interval,
        ..crate::planner::tests::run(0, RunState::Scheduled)
    }
}

#[async_trait]
impl Ledger for MemoryLedger {
    async fn stream_state(&self) -> Result<StreamState, LedgerError> {
        self.with(|i| i.state.clone())
    }

    async fn set_schedules(&self, old: Option<&str>, new: &str, now_ms: i64) -> Result<bool, LedgerError> {
        self.with(|i| {
            let same = i.state.schedules.as_deref() == old;
            if same {
                i.state.schedules = Some(new.to_owned());
                i.state.updated_at_ms = now_ms;
            }
            same
        })
    }

    async fn set_paused(&self, paused: bool) -> Result<bool, LedgerError> {
        self.with(|i| {
            let planned = i.state.schedules.is_some();
            i.state.paused = planned && paused;
            planned
        })
    }

    async fn touch(&self, now_ms: i64) -> Result<(), LedgerError> {
        self.with(|i| i.state.updated_at_ms = now_ms)
    }

    async fn runs(&self, from_ms: i64, to_ms: i64) -> Result<Vec<Run>, LedgerError> {
        self.with(|i| i.runs.range(from_ms..to_ms.max(from_ms)).map(|(_, run)| run.clone()).collect())
    }

    async fn unfinished(&self, from_ms: i64, to_ms: i64) -> Result<Vec<Run>, LedgerError> {
        let mut runs = self.runs(from_ms, to_ms).await?;
        runs.retain(|run| run.state != RunState::Succeeded);
        Ok(runs)
    }

    async fn run(&self, start_ms: i64) -> Result<Option<Run>, LedgerError> {
        self.with(|i| i.runs.get(&start_ms).cloned())
    }

    async fn claim(
        &self,
        interval: Interval,
        run_type: RunType,
        seen: Option<&Run>,
        lease: &Lease,
    ) -> Result<Option<Claim>, LedgerError> {
        self.with(|i| {
            let (attempt, epoch, first_started_ms) = claim_values(seen, run_type, lease.now_ms);
            let stored = i.runs.get(&interval.start_ms);
            let unchanged = stored.map(|run| run.epoch) == seen.map(|run| run.epoch);
            // An earlier call with the same claim may have been applied without a response.
            if !unchanged && stored.is_none_or(|run| run.run_id != lease.run_id) {
                return None;
            }
            let run = Run {
                interval,
                run_type,
                run_id: lease.run_id.clone(),
                attempt,
                owner: lease.owner.clone(),
                epoch,
                lease_until_ms: lease.until_ms,
                started_at_ms: first_started_ms,
                state: RunState::Running,
                ..stored.cloned().unwrap_or_else(|| empty(interval))
            };
            i.runs.insert(interval.start_ms, run);
            Some(Claim {
                interval,
                run_type,
                run_id: lease.run_id.clone(),
                owner: lease.owner.clone(),
                attempt,
                epoch,
                first_started_ms,
                started_ms: lease.now_ms,
            })
        })
    }

    async fn note(&self, note: &Note, now_ms: i64) -> Result<(), LedgerError> {
        self.with(|i| {
            i.runs.entry(note.interval.start_ms).or_insert_with(|| Run {
                interval: note.interval,
                run_type: note.run_type,
                state: note.state,
                lease_until_ms: now_ms,
                finished_at_ms: if note.state == RunState::Failed { now_ms } else { 0 },
                error: note.cause.clone(),
                ..empty(note.interval)
            });
        })
    }

    async fn renew(&self, claim: &Claim, until_ms: i64) -> Result<bool, LedgerError> {
        self.fenced(claim, |run| run.lease_until_ms = until_ms)
    }

    async fn finish(&self, claim: &Claim, ending: &Ending) -> Result<bool, LedgerError> {
        self.fenced(claim, |run| {
            run.state = ending.state;
            run.error.clone_from(&ending.error);
            let Counts { pages, records, acked, bytes } = ending.counts;
            (run.pages, run.records, run.acked, run.bytes) = (pages, records, acked, bytes);
            run.lease_until_ms = ending.now_ms;
            if ending.state != RunState::Succeeded {
                run.retry_at_ms = ending.retry_at_ms;
            }
            if ending.state != RunState::Retrying {
                run.finished_at_ms = ending.now_ms;
            }
        })
    }

    async fn record(&self, attempt: &Attempt) -> Result<(), LedgerError> {
        self.with(|i| {
            i.attempts.entry((attempt.interval.start_ms, attempt.number)).or_insert_with(|| attempt.clone());
        })
    }

    async fn attempts(&self, start_ms: i64) -> Result<Vec<Attempt>, LedgerError> {
        self.with(|i| {
            i.attempts.range((start_ms, 0)..=(start_ms, i32::MAX)).map(|(_, a)| a.clone()).collect()
        })
    }

    async fn overrule(
        &self,
        seen: &Run,
        state: RunState,
        cause: &str,
        now_ms: i64,
    ) -> Result<bool, LedgerError> {
        self.with(|i| match i.runs.get_mut(&seen.interval.start_ms).filter(|run| run.epoch == seen.epoch) {
            Some(run) => {
                run.state = state;
                run.error = cause.to_owned();
                run.epoch += 1;
                run.attempt += 1;
                run.retry_at_ms = now_ms;
                if state == RunState::GivenUp {
                    run.finished_at_ms = now_ms;
                }
                true
            }
            None => false,
        })
    }
}

#[tokio::test]
async fn the_memory_ledger_passes_the_ledger_suite() {
    super::suite::all(async |_| Arc::new(MemoryLedger::default()) as Arc<dyn Ledger>).await;
}
