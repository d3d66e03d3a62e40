//! How long the pipeline needs until it goes on after each fault. [`Clock`] is the bookkeeping and knows no server; the task
//! of [`watch`] looks at Cassandra, Kafka and the producer.
//!
//! A fault ends when a killed service is dead, a killed server answers again, or a paused process runs again. From
//! then on the pipeline is on its own. It has gone on once every partition has processed a record that came after the
//! end of the fault; after a fault of the source or the producer, once every interval that had ended by then is settled.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::oracle::{ends, positions};
use super::plan::Fault;
use crate::config::{Settings, loopback};
use crate::error::Result;
use crate::servers::cassandra::connect;
use crate::servers::metric;

/// How often the task looks, which is also how exact the times are.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// How long Kafka may take to tell the end of a partition: the next look asks again.
const END_WITHIN: Duration = Duration::from_secs(1);

/// Until when intervals are settled, and how long one is; both of the producer, in seconds.
const SETTLED: &str = "ingest_settled_timestamp_seconds";
const INTERVAL: &str = "ingest_interval_seconds";

/// Number of a fault within a run.
pub(super) type FaultId = u64;

/// What must come to pass until the pipeline has gone on.
#[derive(Clone, Debug, PartialEq)]
enum Goal {
    /// A record beyond each of these offsets, by partition; none: Kafka has not told them yet.
    Offsets(Option<Vec<i64>>),
    /// Every interval that ended before this Unix time, in seconds, is settled.
    Settled(f64),
}

/// What faults wait for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Wants {
    ends: bool,
    offsets: bool,
    settled: bool,
}

/// A fault that the pipeline has not recovered from yet.
#[derive(Clone, Debug)]
struct Open {
    fault: Fault,
    /// When it ended, from the begin of the run.
    ended: Option<Duration>,
    goal: Goal,
    /// No other fault was open meanwhile.
    alone: bool,
}

/// Times of recovery, in the order in which they came.
#[derive(Clone, Debug, Default, PartialEq)]
struct Times {
    alone: Vec<Duration>,
    overlapped: Vec<Duration>,
}

/// The faults of a run and what became of them.
#[derive(Debug, Default)]
pub(super) struct Clock {
    next: FaultId,
    open: BTreeMap<FaultId, Open>,
    times: BTreeMap<String, Times>,
}

/// Recoveries in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Recoveries {
    /// How many.
    pub count: usize,
    /// The one in the middle; of an even number the longer of the two.
    pub median_seconds: f64,
    /// The longest.
    pub worst_seconds: f64,
}

impl Recoveries {
    fn of(times: &[Duration]) -> Self {
        let mut seconds: Vec<f64> = times.iter().map(Duration::as_secs_f64).collect();
        seconds.sort_by(f64::total_cmp);
        Self {
            count: seconds.len(),
            median_seconds: seconds.get(seconds.len() / 2).copied().unwrap_or_default(),
            worst_seconds: seconds.last().copied().unwrap_or_default(),
        }
    }
}

/// One kind of fault in the report.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Line {
    /// Which.
    pub fault: String,
    /// Recoveries while nothing else was wrong.
    pub alone: Recoveries,
    /// Recoveries while the system also recovered from other faults.
    pub overlapped: Recoveries,
    /// Faults that the pipeline never recovered from.
    pub unrecovered: usize,
}

impl Clock {
    /// A fault begins.
    pub(super) fn begin(&mut self, fault: Fault) -> FaultId {
        let alone = self.open.is_empty();
        for open in self.open.values_mut() {
            open.alone = false;
        }
        self.next += 1;
        self.open.insert(self.next, Open { fault, ended: None, goal: Goal::Offsets(None), alone });
        self.next
    }

    /// A fault is over, at `at` in the run and `unix_seconds` by the clock; from now on the pipeline is on its own.
    fn end(&mut self, id: FaultId, at: Duration, unix_seconds: f64) {
        if let Some(open) = self.open.get_mut(&id) {
            open.ended = Some(at);
            if open.fault.delays_intervals() {
                open.goal = Goal::Settled(unix_seconds);
            }
        }
    }

    /// Whether the pipeline has recovered from everything so far.
    pub(super) fn all_recovered(&self) -> bool {
        self.open.is_empty()
    }

    /// Faults that the pipeline has not recovered from.
    pub(super) fn waits_for(&self) -> Vec<String> {
        self.open.values().map(|open| open.fault.name()).collect()
    }

    /// Every kind of fault there was, by name.
    pub(super) fn lines(&self) -> Vec<Line> {
        let mut times = self.times.clone();
        for open in self.open.values() {
            times.entry(open.fault.name()).or_default();
        }
        let unrecovered = |name: &str| self.open.values().filter(|open| open.fault.name() == name).count();
        let line = |(fault, times): (String, Times)| Line {
            unrecovered: unrecovered(&fault),
            alone: Recoveries::of(&times.alone),
            overlapped: Recoveries::of(&times.overlapped),
            fault,
        };
        times.into_iter().map(line).collect()
    }

    /// What the next look must find out.
    fn wants(&self) -> Wants {
        let any =
            |is: fn(&Goal) -> bool| self.open.values().any(|open| open.ended.is_some() && is(&open.goal));
        Wants {
            ends: any(|goal| *goal == Goal::Offsets(None)),
            offsets: any(|goal| matches!(goal, Goal::Offsets(_))),
            settled: any(|goal| matches!(goal, Goal::Settled(_))),
        }
    }

    /// Kafka has told the ends of the log, for faults that had ended before `asked`.
    fn log_ends(&mut self, ends: &[i64], asked: Duration) {
        for open in self.open.values_mut() {
            let waits = open.goal == Goal::Offsets(None) && open.ended.is_some_and(|ended| ended <= asked);
            if waits {
                open.goal = Goal::Offsets(Some(ends.to_vec()));
            }
        }
    }

    /// Takes what a look has found: the next offset of each partition, and until when intervals are settled, in Unix seconds.
    fn look(&mut self, offsets: Option<&[i64]>, settled: Option<f64>, at: Duration) {
        let reached = |open: &Open| match (&open.goal, offsets, settled) {
            (Goal::Offsets(Some(ends)), Some(offsets), _) => {
                ends.iter().zip(offsets).all(|(end, next)| next > end)
            }
            (Goal::Settled(until), _, Some(settled)) => settled >= *until,
            _ => false,
        };
        let recovered: Vec<FaultId> =
            self.open.iter().filter(|(_, open)| reached(open)).map(|(id, _)| *id).collect();
        for id in recovered {
            let Some(Open { fault, ended: Some(ended), alone, .. }) = self.open.remove(&id) else { continue };
            let times = self.times.entry(fault.name()).or_default();
            let into = if alone { &mut times.alone } else { &mut times.overlapped };
            into.push(at.saturating_sub(ended));
        }
    }
}

/// The clock as the fleet, the transactions and the task share it.
#[derive(Clone, Debug)]
pub(super) struct SharedClock {
    clock: Arc<Mutex<Clock>>,
    begun: Instant,
}

impl SharedClock {
    /// A clock of a run that begins now.
    pub(super) fn new() -> Self {
        Self { clock: Arc::default(), begun: Instant::now() }
    }

    /// The bookkeeping.
    pub(super) fn lock(&self) -> MutexGuard<'_, Clock> {
        self.clock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A fault ends now.
    pub(super) fn end(&self, id: FaultId) {
        let unix_seconds = chrono::Utc::now().timestamp_millis() as f64 / 1000.0;
        self.lock().end(id, self.begun.elapsed(), unix_seconds);
    }
}

/// Watches the pipeline until `stop`.
pub(super) async fn watch(
    settings: &Settings,
    clock: SharedClock,
    partitions: i32,
    stop: CancellationToken,
) -> Result<JoinHandle<()>> {
    let (session, settings) = (connect(settings).await?, settings.clone());
    let producer = format!("http://{}", loopback(settings.ports.producer));
    Ok(tokio::spawn(async move {
        let mut ticks = tokio::time::interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = stop.cancelled() => return,
            }
            let asked = clock.begun.elapsed();
            let wants = clock.lock().wants();
            if wants.ends
                && let Ok(ends) = ends(&settings, partitions, END_WITHIN).await
            {
                clock.lock().log_ends(&ends, asked);
            }
            let offsets = if wants.offsets { positions(&session, partitions).await.ok() } else { None };
            let settled = if wants.settled { settled_until(&producer).await } else { None };
            clock.lock().look(offsets.as_deref(), settled, clock.begun.elapsed());
        }
    }))
}

/// Until when the producer has settled every interval that has ended, in Unix seconds.
async fn settled_until(producer: &str) -> Option<f64> {
    // The interval that is going on has not ended, however long ago it began.
    Some(metric(producer, SETTLED).await? + metric(producer, INTERVAL).await?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::soak::plan::Part;

    const KILL: Fault = Fault::Kill(Part::Processor(0));
    const PAUSE: Fault = Fault::Pause(Part::Kafka, Duration::from_secs(3));
    const OUTAGE: Fault = Fault::Outage(Duration::from_secs(3));

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn figures(clock: &Clock, fault: Fault) -> (Recoveries, Recoveries, usize) {
        let line = clock.lines().into_iter().find(|line| line.fault == fault.name()).unwrap();
        (line.alone, line.overlapped, line.unrecovered)
    }

    fn recoveries(count: usize, median_seconds: f64, worst_seconds: f64) -> Recoveries {
        Recoveries { count, median_seconds, worst_seconds }
    }

    #[test]
    fn the_pipeline_has_gone_on_once_every_partition_has_passed_the_end_its_log_had() {
        let mut clock = Clock::default();
        let id = clock.begin(KILL);
        clock.look(Some(&[9, 9]), None, seconds(1));
        clock.end(id, seconds(2), 0.0);
        assert_eq!(clock.wants(), Wants { ends: true, offsets: true, settled: false });
        // Asked before the fault ended: these ends may be older.
        clock.log_ends(&[4, 4], seconds(1));
        clock.log_ends(&[5, 7], seconds(3));
        for (at, offsets) in [(4, [5, 8]), (5, [6, 7]), (6, [7, 7])] {
            clock.look(Some(&offsets), None, seconds(at));
            assert!(!clock.all_recovered(), "{offsets:?}");
        }
        clock.look(None, None, seconds(7));
        clock.look(Some(&[6, 8]), None, seconds(8));
        assert!(clock.all_recovered());
        assert_eq!(figures(&clock, KILL), (recoveries(1, 6.0, 6.0), Recoveries::default(), 0));
    }

    #[test]
    fn a_source_that_came_back_is_recovered_from_once_its_intervals_are_settled() {
        let mut clock = Clock::default();
        let id = clock.begin(OUTAGE);
        clock.end(id, seconds(1), 1000.0);
        assert_eq!(clock.wants(), Wants { ends: false, offsets: false, settled: true });
        clock.look(Some(&[1]), Some(999.9), seconds(2));
        assert!(!clock.all_recovered());
        clock.look(None, Some(1000.0), seconds(5));
        assert_eq!(figures(&clock, OUTAGE).0, recoveries(1, 4.0, 4.0));
    }

    #[test]
    fn faults_that_meet_are_measured_apart() {
        let mut clock = Clock::default();
        let pause = clock.begin(PAUSE);
        let kill = clock.begin(KILL);
        for id in [kill, pause] {
            clock.end(id, seconds(id), 0.0);
        }
        clock.log_ends(&[0], seconds(3));
        clock.look(Some(&[1]), None, seconds(4));
        let id = clock.begin(KILL);
        clock.end(id, seconds(10), 0.0);
        assert_eq!(figures(&clock, KILL), (Recoveries::default(), recoveries(1, 2.0, 2.0), 1));
        assert_eq!(figures(&clock, PAUSE), (Recoveries::default(), recoveries(1, 3.0, 3.0), 0));
        assert_eq!(clock.waits_for(), [KILL.name()]);
        clock.log_ends(&[1], seconds(10));
        clock.look(Some(&[2]), None, seconds(11));
        assert_eq!(figures(&clock, KILL), (recoveries(1, 1.0, 1.0), recoveries(1, 2.0, 2.0), 0));
    }

    #[test]
    fn the_median_is_the_one_in_the_middle() {
        let check = |times: &[u64], expected| {
            let times: Vec<Duration> = times.iter().copied().map(seconds).collect();
            assert_eq!(Recoveries::of(&times), expected);
        };
        check(&[], recoveries(0, 0.0, 0.0));
        check(&[5], recoveries(1, 5.0, 5.0));
        check(&[9, 1, 2], recoveries(3, 2.0, 9.0));
        check(&[4, 3, 1, 2], recoveries(4, 3.0, 4.0));
    }
}
