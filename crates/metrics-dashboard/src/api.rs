//! The HTTP interface: the page, its JSON, its feed. Every answer comes from the [`Board`], but for windows and for charts of more
//! than an hour, which read Cassandra. What it may cost is bounded: requests, feeds and reads by number, each request by
//! time, and windows by the work they cause.

mod bounds;
mod chart;
mod live;
pub mod page;
mod windows;

use crate::feed::Board;
use crate::metrics::Metrics;
use crate::overview::Figure;
use crate::reason::{Reason, Source};
use crate::store::Store;
use axum::extract::State;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use common::shutdown::Shutdown;
use std::sync::Arc;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tower_http::set_header::SetResponseHeaderLayer;

/// Most feeds open at once.
pub const MAX_WATCHERS: usize = 256;
/// Most requests that read Cassandra at once.
pub const MAX_READS: usize = 4;
/// Seconds after which a refused request may be sent again.
const RETRY_AFTER: HeaderValue = HeaderValue::from_static("1");
/// Everything the page needs comes from this very service, and nobody may frame it.
const CONTENT_SECURITY_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; \
                                       connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// What the handlers share.
#[derive(Clone)]
pub struct Api {
    board: Arc<Board>,
    metrics: Metrics,
    shutdown: Shutdown,
    watchers: Arc<Semaphore>,
    reads: Arc<Semaphore>,
}

impl Api {
    /// Handlers that show `board` until `shutdown` begins.
    pub fn new(board: Arc<Board>, metrics: Metrics, shutdown: Shutdown) -> Api {
        let (watchers, reads) = (Semaphore::new(MAX_WATCHERS), Semaphore::new(MAX_READS));
        Api { board, metrics, shutdown, watchers: Arc::new(watchers), reads: Arc::new(reads) }
    }

    /// The connection with Cassandra, or why there is none.
    fn connected_store(&self) -> Result<Arc<Store>, Refusal> {
        self.board.store().ok_or_else(|| {
            let shown = self.board.watch().borrow().clone();
            let reason = shown.overview.reasons.get("rate_now").cloned();
            unknown(reason.unwrap_or_else(|| Reason::new(Source::Cassandra, "not connected with cassandra")))
        })
    }

    /// A place among the requests that read Cassandra.
    fn place_to_read(&self) -> Result<OwnedSemaphorePermit, Refusal> {
        bounds::place(&self.reads, MAX_READS, "requests that read Cassandra")
    }
}

/// All routes of this service but `/healthz`, `/readyz` and `/metrics`.
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

/// An answer that is not the one asked for, as JSON `{"error": {"source": …, "message": …, "detail": …}}`.
#[derive(Debug)]
struct Refusal(StatusCode, Reason);

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let busy = self.0 == StatusCode::SERVICE_UNAVAILABLE;
        let mut answer = (self.0, Json(serde_json::json!({"error": self.1}))).into_response();
        if busy {
            answer.headers_mut().insert(header::RETRY_AFTER, RETRY_AFTER);
        }
        answer
    }
}

/// The request makes no sense.
fn bad(message: impl Into<String>) -> Refusal {
    Refusal(StatusCode::BAD_REQUEST, Reason::new(Source::Request, message))
}

/// The answer cannot be known now.
fn unknown(reason: Reason) -> Refusal {
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

/// `{name: […]}`, or `{name: null, "reason": …}`.
fn listed<T: serde::Serialize>(name: &str, list: Figure<T>) -> Json<serde_json::Value> {
    Json(match list {
        Ok(list) => serde_json::json!({name: list, "reason": null}),
        Err(reason) => serde_json::json!({name: null, "reason": reason}),
    })
}
