//! Readers' windows: tumbling and sliding ones of any multiple of the pane, each the sum of its panes. Pure; reading pane rows is
//! [`crate::pane_reader`]'s.

use crate::event::floor_to;
use crate::stream::{ALL, Definition};
use serde::Serialize;
use std::collections::BTreeMap;

/// Most panes one question may cover: a week of minutes.
pub const MAX_PANES: i64 = 7 * 24 * 60;
/// Longest length: far more than [`MAX_PANES`] allow, far less than overflows.
const MAX_LENGTH_MS: i64 = 366 * 86_400_000;
/// Most windows one answer may hold, per group.
pub const MAX_WINDOWS: i64 = 2000;

/// One measure of a window, or of a pane row.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Measure {
    /// Events that have the column.
    pub count: i64,
    /// Their sum.
    pub sum: f64,
    /// Their least value; `None`: no event has the column.
    pub min: Option<f64>,
    /// Their greatest value.
    pub max: Option<f64>,
}

impl Measure {
    /// Their mean; `None`: no event has the column.
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

/// Events and measures of one group in a span of time.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Sum {
    /// Events.
    pub count: i64,
    /// In the definition's order of measures.
    pub measures: Vec<Measure>,
}

impl Sum {
    /// Adds what another pane or partition counted.
    pub fn add(&mut self, other: &Sum) {
        self.count += other.count;
        self.measures.resize(self.measures.len().max(other.measures.len()), Measure::default());
        self.measures.iter_mut().zip(&other.measures).for_each(|(mine, theirs)| mine.add(theirs));
    }
}

/// Panes by group and start, summed over the Kafka partitions.
pub type Panes = BTreeMap<(String, i64), Sum>;

/// Which windows are asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// Length of a window in milliseconds, a multiple of the pane.
    pub size_ms: i64,
    /// From one window's start to the next one's; as long as the window itself: tumbling.
    pub slide_ms: i64,
    /// Group-by column, or [`ALL`].
    pub dimension: String,
    /// First window's start: aligned to the slide.
    pub from_ms: i64,
    /// No window begins here or later.
    pub to_ms: i64,
}

/// What cannot be asked, and what can.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Unanswerable(String);

/// One window of one group.
#[derive(Debug, Clone, PartialEq)]
pub struct Window {
    /// First millisecond.
    pub start_ms: i64,
    /// First millisecond after it.
    pub end_ms: i64,
    /// The group's value; [`ALL`]: every event.
    pub value: String,
    /// What happened in it.
    pub sum: Sum,
}

impl Question {
    /// Checks lengths and column against the stream, and aligns the span `[from_ms, to_ms)` to the slide.
    pub fn new(
        definition: &Definition,
        (size_ms, slide_ms): (i64, i64),
        by: Option<&str>,
        (from_ms, to_ms): (i64, i64),
    ) -> Result<Question, Unanswerable> {
        let pane_ms = definition.windows.pane_ms;
        let wrong = |text: String| Err(Unanswerable(text));
        for (name, value) in [("size", size_ms), ("slide", slide_ms)] {
            if value <= 0 || value % pane_ms != 0 {
                return wrong(format!("{name} of {value} ms: must be a multiple of the pane, {pane_ms} ms"));
            }
        }
        if slide_ms > size_ms {
            return wrong(format!(
                "slide of {slide_ms} ms: longer than the window's {size_ms} ms, so events between would be in none"
            ));
        }
        let columns: Vec<&str> = definition.windows.group_by.iter().map(|g| g.column.as_str()).collect();
        if let Some(by) = by.filter(|by| !columns.contains(by)) {
            let known = columns.join(", ");
            return wrong(format!("by `{by}`: no group-by column of the stream; one of {known}"));
        }
        let (from_ms, to_ms) = (floor_to(from_ms, slide_ms), to_ms.max(from_ms));
        let (windows, panes) = ((to_ms - from_ms) / slide_ms, (to_ms + size_ms - from_ms) / pane_ms);
        if windows > MAX_WINDOWS || panes > MAX_PANES {
            return wrong(format!(
                "{windows} windows over {panes} panes: at most {MAX_WINDOWS} and {MAX_PANES}; ask for a shorter span or a longer slide"
            ));
        }
        let dimension = by.unwrap_or(ALL).to_owned();
        Ok(Question { size_ms, slide_ms, dimension, from_ms, to_ms })
    }

    /// The span of the panes that its windows need.
    pub fn panes(&self) -> std::ops::Range<i64> {
        self.from_ms..self.to_ms + self.size_ms
    }

    /// The windows in which anything happened, by start and group.
    pub fn answer(&self, panes: &Panes) -> Vec<Window> {
        let mut windows: BTreeMap<(i64, &str), Sum> = BTreeMap::new();
        for ((value, pane_start), sum) in panes {
            // The latest window that holds the pane, then each one before it that still does.
            let mut start = floor_to(*pane_start, self.slide_ms);
            while start + self.size_ms > *pane_start {
                if (self.from_ms..self.to_ms).contains(&start) {
                    windows.entry((start, value)).or_default().add(sum);
                }
                start -= self.slide_ms;
            }
        }
        windows
            .into_iter()
            .map(|((start_ms, value), sum)| Window {
                start_ms,
                end_ms: start_ms + self.size_ms,
                value: value.to_owned(),
                sum,
            })
            .collect()
    }
}

/// A length as people write it, such as `90s`, `5m` or `1h 30m`, in milliseconds.
pub fn length_ms(name: &str, text: &str) -> Result<i64, Unanswerable> {
    let wrong = || Unanswerable(format!("{name} `{text}`: no length such as 90s, 5m or 1h"));
    let length = humantime::parse_duration(text).map_err(|_| wrong())?;
    i64::try_from(length.as_millis()).ok().filter(|ms| *ms <= MAX_LENGTH_MS).ok_or_else(wrong)
}

/// Windows as JSON, with names of measures and whether they may still change: `complete` where the window ends before `settled_ms`.
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
        Definition::parse("users", include_str!("../../../streams/user_created.toml")).unwrap()
    }

    fn ask(size: i64, slide: i64, by: Option<&str>, span: (i64, i64)) -> Result<Question, Unanswerable> {
        Question::new(&definition(), (size, slide), by, span)
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
    fn what_cannot_be_asked_is_named_with_what_can() {
        let check = |asked: Result<Question, Unanswerable>, part: &str| {
            let error = asked.unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        };
        check(ask(90_000, 90_000, None, (0, MINUTE)), "multiple of the pane, 60000 ms");
        check(ask(MINUTE, 0, None, (0, MINUTE)), "slide of 0 ms");
        check(ask(MINUTE, 2 * MINUTE, None, (0, MINUTE)), "in none");
        check(ask(MINUTE, MINUTE, Some("shoe_size"), (0, MINUTE)), "nationality");
        check(ask(MINUTE, MINUTE, None, (0, 3000 * MINUTE)), "3000 windows");
        assert_eq!(length_ms("size", "90s"), Ok(90_000));
        assert!(length_ms("size", "a while").unwrap_err().to_string().contains("`a while`"));
        assert!(length_ms("size", "900y").is_err());
    }

    #[test]
    fn a_sliding_window_is_the_sum_of_its_panes() {
        let question = ask(3 * MINUTE, MINUTE, None, (5 * MINUTE, 7 * MINUTE)).unwrap();
        assert_eq!(question.panes(), 5 * MINUTE..10 * MINUTE);
        let panes = (0..12).map(|n| ((String::new(), n * MINUTE), sum(&[n as f64]))).collect();
        let answer = question.answer(&panes);
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
        fn every_event_is_in_as_many_windows_as_slides_fit_into_one(
            events in proptest::collection::vec((0i64..60, 0u8..3), 0..100),
            slide in 1i64..6, factor in 1i64..4,
        ) {
            let (slide_ms, size_ms) = (slide * MINUTE, slide * factor * MINUTE);
            let question = ask(size_ms, slide_ms, None, (-size_ms, 60 * MINUTE)).unwrap();
            let mut panes = Panes::new();
            for (minute, group) in &events {
                panes.entry((group.to_string(), minute * MINUTE)).or_default().add(&sum(&[1.0]));
            }
            let windows = question.answer(&panes);
            let counted: i64 = windows.iter().map(|w| w.sum.count).sum();
            prop_assert_eq!(counted, factor * events.len() as i64);
            for window in windows {
                let span = window.start_ms..window.end_ms;
                let inside = events.iter().filter(|(m, g)| span.contains(&(m * MINUTE)) && g.to_string() == window.value);
                prop_assert_eq!(window.sum.count, inside.count() as i64);
            }
        }
    }
}
