//! Tests of what triggers a planning, in the virtual time of tokio: no alarm, too many alarms, and no alarm at all for
//! what the service must notice itself.

use super::*;
use common::runtime::shutdown::Shutdown;
use tokio::sync::Notify;
use tokio::time::Instant;

/// How late a run may start if only the safety poll finds it, and a little more.
const POLL_MS: i64 = 20_500;

/// Rings `rings` times in short succession at each time that is set.
struct FakeAlarm {
    rings: u64,
    clock: Clock,
    set_ms: AtomicI64,
    notify: Arc<Notify>,
}

#[async_trait]
impl Alarm for FakeAlarm {
    fn set(&self, at_ms: i64) {
        if self.set_ms.swap(at_ms, Ordering::SeqCst) == at_ms {
            return;
        }
        let delay = Duration::from_millis((at_ms - (self.clock)()).max(0).unsigned_abs());
        for ring in 0..self.rings {
            let notify = self.notify.clone();
            tokio::spawn(async move {
                tokio::time::sleep(delay + Duration::from_millis(7 * ring)).await;
                notify.notify_one();
            });
        }
    }

    async fn rung(&self) {
        self.notify.notified().await;
    }
}

/// A running service whose clock is the virtual time of the test.
struct Running {
    world: World,
    runner: Arc<Runner>,
    health: Arc<Health>,
    commands: Arc<Notify>,
    shutdown: Shutdown,
    task: tokio::task::JoinHandle<()>,
}

impl Running {
    fn start(world: World, rings: u64) -> Running {
        let started = Instant::now();
        let clock: Clock = Arc::new(move || T0 + started.elapsed().as_millis() as i64);
        let runner = Arc::into_inner(world.runner("a")).unwrap();
        let runner = Arc::new(Runner { clock: clock.clone(), ..runner });
        let alarm = FakeAlarm { rings, clock, set_ms: AtomicI64::new(0), notify: Arc::default() };
        let (health, commands) = (Health::new(Duration::from_secs(60), &[]), Arc::new(Notify::new()));
        let service = Service::new(runner.clone(), health.clone(), Arc::new(alarm), commands.clone());
        let shutdown = Shutdown::default();
        let stop = shutdown.clone();
        let task = tokio::spawn(async move { service.run(&stop).await.unwrap() });
        Running { world, runner, health, commands, shutdown, task }
    }

    async fn stop(self) -> World {
        self.shutdown.begin();
        self.task.await.unwrap();
        self.world
    }

    /// Number of plannings by trigger.
    fn planned(&self, trigger: &str) -> u64 {
        let families = self.runner.metrics.registry.gather();
        let family = families.iter().find(|family| family.name() == "ingest_plannings_total").unwrap();
        let series = family.get_metric().iter().find(|series| series.get_label()[0].value() == trigger);
        series.unwrap().get_counter().get_value() as u64
    }

    /// The run of the interval that starts so many minutes after [`T0`].
    async fn run_of(&self, minute: i64) -> Option<Run> {
        self.world.ledger.run(T0 + minute * MINUTE).await.unwrap()
    }
}

async fn minutes(count: u64) {
    tokio::time::sleep(Duration::from_secs(60 * count)).await;
}

/// Runs a service for ten minutes. Returns how many milliseconds after its end each interval started.
async fn delays(rings: u64) -> (Vec<i64>, Running) {
    let running = Running::start(World::new(23, 0, 0), rings);
    minutes(10).await;
    tokio::time::sleep(Duration::from_millis(POLL_MS.unsigned_abs())).await;
    let runs = running.world.ledger.all();
    let after_start = runs.iter().filter(|run| run.interval.end_ms > T0);
    let delays: Vec<i64> = after_start.map(|run| run.started_at_ms - run.interval.end_ms).collect();
    assert_eq!(delays.len(), 10, "{runs:?}");
    (delays, running)
}

#[tokio::test(start_paused = true)]
async fn an_alarm_that_never_rings_delays_runs_by_the_safety_poll_and_loses_none() {
    let (delays, running) = delays(0).await;
    assert!(delays.iter().all(|delay| (0..=POLL_MS).contains(delay)), "{delays:?}");
    assert_eq!(running.planned("interval"), 0);
    let world = running.stop().await;
    world.now.store(T0 + 10 * MINUTE, Ordering::SeqCst);
    world.check(23);
}

#[tokio::test(start_paused = true)]
async fn an_alarm_that_rings_repeatedly_runs_nothing_twice() {
    let (delays, running) = delays(3).await;
    assert!(delays.iter().all(|delay| *delay < 10), "{delays:?}");
    assert_eq!(running.planned("interval"), 30, "each ring triggers a planning");
    let world = running.stop().await;
    for run in world.ledger.all() {
        assert_eq!(run.attempt, 1, "{run:?}");
        let attempts = world.ledger.attempts(run.interval.start_ms).await.unwrap();
        assert_eq!(attempts.len(), 1, "{attempts:?}");
    }
    assert!(world.kafka.delivered.lock().unwrap().values().all(|copies| *copies == 1));
    world.now.store(T0 + 10 * MINUTE, Ordering::SeqCst);
    world.check(23);
}

#[tokio::test(start_paused = true)]
async fn an_idle_producer_reads_the_ledger_nine_times_a_minute() {
    let running = Running::start(World::with_schedule(&Schedule::Every(60 * MINUTE)), 1);
    minutes(1).await;
    let before = running.world.ledger.calls();
    minutes(20).await;
    let calls = running.world.ledger.calls() - before;
    // Each planning reads the state of the stream, the runs of its range, and the unresolved runs before that.
    assert!((170..=200).contains(&calls), "{calls} calls in 20 minutes");
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_retry_starts_when_it_is_due() {
    let mut world = World::new(25, 0, 0);
    assert_eq!(settle(&world).await, (10, 0));
    world.source_fails = 1;
    let running = Running::start(world, 1);
    minutes(1).await;
    tokio::time::sleep(Duration::from_secs(8)).await;
    let failing = running.run_of(0).await.unwrap();
    assert!(failing.attempt > 3, "it is retried after up to 1 s, 2 s and 4 s: {failing:?}");
    assert_eq!(running.planned("due"), failing.attempt.unsigned_abs() as u64 - 1, "one for each retry");
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn the_lease_of_a_dead_producer_is_taken_over_when_it_expires() {
    let world = World::new(27, 0, 0);
    let interval = Interval { start_ms: T0 - MINUTE, end_ms: T0 };
    world.runner("dead").claim(interval, RunType::Scheduled, None).await.unwrap().unwrap();
    let running = Running::start(world, 0);
    tokio::time::sleep(Duration::from_millis(29_900)).await;
    assert_eq!(running.run_of(-1).await.unwrap().state, RunState::Running);
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(running.run_of(-1).await.unwrap().state, RunState::Succeeded);
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_command_takes_effect_at_once() {
    let running = Running::start(World::new(29, 0, 0), 1);
    tokio::time::sleep(Duration::from_secs(1)).await;
    running.world.ledger.set_paused(true).await.unwrap();
    minutes(1).await;
    assert_eq!(running.run_of(0).await, None, "paused");
    running.world.ledger.set_paused(false).await.unwrap();
    running.commands.notify_one();
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert_eq!(running.run_of(0).await.unwrap().state, RunState::Succeeded);
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn planning_resumes_soon_after_kafka_and_the_ledger_are_available_again() {
    let running = Running::start(World::new(31, 0, 0), 1);
    running.health.set("kafka", Err("down".to_owned()));
    minutes(1).await;
    assert_eq!(running.world.ledger.all(), []);
    running.health.set("kafka", Ok(()));
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(running.run_of(-1).await.unwrap().state, RunState::Succeeded);
    running.world.ledger.fail_next(60);
    minutes(1).await;
    assert_eq!(running.run_of(0).await.unwrap().state, RunState::Succeeded);
    let recoveries = running.planned("recovery");
    assert!(
        (60..=62).contains(&recoveries),
        "every half second until the ledger has recovered: {recoveries}"
    );
    running.stop().await;
}
