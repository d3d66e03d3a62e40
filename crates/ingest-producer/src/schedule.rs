//! Divides time into half-open intervals by a schedule, also across changes of the schedule. Pure. `planner.rs`
//! decides what to do with an interval.

use chrono::{DateTime, Utc};
use chrono_tz::Tz;
use common::contracts::run_ledger::Interval;
use common::contracts::stream::Schedule;
use croner::Cron;
use croner::parser::{CronParser, Seconds, Year};
use serde::{Deserialize, Serialize};

/// An invalid schedule.
#[derive(Debug, thiserror::Error)]
pub enum ScheduleError {
    /// The cron expression is invalid.
    #[error("schedule.cron `{expression}`: {cause}; use five fields such as `*/5 * * * *`")]
    Cron {
        /// The expression in the definition.
        expression: String,
        /// The parser's error.
        cause: String,
    },
    /// The stored schedules cannot be parsed.
    #[error("stream_state.schedules: {0}; another version of the producer may have written it")]
    History(String),
}

/// The boundaries of one schedule.
#[derive(Debug, Clone)]
enum Tiling {
    Every(i64),
    Cron(Box<Cron>, Tz),
}

impl Tiling {
    fn new(schedule: &Schedule) -> Result<Tiling, ScheduleError> {
        let (expression, zone) = match schedule {
            Schedule::Every(ms) => return Ok(Tiling::Every(*ms)),
            Schedule::Cron { expression, zone } => (expression, *zone),
        };
        let failed = |cause: String| ScheduleError::Cron { expression: expression.clone(), cause };
        let parser = CronParser::builder().seconds(Seconds::Disallowed).year(Year::Disallowed).build();
        let cron = parser.parse(expression).map_err(|e| failed(e.to_string()))?;
        cron.find_next_occurrence(&DateTime::<Utc>::UNIX_EPOCH, false).map_err(|e| failed(e.to_string()))?;
        Ok(Tiling::Cron(Box::new(cron), zone))
    }

    /// The last boundary at or before `at_ms`, or `i64::MIN` if none exists.
    fn floor(&self, at_ms: i64) -> i64 {
        match self {
            Tiling::Every(length) => common::contracts::event::floor_to(at_ms, *length),
            Tiling::Cron(cron, zone) => {
                // Boundaries are whole seconds. Without rounding, the search would skip the second that contains `at`.
                let at = time(common::contracts::event::floor_to(at_ms, 1000), *zone);
                cron.find_previous_occurrence(&at, true).map_or(i64::MIN, |found| found.timestamp_millis())
            }
        }
    }

    /// The first boundary after `at_ms`, or `i64::MAX` if none exists.
    fn next(&self, at_ms: i64) -> i64 {
        match self {
            Tiling::Every(length) => common::contracts::event::floor_to(at_ms, *length) + length,
            Tiling::Cron(cron, zone) => {
                let at = time(common::contracts::event::floor_to(at_ms, 1000), *zone);
                cron.find_next_occurrence(&at, false).map_or(i64::MAX, |found| found.timestamp_millis())
            }
        }
    }
}

fn time(ms: i64, zone: Tz) -> DateTime<Tz> {
    DateTime::from_timestamp_millis(ms).unwrap_or_default().with_timezone(&zone)
}

/// A schedule and the time from which it applies.
#[derive(Debug, Clone)]
struct Era {
    from_ms: i64,
    schedule: Schedule,
    tiling: Tiling,
}

/// All schedules that a stream has had. Each applies until the next one starts, so that a change of the schedule never
/// moves the bounds of intervals in the ledger.
#[derive(Debug, Clone)]
pub struct Timeline {
    /// Ascending, never empty.
    eras: Vec<Era>,
}

/// One era as stored in `stream_state.schedules`.
#[derive(Debug, Serialize, Deserialize)]
struct StoredEra {
    from_ms: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    every_ms: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cron: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    zone: Option<Tz>,
}

impl StoredEra {
    fn schedule(self) -> Result<Schedule, ScheduleError> {
        match (self.every_ms, self.cron) {
            (Some(ms), None) if ms > 0 => Ok(Schedule::Every(ms)),
            (None, Some(expression)) => Ok(Schedule::Cron { expression, zone: self.zone.unwrap_or(Tz::UTC) }),
            _ => Err(ScheduleError::History("an era without a schedule".to_owned())),
        }
    }
}

impl Timeline {
    /// The timeline of a new stream. It starts `catch_up` intervals before `now_ms`, but not before `start_ms`.
    pub fn first(
        schedule: &Schedule,
        start_ms: Option<i64>,
        catch_up: u32,
        now_ms: i64,
    ) -> Result<Timeline, ScheduleError> {
        let tiling = Tiling::new(schedule)?;
        let mut from_ms = tiling.floor(now_ms);
        for _ in 0..catch_up {
            from_ms = tiling.floor(from_ms - 1);
        }
        // If the start is between two boundaries, the first interval is shorter.
        let from_ms = from_ms.max(start_ms.unwrap_or(i64::MIN)).max(0);
        Ok(Timeline { eras: vec![Era { from_ms, schedule: schedule.clone(), tiling }] })
    }

    /// Parses the output of [`Timeline::to_json`].
    pub fn from_json(text: &str) -> Result<Timeline, ScheduleError> {
        let stored: Vec<StoredEra> =
            serde_json::from_str(text).map_err(|e| ScheduleError::History(e.to_string()))?;
        let eras: Result<Vec<Era>, ScheduleError> = stored
            .into_iter()
            .map(|era| {
                let from_ms = era.from_ms;
                let schedule = era.schedule()?;
                Ok(Era { from_ms, tiling: Tiling::new(&schedule)?, schedule })
            })
            .collect();
        let eras = eras?;
        if eras.is_empty() || eras.windows(2).any(|pair| pair[0].from_ms >= pair[1].from_ms) {
            return Err(ScheduleError::History("eras are not in order".to_owned()));
        }
        Ok(Timeline { eras })
    }

    /// Serializes the timeline for `stream_state.schedules`.
    pub fn to_json(&self) -> String {
        let stored = |era: &Era| {
            let (every_ms, cron, zone) = match &era.schedule {
                Schedule::Every(ms) => (Some(*ms), None, None),
                // UTC is left out, as in timelines that were stored before a schedule could have a time zone.
                Schedule::Cron { expression, zone } => {
                    (None, Some(expression.clone()), Some(*zone).filter(|zone| *zone != Tz::UTC))
                }
            };
            StoredEra { from_ms: era.from_ms, every_ms, cron, zone }
        };
        serde_json::json!(self.eras.iter().map(stored).collect::<Vec<_>>()).to_string()
    }

    /// Whether `schedule` is the current one.
    pub fn ends_with(&self, schedule: &Schedule) -> bool {
        self.eras.last().is_some_and(|era| era.schedule == *schedule)
    }

    /// This timeline with another schedule from `from_ms` on, which is the end of the last interval in the ledger.
    pub fn changed(&self, schedule: &Schedule, from_ms: i64) -> Result<Timeline, ScheduleError> {
        let mut eras: Vec<Era> = self.eras.iter().filter(|era| era.from_ms < from_ms).cloned().collect();
        let from_ms = if eras.is_empty() { self.start_ms() } else { from_ms };
        eras.push(Era { from_ms, schedule: schedule.clone(), tiling: Tiling::new(schedule)? });
        Ok(Timeline { eras })
    }

    /// Start of the first interval.
    pub fn start_ms(&self) -> i64 {
        self.eras.first().map_or(0, |era| era.from_ms)
    }

    /// The interval that contains `at_ms`. Times before the start follow the first schedule, so that a backfill can
    /// use them.
    pub fn containing(&self, at_ms: i64) -> Interval {
        let index = self.eras.iter().rposition(|era| era.from_ms <= at_ms);
        let (lowest, tiling, next_era) = match index {
            Some(i) => (self.eras[i].from_ms, &self.eras[i].tiling, self.eras.get(i + 1)),
            None => (i64::MIN, &self.eras[0].tiling, self.eras.first()),
        };
        let highest = next_era.map_or(i64::MAX, |era| era.from_ms);
        Interval { start_ms: tiling.floor(at_ms).max(lowest), end_ms: tiling.next(at_ms).min(highest) }
    }

    /// Up to `limit` intervals that start at or after `from_ms` and end at or before `until_ms`, oldest first.
    pub fn ended(&self, from_ms: i64, until_ms: i64, limit: usize) -> Vec<Interval> {
        let mut found = Vec::new();
        let mut at_ms = from_ms;
        while found.len() < limit && at_ms < until_ms {
            let interval = self.containing(at_ms);
            if interval.end_ms > until_ms {
                break;
            }
            if interval.start_ms >= from_ms {
                found.push(interval);
            }
            at_ms = interval.end_ms;
        }
        found
    }

    /// Start of the interval `count` intervals before the one that contains `at_ms`, but not before the timeline's
    /// start.
    pub fn back(&self, at_ms: i64, count: u32) -> i64 {
        let mut start_ms = self.containing(at_ms).start_ms;
        for _ in 0..count {
            if start_ms <= self.start_ms() {
                break;
            }
            start_ms = self.containing(start_ms - 1).start_ms;
        }
        start_ms.max(self.start_ms())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ms(text: &str) -> i64 {
        DateTime::parse_from_rfc3339(text).unwrap().timestamp_millis()
    }

    fn cron(expression: &str) -> Schedule {
        cron_in(expression, Tz::UTC)
    }

    fn cron_in(expression: &str, zone: Tz) -> Schedule {
        Schedule::Cron { expression: expression.to_owned(), zone }
    }

    fn check(schedule: &Schedule, at: &str, start: &str, end: &str) {
        let found = Timeline::first(schedule, None, 0, ms(at)).unwrap().containing(ms(at));
        assert_eq!(found, Interval { start_ms: ms(start), end_ms: ms(end) }, "{schedule:?} at {at}");
    }

    #[test]
    fn an_interval_spans_from_one_occurrence_to_the_next() {
        let minute = Schedule::Every(60_000);
        check(&minute, "2026-01-31T23:59:59.999Z", "2026-01-31T23:59:00Z", "2026-02-01T00:00:00Z");
        check(&minute, "2026-02-01T00:00:00Z", "2026-02-01T00:00:00Z", "2026-02-01T00:01:00Z");
        let two = cron("*/2 * * * *");
        check(&two, "2026-01-01T00:01:59.999Z", "2026-01-01T00:00:00Z", "2026-01-01T00:02:00Z");
        check(&two, "2026-01-01T00:02:00.001Z", "2026-01-01T00:02:00Z", "2026-01-01T00:04:00Z");
        check(&cron("0 0 1 * *"), "2028-02-29T12:00:00Z", "2028-02-01T00:00:00Z", "2028-03-01T00:00:00Z");
        check(&cron("30 2 * * *"), "2026-03-29T02:29:59Z", "2026-03-28T02:30:00Z", "2026-03-29T02:30:00Z");
        check(
            &cron("0 9 * * MON-FRI"),
            "2026-01-03T12:00:00Z",
            "2026-01-02T09:00:00Z",
            "2026-01-05T09:00:00Z",
        );
    }

    #[test]
    fn a_day_of_a_time_zone_can_have_23_or_25_hours() {
        let berlin = cron_in("0 0 * * *", Tz::Europe__Berlin);
        check(&berlin, "2026-03-29T12:00:00Z", "2026-03-28T23:00:00Z", "2026-03-29T22:00:00Z");
        check(&berlin, "2026-10-25T12:00:00Z", "2026-10-24T22:00:00Z", "2026-10-25T23:00:00Z");
        // 02:30 does not exist on one day, and exists twice on another.
        let night = cron_in("30 2 * * *", Tz::Europe__Berlin);
        check(&night, "2026-03-28T12:00:00Z", "2026-03-28T01:30:00Z", "2026-03-29T01:00:00Z");
        check(&night, "2026-10-25T12:00:00Z", "2026-10-25T00:30:00Z", "2026-10-26T01:30:00Z");
    }

    #[test]
    fn a_new_timeline_starts_in_the_past_but_not_before_its_start_date() {
        let now = ms("2026-01-01T00:10:30Z");
        let minute = Schedule::Every(60_000);
        let timeline = Timeline::first(&minute, None, 3, now).unwrap();
        assert_eq!(timeline.ended(timeline.start_ms(), now, 100).len(), 3);
        let start = ms("2026-01-01T00:09:30Z");
        let timeline = Timeline::first(&minute, Some(start), 3, now).unwrap();
        let first = Interval { start_ms: start, end_ms: ms("2026-01-01T00:10:00Z") };
        assert_eq!(
            timeline.ended(start, now, 100),
            [first],
            "a start within a minute shortens the first interval"
        );
    }

    #[test]
    fn invalid_cron_expressions_are_rejected() {
        for wrong in ["", "* * * *", "0 0 30 2 *", "* * * * * *", "61 * * * *"] {
            let error = Timeline::first(&cron(wrong), None, 1, 0).expect_err(wrong).to_string();
            assert!(error.starts_with(&format!("schedule.cron `{wrong}`")), "{error}");
        }
    }

    #[test]
    fn a_changed_schedule_starts_where_the_ledger_ends() {
        let now = ms("2026-01-01T00:10:30Z");
        let old = Timeline::first(&Schedule::Every(60_000), None, 5, now).unwrap();
        let new = old.changed(&Schedule::Every(300_000), ms("2026-01-01T00:08:00Z")).unwrap();
        let intervals = new.ended(new.start_ms(), ms("2026-01-01T00:20:00Z"), 100);
        let ended: Vec<i64> = intervals.iter().map(|i| i.end_ms / 60_000 % 60).collect();
        assert_eq!(ended, [6, 7, 8, 10, 15, 20]);
        assert!(new.ends_with(&Schedule::Every(300_000)));
    }

    fn schedules() -> impl Strategy<Value = Schedule> {
        let crons = [
            "* * * * *",
            "*/7 * * * *",
            "0 * * * *",
            "30 2 * * *",
            "0 0 1 * *",
            "15 6 * * SUN",
            "0 0 29 2 *",
        ];
        let zones = vec![
            Tz::UTC,
            Tz::Europe__Berlin,
            Tz::America__New_York,
            Tz::Australia__Lord_Howe,
            Tz::Asia__Kathmandu,
        ];
        prop_oneof![
            (1i64..100_000_000).prop_map(Schedule::Every),
            (prop::sample::select(crons.to_vec()), prop::sample::select(zones))
                .prop_map(|(c, zone)| cron_in(c, zone))
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn intervals_have_neither_gaps_nor_overlaps_across_changes(
            first in schedules(),
            changes in prop::collection::vec((schedules(), 0usize..8), 0..4),
            now in 1_500_000_000_000i64..2_000_000_000_000,
        ) {
            let mut timeline = Timeline::first(&first, None, 3, now).unwrap();
            let mut changed_at = timeline.start_ms();
            for (schedule, after) in changes {
                for _ in 0..after {
                    changed_at = timeline.containing(changed_at).end_ms;
                }
                timeline = timeline.changed(&schedule, changed_at).unwrap();
            }
            let timeline = Timeline::from_json(&timeline.to_json()).unwrap();
            let mut at = timeline.start_ms();
            for _ in 0..40 {
                let interval = timeline.containing(at);
                prop_assert_eq!(interval.start_ms, at, "an interval starts where the previous one ended");
                prop_assert!(interval.end_ms > at);
                for inside in [at, at + (interval.end_ms - at) / 2, interval.end_ms - 1] {
                    prop_assert_eq!(timeline.containing(inside), interval);
                }
                at = interval.end_ms;
            }
        }

        #[test]
        fn times_before_the_start_have_intervals_too(schedule in schedules(), back in 1i64..10_000_000_000) {
            let timeline = Timeline::first(&schedule, None, 0, 1_700_000_000_000).unwrap();
            let before = timeline.containing(timeline.start_ms() - back);
            prop_assert!(before.end_ms <= timeline.start_ms());
            prop_assert!(before.start_ms <= timeline.start_ms() - back && timeline.start_ms() - back < before.end_ms);
        }
    }
}
