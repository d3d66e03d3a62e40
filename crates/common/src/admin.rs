//! `/healthz`, `/readyz` and `/metrics` of every service, and by which host names a service may be asked ([`hosts`]).
//!
//! Healthy: the service's main loop moved within its stall limit. Ready: every dependency it named is up; stopping makes it
//! not ready first.

pub mod hosts;

use crate::metrics::HttpMetrics;
use crate::shutdown::Shutdown;
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

/// What `/healthz` and `/readyz` answer from.
#[derive(Debug)]
pub struct Health {
    stall_limit: Duration,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    moved_at: Instant,
    dependencies: BTreeMap<String, Result<(), String>>,
    stopping: bool,
}

impl Health {
    /// `stall_limit`: how long the main loop may stand still before it counts as dead. `dependencies` start as not ready.
    pub fn new(stall_limit: Duration, dependencies: &[&str]) -> Arc<Health> {
        let waiting = |name: &&str| ((*name).to_owned(), Err("not yet known".to_owned()));
        let dependencies = dependencies.iter().map(waiting).collect();
        let inner = Inner { moved_at: Instant::now(), dependencies, stopping: false };
        Arc::new(Health { stall_limit, inner: Mutex::new(inner) })
    }

    fn with<T>(&self, act: impl FnOnce(&mut Inner) -> T) -> T {
        act(&mut self.inner.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The main loop moved.
    pub fn beat(&self) {
        self.with(|i| i.moved_at = Instant::now());
    }

    /// Notes that a dependency is up, or why it is not. Bounded: the names are the program's own.
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

    /// Forgets a dependency, such as a partition that moved elsewhere.
    pub fn forget(&self, dependency: &str) {
        self.with(|i| i.dependencies.remove(dependency));
    }

    /// Whether a dependency was last known to be up.
    pub fn is_up(&self, dependency: &str) -> bool {
        self.with(|i| i.dependencies.get(dependency).is_some_and(Result::is_ok))
    }

    /// Why a dependency is not up; `None`: it is, or is not known by this name.
    pub fn problem(&self, dependency: &str) -> Option<String> {
        self.with(|i| i.dependencies.get(dependency).and_then(|state| state.as_ref().err().cloned()))
    }

    /// From now on not ready, whatever the dependencies say.
    pub fn stopping(&self) {
        self.with(|i| i.stopping = true);
    }

    /// Whether every dependency is up and stopping has not begun.
    pub fn is_ready(&self) -> bool {
        self.with(|i| !i.stopping && i.dependencies.values().all(Result::is_ok))
    }

    fn is_healthy(&self) -> bool {
        self.with(|i| i.moved_at.elapsed() <= self.stall_limit)
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

/// The three routes, to be served alone or merged into a service's own router.
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
        (StatusCode::SERVICE_UNAVAILABLE, format!("the main loop has not moved for over {limit} s\n"))
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
            let text = format!("metrics cannot be encoded: {e}\n").into_bytes();
            (StatusCode::INTERNAL_SERVER_ERROR, [(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text)
        }
    }
}

/// Client closed the request: no official code, but a widespread one.
const CLIENT_GONE: u16 = 499;

/// One request; noted when it is dropped, whatever became of it.
struct Asked {
    metrics: HttpMetrics,
    route: Option<MatchedPath>,
    since: Instant,
    status: u16,
}

impl Drop for Asked {
    fn drop(&mut self) {
        let route = self.route.as_ref().map(MatchedPath::as_str);
        self.metrics.answered(route, self.status, self.since.elapsed());
    }
}

/// The same router, answering only to the names of `hosts`, with every request measured into `registry`: by which route it
/// was taken, how it was answered, how long that took. Once per registry.
pub fn guarded(router: Router, hosts: &Hosts, registry: &Registry) -> Result<Router, prometheus::Error> {
    let checked = router.layer(from_fn_with_state(hosts.clone(), hosts::check));
    Ok(checked.layer(from_fn_with_state(HttpMetrics::new(registry)?, measure)))
}

async fn measure(State(metrics): State<HttpMetrics>, request: Request, next: Next) -> Response {
    metrics.asked();
    let route = request.extensions().get::<MatchedPath>().cloned();
    let mut asked = Asked { metrics, route, since: Instant::now(), status: CLIENT_GONE };
    let answer = next.run(request).await;
    asked.status = answer.status().as_u16();
    answer
}

/// The address cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {listen}: {cause}; choose another with --http-listen or PIPELINE_HTTP_LISTEN")]
pub struct ListenError {
    listen: SocketAddr,
    cause: std::io::Error,
}

/// Listens, then serves `router` in a task until shutdown is complete. Returns the address really bound (port 0 asks
/// for any).
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
            tracing::error!(error = %e, "http server ended");
        }
    });
    Ok(bound)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readiness_needs_every_dependency_and_ends_with_stopping() {
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
    async fn every_request_is_measured_under_the_route_that_took_it() {
        let (registry, shutdown) = (Registry::new(), Shutdown::default());
        let health = Health::new(Duration::from_secs(60), &["kafka"]);
        let router = guarded(router(health, registry.clone()), &Hosts::default(), &registry).unwrap();
        let address = serve("127.0.0.1:0".parse().unwrap(), router, shutdown.clone()).await.unwrap();
        let ask = async |path: &str| {
            let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
            let request = format!("GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n");
            tokio::io::AsyncWriteExt::write_all(&mut stream, request.as_bytes()).await.unwrap();
            let mut answer = String::new();
            tokio::io::AsyncReadExt::read_to_string(&mut stream, &mut answer).await.unwrap();
            answer
        };
        for path in ["/healthz", "/readyz", "/made/up/1", "/made/up/2"] {
            ask(path).await;
        }
        let answer = ask("/metrics").await;
        for (route, status, count) in [("/healthz", "2xx", 1), ("/readyz", "5xx", 1), ("other", "4xx", 2)] {
            let line =
                format!("pipeline_http_requests_total{{route=\"{route}\",status=\"{status}\"}} {count}\n");
            assert!(answer.contains(&line), "{line}{answer}");
        }
        assert!(answer.contains("pipeline_http_requests_active 1\n"), "the one that asks: {answer}");
        shutdown.begin();
    }

    #[test]
    fn a_loop_that_stands_still_is_not_healthy() {
        let health = Health::new(Duration::ZERO, &[]);
        assert!(!health.is_healthy());
        assert!(Health::new(Duration::from_secs(60), &[]).is_healthy());
    }
}
