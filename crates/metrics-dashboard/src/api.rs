//! The HTTP interface: the page, its JSON and its event stream. Responses are built from the [`Board`], except windows
//! and charts of more than an hour, which read Cassandra. All costs are limited: the number of concurrent requests,
//! event streams and reads, the duration of a request, and the amount of work of a windows query.

mod bounds;
mod chart;
mod live;
pub mod page;
mod windows;

use crate::cassandra_view::CassandraView;
use crate::feed::Board;
use crate::metrics::Metrics;
use crate::overview::Figure;
use crate::reason::{Origin, Reason};
use axum::extract::State;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use common::runtime::shutdown::Shutdown;
use std::sync::Arc;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tower_http::set_header::SetResponseHeaderLayer;

/// Most open event streams.
pub const MAX_WATCHERS: usize = 256;
/// Most concurrent requests that read Cassandra.
pub const MAX_READS: usize = 4;
/// Seconds after which the client may retry a request that was refused because of a limit.
const RETRY_AFTER: HeaderValue = HeaderValue::from_static("1");
/// The page loads everything from this service, and no other page may embed it.
const CONTENT_SECURITY_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; \
                                       connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// State shared by the handlers.
#[derive(Clone)]
pub struct Api {
    board: Arc<Board>,
    metrics: Metrics,
    shutdown: Shutdown,
    watchers: Arc<Semaphore>,
    reads: Arc<Semaphore>,
}

impl Api {
    /// Creates the state of handlers that serve the content of `board`. Event streams end when `shutdown` begins.
    pub fn new(board: Arc<Board>, metrics: Metrics, shutdown: Shutdown) -> Api {
        let (watchers, reads) = (Semaphore::new(MAX_WATCHERS), Semaphore::new(MAX_READS));
        Api { board, metrics, shutdown, watchers: Arc::new(watchers), reads: Arc::new(reads) }
    }

    /// The session with Cassandra. Fails with the reason if there is none.
    fn connected_cassandra(&self) -> Result<Arc<CassandraView>, Refusal> {
        self.board.cassandra().ok_or_else(|| {
            let snapshot = self.board.watch().borrow().clone();
            let reason = snapshot.overview.reasons.get("rate_now").cloned();
            let not_connected = || Reason::new(Origin::Cassandra, "not connected to cassandra");
            unavailable(reason.unwrap_or_else(not_connected))
        })
    }

    /// Acquires a permit to read Cassandra.
    fn read_permit(&self) -> Result<OwnedSemaphorePermit, Refusal> {
        bounds::acquire(&self.reads, MAX_READS, "requests that read Cassandra")
    }
}

/// All routes of this service except `/healthz`, `/readyz` and `/metrics`.
pub fn router(api: Api) -> Router {
    let header = |name: &'static str, value: &'static str| {
        SetResponseHeaderLayer::if_not_present(HeaderName::from_static(name), HeaderValue::from_static(value))
    };
    Router::new()
        .route("/api/v1/overview", get(overview))
        .route("/api/v1/stream", get(live::stream))
        .route("/api/v1/throughput", get(chart::throughput))
        .route("/api/v1/windows", get(windows::windows))
        .route("/api/v1/runs", get(runs))
        .route("/api/v1/services", get(services))
        .route("/", get(page::index))
        .route("/{*path}", get(page::file))
        .with_state(api)
        .layer(from_fn_with_state(bounds::Bounds::default(), bounds::bounded))
        .layer(header("content-security-policy", CONTENT_SECURITY_POLICY))
        .layer(header("x-content-type-options", "nosniff"))
        .layer(header("referrer-policy", "no-referrer"))
        .layer(header("cache-control", "no-cache"))
}

/// An error response with the body `{"error": {"source": …, "message": …, "detail": …}}`.
#[derive(Debug)]
struct Refusal(StatusCode, Reason);

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let busy = self.0 == StatusCode::SERVICE_UNAVAILABLE;
        let mut response = (self.0, Json(serde_json::json!({"error": self.1}))).into_response();
        if busy {
            response.headers_mut().insert(header::RETRY_AFTER, RETRY_AFTER);
        }
        response
    }
}

/// Status 400: a parameter is invalid.
fn bad_request(message: impl Into<String>) -> Refusal {
    Refusal(StatusCode::BAD_REQUEST, Reason::new(Origin::Request, message))
}

/// Status 503: the requested figures are unknown at the moment.
fn unavailable(reason: Reason) -> Refusal {
    Refusal(StatusCode::SERVICE_UNAVAILABLE, reason)
}

async fn overview(State(api): State<Api>) -> impl IntoResponse {
    let json = api.board.watch().borrow().json.to_string();
    ([(header::CONTENT_TYPE, "application/json")], json)
}

async fn runs(State(api): State<Api>) -> Json<serde_json::Value> {
    listed("runs", api.board.runs())
}

async fn services(State(api): State<Api>) -> Json<serde_json::Value> {
    listed("services", api.board.services())
}

/// The body `{name: […], "reason": null}`, or `{name: null, "reason": …}` if the list is unknown.
fn listed<T: serde::Serialize>(name: &str, list: Figure<T>) -> Json<serde_json::Value> {
    Json(match list {
        Ok(list) => serde_json::json!({name: list, "reason": null}),
        Err(reason) => serde_json::json!({name: null, "reason": reason}),
    })
}
