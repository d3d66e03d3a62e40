//! Parses a stream file and collects all mistakes instead of stopping at the first. `rules.rs` contains the rules that
//! involve several keys.

mod section;
mod source;

use super::duration::parse_duration;
use super::{
    Column, ContentMode, CqlType, Definition, DefinitionError, EventMapping, EventTime, GroupBy, Groups,
    MAX_GROUP_BY, MAX_GROUPS, OnMisfit, RetryPolicy, Schedule, StoreSettings, StreamSettings, Windows, rules,
};
use crate::contracts::event::{Bucket, DAY_MS, DEFAULT_AHEAD_MS};
use crate::contracts::time::{TimeReading, TimeUnit, is_format};
use chrono_tz::Tz;
use section::{Section, read_section};
use std::collections::BTreeSet;
use toml::Table;

const SECOND: i64 = 1000;
const MINUTE: i64 = 60 * SECOND;
const HOUR: i64 = 60 * MINUTE;
const DAY: i64 = DAY_MS;
/// Default of `stream.delay`.
const DEFAULT_DELAY: i64 = 5 * SECOND;
/// Largest `stream.lookback`.
const MAX_LOOKBACK: u32 = 1000;

impl Definition {
    /// Parses and validates a definition. The error lists all mistakes. `file` is the name used in the error.
    pub fn parse(file: &str, text: &str) -> Result<Definition, DefinitionError> {
        parse(text).map_err(|problems| DefinitionError { file: file.to_owned(), problems })
    }
}

fn parse(text: &str) -> Result<Definition, Vec<String>> {
    let table: Table =
        text.parse().map_err(|e: toml::de::Error| vec![format!("not TOML: {}", e.to_string().trim())])?;
    let mut problems = Vec::new();
    let definition = read_section(String::new(), table, &mut problems, |file| {
        let stream = file.section("stream", stream);
        let default_lateness = rules::default_lateness(&stream);
        Definition {
            stream,
            source: file.section("source", source::source),
            event: file.section("event", event),
            columns: file.sections("column", column),
            store: file.section("store", store),
            windows: file.section("windows", |s| windows(s, default_lateness)),
        }
    });
    rules::check(&definition, &mut problems);
    if problems.is_empty() { Ok(definition) } else { Err(problems) }
}

fn stream(s: &mut Section<'_>) -> StreamSettings {
    let name = s.required_text("name");
    let schedule = s.section("schedule", schedule);
    let start_ms = s.text("start").and_then(|text| match chrono::DateTime::parse_from_rfc3339(&text) {
        Ok(at) => Some(at.timestamp_millis()),
        Err(_) => {
            s.problem("start", format!("`{text}` is not an RFC 3339 time such as 2026-01-31T00:00:00Z"));
            None
        }
    });
    let default_limit = rules::default_catch_up_limit(&schedule);
    StreamSettings {
        name,
        schedule,
        start_ms,
        delay_ms: s.duration("delay", DEFAULT_DELAY, 0..=7 * DAY),
        lookback: s.small("lookback", 0, 0..=MAX_LOOKBACK),
        catch_up: s.small("catch_up", 10, 0..=50_000),
        catch_up_limit_ms: s.duration("catch_up_limit", default_limit, 0..=366 * DAY),
        max_active_runs: s.small("max_active_runs", 2, 1..=64),
        retry: s.section("retry", |s| RetryPolicy {
            attempts: s.table.contains_key("attempts").then(|| s.small("attempts", 1, 1..=1000)),
            backoff_ms: s.duration("backoff", SECOND, 1..=HOUR),
            max_backoff_ms: s.duration("max_backoff", MINUTE, 1..=DAY),
            deadline_ms: s.duration("deadline", 12 * HOUR, SECOND..=31 * DAY),
            failed_backoff_ms: s.duration("failed_backoff", 15 * MINUTE, 1..=DAY),
            attempt_timeout_ms: s.duration("attempt_timeout", 15 * MINUTE, SECOND..=DAY),
        }),
    }
}

fn schedule(s: &mut Section<'_>) -> Schedule {
    let (cron, zone, has_length) = (s.text("cron"), s.zone("zone"), s.table.contains_key("every"));
    if cron.is_some() && has_length {
        s.problem("cron", "set either `every` or `cron`, not both");
    }
    if cron.is_none() && zone.is_some() {
        s.problem("zone", "only a `cron` schedule has a time zone; for days write cron = \"0 0 * * *\"");
    }
    let length_ms = s.duration("every", MINUTE, SECOND..=31 * DAY);
    match cron {
        Some(expression) => Schedule::Cron { expression, zone: zone.unwrap_or(Tz::UTC) },
        None => Schedule::Every(length_ms),
    }
}

fn event(s: &mut Section<'_>) -> EventMapping {
    let reading = reading(s, ["time_unit", "time_format", "time_zone"]);
    let time = match s.text("time") {
        None => EventTime::Interval,
        Some(text) if text == "interval" => EventTime::Interval,
        Some(pointer) => {
            if pointer.starts_with('/') || pointer.contains(':') {
                s.check_record_pointer("time", &pointer);
            } else {
                s.problem(
                    "time",
                    format!("`{pointer}` is neither \"interval\" nor a JSON pointer such as `/created_at`"),
                );
            }
            EventTime::Field { pointer, reading: reading.clone() }
        }
    };
    if time == EventTime::Interval && reading != TimeReading::default() {
        s.problem("time", "must be a JSON pointer if its unit, format or zone is set");
    }
    EventMapping {
        id: id(s),
        time,
        event_type: s.required_text("type"),
        key: s.record_pointer("key"),
        accept: accept(s),
        ahead_ms: s.duration("ahead", DEFAULT_AHEAD_MS, DEFAULT_AHEAD_MS..=366 * DAY),
    }
}

/// The accepted content modes, without repetitions.
fn accept(s: &mut Section<'_>) -> Vec<ContentMode> {
    let Some(names) = s.strings("accept") else { return vec![ContentMode::Binary] };
    let all = ContentMode::ALL.map(|(name, _)| name);
    for name in names.iter().filter(|name| !all.contains(&name.as_str())) {
        s.problem("accept", format!("unknown value `{name}`; use some of {}", all.join(", ")));
    }
    if names.is_empty() {
        s.problem("accept", format!("is empty; use some of {}", all.join(", ")));
    }
    let modes = ContentMode::ALL.into_iter().filter(|(name, _)| names.iter().any(|listed| listed == name));
    modes.map(|(_, mode)| mode).collect()
}

/// One pointer or a list of pointers.
fn id(s: &mut Section<'_>) -> Vec<String> {
    if s.table.get("id").is_some_and(toml::Value::is_str) {
        return s.record_pointer("id").into_iter().collect();
    }
    let pointers = s.strings("id").unwrap_or_default();
    for pointer in &pointers {
        s.check_record_pointer("id", pointer);
    }
    pointers
}

/// How a time is read, from its three keys.
fn reading(s: &mut Section<'_>, [unit, format, zone]: [&'static str; 3]) -> TimeReading {
    let units = TimeUnit::ALL;
    let all = [units[1], units[0], units[2], units[3]];
    let reading = TimeReading { unit: s.choice(unit, &all), format: s.text(format), zone: s.zone(zone) };
    if let Some(text) = reading.format.as_ref().filter(|text| !is_format(text)) {
        s.problem(format, format!("`{text}` is not a strftime format such as \"%Y-%m-%d %H:%M:%S\""));
    }
    reading
}

fn column(s: &mut Section<'_>) -> Column {
    let name = s.required_text("name");
    let type_name = s.required_text("type");
    let cql_type = CqlType::ALL.into_iter().find(|t| t.name() == type_name);
    if cql_type.is_none() {
        let all = CqlType::ALL.map(CqlType::name).join(", ");
        s.problems.push(format!("column `{name}`: unknown CQL type `{type_name}`; use one of {all}"));
    }
    let cql_type = cql_type.unwrap_or(CqlType::Text);
    let reading = reading(s, ["unit", "format", "zone"]);
    if cql_type != CqlType::Timestamp && reading != TimeReading::default() {
        s.problems
            .push(format!("column `{name}`: `unit`, `format` and `zone` are only valid for type timestamp"));
    }
    let required = s.boolean("required", false);
    let on_misfit = s.choice("on_misfit", &[("dead_letter", OnMisfit::DeadLetter), ("null", OnMisfit::Null)]);
    if required && on_misfit == OnMisfit::Null {
        s.problems.push(format!(
            "column `{name}`: a required column cannot have on_misfit = \"null\"; drop one of the two"
        ));
    }
    Column {
        cql_type,
        pointer: s.record_pointer("pointer").unwrap_or_else(|| format!("/{name}")),
        required,
        reading,
        on_misfit,
        name,
    }
}

fn store(s: &mut Section<'_>) -> StoreSettings {
    let name = s.text("bucket").unwrap_or_else(|| Bucket::Hour.name().to_owned());
    let bucket = Bucket::ALL.into_iter().find(|b| b.name() == name);
    if bucket.is_none() {
        let all = Bucket::ALL.map(Bucket::name).join(", ");
        s.problem("bucket", format!("unknown value `{name}`; use one of {all}"));
    }
    let ttl = s.text("ttl");
    let ttl_ms = match ttl.as_deref() {
        None | Some("0") => 0,
        Some(text) => parse_duration(text).unwrap_or_else(|e| {
            s.problem("ttl", format!("{e}, or \"0\" to keep rows forever"));
            0
        }),
    };
    StoreSettings {
        bucket: bucket.unwrap_or(Bucket::Hour),
        shards: s.small("shards", 4, 1..=64),
        ttl_seconds: ttl_ms / SECOND,
        shortest_ttl_seconds: None,
    }
}

fn windows(s: &mut Section<'_>, default_lateness: i64) -> Windows {
    let pane_ms = s.duration("pane", MINUTE, SECOND..=DAY);
    let lateness_ms = s.duration("lateness", default_lateness, 0..=31 * DAY);
    let group_by = s.sections("group_by", group_by);
    if group_by.len() > MAX_GROUP_BY {
        s.problem("group_by", format!("{} columns are too many; use at most {MAX_GROUP_BY}", group_by.len()));
    }
    Windows { pane_ms, lateness_ms, group_by, measures: s.strings("measures").unwrap_or_default() }
}

fn group_by(s: &mut Section<'_>) -> GroupBy {
    let column = s.required_text("column");
    let groups = match (s.strings("values"), s.number("step")) {
        (Some(values), None) => {
            if values.is_empty() || values.len() > MAX_GROUPS {
                s.problem("values", format!("has {} values; use 1 to {MAX_GROUPS}", values.len()));
            }
            if values.iter().collect::<BTreeSet<_>>().len() != values.len() {
                s.problem("values", "a value is listed twice");
            }
            Groups::Values(values)
        }
        (None, Some(step)) => {
            let most = u32::try_from(MAX_GROUPS).unwrap_or(u32::MAX);
            let count = u16::try_from(s.small("count", most, 1..=most)).unwrap_or(1);
            if !(step.is_finite() && step > 0.0) {
                s.problem("step", format!("{step} must be greater than 0"));
            }
            Groups::Step { from: s.number("from").unwrap_or(0.0), step, count }
        }
        _ => {
            s.problem("values", "set either `values` (a list) or `step` (a number)");
            Groups::Values(vec![])
        }
    };
    GroupBy { column, groups }
}
