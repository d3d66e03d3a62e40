//! `GET /api/v1/stream`: the overview as server-sent events, one a second, the first at once.

use super::{Api, MAX_WATCHERS, Refusal, bounds};
use axum::extract::State;
use axum::response::sse::{Event, KeepAlive, Sse};
use futures::{Stream, StreamExt};
use prometheus::IntGauge;
use std::convert::Infallible;
use std::time::Duration;
use tokio::sync::OwnedSemaphorePermit;
use tokio_stream::wrappers::WatchStream;

/// How long a browser waits before it connects again.
const RECONNECT_AFTER: Duration = Duration::from_secs(2);

/// One open feed: counted while it lives.
struct Watcher {
    gauge: IntGauge,
    _place: OwnedSemaphorePermit,
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.gauge.dec();
    }
}

/// Events named `overview`, each the JSON of `/api/v1/overview`.
pub(super) async fn stream(
    State(api): State<Api>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Refusal> {
    let place = bounds::place(&api.watchers, MAX_WATCHERS, "feeds")?;
    api.metrics.watchers().inc();
    let watcher = Watcher { gauge: api.metrics.watchers().clone(), _place: place };
    let shutdown = api.shutdown.clone();
    let events = WatchStream::new(api.board.watch())
        .map(move |shown| {
            // Moved in, so that the place is given back when the feed ends.
            let _ = &watcher;
            Ok(Event::default().event("overview").retry(RECONNECT_AFTER).data(&*shown.json))
        })
        .take_until(async move { shutdown.begun().await });
    Ok(Sse::new(events).keep_alive(KeepAlive::default()))
}
