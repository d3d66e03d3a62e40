//! Whose turn it is: faults in the order of their times, and quiet around those that strike alone. Given the time; strikes nothing.

use std::time::{Duration, Instant};

use super::RECOVERED_WITHIN;
use super::plan::{Fault, Strike};

/// The faults of a run that are still to come.
pub(super) struct Schedule {
    strikes: Vec<Strike>,
    /// Time of the run without that in which it was quiet.
    time: Duration,
    /// When the schedule was last asked.
    asked: Option<Instant>,
    /// Nothing strikes from here on until the pipeline has recovered.
    quiet: Option<Instant>,
    /// The next fault strikes alone, and it was quiet before it.
    waited: bool,
}

impl Schedule {
    /// A schedule of faults in the order of their times.
    pub(super) fn new(strikes: Vec<Strike>) -> Self {
        Self { strikes, time: Duration::ZERO, asked: None, quiet: None, waited: false }
    }

    /// Whether the planned length of the run is not over, or faults are left.
    pub(super) fn goes_on(&self, length: Duration) -> bool {
        self.time < length || !self.strikes.is_empty()
    }

    /// How many faults are left.
    pub(super) fn left(&self) -> usize {
        self.strikes.len()
    }

    /// The fault whose turn it is now, if any. Those that cannot strike now are passed over.
    pub(super) fn due(
        &mut self,
        recovered: bool,
        now: Instant,
        can_strike: impl Fn(Fault) -> bool,
    ) -> Option<Strike> {
        let passed = self.asked.replace(now).map_or(Duration::ZERO, |asked| now - asked);
        if let Some(since) = self.quiet {
            if !recovered && now - since < RECOVERED_WITHIN {
                return None;
            }
            self.quiet = None;
        }
        self.time += passed;
        let next = self.strikes.iter().position(|s| s.at <= self.time && can_strike(s.fault))?;
        let alone = self.strikes[next].alone;
        if alone && !recovered && !self.waited {
            self.waited = true;
            self.quiet = Some(now);
            return None;
        }
        self.waited = false;
        self.quiet = alone.then_some(now);
        Some(self.strikes.remove(next))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::soak::plan::Part;

    const KILL: Fault = Fault::Kill(Part::Load);

    fn schedule(strikes: &[(u64, bool)]) -> Schedule {
        let strike =
            |(at, alone): &(u64, bool)| Strike { at: Duration::from_secs(*at), fault: KILL, alone: *alone };
        Schedule::new(strikes.iter().map(strike).collect())
    }

    /// Asks each second; `recovered` by second. Gives the seconds in which something strikes.
    fn struck(mut schedule: Schedule, recovered: &[bool]) -> Vec<usize> {
        let begin = Instant::now();
        let mut at = Vec::new();
        for (second, recovered) in recovered.iter().enumerate() {
            let now = begin + Duration::from_secs(second as u64);
            if schedule.due(*recovered, now, |_| true).is_some() {
                at.push(second);
            }
        }
        at
    }

    #[test]
    fn faults_strike_at_their_times_whether_or_not_the_pipeline_has_recovered() {
        assert_eq!(struck(schedule(&[(1, false), (3, false)]), &[false; 6]), [1, 3]);
    }

    #[test]
    fn it_is_quiet_before_and_after_a_fault_that_strikes_alone() {
        let recovered = [true, false, false, false, true, false, false, true, true, true];
        // Due at 2, recovered at 4; recovered again at 7, from where the rest of the schedule goes on.
        assert_eq!(struck(schedule(&[(1, false), (2, true), (3, false)]), &recovered), [1, 4, 7]);
    }

    #[test]
    fn the_time_in_which_it_was_quiet_does_not_count() {
        let recovered = [true, true, false, false, false, true, true, true, true];
        assert_eq!(struck(schedule(&[(1, true), (4, false)]), &recovered), [1, 7]);
    }

    #[test]
    fn a_pipeline_that_does_not_recover_does_not_hold_up_the_run() {
        let patience = RECOVERED_WITHIN.as_secs() as usize;
        assert_eq!(
            struck(schedule(&[(0, false), (1, true), (2, false)]), &vec![false; 3 * patience]),
            [0, 1 + patience, 2 + 2 * patience - 1]
        );
    }

    #[test]
    fn a_fault_whose_part_is_down_waits_for_it() {
        let mut schedule = schedule(&[(0, false)]);
        assert_eq!(schedule.due(true, Instant::now(), |_| false), None);
        assert!(schedule.goes_on(Duration::ZERO));
        assert!(schedule.due(true, Instant::now(), |_| true).is_some());
        assert!(!schedule.goes_on(Duration::ZERO));
    }
}
