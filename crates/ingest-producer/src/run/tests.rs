//! Tests of runs and of the service loop on fakes that fail on a seeded schedule.

mod outages;
mod records;
mod triggers;

use super::*;
use crate::ledger::memory::MemoryLedger;
use crate::schedule::Timeline;
use crate::service::Service;
use crate::source::auth::Loaded;
use crate::source::client::Page;
use crate::source::paginate::Headers;
use crate::source::request::PageRequest;
use async_trait::async_trait;
use chrono_tz::Tz;
use common::contracts::stream::BodyFormat;
use common::contracts::stream::Schedule;
use common::runtime::admin::Health;
use common::runtime::alarm::Alarm;
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::AtomicU64;

const MINUTE: i64 = 60_000;
const T0: i64 = 1_767_225_600_000;
/// Number of records per page.
const PAGE: usize = 20;

/// SplitMix64, which yields the same failures for the same seed.
#[derive(Debug)]
struct SeededRandom(AtomicU64);

impl SeededRandom {
    fn draw(&self, below: u64) -> u64 {
        let mut z = self.0.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::SeqCst);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % below
    }
}

/// Returns two pages per interval with ids determined by seed and page. One of `fail_one_in` requests fails.
struct FakeSource {
    random: Arc<SeededRandom>,
    fail_one_in: u64,
}

#[async_trait]
impl FetchPage for FakeSource {
    async fn fetch(&self, request: &PageRequest) -> Result<Page, AttemptError> {
        if self.fail_one_in > 0 && self.random.draw(self.fail_one_in) == 0 {
            let mut error = AttemptError::retryable("the source returned 500");
            error.http_status = Some(500);
            return Err(error);
        }
        let of = |name: &str| request.url.query_pairs().find(|(k, _)| k == name).unwrap().1.into_owned();
        let people = (0..PAGE).map(|n| {
            json!({"login": {"uuid": format!("{}/{}/{n}", of("seed"), of("page"))},
                   "name": {"first": "Ada", "last": "L"}})
        });
        Ok(page(&json!({"results": people.collect::<Vec<_>>()}).to_string()))
    }
}

fn page(body: &str) -> Page {
    Page {
        text: body.as_bytes().to_vec(),
        format: BodyFormat::Json,
        headers: Headers::default(),
        bytes: 100,
        credentials: Arc::new(Loaded::nothing()),
    }
}

/// Counts acknowledged records by (id, time). One of `fail_one_in` records is not delivered.
struct FakeKafka {
    random: Arc<SeededRandom>,
    fail_one_in: AtomicU64,
    delivered: Mutex<BTreeMap<(String, i64), usize>>,
    refused: Mutex<Vec<String>>,
    largest_batch: AtomicU64,
}

#[async_trait]
impl Publish for FakeKafka {
    async fn publish(
        &self,
        _: &RunHeaders,
        records: &[Outgoing],
        acks: &Arc<Acks>,
    ) -> Result<(), AttemptError> {
        self.largest_batch.fetch_max(records.len() as u64, Ordering::SeqCst);
        for record in records {
            acks.sent();
            let one_in = self.fail_one_in.load(Ordering::SeqCst);
            if one_in > 0 && self.random.draw(one_in) == 0 {
                acks.settled(Err("timed out".to_owned()));
                continue;
            }
            match record {
                Outgoing::Event(event) => {
                    let key = (event.id.clone(), event.time_ms);
                    *self.delivered.lock().unwrap().entry(key).or_default() += 1;
                }
                Outgoing::Refused(refused) => self.refused.lock().unwrap().push(refused.reason.clone()),
            }
            acks.settled(Ok(()));
        }
        Ok(())
    }
}

/// A topic that matches its registration until the flag is set.
#[derive(Default)]
struct FakeTopic(std::sync::atomic::AtomicBool);

#[async_trait]
impl CheckTopic for FakeTopic {
    async fn check(&self) -> Result<(), AttemptError> {
        if self.0.load(Ordering::SeqCst) {
            return Err(AttemptError::fatal("12 partitions, but registered with 6"));
        }
        Ok(())
    }
}

struct World {
    topic: Arc<FakeTopic>,
    ledger: Arc<MemoryLedger>,
    kafka: Arc<FakeKafka>,
    now: Arc<AtomicI64>,
    random: Arc<SeededRandom>,
    source_fails: u64,
    schedule: Schedule,
    catch_up_limit_ms: i64,
    lookback: u32,
}

impl World {
    fn new(seed: u64, source_fails: u64, kafka_fails: u64) -> World {
        let random = Arc::new(SeededRandom(AtomicU64::new(seed)));
        let fail_one_in = AtomicU64::new(kafka_fails);
        let kafka = FakeKafka {
            random: random.clone(),
            fail_one_in,
            delivered: Mutex::default(),
            refused: Mutex::default(),
            largest_batch: AtomicU64::new(0),
        };
        World {
            topic: Arc::default(),
            ledger: Arc::new(MemoryLedger::default()),
            kafka: Arc::new(kafka),
            now: Arc::new(AtomicI64::new(T0)),
            random,
            source_fails,
            schedule: Schedule::Every(MINUTE),
            catch_up_limit_ms: 0,
            lookback: 0,
        }
    }

    fn with_schedule(schedule: &Schedule) -> World {
        World { schedule: schedule.clone(), ..World::new(1, 0, 0) }
    }

    fn runner(&self, owner: &str) -> Arc<Runner> {
        let text = include_str!("../../../../streams/user_created.toml");
        let mut definition = Definition::parse("users", text).unwrap();
        definition.stream.schedule = self.schedule.clone();
        definition.stream.catch_up_limit_ms = self.catch_up_limit_ms;
        definition.stream.delay_ms = 0;
        definition.stream.lookback = self.lookback;
        let now = self.now.clone();
        Arc::new(Runner {
            requests: Requests::new(&definition, None).unwrap(),
            extractor: Extractor::new(&definition),
            definition,
            ledger: self.ledger.clone(),
            source: Arc::new(FakeSource { random: self.random.clone(), fail_one_in: self.source_fails }),
            publisher: self.kafka.clone(),
            topic: self.topic.clone(),
            metrics: Metrics::new().unwrap(),
            owner: owner.to_owned(),
            lease_ms: 30_000,
            clock: Arc::new(move || now.load(Ordering::SeqCst)),
        })
    }

    fn service(&self, owner: &str) -> Service {
        service(self.runner(owner))
    }

    fn pass(&self, ms: i64) {
        self.now.fetch_add(ms, Ordering::SeqCst);
    }

    /// Checks the guarantee: every interval has succeeded, and all records were delivered with the same ids and times
    /// in each attempt.
    fn check(&self, seed: u64) {
        let runs = self.ledger.all();
        let mut at = runs[0].interval.start_ms;
        let delivered = self.kafka.delivered.lock().unwrap();
        for run in &runs {
            assert_eq!(run.interval.start_ms, at, "seed {seed}: a gap in the ledger");
            assert_eq!((run.state, run.error.as_str()), (RunState::Succeeded, ""), "seed {seed}: {run:?}");
            assert_eq!((run.records, run.acked), (2 * PAGE as i64, 2 * PAGE as i64), "seed {seed}");
            at = run.interval.end_ms;
        }
        assert!(at >= self.now.load(Ordering::SeqCst) - MINUTE, "seed {seed}: the ledger ends early");
        assert_eq!(delivered.len(), runs.len() * 2 * PAGE, "seed {seed}: a record is missing or changed");
    }
}

/// A service for tests that call [`Service::tick`] themselves.
fn service(runner: Arc<Runner>) -> Service {
    Service::new(runner, Health::new(Duration::from_secs(60), &[]), Arc::new(SilentAlarm), Arc::default())
}

/// An alarm that never rings.
struct SilentAlarm;

#[async_trait]
impl Alarm for SilentAlarm {
    fn set(&self, _: i64) {}

    async fn rung(&self) {
        std::future::pending().await
    }
}

fn starts(runs: &[Run]) -> Vec<i64> {
    runs.iter().map(|run| (run.interval.start_ms - T0) / MINUTE).collect()
}

#[tokio::test]
async fn a_first_start_catches_up_and_every_record_is_acknowledged() {
    let world = World::new(1, 0, 0);
    let mut service = world.service("a");
    for _ in 0..5 {
        service.tick().await.unwrap();
        service.wait_for_active().await;
    }
    assert_eq!(starts(&world.ledger.all()), (-10..0).collect::<Vec<_>>());
    world.check(1);
    let times: Vec<i64> = world.kafka.delivered.lock().unwrap().keys().map(|(_, time)| *time).collect();
    assert_eq!(
        times.iter().filter(|t| (T0 - MINUTE..T0).contains(t)).count(),
        2 * PAGE,
        "event times are within their interval"
    );
}

/// Ticks until a planning finds nothing to do, with one restart. Returns the numbers of succeeded and missed intervals.
async fn settle(world: &World) -> (usize, usize) {
    let mut service = world.service("b");
    let mut ticks = 0;
    loop {
        let before = world.ledger.all();
        service.tick().await.unwrap();
        service.wait_for_active().await;
        let runs = world.ledger.all();
        if runs == before {
            for pair in runs.windows(2) {
                assert_eq!(pair[0].interval.end_ms, pair[1].interval.start_ms, "a gap: {pair:?}");
            }
            let missed = |run: &&Run| run.state == RunState::Failed && run.error.starts_with("missed: ");
            let missed = runs.iter().filter(missed).count();
            return (runs.iter().filter(|run| run.state == RunState::Succeeded).count(), missed);
        }
        ticks += 1;
        if ticks == 3 {
            service = world.service("c");
        }
    }
}

const DAY: i64 = 1440 * MINUTE;

fn weekly_and_monthly() -> [Schedule; 2] {
    ["0 0 * * MON", "0 0 1 * *"].map(|cron| Schedule::Cron { expression: cron.to_owned(), zone: Tz::UTC })
}

#[tokio::test]
async fn weekly_and_monthly_schedules_catch_up_to_the_limit() {
    for schedule in weekly_and_monthly() {
        assert_eq!(settle(&World::with_schedule(&schedule)).await, (10, 0), "{schedule:?}");
    }
}

/// Kills the first producer during a run. No producer runs for the next `days`.
async fn check_outage(schedule: Schedule, days: i64, expected: (usize, usize)) {
    let world = World::with_schedule(&schedule);
    assert_eq!(settle(&world).await, (10, 0));
    let interval = Timeline::first(&schedule, None, 0, T0).unwrap().containing(T0);
    world.now.store(interval.end_ms, Ordering::SeqCst);
    world.runner("killed").claim(interval, RunType::Scheduled, None).await.unwrap().unwrap();
    world.pass(days * DAY);
    assert_eq!(settle(&world).await, expected, "{schedule:?}");
}

#[tokio::test]
async fn after_an_outage_of_any_length_each_interval_is_run_or_recorded_as_missed() {
    // Ten intervals before the outage, the killed one and the last ten succeed. The rest is missed, even beyond the
    // look back.
    check_outage(Schedule::Every(MINUTE), 40, (21, 40 * 1440 - 10)).await;
    check_outage(Schedule::Every(60 * MINUTE), 40, (21, 40 * 24 - 10)).await;
    let [weekly, monthly] = weekly_and_monthly();
    check_outage(weekly.clone(), 40, (16, 0)).await;
    check_outage(weekly, 140, (21, 10)).await;
    check_outage(monthly.clone(), 40, (12, 0)).await;
    check_outage(monthly, 365 + 31, (21, 3)).await;
}

#[tokio::test]
async fn a_failed_attempt_is_recorded_and_retried() {
    let world = World::new(3, 1, 0);
    let runner = world.runner("a");
    let interval = Interval { start_ms: T0 - MINUTE, end_ms: T0 };
    let claim = runner.claim(interval, RunType::Scheduled, None).await.unwrap().unwrap();
    assert_eq!(runner.clone().attempt(claim, CancellationToken::new()).await, Ended::Retrying);
    let run = world.ledger.run(interval.start_ms).await.unwrap().unwrap();
    assert_eq!((run.state, run.error.as_str()), (RunState::Retrying, "the source returned 500"));
    assert!(
        (T0 + 500..=T0 + 1000).contains(&run.retry_at_ms),
        "the jittered backoff of one second: {}",
        run.retry_at_ms - T0
    );
    let attempts = world.ledger.attempts(interval.start_ms).await.unwrap();
    assert_eq!((attempts[0].outcome.as_str(), attempts[0].http_status), (OUTCOME_FAILED, Some(500)));
}

#[tokio::test]
async fn an_attempt_that_lost_its_lease_changes_nothing() {
    let world = World::new(5, 0, 0);
    let (first, second) = (world.runner("a"), world.runner("b"));
    let interval = Interval { start_ms: T0 - MINUTE, end_ms: T0 };
    let claim = first.claim(interval, RunType::Scheduled, None).await.unwrap().unwrap();
    assert!(
        second.claim(interval, RunType::Scheduled, None).await.unwrap().is_none(),
        "the interval already has a row"
    );
    world.pass(31_000);
    let seen = world.ledger.run(interval.start_ms).await.unwrap();
    let reclaimed = second.claim(interval, RunType::Scheduled, seen.as_ref()).await.unwrap().unwrap();
    assert_eq!(first.clone().attempt(claim, CancellationToken::new()).await, Ended::Lost);
    assert_eq!(world.ledger.run(interval.start_ms).await.unwrap().unwrap().state, RunState::Running);
    assert_eq!(second.attempt(reclaimed, CancellationToken::new()).await, Ended::Succeeded);
    let outcomes: Vec<String> =
        world.ledger.attempts(interval.start_ms).await.unwrap().into_iter().map(|a| a.outcome).collect();
    assert_eq!(outcomes, [OUTCOME_LOST, OUTCOME_SUCCEEDED]);
    world.check(5);
}

#[tokio::test]
async fn an_interrupted_interval_is_due_immediately() {
    let world = World::new(7, 0, 0);
    let runner = world.runner("a");
    let stop = CancellationToken::new();
    stop.cancel();
    let runner = Arc::into_inner(runner).unwrap();
    let runner = Arc::new(Runner { source: Arc::new(SilentSource), ..runner });
    let interval = Interval { start_ms: T0 - MINUTE, end_ms: T0 };
    let claim = runner.claim(interval, RunType::Scheduled, None).await.unwrap().unwrap();
    assert_eq!(runner.attempt(claim, stop).await, Ended::Interrupted);
    let run = world.ledger.run(interval.start_ms).await.unwrap().unwrap();
    assert_eq!((run.state, run.retry_at_ms), (RunState::Retrying, T0));
}

/// A source that never responds.
struct SilentSource;

#[async_trait]
impl FetchPage for SilentSource {
    async fn fetch(&self, _: &PageRequest) -> Result<Page, AttemptError> {
        std::future::pending().await
    }
}

#[tokio::test(start_paused = true)]
async fn an_attempt_that_exceeds_its_timeout_is_retried() {
    let world = World::new(9, 0, 0);
    let runner = Arc::into_inner(world.runner("a")).unwrap();
    let mut runner = Runner { source: Arc::new(SilentSource), ..runner };
    runner.definition.stream.retry.attempt_timeout_ms = 90_000;
    let runner = Arc::new(runner);
    let interval = Interval { start_ms: T0 - MINUTE, end_ms: T0 };
    let claim = runner.claim(interval, RunType::Scheduled, None).await.unwrap().unwrap();
    let started = tokio::time::Instant::now();
    assert_eq!(runner.attempt(claim, CancellationToken::new()).await, Ended::Retrying);
    assert_eq!(started.elapsed().as_secs(), 90);
    let run = world.ledger.run(interval.start_ms).await.unwrap().unwrap();
    let cause =
        "not done within 90 s: 0 pages, 0 records, 0 acknowledged; raise stream.retry.attempt_timeout";
    assert!(run.error.starts_with(cause), "{run:?}");
    let attempts = world.ledger.attempts(interval.start_ms).await.unwrap();
    assert_eq!(attempts[0].outcome, OUTCOME_FAILED);
    assert!(attempts[0].cause.starts_with(cause), "{attempts:?}");
}

/// A source whose client has a bug.
struct PanickingSource;

#[async_trait]
impl FetchPage for PanickingSource {
    async fn fetch(&self, _: &PageRequest) -> Result<Page, AttemptError> {
        panic!("a bug");
    }
}

#[tokio::test]
async fn an_attempt_that_panics_is_recorded_and_retried() {
    let world = World::new(17, 0, 0);
    let healthy = world.runner("a");
    let broken = Arc::into_inner(world.runner("a")).unwrap();
    let broken = Runner { source: Arc::new(PanickingSource), metrics: healthy.metrics.clone(), ..broken };
    let interval = Interval { start_ms: T0 - MINUTE, end_ms: T0 };
    let claim = healthy.claim(interval, RunType::Scheduled, None).await.unwrap().unwrap();
    assert_eq!(Arc::new(broken).attempt(claim, CancellationToken::new()).await, Ended::Retrying);
    let run = world.ledger.run(interval.start_ms).await.unwrap().unwrap();
    assert_eq!(run.error, "the attempt panicked: a bug");
    let attempts = world.ledger.attempts(interval.start_ms).await.unwrap();
    assert_eq!((attempts[0].outcome.as_str(), &attempts[0].cause), (OUTCOME_FAILED, &run.error));
    let active = healthy.metrics.registry.gather().into_iter().find(|f| f.name() == "ingest_runs_active");
    assert_eq!(active.unwrap().get_metric()[0].get_gauge().get_value(), 0.0);
    let claim = healthy.claim(interval, RunType::Scheduled, Some(&run)).await.unwrap().unwrap();
    assert_eq!(healthy.attempt(claim, CancellationToken::new()).await, Ended::Succeeded);
}

#[tokio::test(start_paused = true)]
async fn a_restarted_run_has_its_full_number_of_attempts_again() {
    let world = World::new(11, 1, 0);
    let mut runner = Arc::into_inner(world.runner("a")).unwrap();
    runner.definition.stream.retry.attempts = Some(2);
    let runner = Arc::new(runner);
    let interval = Interval { start_ms: T0 - MINUTE, end_ms: T0 };
    let mut ends = Vec::new();
    for _ in 0..4 {
        let seen = world.ledger.run(interval.start_ms).await.unwrap();
        let claim = runner.claim(interval, RunType::Backfill, seen.as_ref()).await.unwrap().unwrap();
        ends.push(runner.clone().attempt(claim, CancellationToken::new()).await);
        world.pass(MINUTE);
    }
    assert_eq!(ends, [Ended::Retrying, Ended::Failed, Ended::Retrying, Ended::Failed]);
    let attempts = world.ledger.attempts(interval.start_ms).await.unwrap();
    let outcomes: Vec<(i32, &str)> = attempts.iter().map(|a| (a.number, a.outcome.as_str())).collect();
    let (failed, cleared) = (OUTCOME_FAILED, OUTCOME_CLEARED);
    assert_eq!(outcomes, [(1, failed), (2, failed), (3, cleared), (4, failed), (5, failed)]);
}

/// Two producers whose source, Kafka and ledger fail at random and that are killed at random, by seed.
#[tokio::test(start_paused = true)]
async fn every_interval_is_finished_and_no_record_is_lost_despite_failures() {
    for seed in 0..40 {
        let mut world = World::new(seed, 4, 60);
        let mut services = [Some(world.service("a")), Some(world.service("b"))];
        for _ in 0..60 {
            world.pass(world.random.draw(40_000) as i64);
            let who = world.random.draw(2) as usize;
            match world.random.draw(8) {
                // Killed: its tasks are aborted at any point, and its leases remain.
                0 => drop(services[who].take()),
                1 => world.ledger.fail_next(world.random.draw(6) as u32),
                _ => {}
            }
            let name = ["a", "b"][who];
            let service = services[who].get_or_insert_with(|| world.service(name));
            // An outage of the ledger ends the tick. The next tick continues.
            let _ = service.tick().await;
            for _ in 0..world.random.draw(30) {
                tokio::task::yield_now().await;
            }
        }
        world.ledger.fail_next(0);
        drop(services);
        world.pass(40_000);
        world.source_fails = 0;
        world.kafka.fail_one_in.store(0, Ordering::SeqCst);
        let mut last = world.service("c");
        for _ in 0..200 {
            world.pass(1000);
            last.tick().await.unwrap();
            last.wait_for_active().await;
        }
        world.check(seed);
    }
}
