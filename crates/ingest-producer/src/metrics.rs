//! The metrics of the producer. Only this module names them. Series start at 0, except for timestamps and lengths:
//! these have no series until their first value is set.

use crate::planner::{Run, Trigger};
use crate::unresolved::Count;
use common::contracts::control::CommandState;
use common::contracts::run_ledger::RunState;
use common::runtime::metrics::{Eventual, MetricFactory};
use prometheus::{Histogram, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Registry};

/// Values of label `outcome`: how an attempt ends.
pub const OUTCOMES: [&str; 5] = ["succeeded", "failed", "lost", "interrupted", "missed"];
/// Values of label `state` of unresolved intervals: attempted without success, or never attempted within the catch-up
/// limit.
pub const UNRESOLVED: [&str; 2] = ["failed", "missed"];
/// Histogram bounds for the duration of requests to the source, in seconds.
const FETCH_SECONDS: [f64; 10] = [0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 15.0, 60.0];
/// Histogram bounds for the time from producing a record to its acknowledgement, in seconds.
const ACK_SECONDS: [f64; 11] = [0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0, 120.0];

/// The metrics of the producer. Clones share the same series.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// The registry that `/metrics` exposes.
    pub registry: Registry,
    /// Records found in pages.
    pub records_fetched: IntCounter,
    /// Fetched records that cannot become events. The processor writes them to the dead letters.
    pub records_refused: IntCounter,
    /// Records that Kafka acknowledged.
    pub records_acked: IntCounter,
    /// Records that the Kafka client could not deliver. Their run is retried.
    pub records_failed: IntCounter,
    /// Pages fetched from the source.
    pub pages: IntCounter,
    /// Page bytes received over the network, before decompression.
    pub bytes: IntCounter,
    /// Plannings by [`Trigger`]. Each reads the ledger.
    plannings: IntCounterVec,
    /// Finished attempts by outcome, one of [`OUTCOMES`].
    pub attempts: IntCounterVec,
    /// Finished commands of the control topic by [`CommandState`].
    pub commands: IntCounterVec,
    /// Runs that are active in this process.
    runs_active: IntGauge,
    /// Runs in the planner's range, by state in the ledger.
    runs: IntGaugeVec,
    /// Intervals whose data is missing, by one of [`UNRESOLVED`].
    unresolved: IntGaugeVec,
    /// Length of the current interval of the schedule in seconds.
    pub interval_seconds: Eventual,
    /// Requests to the source that failed.
    pub fetches_failed: IntCounter,
    /// Records in the Kafka client that are queued or not yet acknowledged.
    pub queue_records: IntGauge,
    /// Maximum of `queue_records`.
    pub queue_limit: IntGauge,
    /// How often the producer paused because the queue was full.
    pub queue_full: IntCounter,
    /// How far the clock of this machine is ahead of the clock of the source, in seconds.
    pub clock_ahead_seconds: Eventual,
    /// Time of the last successful run, Unix seconds.
    pub last_success: Eventual,
    /// Every interval that started before this time was fetched or has failed, Unix seconds.
    pub settled: Eventual,
    /// 1 while the stream is paused.
    pub paused: IntGauge,
    /// Duration of a request to the source in seconds.
    pub fetch_seconds: Histogram,
    /// Time from producing a record to its acknowledgement in seconds.
    pub ack_seconds: Histogram,
}

/// Counts a run as active until it is dropped.
#[derive(Debug)]
pub struct ActiveRun(IntGauge);

impl Drop for ActiveRun {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl Metrics {
    /// Creates and registers all metrics.
    pub fn new() -> Result<Metrics, prometheus::Error> {
        let make = MetricFactory::new("ingest-producer", env!("CARGO_PKG_VERSION"))?;
        let counter = |name: &str, help: &str| make.counter(name, help);
        let gauge = |name: &str, help: &str| make.gauge(name, help);
        let unresolved = "Intervals that failed or were missed and have neither succeeded nor been given up.";
        let eventual = |name: &str, help: &str| make.eventual(name, help);
        let runs = "Runs in the range of the planner, by state in the ledger.";
        let metrics = Metrics {
            records_fetched: counter("ingest_records_fetched_total", "Records found in pages.")?,
            records_refused: counter("ingest_records_refused_total", "Records that cannot become events.")?,
            records_acked: counter("ingest_records_acked_total", "Records that Kafka acknowledged.")?,
            records_failed: counter(
                "ingest_records_failed_total",
                "Records not delivered; their runs retry.",
            )?,
            pages: counter("ingest_pages_fetched_total", "Pages fetched from the source.")?,
            bytes: counter("ingest_fetched_bytes_total", "Bytes fetched from the source.")?,
            fetches_failed: counter("ingest_fetches_failed_total", "Requests to the source that failed.")?,
            attempts: make.counters(
                "ingest_attempts_total",
                "Finished attempts by outcome.",
                &["outcome"],
            )?,
            plannings: make.counters("ingest_plannings_total", "Plannings by trigger.", &["trigger"])?,
            commands: make.counters("ingest_commands_total", "Finished commands by state.", &["state"])?,
            runs: make.gauges("ingest_runs", runs, &["state"])?,
            unresolved: make.gauges("ingest_unresolved_intervals", unresolved, &["state"])?,
            runs_active: gauge("ingest_runs_active", "Runs active in this process.")?,
            interval_seconds: eventual("ingest_interval_seconds", "Length of the current interval.")?,
            clock_ahead_seconds: eventual(
                "ingest_clock_ahead_seconds",
                "Own clock minus that of the source.",
            )?,
            last_success: eventual(
                "ingest_last_success_timestamp_seconds",
                "Time of the last successful run.",
            )?,
            settled: eventual("ingest_settled_timestamp_seconds", "Earlier intervals are finished.")?,
            paused: gauge("ingest_paused", "1 while the stream is paused.")?,
            fetch_seconds: make.histogram(
                "ingest_fetch_seconds",
                "Duration of a request to the source.",
                &FETCH_SECONDS,
            )?,
            ack_seconds: make.histogram("ingest_ack_seconds", "Time to acknowledgement.", &ACK_SECONDS)?,
            queue_records: gauge("ingest_queue_records", "Records in the Kafka client.")?,
            queue_limit: gauge("ingest_queue_limit_records", "Most records in the Kafka client.")?,
            queue_full: counter("ingest_queue_full_total", "Pauses because the queue was full.")?,
            registry: make.registry,
        };
        for trigger in Trigger::ALL {
            metrics.plannings.with_label_values(&[trigger.name()]);
        }
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

    /// Sets the number of failed and of missed intervals.
    pub fn unresolved(&self, count: Count) {
        for (state, count) in UNRESOLVED.into_iter().zip([count.failed, count.missed]) {
            self.unresolved.with_label_values(&[state]).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }

    /// Updates the metrics that derive from ledger rows in the planner's range. The last success may predate this
    /// process.
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

    /// Counts a planning.
    pub fn planned(&self, trigger: Trigger) {
        self.plannings.with_label_values(&[trigger.name()]).inc();
    }

    /// Counts a finished command.
    pub fn command_ended(&self, state: CommandState) {
        self.commands.with_label_values(&[state.name()]).inc();
    }

    /// Removes the ledger's series while the ledger is unavailable, because their values are unknown.
    pub fn ledger_unavailable(&self) {
        self.runs.reset();
        self.unresolved.reset();
    }

    /// Counts a finished attempt. `outcome` is one of [`OUTCOMES`].
    pub fn attempt_ended(&self, outcome: &str) {
        self.attempts.with_label_values(&[outcome]).inc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_counter_is_exported_as_zero_before_its_first_event() {
        let metrics = Metrics::new().unwrap();
        let gathered = metrics.registry.gather();
        let names: Vec<&str> =
            gathered.iter().map(|f| f.name()).filter(|n| n.starts_with("ingest_")).collect();
        assert_eq!(names.len(), 19, "all except two timestamps and one length: {names:?}");
        let attempts = gathered.iter().find(|f| f.name() == "ingest_attempts_total").unwrap();
        assert_eq!(attempts.get_metric().len(), OUTCOMES.len());
    }
}
