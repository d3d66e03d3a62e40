//! Requests to Cassandra: bounded in number, tried until acknowledged, refused or given up. The driver itself never retries; a
//! timed-out write that lands later only writes what is there already.

use super::in_flight::InFlight;
use super::outages::Outages;
use crate::error::ProcessorError;
use crate::metrics::Metrics;
use backon::{BackoffBuilder, ExponentialBuilder};
use common::cassandra::{Failure, classify};
use common::shutdown::Shutdown;
use scylla::client::session::Session;
use scylla::errors::ExecutionError;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

const WATCH_EVERY: Duration = Duration::from_secs(1);
/// Longest pause between two attempts at a request.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// What requests need.
#[derive(Debug)]
pub struct StoreContext {
    /// The session.
    pub session: Arc<Session>,
    /// Retries and in-flight.
    pub metrics: Arc<Metrics>,
    /// Ends every retry loop.
    pub abandon: CancellationToken,
    /// Most requests in flight.
    pub in_flight: usize,
    /// How long to wait for Cassandra while the statements are prepared.
    pub start_deadline: Duration,
}

/// Sends requests.
pub(super) struct Requests {
    pub(super) context: StoreContext,
    pub(super) outages: Outages,
    flight: InFlight,
}

/// Pauses between attempts: growing, with jitter.
pub(super) fn pauses() -> impl Iterator<Item = Duration> {
    ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(20))
        .with_max_delay(LONGEST_PAUSE)
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

    /// One request, tried until acknowledged.
    pub(super) async fn until_acknowledged<T, F>(
        &self,
        mut request: impl FnMut() -> F,
    ) -> Result<T, ProcessorError>
    where
        F: Future<Output = Result<T, ExecutionError>>,
    {
        let mut pauses = pauses();
        loop {
            if let Ok(answer) = self.attempt(request()).await? {
                return Ok(answer);
            }
            self.pause(&mut pauses).await?;
        }
    }

    /// One attempt at a request, within the requests that may be in flight. The inner error may pass.
    pub(super) async fn attempt<T>(
        &self,
        request: impl Future<Output = Result<T, ExecutionError>>,
    ) -> Result<Result<T, Failure>, ProcessorError> {
        let permit = self.flight.enter().await;
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
                        return Err(ProcessorError::Fatal(format!("cassandra refuses: {error}")));
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

    /// Asks for next to nothing every second until shutdown: however idle the partitions are, no outage goes unseen.
    pub(super) async fn watch(&self, shutdown: &Shutdown) {
        while !shutdown.has_begun() {
            // What becomes of it is counted.
            let _answer =
                self.attempt(self.session().query_unpaged("SELECT key FROM system.local", ())).await;
            tokio::select! {
                () = shutdown.begun() => {}
                () = tokio::time::sleep(WATCH_EVERY) => {}
            }
        }
    }

    pub(super) async fn pause(
        &self,
        pauses: &mut impl Iterator<Item = Duration>,
    ) -> Result<(), ProcessorError> {
        tokio::select! {
            () = self.context.abandon.cancelled() => Err(ProcessorError::Stopped),
            () = tokio::time::sleep(pauses.next().unwrap_or(LONGEST_PAUSE)) => Ok(()),
        }
    }
}
