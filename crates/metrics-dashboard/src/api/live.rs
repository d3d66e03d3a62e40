//! `GET /api/v1/stream`: the overview as server-sent events, the first immediately and then one per second.

use super::{Api, MAX_WATCHERS, Refusal, bounds};
use axum::extract::State;
use axum::response::sse::{Event, KeepAlive, Sse};
use futures::{Stream, StreamExt};
use prometheus::IntGauge;
use std::convert::Infallible;
use std::time::Duration;
use tokio::sync::OwnedSemaphorePermit;
use tokio_stream::wrappers::WatchStream;

/// How long a browser waits before it reconnects.
const RECONNECT_AFTER: Duration = Duration::from_secs(2);

/// An open event stream. It is counted until it is dropped.
struct Watcher {
    gauge: IntGauge,
    _permit: OwnedSemaphorePermit,
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.gauge.dec();
    }
}

/// Sends events named `overview`, each with the JSON of `/api/v1/overview`.
pub(super) async fn stream(
    State(api): State<Api>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Refusal> {
    let permit = bounds::acquire(&api.watchers, MAX_WATCHERS, "event streams")?;
    api.metrics.watchers().inc();
    let watcher = Watcher { gauge: api.metrics.watchers().clone(), _permit: permit };
    let shutdown = api.shutdown.clone();
    let events = WatchStream::new(api.board.watch())
        .map(move |snapshot| {
            // Moves the watcher into the closure, so that its permit is released when the stream ends.
            let _ = &watcher;
            Ok(Event::default().event("overview").retry(RECONNECT_AFTER).data(&*snapshot.json))
        })
        .take_until(async move { shutdown.begun().await });
    Ok(Sse::new(events).keep_alive(KeepAlive::default()))
}
