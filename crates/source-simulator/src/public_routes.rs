//! HTTP routes of the three public APIs: parameters, errors, and how each one identifies its next page.

use super::public::{self, CHARGES, COMMITS, MAX_PAGE, QUESTIONS};
use super::{Endless, refused, time};
use axum::body::Body;
use axum::extract::{Path, Query};
use axum::http::{HeaderValue, Response, header};
use axum::response::IntoResponse;
use axum::{Extension, Json};
use serde::Deserialize;
use serde_json::{Value, json};

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
