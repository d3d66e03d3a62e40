//! HTTP routes of the public APIs: parameters, errors, and how each one identifies its next page.

use super::public::{
    self, CHARGES, COMMITS, EARTHQUAKE_COLUMNS, EARTHQUAKES, ISSUES, MAX_PAGE, QUESTIONS, TICKETS,
};
use super::{Endless, refused, series, time};
use axum::body::Body;
use axum::extract::{Path, Query};
use axum::http::{HeaderMap, HeaderValue, Response, header};
use axum::response::IntoResponse;
use axum::{Extension, Json};
use chrono::NaiveDate;
use serde::Deserialize;
use serde_json::{Value, json};
use url::form_urlencoded;

/// Parameters of `/repos/{owner}/{repo}/commits` (GitHub).
#[derive(Debug, Deserialize)]
pub(super) struct CommitsQuery {
    since: String,
    until: String,
    per_page: Option<usize>,
    page: Option<usize>,
}

/// Returns commits, newest first. The `Link` header identifies the next page.
pub(super) async fn commits(
    Extension(endless): Extension<Endless>,
    Path((owner, repo)): Path<(String, String)>,
    Query(query): Query<CommitsQuery>,
) -> Response<Body> {
    let (Some(since), Some(until)) = (time(&query.since), time(&query.until)) else {
        return refused("since and until must be RFC 3339 times such as 2026-01-31T00:00:00Z".to_owned());
    };
    let mut records = match COMMITS.records(since / 1000, until / 1000) {
        Ok(records) => records,
        Err(e) => return refused(e.to_string()),
    };
    records.reverse();
    let (size, number) = (query.per_page.unwrap_or(30).clamp(1, MAX_PAGE), query.page.unwrap_or(1).max(1));
    let (page, more) = public::page(&records, number, size);
    let mut answer = Json(page).into_response();
    if more || endless.0 {
        let next = if more { number + 1 } else { 1 };
        let at = format!("/repos/{owner}/{repo}/commits?since={}&until={}", query.since, query.until);
        let link = format!(
            "<{at}&per_page={size}&page={next}>; rel=\"next\", <{at}&per_page={size}&page=1>; rel=\"first\""
        );
        if let Ok(link) = HeaderValue::from_str(&link) {
            answer.headers_mut().insert(header::LINK, link);
        }
    }
    answer
}

/// Parameters of `/v1/charges` (Stripe).
#[derive(Debug, Deserialize)]
pub(super) struct ChargesQuery {
    #[serde(rename = "created[gte]")]
    from: i64,
    #[serde(rename = "created[lt]")]
    to: i64,
    limit: Option<usize>,
    starting_after: Option<String>,
}

/// Returns charges, newest first. A page starts after the charge with the id `starting_after`.
pub(super) async fn charges(
    Extension(endless): Extension<Endless>,
    Query(query): Query<ChargesQuery>,
) -> Response<Body> {
    let mut records = match CHARGES.records(query.from, query.to) {
        Ok(records) => records,
        Err(e) => return refused(e.to_string()),
    };
    records.reverse();
    let from = match &query.starting_after {
        None => 0,
        Some(id) => match records.iter().position(|charge| charge["id"].as_str() == Some(id)) {
            Some(at) => at + 1,
            None => return refused(format!("No such charge: '{id}'")),
        },
    };
    let (page, more) = public::page(&records[from..], 1, query.limit.unwrap_or(10).clamp(1, MAX_PAGE));
    // An endless list returns its first page for every request.
    let page: &[Value] = if endless.0 { public::page(&records, 1, MAX_PAGE).0 } else { page };
    Json(json!({"object": "list", "url": "/v1/charges", "has_more": more || endless.0, "data": page}))
        .into_response()
}

/// Parameters of `/2.3/questions` (Stack Exchange).
#[derive(Debug, Deserialize)]
pub(super) struct QuestionsQuery {
    fromdate: i64,
    todate: i64,
    page: Option<usize>,
    pagesize: Option<usize>,
    site: String,
}

/// Returns questions, oldest first, by page number. Unlike in the other APIs, the end of the interval, `todate`, is
/// inclusive.
pub(super) async fn questions(
    Extension(endless): Extension<Endless>,
    Query(query): Query<QuestionsQuery>,
) -> Response<Body> {
    if query.site != "stackoverflow" {
        let message = format!("No site found for name `{}`", query.site);
        return refused(message);
    }
    let records = match QUESTIONS.records(query.fromdate, query.todate.saturating_add(1)) {
        Ok(records) => records,
        Err(e) => return refused(e.to_string()),
    };
    let (size, number) = (query.pagesize.unwrap_or(30).clamp(1, MAX_PAGE), query.page.unwrap_or(1));
    let number = if endless.0 { 1 } else { number };
    let (items, more) = public::page(&records, number, size);
    Json(json!({"items": items, "has_more": more, "quota_max": 300, "quota_remaining": 299})).into_response()
}

/// Parameters of `/fdsnws/event/1/query` (USGS).
#[derive(Debug, Deserialize)]
pub(super) struct EarthquakesQuery {
    starttime: String,
    endtime: String,
    limit: Option<usize>,
    offset: Option<usize>,
    format: String,
}

/// Returns earthquakes as CSV, oldest first. The first one has the offset 1, and the end of the interval is inclusive.
pub(super) async fn earthquakes(Query(query): Query<EarthquakesQuery>) -> Response<Body> {
    if query.format != "csv" {
        return refused(format!("only the format csv is simulated, not `{}`", query.format));
    }
    let (Some(from), Some(to)) = (time(&query.starttime), time(&query.endtime)) else {
        return refused("starttime and endtime must be times such as 2026-01-31T00:00:00Z".to_owned());
    };
    let records = match EARTHQUAKES.records(from / 1000, to / 1000 + 1) {
        Ok(records) => records,
        Err(e) => return refused(e.to_string()),
    };
    let from = query.offset.unwrap_or(1).saturating_sub(1).min(records.len());
    let (page, _) = public::page(&records[from..], 1, query.limit.unwrap_or(MAX_PAGE).clamp(1, MAX_PAGE));
    let mut text = format!("{EARTHQUAKE_COLUMNS}\n");
    for row in page {
        let fields = row.as_array().into_iter().flatten().map(|value| match value {
            Value::Null => String::new(),
            // JSON and CSV quote the texts of the simulator alike.
            value => value.to_string(),
        });
        text.push_str(&fields.collect::<Vec<_>>().join(","));
        text.push('\n');
    }
    ([(header::CONTENT_TYPE, "text/csv; charset=utf-8")], text).into_response()
}

/// Returns the issues of a GraphQL search, newest first. The query string of the search contains
/// `created:FROM..TO`, both inclusive.
pub(super) async fn graphql(Json(body): Json<Value>) -> Response<Body> {
    let variables = &body["variables"];
    let span = variables["search"].as_str().and_then(|search| search.split_once("created:"));
    let span = span.and_then(|(_, span)| span.split(' ').next()?.split_once(".."));
    let times = span.and_then(|(from, to)| Some((time(from)?, time(to)?)));
    let records = times.and_then(|(from, to)| ISSUES.records(from / 1000, to / 1000 + 1).ok());
    let Some(mut records) = records else {
        let message = "the variable `search` must contain created:FROM..TO";
        return Json(json!({"data": null, "errors": [{"message": message}]})).into_response();
    };
    records.reverse();
    let from = variables["after"].as_str().and_then(|cursor| cursor.strip_prefix("cursor:")?.parse().ok());
    let from = from.unwrap_or(0).min(records.len());
    let size = variables["first"].as_u64().and_then(|size| usize::try_from(size).ok()).unwrap_or(10);
    let (page, more) = public::page(&records[from..], 1, size.clamp(1, MAX_PAGE));
    let end = format!("cursor:{}", from + page.len());
    let info = json!({"hasNextPage": more, "endCursor": end});
    Json(json!({"data": {"search": {"issueCount": records.len(), "nodes": page, "pageInfo": info}}}))
        .into_response()
}

/// Parameters of `/api/v2/search/export.json` (Zendesk).
#[derive(Debug, Deserialize)]
pub(super) struct TicketsQuery {
    query: String,
    #[serde(rename = "page[size]")]
    size: Option<usize>,
    #[serde(rename = "page[after]")]
    after: Option<usize>,
}

/// Returns tickets, oldest first. Each page names the URL of a next one, even the last, on which `has_more` is false.
pub(super) async fn tickets(headers: HeaderMap, Query(query): Query<TicketsQuery>) -> Response<Body> {
    let bound = |name: &str| query.query.split(' ').find_map(|word| time(word.strip_prefix(name)?));
    let (Some(from), Some(to)) = (bound("created>="), bound("created<")) else {
        return refused("query must contain created>=TIME and created<TIME".to_owned());
    };
    let records = match TICKETS.records(from / 1000, to / 1000) {
        Ok(records) => records,
        Err(e) => return refused(e.to_string()),
    };
    let from = query.after.unwrap_or(0).min(records.len());
    let size = query.size.unwrap_or(MAX_PAGE).clamp(1, MAX_PAGE);
    let (page, more) = public::page(&records[from..], 1, size);
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let encoded: String = form_urlencoded::byte_serialize(query.query.as_bytes()).collect();
    let after = from + page.len();
    let path = "api/v2/search/export.json";
    let next = format!("http://{host}/{path}?query={encoded}&page[size]={size}&page[after]={after}");
    let meta = json!({"has_more": more, "after_cursor": after.to_string()});
    Json(json!({"results": page, "links": {"next": next, "prev": null}, "meta": meta})).into_response()
}

/// Parameters of `/api/v3/klines` (Binance).
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct KlinesQuery {
    symbol: String,
    interval: String,
    start_time: i64,
    end_time: i64,
    limit: Option<usize>,
}

/// Returns the candlesticks of one symbol.
pub(super) async fn klines(Query(query): Query<KlinesQuery>) -> Response<Body> {
    if !query.symbol.ends_with("USDT") || query.interval != "1m" {
        return refused("only the interval 1m of symbols that end with USDT is simulated".to_owned());
    }
    let limit = query.limit.unwrap_or(500);
    Json(series::klines(&query.symbol, query.start_time, query.end_time, limit)).into_response()
}

/// Parameters of `/v1/archive` (Open-Meteo).
#[derive(Debug, Deserialize)]
pub(super) struct WeatherQuery {
    start_date: NaiveDate,
    end_date: NaiveDate,
}

/// Returns the hours of days, both inclusive.
pub(super) async fn weather(Query(query): Query<WeatherQuery>) -> Response<Body> {
    match series::weather(query.start_date, query.end_date) {
        Some(weather) => Json(weather).into_response(),
        None => refused("end_date must not be before start_date, nor more than 31 days after it".to_owned()),
    }
}
