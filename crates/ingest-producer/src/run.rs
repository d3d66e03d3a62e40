//! Orders the effects of an attempt: plan → lease → fetch page by page → publish → wait for all acknowledgements →
//! succeeded. Only the ledger determines what is due; a tick just runs the planner. If an attempt stops at any point,
//! for example in a crash, its lease expires and another attempt completes the interval with the same event ids.

mod batch;

use crate::error::{AttemptError, Kind};
use crate::ledger::{
    Attempt, Claim, Counts, Ending, Lease, Ledger, LedgerError, OUTCOME_CLEARED, OUTCOME_FAILED,
    OUTCOME_INTERRUPTED, OUTCOME_LOST, OUTCOME_SUCCEEDED, failures,
};
use crate::metrics::Metrics;
use crate::planner::{AfterFailure, FailedAttempt, Run, after_failure};
use crate::publish::{Acks, Publish, RunHeaders};
use crate::registration::CheckTopic;
use crate::source::client::{FetchPage, Page, check_is_over};
use crate::source::extract::{Extractor, Outgoing};
use crate::source::request::Requests;
use crate::source::walk::{Walk, Walker};
use backon::{ExponentialBuilder, Retryable};
use batch::Batch;
use common::contracts::run_ledger::{Interval, RunState, RunType};
use common::contracts::stream::Definition;
use futures::FutureExt;
use std::any::Any;
use std::borrow::Cow;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Returns the current time in Unix milliseconds. It is injected so that tests can control it.
pub type Clock = Arc<dyn Fn() -> i64 + Send + Sync>;

/// Pause before a ledger call is retried.
const LEDGER_PAUSE: Duration = Duration::from_millis(500);
/// Maximum retries of a claim whose result is unknown. They take much less time than a lease of default length.
const CLAIM_RETRIES: usize = 4;
/// Maximum retries of a ledger call after shutdown has started.
const RETRIES_AFTER_STOP: u32 = 6;

/// Runs the attempts of one stream. All of its dependencies are fields.
pub struct Runner {
    /// The stream definition.
    pub definition: Definition,
    /// The run ledger.
    pub ledger: Arc<dyn Ledger>,
    /// The source of pages.
    pub source: Arc<dyn FetchPage>,
    /// The destination of records.
    pub publisher: Arc<dyn Publish>,
    /// Checks before each attempt that the topic may be written to.
    pub topic: Arc<dyn CheckTopic>,
    /// Builds the URLs of pages.
    pub requests: Requests,
    /// Turns records into events.
    pub extractor: Extractor,
    /// The metrics of the producer.
    pub metrics: Metrics,
    /// Name of this instance, which owns the leases.
    pub owner: String,
    /// Duration of a lease without renewal, in milliseconds.
    pub lease_ms: i64,
    /// The clock.
    pub clock: Clock,
}

/// How an attempt ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// Every record was acknowledged.
    Succeeded,
    /// It failed. The run is retried with a short backoff.
    Retrying,
    /// It failed, and the run is marked as failed. It is retried with a long backoff.
    Failed,
    /// Another owner holds the lease.
    Lost,
    /// The producer is stopping. The run is due again immediately.
    Interrupted,
}

/// The progress of an attempt, readable while it runs.
#[derive(Debug, Default)]
struct Progress {
    pages: AtomicI64,
    records: AtomicI64,
    bytes: AtomicI64,
    acks: Arc<Acks>,
}

impl Progress {
    fn counts(&self) -> Counts {
        let load = |count: &AtomicI64| count.load(Ordering::Relaxed);
        Counts {
            pages: i32::try_from(load(&self.pages)).unwrap_or(i32::MAX),
            records: load(&self.records),
            acked: i64::try_from(self.acks.acked()).unwrap_or(i64::MAX),
            bytes: load(&self.bytes),
        }
    }
}

enum Outcome {
    Done(Result<(), AttemptError>),
    Lost,
    Interrupted,
}

impl Runner {
    fn now(&self) -> i64 {
        (self.clock)()
    }

    /// Claims the lease of an interval whose row is still as `seen`. Returns `None` if another owner claimed it first.
    pub async fn claim(
        &self,
        interval: Interval,
        run_type: RunType,
        seen: Option<&Run>,
    ) -> Result<Option<Claim>, LedgerError> {
        if let Some(vanished) = seen.filter(|run| run.state == RunState::Running) {
            let cause = format!("the lease of {} expired", vanished.owner);
            let last_renewal_ms = vanished.lease_until_ms - self.lease_ms;
            let lost = attempt_record(vanished, vanished.attempt, OUTCOME_LOST, cause);
            self.ledger.record(&Attempt { started_ms: last_renewal_ms, ..lost }).await?;
        }
        let now_ms = self.now();
        let until_ms = now_ms + self.lease_ms;
        let lease = Lease { run_id: Uuid::new_v4().to_string(), owner: self.owner.clone(), now_ms, until_ms };
        // Retries use the same lease, so that a claim that was applied without a response is recognized as ours.
        let pauses = ExponentialBuilder::default().with_min_delay(LEDGER_PAUSE).with_max_times(CLAIM_RETRIES);
        let claim = (|| self.ledger.claim(interval, run_type, seen, &lease)).retry(pauses);
        let claimed = claim.when(|e| matches!(e, LedgerError::Unavailable(_))).await?;
        if let (Some(claim), Some(restarted)) = (&claimed, seen.filter(|run| run.starts_over(run_type))) {
            let cause = format!("was {}; restarted by {}", restarted.state, run_type);
            let cleared = attempt_record(restarted, claim.attempt - 1, OUTCOME_CLEARED, cause);
            let cleared = Attempt { owner: self.owner.clone(), started_ms: now_ms, ..cleared };
            // Without this record, earlier failures keep counting. The claimed run can still proceed.
            if let Err(e) = self.ledger.record(&cleared).await {
                tracing::debug!(error = %e, run_id = claim.run_id, "recording that the run was cleared failed");
            }
        }
        Ok(claimed)
    }

    /// Runs one attempt, from the first page to its ledger record. `stop` interrupts it.
    pub async fn attempt(self: Arc<Self>, claim: Claim, stop: CancellationToken) -> Ended {
        let _active = self.metrics.active_run();
        tracing::info!(
            interval = claim.interval.start_ms,
            run_id = claim.run_id,
            attempt = claim.attempt,
            run_type = claim.run_type.name(),
            "run started"
        );
        let progress = Progress::default();
        let (lost, over) = (CancellationToken::new(), CancellationToken::new());
        // The drop guard stops the renewal however this attempt ends: a lease without an attempt must expire.
        let _over = over.clone().drop_guard();
        let keeper = tokio::spawn(self.clone().keep_lease(claim.clone(), lost.clone(), over.clone()));
        let timeout = Duration::from_millis(self.definition.stream.retry.attempt_timeout_ms.unsigned_abs());
        let work = AssertUnwindSafe(self.fetch_and_publish(&claim, &progress)).catch_unwind();
        let outcome = tokio::select! {
            done = work => Outcome::Done(done.unwrap_or_else(|panic| Err(panicked(&*panic)))),
            () = tokio::time::sleep(timeout) => Outcome::Done(Err(self.timed_out(progress.counts()))),
            () = lost.cancelled() => Outcome::Lost,
            () = stop.cancelled() => Outcome::Interrupted,
        };
        over.cancel();
        // Joined, not aborted: an abandoned request would keep its stream id on the connection.
        if let Err(e) = keeper.await {
            tracing::error!(error = %e, "renewing the lease panicked");
        }
        self.record_end(&claim, progress.counts(), outcome, &stop).await
    }

    /// The error of an attempt that exceeds its timeout.
    fn timed_out(&self, counts: Counts) -> AttemptError {
        let seconds = self.definition.stream.retry.attempt_timeout_ms as f64 / 1000.0;
        let Counts { pages, records, acked, .. } = counts;
        AttemptError::retryable(format!(
            "not done within {seconds} s: {pages} pages, {records} records, {acked} acknowledged; raise \
             stream.retry.attempt_timeout, or shorten the schedule's intervals"
        ))
    }

    /// Renews the lease after each third of its duration until `over`. Cancels `lost` if the lease is lost.
    async fn keep_lease(self: Arc<Self>, claim: Claim, lost: CancellationToken, over: CancellationToken) {
        let mut until_ms = claim.started_ms + self.lease_ms;
        let mut pause = Duration::from_millis((self.lease_ms / 3).unsigned_abs());
        loop {
            tokio::select! {
                () = over.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
            let new_until_ms = self.now() + self.lease_ms;
            match self.ledger.renew(&claim, new_until_ms).await {
                Ok(true) => {
                    until_ms = new_until_ms;
                    pause = Duration::from_millis((self.lease_ms / 3).unsigned_abs());
                }
                Ok(false) => return lost.cancel(),
                Err(e) if self.now() >= until_ms => {
                    let run_id = &claim.run_id;
                    tracing::warn!(error = %e, run_id, "the lease expired while the ledger was unavailable");
                    return lost.cancel();
                }
                Err(e) => {
                    tracing::debug!(error = %e, run_id = claim.run_id, "renewing the lease failed; retrying");
                    pause = LEDGER_PAUSE;
                }
            }
        }
    }

    async fn fetch_and_publish(&self, claim: &Claim, progress: &Progress) -> Result<(), AttemptError> {
        self.topic.check().await?;
        let definition = &self.definition;
        let run_id = Uuid::parse_str(&claim.run_id).map_err(|e| AttemptError::fatal(e.to_string()))?;
        let headers =
            RunHeaders::new(self.requests.name().to_owned(), definition.event.event_type.clone(), &run_id);
        let walker =
            Walker { source: &*self.source, requests: &self.requests, definition, interval: claim.interval };
        for each in &walker.each().await? {
            let mut walk = walker.pages(each)?;
            loop {
                let timer = self.metrics.fetch_seconds.start_timer();
                let page = walk.fetch().await.inspect_err(|_| self.metrics.fetches_failed.inc())?;
                timer.observe_duration();
                let Some(page) = page else { break };
                if let Some(sent_at_ms) = page.sent_at_ms() {
                    self.metrics.clock_ahead_seconds.set((self.now() - sent_at_ms) / 1000);
                    check_is_over(claim.interval, sent_at_ms)?;
                }
                let (records, last) = self.publish_page(&walk, &headers, &page, progress).await?;
                walk.advance(&page, records, last.as_deref())?;
            }
        }
        let (records, least) = (progress.counts().records, definition.source.min_records);
        if records < i64::from(least) {
            return Err(AttemptError::retryable(format!(
                "the interval has {records} records, but source.min_records is {least}"
            )));
        }
        progress.acks.all().await
    }

    /// Publishes the records of a page while reading it, and returns their number and the last one. At most one batch is in
    /// memory besides the text of the page.
    async fn publish_page<'p>(
        &self,
        walk: &Walk<'_>,
        headers: &RunHeaders,
        page: &'p Page,
        progress: &Progress,
    ) -> Result<(u64, Option<Cow<'p, [u8]>>), AttemptError> {
        let broken = |e: &dyn std::fmt::Display| AttemptError::retryable(e.to_string());
        progress.pages.fetch_add(1, Ordering::Relaxed);
        progress.bytes.fetch_add(i64::try_from(page.bytes).unwrap_or(i64::MAX), Ordering::Relaxed);
        self.metrics.pages.inc();
        self.metrics.bytes.inc_by(page.bytes);
        let Some(mut records) = walk.records(page)? else {
            if !page.text.is_empty() {
                let pointer = &self.definition.source.records;
                tracing::info!(pointer, "the page has no list of records, which counts as no records");
            }
            return Ok((0, None));
        };
        let around =
            self.extractor.surroundings(walk.interval(), walk.each(), page.json()).map_err(|e| broken(&e))?;
        let (mut count, mut last) = (0, None);
        loop {
            let first = progress.records.load(Ordering::Relaxed).unsigned_abs();
            let mut batch = Batch::default();
            while !batch.is_full()
                && let Some(record) = records.next()
            {
                let record = record.map_err(|e| broken(&e))?;
                let index = first + batch.outgoing.len() as u64;
                batch.add(self.extractor.outgoing(&around, index, &record));
                last = Some(record.text);
            }
            if batch.outgoing.is_empty() {
                return Ok((count, last));
            }
            count += batch.outgoing.len() as u64;
            self.publish_batch(&batch.outgoing, headers, progress).await?;
        }
    }

    async fn publish_batch(
        &self,
        batch: &[Outgoing],
        headers: &RunHeaders,
        progress: &Progress,
    ) -> Result<(), AttemptError> {
        let most = self.definition.source.limits.records;
        let count = batch.len() as i64;
        if progress.records.fetch_add(count, Ordering::Relaxed) + count > i64::from(most) {
            return Err(AttemptError::fatal(format!(
                "the interval has more than {most} records; raise source.limits.records"
            )));
        }
        let refused = batch.iter().filter(|record| matches!(record, Outgoing::Refused(_))).count();
        self.metrics.records_fetched.inc_by(batch.len() as u64);
        self.metrics.records_refused.inc_by(refused as u64);
        self.publisher.publish(headers, batch, &progress.acks).await?;
        // A large page must not block the other tasks of this thread.
        tokio::task::yield_now().await;
        Ok(())
    }

    /// Records the end of an attempt: first in the attempt's row, then in the run's row, which is authoritative.
    async fn record_end(
        &self,
        claim: &Claim,
        counts: Counts,
        outcome: Outcome,
        stop: &CancellationToken,
    ) -> Ended {
        let (outcome_name, error) = match &outcome {
            Outcome::Done(Ok(())) => (OUTCOME_SUCCEEDED, None),
            Outcome::Done(Err(error)) => (OUTCOME_FAILED, Some(error)),
            Outcome::Lost => (OUTCOME_LOST, None),
            Outcome::Interrupted => (OUTCOME_INTERRUPTED, None),
        };
        let now_ms = self.now();
        let attempt = Attempt {
            interval: claim.interval,
            number: claim.attempt,
            run_id: claim.run_id.clone(),
            owner: claim.owner.clone(),
            outcome: outcome_name.to_owned(),
            cause: error.map(|e| e.cause.clone()).unwrap_or_default(),
            http_status: error.and_then(|e| e.http_status).map(i32::from),
            counts,
            started_ms: claim.started_ms,
            milliseconds: now_ms - claim.started_ms,
        };
        let recorded = self.retry_ledger(stop, || self.ledger.record(&attempt)).await;
        self.metrics.attempt_ended(outcome_name);
        if recorded.is_none() || matches!(outcome, Outcome::Lost) {
            tracing::warn!(
                interval = claim.interval.start_ms,
                run_id = claim.run_id,
                outcome = outcome_name,
                "attempt abandoned; another attempt will finish the run"
            );
            return Ended::Lost;
        }
        let ending = |state, error, retry_at_ms| Ending { state, counts, error, now_ms, retry_at_ms };
        let (ending, ended) = match outcome {
            Outcome::Done(Ok(())) => (ending(RunState::Succeeded, String::new(), 0), Ended::Succeeded),
            Outcome::Done(Err(error)) => self.ending_after_failure(claim, error, &ending, stop).await,
            _ => (
                ending(RunState::Retrying, "interrupted by a shutdown".to_owned(), now_ms),
                Ended::Interrupted,
            ),
        };
        self.finish(claim, &ending, ended, stop).await
    }

    async fn ending_after_failure(
        &self,
        claim: &Claim,
        error: AttemptError,
        ending: &(dyn Fn(RunState, String, i64) -> Ending + Sync),
        stop: &CancellationToken,
    ) -> (Ending, Ended) {
        let attempts = self.retry_ledger(stop, || self.ledger.attempts(claim.interval.start_ms)).await;
        let failed = FailedAttempt {
            retryable: error.kind == Kind::Retryable,
            failures: attempts.map_or(1, |attempts| failures(&attempts)),
            elapsed_ms: self.now() - claim.first_started_ms,
            retry_after_ms: error.retry_after_ms,
            jitter: jitter(claim),
        };
        match after_failure(&self.definition.stream.retry, &failed) {
            AfterFailure::RetryIn { pause_ms } => {
                (ending(RunState::Retrying, error.cause, self.now() + pause_ms), Ended::Retrying)
            }
            AfterFailure::Fail { because, pause_ms } => {
                let cause = format!("{} ({because})", error.cause);
                (ending(RunState::Failed, cause, self.now() + pause_ms), Ended::Failed)
            }
        }
    }

    async fn finish(&self, claim: &Claim, ending: &Ending, ended: Ended, stop: &CancellationToken) -> Ended {
        let (interval, run_id) = (claim.interval.start_ms, &claim.run_id);
        let held = self.retry_ledger(stop, || self.finished(claim, ending)).await;
        if held != Some(true) {
            tracing::warn!(interval, run_id, "the lease was lost before the end of the run was recorded");
            return Ended::Lost;
        }
        match ended {
            Ended::Succeeded => {
                self.metrics.last_success.raise(self.now() / 1000);
                tracing::info!(interval, run_id, records = ending.counts.records, "run succeeded");
            }
            Ended::Failed => {
                let (cause, next_attempt) = (&ending.error, ending.retry_at_ms);
                tracing::error!(
                    interval,
                    run_id,
                    cause,
                    next_attempt,
                    "run failed; it is retried with a long backoff"
                );
            }
            _ => tracing::warn!(
                interval,
                run_id,
                cause = ending.error,
                retry_at = ending.retry_at_ms,
                "attempt failed; the run is retried"
            ),
        }
        ended
    }

    /// Writes the end of the run. Returns `true` if it is stored, be it by this call or an earlier one without a
    /// response.
    async fn finished(&self, claim: &Claim, ending: &Ending) -> Result<bool, LedgerError> {
        if self.ledger.finish(claim, ending).await? {
            return Ok(true);
        }
        let found = self.ledger.run(claim.interval.start_ms).await?;
        Ok(found.is_some_and(|run| {
            run.epoch == claim.epoch && run.run_id == claim.run_id && run.state == ending.state
        }))
    }

    /// Retries a ledger call until it succeeds, and only a few times after `stop`. Returns `None` if it failed for
    /// good.
    async fn retry_ledger<T, F>(&self, stop: &CancellationToken, call: impl Fn() -> F) -> Option<T>
    where
        F: Future<Output = Result<T, LedgerError>>,
    {
        let mut tries_left = RETRIES_AFTER_STOP;
        loop {
            match call().await {
                Ok(value) => return Some(value),
                Err(e @ LedgerError::Refused(_)) => {
                    tracing::error!(error = %e, "the ledger rejected a request of an attempt");
                    return None;
                }
                Err(e) => tracing::debug!(error = %e, "the ledger is unavailable; retrying"),
            }
            if stop.is_cancelled() {
                tries_left = tries_left.checked_sub(1)?;
            }
            tokio::time::sleep(LEDGER_PAUSE).await;
        }
    }
}

/// The error of an attempt that panicked.
fn panicked(panic: &(dyn Any + Send)) -> AttemptError {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let message = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
    AttemptError::retryable(format!("the attempt panicked: {message}"))
}

/// The record of an attempt whose owner left none.
fn attempt_record(run: &Run, number: i32, outcome: &str, cause: String) -> Attempt {
    Attempt {
        interval: run.interval,
        number,
        run_id: run.run_id.clone(),
        owner: run.owner.clone(),
        outcome: outcome.to_owned(),
        cause,
        http_status: None,
        counts: Counts::default(),
        started_ms: 0,
        milliseconds: 0,
    }
}

/// A number in `[0, 1)` that depends on owner, interval and attempt, so that runs that failed together retry at
/// different times.
fn jitter(claim: &Claim) -> f64 {
    let drawn = common::contracts::event::seen_hash(
        claim.interval.start_ms,
        format!("{}/{}", claim.owner, claim.attempt).as_bytes(),
    );
    (drawn >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests;
