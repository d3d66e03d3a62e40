//! Situations from the field, each as a stream definition against a source that answers as such APIs do. Each case runs
//! through the producer, Kafka, the processor and Cassandra.

mod stub;

use futures::StreamExt;
use serde_json::Value;

use crate::harness::{LONG_TIMEOUT, Pipeline, text, wait_until};

/// Cases that run at the same time.
const AT_ONCE: usize = 3;

/// One case: the source and how its records are read.
struct Case {
    name: &'static str,
    /// The parts of the definition that differ from [`BASE`].
    definition: &'static str,
    expected: Expected,
}

/// What has to become of the interval.
enum Expected {
    /// Event rows and dead letters.
    Rows { rows: usize, dead_letters: i64 },
    /// The run fails with this cause.
    Failed(&'static str),
}

const fn case(name: &'static str, rows: usize, definition: &'static str) -> Case {
    Case { name, definition, expected: Expected::Rows { rows, dead_letters: 0 } }
}

const fn failing(name: &'static str, cause: &'static str, definition: &'static str) -> Case {
    Case { name, definition, expected: Expected::Failed(cause) }
}

/// What all definitions share. `URL` stands for the path of the case.
const BASE: &str = r#"
[stream]
name = "case"
schedule = { every = "1m" }
retry = { attempts = 2, backoff = "1s", max_backoff = "5s", deadline = "1m" }
[source]
allow_private = true
[event]
id = "/id"
time = "/at"
type = "case"
[[column]]
name = "value"
type = "text"
[store]
bucket = "1d"
shards = 1
ttl = "0"
[windows]
pane = "1m"
lateness = "1h"
"#;

const CASES: &[Case] = &[
    case(
        "page-clipped",
        250,
        r#"source.url = "http://h/page-clipped/?per_page={page_size}&page={page}"
source.page_size = 500
source.pagination = { kind = "page" }"#,
    ),
    case(
        "jira-startat",
        120,
        r#"source.url = "http://h/jira-startat/?maxResults={page_size}&startAt={offset}"
source.records = "/issues"
source.page_size = 200
source.pagination = { kind = "offset", total = "/total" }"#,
    ),
    case(
        "wp-past-end",
        200,
        r#"source.url = "http://h/wp-past-end/?per_page={page_size}&page={page}"
source.page_size = 100
source.pagination = { kind = "page" }
source.end_on = [400]"#,
    ),
    case(
        "zendesk",
        130,
        r#"source.url = "http://h/zendesk/tickets?start={interval.start_unix}"
source.records = "/tickets"
source.pagination = { kind = "next_url", pointer = "/next_page", more = "!/end_of_stream" }"#,
    ),
    case(
        "two-link-headers",
        30,
        r#"source.url = "http://h/two-link-headers/?limit=10"
source.pagination = { kind = "link_header" }"#,
    ),
    case(
        "preencoded-cursor",
        70,
        r#"source.url = "http://h/preencoded-cursor/"
source.query = { cursor = "{cursor}" }
source.records = "/items"
source.pagination = { kind = "cursor", pointer = "/next_page", encoded = true }"#,
    ),
    case(
        "cursor-in-header",
        120,
        r#"source.url = "http://h/cursor-in-header/?continuationToken={cursor}"
source.records = "/value"
source.pagination = { kind = "cursor", pointer = "header:x-ms-continuationtoken" }"#,
    ),
    case(
        "short-middle-page",
        71,
        r#"source.url = "http://h/short-middle-page/?pagesize={page_size}&page={page}"
source.records = "/items"
source.page_size = 30
source.pagination = { kind = "page", more = "/has_more" }"#,
    ),
    case(
        "post-graphql",
        60,
        r#"source.url = "http://h/post-graphql/graphql"
source.method = "POST"
source.body = { query = "{ items { id } }", variables = { after = "{cursor}" } }
source.records = "/data/items/nodes"
source.pagination = { kind = "cursor", pointer = "/data/items/pageInfo/endCursor", more = "/data/items/pageInfo/hasNextPage" }"#,
    ),
    case(
        "per-symbol",
        3,
        r#"source.url = "http://h/per-symbol/?symbol={each.symbol}"
source.for_each = { name = "symbol", values = ["BTCUSDT", "ETHUSDT", "SOLUSDT"] }
event.id = "/symbol"
event.time = "/closeTime"
column = [{ name = "price", type = "decimal", pointer = "/lastPrice" }, { name = "value", type = "text", pointer = "each:symbol" }]"#,
    ),
    case(
        "repository",
        5,
        r#"source.url = "http://h/repository/?name={each.repository}"
source.for_each = { url = "http://h/organisation/", fields = { repository = "/name", stars = "/stars" } }
event.id = ["each:repository", "/id"]
column = [{ name = "value", type = "int", pointer = "each:stars" }]"#,
    ),
    case(
        "date-only",
        3,
        r#"source.url = "http://h/date-only/?start_date={interval.start:%Y-%m-%d}&end_date={interval.last:%Y-%m-%d}"
source.records = "/items""#,
    ),
    case(
        "epoch-ms-param",
        3,
        r#"source.url = "http://h/epoch-ms-param/?startTime={interval.start_unix_ms}&endTime={interval.last_unix_ms}"
source.records = "/items""#,
    ),
    case("items-null", 0, "source.url = \"http://h/items-null/\"\nsource.records = \"/items\""),
    case("no-content", 0, "source.url = \"http://h/no-content/\"\nsource.records = \"/items\""),
    case(
        "single-object",
        1,
        r#"source.url = "http://h/single-object/"
event.id = "/timestamp"
event.time = "/timestamp"
event.time_unit = "s"
column = [{ name = "value", type = "double", pointer = "/iss_position/latitude" }]"#,
    ),
    case(
        "columnar",
        24,
        r#"source.url = "http://h/columnar/"
source.records = "/hourly"
source.shape = "columnar"
event.id = "/time"
event.time = "/time"
event.time_zone = "UTC"
column = [{ name = "value", type = "double", pointer = "/temperature_2m" }]"#,
    ),
    case("ndjson", 3, "source.url = \"http://h/ndjson/\""),
    case("csv", 2, "source.url = \"http://h/csv/\"\ncolumn = [{ name = \"value\", type = \"int\" }]"),
    case(
        "exploded",
        3,
        r#"source.url = "http://h/exploded/"
source.records = "/orders/*/lines"
event.id = ["parent:/id", "/n"]
event.time = "page:/at""#,
    ),
    case(
        "keyed",
        2,
        r#"source.url = "http://h/keyed/"
source.records = "/quotes/*"
event.id = "key:"
event.time = "interval"
column = [{ name = "value", type = "decimal", pointer = "/rate" }]
windows.lateness = "1h""#,
    ),
    case(
        "iso-no-zone",
        2,
        r#"source.url = "http://h/iso-no-zone/"
source.records = "/items"
event.time = "/t"
event.time_zone = "UTC""#,
    ),
    case(
        "iso-0000",
        2,
        "source.url = \"http://h/iso-0000/\"\nsource.records = \"/items\"\nevent.time = \"/t\"",
    ),
    case(
        "epoch-text",
        2,
        r#"source.url = "http://h/epoch-text/"
source.records = "/items"
event.id = "/t"
event.time = "/t"
event.time_unit = "s""#,
    ),
    case(
        "ms-json-date",
        1,
        r#"source.url = "http://h/ms-json-date/"
source.records = "/items"
event.time = "/t"
column = [{ name = "value", type = "timestamp", pointer = "/t", required = true }]"#,
    ),
    case(
        "number-texts",
        2,
        r#"source.url = "http://h/number-texts/"
column = [
    { name = "value", type = "double", pointer = "/price", required = true },
    { name = "qty", type = "double" },
    { name = "trades", type = "int", required = true },
    { name = "is_maker", type = "boolean", required = true },
]"#,
    ),
    case(
        "nested-in-text",
        2,
        r#"source.url = "http://h/nested-in-text/"
source.records = "/items"
column = [{ name = "value", type = "json", pointer = "/tags" }]"#,
    ),
    case(
        "nan",
        2,
        r#"source.url = "http://h/nan/"
source.records = "/items"
column = [{ name = "value", type = "double", pointer = "/v" }]"#,
    ),
    case(
        "big-ids",
        4,
        r#"source.url = "http://h/big-ids/"
source.records = "/items"
column = [{ name = "value", type = "varint", pointer = "/id" }]"#,
    ),
    Case {
        name: "lone-surrogate",
        definition: r#"source.url = "http://h/lone-surrogate/"
source.records = "/items"
column = [{ name = "value", type = "text", pointer = "/text" }]"#,
        expected: Expected::Rows { rows: 1, dead_letters: 1 },
    },
    case("bom", 3, "source.url = \"http://h/bom/\"\nsource.records = \"/items\""),
    case("gzip-upper", 3, "source.url = \"http://h/gzip-upper/\""),
    case("github-403", 3, "source.url = \"http://h/github-403/\""),
    case("date-429", 3, "source.url = \"http://h/date-429/\""),
    case(
        "float-digits",
        1000,
        r#"source.url = "http://h/float-digits/"
column = [{ name = "value", type = "double", pointer = "/v" }, { name = "digits", type = "text", pointer = "/v" }]"#,
    ),
    case(
        "key-in-query",
        3,
        r#"source.url = "http://h/key-in-query/"
source.records = "/items"
source.auth = { kind = "api_key", query = "api_key", key_env = "CASE_KEY" }"#,
    ),
    failing(
        "empty-while-down",
        "the interval has 0 records, but source.min_records is 1",
        "source.url = \"http://h/empty-while-down/\"\nsource.records = \"/results\"\nsource.min_records = 1",
    ),
    failing(
        "error-200",
        "the source reports an error at /error: ratelimited",
        "source.url = \"http://h/error-200/\"\nsource.records = \"/messages\"",
    ),
    failing(
        "partial-errors",
        "the source reports an error at /_shards/failed: 2",
        r#"source.url = "http://h/partial-errors/"
source.records = "/hits/hits"
source.error = ["/_shards/failed", "/timed_out"]"#,
    ),
    failing(
        "reset-429",
        "the source returned 429 Too Many Requests: {\"errors\"",
        "source.url = \"http://h/reset-429/\"",
    ),
];

/// Merges the tables of `more` into `base`.
fn merged(base: &mut toml::Table, more: toml::Table) {
    for (key, value) in more {
        match (base.get_mut(&key), value) {
            (Some(toml::Value::Table(inner)), toml::Value::Table(more)) => merged(inner, more),
            (_, value) => drop(base.insert(key, value)),
        }
    }
}

impl Case {
    fn file(&self) -> String {
        let mut table: toml::Table = BASE.parse().unwrap();
        merged(&mut table, self.definition.parse().unwrap());
        table.to_string()
    }

    async fn run(&self) {
        let pipeline = Pipeline::with_stream(&self.name.replace('-', "_"), |_| self.file()).await;
        stub::serve(pipeline.source_listener().await);
        pipeline.init().await;
        let (from, to) = ("2026-01-01T00:00:00Z", "2026-01-01T00:01:00Z");
        let key = [("CASE_KEY", "SECRET123".to_owned())];
        let fetched = pipeline.run("ingest-producer", &["backfill", "--from", from, "--to", to], &key).await;
        let output = text(&fetched.stdout) + &text(&fetched.stderr);
        assert!(!output.contains("SECRET123"), "{}: {output}", self.name);
        let runs = pipeline.runs().await;
        let run = &runs[&(stub::T0 * 1000)];
        match &self.expected {
            Expected::Failed(cause) => {
                assert!(run.state == "failed" && run.error.contains(cause), "{}: {run:?}", self.name);
            }
            Expected::Rows { rows, dead_letters } => {
                assert!(
                    fetched.status.success() && run.state == "succeeded",
                    "{}: {run:?} {output}",
                    self.name
                );
                let processor = pipeline.processor("one");
                wait_until("the whole log is processed", LONG_TIMEOUT, || async {
                    pipeline.progress().await.next_offsets == pipeline.log_end(&pipeline.topic).await
                })
                .await;
                assert_eq!(pipeline.event_ids().await.len(), *rows, "{}", self.name);
                assert_eq!(pipeline.progress().await.dead_letters, *dead_letters, "{}", self.name);
                if self.name == "float-digits" {
                    pipeline.assert_doubles_keep_their_digits().await;
                }
                processor.stop().await;
            }
        }
    }
}

impl Pipeline {
    async fn assert_doubles_keep_their_digits(&self) {
        let query = format!("SELECT value, digits FROM {}.case", self.keyspace);
        let rows = self.session.query_unpaged(query, ()).await.unwrap().into_rows_result().unwrap();
        for row in rows.rows::<(f64, String)>().unwrap() {
            let (value, digits) = row.unwrap();
            assert_eq!(value.to_bits(), digits.parse::<f64>().unwrap().to_bits(), "{digits}");
        }
    }

    /// The ids of all event rows in Cassandra.
    async fn event_ids(&self) -> Vec<String> {
        let query = format!("SELECT event_id FROM {}.case", self.keyspace);
        let rows = self.session.query_unpaged(query, ()).await.unwrap().into_rows_result().unwrap();
        rows.rows::<(String,)>().unwrap().map(|row| row.unwrap().0).collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn situations_from_the_field_end_as_they_should() {
    let mut running = futures::stream::iter(CASES).map(Case::run).buffer_unordered(AT_ONCE);
    while running.next().await.is_some() {}
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_shows_up_late_is_counted_once_by_a_stream_that_looks_back() {
    let late = case(
        "late-arrival",
        0,
        r#"source.url = "http://h/late-arrival/?to={interval.end_unix}"
stream.schedule = { every = "5s" }
stream.delay = "1s"
stream.lookback = 1
stream.catch_up = 0"#,
    );
    let pipeline = Pipeline::with_stream("late_arrival", |_| late.file()).await;
    stub::serve(pipeline.source_listener().await);
    pipeline.init().await;
    let (producer, processor) = (pipeline.producer(), pipeline.processor("one"));
    wait_until("four intervals were fetched, three of them twice", LONG_TIMEOUT, || async {
        let runs = pipeline.runs().await;
        runs.len() > 3
            && runs.values().take(3).all(|run| run.run_type == "lookback" && run.state == "succeeded")
    })
    .await;
    let complete: Vec<i64> =
        pipeline.runs().await.keys().take(3).map(|start_ms| start_ms / 1000 + 5).collect();
    producer.stop().await;
    wait_until("the whole log is processed", LONG_TIMEOUT, || async {
        pipeline.progress().await.next_offsets == pipeline.log_end(&pipeline.topic).await
    })
    .await;
    let ids = pipeline.event_ids().await;
    for end in complete {
        let of_interval: Vec<&String> = ids.iter().filter(|id| id.ends_with(&format!("-{end}"))).collect();
        assert_eq!(of_interval.len(), 2, "first and late: {ids:?}");
    }
    assert_eq!(pipeline.progress().await.events, ids.len() as i64);
    processor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn source_check_names_what_would_go_wrong() {
    let check = async |definition: &'static str| {
        let case = case("check", 0, definition);
        let pipeline = Pipeline::with_stream("check", |_| case.file()).await;
        stub::serve(pipeline.source_listener().await);
        let output = pipeline.run("ingest-producer", &["source", "check", "--json"], &[]).await;
        let report: Value =
            serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", text(&output.stderr)));
        (output.status.code().unwrap(), report.to_string())
    };
    for (definition, code, expected) in [
        (
            "source.url = \"http://h/iso-no-zone/\"\nsource.records = \"/items\"\nevent.time = \"/t\"",
            1,
            "has no time zone; declare one",
        ),
        (
            "source.url = \"http://h/epoch-text/\"\nsource.records = \"/items\"\nevent.time = \"/t\"",
            0,
            "before 2000 or after 2100; is event.time_unit right?",
        ),
        (
            "source.url = \"http://h/nested-in-text/\"\nsource.records = \"/items\"\ncolumn = [{ name = \"tags\", type = \"text\" }]",
            1,
            "a list is not a valid text",
        ),
        (
            "source.url = \"http://h/items-null/\"\nsource.records = \"/itemz\"",
            0,
            "no value at source.records",
        ),
        (
            "source.url = \"http://h/page-clipped/?page={page}\"\nsource.pagination = { kind = \"page\" }",
            0,
            "the source chooses the size of a page",
        ),
    ] {
        let (found, report) = check(definition).await;
        assert!(
            found == code && report.contains(expected),
            "`{expected}` ({code}) is not in {report} ({found})"
        );
    }
}
