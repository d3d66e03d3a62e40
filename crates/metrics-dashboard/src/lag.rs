//! How far the processor is behind, in messages and in seconds. Pure: end offsets come from [`crate::kafka_view`], positions
//! from [`crate::store`].

use serde::Serialize;
use std::collections::VecDeque;

/// Seconds of lag kept for the chart.
pub const KEPT_SECONDS: usize = 3600;

/// The span of offsets that one Kafka partition holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Watermarks {
    /// First offset still there.
    pub low: i64,
    /// Next offset to be written: as many records as were ever produced, since offsets start at 0.
    pub high: i64,
}

/// Where a position stands against the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// Nothing left to do.
    Current,
    /// Records are waiting.
    Behind,
    /// Retention removed records before they were processed.
    HistoryLost,
    /// The position is past the end: the topic is another one, or was cut.
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

/// Records not yet processed, those lost included; never negative.
pub fn messages(log: Watermarks, next_offset: i64) -> i64 {
    (log.high - next_offset).max(0)
}

/// The first record that waits, where one does.
pub fn first_waiting(log: Watermarks, next_offset: i64) -> Option<i64> {
    let first = next_offset.max(log.low);
    (first < log.high).then_some(first)
}

/// Age of the first record that waits, by the broker's time stamp; never negative, whatever the clocks say.
pub fn seconds(now_ms: i64, first_waiting_ms: i64) -> f64 {
    (now_ms - first_waiting_ms).max(0) as f64 / 1000.0
}

/// Lag as of one second; `None`: it could not be known then.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct LagSample {
    /// Unix seconds.
    pub at: i64,
    /// Of all partitions.
    pub messages: Option<i64>,
    /// Of the partition that is furthest behind.
    pub seconds: Option<f64>,
}

/// The last hour's lag, one sample a second.
#[derive(Debug, Default)]
pub struct LagHistory {
    samples: VecDeque<LagSample>,
}

impl LagHistory {
    /// Adds a sample; a second already there keeps its first one, and the oldest leaves when the hour is full.
    pub fn push(&mut self, sample: LagSample) {
        if self.samples.back().is_some_and(|last| last.at >= sample.at) {
            return;
        }
        if self.samples.len() >= KEPT_SECONDS {
            self.samples.pop_front();
        }
        self.samples.push_back(sample);
    }

    /// The worst lag known in `[from, to)`; `None` where none of its seconds is known.
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
    fn a_position_is_judged_against_the_log() {
        assert_eq!(standing(LOG, 100), Standing::Current);
        assert_eq!(standing(LOG, 99), Standing::Behind);
        assert_eq!(standing(LOG, 10), Standing::Behind);
        assert_eq!(standing(LOG, 9), Standing::HistoryLost);
        assert_eq!(standing(LOG, 101), Standing::BeyondTheEnd);
    }

    #[test]
    fn what_waits_starts_at_the_position_or_where_the_log_begins() {
        assert_eq!(first_waiting(LOG, 50), Some(50));
        assert_eq!(first_waiting(LOG, 0), Some(10));
        assert_eq!(first_waiting(LOG, 100), None);
        assert_eq!(first_waiting(Watermarks { low: 0, high: 0 }, 0), None);
    }

    #[test]
    fn an_hour_of_samples_is_kept_and_the_worst_of_a_step_is_shown() {
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
        fn lag_is_never_negative_and_zero_exactly_when_nothing_waits(low in 0..1000i64, more in 0..1000i64, next in 0..3000i64) {
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
