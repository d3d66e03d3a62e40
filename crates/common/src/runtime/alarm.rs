//! Wakes a service at a given time, with a one-shot job of tokio-cron-scheduler.
//!
//! An alarm only wakes its service. What is due is decided by stored state, so an alarm that rings twice has no effect
//! and one that never rings must cost only a delay: every caller also checks at a fixed interval. Repeated jobs of the
//! scheduler are not used. Its cron dialect differs from that of stream definitions, it applies a fixed UTC offset, and
//! under load its broadcast channels drop activations.

use async_trait::async_trait;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio_cron_scheduler::{Job, JobScheduler, JobSchedulerError};
use uuid::Uuid;

/// How long the scheduler may take to accept a job. It waits forever if one of its channels lagged.
const ACCEPT_DEADLINE: Duration = Duration::from_secs(5);
/// Longest delay of a job. The scheduler panics on a time that chrono cannot represent, such as that of a schedule without
/// a next occurrence.
const MAX_DELAY_SECONDS: i64 = 365 * 86_400;
/// Pause before a failed scheduler is replaced.
const REPLACE_PAUSE: Duration = Duration::from_secs(10);

/// Wakes one task at a given time. Tests use alarms that never ring or ring too often.
#[async_trait]
pub trait Alarm: Send + Sync {
    /// Sets the time of the next ring in Unix milliseconds, in place of an earlier one. A past time rings at once, and
    /// a time more than a year ahead after a year.
    fn set(&self, at_ms: i64);

    /// Completes when the alarm has rung since the last call. It may ring up to two seconds late. Cancel safe.
    async fn rung(&self);
}

/// An [`Alarm`] on tokio-cron-scheduler.
#[derive(Debug)]
pub struct JobAlarm {
    /// The time to ring at; `None` before the first one and after a ring.
    at_ms: watch::Sender<Option<i64>>,
    rings: Arc<Notify>,
}

impl JobAlarm {
    /// Starts the scheduler in a task, which ends when the alarm is dropped.
    pub fn start() -> JobAlarm {
        let (at_ms, times) = watch::channel(None);
        let rings = Arc::new(Notify::new());
        tokio::spawn(keep_scheduler(times, Arc::clone(&rings)));
        JobAlarm { at_ms, rings }
    }
}

#[async_trait]
impl Alarm for JobAlarm {
    fn set(&self, at_ms: i64) {
        self.at_ms.send_if_modified(|set| set.replace(at_ms) != Some(at_ms));
    }

    async fn rung(&self) {
        self.rings.notified().await;
        // The same time may be set again, for example after the clock has stepped back.
        self.at_ms.send_if_modified(|set| {
            *set = None;
            false
        });
    }
}

/// Replaces a scheduler that fails, until the alarm is dropped.
async fn keep_scheduler(mut times: watch::Receiver<Option<i64>>, rings: Arc<Notify>) {
    while let Err(error) = schedule(&mut times, &rings).await {
        tracing::warn!(%error, "the job scheduler failed and is replaced");
        times.mark_changed();
        tokio::time::sleep(REPLACE_PAUSE).await;
    }
}

/// Turns each time that is set into a job.
async fn schedule(
    times: &mut watch::Receiver<Option<i64>>,
    rings: &Arc<Notify>,
) -> Result<(), JobSchedulerError> {
    let mut scheduler = JobScheduler::new().await?;
    scheduler.start().await?;
    let mut job = None;
    let mut ended = Ok(());
    while ended.is_ok() && times.changed().await.is_ok() {
        let Some(at_ms) = *times.borrow_and_update() else { continue };
        let replaced = replace(&scheduler, job.take(), at_ms, rings);
        ended = tokio::select! {
            replaced = replaced => replaced.map(|id| job = Some(id)),
            () = tokio::time::sleep(ACCEPT_DEADLINE) => Err(JobSchedulerError::CantAdd),
        };
    }
    scheduler.shutdown().await?;
    ended
}

/// Replaces the job `old`, which may have run already, by one at `at_ms`.
async fn replace(
    scheduler: &JobScheduler,
    old: Option<Uuid>,
    at_ms: i64,
    rings: &Arc<Notify>,
) -> Result<Uuid, JobSchedulerError> {
    if let Some(old) = old {
        scheduler.remove(&old).await?;
    }
    let rings = Arc::clone(rings);
    let delay = whole_seconds_until(at_ms, chrono::Utc::now().timestamp_millis());
    scheduler.add(Job::new_one_shot(delay, move |_, _| rings.notify_one())?).await
}

/// The delay that makes the scheduler run a job at or after `at_ms`. The scheduler adds it to the current time without
/// its fraction of a second.
fn whole_seconds_until(at_ms: i64, now_ms: i64) -> Duration {
    let at_seconds = at_ms.div_euclid(1000).saturating_add(i64::from(at_ms.rem_euclid(1000) > 0));
    let delay = at_seconds.saturating_sub(now_ms.div_euclid(1000));
    Duration::from_secs(delay.clamp(0, MAX_DELAY_SECONDS).unsigned_abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_never_runs_before_its_time() {
        let check = |at_ms, now_ms, seconds| {
            assert_eq!(whole_seconds_until(at_ms, now_ms).as_secs(), seconds, "{at_ms} at {now_ms}");
        };
        check(60_000, 59_999, 1);
        check(60_000, 59_000, 1);
        check(60_001, 59_000, 2);
        check(60_000, 60_000, 0);
        check(60_000, 90_000, 0);
        check(-1, -1, 1);
        check(i64::MAX, 0, 365 * 86_400);
    }

    #[tokio::test]
    async fn an_alarm_rings_at_each_time_that_is_set_and_not_at_a_replaced_one() {
        let alarm = JobAlarm::start();
        let now_ms = || chrono::Utc::now().timestamp_millis();
        alarm.set(now_ms() + 3_600_000);
        for _ in 0..2 {
            let at_ms = now_ms() + 1000;
            alarm.set(at_ms);
            alarm.rung().await;
            assert!(now_ms() >= at_ms);
            // The same time again, as after a clock that stepped back.
            alarm.set(at_ms);
            alarm.rung().await;
        }
    }
}
