//! Every metric of the producer; the only place that names one. Series exist at 0 from the start, but for times and lengths: their
//! first value makes them.

use crate::planner::Run;
use crate::unresolved::Count;
use common::control::CommandState;
use common::metrics::{Eventual, Maker};
use common::run_ledger::RunState;
use prometheus::{Histogram, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Registry};

/// How attempts end, as values of label `outcome`.
pub const OUTCOMES: [&str; 5] = ["succeeded", "failed", "lost", "interrupted", "missed"];
/// Values of label `state` of unresolved intervals: attempted without success, and not attempted within the catch-up limit.
pub const UNRESOLVED: [&str; 2] = ["failed", "missed"];
/// Upper bounds in seconds of requests to the source.
const FETCH_SECONDS: [f64; 10] = [0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 15.0, 60.0];
/// Upper bounds in seconds from handing a record to Kafka's client to its acknowledgement.
const ACK_SECONDS: [f64; 11] = [0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0, 120.0];

/// The producer's metrics. Cloning shares them.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// Where they are gathered for `/metrics`.
    pub registry: Registry,
    /// Records taken out of pages.
    pub records_fetched: IntCounter,
    /// Records of them that cannot become events: the processor keeps them as dead letters.
    pub records_refused: IntCounter,
    /// Records that Kafka acknowledged.
    pub records_acked: IntCounter,
    /// Records that Kafka's client gave up on; their run is attempted again.
    pub records_failed: IntCounter,
    /// Pages fetched.
    pub pages: IntCounter,
    /// Bytes of pages as they came over the network.
    pub bytes: IntCounter,
    /// Ended attempts by [`OUTCOMES`].
    pub attempts: IntCounterVec,
    /// Ended commands of the control topic by [`CommandState`].
    pub commands: IntCounterVec,
    /// Runs going on now in this process.
    runs_active: IntGauge,
    /// Runs of intervals that the planner still looks at, by state in the ledger.
    runs: IntGaugeVec,
    /// Intervals without their data that are not about to be fetched, by [`UNRESOLVED`].
    unresolved: IntGaugeVec,
    /// Length of the schedule's present interval in seconds.
    pub interval_seconds: Eventual,
    /// Requests to the source that failed.
    pub fetches_failed: IntCounter,
    /// Records that wait in Kafka's client or for their acknowledgement.
    pub queue_records: IntGauge,
    /// How many may.
    pub queue_limit: IntGauge,
    /// Pauses because the queue was full.
    pub queue_full: IntCounter,
    /// When a run last succeeded.
    pub last_success: Eventual,
    /// Every interval that began before this is over.
    pub settled: Eventual,
    /// 1 while the stream is paused.
    pub paused: IntGauge,
    /// Seconds of one request.
    pub fetch_seconds: Histogram,
    /// Seconds from produce to acknowledgement.
    pub ack_seconds: Histogram,
}

/// A run that is counted as going on; dropped when it ends, however it ends.
#[derive(Debug)]
pub struct ActiveRun(IntGauge);

impl Drop for ActiveRun {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl Metrics {
    /// Registers all of them.
    pub fn new() -> Result<Metrics, prometheus::Error> {
        let make = Maker::new("ingest-producer", env!("CARGO_PKG_VERSION"))?;
        let counter = |name: &str, help: &str| make.counter(name, help);
        let gauge = |name: &str, help: &str| make.gauge(name, help);
        let unresolved = "Intervals that failed or were missed, until they succeed or are given up.";
        let eventual = |name: &str, help: &str| make.eventual(name, help);
        let runs = "Runs the planner still looks at, by state in the ledger.";
        let metrics = Metrics {
            records_fetched: counter("ingest_records_fetched_total", "Records taken out of pages.")?,
            records_refused: counter("ingest_records_refused_total", "Records that become dead letters.")?,
            records_acked: counter("ingest_records_acked_total", "Records that Kafka acknowledged.")?,
            records_failed: counter("ingest_records_failed_total", "Records not delivered; runs retry.")?,
            pages: counter("ingest_pages_fetched_total", "Pages fetched from the source.")?,
            bytes: counter("ingest_fetched_bytes_total", "Bytes fetched from the source.")?,
            fetches_failed: counter("ingest_fetches_failed_total", "Requests to the source that failed.")?,
            attempts: make.counters("ingest_attempts_total", "Ended attempts by outcome.", &["outcome"])?,
            commands: make.counters("ingest_commands_total", "Ended commands by state.", &["state"])?,
            runs: make.gauges("ingest_runs", runs, &["state"])?,
            unresolved: make.gauges("ingest_unresolved_intervals", unresolved, &["state"])?,
            runs_active: gauge("ingest_runs_active", "Runs going on in this process.")?,
            interval_seconds: eventual("ingest_interval_seconds", "Length of the schedule's interval.")?,
            last_success: eventual("ingest_last_success_timestamp_seconds", "When a run last succeeded.")?,
            settled: eventual("ingest_settled_timestamp_seconds", "Intervals begun before are over.")?,
            paused: gauge("ingest_paused", "1 while the stream is paused.")?,
            fetch_seconds: make.histogram(
                "ingest_fetch_seconds",
                "Duration of a request.",
                &FETCH_SECONDS,
            )?,
            ack_seconds: make.histogram("ingest_ack_seconds", "Produced until acked.", &ACK_SECONDS)?,
            queue_records: gauge("ingest_queue_records", "Records that Kafka's client holds.")?,
            queue_limit: gauge("ingest_queue_limit_records", "Records that Kafka's client may hold.")?,
            queue_full: counter("ingest_queue_full_total", "Pauses because that queue was full.")?,
            registry: make.registry,
        };
        for outcome in OUTCOMES {
            metrics.attempts.with_label_values(&[outcome]);
        }
        for state in CommandState::ALL.into_iter().filter(|state| *state != CommandState::Running) {
            metrics.commands.with_label_values(&[state.name()]);
        }
        for state in RunState::ALL {
            metrics.runs.with_label_values(&[state.name()]);
        }
        for state in UNRESOLVED {
            metrics.unresolved.with_label_values(&[state]);
        }
        Ok(metrics)
    }

    /// Counts a run as active until the guard is dropped.
    pub fn active_run(&self) -> ActiveRun {
        self.runs_active.inc();
        ActiveRun(self.runs_active.clone())
    }

    /// Notes how many intervals have failed, and how many were missed.
    pub fn unresolved(&self, count: Count) {
        for (state, count) in UNRESOLVED.into_iter().zip([count.failed, count.missed]) {
            self.unresolved.with_label_values(&[state]).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }

    /// What the ledger says of the runs that the planner looks at. A success before this process began counts too.
    pub fn ledger<'a>(&self, runs: impl Iterator<Item = &'a Run> + Clone) {
        for state in RunState::ALL {
            let count = runs.clone().filter(|run| run.state == state).count();
            self.runs.with_label_values(&[state.name()]).set(count as i64);
        }
        let succeeded = runs.filter(|run| run.state == RunState::Succeeded);
        if let Some(finished_ms) = succeeded.map(|run| run.finished_at_ms).max() {
            self.last_success.raise(finished_ms / 1000);
        }
    }

    /// Counts an ended command.
    pub fn command_ended(&self, state: CommandState) {
        self.commands.with_label_values(&[state.name()]).inc();
    }

    /// The ledger does not answer: how many runs are in which state is not known.
    pub fn ledger_is_away(&self) {
        self.runs.reset();
        self.unresolved.reset();
    }

    /// Counts an ended attempt; `outcome` is one of [`OUTCOMES`].
    pub fn attempt_ended(&self, outcome: &str) {
        self.attempts.with_label_values(&[outcome]).inc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_count_is_there_at_zero_from_the_start() {
        let metrics = Metrics::new().unwrap();
        let gathered = metrics.registry.gather();
        let names: Vec<&str> =
            gathered.iter().map(|f| f.name()).filter(|n| n.starts_with("ingest_")).collect();
        assert_eq!(names.len(), 18, "all but two times and a length: {names:?}");
        let attempts = gathered.iter().find(|f| f.name() == "ingest_attempts_total").unwrap();
        assert_eq!(attempts.get_metric().len(), OUTCOMES.len());
    }
}
