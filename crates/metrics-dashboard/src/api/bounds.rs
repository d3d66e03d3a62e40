//! What one request may cost: so many are answered at once, each within a time. One too many is refused at once instead of
//! waiting its turn.
//!
//! A request is answered in a task of its own. When it takes too long, or its client goes away, the task runs on to its end
//! and keeps its place until then: a request to Cassandra that is dropped in flight would keep its stream id.

use super::Refusal;
use crate::reason::{Reason, Source};
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Most requests to the API answered at once.
const MAX_REQUESTS: usize = 64;
/// Longest time until an answer begins.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);

/// Places for requests, and how long each may take.
#[derive(Debug, Clone)]
pub(super) struct Bounds {
    places: Arc<Semaphore>,
    limit: Duration,
}

impl Default for Bounds {
    fn default() -> Bounds {
        Bounds { places: Arc::new(Semaphore::new(MAX_REQUESTS)), limit: ANSWER_LIMIT }
    }
}

/// A place, or a refusal that says how many are taken by `what`.
pub(super) fn place(
    places: &Arc<Semaphore>,
    most: usize,
    what: &str,
) -> Result<OwnedSemaphorePermit, Refusal> {
    places.clone().try_acquire_owned().map_err(|_| {
        let message = format!("{most} {what} at once are the most; ask again in a moment");
        Refusal(StatusCode::SERVICE_UNAVAILABLE, Reason::new(Source::Dashboard, message))
    })
}

pub(super) async fn bounded(State(bounds): State<Bounds>, request: Request, next: Next) -> Response {
    let place = match place(&bounds.places, MAX_REQUESTS, "requests") {
        Ok(place) => place,
        Err(refusal) => return refusal.into_response(),
    };
    let answer = tokio::spawn(async move {
        let answer = next.run(request).await;
        drop(place);
        answer
    });
    let failed =
        |status, message: String| Refusal(status, Reason::new(Source::Dashboard, message)).into_response();
    tokio::select! {
        answer = answer => answer.unwrap_or_else(|_panicked| {
            failed(StatusCode::INTERNAL_SERVER_ERROR, "the request could not be answered; see the log".to_owned())
        }),
        () = tokio::time::sleep(bounds.limit) => {
            let message = format!("no answer within {} s; ask for less, or later", bounds.limit.as_secs_f64());
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
    use common::admin;
    use common::shutdown::Shutdown;
    use std::net::SocketAddr;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::sync::watch;

    /// Serves `/slow`, which says that it has begun and answers when `open` becomes true.
    async fn serve(
        bounds: Bounds,
        (begun, open): (watch::Sender<bool>, watch::Receiver<bool>),
        shutdown: &Shutdown,
    ) -> SocketAddr {
        let slow = async move || {
            begun.send_replace(true);
            let _ = open.clone().wait_for(|open| *open).await;
            "slow"
        };
        let router = Router::new().route("/slow", get(slow)).layer(from_fn_with_state(bounds, bounded));
        admin::serve("127.0.0.1:0".parse().unwrap(), router, shutdown.clone()).await.unwrap()
    }

    async fn ask(address: SocketAddr) -> String {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        stream.write_all(b"GET /slow HTTP/1.0\r\nHost: localhost\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn one_request_too_many_is_refused_at_once_and_a_place_is_given_back() {
        let ((gate, open), (begins, mut begun)) = (watch::channel(false), watch::channel(false));
        let bounds = Bounds { places: Arc::new(Semaphore::new(1)), limit: Duration::from_secs(600) };
        let (places, shutdown) = (bounds.places.clone(), Shutdown::default());
        let address = serve(bounds, (begins, open), &shutdown).await;
        let first = tokio::spawn(ask(address));
        begun.wait_for(|begun| *begun).await.unwrap();
        assert_eq!(places.available_permits(), 0);
        let second = ask(address).await;
        assert!(second.starts_with("HTTP/1.0 503") && second.contains("retry-after: 1\r\n"), "{second}");
        assert!(second.contains(r#"{"error":{"#) && second.contains(r#""source":"dashboard""#), "{second}");
        gate.send_replace(true);
        assert!(first.await.unwrap().ends_with("slow"));
        assert!(ask(address).await.ends_with("slow"));
        shutdown.begin();
    }

    #[tokio::test]
    async fn a_request_that_takes_too_long_is_answered_and_keeps_its_place_until_it_is_done() {
        let ((gate, open), (begins, mut begun)) = (watch::channel(false), watch::channel(false));
        let bounds = Bounds { places: Arc::new(Semaphore::new(1)), limit: Duration::from_millis(10) };
        let (places, shutdown) = (bounds.places.clone(), Shutdown::default());
        let address = serve(bounds, (begins, open), &shutdown).await;
        let late = ask(address).await;
        assert!(late.starts_with("HTTP/1.0 504") && late.contains("no answer within 0.01 s"), "{late}");
        begun.wait_for(|begun| *begun).await.unwrap();
        assert_eq!(places.available_permits(), 0, "it still runs");
        gate.send_replace(true);
        let _freed = places.acquire().await.unwrap();
        shutdown.begin();
    }
}
