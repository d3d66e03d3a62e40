//! Rules of a stream file that involve several keys: valid names and placeholders, panes that divide buckets, rows that
//! outlive the log. Each message names a remedy.

use super::duration::format_ms;
use super::secrets::{has_literal, has_user, looks_secret, redacted, secret_parameters};
use super::template::{Part, Placeholder, Template};
use super::{
    Definition, EventTime, ForEach, Groups, MAX_CATCH_UP_INTERVALS, OffsetStep, PageOrder, Pagination,
    Schedule, TTL_MARGIN_MS,
};
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

/// Pointers with a prefix must refer to something that the definition provides.
fn check_record_pointers(d: &Definition, each: &[&str], problems: &mut Vec<String>) {
    let has_wildcard = d.source.records.split('/').any(|token| token == "*");
    let time = match &d.event.time {
        EventTime::Field { pointer, .. } => Some(pointer),
        EventTime::Interval => None,
    };
    let columns = d.columns.iter().map(|column| &column.pointer);
    for pointer in columns.chain(&d.event.id).chain(&d.event.key).chain(time) {
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
    use super::super::{Auth, Definition, OffsetStep, PageOrder, Place, Schedule, Secret};

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
        check(("kind = \"page\"", "kind = \"cursor\""), "`source.pagination.pointer`: is missing");
        check(
            ("results={page_size}", "results=500"),
            "`source.page_size`: no request contains `{page_size}`",
        );
        check(("url = ", "body = { a = 1 }\nurl = "), "`source.body`: requires method = \"POST\"");
        check(
            ("url = ", "query = { a = \"{each.x}\" }\nurl = "),
            "`{each.x}` is not a value of source.for_each",
        );
        check(
            ("url = ", "for_each = { name = \"x\", values = [1] }\nurl = "),
            "`source.for_each`: no request uses it",
        );
        check(("pointer = \"/email\"", "pointer = \"parent:/email\""), "source.records needs a wildcard");
        check(("pointer = \"/email\"", "pointer = \"each:x\""), "`x` is not a value of source.for_each");
        check(
            ("pointer = \"/dob/age\"", "pointer = \"/dob/age\"\nunit = \"s\""),
            "only valid for type timestamp",
        );
        check(("pointer = \"/registered/date\"", "format = \"%Q\""), "`%Q` is not a strftime format");
        check(("pointer = \"/registered/date\"", "zone = \"Mars\""), "`Mars` is not a time zone");
        check(("required = true", "required = true\non_misfit = \"null\""), "cannot have on_misfit");
        check(
            ("time = \"interval\"", "time = \"interval\"\ntime_unit = \"s\""),
            "`event.time`: must be a JSON pointer if its unit",
        );
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
            source((paged, &to)).pagination.order
        };
        let (text, pointer) = (str::to_owned, "/next".to_owned());
        let place = || Place::Pointer(pointer.clone());
        assert_eq!(by("", "kind = \"none\""), PageOrder::None);
        assert_eq!(
            by("&skip={offset}", "kind = \"offset\""),
            PageOrder::Offset { first: 0, step: OffsetStep::Records }
        );
        assert_eq!(
            by(
                "&after={cursor}",
                "kind = \"cursor\", pointer = \"/next\", more = \"!/end\", total = \"header:X-T\""
            ),
            PageOrder::Cursor { next: place(), encoded: false }
        );
        assert_eq!(
            by("&after={cursor}", "kind = \"cursor\", pointer = \"header:X-Next\", encoded = true"),
            PageOrder::Cursor { next: Place::Header("x-next".to_owned()), encoded: true }
        );
        assert_eq!(by("", "kind = \"link_header\""), PageOrder::LinkHeader);
        assert_eq!(by("", "kind = \"next_url\", pointer = \"/next\""), PageOrder::NextUrl { next: place() });
        let auth = |line: &str| {
            source(("allow_private = true", &format!("allow_private = true\nauth = {{ {line} }}"))).auth
        };
        assert_eq!(auth("kind = \"none\""), Auth::None);
        let file = |name: &str| Secret::File(name.to_owned());
        assert_eq!(
            auth("kind = \"bearer\", token_file = \"/run/token\""),
            Auth::Bearer { token: file("/run/token") }
        );
        assert_eq!(
            auth("kind = \"bearer\", token_env = \"TOKEN\""),
            Auth::Bearer { token: Secret::Env("TOKEN".to_owned()) }
        );
        let user = text("me");
        assert_eq!(
            auth("kind = \"basic\", user = \"me\", password_file = \"/run/password\""),
            Auth::Basic { user, password: file("/run/password") }
        );
        let header = text("x-api-key");
        assert_eq!(
            auth("kind = \"api_key\", header = \"x-api-key\", key_file = \"/run/key\""),
            Auth::ApiKey { header, key: file("/run/key") }
        );
        let query = text("key");
        assert_eq!(
            auth("kind = \"api_key\", query = \"key\", key_file = \"/run/key\""),
            Auth::ApiKeyInQuery { query, key: file("/run/key") }
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
            "`source.auth.token_file`: is missing; set it to a file with the secret, or set `token_env`",
        );
        let oauth = auth(
            "kind = \"oauth2\", token_url = \"https://h/token\", client_id = \"me\", client_secret_env = \"S\", scope = \"a\"",
        );
        let Auth::Token(request) = oauth else { panic!("{oauth:?}") };
        assert_eq!((request.url.as_str(), request.fields.len(), request.json), ("https://h/token", 3, false));
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
