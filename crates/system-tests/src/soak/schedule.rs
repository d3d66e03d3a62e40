//! Decides which fault to inject next: faults in the order of their times, with a quiet period before and after those
//! that are injected alone. Pure; the current time is an argument.

use std::time::{Duration, Instant};

use super::RECOVERED_TIMEOUT;
use super::plan::{Fault, Injection};

/// The remaining faults of a run.
pub(super) struct FaultSchedule {
    injections: Vec<Injection>,
    /// Elapsed time of the run, without quiet periods.
    time: Duration,
    /// When [`FaultSchedule::due`] was last called.
    last_poll: Option<Instant>,
    /// Start of the current quiet period, which lasts until the pipeline has recovered.
    quiet: Option<Instant>,
    /// Whether the quiet period before the next fault, which is injected alone, has already taken place.
    waited: bool,
}

impl FaultSchedule {
    /// Creates a schedule from faults in the order of their times.
    pub(super) fn new(injections: Vec<Injection>) -> Self {
        Self { injections, time: Duration::ZERO, last_poll: None, quiet: None, waited: false }
    }

    /// Returns whether the planned length of the run is not over yet or faults remain.
    pub(super) fn is_active(&self, length: Duration) -> bool {
        self.time < length || !self.injections.is_empty()
    }

    /// Returns the number of remaining faults.
    pub(super) fn left(&self) -> usize {
        self.injections.len()
    }

    /// Removes and returns the fault to inject now, if any. Skips faults that cannot be injected now.
    pub(super) fn due(
        &mut self,
        recovered: bool,
        now: Instant,
        can_inject: impl Fn(Fault) -> bool,
    ) -> Option<Injection> {
        let passed = self.last_poll.replace(now).map_or(Duration::ZERO, |last_poll| now - last_poll);
        if let Some(since) = self.quiet {
            if !recovered && now - since < RECOVERED_TIMEOUT {
                return None;
            }
            self.quiet = None;
        }
        self.time += passed;
        let next = self.injections.iter().position(|s| s.at <= self.time && can_inject(s.fault))?;
        let alone = self.injections[next].alone;
        if alone && !recovered && !self.waited {
            self.waited = true;
            self.quiet = Some(now);
            return None;
        }
        self.waited = false;
        self.quiet = alone.then_some(now);
        Some(self.injections.remove(next))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::soak::plan::Part;

    const KILL: Fault = Fault::Kill(Part::Load);

    fn schedule(injections: &[(u64, bool)]) -> FaultSchedule {
        let injection = |(at, alone): &(u64, bool)| Injection {
            at: Duration::from_secs(*at),
            fault: KILL,
            alone: *alone,
        };
        FaultSchedule::new(injections.iter().map(injection).collect())
    }

    /// Calls `due` once per second with the given values of `recovered`. Returns the seconds in which a fault is
    /// injected.
    fn injected(mut schedule: FaultSchedule, recovered: &[bool]) -> Vec<usize> {
        let start = Instant::now();
        let mut at = Vec::new();
        for (second, recovered) in recovered.iter().enumerate() {
            let now = start + Duration::from_secs(second as u64);
            if schedule.due(*recovered, now, |_| true).is_some() {
                at.push(second);
            }
        }
        at
    }

    #[test]
    fn faults_are_injected_on_time_even_if_the_pipeline_has_not_recovered() {
        assert_eq!(injected(schedule(&[(1, false), (3, false)]), &[false; 6]), [1, 3]);
    }

    #[test]
    fn a_fault_injected_alone_has_a_quiet_period_before_and_after_it() {
        let recovered = [true, false, false, false, true, false, false, true, true, true];
        // The second fault is due at 2 and waits for the recovery at 4. The schedule continues after the recovery at 7.
        assert_eq!(injected(schedule(&[(1, false), (2, true), (3, false)]), &recovered), [1, 4, 7]);
    }

    #[test]
    fn quiet_periods_do_not_count_as_elapsed_time() {
        let recovered = [true, true, false, false, false, true, true, true, true];
        assert_eq!(injected(schedule(&[(1, true), (4, false)]), &recovered), [1, 7]);
    }

    #[test]
    fn a_pipeline_that_never_recovers_does_not_block_the_run() {
        let patience = RECOVERED_TIMEOUT.as_secs() as usize;
        assert_eq!(
            injected(schedule(&[(0, false), (1, true), (2, false)]), &vec![false; 3 * patience]),
            [0, 1 + patience, 2 + 2 * patience - 1]
        );
    }

    #[test]
    fn a_fault_waits_until_its_part_is_up() {
        let mut schedule = schedule(&[(0, false)]);
        assert_eq!(schedule.due(true, Instant::now(), |_| false), None);
        assert!(schedule.is_active(Duration::ZERO));
        assert!(schedule.due(true, Instant::now(), |_| true).is_some());
        assert!(!schedule.is_active(Duration::ZERO));
    }
}
