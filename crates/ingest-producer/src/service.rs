//! `run`: calls the planner, executes its decisions through [`Runner`] and shuts down in order. All durable state is
//! in the ledger. The service only caches up to where every interval is finished, and which runs before that are
//! unfinished.
//!
//! The service plans when something may have changed: an alarm rings at the end of the current interval, a run ends, a
//! retry or a lease is due, or a command was executed. It also plans every [`SAFETY_POLL`], which finds the changes of
//! other producers and bounds the delay if the alarm does not ring.

use crate::ledger::{LedgerError, Note};
use crate::planner::{self, Decision, Facts, Run, Trigger};
use crate::run::{Ended, Runner};
use crate::schedule::{ScheduleError, Timeline};
use crate::unresolved::{Span, Unresolved};
use common::contracts::event::floor_to;
use common::contracts::run_ledger::{Interval, RunState, RunType};
use common::contracts::stream::MAX_CATCH_UP_INTERVALS;
use common::runtime::admin::Health;
use common::runtime::alarm::Alarm;
use common::runtime::shutdown::Shutdown;
use futures::StreamExt;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Name of Cassandra among the dependencies of `/readyz`.
pub const DEPENDENCY: &str = "cassandra";
/// Longest time between two plannings.
const SAFETY_POLL: Duration = Duration::from_secs(20);
/// Shortest pause before a planning that the previous one asked for.
const MIN_PAUSE: Duration = Duration::from_millis(100);
/// This pause grows by so much for each ledger row of the previous planning, because reading them takes time.
const PAUSE_PER_ROW: Duration = Duration::from_micros(500);
/// Pause after a planning that failed because the ledger is unavailable.
const LEDGER_PAUSE: Duration = Duration::from_millis(500);
/// Interval of heartbeats while waiting. Each also checks whether Kafka is available again.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// How many intervals before now the planner considers after a start. It bounds the memory of a planning.
const LOOK_BACK_INTERVALS: u32 = MAX_CATCH_UP_INTERVALS as u32;
/// Length of the ledger ranges that are read while searching for the end of a gap.
const DAY_MS: i64 = 86_400_000;
/// Maximum concurrent writes of rows for intervals that are not started now.
const NOTES_IN_FLIGHT: usize = 16;
/// How long active runs may continue after a stop before they are interrupted.
const DRAIN: Duration = Duration::from_secs(5);

/// An error that ends the service.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The ledger failed.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The schedule is invalid.
    #[error(transparent)]
    Schedule(#[from] ScheduleError),
}

/// The loop that plans and starts runs.
pub struct Service {
    runner: Arc<Runner>,
    health: Arc<Health>,
    alarm: Arc<dyn Alarm>,
    /// Notified after each command, because it may have changed the ledger.
    commands: Arc<Notify>,
    /// The pause before the next planning unless another trigger comes first, and its trigger.
    pause: (Duration, Trigger),
    /// Whether the latest planning started no run because Kafka was unavailable.
    waits_for_kafka: bool,
    timeline: Option<Timeline>,
    /// Every interval that started before this time is finished.
    settled_to_ms: i64,
    /// The unfinished runs before `settled_to_ms`.
    unresolved: Unresolved,
    /// End of the latest successful run; 0 if unknown.
    last_success_ms: i64,
    /// `updated_at` of the stream state as last read. A change triggers another look back.
    updated_at_ms: i64,
    /// Number of ledger rows that the latest planning read.
    rows: usize,
    active: JoinSet<Ended>,
    stop: CancellationToken,
}

impl Service {
    /// Creates the service without calling the ledger. `commands` is notified after each command.
    pub fn new(
        runner: Arc<Runner>,
        health: Arc<Health>,
        alarm: Arc<dyn Alarm>,
        commands: Arc<Notify>,
    ) -> Service {
        Service {
            runner,
            health,
            alarm,
            commands,
            pause: (SAFETY_POLL, Trigger::Poll),
            waits_for_kafka: false,
            timeline: None,
            settled_to_ms: 0,
            unresolved: Unresolved::default(),
            last_success_ms: 0,
            updated_at_ms: -1,
            rows: 0,
            active: JoinSet::new(),
            stop: CancellationToken::new(),
        }
    }

    /// Runs until shutdown, then waits for active runs to end.
    pub async fn run(mut self, shutdown: &Shutdown) -> Result<(), ServiceError> {
        let mut trigger = (!shutdown.has_begun()).then_some(Trigger::Start);
        while let Some(planned) = trigger {
            self.health.beat();
            self.runner.metrics.planned(planned);
            match self.tick().await {
                Ok(()) => self.health.set(DEPENDENCY, Ok(())),
                Err(ServiceError::Ledger(LedgerError::Unavailable(cause))) => {
                    self.runner.metrics.ledger_unavailable();
                    self.health.set(DEPENDENCY, Err(cause));
                    self.pause = (LEDGER_PAUSE, Trigger::Recovery);
                }
                Err(e) => {
                    self.drain().await;
                    return Err(e);
                }
            }
            trigger = self.wait(shutdown).await;
        }
        self.health.stopping();
        self.drain().await;
        Ok(())
    }

    /// Waits until something triggers a planning, without reading the ledger. Returns `None` on shutdown.
    async fn wait(&mut self, shutdown: &Shutdown) -> Option<Trigger> {
        let (pause, at_its_end) = self.pause;
        let paused = tokio::time::sleep(pause);
        tokio::pin!(paused);
        let mut heartbeats = tokio::time::interval(HEARTBEAT);
        loop {
            tokio::select! {
                biased;
                () = shutdown.begun() => return None,
                Some(ended) = self.active.join_next() => {
                    if let Err(e) = ended {
                        tracing::error!(error = %e, "an attempt was aborted; it is retried when its lease expires");
                    }
                    return Some(Trigger::RunEnded);
                }
                () = self.alarm.rung() => return Some(Trigger::Interval),
                () = self.commands.notified() => return Some(Trigger::Command),
                () = &mut paused => return Some(at_its_end),
                _ = heartbeats.tick() => {
                    self.health.beat();
                    if self.waits_for_kafka && self.health.is_ready() {
                        return Some(Trigger::Recovery);
                    }
                }
            }
        }
    }

    /// The shortest pause after a planning.
    fn shortest_pause(&self) -> Duration {
        MIN_PAUSE.max(PAUSE_PER_ROW.saturating_mul(u32::try_from(self.rows).unwrap_or(u32::MAX)))
    }

    /// The pause after a planning: until `plan_again_ms`, but within the shortest pause and [`SAFETY_POLL`].
    fn pause_until(&self, plan_again_ms: Option<i64>, now_ms: i64) -> (Duration, Trigger) {
        let shortest = self.shortest_pause();
        match plan_again_ms.map(|at_ms| Duration::from_millis((at_ms - now_ms).max(0).unsigned_abs())) {
            Some(pause) if pause < SAFETY_POLL => (pause.max(shortest), Trigger::Due),
            _ => (SAFETY_POLL.max(shortest), Trigger::Poll),
        }
    }

    /// Plans once and executes the decisions.
    pub async fn tick(&mut self) -> Result<(), ServiceError> {
        let now_ms = (self.runner.clock)();
        let runner = self.runner.clone();
        let state = runner.ledger.stream_state().await?;
        runner.metrics.paused.set(i64::from(state.paused));
        let timeline = match (&self.timeline, &state.schedules) {
            (None, stored) => self.initial_timeline(stored.as_deref(), now_ms).await?,
            (Some(timeline), Some(stored)) if timeline.to_json() != *stored => Timeline::from_json(stored)?,
            (Some(timeline), _) => timeline.clone(),
        };
        let looks_back = state.updated_at_ms != self.updated_at_ms;
        if looks_back {
            self.settled_to_ms = self.look_back(&timeline, now_ms).await?;
            self.updated_at_ms = state.updated_at_ms;
        }
        let settings = &runner.definition.stream;
        let catch_up_from_ms = planner::catch_up_from(&timeline, settings, now_ms);
        let found = runner.ledger.runs(self.settled_to_ms, now_ms).await?;
        self.rows = found.len();
        let settled_to_ms = self.settled_to_ms;
        let span = Span { start_ms: timeline.start_ms(), catch_up_from_ms, settled_to_ms };
        self.unresolved.refresh(&*runner.ledger, span, now_ms, looks_back).await?;
        runner.metrics.ledger(found.iter());
        runner.metrics.unresolved(self.unresolved.count(&found));
        let present = timeline.containing(now_ms);
        runner.metrics.interval_seconds.set((present.end_ms - present.start_ms) / 1000);
        let succeeded = found.iter().filter(|run| run.state == RunState::Succeeded);
        let latest_ms = succeeded.map(|run| run.finished_at_ms).max().unwrap_or(0);
        self.last_success_ms = self.last_success_ms.max(latest_ms);
        let runs: BTreeMap<i64, Run> = found.into_iter().map(|run| (run.interval.start_ms, run)).collect();
        self.waits_for_kafka = self.kafka_is_unavailable();
        let plan = planner::plan(&Facts {
            now_ms,
            timeline: &timeline,
            settled_to_ms: self.settled_to_ms,
            catch_up_from_ms,
            runs: &runs,
            unfinished: self.unresolved.recent(),
            last_success_ms: self.last_success_ms,
            retry: &settings.retry,
            delay_ms: settings.delay_ms,
            lookback: settings.lookback,
            max_active_runs: settings.max_active_runs,
            // Without Kafka, runs would fail.
            paused: state.paused || self.waits_for_kafka,
        });
        if runs.range(..plan.settled_to_ms).any(|(_, run)| run.state == RunState::Failed) {
            self.unresolved.invalidate_recent();
        }
        self.settled_to_ms = plan.settled_to_ms;
        self.timeline = Some(timeline);
        runner.metrics.settled.raise(plan.fetched_to_ms / 1000);
        self.alarm.set(plan.next_interval_ms);
        self.pause = self.pause_until(plan.plan_again_ms, now_ms);
        self.carry_out(plan.decisions, now_ms).await
    }

    /// Whether the service is not ready although the ledger has just responded.
    fn kafka_is_unavailable(&self) -> bool {
        self.health.set(DEPENDENCY, Ok(()));
        !self.health.is_ready()
    }

    /// The timeline at a start: the stored one, extended if the schedule has changed, or a new one if none is stored.
    async fn initial_timeline(&self, stored: Option<&str>, now_ms: i64) -> Result<Timeline, ServiceError> {
        let settings = &self.runner.definition.stream;
        let ledger = &self.runner.ledger;
        let (timeline, old) = match stored {
            None => {
                (Timeline::first(&settings.schedule, settings.start_ms, settings.catch_up, now_ms)?, None)
            }
            Some(text) => {
                let timeline = Timeline::from_json(text)?;
                if timeline.ends_with(&settings.schedule) {
                    return Ok(timeline);
                }
                let from_ms = self.look_back(&timeline, now_ms).await?;
                let runs = ledger.runs(from_ms, now_ms).await?;
                let end_ms = runs.last().map_or(timeline.start_ms(), |run| run.interval.end_ms);
                tracing::info!(from = end_ms, schedule = ?settings.schedule, "the schedule has changed");
                (timeline.changed(&settings.schedule, end_ms)?, Some(text))
            }
        };
        if ledger.set_schedules(old, &timeline.to_json(), now_ms).await? {
            return Ok(timeline);
        }
        // Another producer stored its timeline first. That one is used.
        let state = ledger.stream_state().await?;
        Ok(Timeline::from_json(state.schedules.as_deref().unwrap_or_default())?)
    }

    /// Where the planner's range starts. If the ledger has a gap there, the search continues before the gap, so that
    /// even the first interval of a long outage is recorded as missed.
    async fn look_back(&self, timeline: &Timeline, now_ms: i64) -> Result<i64, LedgerError> {
        let mut from_ms = timeline.back(now_ms, LOOK_BACK_INTERVALS);
        loop {
            let last = self.last_before(from_ms, timeline.start_ms()).await?;
            match planner::look_back_before_gap(timeline, from_ms, last, LOOK_BACK_INTERVALS) {
                Some(further_ms) => from_ms = further_ms,
                None => return Ok(from_ms),
            }
        }
    }

    /// The last interval with a row that starts in `[start_ms, to_ms)`.
    async fn last_before(&self, mut to_ms: i64, start_ms: i64) -> Result<Option<Interval>, LedgerError> {
        while to_ms > start_ms {
            self.health.beat();
            let from_ms = floor_to(to_ms - 1, DAY_MS).max(start_ms);
            if let Some(run) = self.runner.ledger.runs(from_ms, to_ms).await?.pop() {
                return Ok(Some(run.interval));
            }
            to_ms = from_ms;
        }
        Ok(None)
    }

    async fn carry_out(&mut self, decisions: Vec<Decision>, now_ms: i64) -> Result<(), ServiceError> {
        let mut notes = Vec::new();
        for decision in decisions {
            match decision {
                Decision::Start { interval, run_type } => self.start(interval, run_type, None).await?,
                Decision::Resume { run, run_type } => {
                    self.start(run.interval, run_type, Some(&run)).await?;
                }
                Decision::Schedule { interval, run_type } => {
                    notes.push(Note { interval, run_type, state: RunState::Scheduled, cause: String::new() });
                }
                Decision::Miss { interval } => notes.push(self.missed(interval)),
            }
        }
        let mut missed = notes.iter().filter(|note| note.state == RunState::Failed);
        if let Some(first) = missed.next() {
            let to = missed.clone().next_back().unwrap_or(first).interval.end_ms;
            let (from, count) = (first.interval.start_ms, missed.count() + 1);
            tracing::error!(
                from,
                to,
                count,
                "intervals are older than the catch-up limit and were missed; run a backfill to fetch them"
            );
            self.runner.metrics.attempts.with_label_values(&["missed"]).inc_by(count as u64);
        }
        let ledger = &self.runner.ledger;
        let written =
            futures::stream::iter(notes).map(|note| async move { ledger.note(&note, now_ms).await });
        let written: Vec<Result<(), LedgerError>> = written.buffer_unordered(NOTES_IN_FLIGHT).collect().await;
        Ok(written.into_iter().collect::<Result<(), LedgerError>>()?)
    }

    async fn start(
        &mut self,
        interval: Interval,
        run_type: RunType,
        seen: Option<&Run>,
    ) -> Result<(), LedgerError> {
        let claim = self.runner.claim(interval, run_type, seen).await?;
        if seen.is_some() {
            self.unresolved.invalidate_recent();
        }
        match claim {
            Some(claim) => _ = self.active.spawn(self.runner.clone().attempt(claim, self.stop.clone())),
            // The row has changed since it was read.
            None => self.pause = (self.shortest_pause(), Trigger::Due),
        }
        Ok(())
    }

    fn missed(&self, interval: Interval) -> Note {
        let hours = self.runner.definition.stream.catch_up_limit_ms / 3_600_000;
        let cause = format!(
            "missed: no producer ran within the catch-up limit of {hours} h; fetch it with `backfill`, or accept the \
             missing data with `runs give-up`"
        );
        Note { interval, run_type: RunType::CatchUp, state: RunState::Failed, cause }
    }

    /// Waits for active runs to end and interrupts them after [`DRAIN`]. Each run records its end in the ledger.
    async fn drain(&mut self) {
        let deadline = tokio::time::sleep(DRAIN);
        tokio::pin!(deadline);
        loop {
            tokio::select! {
                ended = self.active.join_next() => if ended.is_none() { return },
                () = &mut deadline, if !self.stop.is_cancelled() => self.stop.cancel(),
            }
        }
    }

    /// Waits until no run is active.
    #[cfg(test)]
    pub(crate) async fn wait_for_active(&mut self) {
        while self.active.join_next().await.is_some() {}
    }
}
