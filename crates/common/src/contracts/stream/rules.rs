//! Rules of a stream file that involve several keys: valid names and placeholders, panes that divide buckets, rows that
//! outlive the log. Each message names a remedy.

use super::duration::format_ms;
use super::secrets::{has_literal, has_user, looks_secret, redacted, secret_parameters};
use super::template::{Part, Placeholder, Template};
use super::{
    ContentMode, Definition, EventTime, ForEach, Groups, MAX_CATCH_UP_INTERVALS, OffsetStep, PageOrder,
    Pagination, Schedule, StreamSettings, TTL_MARGIN_MS,
};
use crate::contracts::event::{DAY_MS, DEFAULT_AHEAD_MS};
use crate::contracts::topics::TOPIC_RETENTION_MS;
use std::collections::BTreeSet;

/// Default of `windows.lateness`: ten minutes.
const DEFAULT_LATENESS_MS: i64 = 600_000;
/// Default of `stream.catch_up_limit`: a week, so that an outage over a weekend loses nothing.
const DEFAULT_CATCH_UP_LIMIT_MS: i64 = 7 * DAY_MS;
/// The allowed lateness must cover at least this many schedule intervals.
const LATENESS_INTERVALS: i64 = 3;
/// Columns of the event table that the pipeline adds. A stream definition must not declare them.
const RESERVED_COLUMNS: [&str; 6] = ["bucket", "shard", "event_time", "event_id", "kafka_offset", "run_id"];
/// Words that CQL does not accept as names: the reserved words of Cassandra 5.
const CQL_WORDS: &str = " add allow alter and apply asc authorize batch begin by columnfamily create default delete desc \
     describe drop entries execute from full grant if in index infinity insert into is keyspace limit materialized mbean \
     mbeans modify nan norecursive not null of on or order primary rename replace revoke schema select set table to token \
     truncate unlogged unset update use using view where with ";
const MAX_COLUMNS: usize = 128;

/// The nominal length of an interval. Only the planner can evaluate a cron expression, so its intervals count as one
/// minute here.
fn interval_ms(schedule: &Schedule) -> i64 {
    match schedule {
        Schedule::Every(ms) => *ms,
        Schedule::Cron { .. } => 60_000,
    }
}

pub(super) fn default_lateness(stream: &StreamSettings) -> i64 {
    DEFAULT_LATENESS_MS.max(least_lateness(stream))
}

/// The lateness at which events of an interval that is fetched for the last time are not late.
fn least_lateness(stream: &StreamSettings) -> i64 {
    (LATENESS_INTERVALS + i64::from(stream.lookback)) * interval_ms(&stream.schedule)
}

pub(super) fn default_catch_up_limit(schedule: &Schedule) -> i64 {
    DEFAULT_CATCH_UP_LIMIT_MS.min(MAX_CATCH_UP_INTERVALS.saturating_mul(interval_ms(schedule)))
}

pub(super) fn check(d: &Definition, problems: &mut Vec<String>) {
    check_names(d, problems);
    check_catch_up(d, problems);
    check_source(d, problems);
    check_accept(d, problems);
    check_windows(d, problems);
    check_ttl(d, problems);
}

fn is_cql_word(name: &str) -> bool {
    CQL_WORDS.split_whitespace().any(|word| word == name)
}

/// Whether no column may have this name, because the pipeline or CQL reserves it.
pub fn is_reserved_column(name: &str) -> bool {
    RESERVED_COLUMNS.contains(&name) || is_cql_word(name)
}

fn is_identifier(name: &str, most: usize) -> bool {
    name.len() <= most
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
}

fn check_names(d: &Definition, problems: &mut Vec<String>) {
    let name = &d.stream.name;
    if !name.is_empty() && !is_identifier(name, 40) {
        problems.push(format!(
            "`stream.name`: `{name}` must consist of lowercase letters, digits and _, start with a letter, and have \
             at most 40 characters"
        ));
    }
    if is_cql_word(name) {
        problems.push(format!(
            "`stream.name`: CQL reserves `{name}`, and the table has this name; choose another one"
        ));
    }
    if d.columns.is_empty() || d.columns.len() > MAX_COLUMNS {
        problems.push(format!("`column`: {} columns declared; from 1 to {MAX_COLUMNS}", d.columns.len()));
    }
    let mut seen = BTreeSet::new();
    for column in &d.columns {
        let name = &column.name;
        if !is_identifier(name, 48) {
            problems.push(format!(
                "column `{name}`: must consist of lowercase letters, digits and _, start with a letter, and have at \
                 most 48 characters"
            ));
        }
        if is_reserved_column(name) {
            let who = if is_cql_word(name) { "CQL" } else { "the pipeline" };
            problems.push(format!(
                "column `{name}`: {who} reserves this name; choose another one and set `pointer = \"/{name}\"`"
            ));
        }
        if !seen.insert(name) {
            problems.push(format!("column `{name}`: declared twice"));
        }
    }
}

fn check_catch_up(d: &Definition, problems: &mut Vec<String>) {
    let (limit_ms, interval_ms) = (d.stream.catch_up_limit_ms, interval_ms(&d.stream.schedule));
    if limit_ms / interval_ms > MAX_CATCH_UP_INTERVALS {
        problems.push(format!(
            "`stream.catch_up_limit`: {} contains more than {MAX_CATCH_UP_INTERVALS} intervals; use at most {}",
            format_ms(limit_ms),
            format_ms(MAX_CATCH_UP_INTERVALS * interval_ms)
        ));
    }
}

fn check_source(d: &Definition, problems: &mut Vec<String>) {
    let source = &d.source;
    check_url("source.url", &source.url, problems);
    check_secrets(d, problems);
    let mut requests = RequestTemplates::new("source", &source.url, &source.query);
    requests.add_body(source.body.as_ref());
    requests.check(&source.pagination, source.page_size, problems);
    let names = source.for_each.as_ref().map(ForEach::names).unwrap_or_default();
    for placeholder in requests.placeholders() {
        if let Placeholder::Each(name) = placeholder
            && !names.contains(&name.as_str())
        {
            problems.push(format!("`source`: `{{each.{name}}}` is not a value of source.for_each"));
        }
    }
    if !names.is_empty() && !requests.placeholders().any(|p| matches!(p, Placeholder::Each(_))) {
        problems.push(format!("`source.for_each`: no request uses it; add {{each.{}}} to the URL", names[0]));
    }
    if let Some(ForEach::Listing(listing)) = &source.for_each {
        check_url("source.for_each.url", &listing.url, problems);
        let listed = RequestTemplates::new("source.for_each", &listing.url, &listing.query);
        listed.check(&listing.pagination, source.page_size, problems);
    }
    check_record_pointers(d, &names, problems);
}

fn check_url(key: &str, url: &str, problems: &mut Vec<String>) {
    if url.is_empty() {
        return;
    }
    // A format inside a placeholder may contain characters that are not valid in a URL.
    let Ok(template) = Template::parse(url) else { return };
    let bare = template.parts.iter().map(|part| match part {
        Part::Text(text) => text.as_str(),
        Part::Placeholder(_) => "x",
    });
    match url::Url::parse(&bare.collect::<String>()) {
        Ok(parsed) if matches!(parsed.scheme(), "http" | "https") => {}
        _ => problems.push(format!("`{key}`: `{}` is not an http or https URL", redacted(url))),
    }
}

/// The templates of a request, with the problems found while parsing them.
struct RequestTemplates {
    key: &'static str,
    templates: Vec<Template>,
    problems: Vec<String>,
}

impl RequestTemplates {
    fn new(key: &'static str, url: &str, query: &[(String, String)]) -> RequestTemplates {
        let mut requests = RequestTemplates { key, templates: Vec::new(), problems: Vec::new() };
        requests.add(format!("{key}.url"), Template::parse(url));
        for (name, value) in query {
            requests.add(format!("{key}.query.{name}"), Template::parse(value));
        }
        requests
    }

    fn add(&mut self, key: String, template: Result<Template, String>) {
        match template {
            Ok(template) => self.templates.push(template),
            Err(problem) => self.problems.push(format!("`{key}`: {problem}")),
        }
    }

    fn add_body(&mut self, body: Option<&serde_json::Value>) {
        match body {
            Some(serde_json::Value::String(text)) => {
                self.add(format!("{}.body", self.key), Template::parse_body(text));
            }
            Some(serde_json::Value::Array(items)) => items.iter().for_each(|item| self.add_body(Some(item))),
            Some(serde_json::Value::Object(members)) => {
                members.values().for_each(|member| self.add_body(Some(member)));
            }
            _ => {}
        }
    }

    fn placeholders(&self) -> impl Iterator<Item = &Placeholder> {
        self.templates.iter().flat_map(Template::placeholders)
    }

    fn check(&self, pagination: &Pagination, page_size: Option<u32>, problems: &mut Vec<String>) {
        let key = self.key;
        problems.extend(self.problems.iter().cloned());
        let (needed, kind) = match pagination.order {
            PageOrder::Page { .. } => (Some(("{page}", Placeholder::Page)), "page"),
            PageOrder::Offset { .. } => (Some(("{offset}", Placeholder::Offset)), "offset"),
            PageOrder::Cursor { .. } | PageOrder::LastRecord { .. } => {
                (Some(("{cursor}", Placeholder::Cursor)), "cursor")
            }
            PageOrder::None | PageOrder::LinkHeader | PageOrder::NextUrl { .. } => (None, ""),
        };
        if let Some((text, needed)) = needed
            && self.problems.is_empty()
            && !self.placeholders().any(|p| *p == needed)
        {
            problems.push(format!(
                "`{key}`: pagination kind `{kind}` requires the placeholder `{text}` in a request"
            ));
        }
        let uses_size = self.placeholders().any(|p| *p == Placeholder::PageSize);
        let by_size = pagination.short_page_ends
            || matches!(pagination.order, PageOrder::Offset { step: OffsetStep::PageSize, .. });
        if by_size && (page_size.is_none() || !uses_size) {
            problems.push(format!(
                "`{key}.pagination`: `short_page_ends` and an offset step of `page_size` require source.page_size, and \
                 the placeholder `{{page_size}}` in a request"
            ));
        } else if key == "source" && page_size.is_some() && !uses_size && self.problems.is_empty() {
            problems.push(
                "`source.page_size`: no request contains `{page_size}`, so the source never learns it; add the \
                 placeholder, or remove page_size"
                    .to_owned(),
            );
        }
        let wants_stop =
            pagination.more.is_some() || pagination.total.is_some() || pagination.total_pages.is_some();
        if wants_stop && pagination.order == PageOrder::None {
            problems.push(format!("`{key}.pagination`: `more` and `total` require a kind other than none"));
        }
    }
}

/// The pointers to the id, time, key and columns of an event.
fn event_pointers(d: &Definition) -> impl Iterator<Item = &String> {
    let time = match &d.event.time {
        EventTime::Field { pointer, .. } => Some(pointer),
        EventTime::Interval => None,
    };
    d.columns.iter().map(|column| &column.pointer).chain(&d.event.id).chain(&d.event.key).chain(time)
}

/// A plain record must contain everything that its event consists of.
fn check_accept(d: &Definition, problems: &mut Vec<String>) {
    if !d.event.accepts(ContentMode::Plain) {
        return;
    }
    let mut refuse = |why: String, remedy: &str| {
        problems.push(format!("`event.accept`: {why}; {remedy}, or remove \"plain\""));
    };
    if d.event.id.is_empty() {
        let why =
            "\"plain\" requires event.id, because only an id tells copies of a record from other records";
        refuse(why.to_owned(), "point event.id to a value of the record");
    }
    if d.event.time == EventTime::Interval {
        let why = "\"plain\" requires event.time, because copies of a record must have the same event time";
        refuse(why.to_owned(), "point event.time to a value of the record");
    }
    for pointer in event_pointers(d) {
        if let Some(("page" | "parent" | "key" | "each", _)) = pointer.split_once(':') {
            let why = format!("a plain record has no page around it, so pointer `{pointer}` leads nowhere");
            refuse(why, "use a pointer into the record");
        }
    }
}

/// Pointers with a prefix must refer to something that the definition provides.
fn check_record_pointers(d: &Definition, each: &[&str], problems: &mut Vec<String>) {
    let has_wildcard = d.source.records.split('/').any(|token| token == "*");
    for pointer in event_pointers(d) {
        match pointer.split_once(':') {
            Some(("each", name)) if !each.contains(&name) => {
                problems.push(format!("pointer `{pointer}`: `{name}` is not a value of source.for_each"))
            }
            Some(("parent" | "key", _)) if !has_wildcard => problems.push(format!(
                "pointer `{pointer}`: source.records needs a wildcard, for example `/data/*/items`"
            )),
            _ => {}
        }
    }
}

/// Secrets must be in separate files, because a definition is copied, shown and committed.
fn check_secrets(d: &Definition, problems: &mut Vec<String>) {
    if has_user(&d.source.url) {
        problems.push(
            "`source.url`: must not contain a user or a password; put the password into a file and write \
             auth = { kind = \"basic\", user = \"…\", password_file = \"…\" }"
                .to_owned(),
        );
    }
    let literal = d.source.query.iter().filter(|(name, value)| looks_secret(name) && has_literal(value));
    let in_query = literal.map(|(name, _)| name.clone());
    for name in secret_parameters(&d.source.url).into_iter().chain(in_query) {
        problems.push(format!(
            "`source.url`: parameter `{name}` looks like a secret; put its value into a file and write \
             auth = {{ kind = \"api_key\", query = \"{name}\", key_file = \"…\" }}"
        ));
    }
    for (name, _) in d.source.headers.iter().filter(|(name, _)| looks_secret(name)) {
        problems.push(format!(
            "`source.headers`: `{name}` looks like a secret; put its value into a file and write \
             auth = {{ kind = \"api_key\", header = \"{name}\", key_file = \"…\" }}, or kind = \"bearer\" with token_file"
        ));
    }
}

fn check_windows(d: &Definition, problems: &mut Vec<String>) {
    let w = &d.windows;
    let bucket_ms = d.store.bucket.millis();
    if bucket_ms % w.pane_ms != 0 {
        problems.push(format!(
            "`windows.pane`: {} does not divide the bucket {}; all rows of a pane must be in one bucket",
            format_ms(w.pane_ms),
            d.store.bucket.name()
        ));
    }
    let least = least_lateness(&d.stream);
    if w.lateness_ms < least && d.event.time == EventTime::Interval {
        problems.push(format!(
            "`windows.lateness`: {} is less than {LATENESS_INTERVALS} schedule intervals plus `stream.lookback`; use \
             at least {}",
            format_ms(w.lateness_ms),
            format_ms(least)
        ));
    }
    let mut seen = BTreeSet::new();
    for group in &w.group_by {
        let name = &group.column;
        if !seen.insert(name) {
            problems.push(format!("`windows.group_by`: column `{name}` is listed twice"));
        }
        match (d.columns.iter().find(|c| c.name == *name), &group.groups) {
            (None, _) => problems.push(format!("`windows.group_by`: column `{name}` is not declared")),
            (Some(c), Groups::Step { .. }) if !c.cql_type.is_numeric() => problems.push(format!(
                "`windows.group_by`: `step` requires a numeric column, but `{name}` is {}",
                c.cql_type.name()
            )),
            _ => {}
        }
    }
    let mut measured = BTreeSet::new();
    for name in &w.measures {
        if !measured.insert(name) {
            problems.push(format!("`windows.measures`: column `{name}` is listed twice"));
        }
        match d.columns.iter().find(|c| c.name == *name) {
            None => problems.push(format!("`windows.measures`: column `{name}` is not declared")),
            Some(c) if !c.cql_type.is_numeric() => problems.push(format!(
                "`windows.measures`: column `{name}` is {}; a measure must be int, bigint or double",
                c.cql_type.name()
            )),
            Some(_) => {}
        }
    }
}

fn check_ttl(d: &Definition, problems: &mut Vec<String>) {
    let ahead_ms = d.event.ahead_ms - DEFAULT_AHEAD_MS;
    let first_ms = i64::from(d.stream.catch_up) * interval_ms(&d.stream.schedule);
    let catch_up_ms = first_ms.max(d.stream.catch_up_limit_ms);
    let least = TOPIC_RETENTION_MS + TTL_MARGIN_MS + d.windows.lateness_ms + catch_up_ms + ahead_ms;
    if d.store.ttl_seconds != 0 && d.store.ttl_seconds.saturating_mul(1000) < least {
        problems.push(format!(
            "`store.ttl`: {} is shorter than topic retention + 2 d + lateness + catch-up + event.ahead; use \"0\" or at least {}",
            format_ms(d.store.ttl_seconds.saturating_mul(1000)),
            format_ms(least)
        ));
    }
}

#[cfg(test)]
mod tests;
