//! All metrics of this service. While a figure is unknown, its series is absent instead of 0.

use crate::overview::Overview;
use crate::reason::Origin;
use common::runtime::metrics::MetricFactory;
use prometheus::{GaugeVec, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec, Registry};
use std::time::Duration;

/// Upper bounds of the histogram of read times, in seconds.
const READ_SECONDS: [f64; 11] = [0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 15.0, 60.0];

/// Handles of all metrics. Clones share the same metrics.
#[derive(Debug, Clone)]
pub struct Metrics {
    registry: Registry,
    stream: String,
    up: IntGaugeVec,
    reads: IntCounterVec,
    read_seconds: HistogramVec,
    watchers: IntGauge,
    produced: IntGaugeVec,
    records: IntGaugeVec,
    rows: IntGaugeVec,
    lag_messages: IntGaugeVec,
    lag_seconds: GaugeVec,
    rate: GaugeVec,
    replicas: IntGaugeVec,
}

impl Metrics {
    /// Registers all metrics of one stream. `max_watchers` is the limit of open event streams.
    pub fn new(stream: &str, max_watchers: usize) -> prometheus::Result<Metrics> {
        let make = MetricFactory::new("metrics-dashboard", env!("CARGO_PKG_VERSION"))?;
        let gauges = |name: &str, help: &str, labels: &[&str]| make.gauges(name, help, labels);
        let most = make.gauge("dashboard_stream_watchers_limit", "Most open event streams.")?;
        most.set(max_watchers as i64);
        let reads = "Reads from a server, by outcome.";
        let read_seconds = "Time of one read from a server.";
        let records = "Records processed according to Cassandra, by outcome.";
        let rate = "Events per second over 10 s (now), the last hour (average), and its best second (peak).";
        let (of_stream, of_partition) = (["stream"], ["stream", "partition"]);
        Ok(Metrics {
            up: gauges("dashboard_source_up", "1 if the server responds, else 0.", &["source"])?,
            reads: make.counters("dashboard_reads_total", reads, &["source", "outcome"])?,
            read_seconds: make.histograms(
                "dashboard_read_seconds",
                read_seconds,
                &["source"],
                &READ_SECONDS,
            )?,
            watchers: make.gauge("dashboard_stream_watchers", "Open event streams.")?,
            produced: gauges("dashboard_kafka_records", "Records ever written to the topic.", &of_stream)?,
            records: gauges("dashboard_cassandra_records", records, &["stream", "outcome"])?,
            rows: gauges("dashboard_cassandra_rows", "Event rows in Cassandra.", &of_stream)?,
            lag_messages: gauges("dashboard_lag_messages", "Unprocessed records.", &of_partition)?,
            lag_seconds: make.levels(
                "dashboard_lag_seconds",
                "Age of the first unprocessed record.",
                &of_partition,
            )?,
            rate: make.levels("dashboard_events_per_second", rate, &["stream", "span"])?,
            replicas: gauges("dashboard_topic_replicas", "Replicas, worst partition.", &["stream", "kind"])?,
            stream: stream.to_owned(),
            registry: make.registry,
        }
        .with_initial_series())
    }

    /// Creates the series for which 0 is a meaningful value, so that they exist from the start.
    fn with_initial_series(self) -> Metrics {
        for source in [Origin::Kafka, Origin::Cassandra] {
            self.source(source, false);
            for outcome in ["ok", "error"] {
                self.reads.with_label_values(&[source.name(), outcome]).reset();
            }
            self.read_seconds.with_label_values(&[source.name()]);
        }
        self
    }

    /// The registry that `/metrics` exports.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// The gauge of open event streams.
    pub fn watchers(&self) -> &IntGauge {
        &self.watchers
    }

    /// Records one read from a server.
    pub fn read(&self, source: Origin, took: Duration, ok: bool) {
        self.reads.with_label_values(&[source.name(), if ok { "ok" } else { "error" }]).inc();
        self.read_seconds.with_label_values(&[source.name()]).observe(took.as_secs_f64());
    }

    /// Records whether the latest figures of a server are known.
    pub fn source(&self, source: Origin, up: bool) {
        self.up.with_label_values(&[source.name()]).set(i64::from(up));
    }

    /// Exports an overview. Removes the series of figures that are unknown.
    pub fn overview(&self, overview: &Overview) {
        let s = self.stream.as_str();
        set(&self.produced, &[s], overview.events_produced);
        set(&self.rows, &[s], overview.rows_written);
        set(&self.records, &[s, "event"], overview.rows_written);
        set(&self.records, &[s, "duplicate"], overview.duplicates);
        set(&self.records, &[s, "revised"], overview.revised);
        set(&self.records, &[s, "dead_letter"], overview.dead_letters);
        set(&self.records, &[s, "late_event"], overview.late);
        set(&self.replicas, &[s, "factor"], overview.replication.map(|r| r.factor as i64));
        set(&self.replicas, &[s, "in_sync"], overview.replication.map(|r| r.in_sync as i64));
        set_float(&self.rate, &[s, "now"], overview.rate_now);
        set_float(&self.rate, &[s, "average"], overview.rate_average);
        set_float(&self.rate, &[s, "peak"], overview.rate_peak);
        match &overview.partitions {
            None => {
                self.lag_messages.reset();
                self.lag_seconds.reset();
            }
            Some(partitions) => {
                for partition in partitions {
                    let id = partition.partition.to_string();
                    set(&self.lag_messages, &[s, &id], partition.lag_messages);
                    set_float(&self.lag_seconds, &[s, &id], partition.lag_seconds);
                }
            }
        }
    }
}

fn set(gauge: &IntGaugeVec, labels: &[&str], value: Option<i64>) {
    match value {
        Some(value) => gauge.with_label_values(labels).set(value),
        // Removing a series that does not exist returns an error, which is harmless.
        None => drop(gauge.remove_label_values(labels)),
    }
}

fn set_float(gauge: &GaugeVec, labels: &[&str], value: Option<f64>) {
    match value {
        Some(value) => gauge.with_label_values(labels).set(value),
        None => drop(gauge.remove_label_values(labels)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::overview::{Known, ProgressRow, StoreFacts, assemble};
    use crate::rates::Rates;
    use crate::reason::Reason;
    use prometheus::TextEncoder;

    #[test]
    fn a_figure_that_becomes_unknown_loses_its_series() {
        let metrics = Metrics::new("s", 1).unwrap();
        let text = || TextEncoder::new().encode_to_string(&metrics.registry().gather()).unwrap();
        let progress = ProgressRow { next_offset: 7, events: 7, ..ProgressRow::default() };
        let rates = Rates { now: 1.0, average: 1.0, peak: 1.0 };
        let store = StoreFacts { progress: [(0, progress)].into(), rates };
        let reason = || Reason::new(Origin::Kafka, "down");
        let show = |store| {
            let known = Known { store, kafka: Err(reason()), holders: Err(reason()) };
            metrics.overview(&assemble("s", 0, &known));
        };
        show(Ok(store));
        assert!(text().contains("dashboard_cassandra_rows{stream=\"s\"} 7"), "{}", text());
        assert!(!text().contains("dashboard_lag_messages{"), "{}", text());
        show(Err(reason()));
        assert!(!text().contains("dashboard_cassandra_rows{"), "{}", text());
        assert!(text().contains("dashboard_source_up{source=\"kafka\"} 0"), "{}", text());
    }
}
