//! Tests of commands on fakes: a log in memory that fails on request, and work that runs until it is stopped or
//! released.

use super::*;
use async_trait::async_trait;
use common::contracts::control::Received;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicI64, AtomicU32, Ordering};
use tokio::sync::Notify;

const NOW: i64 = 1_767_225_600_000;

/// The log in memory, with the same compare-and-set semantics.
#[derive(Default)]
struct MemoryLog {
    rows: Mutex<BTreeMap<(i64, String), Entry>>,
    /// Number of next calls that fail.
    outage: AtomicU32,
}

impl MemoryLog {
    fn call(&self) -> Result<(), LedgerError> {
        let left = self.outage.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        left.map_or(Ok(()), |_| Err(LedgerError::Unavailable("outage".to_owned())))
    }

    fn row(&self, key: &LogKey) -> Entry {
        self.rows.lock().unwrap()[&(key.issued_at_ms, key.id.clone())].clone()
    }
}

#[async_trait]
impl ControlLog for MemoryLog {
    async fn insert(&self, entry: &Entry) -> Result<Option<Entry>, LedgerError> {
        self.call()?;
        let mut rows = self.rows.lock().unwrap();
        let key = (entry.key.issued_at_ms, entry.key.id.clone());
        let found = rows.get(&key).cloned();
        rows.entry(key).or_insert_with(|| entry.clone());
        Ok(found)
    }

    async fn get(&self, key: &LogKey) -> Result<Option<Entry>, LedgerError> {
        self.call()?;
        Ok(self.rows.lock().unwrap().get(&(key.issued_at_ms, key.id.clone())).cloned())
    }

    async fn renew(&self, key: &LogKey, owner: &str, now_ms: i64) -> Result<bool, LedgerError> {
        self.call()?;
        let mut rows = self.rows.lock().unwrap();
        let row = rows.get_mut(&(key.issued_at_ms, key.id.clone())).unwrap();
        let own = row.state == CommandState::Running && row.handled_by == owner;
        if own {
            row.handled_at_ms = now_ms;
        }
        Ok(own)
    }

    async fn change(&self, key: &LogKey, change: &log::Change<'_>) -> Result<bool, LedgerError> {
        self.call()?;
        let mut rows = self.rows.lock().unwrap();
        let row = rows.get_mut(&(key.issued_at_ms, key.id.clone())).unwrap();
        let matches = row.state == change.from && row.handled_by == change.owner;
        if matches {
            row.state = change.to;
            row.outcome = change.outcome.to_owned();
            row.handled_at_ms = change.now_ms;
        }
        Ok(matches)
    }

    async fn of_day(&self, _: i64, _: u32) -> Result<Vec<Entry>, LedgerError> {
        Ok(self.rows.lock().unwrap().values().cloned().collect())
    }
}

/// Counts started actions. Loads run until they are stopped or released.
#[derive(Default)]
struct FakeWork {
    started: AtomicU32,
    paused: AtomicU32,
    release: Notify,
}

#[async_trait]
impl Work for FakeWork {
    async fn carry_out(&self, action: &Action, stop: &Shutdown) -> Result<String, String> {
        self.started.fetch_add(1, Ordering::SeqCst);
        match action {
            Action::Pause => self.paused.store(1, Ordering::SeqCst),
            Action::Resume => self.paused.store(0, Ordering::SeqCst),
            Action::Clear { .. } => return Err("the ledger rejected a request".to_owned()),
            _ => tokio::select! {
                () = stop.begun() => return Ok("12 messages before the stop".to_owned()),
                () = self.release.notified() => {}
            },
        }
        Ok("did it".to_owned())
    }
}

struct World {
    log: Arc<MemoryLog>,
    work: Arc<FakeWork>,
    now: Arc<AtomicI64>,
}

impl World {
    fn new() -> World {
        World { log: Arc::default(), work: Arc::default(), now: Arc::new(AtomicI64::new(NOW)) }
    }

    fn producer(&self, owner: &str) -> Control {
        let now = self.now.clone();
        Control::new(CommandContext {
            stream: "users".to_owned(),
            owner: owner.to_owned(),
            log: self.log.clone(),
            work: self.work.clone(),
            clock: Arc::new(move || now.load(Ordering::SeqCst)),
            metrics: Metrics::new().unwrap(),
        })
    }

    fn started_count(&self) -> u32 {
        self.work.started.load(Ordering::SeqCst)
    }

    /// Lets tasks run and checks the total number of started commands.
    async fn expect_started(&self, count: u32) {
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert_eq!(self.started_count(), count);
    }

    /// Lets tasks run until the command is in `state`, and returns its outcome.
    async fn outcome(&self, command: &Received, state: CommandState) -> String {
        for _ in 0..200 {
            let row = self.log.row(&command.key);
            if row.state == state {
                return row.outcome;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("not {state:?}: {:?}", self.log.row(&command.key));
    }
}

fn sent(action: Action) -> Received {
    received(&Command::new("users", "test", NOW, 60_000, action))
}

fn received(command: &Command) -> Received {
    common::contracts::control::read(&serde_json::to_vec(command).unwrap(), 0, NOW)
}

fn spike() -> Received {
    sent(Action::Spike { rate: 100, seconds: 10 })
}

#[tokio::test(start_paused = true)]
async fn a_command_runs_once_however_often_it_is_read() {
    let world = World::new();
    let (mut first, pause, spike) = (world.producer("a/1"), sent(Action::Pause), spike());
    for _ in 0..3 {
        first.handle(&pause).await.unwrap();
        first.handle(&spike).await.unwrap();
    }
    world.work.release.notify_one();
    assert_eq!(world.outcome(&spike, CommandState::Done).await, "did it");
    assert_eq!(world.outcome(&pause, CommandState::Done).await, "did it");
    // The restarted producer reads the topic again.
    let mut second = world.producer("a/2");
    second.handle(&pause).await.unwrap();
    second.handle(&spike).await.unwrap();
    assert_eq!(world.started_count(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_command_of_a_killed_producer_is_interrupted_and_never_restarted() {
    let world = World::new();
    let (mut first, spike) = (world.producer("a/1"), spike());
    first.handle(&spike).await.unwrap();
    world.expect_started(1).await;
    // Killed: the row stays `running`.
    first.jobs.iter().for_each(|job| job.task.abort());
    drop(first);
    let mut second = world.producer("a/2");
    second.handle(&spike).await.unwrap();
    let another = self::spike();
    second.handle(&another).await.unwrap();
    assert!(world.outcome(&another, CommandState::Refused).await.contains("of the same kind is running"));
    second.interrupt_orphaned().await;
    assert_eq!(world.log.row(&spike.key).state, CommandState::Running, "its producer may still be alive");
    world.now.fetch_add(SILENCE_MS, Ordering::SeqCst);
    second.interrupt_orphaned().await;
    assert_eq!(
        world.outcome(&spike, CommandState::Interrupted).await,
        "its producer a/1 stopped before the command ended"
    );
    let third = self::spike();
    second.handle(&third).await.unwrap();
    world.expect_started(2).await;
}

#[tokio::test(start_paused = true)]
async fn one_load_runs_at_a_time_and_can_be_cancelled() {
    let world = World::new();
    let mut control = world.producer("a/1");
    let (first, second, produce) = (spike(), spike(), sent(Action::Produce { messages: 5 }));
    control.handle(&first).await.unwrap();
    for refused in [&second, &produce] {
        control.handle(refused).await.unwrap();
        assert!(world.outcome(refused, CommandState::Refused).await.contains(&first.key.id));
    }
    let unrelated = sent(Action::Cancel { id: Some(second.key.id.clone()) });
    control.handle(&unrelated).await.unwrap();
    assert!(world.outcome(&unrelated, CommandState::Failed).await.ends_with("is not running"));
    let cancel = sent(Action::Cancel { id: Some(first.key.id.clone()) });
    control.handle(&cancel).await.unwrap();
    assert_eq!(world.outcome(&cancel, CommandState::Done).await, "1 command cancelled");
    tokio::time::sleep(RENEW).await;
    assert_eq!(world.outcome(&first, CommandState::Cancelled).await, "12 messages before the stop");
    let next = spike();
    control.interrupt_orphaned().await;
    control.handle(&next).await.unwrap();
    world.expect_started(2).await;
}

#[tokio::test(start_paused = true)]
async fn an_invalid_command_is_refused_with_a_reason_and_blocks_no_other() {
    let world = World::new();
    let mut control = world.producer("a/1");
    let garbage = common::contracts::control::read(b"\xff{", 3, NOW);
    let expired = received(&Command::new("users", "test", NOW - 10_000, 5_000, Action::Pause));
    let too_much = sent(Action::Spike { rate: u64::MAX, seconds: 1 });
    let elsewhere = received(&Command::new("orders", "test", NOW, 60_000, Action::Pause));
    let broken = sent(Action::Clear { from_ms: 0, to_ms: 5, state: None });
    let good = sent(Action::Pause);
    let again = Command { issued_at_ms: NOW + 1, id: good.key.id.clone(), ..good.command.clone().unwrap() };
    let again = received(&again);
    for each in [&garbage, &expired, &too_much, &elsewhere, &broken, &good, &again] {
        control.handle(each).await.unwrap();
    }
    assert!(world.outcome(&garbage, CommandState::Refused).await.starts_with("not valid JSON"));
    assert!(world.outcome(&expired, CommandState::Refused).await.starts_with("expired 5000 ms"));
    assert!(world.outcome(&too_much, CommandState::Refused).await.contains("from 1 to 100000"));
    assert_eq!(world.outcome(&broken, CommandState::Failed).await, "the ledger rejected a request");
    assert_eq!(world.outcome(&good, CommandState::Done).await, "did it");
    assert_eq!(
        world.outcome(&again, CommandState::Refused).await,
        "its id was already used by another command"
    );
    assert_eq!(world.log.rows.lock().unwrap().len(), 6, "the command of the other stream is ignored");
    assert_eq!(world.started_count(), 2);
}

#[tokio::test(start_paused = true)]
async fn an_outage_of_the_log_delays_commands_and_repeats_none() {
    let world = World::new();
    let mut control = world.producer("a/1");
    let pause = sent(Action::Pause);
    for calls in 0..6 {
        world.log.outage.store(calls, Ordering::SeqCst);
        let command = sent(Action::Resume);
        while control.handle(&command).await.is_err() {}
        assert_eq!(world.outcome(&command, CommandState::Done).await, "did it");
    }
    // The row was inserted, but the response was lost: the same process tries again.
    let entry = Entry {
        key: pause.key.clone(),
        command: "pause".to_owned(),
        arguments: String::new(),
        state: CommandState::Running,
        outcome: String::new(),
        handled_by: "a/1".to_owned(),
        handled_at_ms: NOW,
    };
    world.log.insert(&entry).await.unwrap();
    control.handle(&pause).await.unwrap();
    assert_eq!(world.outcome(&pause, CommandState::Done).await, "did it");
    assert_eq!(world.started_count(), 7);
}

#[tokio::test(start_paused = true)]
async fn a_stopped_producer_records_what_it_interrupts() {
    let world = World::new();
    let mut control = world.producer("a/1");
    let spike = spike();
    control.handle(&spike).await.unwrap();
    control.stop().await;
    assert_eq!(
        world.outcome(&spike, CommandState::Interrupted).await,
        "the producer was stopped: 12 messages before the stop"
    );
}
