//! Lag of the processor, in messages and in seconds. Pure: [`crate::kafka_view`] reads the end offsets, and
//! [`crate::cassandra_view`] reads the positions.

use serde::Serialize;
use std::collections::VecDeque;

/// Number of samples kept for the chart, one per second.
pub const KEPT_SECONDS: usize = 3600;

/// The range of offsets in one Kafka partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Watermarks {
    /// Offset of the first record that retention has not removed.
    pub low: i64,
    /// Offset of the next record to be written. It equals the number of records ever produced, because offsets start at
    /// 0.
    pub high: i64,
}

/// Relation of a position to the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// All records are processed.
    Current,
    /// Some records are not processed yet.
    Behind,
    /// Retention removed records before they were processed.
    HistoryLost,
    /// The position is past the end of the log: the topic was created again or truncated.
    BeyondTheEnd,
}

/// Compares a position with the log.
pub fn standing(log: Watermarks, next_offset: i64) -> Standing {
    if next_offset > log.high {
        Standing::BeyondTheEnd
    } else if next_offset < log.low {
        Standing::HistoryLost
    } else if next_offset < log.high {
        Standing::Behind
    } else {
        Standing::Current
    }
}

/// Number of unprocessed records, including those that retention removed. Never negative.
pub fn messages(log: Watermarks, next_offset: i64) -> i64 {
    (log.high - next_offset).max(0)
}

/// Offset of the first unprocessed record that still exists. `None` if there is no such record.
pub fn first_waiting(log: Watermarks, next_offset: i64) -> Option<i64> {
    let first = next_offset.max(log.low);
    (first < log.high).then_some(first)
}

/// Age in seconds of the first unprocessed record, by its broker timestamp. Never negative, even if the clocks differ.
pub fn seconds(now_ms: i64, first_waiting_ms: i64) -> f64 {
    (now_ms - first_waiting_ms).max(0) as f64 / 1000.0
}

/// Lag in one second. A figure is `None` if it was not known at that time.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct LagSample {
    /// Unix seconds.
    pub at: i64,
    /// Sum over all partitions.
    pub messages: Option<i64>,
    /// Maximum over all partitions.
    pub seconds: Option<f64>,
}

/// The lag of the last hour, one sample per second.
#[derive(Debug, Default)]
pub struct LagHistory {
    samples: VecDeque<LagSample>,
}

impl LagHistory {
    /// Adds a sample unless one for that second or a later one exists. Drops the oldest sample if the history is full.
    pub fn push(&mut self, sample: LagSample) {
        if self.samples.back().is_some_and(|last| last.at >= sample.at) {
            return;
        }
        if self.samples.len() >= KEPT_SECONDS {
            self.samples.pop_front();
        }
        self.samples.push_back(sample);
    }

    /// The highest known lag in messages and in seconds within `[from, to)`, in Unix seconds. `None` if none is known.
    pub fn worst(&self, from: i64, to: i64) -> (Option<i64>, Option<f64>) {
        let start = self.samples.partition_point(|s| s.at < from);
        let span = self.samples.range(start..).take_while(|s| s.at < to);
        span.fold((None, None), |(messages, seconds), s| {
            let seconds = match (seconds, s.seconds) {
                (Some(a), Some(b)) => Some(f64::max(a, b)),
                (a, b) => a.or(b),
            };
            (messages.max(s.messages), seconds)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LOG: Watermarks = Watermarks { low: 10, high: 100 };

    #[test]
    fn the_standing_compares_the_position_with_both_ends_of_the_log() {
        assert_eq!(standing(LOG, 100), Standing::Current);
        assert_eq!(standing(LOG, 99), Standing::Behind);
        assert_eq!(standing(LOG, 10), Standing::Behind);
        assert_eq!(standing(LOG, 9), Standing::HistoryLost);
        assert_eq!(standing(LOG, 101), Standing::BeyondTheEnd);
    }

    #[test]
    fn the_first_waiting_record_is_at_the_position_or_at_the_start_of_the_log() {
        assert_eq!(first_waiting(LOG, 50), Some(50));
        assert_eq!(first_waiting(LOG, 0), Some(10));
        assert_eq!(first_waiting(LOG, 100), None);
        assert_eq!(first_waiting(Watermarks { low: 0, high: 0 }, 0), None);
    }

    #[test]
    fn an_hour_of_samples_is_kept_and_a_step_has_the_highest_lag() {
        let mut history = LagHistory::default();
        for at in 0..4000 {
            history.push(LagSample { at, messages: Some(at), seconds: None });
        }
        history.push(LagSample { at: 3999, messages: Some(0), seconds: None });
        assert_eq!(history.samples.len(), KEPT_SECONDS);
        assert_eq!(history.worst(3990, 3995), (Some(3994), None));
        assert_eq!(history.worst(0, 10), (None, None));
    }

    proptest! {
        #[test]
        fn lag_is_never_negative_and_zero_only_if_no_record_waits(
            low in 0..1000i64, more in 0..1000i64, next in 0..3000i64,
        ) {
            let log = Watermarks { low, high: low + more };
            prop_assert!(messages(log, next) >= 0);
            let waits = matches!(standing(log, next), Standing::Behind | Standing::HistoryLost);
            prop_assert_eq!(messages(log, next) > 0, waits && log.high > next);
            if first_waiting(log, next).is_some() {
                prop_assert!(messages(log, next) > 0);
            }
        }

        #[test]
        fn seconds_are_never_negative(now: i32, then: i32) {
            prop_assert!(seconds(i64::from(now), i64::from(then)) >= 0.0);
        }
    }
}
