//! Work besides processing: verifies the previous UTC day for the partitions of this instance, once a day. It runs on a
//! low-priority thread with its own runtime, so that it cannot delay the workers.
//!
//! An alarm starts the verification. Whether a day is verified is decided by table `verifications`, so a second alarm or
//! a restart verifies nothing again, and another instance that takes over a partition continues where this one stopped.

use crate::commands::verify::Sources;
use crate::commands::verify::daily::{DayVerifier, Verification, VerifyDay};
use crate::error::ProcessorError;
use crate::io::store::cassandra::CassandraStore;
use crate::io::store::requests::StoreContext;
use crate::metrics::Metrics;
use common::contracts::event::{Bucket, floor_to};
use common::contracts::stream::Definition;
use common::runtime::alarm::{Alarm, JobAlarm};
use common::runtime::presence::{Hold, Holdings};
use common::runtime::shutdown::Shutdown;
use scylla::client::session::Session;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

/// Interval at which newly assigned partitions are noticed. Also the longest delay if the alarm does not ring.
const POLL: Duration = Duration::from_secs(60);
/// Pause after a verification that failed.
const RETRY_PAUSE: Duration = Duration::from_secs(300);
/// Maximum number of Cassandra requests in flight.
const IN_FLIGHT: usize = 2;
/// How long preparing the statements may take.
const PREPARE_DEADLINE: Duration = Duration::from_secs(20);
/// The highest nice value.
const LOWEST_PRIORITY: i32 = 19;

/// What housekeeping needs of the running processor.
pub struct Context {
    /// Cassandra session.
    pub session: Arc<Session>,
    /// Keyspace of the stream.
    pub keyspace: String,
    /// Definition of the stream.
    pub definition: Arc<Definition>,
    /// Kafka bootstrap servers.
    pub brokers: String,
    /// Events topic.
    pub topic: String,
    /// Name of this instance.
    pub instance: String,
    /// Partitions that this instance holds.
    pub holdings: Holdings,
    /// Metrics of the processor.
    pub metrics: Arc<Metrics>,
    /// Ends housekeeping.
    pub shutdown: Shutdown,
}

/// Verifies each day at `verify_at_ms` after midnight UTC, on a thread that ends at shutdown.
pub fn start(context: Context, verify_at_ms: i64) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new().name("housekeeping".to_owned()).spawn(move || {
        // On Linux, this concerns the calling thread only.
        if let Err(error) = rustix::process::setpriority_process(None, LOWEST_PRIORITY) {
            tracing::warn!(%error, "cannot lower the priority of the housekeeping thread");
        }
        let shutdown = context.shutdown.clone();
        runtime.block_on(async {
            tokio::select! {
                () = shutdown.begun() => {}
                () = verify_days(context, verify_at_ms) => {}
            }
        });
    })?;
    Ok(())
}

async fn verify_days(context: Context, verify_at_ms: i64) {
    let verifier = loop {
        match context.verifier().await {
            Ok(verifier) => break verifier,
            Err(error) => tracing::warn!(%error, "the daily verification cannot start; retrying"),
        }
        tokio::time::sleep(RETRY_PAUSE).await;
    };
    let housekeeping = Housekeeping {
        verifier,
        verify_at_ms,
        alarm: Arc::new(JobAlarm::start()),
        holdings: context.holdings,
        metrics: context.metrics,
        now_ms: Box::new(|| chrono::Utc::now().timestamp_millis()),
    };
    housekeeping.run().await;
}

impl Context {
    async fn verifier(&self) -> Result<DayVerifier, ProcessorError> {
        // Separate metrics that are not exported: the exported ones describe the requests of the workers.
        let metrics = Metrics::new().map_err(|e| ProcessorError::Fatal(e.to_string()))?;
        let store = StoreContext {
            session: Arc::clone(&self.session),
            metrics: Arc::new(metrics),
            abandon: self.shutdown.token().clone(),
            in_flight: IN_FLIGHT,
            start_deadline: PREPARE_DEADLINE,
        };
        let sources = Sources {
            session: Arc::clone(&self.session),
            keyspace: self.keyspace.clone(),
            definition: (*self.definition).clone(),
            brokers: self.brokers.clone(),
            topic: self.topic.clone(),
            store: CassandraStore::new(&self.keyspace, &self.definition, store).await?,
        };
        DayVerifier::new(sources, self.instance.clone()).await
    }
}

/// The loop that verifies days.
struct Housekeeping<V> {
    verifier: V,
    /// Time of day of the verification, in milliseconds since midnight UTC.
    verify_at_ms: i64,
    alarm: Arc<dyn Alarm>,
    holdings: Holdings,
    metrics: Arc<Metrics>,
    now_ms: Box<dyn Fn() -> i64 + Send + Sync>,
}

impl<V: VerifyDay> Housekeeping<V> {
    /// Runs until it is dropped.
    async fn run(&self) {
        let mut known = BTreeMap::new();
        loop {
            let pause = self.verify_due(&mut known).await;
            tokio::select! {
                () = self.alarm.rung() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// Verifies the last day for each held partition unless a stored outcome exists. `known` holds the latest outcome
    /// of each partition. Returns how long to wait if the alarm does not ring earlier.
    async fn verify_due(&self, known: &mut BTreeMap<i32, Verification>) -> Duration {
        let day_ms = last_day((self.now_ms)(), self.verify_at_ms);
        self.alarm.set(next_verification(day_ms, self.verify_at_ms));
        let (mut unverified, metrics) = (self.held(), &self.metrics.verification);
        for partition in known.keys().filter(|partition| !unverified.contains(partition)) {
            metrics.forget(*partition);
        }
        known.retain(|partition, _| unverified.contains(partition));
        unverified.retain(|partition| known.get(partition).is_none_or(|v| v.day_ms != day_ms));
        metrics.unverified_partitions.set(unverified.len() as i64);
        let mut pause = POLL;
        for partition in unverified {
            match self.outcome(partition, day_ms).await {
                Ok(found) => {
                    metrics.finished(partition, found.rows, found.differences, found.finished_at_ms);
                    metrics.unverified_partitions.dec();
                    known.insert(partition, found);
                }
                Err(error) => {
                    tracing::warn!(partition, %error, "the daily verification failed; it is retried");
                    pause = RETRY_PAUSE;
                }
            }
        }
        pause
    }

    /// The stored outcome of a day, or that of a verification now.
    async fn outcome(&self, partition: i32, day_ms: i64) -> Result<Verification, ProcessorError> {
        match self.verifier.stored(partition, day_ms).await? {
            Some(verification) => Ok(verification),
            None => self.verifier.verify(partition, day_ms).await,
        }
    }

    /// The partitions that this instance processes.
    fn held(&self) -> BTreeSet<i32> {
        let processed = |hold: &Hold| matches!(hold, Hold::Running | Hold::Paused | Hold::Halted);
        self.holdings.all().into_iter().filter(|(_, hold)| processed(hold)).map(|(p, _)| p).collect()
    }
}

/// Start of the day whose verification was due last.
fn last_day(now_ms: i64, verify_at_ms: i64) -> i64 {
    let day = Bucket::Day.millis();
    floor_to(now_ms - verify_at_ms, day) - day
}

/// When the day after the one that starts at `day_ms` is due.
fn next_verification(day_ms: i64, verify_at_ms: i64) -> i64 {
    day_ms + 2 * Bucket::Day.millis() + verify_at_ms
}

#[cfg(test)]
mod tests {
    use super::*;
    use async_trait::async_trait;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicI64, AtomicU32, Ordering};
    use tokio::sync::Notify;
    use tokio::time::Instant;

    const DAY: i64 = 86_400_000;
    const HOUR: i64 = 3_600_000;
    /// 2026-01-01T00:00:00Z.
    const T0: i64 = 1_767_225_600_000;
    const AT: i64 = 9_000_000;

    #[test]
    fn the_day_before_is_due_at_the_time_of_day() {
        let check = |now_ms: i64, day_ms: i64| {
            assert_eq!(last_day(now_ms, AT), day_ms, "{now_ms}");
            let next = next_verification(day_ms, AT);
            assert!(next > now_ms && next <= now_ms + DAY);
            assert_eq!(last_day(next, AT), day_ms + DAY, "the next day is due at the next verification");
            assert_eq!(last_day(next - 1, AT), day_ms);
        };
        check(T0 + AT, T0 - DAY);
        check(T0 + AT - 1, T0 - 2 * DAY);
        check(T0, T0 - 2 * DAY);
        check(T0 + DAY - 1, T0 - DAY);
        assert_eq!(last_day(T0, 0), T0 - DAY, "midnight");
    }

    /// Keeps outcomes in memory. Fails on request.
    #[derive(Default)]
    struct FakeVerifier {
        stored: Mutex<BTreeMap<(i32, i64), Verification>>,
        verified: Mutex<Vec<(i32, i64)>>,
        failures: AtomicU32,
    }

    impl VerifyDay for Arc<FakeVerifier> {
        async fn stored(&self, partition: i32, day_ms: i64) -> Result<Option<Verification>, ProcessorError> {
            Ok(self.stored.lock().unwrap().get(&(partition, day_ms)).copied())
        }

        async fn verify(&self, partition: i32, day_ms: i64) -> Result<Verification, ProcessorError> {
            tokio::time::sleep(Duration::from_secs(30)).await;
            let left = self.failures.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
            if left.is_ok() {
                return Err(ProcessorError::Retryable("down".to_owned()));
            }
            let found =
                Verification { day_ms, rows: 7, differences: i64::from(partition), finished_at_ms: 1 };
            self.stored.lock().unwrap().insert((partition, day_ms), found);
            self.verified.lock().unwrap().push((partition, day_ms));
            Ok(found)
        }
    }

    /// Rings `rings` times at each time that is set.
    struct FakeAlarm {
        rings: u64,
        set_ms: AtomicI64,
        started: Instant,
        notify: Arc<Notify>,
    }

    #[async_trait]
    impl Alarm for FakeAlarm {
        fn set(&self, at_ms: i64) {
            if self.set_ms.swap(at_ms, Ordering::SeqCst) == at_ms {
                return;
            }
            let at = self.started + Duration::from_millis((at_ms - T0).unsigned_abs());
            for ring in 0..self.rings {
                let notify = Arc::clone(&self.notify);
                tokio::spawn(async move {
                    tokio::time::sleep_until(at + Duration::from_secs(ring)).await;
                    notify.notify_one();
                });
            }
        }

        async fn rung(&self) {
            self.notify.notified().await;
        }
    }

    struct Running {
        verifier: Arc<FakeVerifier>,
        holdings: Holdings,
        metrics: Arc<Metrics>,
        _task: tokio::task::JoinHandle<()>,
    }

    impl Running {
        /// Starts at [`T0`] in virtual time, with partitions 0 and 1.
        fn start(verifier: FakeVerifier, rings: u64) -> Running {
            let (verifier, started) = (Arc::new(verifier), Instant::now());
            let (holdings, metrics) = (Holdings::default(), Arc::new(Metrics::new().unwrap()));
            [0, 1].into_iter().for_each(|partition| holdings.set(partition, Hold::Running));
            let housekeeping = Housekeeping {
                verifier: Arc::clone(&verifier),
                verify_at_ms: AT,
                alarm: Arc::new(FakeAlarm { rings, set_ms: 0.into(), started, notify: Arc::default() }),
                holdings: holdings.clone(),
                metrics: Arc::clone(&metrics),
                now_ms: Box::new(move || T0 + started.elapsed().as_millis() as i64),
            };
            let _task = tokio::spawn(async move { housekeeping.run().await });
            Running { verifier, holdings, metrics, _task }
        }

        fn verified(&self) -> Vec<(i32, i64)> {
            self.verifier.verified.lock().unwrap().clone()
        }

        /// The values of a gauge.
        fn gauge(&self, name: &str) -> Vec<f64> {
            let families = self.metrics.registry.gather();
            let family = families.iter().find(|family| family.name() == name);
            let series = family.map(|family| family.get_metric().iter().map(|m| m.get_gauge().get_value()));
            series.map(Iterator::collect).unwrap_or_default()
        }
    }

    /// Passes virtual time.
    async fn pass(ms: i64) {
        tokio::time::sleep(Duration::from_millis(ms.unsigned_abs())).await;
    }

    #[tokio::test(start_paused = true)]
    async fn each_day_is_verified_once_whether_the_alarm_rings_never_or_repeatedly() {
        for rings in [0, 1, 3] {
            let running = Running::start(FakeVerifier::default(), rings);
            pass(AT - 1).await;
            let missed = [(0, T0 - 2 * DAY), (1, T0 - 2 * DAY)];
            assert_eq!(running.verified(), missed, "the day that was due before the start");
            pass(HOUR).await;
            let last = [(0, T0 - DAY), (1, T0 - DAY)];
            assert_eq!(running.verified(), [missed, last].concat(), "{rings} rings");
            pass(DAY).await;
            assert_eq!(running.verified().len(), 6, "{rings} rings");
            assert_eq!(running.gauge("processor_verification_differences"), [0.0, 1.0]);
            assert_eq!(running.gauge("processor_verified_rows"), [7.0, 7.0]);
            assert_eq!(running.gauge("processor_unverified_partitions"), [0.0]);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_partition_that_another_instance_has_verified_is_not_verified_again() {
        let verifier = FakeVerifier::default();
        let found = Verification { day_ms: T0 - 2 * DAY, rows: 5, differences: 4, finished_at_ms: 1 };
        verifier.stored.lock().unwrap().insert((1, T0 - 2 * DAY), found);
        let running = Running::start(verifier, 1);
        pass(HOUR / 4).await;
        assert_eq!(running.verified(), [(0, T0 - 2 * DAY)]);
        assert_eq!(running.gauge("processor_verification_differences"), [0.0, 4.0]);
        running.holdings.remove(1);
        running.holdings.set(2, Hold::Opening);
        running.holdings.set(3, Hold::Unregistered);
        pass(HOUR / 4).await;
        assert_eq!(running.gauge("processor_verification_differences"), [0.0], "released");
        running.holdings.set(2, Hold::Running);
        pass(HOUR / 4).await;
        assert_eq!(running.verified(), [(0, T0 - 2 * DAY), (2, T0 - 2 * DAY)]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_failed_verification_is_retried_and_the_partition_counts_as_unverified_until_then() {
        let running = Running::start(FakeVerifier { failures: 2.into(), ..FakeVerifier::default() }, 0);
        pass(100_000).await;
        assert_eq!(running.gauge("processor_unverified_partitions"), [2.0]);
        assert!(running.gauge("processor_last_verification_timestamp_seconds").is_empty());
        pass(HOUR).await;
        assert_eq!(running.verified().len(), 2);
        assert_eq!(running.gauge("processor_unverified_partitions"), [0.0]);
    }
}
