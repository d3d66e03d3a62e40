//! Drafts from the shapes of public APIs. Each draft parses, and `source check` accepts it.

use super::{Answer, DraftError, draft};
use crate::check::check;
use crate::config::CheckArgs;
use crate::error::AttemptError;
use crate::source::auth::Loaded;
use crate::source::body::{Received, decode};
use crate::source::client::{FetchPage, Page};
use crate::source::paginate::Headers;
use crate::source::request::{PageRequest, Requests};
use async_trait::async_trait;
use common::contracts::stream::{BodyFormat, Definition};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::fmt::Write;
use std::sync::Arc;

/// 2026-01-01T01:00:00Z. All times of the answers are before it.
const NOW_MS: i64 = 1_767_229_200_000;
const T0: i64 = 1_767_225_600;

fn at(second: i64) -> String {
    format!("2026-01-01T00:00:{second:02}Z")
}

/// Twenty records that `make` derives from their number.
fn rows(make: impl Fn(i64) -> Value) -> Value {
    (0..20).map(make).collect()
}

fn either<'a>(n: i64, even: &'a str, odd: &'a str) -> &'a str {
    if n % 2 == 0 { even } else { odd }
}

fn drafted(url: &str, headers: &[(&str, &str)], text: &str) -> Result<String, DraftError> {
    let headers = Headers(headers.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect());
    draft(&Answer {
        name: None,
        url,
        request_headers: &[],
        allow_private: false,
        text: text.as_bytes(),
        headers: &headers,
        now_ms: NOW_MS,
    })
}

struct Fake {
    text: String,
    content_type: Option<String>,
    format: BodyFormat,
}

#[async_trait]
impl FetchPage for Fake {
    async fn fetch(&self, _: &PageRequest) -> Result<Page, AttemptError> {
        let bytes = self.text.clone().into_bytes();
        let received = Received { bytes, encoding: None, content_type: self.content_type.clone() };
        let (text, format) = decode(received, self.format, 1 << 20)?;
        let credentials = Arc::new(Loaded::nothing());
        Ok(Page { text, format, headers: Headers::default(), bytes: 0, credentials })
    }
}

/// Asserts that the draft contains these lines and that `source check` accepts it.
async fn check_draft(url: &str, headers: &[(&str, &str)], text: &str, lines: &[&str]) {
    let file = drafted(url, headers, text).unwrap_or_else(|e| panic!("{url}: {e}"));
    let definition = Definition::parse("draft", &file).unwrap_or_else(|e| panic!("{e}\n{file}"));
    for line in lines {
        assert!(file.lines().any(|known| known == *line), "`{line}` is not in\n{file}");
    }
    let content_type = headers.iter().find(|(name, _)| *name == "content-type").map(|(_, v)| (*v).to_owned());
    let source = Fake { text: text.to_owned(), content_type, format: definition.source.format };
    let requests = Requests::new(&definition, None).unwrap();
    let args = CheckArgs { pages: 1, events: 1, json: false };
    let output = check(&definition, &requests, &source, &args, NOW_MS).await.unwrap();
    assert_eq!(output.code, 0, "{}\n{file}", output.text);
}

#[tokio::test]
async fn commits_of_github_follow_the_link_header() {
    let commit = |n: i64| {
        json!({
            "sha": format!("{n:040x}"),
            "commit": {
                "author": {"name": "Ada", "date": at(n)},
                "committer": {"date": at(n)},
                "comment_count": n % 4,
                "verification": {"verified": n % 2 == 0},
            },
            "author": if n % 3 == 0 { Value::Null } else { json!({"login": either(n, "bors", "ada")}) },
            "parents": [{"sha": "0"}],
        })
    };
    let url = "https://api.github.com/repos/rust-lang/rust/commits?since=2026-01-01T00:00:00Z&until=2026-01-01T00:10:00Z&per_page=100";
    let link = "<https://api.github.com/x?page=2>; rel=\"next\"";
    let expected = [
        "name = \"github_commits\"",
        "url = \"https://api.github.com/repos/rust-lang/rust/commits?since={interval.start}&until={interval.end}&per_page={page_size}\"",
        "page_size = 100",
        "pagination = { kind = \"link_header\" }",
        "id = \"/sha\"",
        "time = \"/commit/author/date\"",
        "pointer = \"/commit/verification/verified\"",
        "# Absent or null in 7 of 20 records.",
        "measures = [\"commit_comment_count\"]",
        "column = \"author_login\"",
    ];
    check_draft(url, &[("link", link)], &rows(commit).to_string(), &expected).await;
}

#[tokio::test]
async fn charges_of_stripe_follow_the_last_record() {
    let charge = |n: i64| json!({"id": format!("ch_{n}"), "created": T0 + n, "amount": 100 * n, "currency": either(n, "usd", "eur"), "paid": true});
    let page = json!({"object": "list", "url": "/v1/charges", "has_more": true, "data": rows(charge)});
    let url = "https://api.stripe.com/v1/charges?created[gte]=1767225600&created[lt]=1767225900&limit=100";
    let expected = [
        "url = \"https://api.stripe.com/v1/charges?created[gte]={interval.start_unix}&created[lt]={interval.end_unix}&limit={page_size}\"",
        "query = { \"starting_after\" = \"{cursor}\" }",
        "records = \"/data\"",
        "pagination = { kind = \"cursor\", last_record = \"/id\", more = \"/has_more\" }",
        "time_unit = \"s\"",
        "values = [\"eur\", \"usd\"]",
    ];
    check_draft(url, &[], &page.to_string(), &expected).await;
}

#[tokio::test]
async fn pages_by_number_offset_cursor_and_url_are_told_apart() {
    let record = |n: i64| json!({"order": {"id": n, "placed_at": at(n)}, "name": format!("n{n}")});
    let list = rows(record);
    let check = async |query: &str, page: Value, expected: &[&str]| {
        check_draft(&format!("https://example.com/v2/orders?{query}"), &[], &page.to_string(), expected)
            .await;
    };
    check(
        "page=1&pagesize=100",
        json!({"items": list, "has_more": true}),
        &["pagination = { kind = \"page\", first = 1, more = \"/has_more\" }", "id = \"/order/id\""],
    )
    .await;
    check(
        "startAt=0&maxResults=50",
        json!({"startAt": 0, "total": 120, "issues": list}),
        &["pagination = { kind = \"offset\", first = 0, total = \"/total\" }", "records = \"/issues\""],
    )
    .await;
    check(
        "cursor=",
        json!({"data": {"items": list, "paging": {"next": "b64", "limit": 20}}}),
        &["pagination = { kind = \"cursor\", pointer = \"/data/paging/next\" }", "records = \"/data/items\""],
    )
    .await;
    check(
        "a=b",
        json!({"data": {"items": {"nodes": list, "pageInfo": {"hasNextPage": true, "endCursor": "20"}}}}),
        &[
            "query = { \"after\" = \"{cursor}\" }",
            "pagination = { kind = \"cursor\", pointer = \"/data/items/pageInfo/endCursor\", more = \"/data/items/pageInfo/hasNextPage\" }",
        ],
    )
    .await;
    check(
        "start_time=1767225600",
        json!({"tickets": list, "count": 20, "end_of_stream": false, "next_page": "https://example.com/next"}),
        &["pagination = { kind = \"next_url\", pointer = \"/next_page\", more = \"!/end_of_stream\" }"],
    )
    .await;
    check(
        "cursor=",
        json!({"items": list, "next_page": "PnM6Mg%3D%3D"}),
        &["pagination = { kind = \"cursor\", pointer = \"/next_page\", encoded = true }"],
    )
    .await;
    // The last page names a next one as well, so the mark decides.
    check(
        "q=x",
        json!({"results": list, "links": {"next": "https://example.com/x"}, "meta": {"has_more": true}}),
        &["pagination = { kind = \"next_url\", pointer = \"/links/next\", more = \"/meta/has_more\" }"],
    )
    .await;
    check(
        "$top=20",
        json!({"@odata.nextLink": "https://example.com/?$skiptoken=1", "value": list}),
        &["pagination = { kind = \"next_url\", pointer = \"/@odata.nextLink\" }"],
    )
    .await;
    check(
        "q=x",
        json!({"hits": list, "page": 0, "nbPages": 50, "nbHits": 1000}),
        &[
            "query = { \"page\" = \"{page}\" }",
            "pagination = { kind = \"page\", first = 0, total_pages = \"/nbPages\" }",
        ],
    )
    .await;
}

#[tokio::test]
async fn every_arrangement_of_records_is_found() {
    let check = async |text: &str, expected: &[&str]| {
        check_draft("https://example.com/x", &[], text, expected).await;
    };
    check(
        r#"{"message": "success", "timestamp": 1767225605, "iss_position": {"latitude": "-42.5979", "longitude": "-56.8155"}}"#,
        &["records = \"\"", "time = \"/timestamp\"", "id = \"/timestamp\"", "pointer = \"/iss_position/latitude\""],
    )
    .await;
    let hours: Vec<String> = (0..24).map(|hour| format!("2025-12-31T{hour:02}:00")).collect();
    let degrees: Vec<f64> = (0..24).map(|hour| f64::from(hour) / 2.0).collect();
    check(
        &json!({"latitude": 52.5, "hourly": {"time": hours, "temperature_2m": degrees}}).to_string(),
        &[
            "records = \"/hourly\"",
            "shape = \"columnar\"",
            "id = \"/time\"",
            "time = \"/time\"",
            "time_zone = \"UTC\"",
            "measures = [\"temperature_2m\"]",
        ],
    )
    .await;
    check(
        r#"{"date": "2026-01-01", "quotes": {"EUR": {"rate": "1.10"}, "USD": {"rate": "1.00"}}}"#,
        &["records = \"/quotes/*\"", "id = \"key:\"", "time = \"page:/date\"", "type = \"double\""],
    )
    .await;
    check(
        r#"{"data": [{"id": 1}], "included": [{"id": 2}, {"id": 3}]}"#,
        &["records = \"/data\"", "time = \"interval\""],
    )
    .await;
    check(
        &rows(|n| json!([(T0 + n) * 1000, "91234.50", 17])).to_string(),
        &["records = \"\"", "time = \"/0\"", "name = \"field_1\"", "type = \"double\""],
    )
    .await;
    let lines = (0..3).fold(String::new(), |mut text, n| {
        let _ = writeln!(text, "{}", json!({"id": n, "at": at(n)}));
        text
    });
    check(&lines, &["format = \"ndjson\"", "id = \"/id\"", "time = \"/at\""]).await;
    check(
        "id;at;price\n1;2026-01-01 00:00:01Z;1.5\n2;2026-01-01 00:00:02Z;\n",
        &["format = \"csv\"", "delimiter = \";\"", "id = \"/id\"", "time = \"/at\"", "name = \"price\""],
    )
    .await;
    let csv = "time,id,mag\n2026-01-01T00:00:01.000Z,us1,4.6\n2026-01-01T00:00:02.000Z,us2,\n";
    check_draft(
        "https://example.com/q.csv",
        &[("content-type", "text/csv")],
        csv,
        &["id = \"/id\"", "time = \"/time\""],
    )
    .await;
}

#[test]
fn types_follow_from_all_values() {
    let check = |values: &[&str], name: &str, expected: &str| {
        let records =
            values.iter().zip(1..).map(|(value, n)| format!("{{\"id\": {n}, \"{name}\": {value}}}"));
        let text = format!("[{}]", records.collect::<Vec<_>>().join(", "));
        let file = drafted("https://example.com/x", &[], &text).unwrap();
        Definition::parse("draft", &file).unwrap_or_else(|e| panic!("{e}\n{file}"));
        let lines: Vec<&str> = file.lines().collect();
        let keys = lines.iter().skip_while(|line| **line != "[[column]]").skip(1).take(4);
        let keys: Vec<&str> = keys.copied().filter(|line| !line.starts_with('#')).collect();
        assert!(keys.join(" ").contains(expected), "`{expected}` is not in {keys:?}");
    };
    check(&["1", "null", "1000"], "size", "type = \"int\"");
    check(&["1", "5000000000"], "size", "type = \"bigint\"");
    check(&["1", "18446744073709551616"], "size", "type = \"varint\"");
    check(&["1", "1.5"], "size", "type = \"double\"");
    check(&["\"17\"", "\"\"", "\"18.5\""], "price", "type = \"double\"");
    check(&["\"01067\"", "\"10115\""], "plz", "type = \"text\"");
    check(&["\"10115\"", "\"10117\""], "postcode", "type = \"text\"");
    check(&["\"true\"", "false"], "flag", "type = \"boolean\"");
    check(&["1", "\"x\""], "mixed", "type = \"text\"");
    check(&["[1]", "null"], "tags", "type = \"json\"");
    check(&["{\"a\": 1}", "3"], "odd", "type = \"json\"");
    check(&["\"0f2a6a6e-9a0e-4f0f-8a0c-0a6d1e6a7b11\"", "null"], "link", "type = \"uuid\"");
    check(&["1767225600", "null"], "opened", "type = \"timestamp\" unit = \"s\"");
    check(&["1767225600123456", "null"], "opened", "unit = \"us\"");
    check(&["1767225600", "null"], "size", "type = \"bigint\"");
    check(&["\"/Date(1767225600000+0530)/\"", "null"], "m", "type = \"timestamp\"");
    check(&["\"2026-01-01T00:00:03.000+0000\"", "null"], "m", "type = \"timestamp\"");
    check(&["1", "2"], "order", "name = \"order_value\" type = \"int\" pointer = \"/order\"");
    check(&["1", "2"], "closeTime", "name = \"close_time\" type = \"int\" pointer = \"/closeTime\"");
    check(&["1", "2"], "Größe / m²", "pointer = \"/Größe ~1 m²\"");
}

#[test]
fn a_secret_never_reaches_the_file() {
    let headers =
        [("Authorization".to_owned(), "Bearer SECRET-123456".to_owned()), ("X-V".to_owned(), "2".to_owned())];
    let text =
        json!({"next": "https://h/x?api_key=SECRET-abcdef", "items": [{"id": "SECRET-abcdef"}]}).to_string();
    let file = draft(&Answer {
        name: Some("Mine, Too"),
        url: "https://h/x?api_key=SECRET-abcdef&a=b",
        request_headers: &headers,
        allow_private: true,
        text: text.as_bytes(),
        headers: &Headers::default(),
        now_ms: NOW_MS,
    })
    .unwrap();
    let definition = Definition::parse("draft", &file).unwrap_or_else(|e| panic!("{e}\n{file}"));
    assert_eq!(definition.stream.name, "mine_too");
    assert!(!file.contains("123456") && !file.contains("abcdef"), "{file}");
    for part in [
        "{ kind = \"bearer\", token_env = \"MINE_TOO_KEY\" }",
        "query = \"api_key\"",
        "headers = { \"X-V\" = \"2\" }",
    ] {
        assert!(file.contains(part), "`{part}` is not in {file}");
    }
}

#[test]
fn an_answer_without_records_says_what_to_do() {
    let check = |text: &str, expected: &str| {
        let error = drafted("https://h/x", &[], text).unwrap_err().to_string();
        assert!(error.contains(expected), "`{expected}` is not in {error}");
    };
    check("", "give a URL that returns some");
    check("[]", "give a URL that returns some");
    check(r#"{"items": [], "total": 0}"#, "give a URL that returns some");
    check(r#"{"ok": false, "error": "ratelimited"}"#, "reports an error: \"ratelimited\"");
    check("<html><body>", "starts with `<html><body>`");
}

#[test]
fn parameters_become_placeholders_in_the_form_of_their_value() {
    let check = |query: &str, expected: &str| {
        let file = drafted(&format!("https://h/x?{query}"), &[], r#"[{"id": 1}]"#).unwrap();
        let url = format!("url = \"https://h/x?{expected}\"");
        assert!(file.contains(&url), "{url} is not in\n{file}");
        Definition::parse("draft", &file).unwrap_or_else(|e| panic!("{e}\n{file}"));
    };
    check("from=2026-01-01&to=2026-01-02", "from={interval.start:%Y-%m-%d}&to={interval.end:%Y-%m-%d}");
    check("from=2026-01-01&to=2026-01-01", "from={interval.start:%Y-%m-%d}&to={interval.last:%Y-%m-%d}");
    check(
        "startTime=1767225600000&endTime=1767225660000",
        "startTime={interval.start_unix_ms}&endTime={interval.end_unix_ms}",
    );
    check("fromdate=1767225600&sort=creation", "fromdate={interval.start_unix}&sort=creation");
    check("updated_after=2026-01-01T00%3A00%3A00Z", "updated_after={interval.start}");
    check("start=2026-01-01T00:00&q=1", "start={interval.start:%Y-%m-%dT%H:%M}&q=1");
    check("page=3&per_page=50", "page={page}&per_page={page_size}");
    check("offset=0&limit=50", "offset={offset}&limit={page_size}");
    check("since=yesterday&year=2026", "since=yesterday&year=2026");
}

#[test]
fn a_draft_explains_its_guesses() {
    let charge = |n: i64| json!({"id": n, "created_at": at(n), "updated_at": at(n), "amount": 1.5, "note": null, "status": either(n, "paid", "open"), "tags": ["x"]});
    let page = json!({"items": rows(charge), "total": 100, "next_cursor": "abc"});
    insta::assert_snapshot!(
        drafted("https://api.example.com/v1/items?limit=20", &[], &page.to_string()).unwrap()
    );
}

/// JSON values of a few levels.
fn values() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (1_700_000_000i64..1_767_225_600).prop_map(Value::from),
        ".{0,8}".prop_map(Value::from),
        "20[0-9]{2}-0[1-9]-1[0-9]".prop_map(Value::from),
    ];
    let name = "(id|time|created_at|next|items|total|page|a/b|ä ~|order|[a-zA-Z]{1,60})";
    leaf.prop_recursive(4, 60, 6, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::btree_map(name, inner, 0..6)
                .prop_map(|members| Value::Object(members.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn every_draft_parses(value in values(), query in "([a-z_]{1,9}=[a-z0-9:-]{0,12}&){0,3}") {
        if let Ok(file) = drafted(&format!("https://api.example.com/things?{query}"), &[], &value.to_string()) {
            let parsed = Definition::parse("draft", &file);
            prop_assert!(parsed.is_ok(), "{}\n{file}", parsed.unwrap_err());
        }
    }
}
