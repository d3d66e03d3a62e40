//! Parses a stream file key by key and collects all mistakes instead of stopping at the first. `rules.rs` contains the
//! rules that involve several keys.

use super::duration::{format_ms, parse_duration};
use super::{
    Auth, Column, CqlType, Definition, DefinitionError, EventMapping, EventTime, GroupBy, Groups, Limits,
    MAX_GROUP_BY, MAX_GROUPS, Pagination, RetryPolicy, Schedule, SourceSettings, StoreSettings,
    StreamSettings, Windows, rules,
};
use crate::contracts::event::{Bucket, DAY_MS};
use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use toml::{Table, Value};

/// Upper limit of `source.limits.page_bytes`: 256 MiB. The producer holds a page in memory.
const MAX_PAGE_BYTES: i64 = 256 << 20;

/// A table of the file. It records the keys that were read, so that all other keys can be reported as unknown.
struct Section<'a> {
    path: String,
    table: Table,
    known: BTreeSet<&'static str>,
    problems: &'a mut Vec<String>,
}

impl Section<'_> {
    fn key(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    fn problem(&mut self, key: &str, text: impl std::fmt::Display) {
        let key = self.key(key);
        self.problems.push(format!("`{key}`: {text}"));
    }

    fn take(&mut self, key: &'static str) -> Option<Value> {
        self.known.insert(key);
        self.table.remove(key)
    }

    /// Takes a value and converts it with `read`. Reports a problem if the value is not of the expected `kind`.
    fn typed<T>(&mut self, key: &'static str, kind: &str, read: impl Fn(&Value) -> Option<T>) -> Option<T> {
        let value = self.take(key)?;
        let found = read(&value);
        if found.is_none() {
            self.problem(key, format!("must be {kind}, but is {} `{value}`", value.type_str()));
        }
        found
    }

    fn text(&mut self, key: &'static str) -> Option<String> {
        self.typed(key, "a string", |v| v.as_str().map(str::to_owned))
    }

    fn required_text(&mut self, key: &'static str) -> String {
        let present = self.table.contains_key(key);
        let value = self.text(key);
        if !present {
            self.problem(key, "is missing");
        }
        value.unwrap_or_default()
    }

    fn boolean(&mut self, key: &'static str, default: bool) -> bool {
        self.typed(key, "true or false", Value::as_bool).unwrap_or(default)
    }

    fn number(&mut self, key: &'static str) -> Option<f64> {
        self.typed(key, "a number", |v| v.as_float().or_else(|| v.as_integer().map(|i| i as f64)))
    }

    fn integer(&mut self, key: &'static str, default: i64, range: RangeInclusive<i64>) -> i64 {
        let Some(value) = self.typed(key, "an integer", Value::as_integer) else { return default };
        if !range.contains(&value) {
            self.problem(key, format!("{value} is out of range; use {} to {}", range.start(), range.end()));
            return default;
        }
        value
    }

    fn small(&mut self, key: &'static str, default: u32, range: RangeInclusive<u32>) -> u32 {
        let wide = i64::from(*range.start())..=i64::from(*range.end());
        u32::try_from(self.integer(key, i64::from(default), wide)).unwrap_or(default)
    }

    /// A duration such as `"90s"` or `"1h 30m"`, in milliseconds.
    fn duration(&mut self, key: &'static str, default_ms: i64, range_ms: RangeInclusive<i64>) -> i64 {
        let Some(text) = self.text(key) else { return default_ms };
        match parse_duration(&text) {
            Err(e) => self.problem(key, e),
            Ok(ms) if !range_ms.contains(&ms) => {
                let (low, high) = (format_ms(*range_ms.start()), format_ms(*range_ms.end()));
                self.problem(key, format!("`{text}` is out of range; use {low} to {high}"));
            }
            Ok(ms) => return ms,
        }
        default_ms
    }

    fn strings(&mut self, key: &'static str) -> Option<Vec<String>> {
        self.typed(key, "a list of strings", |v| {
            v.as_array()?.iter().map(|s| s.as_str().map(str::to_owned)).collect()
        })
    }

    /// An RFC 6901 JSON pointer.
    fn pointer(&mut self, key: &'static str) -> Option<String> {
        let pointer = self.text(key)?;
        if !pointer.is_empty() && !pointer.starts_with('/') {
            self.problem(
                key,
                format!("`{pointer}` is not a JSON pointer; write `/{}`", pointer.replace('.', "/")),
            );
        }
        Some(pointer)
    }

    fn required_pointer(&mut self, key: &'static str) -> String {
        if !self.table.contains_key(key) {
            self.problem(key, "is missing; set a JSON pointer such as `/data/next`");
        }
        self.pointer(key).unwrap_or_default()
    }

    /// Reads the table at `key`. An absent table counts as empty.
    fn section<T>(&mut self, key: &'static str, read: impl FnOnce(&mut Section<'_>) -> T) -> T {
        let table = self.typed(key, "a table", |v| v.as_table().cloned()).unwrap_or_default();
        let path = self.key(key);
        read_section(path, table, self.problems, read)
    }

    /// Reads each table of the array at `key`.
    fn sections<T>(&mut self, key: &'static str, read: impl Fn(&mut Section<'_>) -> T) -> Vec<T> {
        let tables = self.typed(key, "a list of tables", |v| {
            v.as_array()?.iter().map(|t| t.as_table().cloned()).collect::<Option<Vec<Table>>>()
        });
        let path = self.key(key);
        let tables = tables.unwrap_or_default().into_iter().enumerate();
        tables.map(|(i, t)| read_section(format!("{path}[{i}]"), t, self.problems, &read)).collect()
    }
}

fn read_section<T>(
    path: String,
    table: Table,
    problems: &mut Vec<String>,
    read: impl FnOnce(&mut Section<'_>) -> T,
) -> T {
    let mut section = Section { path, table, known: BTreeSet::new(), problems };
    let read = read(&mut section);
    let known = section.known.iter().copied().collect::<Vec<_>>().join(", ");
    for key in section.table.keys().cloned().collect::<Vec<_>>() {
        section.problem(&key, format!("unknown key; use one of {known}"));
    }
    read
}

const SECOND: i64 = 1000;
const MINUTE: i64 = 60 * SECOND;
const HOUR: i64 = 60 * MINUTE;
const DAY: i64 = DAY_MS;

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
        let default_lateness = rules::default_lateness(&stream.schedule);
        Definition {
            stream,
            source: file.section("source", source),
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
    let schedule = s.section("schedule", |s| match (s.text("cron"), s.table.contains_key("every")) {
        (Some(_), true) => {
            s.take("every");
            s.problem("cron", "set either `every` or `cron`, not both");
            Schedule::Every(MINUTE)
        }
        (Some(cron), false) => Schedule::Cron(cron),
        (None, _) => Schedule::Every(s.duration("every", MINUTE, SECOND..=31 * DAY)),
    });
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

fn source(s: &mut Section<'_>) -> SourceSettings {
    let method = s.text("method").unwrap_or_else(|| "GET".to_owned());
    if method != "GET" && method != "POST" {
        s.problem("method", format!("`{method}` is not supported; use GET or POST"));
    }
    let headers = s.typed("headers", "a table of strings", |v| {
        v.as_table()?
            .iter()
            .map(|(k, v)| Some((k.clone(), v.as_str()?.to_owned())))
            .collect::<Option<Vec<_>>>()
    });
    let requests_per_second = s.number("requests_per_second");
    if requests_per_second.is_some_and(|r| !(r > 0.0 && r <= 1e6)) {
        s.problem("requests_per_second", "must be greater than 0 and at most 1000000");
    }
    SourceSettings {
        url: s.required_text("url"),
        method,
        headers: headers.unwrap_or_default(),
        auth: s.section("auth", auth),
        pagination: s.section("pagination", pagination),
        records: s.pointer("records").unwrap_or_default(),
        page_size: s.small("page_size", 1000, 1..=100_000),
        allow_private: s.boolean("allow_private", false),
        limits: s.section("limits", |s| Limits {
            page_bytes: s.integer("page_bytes", 32 << 20, 1024..=MAX_PAGE_BYTES).unsigned_abs(),
            pages: s.small("pages", 1000, 1..=1_000_000),
            records: s.small("records", 1_000_000, 1..=100_000_000),
            connect_timeout_ms: s.duration("connect_timeout", 5 * SECOND, 10..=5 * MINUTE),
            request_timeout_ms: s.duration("request_timeout", 30 * SECOND, 10..=HOUR),
        }),
        requests_per_second,
    }
}

fn auth(s: &mut Section<'_>) -> Auth {
    match s.text("kind").as_deref() {
        None | Some("none") => Auth::None,
        Some("bearer") => Auth::Bearer { token_file: s.required_text("token_file") },
        Some("basic") => {
            Auth::Basic { user: s.required_text("user"), password_file: s.required_text("password_file") }
        }
        Some("api_key") => match (s.table.contains_key("header"), s.text("query")) {
            (false, Some(query)) => Auth::ApiKeyInQuery { query, key_file: s.required_text("key_file") },
            (_, query) => {
                if query.is_some() {
                    s.problem("query", "set either `header` or `query`, not both");
                }
                Auth::ApiKey { header: s.required_text("header"), key_file: s.required_text("key_file") }
            }
        },
        Some(other) => {
            s.problem("kind", format!("unknown value `{other}`; use one of none, bearer, basic, api_key"));
            Auth::None
        }
    }
}

fn pagination(s: &mut Section<'_>) -> Pagination {
    match s.text("kind").as_deref() {
        None | Some("none") => Pagination::None,
        Some("page") => {
            let pages = s.table.contains_key("pages").then(|| s.small("pages", 1, 1..=1_000_000));
            Pagination::Page { first: s.small("first", 1, 0..=1), pages }
        }
        Some("offset") => Pagination::Offset,
        Some("cursor") => match (s.table.contains_key("last_record"), s.pointer("more")) {
            (true, more) => Pagination::LastRecord { pointer: s.required_pointer("last_record"), more },
            (false, more) => {
                if more.is_some() {
                    let text = "is only valid with `last_record`: an absent cursor already ends the interval";
                    s.problem("more", text);
                }
                Pagination::Cursor { pointer: s.required_pointer("pointer") }
            }
        },
        Some("link_header") => Pagination::LinkHeader,
        Some("next_url") => Pagination::NextUrl { pointer: s.required_pointer("pointer") },
        Some(other) => {
            s.problem(
                "kind",
                format!(
                    "unknown value `{other}`; use one of none, page, offset, cursor, link_header, next_url"
                ),
            );
            Pagination::None
        }
    }
}

fn event(s: &mut Section<'_>) -> EventMapping {
    let time = match s.text("time").as_deref() {
        None | Some("interval") => EventTime::Interval,
        Some(pointer) if pointer.starts_with('/') => EventTime::Pointer(pointer.to_owned()),
        Some(other) => {
            s.problem(
                "time",
                format!("`{other}` is neither \"interval\" nor a JSON pointer such as `/created_at`"),
            );
            EventTime::Interval
        }
    };
    let unit = s.text("time_unit");
    let time = match (time, unit.as_deref()) {
        (time, None | Some("ms")) => time,
        (EventTime::Pointer(pointer), Some("s")) => EventTime::Seconds(pointer),
        (time, Some(other)) => {
            s.problem(
                "time_unit",
                format!(
                    "`{other}`: must be \"s\" or \"ms\"; \"s\" also requires event.time to be a JSON pointer"
                ),
            );
            time
        }
    };
    EventMapping { id: s.pointer("id"), time, event_type: s.required_text("type"), key: s.pointer("key") }
}

fn column(s: &mut Section<'_>) -> Column {
    let name = s.required_text("name");
    let type_name = s.required_text("type");
    let cql_type = CqlType::ALL.into_iter().find(|t| t.name() == type_name);
    if cql_type.is_none() {
        let all = CqlType::ALL.map(CqlType::name).join(", ");
        s.problems.push(format!("column `{name}`: unknown CQL type `{type_name}`; use one of {all}"));
    }
    Column {
        cql_type: cql_type.unwrap_or(CqlType::Text),
        pointer: s.pointer("pointer").unwrap_or_else(|| format!("/{name}")),
        required: s.boolean("required", false),
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
