//! Sends requests to Cassandra with a bounded number in flight. A request is retried until it is acknowledged, rejected
//! or aborted. The driver itself never retries. A timed-out write that is applied later is harmless, because writes are
//! idempotent.

use super::in_flight::InFlight;
use super::outages::Outages;
use crate::error::ProcessorError;
use crate::metrics::Metrics;
use backon::{BackoffBuilder, ExponentialBuilder};
use common::runtime::cassandra::{Failure, classify};
use common::runtime::shutdown::Shutdown;
use scylla::client::session::Session;
use scylla::errors::ExecutionError;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

const WATCH_INTERVAL: Duration = Duration::from_secs(1);
/// Maximum backoff between two attempts at a request.
const MAX_BACKOFF: Duration = Duration::from_secs(1);

/// Dependencies and settings of requests.
#[derive(Debug)]
pub struct StoreContext {
    /// Cassandra session.
    pub session: Arc<Session>,
    /// Metrics.
    pub metrics: Arc<Metrics>,
    /// Aborts all requests and retries when cancelled.
    pub abandon: CancellationToken,
    /// Maximum number of requests in flight.
    pub in_flight: usize,
    /// How long to retry while the statements are prepared.
    pub start_deadline: Duration,
}

/// Sends requests and observes outages.
pub(super) struct Requests {
    pub(super) context: StoreContext,
    pub(super) outages: Outages,
    flight: InFlight,
}

/// Backoff between attempts: exponential, with jitter, without end.
pub(super) fn backoff() -> impl Iterator<Item = Duration> {
    ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(20))
        .with_max_delay(MAX_BACKOFF)
        .with_jitter()
        .without_max_times()
        .build()
}

impl Requests {
    pub(super) fn new(context: StoreContext) -> Requests {
        context.metrics.in_flight_limit.set(context.in_flight as i64);
        Requests { flight: InFlight::new(context.in_flight), outages: Outages::new(Instant::now()), context }
    }

    pub(super) fn session(&self) -> &Session {
        &self.context.session
    }

    /// Sends a request until it is acknowledged.
    pub(super) async fn until_acknowledged<T, F>(
        &self,
        mut request: impl FnMut() -> F,
    ) -> Result<T, ProcessorError>
    where
        F: Future<Output = Result<T, ExecutionError>>,
    {
        let mut backoff = backoff();
        loop {
            if let Ok(answer) = self.attempt(request()).await? {
                return Ok(answer);
            }
            self.wait(&mut backoff).await?;
        }
    }

    /// Makes one attempt at a request, once the limit of requests in flight permits it. The caller may retry an inner
    /// error.
    pub(super) async fn attempt<T>(
        &self,
        request: impl Future<Output = Result<T, ExecutionError>>,
    ) -> Result<Result<T, Failure>, ProcessorError> {
        let permit = self.flight.acquire().await;
        let in_flight = self.context.metrics.in_flight();
        let answer = tokio::select! {
            biased;
            () = self.context.abandon.cancelled() => return Err(ProcessorError::Stopped),
            answer = request => answer,
        };
        drop(in_flight);
        let outcome = match answer {
            Ok(answer) => {
                self.outages.succeeded(Instant::now());
                self.context.metrics.store_requests.inc();
                self.flight.succeeded();
                Ok(Ok(answer))
            }
            Err(error) => {
                self.outages.failed();
                self.context.metrics.store_retries.inc();
                match (classify(&error), permit) {
                    (Failure::Refused, _) => {
                        return Err(ProcessorError::Fatal(format!("cassandra rejected a request: {error}")));
                    }
                    (Failure::Overloaded, Some(permit)) => {
                        self.flight.overloaded(permit);
                        Ok(Err(Failure::Overloaded))
                    }
                    (failure, _) => Ok(Err(failure)),
                }
            }
        };
        self.context.metrics.in_flight_limit.set(self.flight.limit() as i64);
        outcome
    }

    /// Sends a trivial query every second until shutdown, so that an outage is noticed even if all partitions are idle.
    pub(super) async fn watch(&self, shutdown: &Shutdown) {
        while !shutdown.has_begun() {
            // `attempt` records the outcome.
            let _outcome =
                self.attempt(self.session().query_unpaged("SELECT key FROM system.local", ())).await;
            tokio::select! {
                () = shutdown.begun() => {}
                () = tokio::time::sleep(WATCH_INTERVAL) => {}
            }
        }
    }

    /// Waits for the next backoff.
    pub(super) async fn wait(
        &self,
        backoff: &mut impl Iterator<Item = Duration>,
    ) -> Result<(), ProcessorError> {
        tokio::select! {
            () = self.context.abandon.cancelled() => Err(ProcessorError::Stopped),
            () = tokio::time::sleep(backoff.next().unwrap_or(MAX_BACKOFF)) => Ok(()),
        }
    }
}
