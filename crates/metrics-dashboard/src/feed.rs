//! The one file that orders effects. Two independent tasks read Cassandra and Kafka once a second, so a server that is
//! down does not delay the reads from the other. The feed combines the latest results, exports them as metrics and
//! sends them to all clients.
//!
//! The figures of a result older than [`STALE_AFTER`] count as unknown.

use crate::cassandra_view::{CassandraView, RunRow};
use crate::error::{Error, Kind};
use crate::kafka_view::KafkaView;
use crate::lag::{LagHistory, LagSample};
use crate::metrics::Metrics;
use crate::overview::{Figure, KafkaFacts, Known, Overview, StoreFacts, assemble};
use crate::reason::{Origin, Reason};
use crate::services::{InstanceStatus, LivenessTracker, holders};
use chrono::Utc;
use common::contracts::stream::Definition;
use common::runtime::admin::Health;
use common::runtime::config::CommonArgs;
use common::runtime::presence::{self, Holdings};
use common::runtime::shutdown::Shutdown;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;
use tokio_util::task::AbortOnDropHandle;

/// Interval between reads, and between overviews sent to clients.
const REFRESH: Duration = Duration::from_secs(1);
/// A result older than this is discarded.
const STALE_AFTER: Duration = Duration::from_secs(5);
/// A new session is opened after this long without a successful read, because the nodes may have new addresses.
const REOPEN_AFTER: Duration = Duration::from_secs(30);

/// The stream that the dashboard shows.
#[derive(Debug, Clone)]
pub struct Stream {
    /// Definition of the stream.
    pub definition: Arc<Definition>,
    /// Name of the events topic.
    pub topic: String,
    /// Settings of the connections.
    pub settings: CommonArgs,
}

/// An overview and its JSON.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// The figures.
    pub overview: Overview,
    /// The overview as JSON, serialized once for all clients.
    pub json: Arc<str>,
}

/// The latest lists of runs and instances.
#[derive(Debug, Clone)]
struct Activity {
    runs: Reading<Vec<RunRow>>,
    services: Reading<Vec<InstanceStatus>>,
}

/// State that the feed writes and the API reads.
pub struct Board {
    snapshot: watch::Sender<Arc<Snapshot>>,
    activity: RwLock<Activity>,
    lag: Mutex<LagHistory>,
    cassandra: RwLock<Option<Arc<CassandraView>>>,
}

impl Board {
    /// Creates a board on which all figures are unknown.
    pub fn new(stream: &str) -> Arc<Board> {
        let overview = assemble(
            stream,
            now_ms(),
            &Known { store: Err(not_read_yet()), kafka: Err(not_read_yet()), holders: Err(not_read_yet()) },
        );
        Arc::new(Board {
            snapshot: watch::Sender::new(Arc::new(snapshot(overview))),
            activity: RwLock::new(Activity { runs: Reading::none(), services: Reading::none() }),
            lag: Mutex::new(LagHistory::default()),
            cassandra: RwLock::new(None),
        })
    }

    /// Subscribes to overviews. The receiver starts with the latest one.
    pub fn watch(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.snapshot.subscribe()
    }

    /// The latest ingest runs, newest first.
    pub fn runs(&self) -> Figure<Vec<RunRow>> {
        self.activity.read().unwrap_or_else(PoisonError::into_inner).runs.fresh(Origin::Cassandra)
    }

    /// The instances of all services.
    pub fn services(&self) -> Figure<Vec<InstanceStatus>> {
        self.activity.read().unwrap_or_else(PoisonError::into_inner).services.fresh(Origin::Cassandra)
    }

    /// The session with Cassandra. `None` if there is no connection.
    pub fn cassandra(&self) -> Option<Arc<CassandraView>> {
        self.cassandra.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Calls `act` with the lag of the last hour.
    pub fn with_lag<T>(&self, act: impl FnOnce(&mut LagHistory) -> T) -> T {
        act(&mut self.lag.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn set_cassandra(&self, view: Option<Arc<CassandraView>>) {
        *self.cassandra.write().unwrap_or_else(PoisonError::into_inner) = view;
    }

    fn with_activity(&self, act: impl FnOnce(&mut Activity)) {
        act(&mut self.activity.write().unwrap_or_else(PoisonError::into_inner));
    }

    fn publish(&self, overview: Overview) {
        let at = now_ms().div_euclid(1000);
        let sample = LagSample { at, messages: overview.lag_messages, seconds: overview.lag_seconds };
        self.with_lag(|lag| lag.push(sample));
        self.snapshot.send_replace(Arc::new(snapshot(overview)));
    }
}

/// The latest result of reading a server.
#[derive(Debug, Clone)]
struct Reading<T> {
    /// When the read finished. `None` before the first read.
    read_at: Option<Instant>,
    facts: Figure<T>,
}

impl<T: Clone> Reading<T> {
    fn none() -> Reading<T> {
        Reading { read_at: None, facts: Err(not_read_yet()) }
    }

    fn now(facts: Figure<T>) -> Reading<T> {
        Reading { read_at: Some(Instant::now()), facts }
    }

    /// The facts, unless they are stale. A reason never becomes stale: it is valid until the next read.
    fn fresh(&self, source: Origin) -> Figure<T> {
        match self.read_at {
            Some(at) if self.facts.is_ok() && at.elapsed() > STALE_AFTER => {
                let message =
                    format!("{} has not answered for over {} s", source.name(), STALE_AFTER.as_secs());
                Err(Reason::new(source, message))
            }
            _ => self.facts.clone(),
        }
    }
}

/// Reads the servers, exports the metrics and publishes an overview once a second until shutdown begins.
pub async fn run(
    stream: &Stream,
    board: &Arc<Board>,
    metrics: &Metrics,
    health: &Arc<Health>,
    shutdown: &Shutdown,
) {
    let (store_readings, store_facts) = watch::channel(Reading::none());
    let (kafka_readings, kafka_facts) = watch::channel(Reading::none());
    let cassandra = CassandraReader {
        stream: stream.clone(),
        board: board.clone(),
        metrics: metrics.clone(),
        health: health.clone(),
        liveness: LivenessTracker::default(),
        services_read_at: None,
    };
    tokio::spawn(cassandra.run(store_readings, shutdown.clone()));
    tokio::spawn(read_kafka(
        stream.clone(),
        store_facts.clone(),
        kafka_readings,
        metrics.clone(),
        shutdown.clone(),
    ));
    let mut ticks = tokio::time::interval(REFRESH);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = shutdown.begun() => break,
            _ = ticks.tick() => {}
        }
        let store = store_facts.borrow().fresh(Origin::Cassandra);
        let kafka = kafka_facts.borrow().fresh(Origin::Kafka);
        let holders = board.services().map(|instances| holders(&instances));
        let known = Known { store, kafka, holders };
        let overview = assemble(&stream.definition.stream.name, now_ms(), &known);
        let states = [(Origin::Cassandra, known.store.map(drop)), (Origin::Kafka, known.kafka.map(drop))];
        for (source, state) in states {
            metrics.source(source, state.is_ok());
            health.set(source.name(), state.map_err(|reason| reason.to_string()));
        }
        metrics.overview(&overview);
        board.publish(overview);
        health.beat();
    }
}

struct CassandraReader {
    stream: Stream,
    board: Arc<Board>,
    metrics: Metrics,
    health: Arc<Health>,
    liveness: LivenessTracker,
    /// When the services were last read. `None` before the first read.
    services_read_at: Option<Instant>,
}

impl CassandraReader {
    async fn run(mut self, readings: watch::Sender<Reading<StoreFacts>>, shutdown: Shutdown) {
        let mut ticks = tokio::time::interval(REFRESH);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut failing_since: Option<Instant> = None;
        let mut announcing: Option<AbortOnDropHandle<()>> = None;
        loop {
            tokio::select! {
                () = shutdown.begun() => break,
                _ = ticks.tick() => {}
            }
            let started = Instant::now();
            let outcome = tokio::select! {
                () = shutdown.begun() => break,
                outcome = self.read(&shutdown) => outcome,
            };
            self.metrics.read(Origin::Cassandra, started.elapsed(), outcome.is_ok());
            failing_since = outcome.is_err().then(|| failing_since.unwrap_or(started));
            if failing_since.is_some_and(|since| since.elapsed() > REOPEN_AFTER) {
                self.board.set_cassandra(None);
                announcing = None;
                failing_since = None;
            }
            if let (None, Some(view)) = (&announcing, self.board.cassandra()) {
                announcing = Some(self.announce(&view, &shutdown));
            }
            if matches!(&outcome, Err(e) if e.kind() == Kind::Fatal) {
                shutdown.begin();
            }
            let facts = outcome.map_err(|e| e.reason());
            if let Err(reason) = &facts {
                self.board.with_activity(|activity| {
                    activity.runs = Reading::now(Err(reason.clone()));
                    activity.services = Reading::now(Err(reason.clone()));
                });
            }
            readings.send_replace(Reading::now(facts));
        }
    }

    /// Starts the heartbeats of this instance over the session. They stop when the handle is dropped.
    fn announce(&self, view: &CassandraView, shutdown: &Shutdown) -> AbortOnDropHandle<()> {
        let stream = &self.stream.definition.stream.name;
        let who = presence::Instance::new(&self.stream.settings, "metrics-dashboard", stream);
        let announcing = presence::announce(
            view.session(),
            who,
            Holdings::default(),
            self.health.clone(),
            shutdown.clone(),
        );
        AbortOnDropHandle::new(tokio::spawn(announcing))
    }

    async fn read(&mut self, shutdown: &Shutdown) -> Result<StoreFacts, Error> {
        let now = now_ms();
        let view = match self.board.cassandra() {
            Some(view) => view,
            None => {
                let opened = CassandraView::open(
                    &self.stream.settings,
                    &self.stream.definition,
                    now.div_euclid(1000),
                    shutdown,
                );
                let view = Arc::new(opened.await?);
                self.board.set_cassandra(Some(view.clone()));
                view
            }
        };
        let facts = view.read(now.div_euclid(1000)).await?;
        let (services, runs) = futures::join!(view.services(), view.runs(now));
        let services = services.map(|(alive, refused)| {
            let since_last = self.services_read_at.map_or(Duration::ZERO, |at| at.elapsed());
            self.services_read_at = Some(Instant::now());
            self.liveness.update(alive, refused, now_ms(), since_last)
        });
        self.board.with_activity(|activity| {
            activity.services = Reading::now(services.map_err(|e| e.reason()));
            activity.runs = Reading::now(runs.map_err(|e| e.reason()));
        });
        Ok(facts)
    }
}

async fn read_kafka(
    stream: Stream,
    progress: watch::Receiver<Reading<StoreFacts>>,
    readings: watch::Sender<Reading<KafkaFacts>>,
    metrics: Metrics,
    shutdown: Shutdown,
) {
    let mut view = None;
    let mut ticks = tokio::time::interval(REFRESH);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !shutdown.has_begun() {
        tokio::select! {
            () = shutdown.begun() => break,
            _ = ticks.tick() => {}
        }
        let next_offsets: Option<BTreeMap<i32, i64>> =
            progress.borrow().fresh(Origin::Cassandra).ok().map(|facts| {
                facts
                    .progress
                    .iter()
                    .map(|(partition, progress)| (*partition, progress.next_offset))
                    .collect()
            });
        let started = Instant::now();
        let (brokers, topic) = (stream.settings.kafka_brokers.clone(), stream.topic.clone());
        let reading = tokio::task::spawn_blocking(move || {
            let mut view = view.map_or_else(|| KafkaView::new(&brokers, &topic), Ok)?;
            let facts = view.read(next_offsets.as_ref());
            Ok::<_, Error>((view, facts))
        });
        let facts = tokio::select! {
            () = shutdown.begun() => break,
            read = reading => match read {
                Ok(Ok((used, facts))) => {
                    view = Some(used);
                    facts.map_err(|e| e.reason())
                }
                Ok(Err(error)) => {
                    view = None;
                    Err(error.reason())
                }
                Err(panicked) => {
                    view = None;
                    Err(Reason::new(Origin::Dashboard, format!("the read from kafka failed: {panicked}")))
                }
            },
        };
        metrics.read(Origin::Kafka, started.elapsed(), facts.is_ok());
        readings.send_replace(Reading::now(facts));
    }
}

fn not_read_yet() -> Reason {
    Reason::new(Origin::Dashboard, "not read yet: the service has just started")
}

fn snapshot(overview: Overview) -> Snapshot {
    // An overview is plain data with string keys, so serialization cannot fail.
    let json = serde_json::to_string(&overview).unwrap_or_default().into();
    Snapshot { overview, json }
}

fn now_ms() -> i64 {
    Utc::now().timestamp_millis()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_facts_of_an_old_reading_are_unknown() {
        let at = Instant::now().checked_sub(STALE_AFTER + Duration::from_secs(1)).unwrap();
        let old = Reading { read_at: Some(at), facts: Ok(1) };
        let silent = Reason::new(Origin::Kafka, "kafka has not answered for over 5 s");
        assert_eq!(old.fresh(Origin::Kafka), Err(silent));
        let down = Err::<i32, _>(Reason::new(Origin::Kafka, "down"));
        assert_eq!(Reading { facts: down.clone(), ..old }.fresh(Origin::Kafka), down);
        assert_eq!(Reading { read_at: Some(Instant::now()), facts: Ok(1) }.fresh(Origin::Kafka), Ok(1));
    }

    #[test]
    fn before_the_first_read_every_figure_is_unknown_with_a_reason() {
        let snapshot = Board::new("s").watch().borrow().clone();
        assert_eq!(snapshot.overview.events_produced, None);
        assert!(snapshot.overview.reasons["events_produced"].message.contains("just started"));
        assert!(snapshot.json.contains("\"rows_written\":null"));
    }
}
