//! Computes tumbling and sliding windows from panes. The size and slide of a window are multiples of the pane length.
//! Pure; [`crate::readers::pane_reader`] reads the pane rows. A query that would read or return too many values is rejected.

use crate::contracts::event::{DAY_MS, floor_to};
use crate::contracts::stream::{ALL, Definition, GroupBy};
use serde::Serialize;
use std::collections::BTreeMap;

/// Longest accepted duration: far more than [`MAX_READ_VALUES`] permits, and far below an integer overflow.
const MAX_LENGTH_MS: i64 = 366 * DAY_MS;
/// Most values in one result: a count and each measure, for every window and group. About 6 MB of JSON.
pub const MAX_ANSWERED_VALUES: i64 = 40_000;
/// Most values that one query may read: a count and each measure, for every pane, group and Kafka partition.
pub const MAX_READ_VALUES: i64 = 4_000_000;
/// Default time span of a query: the last hour.
const DEFAULT_LAST_MS: i64 = 3_600_000;

/// Aggregates of one measured column in a window or a pane.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Measure {
    /// Number of events that have a value.
    pub count: i64,
    /// Sum of the values.
    pub sum: f64,
    /// Minimum. `None` if no event has a value.
    pub min: Option<f64>,
    /// Maximum. `None` if no event has a value.
    pub max: Option<f64>,
}

impl Measure {
    /// Mean of the values. `None` if no event has a value.
    pub fn average(&self) -> Option<f64> {
        (self.count > 0).then(|| self.sum / self.count as f64)
    }

    fn add(&mut self, other: &Measure) {
        self.count += other.count;
        self.sum += other.sum;
        let both = |a: Option<f64>, b: Option<f64>, pick: fn(f64, f64) -> f64| match (a, b) {
            (Some(a), Some(b)) => Some(pick(a, b)),
            (a, b) => a.or(b),
        };
        self.min = both(self.min, other.min, f64::min);
        self.max = both(self.max, other.max, f64::max);
    }
}

/// Event count and measures of one group in a span of time.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Sum {
    /// Number of events.
    pub count: i64,
    /// One entry per measure, in the order of the stream definition.
    pub measures: Vec<Measure>,
}

impl Sum {
    /// Adds the sum of another pane or partition.
    pub fn add(&mut self, other: &Sum) {
        self.count += other.count;
        self.measures.resize(self.measures.len().max(other.measures.len()), Measure::default());
        self.measures.iter_mut().zip(&other.measures).for_each(|(measure, other)| measure.add(other));
    }
}

/// Panes by group value and start (Unix milliseconds), summed over all Kafka partitions.
pub type PaneSums = BTreeMap<(String, i64), Sum>;

/// The unvalidated parameters of a query. Durations are texts such as `5m`.
#[derive(Debug, Clone, Copy, Default)]
pub struct WindowParameters<'a> {
    /// Length of a window. Defaults to the pane length.
    pub size: Option<&'a str>,
    /// Distance between the starts of two windows. Defaults to `size`, which gives tumbling windows.
    pub slide: Option<&'a str>,
    /// Group-by column. `None` counts all events in one group.
    pub by: Option<&'a str>,
    /// Time span to query, up to now. Defaults to one hour.
    pub last: Option<&'a str>,
}

/// A validated query for windows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WindowQuery {
    /// Length of a window in milliseconds, a multiple of the pane.
    pub size_ms: i64,
    /// Distance between the starts of two windows in milliseconds. Windows tumble if it equals `size_ms`.
    pub slide_ms: i64,
    /// Group-by column, or [`ALL`].
    pub dimension: String,
    /// Start of the first window in Unix milliseconds, a multiple of the slide.
    pub from_ms: i64,
    /// All windows start before this time, in Unix milliseconds.
    pub to_ms: i64,
}

/// Why a query is invalid, and which values are allowed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidWindowQuery(String);

/// One window of one group.
#[derive(Debug, Clone, PartialEq)]
pub struct Window {
    /// First millisecond of the window, as Unix time.
    pub start_ms: i64,
    /// First millisecond after the window, as Unix time.
    pub end_ms: i64,
    /// Value of the group, or [`ALL`].
    pub value: String,
    /// Event count and measures.
    pub sum: Sum,
}

impl WindowQuery {
    /// Validates durations and column against the stream, and the amount of work against the limits. `partitions` is
    /// the number of Kafka partitions of the stream.
    pub fn new(
        definition: &Definition,
        partitions: i32,
        parameters: &WindowParameters<'_>,
        now_ms: i64,
    ) -> Result<WindowQuery, InvalidWindowQuery> {
        let length = |name: &str, text: Option<&str>, default: i64| {
            text.map_or(Ok(default), |text| length_ms(name, text))
        };
        let size_ms = length("size", parameters.size, definition.windows.pane_ms)?;
        let slide_ms = length("slide", parameters.slide, size_ms)?;
        let last_ms = length("last", parameters.last, DEFAULT_LAST_MS)?;
        check_lengths(definition, size_ms, slide_ms)?;
        let group_by = &definition.windows.group_by;
        let groups = match parameters.by.filter(|by| !by.is_empty()) {
            None => 1,
            Some(by) => group_by.iter().find(|g| g.column == by).map(GroupBy::len).ok_or_else(|| {
                let known: Vec<&str> = group_by.iter().map(|g| g.column.as_str()).collect();
                let known = known.join(", ");
                InvalidWindowQuery(format!(
                    "by `{by}`: not a group-by column of the stream; use one of {known}"
                ))
            })?,
        };
        let query = WindowQuery {
            size_ms,
            slide_ms,
            dimension: parameters.by.unwrap_or(ALL).to_owned(),
            from_ms: floor_to(now_ms.saturating_sub(last_ms), slide_ms),
            to_ms: now_ms,
        };
        query.check_work(definition, groups as i64, i64::from(partitions))?;
        Ok(query)
    }

    fn check_work(
        &self,
        definition: &Definition,
        groups: i64,
        partitions: i64,
    ) -> Result<(), InvalidWindowQuery> {
        let span = self.panes();
        let windows = (self.to_ms - self.from_ms) / self.slide_ms + 1;
        let panes = (span.end - span.start) / definition.windows.pane_ms + 1;
        let values = groups.saturating_mul(1 + definition.windows.measures.len() as i64);
        let answered = windows.saturating_mul(values);
        let read = panes.saturating_mul(values).saturating_mul(partitions);
        if answered <= MAX_ANSWERED_VALUES && read <= MAX_READ_VALUES {
            return Ok(());
        }
        Err(InvalidWindowQuery(format!(
            "{windows} windows over {panes} panes of {groups} groups would read {read} values and return {answered}; \
             the limits are {MAX_READ_VALUES} and {MAX_ANSWERED_VALUES}: ask for a shorter span, a longer slide or \
             fewer groups"
        )))
    }

    /// The time span of the panes that the windows need, in Unix milliseconds.
    pub fn panes(&self) -> std::ops::Range<i64> {
        self.from_ms..self.to_ms.saturating_add(self.size_ms)
    }

    /// Computes all windows that contain events, ordered by start and group.
    pub fn answer(&self, panes: &PaneSums) -> Vec<Window> {
        let mut windows = Vec::new();
        let mut panes = panes.iter().peekable();
        while let Some(((value, _), _)) = panes.peek() {
            let value = value.as_str();
            let mut of_group = std::iter::from_fn(|| {
                panes.next_if(|((of, _), _)| of == value).map(|((_, start_ms), sum)| (*start_ms, sum))
            })
            .peekable();
            let mut sliding = Sliding::default();
            let mut start_ms = self.from_ms;
            while start_ms < self.to_ms {
                let end_ms = start_ms + self.size_ms;
                while let Some((at, sum)) = of_group.next_if(|(at, _)| *at < end_ms) {
                    sliding.push(at, sum);
                }
                sliding.drop_before(start_ms);
                if let Some(sum) = sliding.sum() {
                    windows.push(Window { start_ms, end_ms, value: value.to_owned(), sum });
                }
                start_ms += self.slide_ms;
            }
            // Skip the panes after the last window.
            of_group.for_each(drop);
        }
        windows.sort_by(|a, b| (a.start_ms, &a.value).cmp(&(b.start_ms, &b.value)));
        windows
    }
}

fn check_lengths(definition: &Definition, size_ms: i64, slide_ms: i64) -> Result<(), InvalidWindowQuery> {
    let pane_ms = definition.windows.pane_ms;
    for (name, value) in [("size", size_ms), ("slide", slide_ms)] {
        if value <= 0 || value % pane_ms != 0 {
            return Err(InvalidWindowQuery(format!(
                "{name} of {value} ms: must be a multiple of the pane, {pane_ms} ms"
            )));
        }
    }
    if slide_ms > size_ms {
        return Err(InvalidWindowQuery(format!(
            "slide of {slide_ms} ms: must not be longer than the size of {size_ms} ms, or some events would be in no \
             window"
        )));
    }
    Ok(())
}

/// The sum of the panes in a span that only moves forward. Adds each pane a constant number of times, however many
/// windows contain it. Never subtracts: floats would lose precision, and minimum and maximum cannot be subtracted.
#[derive(Default)]
struct Sliding<'a> {
    /// The older panes, oldest last. Each sum includes the pane itself and all newer panes of this list.
    older: Vec<(i64, Sum)>,
    /// The panes added since `older` was last rebuilt, oldest first.
    newer: Vec<(i64, &'a Sum)>,
    sum_of_newer: Sum,
}

impl<'a> Sliding<'a> {
    fn push(&mut self, start_ms: i64, sum: &'a Sum) {
        self.sum_of_newer.add(sum);
        self.newer.push((start_ms, sum));
    }

    fn drop_before(&mut self, start_ms: i64) {
        while self.older.pop_if(|(at, _)| *at < start_ms).is_some() {}
        if !self.older.is_empty() {
            return;
        }
        let kept = self.newer.partition_point(|(at, _)| *at < start_ms);
        if kept == 0 {
            return;
        }
        let mut sum = Sum::default();
        for (at, pane) in self.newer.drain(..).skip(kept).rev() {
            sum.add(pane);
            self.older.push((at, sum.clone()));
        }
        self.sum_of_newer = Sum::default();
    }

    /// `None` if the span contains no pane.
    fn sum(&self) -> Option<Sum> {
        if self.newer.is_empty() {
            return self.older.last().map(|(_, sum)| sum.clone());
        }
        let mut sum = self.older.last().map_or_else(Sum::default, |(_, sum)| sum.clone());
        sum.add(&self.sum_of_newer);
        Some(sum)
    }
}

/// Parses a duration such as `90s`, `5m` or `1h 30m` into milliseconds. `name` is the parameter that the error names.
pub fn length_ms(name: &str, text: &str) -> Result<i64, InvalidWindowQuery> {
    let invalid = || {
        InvalidWindowQuery(format!(
            "{name} `{text}`: must be a duration of at most 366 days, such as 90s, 5m or 1h"
        ))
    };
    let length = humantime::parse_duration(text).map_err(|_| invalid())?;
    i64::try_from(length.as_millis()).ok().filter(|ms| *ms <= MAX_LENGTH_MS).ok_or_else(invalid)
}

/// Converts windows to JSON, with named measures. A window is `complete`, which means that it no longer changes, if it
/// ends at or before `settled_ms`.
pub fn to_json(windows: &[Window], definition: &Definition, settled_ms: Option<i64>) -> serde_json::Value {
    let time = |ms: i64| {
        let at = chrono::DateTime::from_timestamp_millis(ms);
        at.map(|at| at.to_rfc3339_opts(chrono::SecondsFormat::Secs, true))
    };
    let one = |window: &Window| {
        let measures = definition.windows.measures.iter().zip(&window.sum.measures).map(|(name, m)| {
            let values = serde_json::json!({
                "count": m.count, "sum": m.sum, "min": m.min, "max": m.max, "average": m.average()
            });
            (name.clone(), values)
        });
        serde_json::json!({
            "start": time(window.start_ms), "end": time(window.end_ms), "value": window.value, "count": window.sum.count,
            "measures": measures.collect::<serde_json::Map<_, _>>(),
            "complete": settled_ms.is_some_and(|settled| window.end_ms <= settled),
        })
    };
    windows.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MINUTE: i64 = 60_000;

    fn definition() -> Definition {
        Definition::parse("users", include_str!("../../../../streams/user_created.toml")).unwrap()
    }

    fn validated(parameters: WindowParameters<'_>) -> Result<WindowQuery, InvalidWindowQuery> {
        WindowQuery::new(&definition(), 6, &parameters, 10_000 * MINUTE)
    }

    fn query(size: i64, slide: i64, from: i64, to: i64) -> WindowQuery {
        let (size_ms, slide_ms) = (size * MINUTE, slide * MINUTE);
        let dimension = ALL.to_owned();
        WindowQuery { size_ms, slide_ms, dimension, from_ms: from * MINUTE, to_ms: to * MINUTE }
    }

    fn sum(values: &[f64]) -> Sum {
        let fold = |pick: fn(f64, f64) -> f64| values.iter().copied().reduce(pick);
        let measure = Measure {
            count: values.len() as i64,
            sum: values.iter().sum(),
            min: fold(f64::min),
            max: fold(f64::max),
        };
        Sum { count: values.len() as i64, measures: vec![measure] }
    }

    #[test]
    fn an_invalid_query_is_rejected_with_the_allowed_values() {
        let check = |parameters: WindowParameters<'_>, part: &str| {
            let error = validated(parameters).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        };
        let sized = |size, slide| WindowParameters {
            size: Some(size),
            slide: Some(slide),
            ..WindowParameters::default()
        };
        check(sized("90s", "90s"), "multiple of the pane, 60000 ms");
        check(sized("1m", "0s"), "slide of 0 ms");
        check(sized("1m", "2m"), "in no window");
        check(sized("a while", "1m"), "`a while`");
        check(sized("900y", "1m"), "`900y`");
        check(WindowParameters { by: Some("shoe_size"), ..WindowParameters::default() }, "nationality");
        let by_age = WindowParameters { by: Some("age"), last: Some("5d"), ..WindowParameters::default() };
        check(by_age, "7201 windows over 7202 panes of 11 groups");
        check(
            WindowParameters { size: Some("300d"), slide: Some("1d"), ..WindowParameters::default() },
            "shorter span",
        );
    }

    #[test]
    fn a_query_is_limited_by_its_windows_panes_groups_and_partitions() {
        let check = |parameters: WindowParameters<'_>, partitions: i32, accepted: bool| {
            let query = WindowQuery::new(&definition(), partitions, &parameters, 10_000 * MINUTE);
            assert_eq!(query.is_ok(), accepted, "{parameters:?} {partitions}: {query:?}");
        };
        let of =
            |by, slide, last| WindowParameters { size: Some("1h"), slide: Some(slide), by, last: Some(last) };
        check(of(None, "1m", "6d"), 6, true);
        check(of(None, "1m", "6d"), 256, false);
        check(of(Some("nationality"), "1m", "6d"), 6, false);
        check(of(Some("nationality"), "1h", "6d"), 6, true);
        check(of(Some("nationality"), "1h", "6d"), 12, false);
        check(of(Some("gender"), "1m", "4d"), 6, true);
    }

    #[test]
    fn a_sliding_window_is_the_sum_of_its_panes() {
        let query = query(3, 1, 5, 7);
        assert_eq!(query.panes(), 5 * MINUTE..10 * MINUTE);
        let panes = (0..12).map(|n| ((String::new(), n * MINUTE), sum(&[n as f64]))).collect();
        let answer = query.answer(&panes);
        assert_eq!(answer.iter().map(|w| w.start_ms / MINUTE).collect::<Vec<_>>(), [5, 6]);
        assert_eq!(answer[0].sum, sum(&[5.0, 6.0, 7.0]));
        assert_eq!(answer[0].sum.measures[0].average(), Some(6.0));
    }

    #[test]
    fn a_window_without_a_value_has_no_average() {
        let mut empty = Sum { count: 2, measures: vec![Measure::default()] };
        empty.add(&Sum { count: 1, measures: vec![Measure::default()] });
        assert_eq!((empty.count, empty.measures[0].average(), empty.measures[0].min), (3, None, None));
    }

    proptest! {
        #[test]
        fn a_window_contains_exactly_the_events_of_its_span_and_group(
            events in proptest::collection::vec((0i64..60, 0u8..3, -50i32..50), 0..100),
            slide in 1i64..6, more in 0i64..12,
        ) {
            let (size, groups) = (slide + more, ["0", "1", "2"]);
            let query = query(size, slide, -size, 60);
            let mut panes = PaneSums::new();
            for (minute, group, value) in &events {
                panes.entry((group.to_string(), minute * MINUTE)).or_default().add(&sum(&[f64::from(*value)]));
            }
            let mut expected = Vec::new();
            for start in (-size..60).step_by(slide as usize) {
                for value in groups {
                    let inside = |(minute, group, _): &&(i64, u8, i32)| {
                        (start..start + size).contains(minute) && group.to_string() == value
                    };
                    let values: Vec<f64> = events.iter().filter(inside).map(|(_, _, v)| f64::from(*v)).collect();
                    if !values.is_empty() {
                        let (start_ms, end_ms) = (start * MINUTE, (start + size) * MINUTE);
                        expected.push(Window { start_ms, end_ms, value: value.to_owned(), sum: sum(&values) });
                    }
                }
            }
            prop_assert_eq!(query.answer(&panes), expected);
        }
    }
}
