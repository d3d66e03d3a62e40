//! `/healthz`, `/readyz` and `/metrics` of every service, and the check of the requested host name ([`hosts`]).
//!
//! A service is healthy if its main loop made progress within the stall limit. It is ready if all of its dependencies
//! are up. A service that shuts down reports not ready before it stops serving.

pub mod hosts;

use crate::runtime::metrics::HttpMetrics;
use crate::runtime::shutdown::Shutdown;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use hosts::Hosts;
use prometheus::{Encoder, Registry, TextEncoder};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The state that `/healthz` and `/readyz` report.
#[derive(Debug)]
pub struct Health {
    stall_limit: Duration,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    last_beat: Instant,
    dependencies: BTreeMap<String, Result<(), String>>,
    stopping: bool,
}

impl Health {
    /// The service counts as unhealthy if [`Health::beat`] is not called for `stall_limit`. All `dependencies` start as
    /// not ready.
    pub fn new(stall_limit: Duration, dependencies: &[&str]) -> Arc<Health> {
        let waiting = |name: &&str| ((*name).to_owned(), Err("not checked yet".to_owned()));
        let dependencies = dependencies.iter().map(waiting).collect();
        let inner = Inner { last_beat: Instant::now(), dependencies, stopping: false };
        Arc::new(Health { stall_limit, inner: Mutex::new(inner) })
    }

    fn with<T>(&self, act: impl FnOnce(&mut Inner) -> T) -> T {
        act(&mut self.inner.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Records that the main loop made progress.
    pub fn beat(&self) {
        self.with(|i| i.last_beat = Instant::now());
    }

    /// Records that a dependency is up, or why it is not, and logs each change. The names come from the program, so
    /// their number is bounded.
    pub fn set(&self, dependency: &str, state: Result<(), String>) {
        self.with(|i| {
            if i.dependencies.get(dependency) != Some(&state) {
                match &state {
                    Ok(()) => tracing::info!(dependency, "ready"),
                    Err(cause) => tracing::warn!(dependency, cause, "not ready"),
                }
                i.dependencies.insert(dependency.to_owned(), state);
            }
        });
    }

    /// Removes a dependency, such as a partition that was assigned to another instance.
    pub fn forget(&self, dependency: &str) {
        self.with(|i| i.dependencies.remove(dependency));
    }

    /// Whether a dependency was up when it was last set. An unknown name counts as down.
    pub fn is_up(&self, dependency: &str) -> bool {
        self.with(|i| i.dependencies.get(dependency).is_some_and(Result::is_ok))
    }

    /// Why a dependency is not up. `None` if it is up, or if no dependency has this name.
    pub fn problem(&self, dependency: &str) -> Option<String> {
        self.with(|i| i.dependencies.get(dependency).and_then(|state| state.as_ref().err().cloned()))
    }

    /// Makes the service not ready for good, whatever the state of its dependencies.
    pub fn stopping(&self) {
        self.with(|i| i.stopping = true);
    }

    /// Whether every dependency is up and the service is not stopping.
    pub fn is_ready(&self) -> bool {
        self.with(|i| !i.stopping && i.dependencies.values().all(Result::is_ok))
    }

    fn is_healthy(&self) -> bool {
        self.with(|i| i.last_beat.elapsed() <= self.stall_limit)
    }

    fn report(&self) -> serde_json::Value {
        self.with(|i| {
            let dependencies: serde_json::Map<_, _> = i
                .dependencies
                .iter()
                .map(|(name, state)| (name.clone(), state.as_ref().err().map_or("ok", |cause| cause).into()))
                .collect();
            let ready = !i.stopping && i.dependencies.values().all(Result::is_ok);
            serde_json::json!({"ready": ready, "stopping": i.stopping, "dependencies": dependencies})
        })
    }
}

#[derive(Clone)]
struct Admin {
    health: Arc<Health>,
    registry: Registry,
}

/// The routes `/healthz`, `/readyz` and `/metrics`. Serve them alone or merge them into the router of a service.
pub fn router(health: Arc<Health>, registry: Registry) -> Router {
    Router::new()
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .with_state(Admin { health, registry })
}

async fn healthz(State(admin): State<Admin>) -> impl IntoResponse {
    if admin.health.is_healthy() {
        (StatusCode::OK, "ok\n".to_owned())
    } else {
        let limit = admin.health.stall_limit.as_secs();
        (StatusCode::SERVICE_UNAVAILABLE, format!("the main loop has made no progress for over {limit} s\n"))
    }
}

async fn readyz(State(admin): State<Admin>) -> impl IntoResponse {
    let status = if admin.health.is_ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(admin.health.report()))
}

async fn metrics(State(admin): State<Admin>) -> impl IntoResponse {
    let mut text = Vec::new();
    match TextEncoder::new().encode(&admin.registry.gather(), &mut text) {
        Ok(()) => (StatusCode::OK, [(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text),
        Err(e) => {
            let text = format!("cannot encode the metrics: {e}\n").into_bytes();
            (StatusCode::INTERNAL_SERVER_ERROR, [(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text)
        }
    }
}

/// The client closed the connection before the response. The code is not a standard one; nginx introduced it.
const CLIENT_CLOSED_REQUEST: u16 = 499;

/// A request in progress. Dropping it records the metrics, so a cancelled request is counted too.
struct RequestInProgress {
    metrics: HttpMetrics,
    route: Option<MatchedPath>,
    started: Instant,
    status: u16,
}

impl Drop for RequestInProgress {
    fn drop(&mut self) {
        let route = self.route.as_ref().map(MatchedPath::as_str);
        self.metrics.request_finished(route, self.status, self.started.elapsed());
    }
}

/// Restricts `router` to requests for `hosts` and counts each request in `registry` by route, status class and
/// duration. Call it once per registry: a second call fails because the metrics are already registered.
pub fn guarded(router: Router, hosts: &Hosts, registry: &Registry) -> Result<Router, prometheus::Error> {
    let checked = router.layer(from_fn_with_state(hosts.clone(), hosts::check));
    Ok(checked.layer(from_fn_with_state(HttpMetrics::new(registry)?, measure)))
}

async fn measure(State(metrics): State<HttpMetrics>, request: Request, next: Next) -> Response {
    metrics.request_started();
    let route = request.extensions().get::<MatchedPath>().cloned();
    let mut in_progress =
        RequestInProgress { metrics, route, started: Instant::now(), status: CLIENT_CLOSED_REQUEST };
    let response = next.run(request).await;
    in_progress.status = response.status().as_u16();
    response
}

/// The service cannot listen on its address.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {listen}: {cause}; choose another with --http-listen or PIPELINE_HTTP_LISTEN")]
pub struct ListenError {
    listen: SocketAddr,
    cause: std::io::Error,
}

/// Binds `listen`, then serves `router` in a task until `shutdown` begins and all open requests are finished. Returns
/// the bound address, which differs from `listen` if its port is 0.
pub async fn serve(
    listen: SocketAddr,
    router: Router,
    shutdown: Shutdown,
) -> Result<SocketAddr, ListenError> {
    let failed = |cause| ListenError { listen, cause };
    let listener = tokio::net::TcpListener::bind(listen).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    tracing::info!(%bound, "listening");
    tokio::spawn(async move {
        let served =
            axum::serve(listener, router).with_graceful_shutdown(async move { shutdown.begun().await });
        if let Err(e) = served.await {
            tracing::error!(error = %e, "the HTTP server failed");
        }
    });
    Ok(bound)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_is_ready_while_every_dependency_is_up_and_it_is_not_stopping() {
        let health = Health::new(Duration::from_secs(1), &["kafka", "cassandra"]);
        assert!(!health.is_ready());
        health.set("kafka", Ok(()));
        assert!(!health.is_ready());
        health.set("cassandra", Ok(()));
        assert!(health.is_ready());
        health.set("cassandra", Err("no node answers".into()));
        assert_eq!(health.report()["dependencies"]["cassandra"], "no node answers");
        health.set("cassandra", Ok(()));
        health.stopping();
        assert!(!health.is_ready());
    }

    #[tokio::test]
    async fn every_request_is_counted_under_the_route_that_served_it() {
        let (registry, shutdown) = (Registry::new(), Shutdown::default());
        let health = Health::new(Duration::from_secs(60), &["kafka"]);
        let router = guarded(router(health, registry.clone()), &Hosts::default(), &registry).unwrap();
        let address = serve("127.0.0.1:0".parse().unwrap(), router, shutdown.clone()).await.unwrap();
        let get = async |path: &str| {
            let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
            let request = format!("GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n");
            tokio::io::AsyncWriteExt::write_all(&mut stream, request.as_bytes()).await.unwrap();
            let mut response = String::new();
            tokio::io::AsyncReadExt::read_to_string(&mut stream, &mut response).await.unwrap();
            response
        };
        for path in ["/healthz", "/readyz", "/unknown/1", "/unknown/2"] {
            get(path).await;
        }
        let response = get("/metrics").await;
        for (route, status, count) in [("/healthz", "2xx", 1), ("/readyz", "5xx", 1), ("other", "4xx", 2)] {
            let line =
                format!("pipeline_http_requests_total{{route=\"{route}\",status=\"{status}\"}} {count}\n");
            assert!(response.contains(&line), "{line}{response}");
        }
        assert!(
            response.contains("pipeline_http_requests_active 1\n"),
            "the request for /metrics itself is active: {response}"
        );
        shutdown.begin();
    }

    #[test]
    fn a_stalled_loop_is_unhealthy() {
        let health = Health::new(Duration::ZERO, &[]);
        assert!(!health.is_healthy());
        assert!(Health::new(Duration::from_secs(60), &[]).is_healthy());
    }
}
