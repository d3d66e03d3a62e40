//! The source simulator serves the APIs of the shipped stream definitions offline. Its answers depend only on the seed
//! and the requested interval. Faults can be changed while it runs.
//!
//! - `GET /api/?results=N&seed=S&page=P` returns people in the format of randomuser.me.
//! - `GET /v2/orders?from&to&limit&cursor` returns [`orders`] in a different format.
//! - `GET /repos/{owner}/{repo}/commits`, `/v1/charges`, `/2.3/questions`, `/fdsnws/event/1/query`,
//!   `/api/v2/search/export.json` and `POST /graphql` return records in the formats of [`public`] APIs.
//! - `GET /api/v3/klines` and `/v1/archive` return time [`series`] in the formats of public APIs.
//! - `GET /faults` and `PUT /faults` show and set [`faults::Faults`].
//! - `GET /healthz` returns `ok`.

pub mod faults;
mod misbehave;
mod names;
pub mod orders;
pub mod people;
pub mod public;
mod public_routes;
pub mod random;
pub mod series;

use anyhow::Context;
use axum::body::Body;
use axum::extract::{Query, Request, State};
use axum::http::{Response, StatusCode};
use axum::middleware::{self, Next};
use axum::response::IntoResponse;
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use clap::Parser;
use common::runtime::shutdown::Shutdown;
use faults::{Answer, Fault, FaultFlag, Faults};
use serde::Deserialize;
use serde_json::json;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Maximum number of people per page, as in the real API.
const MAX_RESULTS: u64 = 5000;
/// Number of orders per page if the request has no limit.
const DEFAULT_LIMIT: u64 = 100;
/// Time limit for the shutdown, because requests that are slowed by a fault may still be in progress.
const GRACE: Duration = Duration::from_secs(5);

/// Serves the simulated REST APIs of the shipped stream definitions
#[derive(Debug, Clone, Parser)]
#[command(version)]
pub struct Config {
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1:8090")]
    pub listen: SocketAddr,
    /// Fault to inject: KIND=RATE (0 to 1) or KIND=xN (the next N requests); may be given several times
    #[arg(long = "fault", value_name = "KIND=WHEN")]
    pub faults: Vec<FaultFlag>,
    /// Seed that determines which requests a RATE affects
    #[arg(long, default_value = "faults")]
    pub fault_seed: String,
    /// Retry-After header of the fault `throttle`: seconds or an HTTP date
    #[arg(long, default_value = "1")]
    pub retry_after: String,
    /// Delay between the pieces of the fault `drip`, in milliseconds
    #[arg(long, default_value_t = 200)]
    pub drip_ms: u64,
}

impl Config {
    fn initial_faults(&self) -> Faults {
        Faults {
            seed: self.fault_seed.clone(),
            retry_after: self.retry_after.clone(),
            drip_ms: self.drip_ms,
            faults: self.faults.iter().map(|FaultFlag(fault, when)| (*fault, *when)).collect(),
            ..Faults::default()
        }
    }
}

#[derive(Debug, Default)]
struct Simulator {
    state: Mutex<SimulatorState>,
}

#[derive(Debug, Default)]
struct SimulatorState {
    faults: Faults,
    /// Number of data requests so far. With the seed, it determines which requests a rate affects.
    requests: u64,
    /// Number of injections of each fault.
    injected: BTreeMap<Fault, u64>,
}

impl Simulator {
    fn with<T>(&self, act: impl FnOnce(&mut SimulatorState) -> T) -> T {
        act(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Serves requests until SIGTERM or SIGINT.
pub async fn serve(config: Config) -> anyhow::Result<()> {
    let shutdown = Shutdown::on_signals(GRACE).context("cannot install signal handlers")?;
    let listener = tokio::net::TcpListener::bind(config.listen).await.with_context(|| {
        format!("cannot listen on {}; free the address or choose another one with --listen", config.listen)
    })?;
    tracing::info!(listen = %listener.local_addr()?, "source simulator listening");
    axum::serve(listener, router(config.initial_faults()))
        .with_graceful_shutdown(async move { shutdown.begun().await })
        .await?;
    Ok(())
}

/// Returns all routes, with these faults as the initial ones.
pub fn router(faults: Faults) -> Router {
    let simulator = Arc::new(Simulator::default());
    simulator.with(|s| s.faults = faults);
    Router::new()
        .route("/api", get(people_page))
        .route("/api/", get(people_page))
        .route("/v2/orders", get(orders_page))
        .route("/repos/{owner}/{repo}/commits", get(public_routes::commits))
        .route("/v1/charges", get(public_routes::charges))
        .route("/2.3/questions", get(public_routes::questions))
        .route("/fdsnws/event/1/query", get(public_routes::earthquakes))
        .route("/graphql", post(public_routes::graphql))
        .route("/api/v2/search/export.json", get(public_routes::tickets))
        .route("/api/v3/klines", get(public_routes::klines))
        .route("/v1/archive", get(public_routes::weather))
        .layer(middleware::from_fn_with_state(simulator.clone(), inject_fault))
        .route("/faults", get(show_faults).put(set_faults))
        .route("/healthz", get(|| async { "ok" }))
        .with_state(simulator)
}

/// Request extension: whether the pages of this request must never end.
#[derive(Debug, Clone, Copy)]
struct Endless(bool);

async fn inject_fault(
    State(simulator): State<Arc<Simulator>>,
    mut request: Request,
    next: Next,
) -> Response<Body> {
    let (fault, faults) = simulator.with(|s| {
        s.requests += 1;
        let fault = s.faults.next_fault(s.requests);
        if let Some(fault) = fault {
            *s.injected.entry(fault).or_default() += 1;
        }
        (fault, s.faults.clone())
    });
    request.extensions_mut().insert(Endless(fault == Some(Fault::Endless)));
    request.extensions_mut().insert(faults.answer);
    match fault {
        None => next.run(request).await,
        Some(fault) => match misbehave::replacement(fault, &faults) {
            Some(answer) => answer,
            None => misbehave::corrupt(fault, &faults, next.run(request).await).await,
        },
    }
}

#[derive(Debug, Deserialize)]
struct PeopleQuery {
    results: Option<u64>,
    seed: Option<String>,
    page: Option<u64>,
}

async fn people_page(
    Extension(answer): Extension<Answer>,
    Query(query): Query<PeopleQuery>,
) -> Response<Body> {
    let results = query.results.unwrap_or(1);
    if !(1..=MAX_RESULTS).contains(&results) {
        return refused(format!("results must be between 1 and {MAX_RESULTS}, but is {results}"));
    }
    let seed = query.seed.unwrap_or_else(|| "simulator".to_owned());
    Json(people::page(&seed, query.page.unwrap_or(1), results, answer)).into_response()
}

#[derive(Debug, Deserialize)]
struct OrdersQuery {
    from: String,
    to: String,
    limit: Option<u64>,
    cursor: Option<String>,
}

async fn orders_page(
    Extension(endless): Extension<Endless>,
    Query(query): Query<OrdersQuery>,
) -> Response<Body> {
    let limit = query.limit.unwrap_or(DEFAULT_LIMIT);
    if !(1..=orders::MAX_LIMIT).contains(&limit) {
        return refused(format!("limit must be between 1 and {}, but is {limit}", orders::MAX_LIMIT));
    }
    let (Some(from), Some(to)) = (time(&query.from), time(&query.to)) else {
        return refused("from and to must be RFC 3339 times such as 2026-01-31T00:00:00Z".to_owned());
    };
    let cursor = query.cursor.as_deref().filter(|c| !c.is_empty());
    match orders::page(from, to, limit, cursor) {
        Ok(page) => {
            let first = || orders::page(from, to, 1, None).ok().and_then(|p| p.next);
            let next = if endless.0 { page.next.or_else(first) } else { page.next };
            Json(json!({"data": {"items": page.items, "paging": {"next": next, "limit": limit}}}))
                .into_response()
        }
        Err(e) => refused(e.to_string()),
    }
}

/// Parses an RFC 3339 time to Unix milliseconds. Also accepts a `+` that the client did not encode in the query.
fn time(text: &str) -> Option<i64> {
    chrono::DateTime::parse_from_rfc3339(&text.replace(' ', "+")).ok().map(|at| at.timestamp_millis())
}

fn refused(error: String) -> Response<Body> {
    (StatusCode::BAD_REQUEST, Json(json!({"error": error}))).into_response()
}

async fn show_faults(State(simulator): State<Arc<Simulator>>) -> Response<Body> {
    let shown =
        simulator.with(|s| json!({"settings": s.faults, "requests": s.requests, "injected": s.injected}));
    Json(shown).into_response()
}

async fn set_faults(State(simulator): State<Arc<Simulator>>, body: String) -> Response<Body> {
    let read = serde_json::from_str::<Faults>(&body).map_err(|e| e.to_string());
    match read.and_then(|faults| faults.check().map(|()| faults)) {
        Ok(faults) => {
            tracing::info!(?faults, "faults set");
            simulator.with(|s| s.faults = faults);
            show_faults(State(simulator)).await
        }
        Err(e) => refused(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    async fn start() -> String {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, router(Faults::default())).await });
        format!("http://{address}")
    }

    async fn get(url: &str) -> (u16, String) {
        let answer = client().get(url).send().await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap_or_else(|e| format!("broken: {e}")))
    }

    fn client() -> reqwest::Client {
        let _ = rustls::crypto::ring::default_provider().install_default();
        reqwest::Client::builder()
            .no_proxy()
            .no_gzip()
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .unwrap()
    }

    async fn set(origin: &str, faults: Value) {
        let answer = client().put(format!("{origin}/faults")).body(faults.to_string()).send().await.unwrap();
        assert!(answer.status().is_success(), "{}", answer.text().await.unwrap());
    }

    #[tokio::test]
    async fn people_and_orders_are_served_and_invalid_requests_are_refused() {
        let origin = start().await;
        let (status, body) = get(&format!("{origin}/api/?results=5000&seed=s&page=2")).await;
        let body: Value = serde_json::from_str(&body).unwrap();
        assert_eq!((status, body["results"].as_array().unwrap().len()), (200, 5000));
        assert_eq!(body["info"], json!({"seed": "s", "results": 5000, "page": 2, "version": "1.4"}));
        assert_eq!(get(&format!("{origin}/api/?results=5001")).await.0, 400);
        let orders =
            format!("{origin}/v2/orders?from=2026-01-01T00:00:00Z&to=2026-01-01T00:02:00Z&limit=200&cursor=");
        let (status, body) = get(&orders).await;
        let body: Value = serde_json::from_str(&body).unwrap();
        assert_eq!((status, body["data"]["items"].as_array().unwrap().len()), (200, 200));
        assert!(body["data"]["paging"]["next"].is_string());
        assert_eq!(get(&orders.replace("00:02:00Z", "soon")).await.0, 400);
    }

    #[tokio::test]
    async fn each_public_api_identifies_its_next_page_in_its_own_way() {
        let origin = start().await;
        let json = |text: String| serde_json::from_str::<Value>(&text).unwrap();
        let span = "since=2026-01-01T00:00:00Z&until=2026-01-01T00:05:00Z&per_page=100";
        let url = format!("{origin}/repos/rust-lang/rust/commits?{span}");
        let answer = client().get(&url).send().await.unwrap();
        let link = answer.headers()["link"].to_str().unwrap().to_owned();
        assert!(
            link.starts_with(&format!("</repos/rust-lang/rust/commits?{span}&page=2>; rel=\"next\"")),
            "{link}"
        );
        assert_eq!(json(answer.text().await.unwrap()).as_array().unwrap().len(), 100);
        let last = client().get(format!("{url}&page=9")).send().await.unwrap();
        assert!(last.headers().get("link").is_none());

        let url = format!("{origin}/v1/charges?created[gte]=1767225600&created[lt]=1767225900&limit=100");
        let (mut ids, mut after) = (Vec::new(), String::new());
        loop {
            let page = json(get(&format!("{url}{after}")).await.1);
            ids.extend(page["data"].as_array().unwrap().iter().map(|c| c["id"].as_str().unwrap().to_owned()));
            after = format!("&starting_after={}", ids.last().unwrap());
            if page["has_more"] == false {
                break;
            }
        }
        assert_eq!(ids.len(), public::CHARGES.records(1_767_225_600, 1_767_225_900).unwrap().len());
        assert!(
            ids.windows(2).all(|pair| pair[0] > pair[1]),
            "charges must be sorted newest first, without duplicates"
        );
        assert_eq!(get(&format!("{url}&starting_after=ch_0")).await.0, 400);

        let url = format!(
            "{origin}/2.3/questions?fromdate=1767225600&todate=1767226199&pagesize=100&site=stackoverflow"
        );
        let pages =
            [json(get(&format!("{url}&page=1")).await.1), json(get(&format!("{url}&page=2")).await.1)];
        assert_eq!((&pages[0]["has_more"], &pages[1]["has_more"]), (&json!(true), &json!(false)));
        assert_eq!(get(&url.replace("stackoverflow", "nowhere")).await.0, 400);
    }

    #[tokio::test]
    async fn csv_graphql_next_urls_and_series_are_served() {
        let origin = start().await;
        let json = |text: String| serde_json::from_str::<Value>(&text).unwrap();
        let span = "starttime=2026-01-01T00:00:00Z&endtime=2026-01-01T00:04:59.999Z";
        let url = format!("{origin}/fdsnws/event/1/query?format=csv&{span}&limit=100");
        let (first, second) = (get(&url).await.1, get(&format!("{url}&offset=101")).await.1);
        let expected = public::EARTHQUAKES.records(1_767_225_600, 1_767_225_900).unwrap().len();
        assert_eq!(
            first.lines().count() + second.lines().count(),
            expected + 2,
            "each page has a header line"
        );
        assert!(first.starts_with("time,latitude,"), "{first}");

        let search = async |variables: Value| {
            let body = json!({"query": "{}", "variables": variables}).to_string();
            let request =
                client().post(format!("{origin}/graphql")).header("content-type", "application/json");
            json(request.body(body).send().await.unwrap().text().await.unwrap())
        };
        let span = "is:issue created:2026-01-01T00:00:00Z..2026-01-01T00:00:59.999Z";
        let page = search(json!({"search": span, "first": 5, "after": null})).await["data"]["search"].clone();
        assert_eq!(page["pageInfo"], json!({"hasNextPage": true, "endCursor": "cursor:5"}));
        let rest = search(json!({"search": span, "first": 100, "after": "cursor:5"})).await;
        let rest = rest["data"]["search"]["nodes"].as_array().unwrap().len();
        assert_eq!(page["issueCount"], 5 + rest);
        assert!(search(json!({})).await["errors"].is_array());

        let url = format!("{origin}/api/v2/search/export.json");
        let span = "created>=2026-01-01T00:00:00Z+created<2026-01-01T00:01:00Z";
        let page = json(get(&format!("{url}?query={span}&page[size]=10")).await.1);
        assert_eq!(page["meta"]["has_more"], true);
        let last = json(get(page["links"]["next"].as_str().unwrap()).await.1);
        let expected = public::TICKETS.records(1_767_225_600, 1_767_225_660).unwrap();
        assert_eq!(last["results"].as_array().unwrap().as_slice(), &expected[10..]);
        assert_eq!((&last["meta"]["has_more"], last["links"]["next"].is_string()), (&json!(false), true));

        let span = "startTime=1767225600000&endTime=1767225659999";
        let url = format!("{origin}/api/v3/klines?symbol=BTCUSDT&interval=1m&{span}");
        assert_eq!(json(get(&url).await.1).as_array().unwrap().len(), 1);
        assert_eq!(get(&url.replace("USDT", "")).await.0, 400);
        let url = format!("{origin}/v1/archive?start_date=2026-01-01&end_date=2026-01-01");
        assert_eq!(json(get(&url).await.1)["hourly"]["time"].as_array().unwrap().len(), 24);
    }

    #[tokio::test]
    async fn each_fault_is_injected_exactly_as_often_as_requested() {
        let origin = start().await;
        let url = format!("{origin}/api/?results=3");
        let (_, whole) = get(&url).await;
        let statuses = [("error", 500), ("not_found", 404), ("throttle", 429), ("redirect", 302)];
        for (kind, status) in statuses {
            set(&origin, json!({"faults": {kind: {"next": 1}}})).await;
            assert_eq!(get(&url).await.0, status, "{kind}");
            assert_eq!(get(&url).await, (200, whole.clone()), "{kind}");
        }
        for kind in ["truncated", "malformed", "reset"] {
            set(&origin, json!({"faults": {kind: {"next": 1}}})).await;
            let (status, body) = get(&url).await;
            assert_eq!(
                (status, serde_json::from_str::<Value>(&body).is_err()),
                (200, true),
                "{kind}: {body}"
            );
            assert_eq!(get(&url).await, (200, whole.clone()), "{kind}");
        }
        set(&origin, json!({"faults": {"broken_records": {"next": 1}}})).await;
        let (_, body) = get(&url).await;
        for broken in ["\"age\":unknown", "\"first\":\"\\ud83d", "\"age\":1e400"] {
            assert_eq!(body.matches(broken).count(), 1, "{broken}: {body}");
        }
        set(&origin, json!({"answer": "one_less"})).await;
        assert!(get(&url).await.1.len() < whole.len());
        set(&origin, json!({"drip_ms": 1, "drip_bytes": 500, "faults": {"drip": {"next": 1}}})).await;
        assert_eq!(get(&url).await, (200, whole));
    }

    #[tokio::test]
    async fn a_gzip_bomb_is_small_and_an_oversized_body_is_not() {
        let origin = start().await;
        let url = format!("{origin}/api/?results=3");
        set(&origin, json!({"oversized_bytes": 4 << 20, "faults": {"bomb": {"next": 1}}})).await;
        let answer = client().get(&url).send().await.unwrap();
        assert_eq!(answer.headers()["content-encoding"], "gzip");
        assert!(answer.bytes().await.unwrap().len() < 16 << 10);
        set(&origin, json!({"oversized_bytes": 4 << 20, "faults": {"oversized": {"next": 1}}})).await;
        assert_eq!(client().get(&url).send().await.unwrap().bytes().await.unwrap().len(), 4 << 20);
    }

    #[tokio::test]
    async fn endless_pages_always_have_a_next_page() {
        let origin = start().await;
        let url = format!("{origin}/v2/orders?from=2026-01-01T00:00:00Z&to=2026-01-01T00:00:05Z&limit=1000");
        let next =
            |body: &str| serde_json::from_str::<Value>(body).unwrap()["data"]["paging"]["next"].clone();
        assert!(next(&get(&url).await.1).is_null());
        set(&origin, json!({"faults": {"endless": {"rate": 1.0}}})).await;
        assert!(next(&get(&url).await.1).is_string());
        let shown: Value = serde_json::from_str(&get(&format!("{origin}/faults")).await.1).unwrap();
        assert_eq!(shown["injected"], json!({"endless": 1}));
    }
}
