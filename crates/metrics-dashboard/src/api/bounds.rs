//! Limits the number of concurrent requests and the duration of each. A request above the limit is refused immediately
//! instead of being queued.
//!
//! Each request is handled in its own task. If the request times out or the client disconnects, the task continues to
//! its end and keeps its permit until then: a request to Cassandra that is dropped in flight would keep its stream id.

use super::Refusal;
use crate::reason::{Origin, Reason};
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Most concurrent requests to the API.
const MAX_REQUESTS: usize = 64;
/// Longest time until the response starts.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(20);

/// Permits of concurrent requests, and the timeout of each.
#[derive(Debug, Clone)]
pub(super) struct Bounds {
    permits: Arc<Semaphore>,
    timeout: Duration,
}

impl Default for Bounds {
    fn default() -> Bounds {
        Bounds { permits: Arc::new(Semaphore::new(MAX_REQUESTS)), timeout: RESPONSE_TIMEOUT }
    }
}

/// Acquires a permit without waiting. The error names the limit: at most `most` of `what`.
pub(super) fn acquire(
    permits: &Arc<Semaphore>,
    most: usize,
    what: &str,
) -> Result<OwnedSemaphorePermit, Refusal> {
    permits.clone().try_acquire_owned().map_err(|_| {
        let message = format!("the limit of {most} concurrent {what} is reached; retry in a moment");
        Refusal(StatusCode::SERVICE_UNAVAILABLE, Reason::new(Origin::Dashboard, message))
    })
}

pub(super) async fn bounded(State(bounds): State<Bounds>, request: Request, next: Next) -> Response {
    let permit = match acquire(&bounds.permits, MAX_REQUESTS, "requests") {
        Ok(permit) => permit,
        Err(refusal) => return refusal.into_response(),
    };
    let response = tokio::spawn(async move {
        let response = next.run(request).await;
        drop(permit);
        response
    });
    let failed =
        |status, message: String| Refusal(status, Reason::new(Origin::Dashboard, message)).into_response();
    tokio::select! {
        response = response => response.unwrap_or_else(|_panicked| {
            failed(StatusCode::INTERNAL_SERVER_ERROR, "the request failed; see the log of the service".to_owned())
        }),
        () = tokio::time::sleep(bounds.timeout) => {
            let seconds = bounds.timeout.as_secs_f64();
            let message = format!("no response within {seconds} s; request less data, or retry later");
            failed(StatusCode::GATEWAY_TIMEOUT, message)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::Router;
    use axum::middleware::from_fn_with_state;
    use axum::routing::get;
    use common::runtime::admin;
    use common::runtime::shutdown::Shutdown;
    use std::net::SocketAddr;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::sync::watch;

    /// Serves `/slow`, which sets `started` and responds when `open` becomes true.
    async fn serve(
        bounds: Bounds,
        started: watch::Sender<bool>,
        open: watch::Receiver<bool>,
        shutdown: &Shutdown,
    ) -> SocketAddr {
        let slow = async move || {
            started.send_replace(true);
            let _ = open.clone().wait_for(|open| *open).await;
            "slow"
        };
        let router = Router::new().route("/slow", get(slow)).layer(from_fn_with_state(bounds, bounded));
        admin::serve("127.0.0.1:0".parse().unwrap(), router, shutdown.clone()).await.unwrap()
    }

    async fn fetch(address: SocketAddr) -> String {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        stream.write_all(b"GET /slow HTTP/1.0\r\nHost: localhost\r\n\r\n").await.unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).await.unwrap();
        response
    }

    #[tokio::test]
    async fn a_request_above_the_limit_is_refused_immediately_and_a_finished_one_frees_its_permit() {
        let ((gate, open), (start, mut started)) = (watch::channel(false), watch::channel(false));
        let bounds = Bounds { permits: Arc::new(Semaphore::new(1)), timeout: Duration::from_secs(600) };
        let (permits, shutdown) = (bounds.permits.clone(), Shutdown::default());
        let address = serve(bounds, start, open, &shutdown).await;
        let first = tokio::spawn(fetch(address));
        started.wait_for(|started| *started).await.unwrap();
        assert_eq!(permits.available_permits(), 0);
        let second = fetch(address).await;
        assert!(second.starts_with("HTTP/1.0 503") && second.contains("retry-after: 1\r\n"), "{second}");
        assert!(second.contains(r#"{"error":{"#) && second.contains(r#""source":"dashboard""#), "{second}");
        gate.send_replace(true);
        assert!(first.await.unwrap().ends_with("slow"));
        assert!(fetch(address).await.ends_with("slow"));
        shutdown.begin();
    }

    #[tokio::test]
    async fn a_request_that_times_out_keeps_its_permit_until_its_task_is_done() {
        let ((gate, open), (start, mut started)) = (watch::channel(false), watch::channel(false));
        let bounds = Bounds { permits: Arc::new(Semaphore::new(1)), timeout: Duration::from_millis(10) };
        let (permits, shutdown) = (bounds.permits.clone(), Shutdown::default());
        let address = serve(bounds, start, open, &shutdown).await;
        let late = fetch(address).await;
        assert!(late.starts_with("HTTP/1.0 504") && late.contains("no response within 0.01 s"), "{late}");
        started.wait_for(|started| *started).await.unwrap();
        assert_eq!(permits.available_permits(), 0, "the task must still run");
        gate.send_replace(true);
        let _freed = permits.acquire().await.unwrap();
        shutdown.begin();
    }
}
