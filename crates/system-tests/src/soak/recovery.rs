//! Measures how long the pipeline takes to recover from each fault. [`Clock`] keeps the records without any I/O. The
//! task started by [`watch`] polls Cassandra, Kafka and the producer.
//!
//! A fault ends when a killed service is dead, a killed server is ready again, or a paused process has been resumed.
//! From then on, the pipeline has to recover without help. It has recovered once every partition has processed a record
//! that was written after the end of the fault. After a fault of the source or the producer, it has recovered once
//! every interval that had ended by then is settled.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use local_stack::config::{Settings, loopback};
use local_stack::error::Result;
use local_stack::servers::cassandra::connect;
use local_stack::servers::metric;
use serde::Serialize;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::oracle::{end_offsets, next_offsets};
use super::plan::Fault;

/// Poll interval of the task, which is also the precision of the recovery times.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// Time limit for a request for end offsets. A failed request is repeated at the next poll.
const END_TIMEOUT: Duration = Duration::from_secs(1);

/// Metric of the producer: the time until which intervals are settled, in Unix seconds.
const SETTLED: &str = "ingest_settled_timestamp_seconds";
/// Metric of the producer: the length of an interval in seconds.
const INTERVAL: &str = "ingest_interval_seconds";

/// Number of a fault within a run.
pub(super) type FaultId = u64;

/// Condition for the recovery from a fault.
#[derive(Clone, Debug, PartialEq)]
enum Goal {
    /// Every partition has processed a record at or after its offset in this list. `None` until the end offsets are
    /// known.
    Offsets(Option<Vec<i64>>),
    /// Every interval that ended before this time, in Unix seconds, is settled.
    Settled(f64),
}

/// Values that the next poll must read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Needs {
    end_offsets: bool,
    offsets: bool,
    settled: bool,
}

/// A fault from which the pipeline has not recovered yet.
#[derive(Clone, Debug)]
struct Open {
    fault: Fault,
    /// When the fault ended, as time since the start of the run; `None` until then.
    ended: Option<Duration>,
    goal: Goal,
    /// Whether no other fault has been open at the same time.
    alone: bool,
}

/// Recovery times in the order of measurement.
#[derive(Clone, Debug, Default, PartialEq)]
struct Times {
    alone: Vec<Duration>,
    overlapped: Vec<Duration>,
}

/// Tracks the faults of a run and their recovery times.
#[derive(Debug, Default)]
pub(super) struct Clock {
    next: FaultId,
    open: BTreeMap<FaultId, Open>,
    times: BTreeMap<String, Times>,
}

/// Statistics of recovery times.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Recoveries {
    /// Number of recoveries.
    pub count: usize,
    /// Median in seconds; for an even number of recoveries, the higher of the two middle values.
    pub median_seconds: f64,
    /// Longest recovery time in seconds.
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

/// Recovery times of one kind of fault, as shown in the report.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Line {
    /// Name of the fault.
    pub fault: String,
    /// Recoveries that did not overlap with another fault.
    pub alone: Recoveries,
    /// Recoveries that overlapped with other faults.
    pub overlapped: Recoveries,
    /// Number of faults from which the pipeline never recovered.
    pub unrecovered: usize,
}

impl Clock {
    /// Records the start of a fault and returns its id.
    pub(super) fn start(&mut self, fault: Fault) -> FaultId {
        let alone = self.open.is_empty();
        for open in self.open.values_mut() {
            open.alone = false;
        }
        self.next += 1;
        self.open.insert(self.next, Open { fault, ended: None, goal: Goal::Offsets(None), alone });
        self.next
    }

    /// Records the end of a fault. `at` is the time since the start of the run, `unix_seconds` the wall-clock time.
    fn end(&mut self, id: FaultId, at: Duration, unix_seconds: f64) {
        if let Some(open) = self.open.get_mut(&id) {
            open.ended = Some(at);
            if open.fault.delays_intervals() {
                open.goal = Goal::Settled(unix_seconds);
            }
        }
    }

    /// Returns whether the pipeline has recovered from all faults so far.
    pub(super) fn all_recovered(&self) -> bool {
        self.open.is_empty()
    }

    /// Returns the names of the faults from which the pipeline has not recovered.
    pub(super) fn unrecovered_faults(&self) -> Vec<String> {
        self.open.values().map(|open| open.fault.name()).collect()
    }

    /// Returns the recovery times of every kind of fault, sorted by name.
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

    /// Returns which values the next poll must read.
    fn needs(&self) -> Needs {
        let any =
            |is: fn(&Goal) -> bool| self.open.values().any(|open| open.ended.is_some() && is(&open.goal));
        Needs {
            end_offsets: any(|goal| *goal == Goal::Offsets(None)),
            offsets: any(|goal| matches!(goal, Goal::Offsets(_))),
            settled: any(|goal| matches!(goal, Goal::Settled(_))),
        }
    }

    /// Sets the end offsets as the goal of every fault that had ended when they were requested at `requested_at`.
    fn set_end_offsets(&mut self, end_offsets: &[i64], requested_at: Duration) {
        for open in self.open.values_mut() {
            let waits =
                open.goal == Goal::Offsets(None) && open.ended.is_some_and(|ended| ended <= requested_at);
            if waits {
                open.goal = Goal::Offsets(Some(end_offsets.to_vec()));
            }
        }
    }

    /// Takes the values of a poll: the next offset of each partition, and the time until which intervals are settled,
    /// in Unix seconds. `None` means that a value was not read.
    fn observe(&mut self, offsets: Option<&[i64]>, settled: Option<f64>, at: Duration) {
        let reached = |open: &Open| match (&open.goal, offsets, settled) {
            (Goal::Offsets(Some(end_offsets)), Some(offsets), _) => {
                end_offsets.iter().zip(offsets).all(|(end, next)| next > end)
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

/// A clock that is shared by the fleet, the transactions and the polling task.
#[derive(Clone, Debug)]
pub(super) struct SharedClock {
    clock: Arc<Mutex<Clock>>,
    started: Instant,
}

impl SharedClock {
    /// Creates the clock of a run that starts now.
    pub(super) fn new() -> Self {
        Self { clock: Arc::default(), started: Instant::now() }
    }

    /// Locks the clock.
    pub(super) fn lock(&self) -> MutexGuard<'_, Clock> {
        self.clock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records that a fault ends now.
    pub(super) fn end(&self, id: FaultId) {
        let unix_seconds = chrono::Utc::now().timestamp_millis() as f64 / 1000.0;
        self.lock().end(id, self.started.elapsed(), unix_seconds);
    }
}

/// Starts a task that polls the pipeline and updates the clock until `stop` is cancelled.
pub(super) async fn watch(
    settings: &Settings,
    clock: SharedClock,
    partitions: i32,
    stop: CancellationToken,
) -> Result<JoinHandle<()>> {
    let (session, settings) = (connect(settings).await?, settings.clone());
    let producer = format!("http://{}", loopback(settings.ports.producer));
    Ok(tokio::spawn(async move {
        let mut ticks = tokio::time::interval(POLL_INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = stop.cancelled() => return,
            }
            let requested_at = clock.started.elapsed();
            let needs = clock.lock().needs();
            if needs.end_offsets
                && let Ok(end_offsets) = end_offsets(&settings, partitions, END_TIMEOUT).await
            {
                clock.lock().set_end_offsets(&end_offsets, requested_at);
            }
            let offsets = if needs.offsets { next_offsets(&session, partitions).await.ok() } else { None };
            let settled = if needs.settled { settled_until(&producer).await } else { None };
            clock.lock().observe(offsets.as_deref(), settled, clock.started.elapsed());
        }
    }))
}

/// Returns the time until which the producer has settled every ended interval, in Unix seconds.
async fn settled_until(producer: &str) -> Option<f64> {
    // The first unsettled interval starts at the settled time and ends one interval later, so every interval that ended
    // before that is settled.
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
    fn the_pipeline_has_recovered_once_every_partition_has_passed_its_end_offset() {
        let mut clock = Clock::default();
        let id = clock.start(KILL);
        clock.observe(Some(&[9, 9]), None, seconds(1));
        clock.end(id, seconds(2), 0.0);
        assert_eq!(clock.needs(), Needs { end_offsets: true, offsets: true, settled: false });
        // Requested before the fault ended, so these end offsets may be too low.
        clock.set_end_offsets(&[4, 4], seconds(1));
        clock.set_end_offsets(&[5, 7], seconds(3));
        for (at, offsets) in [(4, [5, 8]), (5, [6, 7]), (6, [7, 7])] {
            clock.observe(Some(&offsets), None, seconds(at));
            assert!(!clock.all_recovered(), "{offsets:?}");
        }
        clock.observe(None, None, seconds(7));
        clock.observe(Some(&[6, 8]), None, seconds(8));
        assert!(clock.all_recovered());
        assert_eq!(figures(&clock, KILL), (recoveries(1, 6.0, 6.0), Recoveries::default(), 0));
    }

    #[test]
    fn an_outage_of_the_source_is_over_once_its_intervals_are_settled() {
        let mut clock = Clock::default();
        let id = clock.start(OUTAGE);
        clock.end(id, seconds(1), 1000.0);
        assert_eq!(clock.needs(), Needs { end_offsets: false, offsets: false, settled: true });
        clock.observe(Some(&[1]), Some(999.9), seconds(2));
        assert!(!clock.all_recovered());
        clock.observe(None, Some(1000.0), seconds(5));
        assert_eq!(figures(&clock, OUTAGE).0, recoveries(1, 4.0, 4.0));
    }

    #[test]
    fn overlapping_faults_are_reported_separately() {
        let mut clock = Clock::default();
        let pause = clock.start(PAUSE);
        let kill = clock.start(KILL);
        for id in [kill, pause] {
            clock.end(id, seconds(id), 0.0);
        }
        clock.set_end_offsets(&[0], seconds(3));
        clock.observe(Some(&[1]), None, seconds(4));
        let id = clock.start(KILL);
        clock.end(id, seconds(10), 0.0);
        assert_eq!(figures(&clock, KILL), (Recoveries::default(), recoveries(1, 2.0, 2.0), 1));
        assert_eq!(figures(&clock, PAUSE), (Recoveries::default(), recoveries(1, 3.0, 3.0), 0));
        assert_eq!(clock.unrecovered_faults(), [KILL.name()]);
        clock.set_end_offsets(&[1], seconds(10));
        clock.observe(Some(&[2]), None, seconds(11));
        assert_eq!(figures(&clock, KILL), (recoveries(1, 1.0, 1.0), recoveries(1, 2.0, 2.0), 0));
    }

    #[test]
    fn the_median_is_the_higher_of_two_middle_values() {
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
