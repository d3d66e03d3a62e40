//! Every metric of the processor. The `*_committed_*` counters come from the checkpoint's totals, so they survive
//! restarts and are never ahead of what is stored. All other metrics describe this process.

use crate::count::partition::{Partition, Totals};
use crate::io::store::StepTimes;
use crate::pipeline::stages::{StageClock, Stages};
use crate::pipeline::start::How;
use common::runtime::metrics::MetricFactory;
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{
    CounterVec, Gauge, GaugeVec, Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
    Opts, Registry,
};
use std::path::PathBuf;
use std::sync::Arc;

/// Duration of a step, from 1 ms to 10 s.
const STEP_BUCKETS: [f64; 13] = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0];

/// Time from produce to commit: from 10 ms to 4 hours, to cover long outages.
const LATENCY_BUCKETS: [f64; 15] =
    [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 14_400.0];
/// Rows written per batch. A batch has up to 8000 records by default.
const ROW_BUCKETS: [f64; 12] =
    [1.0, 5.0, 20.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2000.0, 4000.0, 8000.0, 16_000.0];
/// Name of the stage that polls Kafka and decodes.
pub const FETCH: &str = "fetch";
/// Name of the stage that looks up, counts, writes and commits.
pub const WORK: &str = "work";

/// Why a client of the consumer group was replaced.
const REBUILD_REASONS: [&str; 5] = ["session", "fenced", "fatal", "unowned", "stuck"];

/// The processor's metrics. Label values are partition numbers and fixed strings, so the number of series is bounded.
#[derive(Debug)]
pub struct Metrics {
    /// Registry of all metrics.
    pub registry: Registry,
    committed: [IntCounterVec; 6],
    next_offset: IntGaugeVec,
    paused: IntGaugeVec,
    halted: IntGaugeVec,
    hot_panes: IntGaugeVec,
    hot_bytes: IntGaugeVec,
    seen_ids: IntGaugeVec,
    watermark: GaugeVec,
    committed_at: GaugeVec,
    stages: Stages,
    batch_rows: Histogram,
    seconds: CounterVec,
    steps: HistogramVec,
    /// Seconds from producing a batch's oldest event to its commit.
    pub latency: HistogramVec,
    /// Events whose key was looked up.
    pub looked_up: IntCounter,
    /// First copies counted in cold panes.
    pub cold_events: IntCounter,
    /// Requests that Cassandra acknowledged.
    pub store_requests: IntCounter,
    /// Failed attempts at requests to Cassandra.
    pub store_retries: IntCounter,
    /// Values that did not fit their column and are null instead, by column.
    pub misfits: IntCounterVec,
    /// Requests to Cassandra that are not answered yet.
    in_flight: IntGauge,
    /// Current limit of requests in flight.
    pub in_flight_limit: IntGauge,
    /// Partitions whose worker runs in this process.
    pub partitions: IntGauge,
    /// Partitions assigned to this instance that were added to the topic after the stream was registered.
    pub unregistered_partitions: IntGauge,
    /// Partitions that no live instance holds, as observed by this instance.
    pub unowned_partitions: IntGauge,
    /// The daily verification.
    pub verification: VerificationMetrics,
    starts: IntCounterVec,
    client_rebuilds: IntCounterVec,
}

/// Label of series that belong to a partition.
const PARTITION: [&str; 1] = ["partition"];

/// Counters of the totals, in the order of [`Metrics::committed`].
fn committed_counters(make: &MetricFactory) -> Result<[IntCounterVec; 6], prometheus::Error> {
    let total = |name: &str, help: &str| make.counters(name, help, &PARTITION);
    Ok([
        total("processor_committed_events_total", "First copies of events")?,
        total("processor_committed_duplicates_total", "Further copies of events")?,
        total("processor_committed_revised_total", "Further copies with other values")?,
        total("processor_committed_late_events_total", "First copies that were late")?,
        total("processor_committed_dead_letters_total", "Records sent to the dead-letter topic")?,
        total("processor_committed_skipped_offsets_total", "Offsets skipped by an operator")?,
    ])
}

impl Metrics {
    /// Creates and registers all metrics. Series without a partition label start at 0.
    pub fn new() -> Result<Metrics, prometheus::Error> {
        let make = MetricFactory::new("stream-processor", env!("CARGO_PKG_VERSION"))?;
        let gauge = |name: &str, help: &str| make.gauges(name, help, &PARTITION);
        let time = |name: &str, help: &str| make.levels(name, help, &PARTITION);
        let stages =
            Opts::new("processor_stage_seconds_total", "Seconds idle, busy or backpressured per stage");
        let stages = Stages::new(CounterVec::new(stages, &["partition", "stage", "state"])?);
        make.registry.register(Box::new(stages.clone()))?;
        let steps = "Seconds per batch and step";
        let latency = "Produce-to-commit time of a batch's oldest event";
        let metrics = Metrics {
            committed: committed_counters(&make)?,
            next_offset: gauge("processor_next_offset", "Next offset to process, from the checkpoint")?,
            paused: gauge("processor_paused", "1 while paused by undecodable records, until dlq accept")?,
            halted: gauge("processor_halted", "1 while halted at an offset that cannot be read")?,
            hot_panes: gauge("processor_hot_panes", "Panes whose rows and key filters are in memory")?,
            hot_bytes: gauge("processor_hot_bytes", "Memory of hot panes and their filters, in bytes")?,
            seen_ids: gauge("processor_seen_ids", "Keys in the filters of hot panes")?,
            watermark: time("processor_watermark_timestamp_seconds", "Watermark")?,
            committed_at: time("processor_last_commit_timestamp_seconds", "Last commit, or partition start")?,
            stages,
            batch_rows: make.histogram("processor_batch_rows", "Rows written per batch", &ROW_BUCKETS)?,
            seconds: make.amounts("processor_step_seconds_total", "Seconds spent per step", &["step"])?,
            steps: make.histograms("processor_step_duration_seconds", steps, &["step"], &STEP_BUCKETS)?,
            latency: make.histograms(
                "processor_produce_to_commit_seconds",
                latency,
                &[],
                &LATENCY_BUCKETS,
            )?,
            looked_up: make.counter("processor_looked_up_events_total", "Events whose key was looked up")?,
            cold_events: make.counter("processor_cold_events_total", "First copies counted in cold panes")?,
            store_requests: make.counter("processor_store_requests_total", "Acknowledged requests")?,
            store_retries: make.counter("processor_store_retries_total", "Failed request attempts")?,
            misfits: make.counters(
                "processor_misfit_values_total",
                "Values that did not fit their column and are null instead",
                &["column"],
            )?,
            in_flight: make.gauge("processor_in_flight", "Unanswered requests to Cassandra")?,
            in_flight_limit: make.gauge("processor_in_flight_limit", "Limit of requests in flight")?,
            partitions: make.gauge("processor_partitions", "Partitions whose worker runs in this process")?,
            unregistered_partitions: make.gauge(
                "processor_unregistered_partitions",
                "Assigned partitions that were added to the topic later",
            )?,
            unowned_partitions: make
                .gauge("processor_unowned_partitions", "Partitions that no live instance holds")?,
            verification: VerificationMetrics::new(&make)?,
            starts: make.counters(
                "processor_partition_starts_total",
                "Partition starts by kind",
                &["how"],
            )?,
            client_rebuilds: make.counters(
                "processor_client_rebuilds_total",
                "Kafka clients replaced, by reason",
                &["reason"],
            )?,
            registry: make.registry,
        };
        metrics.create_series();
        Ok(metrics)
    }

    fn create_series(&self) {
        for how in How::ALL {
            self.starts.with_label_values(&[how.name()]);
        }
        for reason in REBUILD_REASONS {
            self.client_rebuilds.with_label_values(&[reason]);
        }
        for step in ["decode", "lookup", "apply", "write", "commit"] {
            self.seconds.with_label_values(&[step]);
            self.steps.with_label_values(&[step]);
        }
        self.latency.with_label_values(&[] as &[&str]);
    }

    /// Records that a partition has started in this process.
    pub fn started(&self, partition: i32, how: &str, totals: &Totals, next_offset: i64) {
        self.starts.with_label_values(&[how]).inc();
        self.partitions.inc();
        self.paused(partition, false);
        self.committed_at.with_label_values(&[&partition.to_string()]).set(unix_seconds());
        self.committed(partition, &Totals::default(), totals, next_offset);
    }

    /// Records a committed batch that changed the totals from `before` to `after`.
    pub fn committed(&self, partition: i32, before: &Totals, after: &Totals, next_offset: i64) {
        let label = partition.to_string();
        let deltas = [
            after.events - before.events,
            after.duplicates - before.duplicates,
            after.revised - before.revised,
            after.late - before.late,
            after.dead_letters - before.dead_letters,
            after.skipped - before.skipped,
        ];
        for (counter, delta) in self.committed.iter().zip(deltas) {
            counter.with_label_values(&[&label]).inc_by(delta.unsigned_abs());
        }
        self.next_offset.with_label_values(&[&label]).set(next_offset);
    }

    /// Records whether a partition is paused.
    pub fn paused(&self, partition: i32, paused: bool) {
        self.paused.with_label_values(&[&partition.to_string()]).set(i64::from(paused));
    }

    /// Records whether a partition is halted at an offset that cannot be read.
    pub fn halted(&self, partition: i32, halted: bool) {
        self.halted.with_label_values(&[&partition.to_string()]).set(i64::from(halted));
    }

    /// Removes the series of a partition that is no longer assigned to this instance.
    pub fn released(&self, partition: i32) {
        // Fails if the series was never created.
        let _absent = self.halted.remove_label_values(&[&partition.to_string()]);
    }

    /// Counts a Kafka client that is replaced because of `reason`.
    pub fn client_rebuilt(&self, reason: &str) {
        self.client_rebuilds.with_label_values(&[reason]).inc();
    }

    /// Whether a partition's worker is waiting for records.
    pub fn waits_for_records(&self, partition: i32) -> bool {
        self.stages.is_idle(partition, WORK)
    }

    /// Starts the clock of a stage. The stage reports its state changes to the clock.
    pub fn stage(&self, partition: i32, stage: &'static str) -> Arc<StageClock> {
        self.stages.start(partition, stage)
    }

    /// Exports the sizes of the state files in `folder` and of its disk. They are read at each scrape.
    pub fn watch_checkpoints(&self, folder: PathBuf, stream: &str) -> Result<(), prometheus::Error> {
        let checkpoints = Checkpoints::new(folder, stream, self.stages.clone())?;
        self.registry.register(Box::new(checkpoints))
    }

    /// Counts a request to Cassandra as in flight until the guard is dropped.
    pub fn in_flight(&self) -> InFlightGuard {
        self.in_flight.inc();
        InFlightGuard(self.in_flight.clone())
    }

    /// Records the step times of a batch and the number of rows it wrote.
    pub fn batch(&self, times: &StepTimes, rows: usize) {
        self.batch_rows.observe(rows as f64);
        let steps = [
            ("decode", times.decode),
            ("lookup", times.lookup),
            ("apply", times.apply),
            ("write", times.write),
            ("commit", times.commit),
        ];
        for (step, seconds) in steps {
            self.seconds.with_label_values(&[step]).inc_by(seconds);
            self.steps.with_label_values(&[step]).observe(seconds);
        }
    }

    /// Records a partition's memory use and watermark after a commit.
    pub fn partition(&self, id: i32, partition: &Partition) {
        let label = id.to_string();
        let panes = &partition.panes;
        let seen: usize = panes.hot.values().map(|hot| hot.seen.len()).sum();
        self.hot_panes.with_label_values(&[&label]).set(panes.hot.len() as i64);
        self.hot_bytes.with_label_values(&[&label]).set(panes.hot_bytes() as i64);
        self.seen_ids.with_label_values(&[&label]).set(seen as i64);
        self.committed_at.with_label_values(&[&label]).set(unix_seconds());
        if let Some(seen_to) = partition.position.seen_to {
            self.watermark.with_label_values(&[&label]).set(seen_to as f64 / 1e3);
        }
    }

    /// Removes the series of a partition whose worker has stopped.
    pub fn stopped(&self, partition: i32) {
        let label = partition.to_string();
        self.partitions.dec();
        // Removing a series fails if it was never created.
        for counter in &self.committed {
            let _absent = counter.remove_label_values(&[&label]);
        }
        for gauge in [&self.next_offset, &self.paused, &self.hot_panes, &self.hot_bytes, &self.seen_ids] {
            let _absent = gauge.remove_label_values(&[&label]);
        }
        for gauge in [&self.watermark, &self.committed_at] {
            let _absent = gauge.remove_label_values(&[&label]);
        }
        self.stages.remove(partition);
    }
}

/// The metrics of the daily verification. A partition has series once it is verified.
#[derive(Debug)]
pub struct VerificationMetrics {
    /// 1 if each day is verified, 0 if this is switched off.
    pub enabled: IntGauge,
    /// Partitions of this instance whose last day is not verified yet.
    pub unverified_partitions: IntGauge,
    rows: IntGaugeVec,
    differences: IntGaugeVec,
    finished_at: GaugeVec,
}

impl VerificationMetrics {
    fn new(make: &MetricFactory) -> Result<VerificationMetrics, prometheus::Error> {
        let gauge = |name: &str, help: &str| make.gauges(name, help, &["partition"]);
        Ok(VerificationMetrics {
            enabled: make.gauge("processor_verification_enabled", "1 if each day is verified")?,
            unverified_partitions: make.gauge(
                "processor_unverified_partitions",
                "Held partitions whose last day is not verified yet",
            )?,
            rows: gauge("processor_verified_rows", "Event rows that the last verification read")?,
            differences: gauge(
                "processor_verification_differences",
                "Differences that the last verification found",
            )?,
            finished_at: make.levels(
                "processor_last_verification_timestamp_seconds",
                "Last verification",
                &["partition"],
            )?,
        })
    }

    /// Records the outcome of a partition's verification that finished at `finished_at_ms`.
    pub fn finished(&self, partition: i32, rows: i64, differences: i64, finished_at_ms: i64) {
        let label = [partition.to_string()];
        self.rows.with_label_values(&label).set(rows);
        self.differences.with_label_values(&label).set(differences);
        self.finished_at.with_label_values(&label).set(finished_at_ms as f64 / 1e3);
    }

    /// Removes the outcome of a partition that this instance no longer holds.
    pub fn forget(&self, partition: i32) {
        let label = [partition.to_string()];
        // Removing a series fails if it was never created.
        let _absent = self.rows.remove_label_values(&label);
        let _absent = self.differences.remove_label_values(&label);
        let _absent = self.finished_at.remove_label_values(&label);
    }
}

/// Counts one request as in flight while it lives.
#[derive(Debug)]
pub struct InFlightGuard(IntGauge);

impl Drop for InFlightGuard {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Reads the checkpoint folder at each scrape. Reports only files of this instance's partitions: instances may share
/// the folder.
struct Checkpoints {
    folder: PathBuf,
    stream: String,
    stages: Stages,
    bytes: IntGaugeVec,
    disk_free: Gauge,
    disk_size: Gauge,
}

impl Checkpoints {
    fn new(folder: PathBuf, stream: &str, stages: Stages) -> Result<Checkpoints, prometheus::Error> {
        let bytes = Opts::new("processor_checkpoint_bytes", "Size of a partition's state file");
        Ok(Checkpoints {
            folder,
            stream: stream.to_owned(),
            stages,
            bytes: IntGaugeVec::new(bytes, &["partition"])?,
            disk_free: Gauge::new(
                "processor_checkpoint_disk_free_bytes",
                "Free space on the checkpoints' disk",
            )?,
            disk_size: Gauge::new("processor_checkpoint_disk_size_bytes", "Size of the checkpoints' disk")?,
        })
    }

    fn collectors(&self) -> [&dyn Collector; 3] {
        [&self.bytes, &self.disk_free, &self.disk_size]
    }
}

impl Collector for Checkpoints {
    fn desc(&self) -> Vec<&Desc> {
        self.collectors().into_iter().flat_map(Collector::desc).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.bytes.reset();
        for partition in self.stages.partitions() {
            let file = crate::io::state::path_of(&self.folder, &self.stream, partition);
            if let Ok(found) = std::fs::metadata(file) {
                self.bytes.with_label_values(&[&partition.to_string()]).set(found.len() as i64);
            }
        }
        if let Ok(disk) = rustix::fs::statvfs(&self.folder) {
            self.disk_free.set(disk.f_bavail as f64 * disk.f_frsize as f64);
            self.disk_size.set(disk.f_blocks as f64 * disk.f_frsize as f64);
        }
        self.collectors().into_iter().flat_map(Collector::collect).collect()
    }
}

fn unix_seconds() -> f64 {
    chrono::Utc::now().timestamp_millis() as f64 / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sizes_of_this_instances_state_files_are_exported() {
        let folder = tempfile::tempdir().unwrap();
        let metrics = Metrics::new().unwrap();
        metrics.watch_checkpoints(folder.path().to_owned(), "s").unwrap();
        for partition in [1, 2] {
            std::fs::write(crate::io::state::path_of(folder.path(), "s", partition), [0; 7]).unwrap();
        }
        let _clock = metrics.stage(1, WORK);
        let families = metrics.registry.gather();
        let of = |name: &str| families.iter().find(|f| f.name() == name).unwrap().get_metric();
        let bytes = of("processor_checkpoint_bytes");
        assert_eq!((bytes.len(), bytes[0].get_gauge().get_value()), (1, 7.0), "partition 2 is not held here");
        assert!(of("processor_checkpoint_disk_free_bytes")[0].get_gauge().get_value() > 0.0);
    }

    #[test]
    fn counters_equal_the_totals_and_are_removed_with_the_partition() {
        let metrics = Metrics::new().unwrap();
        let totals = |events| Totals { events, ..Totals::default() };
        metrics.started(3, "resume", &totals(10), 10);
        metrics.committed(3, &totals(10), &totals(15), 15);
        assert_eq!(metrics.committed[0].with_label_values(&["3"]).get(), 15);
        let _clock = metrics.stage(3, WORK);
        metrics.stopped(3);
        let with_partition = |f: &MetricFamily| {
            f.get_metric().iter().any(|m| m.get_label().iter().any(|l| l.name() == "partition"))
        };
        let left: Vec<_> = metrics.registry.gather().into_iter().filter(with_partition).collect();
        assert!(left.is_empty(), "{left:?}");
        let left = metrics.registry.gather();
        assert!(
            left.iter().all(|f| f.name() != "processor_committed_events_total" || f.get_metric().is_empty())
        );
    }
}
