//! A source that answers like APIs from the field: clipped pages, odd marks of the end, unusual shapes, times and
//! encodings. The first part of the path names the case.

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Query, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri};
use axum::response::IntoResponse;
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::Write;
use std::sync::{Arc, Mutex};

/// 2026-01-01T00:00:00Z.
pub const T0: i64 = 1_767_225_600;

type Parameters = BTreeMap<String, String>;
/// Status, headers and body.
type Answer = (u16, Vec<(&'static str, String)>, Vec<u8>);

/// A request without its case.
struct Request<'a> {
    query: &'a Parameters,
    body: &'a [u8],
    /// Number of earlier requests of the case.
    earlier: usize,
    origin: String,
}

impl Request<'_> {
    fn number(&self, name: &str, default: usize) -> usize {
        self.query.get(name).and_then(|text| text.parse().ok()).unwrap_or(default)
    }

    fn text(&self, name: &str) -> &str {
        self.query.get(name).map_or("", String::as_str)
    }
}

/// Serves the cases on this listener until the test ends.
pub fn serve(listener: tokio::net::TcpListener) {
    let requests: Arc<Mutex<BTreeMap<String, usize>>> = Arc::default();
    let router = Router::new().fallback(answer).with_state(requests);
    tokio::spawn(async move { axum::serve(listener, router).await });
}

async fn answer(
    State(requests): State<Arc<Mutex<BTreeMap<String, usize>>>>,
    uri: Uri,
    Query(query): Query<Parameters>,
    headers: HeaderMap,
    body: Bytes,
) -> impl IntoResponse {
    let case = uri.path().split('/').nth(1).unwrap_or_default().to_owned();
    let earlier = {
        let mut requests = requests.lock().unwrap();
        let count = requests.entry(case.clone()).or_default();
        *count += 1;
        *count - 1
    };
    let host = headers.get("host").and_then(|host| host.to_str().ok()).unwrap_or_default();
    let request = Request { query: &query, body: &body, earlier, origin: format!("http://{host}") };
    let (status, more, body) = pages(&case, &request)
        .or_else(|| parameters(&case, &request))
        .or_else(|| shapes(&case))
        .or_else(|| failures(&case, &request))
        .unwrap_or_else(|| (404, vec![], format!("no case {case}").into_bytes()));
    let mut headers = HeaderMap::new();
    headers.insert("content-type", HeaderValue::from_static("application/json"));
    for (name, value) in more {
        let (name, value) = (HeaderName::from_static(name), HeaderValue::from_str(&value).unwrap());
        if name == "link" {
            headers.append(name, value);
        } else {
            headers.insert(name, value);
        }
    }
    (StatusCode::from_u16(status).unwrap(), headers, body)
}

fn at(seconds: i64) -> String {
    chrono::DateTime::from_timestamp(seconds, 0).unwrap().to_rfc3339_opts(chrono::SecondsFormat::Secs, true)
}

fn rows(from: usize, to: usize) -> Vec<Value> {
    (from..to).map(|n| json!({"id": format!("r{n:05}"), "at": at(T0 + n as i64), "value": n})).collect()
}

fn ok(body: &Value) -> Option<Answer> {
    Some((200, vec![], body.to_string().into_bytes()))
}

fn raw(text: &str) -> Option<Answer> {
    Some((200, vec![], text.as_bytes().to_vec()))
}

/// Cases whose interval has several pages.
fn pages(case: &str, request: &Request<'_>) -> Option<Answer> {
    let page = request.number("page", 1);
    match case {
        // Never gives more than 100 records a page.
        "page-clipped" => {
            let size = request.number("per_page", 20).min(100);
            ok(&json!(rows(((page - 1) * size).min(250), (page * size).min(250))))
        }
        "jira-startat" => {
            let from = request.number("startAt", 0).min(120);
            let to = (from + request.number("maxResults", 50).min(50)).min(120);
            ok(&json!({"total": 120, "issues": rows(from, to)}))
        }
        "wp-past-end" if page > 2 => {
            Some((400, vec![], br#"{"code": "rest_post_invalid_page_number"}"#.to_vec()))
        }
        "wp-past-end" => ok(&json!(rows((page - 1) * 100, page * 100))),
        // The last page names itself.
        "zendesk" => {
            let next = format!("{}/zendesk/tickets?start={}", request.origin, T0 + 100);
            if request.text("start") == (T0 + 100).to_string() {
                ok(&json!({"tickets": rows(99, 130), "end_of_stream": true, "next_page": next}))
            } else {
                ok(&json!({"tickets": rows(0, 100), "end_of_stream": false, "next_page": next}))
            }
        }
        "two-link-headers" => {
            let (from, next) = match request.text("after") {
                "" => (0, Some("a1")),
                "a1" => (10, Some("a2")),
                _ => (20, None),
            };
            let mut links = vec![("link", "</two-link-headers/?x=1>; rel=\"self\"".to_owned())];
            links.extend(
                next.map(|next| ("link", format!("</two-link-headers/?after={next}>; rel=\"next\""))),
            );
            Some((200, links, json!(rows(from, from + 10)).to_string().into_bytes()))
        }
        "preencoded-cursor" => match request.text("cursor") {
            "" => ok(&json!({"items": rows(0, 50), "next_page": "PnM6Mg%3D%3D"})),
            "PnM6Mg==" => ok(&json!({"items": rows(50, 70), "next_page": null})),
            _ => Some((400, vec![], b"Invalid cursor".to_vec())),
        },
        "cursor-in-header" => {
            let from = request.number("continuationToken", 0);
            let next = (from < 80).then(|| ("x-ms-continuationtoken", (from + 40).to_string()));
            let body = json!({"value": rows(from, from + 40)}).to_string().into_bytes();
            Some((200, next.into_iter().collect(), body))
        }
        "short-middle-page" => {
            let (from, to) = [(0, 0), (0, 30), (30, 41), (60, 90)].get(page).copied().unwrap_or((0, 0));
            ok(&json!({"items": rows(from, to), "has_more": page < 3}))
        }
        "post-graphql" => {
            let body: Value = serde_json::from_slice(request.body).ok()?;
            let after = body["variables"]["after"].as_str().map_or(0, |text| text.parse().unwrap());
            let page = json!({"hasNextPage": after < 40, "endCursor": (after + 20).to_string()});
            ok(&json!({"data": {"items": {"nodes": rows(after, after + 20), "pageInfo": page}}}))
        }
        _ => None,
    }
}

/// Cases whose requests need certain parameters.
fn parameters(case: &str, request: &Request<'_>) -> Option<Answer> {
    match case {
        "per-symbol" => {
            let prices = [("BTCUSDT", "91234.5"), ("ETHUSDT", "3123.25"), ("SOLUSDT", "201.75")];
            let (symbol, price) = prices.iter().find(|(symbol, _)| *symbol == request.text("symbol"))?;
            ok(&json!([{"symbol": symbol, "closeTime": T0 * 1000 + 1, "lastPrice": price}]))
        }
        // A record shows up three seconds after the end of its interval.
        "late-arrival" => {
            let end = request.number("to", 0) as i64;
            let record = |name: &str| json!({"id": format!("{name}-{end}"), "at": at(end - 1)});
            let mut records = vec![record("first")];
            if chrono::Utc::now().timestamp() > end + 3 {
                records.push(record("late"));
            }
            ok(&json!(records))
        }
        "organisation" => ok(&json!([{"name": "one", "stars": 3}, {"name": "two", "stars": 5}])),
        "repository" => ok(&json!(rows(0, if request.text("name") == "one" { 2 } else { 3 }))),
        "date-only" if request.text("start_date").len() != 10 => {
            Some((400, vec![], br#"{"reason": "Invalid date format"}"#.to_vec()))
        }
        "epoch-ms-param" if request.text("startTime").len() != 13 => {
            Some((400, vec![], br#"{"msg": "Illegal characters"}"#.to_vec()))
        }
        "date-only" | "epoch-ms-param" => ok(&json!({"items": rows(0, 3)})),
        _ => None,
    }
}

/// Cases with unusual records and values.
fn shapes(case: &str) -> Option<Answer> {
    let times = |values: Value| {
        let items = values.as_array().unwrap().iter().zip(0..).map(|(t, n)| json!({"id": n, "t": t}));
        ok(&json!({"items": items.collect::<Vec<_>>()}))
    };
    match case {
        "items-null" => ok(&json!({"items": null, "total": 0})),
        "no-content" => Some((204, vec![], vec![])),
        "single-object" => ok(
            &json!({"timestamp": T0 + 5, "iss_position": {"latitude": "-42.5979", "longitude": "-56.8155"}}),
        ),
        "columnar" => {
            let hours: Vec<String> = (0..24).map(|hour| format!("2026-01-01T{hour:02}:00")).collect();
            let values: Vec<f64> = (0..24).map(|hour| f64::from(hour) / 2.0).collect();
            ok(&json!({"hourly": {"time": hours, "temperature_2m": values}}))
        }
        "ndjson" => {
            let lines: Vec<String> = rows(0, 3).iter().map(Value::to_string).collect();
            Some((
                200,
                vec![("content-type", "application/x-ndjson".to_owned())],
                lines.join("\n").into_bytes(),
            ))
        }
        "csv" => {
            let text = "id,at,value\n1,2026-01-01 00:00:01Z,17\n2,2026-01-01 00:00:02Z,\n";
            Some((200, vec![("content-type", "text/csv; charset=utf-8".to_owned())], text.into()))
        }
        "exploded" => ok(
            &json!({"at": at(T0), "orders": [{"id": 1, "lines": [{"n": 1}, {"n": 2}]}, {"id": 2, "lines": [{"n": 1}]}]}),
        ),
        "keyed" => ok(&json!({"quotes": {"EUR": {"rate": "1.10"}, "USD": {"rate": "1.00"}}})),
        "iso-no-zone" => times(json!(["2026-01-01T00:00:03.000", "2026-01-01T00:00:04.000"])),
        "iso-0000" => times(json!(["2026-01-01T00:00:03.000+0000", "2026-01-01T01:00:04+0100"])),
        "epoch-text" => times(json!([format!("{T0}.000247"), format!("{}.000247", T0 + 1)])),
        "ms-json-date" => times(json!([format!("/Date({}+0530)/", T0 * 1000)])),
        "number-texts" => ok(&json!([
            {"id": 1, "at": (T0 + 1) * 1000, "price": "91234.50000000", "qty": "0.00100000", "trades": "17", "is_maker": "true"},
            {"id": 2, "at": (T0 + 2) * 1000, "price": "91235.00000000", "qty": "", "trades": "0", "is_maker": "false"},
        ])),
        "nested-in-text" => ok(
            &json!({"items": [{"id": "a", "at": at(T0), "tags": ["x", "y"]}, {"id": "b", "at": at(T0), "tags": []}]}),
        ),
        "nan" => raw(
            r#"{"items":[{"id":"a","at":"2026-01-01T00:00:01Z","v":NaN},{"id":"b","at":"2026-01-01T00:00:02Z","v":1.5}]}"#,
        ),
        "big-ids" => raw(
            r#"{"items":[{"id":738529527931269425,"at":"2026-01-01T00:00:01Z"},{"id":18446744073709551615,"at":"2026-01-01T00:00:01Z"},{"id":12345678901234567890123,"at":"2026-01-01T00:00:01Z"},{"id":12345678901234567890124,"at":"2026-01-01T00:00:01Z"}]}"#,
        ),
        "lone-surrogate" => raw(
            r#"{"items":[{"id":"a","at":"2026-01-01T00:00:01Z","text":"fine"},{"id":"b","at":"2026-01-01T00:00:02Z","text":"cut \ud83d"}]}"#,
        ),
        "float-digits" => {
            let values = (1..=1000).map(|n| f64::from(n).sqrt().sin() * 180.0);
            let items = values.zip(0..).map(|(v, n)| json!({"id": format!("f{n}"), "at": at(T0), "v": v}));
            ok(&json!(items.collect::<Vec<_>>()))
        }
        "gzip-upper" => {
            let mut packed = GzEncoder::new(Vec::new(), Compression::fast());
            packed.write_all(json!(rows(0, 3)).to_string().as_bytes()).unwrap();
            Some((200, vec![("content-encoding", "GZIP".to_owned())], packed.finish().unwrap()))
        }
        "bom" => Some((
            200,
            vec![],
            [b"\xef\xbb\xbf".as_slice(), json!({"items": rows(0, 3)}).to_string().as_bytes()].concat(),
        )),
        _ => None,
    }
}

/// Cases of refused and failed requests.
fn failures(case: &str, request: &Request<'_>) -> Option<Answer> {
    match case {
        "empty-while-down" => ok(&json!({"results": [], "info": {"results": 1}})),
        "error-200" => Some((
            200,
            vec![("retry-after", "30".to_owned())],
            br#"{"ok": false, "error": "ratelimited"}"#.to_vec(),
        )),
        "partial-errors" => ok(
            &json!({"timed_out": true, "_shards": {"failed": 2}, "hits": {"total": 500, "hits": rows(0, 20)}}),
        ),
        "github-403" if request.earlier == 0 => Some((
            403,
            vec![("retry-after", "1".to_owned())],
            br#"{"message": "You have exceeded a secondary rate limit."}"#.to_vec(),
        )),
        "github-403" => ok(&json!(rows(0, 3))),
        "date-429" if request.earlier == 0 => {
            let after = (chrono::Utc::now() + chrono::TimeDelta::seconds(2)).to_rfc2822();
            Some((429, vec![("retry-after", after)], vec![]))
        }
        "date-429" => ok(&json!(rows(0, 3))),
        "reset-429" => {
            let reset = chrono::Utc::now().timestamp() + 900;
            Some((
                429,
                vec![("x-ratelimit-reset", reset.to_string())],
                b"{\"errors\": [\"Too many requests\"]}".to_vec(),
            ))
        }
        "key-in-query" if request.text("api_key") == "SECRET123" => ok(&json!({"items": rows(0, 3)})),
        "key-in-query" => Some((403, vec![], b"API_KEY_MISSING".to_vec())),
        _ => None,
    }
}
