//! Decides from the state of the ledger what to do now. Pure: the time is an argument. `service.rs` executes the
//! decisions.

use crate::schedule::Timeline;
use common::contracts::run_ledger::{Interval, RunState, RunType};
use common::contracts::stream::{RetryPolicy, StreamSettings};
use serde::Serialize;
use std::collections::BTreeMap;

/// Maximum intervals per planning that are recorded as scheduled or as missed.
pub const MAX_NOTED: usize = 500;
/// The source is considered unavailable if at least this many runs have failed and none has succeeded since. A single
/// run may fail for a reason that does not concern other runs.
const MIN_FAILED: usize = 2;

/// A row of the run ledger.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Run {
    /// The interval that the run fetches.
    pub interval: Interval,
    /// The current state.
    pub state: RunState,
    /// What started the run.
    pub run_type: RunType,
    /// Id of the latest attempt; empty before the first.
    pub run_id: String,
    /// Number of the latest attempt, starting at 1; 0 before the first.
    pub attempt: i32,
    /// The last owner of the lease; empty before the first attempt.
    pub owner: String,
    /// Fencing token. It increases with each change of ownership, and an owner's writes apply only while it is
    /// unchanged.
    pub epoch: i64,
    /// When the lease of a running attempt expires; otherwise when the last attempt ended.
    pub lease_until_ms: i64,
    /// When a retrying or failed run is due again.
    pub retry_at_ms: i64,
    /// Start of the first attempt since it was scheduled or cleared.
    pub started_at_ms: i64,
    /// When the run last succeeded, failed or was given up; 0 if never.
    pub finished_at_ms: i64,
    /// Pages of the latest attempt.
    pub pages: i32,
    /// Records of the latest attempt.
    pub records: i64,
    /// Records of the latest attempt that Kafka acknowledged.
    pub acked: i64,
    /// Bytes of the latest attempt.
    pub bytes: i64,
    /// Cause of the latest failure; empty if there was none.
    pub error: String,
}

impl Run {
    /// Whether the planner's range may move past this run. A failed run counts as over, although it is still retried. An
    /// interval that will be fetched again, because the stream looks back, is not over.
    fn is_over(&self, facts: &Facts<'_>) -> bool {
        let last_refetch = || facts.refetches(self.interval).last();
        match self.state {
            RunState::Succeeded => last_refetch().is_none_or(|at_ms| at_ms <= self.started_at_ms),
            RunState::Failed => last_refetch().is_none_or(|at_ms| at_ms <= facts.now_ms),
            RunState::GivenUp => true,
            RunState::Scheduled | RunState::Running | RunState::Retrying => false,
        }
    }

    /// Whether the first fetch of the interval is over.
    fn is_fetched(&self) -> bool {
        matches!(self.state, RunState::Succeeded | RunState::Failed | RunState::GivenUp)
            || self.run_type == RunType::Lookback
    }

    /// Whether the interval exceeded the catch-up limit before the first attempt.
    pub fn is_missed(&self) -> bool {
        self.state == RunState::Failed && self.attempt == 0
    }

    /// Whether a claim of type `run_type` resets the count of failures. The automatic retry of a failed run does not.
    pub fn starts_over(&self, run_type: RunType) -> bool {
        match self.state {
            RunState::Succeeded | RunState::GivenUp => true,
            RunState::Failed => run_type == RunType::Backfill,
            RunState::Scheduled | RunState::Running | RunState::Retrying => false,
        }
    }

    /// Whether an owner holds an unexpired lease.
    pub fn holds_a_lease(&self, now_ms: i64) -> bool {
        self.state == RunState::Running && self.lease_until_ms > now_ms
    }

    /// When another attempt may start, if the row stays as it is. `None` if no attempt may start.
    fn due_at_ms(&self, facts: &Facts<'_>) -> Option<i64> {
        match self.state {
            RunState::Scheduled => Some(i64::MIN),
            RunState::Retrying => Some(self.retry_at_ms),
            RunState::Running => Some(self.lease_until_ms),
            RunState::Failed => {
                (self.interval.start_ms >= facts.catch_up_from_ms).then_some(self.retry_at_ms)
            }
            RunState::Succeeded => facts.refetches(self.interval).find(|at_ms| *at_ms > self.started_at_ms),
            RunState::GivenUp => None,
        }
    }

    /// Whether another attempt may start now.
    fn is_due(&self, facts: &Facts<'_>) -> bool {
        self.due_at_ms(facts).is_some_and(|at_ms| at_ms <= facts.now_ms)
    }

    /// When the latest attempt ended, if it failed.
    fn failed_at_ms(&self) -> Option<i64> {
        let failed = matches!(self.state, RunState::Retrying | RunState::Failed) && self.attempt > 0;
        failed.then_some(self.lease_until_ms)
    }
}

/// What triggered a planning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trigger {
    /// The producer has started.
    Start,
    /// The alarm rang: an interval has ended.
    Interval,
    /// A run of this producer has ended.
    RunEnded,
    /// A retry is due, a lease has expired, or the previous planning asked for another one.
    Due,
    /// A command was executed, which may have changed the ledger.
    Command,
    /// Kafka is available again, or the ledger may be.
    Recovery,
    /// Nothing else has triggered a planning for a while.
    Poll,
}

impl Trigger {
    /// All triggers.
    pub const ALL: [Trigger; 7] = [
        Trigger::Start,
        Trigger::Interval,
        Trigger::RunEnded,
        Trigger::Due,
        Trigger::Command,
        Trigger::Recovery,
        Trigger::Poll,
    ];

    /// Value of the metric label.
    pub fn name(self) -> &'static str {
        match self {
            Trigger::Start => "start",
            Trigger::Interval => "interval",
            Trigger::RunEnded => "run_ended",
            Trigger::Due => "due",
            Trigger::Command => "command",
            Trigger::Recovery => "recovery",
            Trigger::Poll => "poll",
        }
    }
}

/// The input of a planning.
#[derive(Debug)]
pub struct Facts<'a> {
    /// The current time in Unix milliseconds.
    pub now_ms: i64,
    /// The intervals of the schedule.
    pub timeline: &'a Timeline,
    /// Every interval that started before this time is over.
    pub settled_to_ms: i64,
    /// Start of the catch-up range. Intervals before it that have no row are recorded as missed.
    pub catch_up_from_ms: i64,
    /// All ledger rows from `settled_to_ms` on, by interval start.
    pub runs: &'a BTreeMap<i64, Run>,
    /// Rows before `settled_to_ms` that have not succeeded, at least back to `catch_up_from_ms`.
    pub unfinished: &'a [Run],
    /// End of the latest successful run; 0 if unknown.
    pub last_success_ms: i64,
    /// The retry policy of the stream.
    pub retry: &'a RetryPolicy,
    /// How long after its end an interval is fetched, in milliseconds.
    pub delay_ms: i64,
    /// How many following intervals cause an interval to be fetched again.
    pub lookback: u32,
    /// Maximum concurrent runs.
    pub max_active_runs: u32,
    /// If set, no run is started.
    pub paused: bool,
}

impl Facts<'_> {
    /// An interval is due once it ended at or before this time.
    fn closed_ms(&self) -> i64 {
        self.now_ms.saturating_sub(self.delay_ms)
    }

    /// When an interval in the catch-up range becomes due again because the stream looks back, in ascending order.
    fn refetches(&self, interval: Interval) -> impl Iterator<Item = i64> {
        let mut end_ms = interval.end_ms;
        let count = if interval.start_ms >= self.catch_up_from_ms { self.lookback } else { 0 };
        (0..count).map(move |_| {
            end_ms = self.timeline.containing(end_ms).end_ms;
            end_ms.saturating_add(self.delay_ms)
        })
    }
}

/// What to do about one interval.
#[derive(Debug, Clone, PartialEq)]
pub enum Decision {
    /// Start a run for an interval that has no row in the ledger.
    Start {
        /// The interval to run.
        interval: Interval,
        /// What starts the run.
        run_type: RunType,
    },
    /// Start another attempt of a run that is due or whose lease has expired.
    Resume {
        /// The row as read. Its epoch fences the claim.
        run: Run,
        /// What starts the attempt.
        run_type: RunType,
    },
    /// Record an interval as scheduled, because it might exceed the catch-up limit before a slot is free.
    Schedule {
        /// The interval to run.
        interval: Interval,
        /// What starts the run.
        run_type: RunType,
    },
    /// Record an interval as failed, because it exceeds the catch-up limit.
    Miss {
        /// The interval that is missed.
        interval: Interval,
    },
}

/// The result of a planning.
#[derive(Debug, PartialEq)]
pub struct Plan {
    /// The decisions in order of execution. They start at most as many runs as there are free slots.
    pub decisions: Vec<Decision>,
    /// Every interval that started before this time is over.
    pub settled_to_ms: i64,
    /// Every interval that started before this time was fetched at least once, or has failed.
    pub fetched_to_ms: i64,
    /// When the next interval becomes due.
    pub next_interval_ms: i64,
    /// When the ledger's present rows give a reason to plan again, apart from the next interval. `None` if only a change
    /// of the ledger can. Not later than now if intervals were recorded, because one planning records a limited number.
    pub plan_again_ms: Option<i64>,
}

/// Start of the catch-up range. It covers the catch-up limit, but at least `catch_up` intervals and those that are fetched
/// again.
pub fn catch_up_from(timeline: &Timeline, settings: &StreamSettings, now_ms: i64) -> i64 {
    let by_age = timeline.containing(now_ms.saturating_sub(settings.catch_up_limit_ms)).start_ms;
    let from_ms = by_age.max(timeline.start_ms()).min(timeline.back(now_ms, settings.catch_up));
    from_ms.min(look_back_from(timeline, now_ms - settings.delay_ms, settings.lookback))
}

/// Start of the first interval that may still be fetched again, if intervals are due that ended at or before `closed_ms`.
fn look_back_from(timeline: &Timeline, closed_ms: i64, lookback: u32) -> i64 {
    if lookback == 0 { i64::MAX } else { timeline.back(closed_ms, lookback.saturating_add(1)) }
}

/// Decides what to do now.
pub fn plan(facts: &Facts<'_>) -> Plan {
    let settled_to_ms = end_of_runs(facts, |run| run.is_over(facts));
    let mut plan = Plan {
        decisions: vec![],
        settled_to_ms,
        fetched_to_ms: end_of_runs(facts, Run::is_fetched),
        next_interval_ms: facts.timeline.containing(facts.closed_ms()).end_ms.saturating_add(facts.delay_ms),
        plan_again_ms: None,
    };
    if facts.paused {
        return plan;
    }
    let mut due = due(facts, settled_to_ms);
    let slots = free_slots(facts, &mut due);
    let waiting = due.split_off(slots);
    let decisions = &mut plan.decisions;
    decisions.extend(due.into_iter().map(|due| due.decision));
    // Waiting intervals get a row at half the catch-up limit. Most backlogs are fetched before that and need no rows.
    let note_before_ms = facts.catch_up_from_ms.midpoint(facts.now_ms);
    decisions.extend(waiting.into_iter().filter_map(|due| match due.decision {
        Decision::Start { interval, run_type } if interval.start_ms < note_before_ms => {
            Some(Decision::Schedule { interval, run_type })
        }
        _ => None,
    }));
    let beyond_limit =
        facts.timeline.ended(settled_to_ms, facts.catch_up_from_ms.min(facts.closed_ms()), MAX_NOTED);
    let missed = beyond_limit.into_iter().filter(|i| is_unknown(facts.runs, i));
    decisions.extend(missed.map(|interval| Decision::Miss { interval }));
    let records = |d: &Decision| matches!(d, Decision::Schedule { .. } | Decision::Miss { .. });
    plan.plan_again_ms =
        if decisions.iter().any(records) { Some(facts.now_ms) } else { next_known_change(facts) };
    plan
}

/// The earliest time after now at which a retry is due, a lease expires, or an unavailable source is probed.
fn next_known_change(facts: &Facts<'_>) -> Option<i64> {
    let known = facts.runs.values().chain(facts.unfinished);
    let due = known.filter_map(|run| run.due_at_ms(facts));
    due.chain(probe_at(facts)).filter(|at_ms| *at_ms > facts.now_ms).min()
}

/// An interval that may run now.
struct Due {
    /// Whether the interval has been fetched and the stream looks back. Such intervals wait for all others.
    refetch: bool,
    start_ms: i64,
    /// End of the latest attempt; 0 if there was none.
    tried_ms: i64,
    decision: Decision,
}

/// All intervals that may run now, oldest first, and after them those that are fetched again.
fn due(facts: &Facts<'_>, settled_to_ms: i64) -> Vec<Due> {
    let known = facts.runs.values().chain(facts.unfinished).filter(|run| run.is_due(facts));
    let mut due: Vec<Due> = known
        .map(|run| Due {
            refetch: run.state == RunState::Succeeded,
            start_ms: run.interval.start_ms,
            tried_ms: run.failed_at_ms().unwrap_or(0),
            decision: Decision::Resume { run_type: resumed_type(run), run: run.clone() },
        })
        .collect();
    let from_ms = settled_to_ms.max(facts.catch_up_from_ms);
    // The list also contains intervals with rows. They must not reduce the number of new ones.
    let candidates = facts.timeline.ended(from_ms, facts.closed_ms(), facts.runs.len() + MAX_NOTED);
    due.extend(candidates.into_iter().filter(|i| is_unknown(facts.runs, i)).map(|interval| {
        let run_type = run_type(facts, &interval);
        let decision = Decision::Start { interval, run_type };
        Due { refetch: false, start_ms: interval.start_ms, tried_ms: 0, decision }
    }));
    due.sort_by_key(|due| (due.refetch, due.start_ms));
    due
}

/// Returns how many due runs to start now, and sorts these to the front. While the source is unavailable, only one run
/// at a time probes it. The least recently tried run is chosen, so that runs that always fail do not block the others.
fn free_slots(facts: &Facts<'_>, due: &mut [Due]) -> usize {
    let known = facts.runs.values().chain(facts.unfinished);
    let active = known.filter(|run| run.holds_a_lease(facts.now_ms)).count();
    let most = match probe_at(facts) {
        None => facts.max_active_runs as usize,
        Some(at_ms) if facts.now_ms < at_ms => 0,
        Some(_) => {
            due.sort_by_key(|due| (due.refetch, due.tried_ms, due.start_ms));
            1
        }
    };
    most.saturating_sub(active).min(due.len())
}

/// When to probe the source next, or `None` if it is considered available. It is unavailable if the latest attempts of
/// several runs have failed and none has succeeded since. The pause grows with the outage, up to `max_backoff_ms`.
fn probe_at(facts: &Facts<'_>) -> Option<i64> {
    let runs = facts.runs.values().chain(facts.unfinished);
    let failed: Vec<i64> =
        runs.filter_map(Run::failed_at_ms).filter(|at| *at > facts.last_success_ms).collect();
    let (first_ms, last_ms) = (failed.iter().min()?, failed.iter().max()?);
    if failed.len() < MIN_FAILED {
        return None;
    }
    let RetryPolicy { backoff_ms, max_backoff_ms, .. } = *facts.retry;
    let pause_ms = ((last_ms - first_ms) / 4).clamp(backoff_ms.min(max_backoff_ms), max_backoff_ms);
    Some(last_ms + pause_ms)
}

/// Returns where to start reading the ledger if there is a gap before `from_ms`, and `None` otherwise. `last` is the last
/// row that starts before `from_ms`; there is a gap if it ends earlier than that. Reading then starts `intervals` intervals
/// before its end, or at the start of the timeline if `last` is `None`.
pub fn look_back_before_gap(
    timeline: &Timeline,
    from_ms: i64,
    last: Option<Interval>,
    intervals: u32,
) -> Option<i64> {
    match last {
        _ if from_ms <= timeline.start_ms() => None,
        None => Some(timeline.start_ms()),
        Some(last) if last.end_ms >= from_ms => None,
        Some(last) => Some(timeline.back(last.end_ms, intervals)),
    }
}

/// Whether no row covers any part of the interval.
fn is_unknown(runs: &BTreeMap<i64, Run>, interval: &Interval) -> bool {
    let before_its_end = runs.range(..interval.end_ms).next_back();
    before_its_end.is_none_or(|(_, run)| run.interval.end_ms <= interval.start_ms)
}

/// The type of another attempt. A failed backfill is retried as a catch-up run, so that its earlier failures still count.
fn resumed_type(run: &Run) -> RunType {
    match run.state {
        RunState::Failed => RunType::CatchUp,
        RunState::Succeeded => RunType::Lookback,
        _ => run.run_type,
    }
}

/// An interval that became due less than one interval length ago runs as scheduled, an older one as catch-up.
fn run_type(facts: &Facts<'_>, interval: &Interval) -> RunType {
    let length = interval.end_ms - interval.start_ms;
    if facts.closed_ms() - interval.end_ms < length { RunType::Scheduled } else { RunType::CatchUp }
}

/// Where the first run starts that has no row or does not satisfy `is_done`.
fn end_of_runs(facts: &Facts<'_>, is_done: impl Fn(&Run) -> bool) -> i64 {
    let mut end_ms = facts.settled_to_ms;
    while let Some(run) = facts.runs.get(&end_ms).filter(|run| is_done(run)) {
        end_ms = run.interval.end_ms;
    }
    end_ms
}

/// What to do after a failed attempt.
#[derive(Debug, PartialEq)]
pub enum AfterFailure {
    /// Retry after a pause.
    RetryIn {
        /// The pause in milliseconds.
        pause_ms: i64,
    },
    /// Mark the run as failed. It is still retried after a pause.
    Fail {
        /// Why the run is marked as failed. The ledger shows it after the cause, in parentheses.
        because: String,
        /// The pause in milliseconds.
        pause_ms: i64,
    },
}

/// A failed attempt, for [`after_failure`].
#[derive(Debug)]
pub struct FailedAttempt {
    /// Whether a retry may succeed.
    pub retryable: bool,
    /// Number of failed attempts, including this one.
    pub failures: u32,
    /// Milliseconds since the start of the first attempt.
    pub elapsed_ms: i64,
    /// The pause that the source requested with `Retry-After`.
    pub retry_after_ms: Option<i64>,
    /// A random number in `[0, 1)`, so that many producers do not retry at the same time.
    pub jitter: f64,
}

/// Decides how to continue after a failed attempt. The backoff doubles up to `max_backoff_ms`. For a failed run it is
/// half the time since its first attempt, within limits. Half of each pause is jittered, and no pause is shorter than
/// the source requested.
pub fn after_failure(policy: &RetryPolicy, failed: &FailedAttempt) -> AfterFailure {
    let jittered = |full: i64| {
        let pause_ms = full / 2 + (full as f64 / 2.0 * failed.jitter) as i64;
        pause_ms.max(failed.retry_after_ms.unwrap_or(0))
    };
    let fail = |because: String| {
        let shortest = policy.max_backoff_ms.min(policy.failed_backoff_ms);
        let full = (failed.elapsed_ms / 2).clamp(shortest, policy.failed_backoff_ms);
        AfterFailure::Fail { because, pause_ms: jittered(full) }
    };
    if !failed.retryable {
        return fail("retrying soon does not help".to_owned());
    }
    if let Some(attempts) = policy.attempts.filter(|attempts| failed.failures >= *attempts) {
        let past = if failed.failures > attempts { ", past the limit" } else { "" };
        return fail(format!("attempt {} of {attempts}{past}", failed.failures));
    }
    let doublings = failed.failures.saturating_sub(1).min(30);
    let pause_ms = jittered(policy.backoff_ms.saturating_mul(1 << doublings).min(policy.max_backoff_ms));
    if failed.elapsed_ms.saturating_add(pause_ms) > policy.deadline_ms {
        return fail(format!("deadline of {} s", policy.deadline_ms / 1000));
    }
    AfterFailure::RetryIn { pause_ms }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use chrono_tz::Tz;
    use common::contracts::stream::Schedule;
    use proptest::prelude::*;

    const MINUTE: i64 = 60_000;
    const T0: i64 = 1_700_000_040_000;
    /// How many intervals a restart looks back, and a longer outage in intervals.
    const LOOK_BACK: u32 = 200;
    const OUTAGE: i64 = 300;

    pub(crate) fn run(start_ms: i64, state: RunState) -> Run {
        Run {
            interval: Interval { start_ms, end_ms: start_ms + MINUTE },
            state,
            run_type: RunType::Scheduled,
            run_id: String::new(),
            attempt: 1,
            owner: "a".to_owned(),
            epoch: 1,
            lease_until_ms: 0,
            retry_at_ms: 0,
            started_at_ms: 0,
            finished_at_ms: 0,
            pages: 0,
            records: 0,
            acked: 0,
            bytes: 0,
            error: String::new(),
        }
    }

    const RETRY: RetryPolicy = RetryPolicy {
        attempts: None,
        backoff_ms: 1000,
        max_backoff_ms: 60_000,
        deadline_ms: 3_600_000,
        failed_backoff_ms: 900_000,
        attempt_timeout_ms: 900_000,
    };

    struct World {
        timeline: Timeline,
        runs: BTreeMap<i64, Run>,
        settled_to_ms: i64,
        catch_up: u32,
        delay_ms: i64,
        lookback: u32,
        max_active_runs: u32,
    }

    impl World {
        fn new(catch_up: u32) -> World {
            World::of(&Schedule::Every(MINUTE), catch_up)
        }

        fn of(schedule: &Schedule, catch_up: u32) -> World {
            let timeline = Timeline::first(schedule, None, catch_up, T0).unwrap();
            let settled_to_ms = timeline.start_ms();
            World {
                timeline,
                runs: BTreeMap::new(),
                settled_to_ms,
                catch_up,
                delay_ms: 0,
                lookback: 0,
                max_active_runs: 100,
            }
        }

        fn add(&mut self, run: Run) {
            self.runs.insert(run.interval.start_ms, run);
        }

        /// Forgets everything except the ledger.
        fn restart(&mut self, now_ms: i64) {
            self.timeline = Timeline::from_json(&self.timeline.to_json()).unwrap();
            let last = |from_ms| self.runs.range(..from_ms).next_back().map(|(_, run)| run.interval);
            let mut from_ms = self.timeline.back(now_ms, LOOK_BACK);
            while let Some(further_ms) =
                look_back_before_gap(&self.timeline, from_ms, last(from_ms), LOOK_BACK)
            {
                from_ms = further_ms;
            }
            self.settled_to_ms = from_ms;
        }

        /// Plans and executes until nothing is left to do. Every attempt succeeds.
        fn settle(&mut self, now_ms: i64) -> Result<(), TestCaseError> {
            loop {
                let found = self.plan(now_ms);
                self.settled_to_ms = found.settled_to_ms;
                if found.decisions.is_empty() {
                    return Ok(());
                }
                for decision in &found.decisions {
                    carry_out(self, decision, 0, now_ms)?;
                }
            }
        }

        fn plan(&self, now_ms: i64) -> Plan {
            self.plan_with(now_ms, false)
        }

        fn plan_with(&self, now_ms: i64, paused: bool) -> Plan {
            self.with_facts(now_ms, |facts| plan(&Facts { paused, ..facts }))
        }

        fn with_facts<T>(&self, now_ms: i64, f: impl FnOnce(Facts<'_>) -> T) -> T {
            let succeeded = self.runs.values().filter(|run| run.state == RunState::Succeeded);
            let unfinished: Vec<Run> = self
                .runs
                .range(..self.settled_to_ms)
                .map(|(_, run)| run.clone())
                .filter(|run| run.state != RunState::Succeeded)
                .collect();
            f(Facts {
                now_ms,
                timeline: &self.timeline,
                settled_to_ms: self.settled_to_ms,
                catch_up_from_ms: self.timeline.back(now_ms, self.catch_up).min(look_back_from(
                    &self.timeline,
                    now_ms - self.delay_ms,
                    self.lookback,
                )),
                runs: &self.runs.range(self.settled_to_ms..).map(|(at, run)| (*at, run.clone())).collect(),
                unfinished: &unfinished,
                last_success_ms: succeeded.map(|run| run.finished_at_ms).max().unwrap_or(0),
                retry: &RETRY,
                delay_ms: self.delay_ms,
                lookback: self.lookback,
                max_active_runs: self.max_active_runs,
                paused: false,
            })
        }
    }

    fn starts(plan: &Plan) -> Vec<i64> {
        let minute = |at: i64| (at - T0) / MINUTE;
        plan.decisions
            .iter()
            .map(|d| match d {
                Decision::Start { interval, .. } | Decision::Miss { interval } => minute(interval.start_ms),
                Decision::Resume { run, .. } => minute(run.interval.start_ms),
                Decision::Schedule { .. } => panic!("{d:?}"),
            })
            .collect()
    }

    /// The intervals that start, and the number of those that are only recorded as scheduled.
    fn started_and_waiting(mut plan: Plan) -> (Vec<i64>, usize) {
        let all = plan.decisions.len();
        plan.decisions.retain(|d| !matches!(d, Decision::Schedule { .. }));
        (starts(&plan), all - plan.decisions.len())
    }

    #[test]
    fn a_first_start_runs_the_last_intervals_at_once() {
        let world = World::new(3);
        let found = world.plan(T0 + 10);
        assert_eq!(starts(&found), [-3, -2, -1]);
        let types: Vec<_> = found
            .decisions
            .iter()
            .map(|d| if let Decision::Start { run_type, .. } = d { *run_type } else { panic!("{d:?}") })
            .collect();
        assert_eq!(types, [RunType::CatchUp, RunType::CatchUp, RunType::Scheduled]);
    }

    #[test]
    fn an_interval_is_due_when_the_delay_after_its_end_is_over() {
        let world = World { delay_ms: 5000, ..World::new(2) };
        assert_eq!(starts(&world.plan(T0 + 4999)), [-2]);
        assert_eq!(world.plan(T0 + 4999).next_interval_ms, T0 + 5000);
        assert_eq!(starts(&world.plan(T0 + 5000)), [-2, -1]);
        assert_eq!(world.plan(T0 + 5000).next_interval_ms, T0 + MINUTE + 5000);
    }

    #[test]
    fn an_interval_is_fetched_again_when_each_of_the_following_intervals_is_due() {
        let mut world = World { delay_ms: 5000, lookback: 2, ..World::new(0) };
        let mut fetches = BTreeMap::new();
        for second in 0..600 {
            let now_ms = T0 + second * 1000;
            let found = world.plan(now_ms);
            world.settled_to_ms = found.settled_to_ms;
            for decision in &found.decisions {
                carry_out(&mut world, decision, 0, now_ms).unwrap();
            }
            starts(&found)
                .into_iter()
                .for_each(|minute| fetches.entry(minute).or_insert(vec![]).push(second - 5));
        }
        assert_eq!(fetches[&0], [60, 120, 180]);
        assert_eq!(fetches[&4], [300, 360, 420]);
        assert_eq!(fetches[&8], [540], "the last interval, whose successors have not ended");
        assert_eq!(world.settled_to_ms, T0 + 7 * MINUTE);
    }

    #[test]
    fn intervals_are_fetched_again_after_all_others_and_once_after_an_outage() {
        let mut world = World { lookback: 2, max_active_runs: 2, ..World::new(5) };
        world.add(Run { started_at_ms: T0 - 2 * MINUTE, ..run(T0 - 3 * MINUTE, RunState::Succeeded) });
        world.settled_to_ms = T0 - 3 * MINUTE;
        assert_eq!(starts(&world.plan(T0)), [-2, -1]);
        for minute in [-2, -1] {
            world.add(Run { started_at_ms: T0, ..run(T0 + minute * MINUTE, RunState::Succeeded) });
        }
        assert_eq!(starts(&world.plan(T0)), [-3]);
        world.add(Run { started_at_ms: T0, ..run(T0 - 3 * MINUTE, RunState::Succeeded) });
        let found = world.plan(T0);
        assert_eq!((starts(&found), found.settled_to_ms), (vec![], T0 - 2 * MINUTE));
    }

    #[test]
    fn no_more_runs_start_than_there_are_free_slots() {
        let mut world = World::new(5);
        world.max_active_runs = 2;
        // The older half of the waiting intervals gets rows.
        assert_eq!(started_and_waiting(world.plan(T0)), (vec![-5, -4], 1));
        world.add(Run { lease_until_ms: T0 + 1, ..run(T0 - 5 * MINUTE, RunState::Running) });
        assert_eq!(started_and_waiting(world.plan(T0)), (vec![-4], 1));
        world.add(Run { lease_until_ms: T0 + 1, ..run(T0 - 4 * MINUTE, RunState::Running) });
        assert_eq!(started_and_waiting(world.plan(T0)), (vec![], 1));
        assert_eq!(
            started_and_waiting(world.plan(T0 + 1)),
            (vec![-5, -4], 1),
            "an expired lease is taken over"
        );
    }

    #[test]
    fn an_interval_that_waited_for_a_free_slot_is_not_missed() {
        let mut world = World::new(2);
        world.max_active_runs = 0;
        assert_eq!(started_and_waiting(world.plan(T0)), (vec![], 1));
        world.add(run(T0 - 2 * MINUTE, RunState::Scheduled));
        world.max_active_runs = 1;
        let found = world.plan(T0 + 9 * MINUTE);
        assert!(
            matches!(&found.decisions[0], Decision::Resume { run, .. } if run.interval.start_ms == T0 - 2 * MINUTE)
        );
    }

    #[test]
    fn a_retry_waits_until_it_is_due_and_does_not_delay_other_runs() {
        let mut world = World::new(2);
        world.add(Run { retry_at_ms: T0 + 5, ..run(T0 - 2 * MINUTE, RunState::Retrying) });
        assert_eq!(starts(&world.plan(T0)), [-1]);
        assert_eq!(starts(&world.plan(T0 + 5)), [-2, -1]);
    }

    #[test]
    fn intervals_beyond_the_catch_up_limit_are_recorded_as_missed() {
        let mut world = World::new(2);
        for minute in [-2, -1] {
            world.add(run(T0 + minute * MINUTE, RunState::Succeeded));
        }
        world.add(run(T0 + MINUTE, RunState::Retrying));
        let found = world.plan(T0 + 6 * MINUTE);
        assert_eq!(
            starts(&found),
            [1, 4, 5, 0, 2, 3],
            "the existing run and the last two intervals start, the rest is missed"
        );
        assert_eq!(found.decisions.iter().filter(|d| matches!(d, Decision::Miss { .. })).count(), 3);
        assert_eq!(found.settled_to_ms, T0);
    }

    #[test]
    fn a_paused_stream_starts_no_run() {
        assert_eq!(World::new(3).plan_with(T0, true).decisions, []);
    }

    #[test]
    fn a_failed_run_is_retried_when_due_until_it_exceeds_the_limit_or_is_given_up() {
        let mut world = World::new(3);
        for minute in [-3, -2, -1] {
            world.add(run(T0 + minute * MINUTE, RunState::Succeeded));
        }
        world.add(Run { retry_at_ms: T0 + 5, ..run(T0 - 2 * MINUTE, RunState::Failed) });
        world.settled_to_ms = world.plan(T0).settled_to_ms;
        assert_eq!(world.settled_to_ms, T0, "a failed run does not hold back the range");
        assert_eq!(starts(&world.plan(T0)), [] as [i64; 0]);
        assert_eq!(starts(&world.plan(T0 + 5)), [-2]);
        world.add(Run { lease_until_ms: T0 + 30_000, ..run(T0 - 2 * MINUTE, RunState::Running) });
        assert_eq!(starts(&world.plan(T0 + 5)), [] as [i64; 0]);
        assert_eq!(starts(&world.plan(T0 + 30_000)), [-2], "its lease has expired");
        world.add(run(T0 - 2 * MINUTE, RunState::GivenUp));
        assert_eq!(starts(&world.plan(T0 + 30_000)), [] as [i64; 0]);
        world.add(run(T0 - 2 * MINUTE, RunState::Failed));
        assert_eq!(starts(&world.plan(T0 + MINUTE)), [-2, 0]);
        assert_eq!(starts(&world.plan(T0 + 2 * MINUTE)), [0, 1], "beyond the limit");
    }

    #[test]
    fn while_the_source_is_unavailable_one_run_at_a_time_probes_it() {
        let mut world = World::new(100);
        let failed = |minute: i64, at_ms: i64| Run {
            lease_until_ms: at_ms,
            retry_at_ms: at_ms,
            ..run(T0 + minute * MINUTE, RunState::Retrying)
        };
        world.settled_to_ms = T0 - 3 * MINUTE;
        world.add(failed(-3, T0));
        assert_eq!(starts(&world.plan(T0)), [-3, -2, -1], "a single failure does not delay the others");
        world.add(failed(-2, T0 + 1));
        assert_eq!(started_and_waiting(world.plan(T0 + 1)), (vec![], 0), "a pause");
        assert_eq!(started_and_waiting(world.plan(T0 + 1001)), (vec![-1], 0), "the run that was never tried");
        world.add(failed(-1, T0 + 1001));
        assert_eq!(starts(&world.plan(T0 + 2001)), [-3], "the least recently tried run");
        world.add(Run { lease_until_ms: T0 + 9000, ..run(T0 - 3 * MINUTE, RunState::Running) });
        assert_eq!(starts(&world.plan(T0 + 4000)), [] as [i64; 0], "one at a time");
        world.add(Run { finished_at_ms: T0 + 5000, ..run(T0 - 3 * MINUTE, RunState::Succeeded) });
        assert_eq!(starts(&world.plan(T0 + 5000)), [-2, -1], "the source is available again");
    }

    #[test]
    fn a_plan_tells_when_to_plan_again() {
        let mut world = World::new(2);
        let again = |world: &World, now_ms: i64| {
            let found = world.plan(now_ms);
            assert_eq!(found.next_interval_ms, now_ms - now_ms.rem_euclid(MINUTE) + MINUTE);
            found.plan_again_ms.map(|at_ms| at_ms - T0)
        };
        let (first, second) = (T0 - 2 * MINUTE, T0 - MINUTE);
        assert_eq!(
            again(&world, T0),
            None,
            "both intervals start, and the end of their runs triggers a planning"
        );
        world.add(Run { retry_at_ms: T0 + 9, ..run(first, RunState::Retrying) });
        world.add(Run { lease_until_ms: T0 + 7, ..run(second, RunState::Running) });
        assert_eq!(again(&world, T0), Some(7), "a lease expires");
        assert_eq!(again(&world, T0 + 7), Some(9), "a retry is due");
        assert_eq!(again(&world, T0 + 9), None);
        assert_eq!(world.plan_with(T0, true).plan_again_ms, None, "a paused stream waits for a command");
        world.add(Run { lease_until_ms: T0 - 1, retry_at_ms: T0 + 9, ..run(first, RunState::Retrying) });
        world.add(Run { lease_until_ms: T0, retry_at_ms: T0 + 9, ..run(second, RunState::Failed) });
        assert_eq!(again(&world, T0 + 10), Some(1000), "an unavailable source is probed");
        world.max_active_runs = 0;
        world.runs.clear();
        assert_eq!(again(&world, T0), Some(0), "a waiting interval was recorded, and there may be more");
    }

    #[test]
    fn the_pause_between_probes_grows_with_the_outage_up_to_the_maximum() {
        let pause_after = |outage_ms: i64| {
            let mut world = World::new(1000);
            world.settled_to_ms = T0 - 2 * MINUTE;
            for (minute, at_ms) in [(-2, T0), (-1, T0 + outage_ms)] {
                let run = run(T0 + minute * MINUTE, RunState::Retrying);
                world.add(Run { lease_until_ms: at_ms, retry_at_ms: at_ms, ..run });
            }
            let starts_a_run =
                |pause: &i64| !started_and_waiting(world.plan(T0 + outage_ms + pause)).0.is_empty();
            (0..100_000).step_by(500).find(starts_a_run)
        };
        assert_eq!([0, 4000, 40_000, 10_000_000].map(pause_after), [1000, 1000, 10_000, 60_000].map(Some));
    }

    #[test]
    fn catch_up_covers_an_age_but_at_least_a_number_of_intervals() {
        let text = include_str!("../../../streams/user_created.toml");
        let mut settings = common::contracts::stream::Definition::parse("users", text).unwrap().stream;
        (settings.catch_up, settings.catch_up_limit_ms) = (3, 10 * MINUTE);
        let back = |schedule: &Schedule, start_ms: i64, settings: &StreamSettings| {
            let timeline = Timeline::first(schedule, Some(start_ms), 100_000, T0).unwrap();
            T0 - catch_up_from(&timeline, settings, T0)
        };
        assert_eq!(back(&Schedule::Every(MINUTE), 0, &settings), 10 * MINUTE);
        assert_eq!(back(&Schedule::Every(6 * MINUTE), 0, &settings) / MINUTE, 2 + 3 * 6);
        assert_eq!(
            back(&Schedule::Every(MINUTE), T0 - 2 * MINUTE, &settings),
            2 * MINUTE,
            "not before the start"
        );
    }

    #[test]
    fn pauses_double_up_to_the_maximum_until_the_run_fails() {
        let policy = RetryPolicy { max_backoff_ms: 3000, ..RETRY };
        let few = RetryPolicy { attempts: Some(5), ..policy.clone() };
        let check = |policy: &RetryPolicy, failures, retry_after_ms, elapsed_ms, expected| {
            let failed = FailedAttempt { retryable: true, failures, elapsed_ms, retry_after_ms, jitter: 0.5 };
            assert_eq!(after_failure(policy, &failed), expected, "failure {failures}");
        };
        let retry = |pause_ms| AfterFailure::RetryIn { pause_ms };
        let fail = |because: &str, pause_ms| AfterFailure::Fail { because: because.to_owned(), pause_ms };
        check(&policy, 1, None, 0, retry(750));
        check(&policy, 2, None, 0, retry(1500));
        check(&policy, 4, None, 0, retry(2250));
        check(&policy, 4, Some(9000), 0, retry(9000));
        check(&policy, 1000, None, 0, retry(2250));
        check(&few, 5, None, 0, fail("attempt 5 of 5", 2250));
        check(&policy, 1, None, 3_599_500, fail("deadline of 3600 s", 675_000));
        check(&policy, 1, None, 60_000_000, fail("deadline of 3600 s", 675_000));
        check(&policy, 1, Some(1_000_000), 60_000_000, fail("deadline of 3600 s", 1_000_000));
        check(&few, 9, None, 40_000, fail("attempt 9 of 5, past the limit", 15_000));
        let fatal =
            FailedAttempt { retryable: false, failures: 1, elapsed_ms: 0, retry_after_ms: None, jitter: 0.0 };
        assert_eq!(after_failure(&policy, &fatal), fail("retrying soon does not help", 1500));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn nothing_becomes_due_before_the_time_to_plan_again_unless_the_ledger_changes(
            states in prop::collection::vec((0usize..6, -MINUTE..MINUTE, -MINUTE..MINUTE), 0..8),
            room in 0u32..4,
            (delay_ms, lookback) in (0..MINUTE, 0u32..3),
            now in T0..T0 + MINUTE,
            later in 0.0f64..1.0,
        ) {
            let mut world = World { max_active_runs: room, delay_ms, lookback, ..World::new(6) };
            for (minute, (state, lease, retry)) in (-6..).zip(states) {
                let state = RunState::ALL[state];
                let (lease_until_ms, retry_at_ms) = (T0 + lease, T0 + retry);
                let finished_at_ms = if state == RunState::Succeeded { lease_until_ms } else { 0 };
                let run = run(T0 + minute * MINUTE, state);
                let started_at_ms = lease_until_ms;
                world.add(Run { lease_until_ms, retry_at_ms, started_at_ms, finished_at_ms, ..run });
            }
            let started = |plan: &Plan| {
                let starts = |d: &&Decision| matches!(d, Decision::Start { .. } | Decision::Resume { .. });
                plan.decisions.iter().filter(starts).count()
            };
            let found = world.plan(now);
            let again = found.plan_again_ms.unwrap_or(i64::MAX).min(found.next_interval_ms);
            prop_assert!(again >= now);
            if started(&found) == 0 && again > now {
                let before = now + ((again - 1 - now) as f64 * later) as i64;
                prop_assert_eq!(started(&world.plan(before)), 0, "at {} of {}", before, again);
            }
        }

        /// Plans and executes at random times, with attempts that succeed, fail or never end, clocks that step back,
        /// restarts that know only the ledger, and an outage longer than the look back.
        #[test]
        fn every_interval_is_in_the_ledger_exactly_once_despite_failures(
            schedule in schedules(),
            steps in prop::collection::vec(
                (-2000i64..7000, any::<bool>(), prop::collection::vec(0u8..5, 8)), 1..40),
            catch_up in 0u32..6,
            room in 1u32..4,
            (delay, lookback) in (0i64..2000, 0u32..4),
            outage_at in 0usize..80,
        ) {
            let mut world = World { max_active_runs: room, lookback, ..World::of(&schedule, catch_up) };
            let length = { let i = world.timeline.containing(T0); i.end_ms - i.start_ms };
            world.delay_ms = delay * length / 1000;
            let (mut now, mut latest) = (T0, T0);
            for (step, (thousandths, restart, fates)) in steps.into_iter().enumerate() {
                now += thousandths * length / 1000;
                latest = latest.max(now);
                if step == outage_at {
                    now = latest + OUTAGE * length;
                    latest = now;
                    world.restart(now);
                    world.settle(now)?;
                }
                if restart {
                    world.restart(now);
                }
                for _ in 0..3 {
                    let found = world.plan(now);
                    world.settled_to_ms = found.settled_to_ms;
                    let starts = |d: &&Decision| matches!(d, Decision::Start { .. } | Decision::Resume { .. });
                    let started = found.decisions.iter().filter(starts).count();
                    prop_assert!(started <= room as usize);
                    for (decision, fate) in found.decisions.iter().zip(fates.iter().cycle()) {
                        carry_out(&mut world, decision, *fate, now)?;
                    }
                }
            }
            // Finally, every attempt succeeds. A restart finds intervals that were fetched again too early because the clock
            // had stepped back.
            now = latest + 60 * length + 2 * RETRY.max_backoff_ms;
            world.restart(now);
            world.settle(now)?;
            let mut at = world.timeline.start_ms();
            for run in world.runs.values() {
                prop_assert_eq!(run.interval.start_ms, at, "the ledger has neither gaps nor overlaps");
                prop_assert!(run.is_fetched());
                let refetches = world.with_facts(now, |facts| facts.refetches(run.interval).collect::<Vec<_>>());
                let is_complete = refetches.iter().all(|at_ms| *at_ms > now || *at_ms <= run.started_at_ms);
                prop_assert!(run.state != RunState::Succeeded || is_complete, "{run:?} {refetches:?}");
                at = run.interval.end_ms;
            }
            prop_assert_eq!(at, world.timeline.containing(now - world.delay_ms).start_ms);
        }
    }

    /// Fixed lengths, and cron schedules around month ends, leap days and weeks.
    fn schedules() -> impl Strategy<Value = Schedule> {
        let crons = ["*/7 * * * *", "30 2 * * *", "0 0 1 * *", "0 0 31 * *", "0 12 28-31 * *", "0 0 * * MON"];
        prop_oneof![
            Just(Schedule::Every(MINUTE)),
            (1000i64..100_000_000).prop_map(Schedule::Every),
            prop::sample::select(crons.to_vec())
                .prop_map(|cron| Schedule::Cron { expression: cron.to_owned(), zone: Tz::Europe__Berlin }),
        ]
    }

    fn carry_out(world: &mut World, decision: &Decision, fate: u8, now: i64) -> Result<(), TestCaseError> {
        let (interval, state) = match decision {
            Decision::Miss { interval } => (*interval, RunState::Failed),
            Decision::Schedule { interval, .. } => (*interval, RunState::Scheduled),
            Decision::Start { interval, .. } => {
                prop_assert!(is_unknown(&world.runs, interval));
                prop_assert!(
                    interval.end_ms + world.delay_ms <= now,
                    "an interval must not run before its delay is over"
                );
                (*interval, fate_of(fate))
            }
            Decision::Resume { run, .. } => {
                prop_assert!(world.runs.contains_key(&run.interval.start_ms));
                (run.interval, fate_of(fate))
            }
        };
        let finished_at_ms = if state == RunState::Succeeded { now } else { 0 };
        let continued = world.runs.get(&interval.start_ms).filter(|run| run.state == RunState::Retrying);
        let started_at_ms = continued.map_or(now, |run| run.started_at_ms);
        let attempted = matches!(decision, Decision::Start { .. } | Decision::Resume { .. });
        world.add(Run {
            interval,
            attempt: i32::from(attempted),
            lease_until_ms: now + 500,
            retry_at_ms: now + 100,
            started_at_ms,
            finished_at_ms,
            ..run(0, state)
        });
        Ok(())
    }

    fn fate_of(fate: u8) -> RunState {
        match fate {
            0 | 1 => RunState::Succeeded,
            2 => RunState::Retrying,
            3 => RunState::Running,
            _ => RunState::Failed,
        }
    }
}
