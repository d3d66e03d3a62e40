//! Parses `[source]`.

use super::super::{
    Auth, BodyFormat, ForEach, Limits, Listing, OffsetStep, PageOrder, Pagination, RecordShape,
    SourceSettings, Statuses, TokenRequest,
};
use super::section::Section;
use super::{HOUR, MINUTE, SECOND};
use crate::contracts::stream::source::MAX_FOR_EACH;
use chrono_tz::Tz;
use toml::Value;

/// Upper limit of `source.limits.page_bytes`: 256 MiB. The producer holds a page in memory.
const MAX_PAGE_BYTES: i64 = 256 << 20;
/// Default of `source.page_size`.
const DEFAULT_PAGE_SIZE: u32 = 1000;

pub(super) fn source(s: &mut Section<'_>) -> SourceSettings {
    let method = s.choice("method", &[("GET", "GET"), ("POST", "POST")]).to_owned();
    let body = s.typed("body", "a table", |v| v.as_table().map(|_| json(v)));
    if body.is_some() && method == "GET" {
        s.problem("body", "requires method = \"POST\"");
    }
    let requests_per_second = s.number("requests_per_second");
    if requests_per_second.is_some_and(|r| !(r > 0.0 && r <= 1e6)) {
        s.problem("requests_per_second", "must be greater than 0 and at most 1000000");
    }
    SourceSettings {
        url: s.required_text("url"),
        query: s.parameters("query"),
        method,
        body,
        headers: s.texts("headers"),
        zone: s.zone("zone").unwrap_or(Tz::UTC),
        auth: s.section("auth", auth),
        for_each: s.table.contains_key("for_each").then(|| s.section("for_each", for_each)),
        pagination: s.section("pagination", pagination),
        records: s.pointer("records").unwrap_or_default(),
        shape: s.choice("shape", &[("rows", RecordShape::Rows), ("columnar", RecordShape::Columnar)]),
        format: format(s),
        error: s.flags("error"),
        min_records: s.small("min_records", 0, 0..=1_000_000),
        statuses: Statuses {
            retry: s.statuses("retry_on"),
            fail: s.statuses("fail_on"),
            empty: s.statuses("empty_on"),
            end: s.statuses("end_on"),
        },
        reset_header: s.text("reset_header").map(|name| name.to_ascii_lowercase()),
        page_size: s
            .table
            .contains_key("page_size")
            .then(|| s.small("page_size", DEFAULT_PAGE_SIZE, 1..=100_000)),
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

/// A TOML value as JSON. Dates become their text.
fn json(value: &Value) -> serde_json::Value {
    match value {
        Value::String(text) => text.clone().into(),
        Value::Integer(number) => (*number).into(),
        Value::Float(number) => (*number).into(),
        Value::Boolean(flag) => (*flag).into(),
        Value::Datetime(at) => at.to_string().into(),
        Value::Array(items) => items.iter().map(json).collect::<Vec<_>>().into(),
        Value::Table(members) => serde_json::Value::Object(
            members.iter().map(|(name, value)| (name.clone(), json(value))).collect(),
        ),
    }
}

fn format(s: &mut Section<'_>) -> BodyFormat {
    let kinds = [
        ("auto", BodyFormat::Auto),
        ("json", BodyFormat::Json),
        ("ndjson", BodyFormat::Ndjson),
        ("csv", BodyFormat::Csv { delimiter: b',' }),
    ];
    let format = s.choice("format", &kinds);
    match (s.text("delimiter"), format) {
        (None, _) => format,
        (Some(text), BodyFormat::Csv { .. }) if text.len() == 1 => {
            BodyFormat::Csv { delimiter: text.as_bytes()[0] }
        }
        (Some(text), _) => {
            s.problem(
                "delimiter",
                format!("`{text}` must be one ASCII character, together with format = \"csv\""),
            );
            format
        }
    }
}

fn auth(s: &mut Section<'_>) -> Auth {
    match s.text("kind").as_deref() {
        None | Some("none") => Auth::None,
        Some("bearer") => Auth::Bearer { token: s.secret("token_file", "token_env") },
        Some("basic") => {
            Auth::Basic { user: s.required_text("user"), password: s.secret("password_file", "password_env") }
        }
        Some("api_key") => {
            let key = s.secret("key_file", "key_env");
            match (s.table.contains_key("header"), s.text("query")) {
                (false, Some(query)) => Auth::ApiKeyInQuery { query, key },
                (_, query) => {
                    if query.is_some() {
                        s.problem("query", "set either `header` or `query`, not both");
                    }
                    Auth::ApiKey { header: s.required_text("header"), key }
                }
            }
        }
        Some("oauth2") => {
            let mut fields = vec![
                ("grant_type".to_owned(), "client_credentials".to_owned()),
                ("client_id".to_owned(), s.required_text("client_id")),
            ];
            fields.extend(s.text("scope").map(|scope| ("scope".to_owned(), scope)));
            fields.extend(s.texts("fields"));
            Auth::Token(TokenRequest {
                url: s.required_text("token_url"),
                fields,
                secrets: vec![(
                    "client_secret".to_owned(),
                    s.secret("client_secret_file", "client_secret_env"),
                )],
                json: false,
                token: "/access_token".to_owned(),
                header: None,
            })
        }
        Some("login") => {
            let field = s.text("password_field").unwrap_or_else(|| "password".to_owned());
            Auth::Token(TokenRequest {
                url: s.required_text("url"),
                fields: s.texts("fields"),
                secrets: vec![(field, s.secret("password_file", "password_env"))],
                json: s.boolean("json", true),
                token: s.required_pointer("token"),
                header: s.text("header"),
            })
        }
        Some(other) => {
            let kinds = "none, bearer, basic, api_key, oauth2, login";
            s.problem("kind", format!("unknown value `{other}`; use one of {kinds}"));
            Auth::None
        }
    }
}

fn for_each(s: &mut Section<'_>) -> ForEach {
    if s.table.contains_key("url") {
        let fields = s.texts("fields");
        if fields.is_empty() {
            s.problem("fields", "is missing; write for example fields = { repository = \"/name\" }");
        }
        for (_, pointer) in &fields {
            s.check_pointer("fields", pointer);
        }
        return ForEach::Listing(Box::new(Listing {
            url: s.required_text("url"),
            query: s.parameters("query"),
            records: s.pointer("records").unwrap_or_default(),
            pagination: s.section("pagination", pagination),
            fields,
            limit: s.small("limit", 1000, 1..=MAX_FOR_EACH),
        }));
    }
    let name = s.required_text("name");
    let values = s.typed("values", "a list of strings and numbers", |v| {
        let scalars = v.as_array()?.iter().map(|v| (v.is_str() || v.is_integer()).then(|| json(v)));
        scalars.collect::<Option<Vec<_>>>()
    });
    let values = values.unwrap_or_default();
    if values.is_empty() || values.len() > MAX_FOR_EACH as usize {
        s.problem(
            "values",
            format!("has {} values; use 1 to {MAX_FOR_EACH}, or a listing with `url`", values.len()),
        );
    }
    ForEach::Values { name, values }
}

fn pagination(s: &mut Section<'_>) -> Pagination {
    let order = page_order(s);
    Pagination {
        pages: s.table.contains_key("pages").then(|| s.small("pages", 1, 1..=1_000_000)),
        more: s.flag("more"),
        total: s.place("total"),
        total_pages: s.place("total_pages"),
        short_page_ends: s.boolean("short_page_ends", false),
        order,
    }
}

fn page_order(s: &mut Section<'_>) -> PageOrder {
    match s.text("kind").as_deref() {
        None | Some("none") => PageOrder::None,
        Some("page") => PageOrder::Page {
            first: u64::from(s.small("first", 1, 0..=u32::MAX)),
            step: u64::from(s.small("step", 1, 1..=1_000_000)),
        },
        Some("offset") => PageOrder::Offset {
            first: u64::from(s.small("first", 0, 0..=u32::MAX)),
            step: s.choice("step", &[("records", OffsetStep::Records), ("page_size", OffsetStep::PageSize)]),
        },
        Some("cursor") if s.table.contains_key("last_record") => {
            PageOrder::LastRecord { pointer: s.required_pointer("last_record") }
        }
        Some("cursor") => {
            let next = s.required_place("pointer");
            PageOrder::Cursor { next, encoded: s.boolean("encoded", false) }
        }
        Some("link_header") => PageOrder::LinkHeader,
        Some("next_url") => PageOrder::NextUrl { next: s.required_place("pointer") },
        Some(other) => {
            let kinds = "none, page, offset, cursor, link_header, next_url";
            s.problem("kind", format!("unknown value `{other}`; use one of {kinds}"));
            PageOrder::None
        }
    }
}
