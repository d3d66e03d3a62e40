//! Facts of the ledger → what to do now. Pure: the clock is an argument, doing it is `run.rs`.

use crate::schedule::Timeline;
use common::run_ledger::{Interval, RunState, RunType};
use common::stream::RetryPolicy;
use serde::Serialize;
use std::collections::BTreeMap;

/// Most intervals that are noted in one planning, as scheduled or as missed.
pub const MAX_NOTED: usize = 500;

/// A row of the ledger, as far as decisions and people need it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Run {
    /// Its interval.
    pub interval: Interval,
    /// Where it stands.
    pub state: RunState,
    /// Why it is run.
    pub run_type: RunType,
    /// Id of the latest attempt.
    pub run_id: String,
    /// Number of the latest attempt, from 1; 0 before the first.
    pub attempt: i32,
    /// Who held the lease last.
    pub owner: String,
    /// Rises with every change of ownership; every write of an owner is fenced by it.
    pub epoch: i64,
    /// Until when a running attempt is its owner's alone.
    pub lease_until_ms: i64,
    /// When a retrying run is due.
    pub retry_at_ms: i64,
    /// Start of the first attempt since it was scheduled or cleared.
    pub started_at_ms: i64,
    /// End of the last attempt of a run that is over.
    pub finished_at_ms: i64,
    /// Pages of the latest attempt.
    pub pages: i32,
    /// Records of the latest attempt.
    pub records: i64,
    /// Records of the latest attempt that Kafka acknowledged.
    pub acked: i64,
    /// Bytes of the latest attempt.
    pub bytes: i64,
    /// Cause of the latest failure; empty: none.
    pub error: String,
}

impl Run {
    /// Nothing more happens to it by itself.
    pub fn is_over(&self) -> bool {
        matches!(self.state, RunState::Succeeded | RunState::Failed)
    }

    /// Whether somebody is at it.
    pub fn holds_a_lease(&self, now_ms: i64) -> bool {
        self.state == RunState::Running && self.lease_until_ms > now_ms
    }

    /// Whether another attempt may begin now.
    fn is_due(&self, now_ms: i64) -> bool {
        match self.state {
            RunState::Scheduled => true,
            RunState::Retrying => self.retry_at_ms <= now_ms,
            RunState::Running => self.lease_until_ms <= now_ms,
            RunState::Succeeded | RunState::Failed => false,
        }
    }
}

/// What a planning needs to know.
#[derive(Debug)]
pub struct Facts<'a> {
    /// Now, in Unix milliseconds.
    pub now_ms: i64,
    /// The intervals there are.
    pub timeline: &'a Timeline,
    /// Everything that began before this is over.
    pub settled_to_ms: i64,
    /// Where catching up begins: what is missing before it is only noted.
    pub catch_up_from_ms: i64,
    /// Ledger rows by interval start, complete from `settled_to_ms` on.
    pub runs: &'a BTreeMap<i64, Run>,
    /// Most runs at once.
    pub max_active_runs: u32,
    /// Nothing new may begin.
    pub paused: bool,
}

/// What to do about one interval.
#[derive(Debug, Clone, PartialEq)]
pub enum Decision {
    /// Run an interval that the ledger does not know.
    Begin {
        /// Which.
        interval: Interval,
        /// Why.
        run_type: RunType,
    },
    /// Run an interval again whose turn has come or whose owner is gone.
    Resume {
        /// Its row as read; the claim is fenced by its epoch.
        run: Run,
    },
    /// Note an interval as scheduled: there is no room for it now, and it must not be missed for that.
    Schedule {
        /// Which.
        interval: Interval,
        /// Why.
        run_type: RunType,
    },
    /// Note an interval as failed, because it lies behind the catch-up limit.
    Miss {
        /// Which.
        interval: Interval,
    },
}

/// The outcome of a planning.
#[derive(Debug, PartialEq)]
pub struct Plan {
    /// In the order in which to carry them out; no more runs than there is room for.
    pub decisions: Vec<Decision>,
    /// Everything that began before this is over.
    pub settled_to_ms: i64,
}

/// Decides what to do now.
pub fn plan(facts: &Facts<'_>) -> Plan {
    let settled_to_ms = settled_to(facts);
    if facts.paused {
        return Plan { decisions: vec![], settled_to_ms };
    }
    let active = facts.runs.values().filter(|run| run.holds_a_lease(facts.now_ms)).count();
    let room = (facts.max_active_runs as usize).saturating_sub(active);
    let mut due: Vec<(i64, Decision)> = facts
        .runs
        .values()
        .filter(|run| run.is_due(facts.now_ms))
        .map(|run| (run.interval.start_ms, Decision::Resume { run: run.clone() }))
        .collect();
    let from_ms = settled_to_ms.max(facts.catch_up_from_ms);
    // Rows that are there take places in the list, but are none of those to note.
    let candidates = facts.timeline.ended(from_ms, facts.now_ms, facts.runs.len() + MAX_NOTED);
    due.extend(candidates.into_iter().filter(|i| is_unknown(facts.runs, i)).map(|interval| {
        let run_type = run_type(facts, &interval);
        (interval.start_ms, Decision::Begin { interval, run_type })
    }));
    due.sort_by_key(|(start_ms, _)| *start_ms);
    let waiting = due.split_off(room.min(due.len()));
    let mut decisions: Vec<Decision> = due.into_iter().map(|(_, decision)| decision).collect();
    decisions.extend(waiting.into_iter().filter_map(|(_, decision)| match decision {
        Decision::Begin { interval, run_type } => Some(Decision::Schedule { interval, run_type }),
        // It has a row.
        _ => None,
    }));
    let behind = facts.timeline.ended(settled_to_ms, facts.catch_up_from_ms.min(facts.now_ms), MAX_NOTED);
    let missed = behind.into_iter().filter(|i| is_unknown(facts.runs, i));
    decisions.extend(missed.map(|interval| Decision::Miss { interval }));
    Plan { decisions, settled_to_ms }
}

/// Where to look back to instead of `from_ms`, if the ledger has a gap there: as many intervals back from its far end, the
/// end of the `last` row that begins before `from_ms`; the timeline's start where there is none. `None`: there is no gap.
pub fn behind_gap(timeline: &Timeline, from_ms: i64, last: Option<Interval>, intervals: u32) -> Option<i64> {
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

/// An interval that ended less than its own length ago was not missed.
fn run_type(facts: &Facts<'_>, interval: &Interval) -> RunType {
    let length = interval.end_ms - interval.start_ms;
    if facts.now_ms - interval.end_ms < length { RunType::Scheduled } else { RunType::CatchUp }
}

fn settled_to(facts: &Facts<'_>) -> i64 {
    let mut settled_to_ms = facts.settled_to_ms;
    while let Some(run) = facts.runs.get(&settled_to_ms).filter(|run| run.is_over()) {
        settled_to_ms = run.interval.end_ms;
    }
    settled_to_ms
}

/// What follows a failed attempt.
#[derive(Debug, PartialEq)]
pub enum AfterFailure {
    /// Another attempt after this pause.
    RetryIn {
        /// Milliseconds.
        pause_ms: i64,
    },
    /// None; the words say why.
    GiveUp {
        /// For the ledger, in brackets behind the cause.
        because: String,
    },
}

/// A failed attempt, for [`after_failure`].
#[derive(Debug)]
pub struct FailedAttempt {
    /// Whether another attempt can help.
    pub retryable: bool,
    /// Failed attempts so far, this one included.
    pub failures: u32,
    /// Milliseconds since the first attempt began.
    pub elapsed_ms: i64,
    /// What the server asked for.
    pub retry_after_ms: Option<i64>,
    /// A random number in `[0, 1)`: many producers must not come back at once.
    pub jitter: f64,
}

/// Decides about another attempt: exponential pause with half of it jittered, never shorter than the server asked for.
pub fn after_failure(policy: &RetryPolicy, failed: &FailedAttempt) -> AfterFailure {
    let give_up = |because: String| AfterFailure::GiveUp { because };
    if !failed.retryable {
        return give_up("final".to_owned());
    }
    if failed.failures >= policy.attempts {
        return give_up(format!("attempt {} of {}", failed.failures, policy.attempts));
    }
    let doublings = failed.failures.saturating_sub(1).min(30);
    let full = policy.backoff_ms.saturating_mul(1 << doublings).min(policy.max_backoff_ms);
    let jittered = full / 2 + (full as f64 / 2.0 * failed.jitter) as i64;
    let pause_ms = jittered.max(failed.retry_after_ms.unwrap_or(0));
    if failed.elapsed_ms.saturating_add(pause_ms) > policy.deadline_ms {
        return give_up(format!("deadline of {} s", policy.deadline_ms / 1000));
    }
    AfterFailure::RetryIn { pause_ms }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use common::stream::Schedule;
    use proptest::prelude::*;

    const MINUTE: i64 = 60_000;
    const T0: i64 = 1_700_000_040_000;
    /// Intervals that a restart looks back, and those of an outage that is longer.
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

    struct World {
        timeline: Timeline,
        runs: BTreeMap<i64, Run>,
        settled_to_ms: i64,
        catch_up: u32,
        max_active_runs: u32,
    }

    impl World {
        fn new(catch_up: u32) -> World {
            World::of(&Schedule::Every(MINUTE), catch_up)
        }

        fn of(schedule: &Schedule, catch_up: u32) -> World {
            let timeline = Timeline::first(schedule, None, catch_up, T0).unwrap();
            let settled_to_ms = timeline.start_ms();
            World { timeline, runs: BTreeMap::new(), settled_to_ms, catch_up, max_active_runs: 100 }
        }

        fn add(&mut self, run: Run) {
            self.runs.insert(run.interval.start_ms, run);
        }

        /// All that a restart knows comes from the ledger.
        fn restart(&mut self, now_ms: i64) {
            self.timeline = Timeline::from_json(&self.timeline.to_json()).unwrap();
            let last = |from_ms| self.runs.range(..from_ms).next_back().map(|(_, run)| run.interval);
            let mut from_ms = self.timeline.back(now_ms, LOOK_BACK);
            while let Some(further_ms) = behind_gap(&self.timeline, from_ms, last(from_ms), LOOK_BACK) {
                from_ms = further_ms;
            }
            self.settled_to_ms = from_ms;
        }

        /// Until there is nothing left to do, and nothing goes wrong.
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
            plan(&Facts {
                now_ms,
                timeline: &self.timeline,
                settled_to_ms: self.settled_to_ms,
                catch_up_from_ms: self.timeline.back(now_ms, self.catch_up),
                runs: &self.runs,
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
                Decision::Begin { interval, .. } | Decision::Miss { interval } => minute(interval.start_ms),
                Decision::Resume { run } => minute(run.interval.start_ms),
                Decision::Schedule { .. } => panic!("{d:?}"),
            })
            .collect()
    }

    /// The intervals that run, and those that are only noted to wait.
    fn begun_and_waiting(mut plan: Plan) -> (Vec<i64>, usize) {
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
            .map(|d| if let Decision::Begin { run_type, .. } = d { *run_type } else { panic!("{d:?}") })
            .collect();
        assert_eq!(types, [RunType::CatchUp, RunType::CatchUp, RunType::Scheduled]);
    }

    #[test]
    fn no_more_runs_begin_than_there_is_room_for() {
        let mut world = World::new(5);
        world.max_active_runs = 2;
        assert_eq!(begun_and_waiting(world.plan(T0)), (vec![-5, -4], 3));
        world.add(Run { lease_until_ms: T0 + 1, ..run(T0 - 5 * MINUTE, RunState::Running) });
        assert_eq!(begun_and_waiting(world.plan(T0)), (vec![-4], 3));
        world.add(Run { lease_until_ms: T0 + 1, ..run(T0 - 4 * MINUTE, RunState::Running) });
        assert_eq!(begun_and_waiting(world.plan(T0)), (vec![], 3));
        assert_eq!(begun_and_waiting(world.plan(T0 + 1)), (vec![-5, -4], 3), "expired leases are taken over");
    }

    #[test]
    fn an_interval_that_waited_for_room_is_not_missed() {
        let mut world = World::new(2);
        world.max_active_runs = 0;
        assert_eq!(begun_and_waiting(world.plan(T0)), (vec![], 2));
        world.add(run(T0 - 2 * MINUTE, RunState::Scheduled));
        world.max_active_runs = 1;
        let found = world.plan(T0 + 9 * MINUTE);
        assert!(
            matches!(&found.decisions[0], Decision::Resume { run } if run.interval.start_ms == T0 - 2 * MINUTE)
        );
    }

    #[test]
    fn a_retry_waits_for_its_time_and_holds_nobody_up() {
        let mut world = World::new(2);
        world.add(Run { retry_at_ms: T0 + 5, ..run(T0 - 2 * MINUTE, RunState::Retrying) });
        assert_eq!(starts(&world.plan(T0)), [-1]);
        assert_eq!(starts(&world.plan(T0 + 5)), [-2, -1]);
    }

    #[test]
    fn what_lies_behind_the_catch_up_limit_is_noted_as_missed() {
        let mut world = World::new(2);
        for minute in [-2, -1] {
            world.add(run(T0 + minute * MINUTE, RunState::Succeeded));
        }
        world.add(run(T0 + MINUTE, RunState::Retrying));
        let found = world.plan(T0 + 6 * MINUTE);
        assert_eq!(starts(&found), [1, 4, 5, 0, 2, 3], "old runs and the last two run, the rest is missed");
        assert_eq!(found.decisions.iter().filter(|d| matches!(d, Decision::Miss { .. })).count(), 3);
        assert_eq!(found.settled_to_ms, T0);
    }

    #[test]
    fn a_paused_stream_begins_nothing() {
        let world = World::new(3);
        let facts = Facts {
            now_ms: T0,
            timeline: &world.timeline,
            settled_to_ms: world.settled_to_ms,
            catch_up_from_ms: 0,
            runs: &world.runs,
            max_active_runs: 1,
            paused: true,
        };
        assert_eq!(plan(&facts).decisions, []);
    }

    #[test]
    fn pauses_double_up_to_the_longest_and_end_with_the_attempts() {
        let policy = RetryPolicy { attempts: 5, backoff_ms: 1000, max_backoff_ms: 3000, deadline_ms: 60_000 };
        let check = |failures, retry_after_ms, elapsed_ms, expected| {
            let failed = FailedAttempt { retryable: true, failures, elapsed_ms, retry_after_ms, jitter: 0.5 };
            assert_eq!(after_failure(&policy, &failed), expected, "failure {failures}");
        };
        let give_up = |because: &str| AfterFailure::GiveUp { because: because.to_owned() };
        check(1, None, 0, AfterFailure::RetryIn { pause_ms: 750 });
        check(2, None, 0, AfterFailure::RetryIn { pause_ms: 1500 });
        check(4, None, 0, AfterFailure::RetryIn { pause_ms: 2250 });
        check(4, Some(9000), 0, AfterFailure::RetryIn { pause_ms: 9000 });
        check(5, None, 0, give_up("attempt 5 of 5"));
        check(1, None, 59_500, give_up("deadline of 60 s"));
        let fatal =
            FailedAttempt { retryable: false, failures: 1, elapsed_ms: 0, retry_after_ms: None, jitter: 0.0 };
        assert_eq!(after_failure(&policy, &fatal), give_up("final"));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Plans and carries out at random moments, with attempts that end well, badly or not at all, clocks that step
        /// back, restarts, which know nothing but the ledger, and an outage longer than they look back.
        #[test]
        fn every_interval_ends_in_the_ledger_once_whatever_happens(
            schedule in schedules(),
            steps in prop::collection::vec(
                (-2000i64..7000, any::<bool>(), prop::collection::vec(0u8..5, 8)), 1..40),
            catch_up in 0u32..6,
            room in 1u32..4,
            outage_at in 0usize..80,
        ) {
            let mut world = World { max_active_runs: room, ..World::of(&schedule, catch_up) };
            let length = { let i = world.timeline.containing(T0); i.end_ms - i.start_ms };
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
                    let begins = |d: &&Decision| matches!(d, Decision::Begin { .. } | Decision::Resume { .. });
                    let begun = found.decisions.iter().filter(begins).count();
                    prop_assert!(begun <= room as usize);
                    for (decision, fate) in found.decisions.iter().zip(fates.iter().cycle()) {
                        carry_out(&mut world, decision, *fate, now)?;
                    }
                }
            }
            // In the end nothing goes wrong any more.
            now = latest + 60 * length;
            world.settle(now)?;
            let mut at = world.timeline.start_ms();
            for run in world.runs.values() {
                prop_assert_eq!(run.interval.start_ms, at, "no gap, no overlap");
                prop_assert!(run.is_over());
                at = run.interval.end_ms;
            }
            prop_assert_eq!(at, world.timeline.containing(now).start_ms);
        }
    }

    /// Plain lengths, and the ends of months, leap days and weeks.
    fn schedules() -> impl Strategy<Value = Schedule> {
        let crons = ["*/7 * * * *", "30 2 * * *", "0 0 1 * *", "0 0 31 * *", "0 12 28-31 * *", "0 0 * * MON"];
        prop_oneof![
            Just(Schedule::Every(MINUTE)),
            (1000i64..100_000_000).prop_map(Schedule::Every),
            prop::sample::select(crons.to_vec()).prop_map(|cron| Schedule::Cron(cron.to_owned())),
        ]
    }

    fn carry_out(world: &mut World, decision: &Decision, fate: u8, now: i64) -> Result<(), TestCaseError> {
        let (interval, state) = match decision {
            Decision::Miss { interval } => (*interval, RunState::Failed),
            Decision::Schedule { interval, .. } => (*interval, RunState::Scheduled),
            Decision::Begin { interval, .. } => {
                prop_assert!(is_unknown(&world.runs, interval));
                prop_assert!(interval.end_ms <= now, "an interval runs after its end");
                (*interval, fate_of(fate))
            }
            Decision::Resume { run } => {
                prop_assert!(world.runs.contains_key(&run.interval.start_ms));
                (run.interval, fate_of(fate))
            }
        };
        let row = Run { interval, lease_until_ms: now + 500, retry_at_ms: now + 100, ..run(0, state) };
        world.add(row);
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
