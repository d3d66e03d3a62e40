//! Rules of a stream file that involve several keys: valid names and placeholders, panes that divide buckets, rows that
//! outlive the log. Each message names a remedy.

use super::duration::format_ms;
use super::secrets::{has_user, looks_secret, redacted, secret_parameters};
use super::{Definition, EventTime, Groups, MAX_CATCH_UP_INTERVALS, Pagination, Schedule, TTL_MARGIN_MS};
use crate::contracts::event::DAY_MS;
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
const PLACEHOLDERS: [&str; 9] = [
    "interval.start",
    "interval.end",
    "interval.start_unix",
    "interval.end_unix",
    "interval.seed",
    "page",
    "page_size",
    "offset",
    "cursor",
];
const MAX_COLUMNS: usize = 128;

/// The nominal length of an interval. Only the planner can evaluate a cron expression, so its intervals count as one
/// minute here.
fn interval_ms(schedule: &Schedule) -> i64 {
    match schedule {
        Schedule::Every(ms) => *ms,
        Schedule::Cron(_) => 60_000,
    }
}

pub(super) fn default_lateness(schedule: &Schedule) -> i64 {
    DEFAULT_LATENESS_MS.max(LATENESS_INTERVALS * interval_ms(schedule))
}

pub(super) fn default_catch_up_limit(schedule: &Schedule) -> i64 {
    DEFAULT_CATCH_UP_LIMIT_MS.min(MAX_CATCH_UP_INTERVALS.saturating_mul(interval_ms(schedule)))
}

pub(super) fn check(d: &Definition, problems: &mut Vec<String>) {
    check_names(d, problems);
    check_catch_up(d, problems);
    check_source(d, problems);
    check_windows(d, problems);
    check_ttl(d, problems);
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
        if RESERVED_COLUMNS.contains(&name.as_str()) {
            problems.push(format!("column `{name}`: the pipeline reserves this name; choose another one"));
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
    let url = &d.source.url;
    for placeholder in url.split('{').skip(1) {
        let name = placeholder.split('}').next().unwrap_or(placeholder);
        if !PLACEHOLDERS.contains(&name) {
            problems.push(format!(
                "`source.url`: unknown placeholder `{{{name}}}`; use one of {}",
                PLACEHOLDERS.map(|p| format!("{{{p}}}")).join(", ")
            ));
        }
    }
    let bare = url.replace(['{', '}'], "");
    match url::Url::parse(&bare) {
        Ok(parsed) if matches!(parsed.scheme(), "http" | "https") => {}
        _ if url.is_empty() => {}
        _ => problems.push(format!("`source.url`: `{}` is not an http or https URL", redacted(url))),
    }
    check_secrets(d, problems);
    let (needed, kind) = match d.source.pagination {
        Pagination::Page { .. } => ("{page}", "page"),
        Pagination::Offset => ("{offset}", "offset"),
        Pagination::Cursor { .. } | Pagination::LastRecord { .. } => ("{cursor}", "cursor"),
        Pagination::None | Pagination::LinkHeader | Pagination::NextUrl { .. } => return,
    };
    if !url.is_empty() && !url.contains(needed) {
        problems.push(format!(
            "`source.url`: pagination kind `{kind}` requires the placeholder `{needed}` in the URL"
        ));
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
    for name in secret_parameters(&d.source.url) {
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
    let least = LATENESS_INTERVALS * interval_ms(&d.stream.schedule);
    if w.lateness_ms < least && d.event.time == EventTime::Interval {
        problems.push(format!(
            "`windows.lateness`: {} is less than {LATENESS_INTERVALS} schedule intervals; use at least {}",
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
    let first_ms = i64::from(d.stream.catch_up) * interval_ms(&d.stream.schedule);
    let catch_up_ms = first_ms.max(d.stream.catch_up_limit_ms);
    let least = TOPIC_RETENTION_MS + TTL_MARGIN_MS + d.windows.lateness_ms + catch_up_ms;
    if d.store.ttl_seconds != 0 && d.store.ttl_seconds.saturating_mul(1000) < least {
        problems.push(format!(
            "`store.ttl`: {} is shorter than topic retention + 2 d + lateness + catch-up; use \"0\" or at least {}",
            format_ms(d.store.ttl_seconds.saturating_mul(1000)),
            format_ms(least)
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Auth, Definition, Pagination, Schedule};

    const GOOD: &str = include_str!("../../../../../streams/user_created.toml");

    fn mistakes(text: &str) -> Vec<String> {
        Definition::parse("test.toml", text).expect_err("must be refused").problems
    }

    fn check(change: (&str, &str), expected: &str) {
        assert!(GOOD.contains(change.0), "`{}` is not in the file", change.0);
        let found = mistakes(&GOOD.replace(change.0, change.1));
        assert!(found.iter().any(|p| p.contains(expected)), "{expected} is not in {found:#?}");
    }

    #[test]
    fn the_shipped_definitions_are_valid() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../streams");
        let files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|f| f.unwrap().path()).collect();
        assert!(files.len() >= 5);
        for file in files {
            let text = std::fs::read_to_string(&file).unwrap();
            if let Err(e) = Definition::parse(&file.display().to_string(), &text) {
                panic!("{e}");
            }
        }
    }

    #[test]
    fn every_mistake_is_reported_with_its_key_and_a_remedy() {
        check(("every = ", "evry = "), "`stream.schedule.evry`: unknown key; use one of cron, every");
        check(
            ("every = \"1m\"", "every = \"1 fortnight\""),
            "`stream.schedule.every`: `1 fortnight` is not a duration",
        );
        check(("type = \"text\"", "type = \"number\""), "unknown CQL type `number`; use one of text, int");
        check(("kind = \"page\"", "kind = \"pages\""), "unknown value `pages`; use one of none, page");
        check(
            ("kind = \"page\"", "kind = \"cursor\", last_record = \"id\""),
            "`id` is not a JSON pointer; write `/id`",
        );
        check(
            ("kind = \"page\"", "kind = \"cursor\", more = \"/m\""),
            "more`: is only valid with `last_record`",
        );
        check(("time = \"interval\"", "time = \"interval\"\ntime_unit = \"s\""), "`event.time_unit`: `s`: ");
        check(("{interval.seed}", "{seed}"), "unknown placeholder `{seed}`");
        check(("pane = \"1m\"", "pane = \"7m\""), "does not divide the bucket");
        check(("lateness = \"10m\"", "lateness = \"1m\""), "less than 3 schedule intervals");
        check(
            ("catch_up = 10", "catch_up_limit = \"36d\""),
            "`stream.catch_up_limit`: 1month 5days 13h 26m 24s contains more than 50000 intervals; use at most 1month 4days",
        );
        check(("ttl = \"365d\"", "ttl = \"3d\""), "shorter than topic retention");
        check(("name = \"email\"", "name = \"event_id\""), "the pipeline reserves this name");
        check(("measures = [\"age\"]", "measures = [\"email\"]"), "a measure must be int, bigint or double");
    }

    #[test]
    fn every_kind_of_pagination_and_authentication_is_parsed() {
        let source = |change: (&str, &str)| {
            assert!(GOOD.contains(change.0), "`{}` is not in the file", change.0);
            Definition::parse("test.toml", &GOOD.replace(change.0, change.1)).unwrap().source
        };
        let paged = "&page={page}\"\nallow_private = true\nrecords = \"/results\"\npage_size = 500\npagination = { kind = \"page\", first = 1, pages = 2 }";
        let by = |place: &str, pagination: &str| {
            let to = format!(
                "{place}\"\nallow_private = true\nrecords = \"/results\"\npage_size = 500\npagination = {{ {pagination} }}"
            );
            source((paged, &to)).pagination
        };
        let (text, pointer) = (str::to_owned, "/next".to_owned());
        assert_eq!(by("", "kind = \"none\""), Pagination::None);
        assert_eq!(by("&skip={offset}", "kind = \"offset\""), Pagination::Offset);
        assert_eq!(
            by("&after={cursor}", "kind = \"cursor\", pointer = \"/next\""),
            Pagination::Cursor { pointer: pointer.clone() }
        );
        assert_eq!(by("", "kind = \"link_header\""), Pagination::LinkHeader);
        assert_eq!(by("", "kind = \"next_url\", pointer = \"/next\""), Pagination::NextUrl { pointer });
        let auth = |line: &str| {
            source(("allow_private = true", &format!("allow_private = true\nauth = {{ {line} }}"))).auth
        };
        assert_eq!(auth("kind = \"none\""), Auth::None);
        let token_file = text("/run/token");
        assert_eq!(auth("kind = \"bearer\", token_file = \"/run/token\""), Auth::Bearer { token_file });
        let (user, password_file) = (text("me"), text("/run/password"));
        assert_eq!(
            auth("kind = \"basic\", user = \"me\", password_file = \"/run/password\""),
            Auth::Basic { user, password_file }
        );
        let (header, key_file) = (text("x-api-key"), text("/run/key"));
        assert_eq!(
            auth("kind = \"api_key\", header = \"x-api-key\", key_file = \"/run/key\""),
            Auth::ApiKey { header, key_file }
        );
        let (query, key_file) = (text("key"), text("/run/key"));
        assert_eq!(
            auth("kind = \"api_key\", query = \"key\", key_file = \"/run/key\""),
            Auth::ApiKeyInQuery { query, key_file }
        );
        check(
            (
                "allow_private = true",
                "allow_private = true\nauth = { kind = \"api_key\", header = \"a\", query = \"b\", key_file = \"c\" }",
            ),
            "`source.auth.query`: set either `header` or `query`, not both",
        );
        check(
            ("allow_private = true", "allow_private = true\nauth = { kind = \"bearer\" }"),
            "`source.auth.token_file`",
        );
    }

    #[test]
    fn a_secret_in_a_definition_is_refused_with_a_remedy_and_never_repeated() {
        let check = |change: (&str, &str), expected: &str| {
            let found = mistakes(&GOOD.replace(change.0, change.1));
            assert!(found.iter().any(|p| p.contains(expected)), "{expected} is not in {found:#?}");
            assert!(!found.iter().any(|p| p.contains("S3CRET")), "{found:#?}");
        };
        check(("127.0.0.1:8090", "ada:S3CRET@127.0.0.1:8090"), "password_file = ");
        check(("&page={page}", "&page={page}&api_key=S3CRET"), "parameter `api_key` looks like a secret");
        check(("&page={page}", "&page={page}&api_key=S3CRET"), "query = \"api_key\", key_file = ");
        check(
            ("allow_private = true", "allow_private = true\nheaders = { Authorization = \"Bearer S3CRET\" }"),
            "`source.headers`: `Authorization` looks like a secret",
        );
        check(("http://127.0.0.1:8090/api/?", "ftp://h/?token=S3CRET&"), "`ftp://h/?token=…&results=…");
    }

    #[test]
    fn the_defaults_cover_an_outage_of_a_night_and_of_a_weekend() {
        let stream = |change: (&str, &str)| {
            assert!(GOOD.contains(change.0), "`{}` is not in the file", change.0);
            Definition::parse("test.toml", &GOOD.replace(change.0, change.1)).unwrap().stream
        };
        let shipped = stream(("catch_up = 10", "catch_up = 10"));
        let Schedule::Every(interval_ms) = shipped.schedule else { panic!("{shipped:?}") };
        assert!(shipped.catch_up_limit_ms / interval_ms >= 4320, "catch-up must cover three days");
        assert!(
            shipped.retry.deadline_ms >= 8 * 3_600_000 && shipped.retry.attempts.is_none(),
            "{shipped:?}"
        );
        assert_eq!(shipped.catch_up, 10, "the first start must not fetch the whole catch-up limit");
        let often = stream(("every = \"1m\"", "every = \"1s\""));
        assert_eq!(often.catch_up_limit_ms, 50_000_000, "the limit is MAX_CATCH_UP_INTERVALS intervals");
        let few = stream(("backoff = \"1s\"", "backoff = \"1s\", attempts = 5"));
        assert_eq!(few.retry.attempts, Some(5));
    }

    #[test]
    fn one_error_lists_all_mistakes() {
        let found =
            mistakes("[stream]\nname = \"A\"\ntypo = 1\n[event]\ntime = \"now\"\n[store]\nbucket = \"2h\"");
        for part in
            ["`stream.typo`", "`stream.name`", "`source.url`", "`event.time`", "`store.bucket`", "`column`"]
        {
            assert!(found.iter().any(|p| p.contains(part)), "{part} is not in {found:#?}");
        }
    }
}
