//! Every metric of the processor. `*_committed_*` come from the checkpoint's totals, so they survive restarts and are never
//! ahead of what is stored; all others are of this process.

use crate::group::Lost;
use crate::partition::{Partition, Totals};
use crate::stages::{StageClock, Stages};
use crate::start::How;
use crate::store::StepTimes;
use common::metrics::Maker;
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{
    CounterVec, Gauge, GaugeVec, Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
    Opts, Registry,
};
use std::path::PathBuf;
use std::sync::Arc;

/// Steps from a millisecond to ten seconds.
const STEP_BUCKETS: [f64; 13] = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0];

/// Produced until committed, from a hundredth of a second to the hours of an outage.
const LATENCY_BUCKETS: [f64; 15] =
    [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 14_400.0];
/// Rows of a batch, up to what one chunk holds.
const ROW_BUCKETS: [f64; 12] =
    [1.0, 5.0, 20.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2000.0, 4000.0, 8000.0, 16_000.0];
/// The stage that polls Kafka and decodes.
pub const FETCH: &str = "fetch";
/// The stage that looks up, counts, writes and commits.
pub const WORK: &str = "work";

/// The processor's metrics; labels are bounded by the topic's partitions and fixed words.
#[derive(Debug)]
pub struct Metrics {
    /// Where all of them are registered.
    pub registry: Registry,
    committed: [IntCounterVec; 5],
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
    /// A batch's oldest event, handed to Kafka until committed: seconds between.
    pub latency: HistogramVec,
    /// Events whose key was looked up.
    pub looked_up: IntCounter,
    /// First copies counted in panes that were not in memory.
    pub cold_events: IntCounter,
    /// Requests that Cassandra acknowledged.
    pub store_requests: IntCounter,
    /// Requests to Cassandra that failed and were tried again.
    pub store_retries: IntCounter,
    /// Requests to Cassandra that wait for their answer.
    in_flight: IntGauge,
    /// Requests to Cassandra that may be in flight.
    pub in_flight_limit: IntGauge,
    /// Partitions whose worker runs here.
    pub partitions: IntGauge,
    /// Partitions that were given to this instance, but that the stream was not registered with.
    pub unregistered_partitions: IntGauge,
    /// Partitions that no live instance holds, as seen from here.
    pub unowned_partitions: IntGauge,
    starts: IntCounterVec,
    client_rebuilds: IntCounterVec,
}

impl Metrics {
    /// Registers everything; each series without a partition is there at 0 from the start.
    pub fn new() -> Result<Metrics, prometheus::Error> {
        const PARTITION: [&str; 1] = ["partition"];
        let make = Maker::new("stream-processor", env!("CARGO_PKG_VERSION"))?;
        let total = |name: &str, help: &str| make.counters(name, help, &PARTITION);
        let gauge = |name: &str, help: &str| make.gauges(name, help, &PARTITION);
        let time = |name: &str, help: &str| make.levels(name, help, &PARTITION);
        let stages =
            Opts::new("processor_stage_seconds_total", "Seconds idle, busy or backpressured per stage");
        let stages = Stages::new(CounterVec::new(stages, &["partition", "stage", "state"])?);
        make.registry.register(Box::new(stages.clone()))?;
        let steps = ("processor_step_duration_seconds", "Seconds per batch and step");
        let latency =
            ("processor_produce_to_commit_seconds", "A batch's oldest event: produced until committed");
        let metrics = Metrics {
            committed: [
                total("processor_committed_events_total", "First copies of events")?,
                total("processor_committed_duplicates_total", "Further copies of events")?,
                total("processor_committed_late_events_total", "First copies later than allowed")?,
                total("processor_committed_dead_letters_total", "Records sent to the dead-letter topic")?,
                total("processor_committed_skipped_offsets_total", "Offsets skipped by an operator")?,
            ],
            next_offset: gauge("processor_next_offset", "Next offset to take, from the checkpoint")?,
            paused: gauge("processor_paused", "1: too much poison, waiting for dlq accept")?,
            halted: gauge("processor_halted", "1: stands at an offset that cannot be read")?,
            hot_panes: gauge("processor_hot_panes", "Panes whose rows and seen keys are in memory")?,
            hot_bytes: gauge("processor_hot_bytes", "Bytes that hot panes and their filters take")?,
            seen_ids: gauge("processor_seen_ids", "Keys in the filters of hot panes")?,
            watermark: time("processor_watermark_timestamp_seconds", "Highest event time so far")?,
            committed_at: time("processor_last_commit_timestamp_seconds", "Last commit, or start here")?,
            stages,
            batch_rows: make.histogram("processor_batch_rows", "Rows written per batch", &ROW_BUCKETS)?,
            seconds: make.amounts("processor_step_seconds_total", "Seconds spent per step", &["step"])?,
            steps: make.histograms(steps, &["step"], &STEP_BUCKETS)?,
            latency: make.histograms(latency, &[], &LATENCY_BUCKETS)?,
            looked_up: make.counter("processor_looked_up_events_total", "Events whose key was looked up")?,
            cold_events: make
                .counter("processor_cold_events_total", "First copies in panes not in memory")?,
            store_requests: make.counter("processor_store_requests_total", "Requests acknowledged")?,
            store_retries: make.counter("processor_store_retries_total", "Requests tried again")?,
            in_flight: make.gauge("processor_in_flight", "Requests to Cassandra not answered yet")?,
            in_flight_limit: make.gauge("processor_in_flight_limit", "Requests that may be in flight")?,
            partitions: make.gauge("processor_partitions", "Partitions whose worker runs here")?,
            unregistered_partitions: make.gauge(
                "processor_unregistered_partitions",
                "Partitions here that were added to the topic later",
            )?,
            unowned_partitions: make
                .gauge("processor_unowned_partitions", "Partitions that no live instance holds")?,
            starts: make.counters("processor_partition_starts_total", "Partition starts by how", &["how"])?,
            client_rebuilds: make.counters(
                "processor_client_rebuilds_total",
                "Kafka clients built again by reason",
                &["reason"],
            )?,
            registry: make.registry,
        };
        metrics.at_zero();
        Ok(metrics)
    }

    fn at_zero(&self) {
        for how in How::ALL {
            self.starts.with_label_values(&[how.name()]);
        }
        for reason in Lost::LABELS {
            self.client_rebuilds.with_label_values(&[reason]);
        }
        for step in ["decode", "lookup", "apply", "write", "commit"] {
            self.seconds.with_label_values(&[step]);
            self.steps.with_label_values(&[step]);
        }
        self.latency.with_label_values(&[] as &[&str]);
    }

    /// A partition starts here.
    pub fn started(&self, partition: i32, how: &str, totals: &Totals, next_offset: i64) {
        self.starts.with_label_values(&[how]).inc();
        self.partitions.inc();
        self.paused(partition, false);
        self.committed_at.with_label_values(&[&partition.to_string()]).set(unix_seconds());
        self.committed(partition, &Totals::default(), totals, next_offset);
    }

    /// A batch is committed: totals went from `before` to `after`.
    pub fn committed(&self, partition: i32, before: &Totals, after: &Totals, next_offset: i64) {
        let label = partition.to_string();
        let deltas = [
            after.events - before.events,
            after.duplicates - before.duplicates,
            after.late - before.late,
            after.dead_letters - before.dead_letters,
            after.skipped - before.skipped,
        ];
        for (counter, delta) in self.committed.iter().zip(deltas) {
            counter.with_label_values(&[&label]).inc_by(delta.unsigned_abs());
        }
        self.next_offset.with_label_values(&[&label]).set(next_offset);
    }

    /// A partition is paused, or goes on.
    pub fn paused(&self, partition: i32, paused: bool) {
        self.paused.with_label_values(&[&partition.to_string()]).set(i64::from(paused));
    }

    /// A partition of this instance stands at an offset that cannot be read, or does not.
    pub fn halted(&self, partition: i32, halted: bool) {
        self.halted.with_label_values(&[&partition.to_string()]).set(i64::from(halted));
    }

    /// A partition is not this instance's any more.
    pub fn given_up(&self, partition: i32) {
        // A series that was never made cannot be removed, and need not be.
        let _absent = self.halted.remove_label_values(&[&partition.to_string()]);
    }

    /// The Kafka client was given up for `reason`, and another one is built.
    pub fn client_rebuilt(&self, reason: &str) {
        self.client_rebuilds.with_label_values(&[reason]).inc();
    }

    /// Whether a partition's worker has nothing to do until a record comes.
    pub fn waits_for_records(&self, partition: i32) -> bool {
        self.stages.is_idle(partition, WORK)
    }

    /// A stage of a partition begins; it tells the clock what it does.
    pub fn stage(&self, partition: i32, stage: &'static str) -> Arc<StageClock> {
        self.stages.begin(partition, stage)
    }

    /// Exports size and disk of the checkpoints in `folder`, as they are when somebody looks.
    pub fn watch_checkpoints(&self, folder: PathBuf, stream: &str) -> Result<(), prometheus::Error> {
        let checkpoints = Checkpoints::new(folder, stream, self.stages.clone())?;
        self.registry.register(Box::new(checkpoints))
    }

    /// One request to Cassandra is in flight as long as the answer lives.
    pub fn in_flight(&self) -> InFlightGuard {
        self.in_flight.inc();
        InFlightGuard(self.in_flight.clone())
    }

    /// What a batch took, and how many rows it wrote.
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

    /// What a partition keeps in memory after a commit, and how far it has come.
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

    /// A partition has gone elsewhere: its series go at once.
    pub fn stopped(&self, partition: i32) {
        let label = partition.to_string();
        self.partitions.dec();
        // A series that was never made cannot be removed, and need not be.
        for counter in &self.committed {
            let _absent = counter.remove_label_values(&[&label]);
        }
        for gauge in [&self.next_offset, &self.paused, &self.hot_panes, &self.hot_bytes, &self.seen_ids] {
            let _absent = gauge.remove_label_values(&[&label]);
        }
        for gauge in [&self.watermark, &self.committed_at] {
            let _absent = gauge.remove_label_values(&[&label]);
        }
        self.stages.end(partition);
    }
}

/// Ends with the request it stands for.
#[derive(Debug)]
pub struct InFlightGuard(IntGauge);

impl Drop for InFlightGuard {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Reads the checkpoint folder at each scrape: only files of partitions that are here, as instances may share it.
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
            disk_free: Gauge::new("processor_checkpoint_disk_free_bytes", "Free on the checkpoints' disk")?,
            disk_size: Gauge::new("processor_checkpoint_disk_size_bytes", "Size of the checkpoints' disk")?,
        })
    }

    fn parts(&self) -> [&dyn Collector; 3] {
        [&self.bytes, &self.disk_free, &self.disk_size]
    }
}

impl Collector for Checkpoints {
    fn desc(&self) -> Vec<&Desc> {
        self.parts().into_iter().flat_map(Collector::desc).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.bytes.reset();
        for partition in self.stages.partitions() {
            let file = crate::state::path_of(&self.folder, &self.stream, partition);
            if let Ok(found) = std::fs::metadata(file) {
                self.bytes.with_label_values(&[&partition.to_string()]).set(found.len() as i64);
            }
        }
        if let Ok(disk) = rustix::fs::statvfs(&self.folder) {
            self.disk_free.set(disk.f_bavail as f64 * disk.f_frsize as f64);
            self.disk_size.set(disk.f_blocks as f64 * disk.f_frsize as f64);
        }
        self.parts().into_iter().flat_map(Collector::collect).collect()
    }
}

fn unix_seconds() -> f64 {
    chrono::Utc::now().timestamp_millis() as f64 / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_files_of_partitions_here_are_exported_with_their_size() {
        let folder = tempfile::tempdir().unwrap();
        let metrics = Metrics::new().unwrap();
        metrics.watch_checkpoints(folder.path().to_owned(), "s").unwrap();
        for partition in [1, 2] {
            std::fs::write(crate::state::path_of(folder.path(), "s", partition), [0; 7]).unwrap();
        }
        let _clock = metrics.stage(1, WORK);
        let families = metrics.registry.gather();
        let of = |name: &str| families.iter().find(|f| f.name() == name).unwrap().get_metric();
        let bytes = of("processor_checkpoint_bytes");
        assert_eq!((bytes.len(), bytes[0].get_gauge().get_value()), (1, 7.0), "partition 2 is elsewhere");
        assert!(of("processor_checkpoint_disk_free_bytes")[0].get_gauge().get_value() > 0.0);
    }

    #[test]
    fn counters_equal_the_totals_and_go_with_the_partition() {
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
