//! Measures how long each stage is idle, busy or backpressured. A stage's clock is always in exactly one state. A
//! scrape counts the time since the last state change, so the three states add up to wall time at every scrape. The
//! caller names the metric.

use prometheus::CounterVec;
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What a stage is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StageState {
    /// The stage waits for input.
    Idle,
    /// The stage processes input.
    Busy,
    /// The stage waits for the next stage to accept its output.
    Backpressured,
}

impl StageState {
    /// Every state, in the order of their discriminants.
    pub const ALL: [StageState; 3] = [StageState::Idle, StageState::Busy, StageState::Backpressured];

    /// Value of the metric label.
    pub fn name(self) -> &'static str {
        match self {
            StageState::Idle => "idle",
            StageState::Busy => "busy",
            StageState::Backpressured => "backpressured",
        }
    }
}

/// The clock of one stage of one partition.
#[derive(Debug)]
pub struct StageClock {
    seconds: [prometheus::Counter; 3],
    now: Mutex<(StageState, Instant)>,
}

impl StageClock {
    /// Counts the time since the last change for the current state, then changes to `next`.
    pub fn enter(&self, next: StageState) {
        self.enter_after(Duration::ZERO, next);
    }

    /// Like [`StageClock::enter`], but counts `worked` of the time since the last change as busy.
    pub fn enter_after(&self, worked: Duration, next: StageState) {
        let mut now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        let (state, since) = *now;
        let at = Instant::now();
        let passed = at.saturating_duration_since(since);
        let worked = worked.min(passed);
        self.seconds[StageState::Busy as usize].inc_by(worked.as_secs_f64());
        self.seconds[state as usize].inc_by((passed - worked).as_secs_f64());
        *now = (next, at);
    }

    /// Counts the time since the last change, without changing the state.
    fn count_elapsed(&self) {
        let state = self.now.lock().unwrap_or_else(PoisonError::into_inner).0;
        self.enter(state);
    }
}

/// Clocks by partition and stage.
type Clocks = BTreeMap<(i32, &'static str), Arc<StageClock>>;

/// The clocks of all stages of this instance's partitions, as a collector with the labels partition, stage and state.
#[derive(Debug, Clone)]
pub struct Stages {
    seconds: CounterVec,
    clocks: Arc<Mutex<Clocks>>,
}

impl Stages {
    /// `seconds` must have the labels partition, stage and state, in this order.
    pub fn new(seconds: CounterVec) -> Stages {
        Stages { seconds, clocks: Arc::default() }
    }

    fn clocks(&self) -> MutexGuard<'_, Clocks> {
        self.clocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts the clock of a stage of a partition, in state idle.
    pub fn start(&self, partition: i32, stage: &'static str) -> Arc<StageClock> {
        let label = partition.to_string();
        let seconds = StageState::ALL.map(|s| self.seconds.with_label_values(&[&label, stage, s.name()]));
        let clock = Arc::new(StageClock { seconds, now: Mutex::new((StageState::Idle, Instant::now())) });
        self.clocks().insert((partition, stage), Arc::clone(&clock));
        clock
    }

    /// Removes the clocks and series of a partition.
    pub fn remove(&self, partition: i32) {
        let label = partition.to_string();
        self.clocks().retain(|(of, stage), _| {
            if *of == partition {
                for state in StageState::ALL {
                    // Fails if the series was never created.
                    let _absent = self.seconds.remove_label_values(&[label.as_str(), stage, state.name()]);
                }
            }
            *of != partition
        });
    }

    /// Whether a stage of a partition is idle; `false` if it has no clock.
    pub fn is_idle(&self, partition: i32, stage: &'static str) -> bool {
        let clocks = self.clocks();
        let clock = clocks.get(&(partition, stage));
        clock.is_some_and(|clock| {
            clock.now.lock().unwrap_or_else(PoisonError::into_inner).0 == StageState::Idle
        })
    }

    /// Partitions that have a clock, in ascending order.
    pub fn partitions(&self) -> Vec<i32> {
        let mut partitions: Vec<i32> = self.clocks().keys().map(|(partition, _)| *partition).collect();
        partitions.dedup();
        partitions
    }
}

impl Collector for Stages {
    fn desc(&self) -> Vec<&Desc> {
        self.seconds.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.clocks().values().for_each(|clock| clock.count_elapsed());
        self.seconds.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus::Opts;

    fn stages() -> Stages {
        Stages::new(CounterVec::new(Opts::new("seconds", "s"), &["partition", "stage", "state"]).unwrap())
    }

    fn sum(stages: &Stages) -> f64 {
        stages.collect().iter().flat_map(|f| f.get_metric()).map(|m| m.get_counter().get_value()).sum()
    }

    #[test]
    fn the_states_of_a_stage_add_up_to_wall_time_at_every_scrape() {
        let stages = stages();
        let before = Instant::now();
        let clock = stages.start(0, "work");
        let started = Instant::now();
        for state in [StageState::Busy, StageState::Backpressured, StageState::Idle, StageState::Busy] {
            clock.enter(state);
            clock.enter_after(Duration::from_secs(3600), state);
            let least = started.elapsed().as_secs_f64();
            let counted = sum(&stages);
            let most = before.elapsed().as_secs_f64();
            assert!(least - 1e-6 <= counted && counted <= most + 1e-6, "{least} <= {counted} <= {most}");
        }
        let counted = sum(&stages);
        assert!(sum(&stages) > counted, "time is counted without a state change");
    }

    #[test]
    fn work_within_a_wait_is_counted_as_work_and_never_beyond_the_time_that_passed() {
        let stages = stages();
        let clock = stages.start(1, "fetch");
        let busy = || stages.seconds.with_label_values(&["1", "fetch", "busy"]).get();
        clock.enter_after(Duration::from_secs(3600), StageState::Idle);
        assert!(busy() < 3600.0, "{}", busy());
        assert_eq!(stages.seconds.with_label_values(&["1", "fetch", "idle"]).get(), 0.0);
    }

    #[test]
    fn removing_a_partition_removes_its_series() {
        let stages = stages();
        let _held = (stages.start(0, "work"), stages.start(1, "fetch"), stages.start(1, "work"));
        assert_eq!(stages.partitions(), [0, 1]);
        stages.remove(1);
        assert_eq!(stages.partitions(), [0]);
        assert_eq!(stages.collect()[0].get_metric().len(), 3);
    }
}
