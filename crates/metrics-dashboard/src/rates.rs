//! Computes throughput from running totals: a row holds the total of a Kafka partition at the end of a second, and the
//! progress is the difference between two rows. Pure: [`crate::cassandra_view`] reads the rows, and the caller passes the time.
//!
//! A second without a row is a second without progress. The progress of the first row of a partition needs a baseline:
//! an older row, or zero if the stream is younger than the rows that were read. Without a baseline, the first row
//! counts as no progress.

use serde::Serialize;
use std::collections::BTreeMap;

/// Time span of the average and the peak: the last hour.
pub const WINDOW_SECONDS: i64 = 3600;
/// Time span of the current rate.
pub const RECENT_SECONDS: i64 = 10;
/// The newest seconds are ignored, because a row is written after its second has ended and some may be missing.
pub const SETTLE_SECONDS: i64 = 2;
/// Most points of one chart.
pub const MAX_POINTS: usize = 2000;

/// One row of table `throughput`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sample {
    /// Kafka partition.
    pub partition: i32,
    /// Start of the step, in Unix seconds.
    pub at: i64,
    /// Events processed since the start of the log, at the end of the step.
    pub total: i64,
}

/// Events per second.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Rates {
    /// Average of the last [`RECENT_SECONDS`].
    pub now: f64,
    /// Average of the last [`WINDOW_SECONDS`], or since the first row if that is later.
    pub average: f64,
    /// Rate of the best step within the last [`WINDOW_SECONDS`].
    pub peak: f64,
}

/// One point of a chart.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Point {
    /// Start of the step, in Unix seconds.
    pub at: i64,
    /// Average over the step.
    pub events_per_second: f64,
}

#[derive(Debug, Clone, Default)]
struct Track {
    totals: BTreeMap<i64, i64>,
    /// Total before the first entry of `totals`. `None` if it is not known.
    before: Option<i64>,
}

impl Track {
    /// The total at the end of the step that starts at `at`. `None` if no row is known.
    fn total_at(&self, at: i64, zero_at_start: bool) -> Option<i64> {
        let known = self.totals.range(..=at).next_back().map(|(_, total)| *total);
        let first = || self.totals.values().next().copied();
        known.or(self.before).or(if zero_at_start { Some(0) } else { first() })
    }
}

/// Running totals of all partitions over a limited time span.
#[derive(Debug, Clone)]
pub struct History {
    step: i64,
    zero_at_start: bool,
    tracks: BTreeMap<i32, Track>,
}

impl History {
    /// Creates an empty history with steps of `step` seconds. Set `zero_at_start` if the stream is younger than the
    /// time span that is read: the totals of partitions without an earlier row then start at zero.
    pub fn new(step: i64, zero_at_start: bool) -> History {
        History { step, zero_at_start, tracks: BTreeMap::new() }
    }

    /// Adds a row. The order does not matter, and a row may be added repeatedly. Of two rows for the same step, the
    /// larger total is the later one and wins.
    pub fn observe(&mut self, sample: Sample) {
        let track = self.tracks.entry(sample.partition).or_default();
        let total = track.totals.entry(sample.at).or_insert(sample.total);
        *total = sample.total.max(*total);
    }

    /// Drops all rows before `at`, and keeps only their last total as the baseline.
    pub fn forget_before(&mut self, at: i64) {
        for track in self.tracks.values_mut() {
            let kept = track.totals.split_off(&at);
            if let Some(last) = track.totals.values().next_back() {
                track.before = Some(*last);
            }
            track.totals = kept;
        }
    }

    /// Events processed in `[from, to)`, in Unix seconds. Both must be multiples of the step. Never negative.
    pub fn progress(&self, from: i64, to: i64) -> i64 {
        let of = |track: &Track| {
            let end = track.total_at(to - self.step, self.zero_at_start);
            let start = track.total_at(from - self.step, self.zero_at_start);
            end.zip(start).map_or(0, |(end, start)| (end - start).max(0))
        };
        self.tracks.values().map(of).sum()
    }

    /// Start of the first step with a row, in Unix seconds.
    pub fn first_at(&self) -> Option<i64> {
        self.tracks.values().filter_map(|track| track.totals.keys().next().copied()).min()
    }

    /// The rates as of `now`, in Unix seconds.
    pub fn rates(&self, now: i64) -> Rates {
        let to = self.align(now - SETTLE_SECONDS);
        let oldest = self.align(to - WINDOW_SECONDS);
        let from = self.first_at().map_or(oldest, |first| first.max(oldest)).min(to);
        let per_second = |from: i64, to: i64| {
            if to > from { self.progress(from, to) as f64 / (to - from) as f64 } else { 0.0 }
        };
        let peak = self.by_step(from, to).into_values().max().unwrap_or(0) as f64 / self.step as f64;
        Rates { now: per_second(to - RECENT_SECONDS, to), average: per_second(from, to), peak }
    }

    /// One point for each `width` seconds (a multiple of the step) in `[from, to)`, including idle ones. At most
    /// [`MAX_POINTS`].
    pub fn points(&self, from: i64, to: i64, width: i64) -> Vec<Point> {
        let width = width.max(self.step);
        let mut sums: BTreeMap<i64, i64> = BTreeMap::new();
        for (at, progress) in self.by_step(from, to) {
            *sums.entry(from + (at - from).div_euclid(width) * width).or_default() += progress;
        }
        (0..MAX_POINTS as i64)
            .map(|i| from + i * width)
            .take_while(|at| at + width <= to)
            .map(|at| Point { at, events_per_second: *sums.get(&at).unwrap_or(&0) as f64 / width as f64 })
            .collect()
    }

    /// The start of the step that contains `at`.
    pub fn align(&self, at: i64) -> i64 {
        at.div_euclid(self.step) * self.step
    }

    /// Progress of every step in `[from, to)` that has a row.
    fn by_step(&self, from: i64, to: i64) -> BTreeMap<i64, i64> {
        let mut sums: BTreeMap<i64, i64> = BTreeMap::new();
        if from >= to {
            return sums;
        }
        for track in self.tracks.values() {
            let mut last = track.total_at(from - self.step, self.zero_at_start);
            for (at, total) in track.totals.range(from..to) {
                let step = last.map_or(0, |last| (total - last).max(0));
                *sums.entry(*at).or_default() += step;
                last = Some(last.map_or(*total, |last| last.max(*total)));
            }
        }
        sums
    }
}

/// Width of the points of a chart: the smallest multiple of `step` that divides `seconds` into at most [`MAX_POINTS`].
pub fn width_for(seconds: i64, step: i64) -> i64 {
    let points = (seconds / step).max(1);
    let per_point = (points + MAX_POINTS as i64 - 1) / MAX_POINTS as i64;
    per_point * step
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn history(zero_at_start: bool, samples: &[(i32, i64, i64)]) -> History {
        let mut history = History::new(1, zero_at_start);
        for (partition, at, total) in samples {
            history.observe(Sample { partition: *partition, at: *at, total: *total });
        }
        history
    }

    #[test]
    fn a_second_without_a_row_has_no_progress() {
        let h = history(true, &[(0, 100, 10), (0, 105, 30), (1, 103, 5)]);
        assert_eq!(h.progress(100, 106), 35);
        assert_eq!(h.progress(101, 105), 5);
        let rates: Vec<f64> = h.points(100, 106, 1).iter().map(|p| p.events_per_second).collect();
        assert_eq!(rates, [10.0, 0.0, 0.0, 5.0, 0.0, 20.0]);
    }

    #[test]
    fn the_first_row_counts_only_if_the_stream_is_young() {
        assert_eq!(history(false, &[(0, 100, 1_000_000), (0, 101, 1_000_010)]).progress(90, 110), 10);
        assert_eq!(history(true, &[(0, 100, 1_000), (0, 101, 1_010)]).progress(90, 110), 1_010);
    }

    #[test]
    fn an_idle_pipeline_has_a_current_rate_of_zero_and_keeps_its_peak() {
        let h = history(true, &[(0, 100, 500), (0, 101, 800)]);
        let rates = h.rates(152);
        assert_eq!(rates, Rates { now: 0.0, average: 800.0 / 50.0, peak: 500.0 });
        assert_eq!(History::new(1, true).rates(152), Rates { now: 0.0, average: 0.0, peak: 0.0 });
    }

    #[test]
    fn a_chart_never_has_too_many_points() {
        for (seconds, step) in [(60, 1), (3600, 1), (2000, 1), (2001, 1), (604_800, 60), (120_000, 60)] {
            let width = width_for(seconds, step);
            assert!(seconds / width <= MAX_POINTS as i64 && width % step == 0, "{seconds} {step} {width}");
        }
        assert_eq!(width_for(2000, 1), 1);
        assert_eq!(width_for(2001, 1), 2);
    }

    /// Rows like those of a processor, with totals that increase over time.
    fn rising() -> impl Strategy<Value = Vec<(i32, i64, i64)>> {
        let row = (0..4i32, 0..100i64, 0..50i64);
        proptest::collection::vec(row, 0..60).prop_map(|mut rows| {
            rows.sort();
            rows.dedup_by_key(|(partition, at, _)| (*partition, *at));
            let mut totals = BTreeMap::new();
            let rise = |(partition, at, more): (i32, i64, i64)| {
                let total = totals.entry(partition).or_insert(0);
                *total += more;
                (partition, at, *total)
            };
            rows.into_iter().map(rise).collect()
        })
    }

    proptest! {
        #[test]
        fn the_points_of_a_span_add_up_to_its_progress(
            rows in rising(), zero: bool, from in 0..50i64, length in 0..60i64,
        ) {
            let h = history(zero, &rows);
            let sum: f64 = h.points(from, from + length, 1).iter().map(|p| p.events_per_second).sum();
            prop_assert_eq!(sum as i64, h.progress(from, from + length));
        }

        #[test]
        fn the_order_and_repetition_of_rows_do_not_change_the_rates(rows in rising(), seed: u64) {
            let mut mixed: Vec<_> = rows.iter().chain(rows.iter()).copied().collect();
            let mut state = seed | 1;
            for i in (1..mixed.len()).rev() {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                mixed.swap(i, (state >> 33) as usize % (i + 1));
            }
            prop_assert_eq!(history(true, &rows).rates(102), history(true, &mixed).rates(102));
        }

        #[test]
        fn forgetting_old_rows_does_not_change_later_progress(rows in rising(), cut in 0..100i64) {
            let whole = history(true, &rows);
            let mut cut_off = whole.clone();
            cut_off.forget_before(cut);
            prop_assert_eq!(whole.progress(cut, 101), cut_off.progress(cut, 101));
        }

        #[test]
        fn the_peak_is_never_below_the_average(rows in rising(), zero: bool) {
            let rates = history(zero, &rows).rates(102);
            prop_assert!(rates.peak >= rates.average - 1e-9 && rates.average >= 0.0);
        }
    }
}
