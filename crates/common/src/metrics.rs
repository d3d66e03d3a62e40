//! Makes metrics and registers them at once; and those that every service has. What all others are called and say is each
//! service's own `metrics.rs`.

use prometheus::{
    CounterVec, Error, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, core::Collector,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

/// A registry that is being filled.
#[derive(Debug, Default)]
pub struct Maker {
    /// What `/metrics` gathers.
    pub registry: Registry,
}

impl Maker {
    /// A registry with the process's own figures and `pipeline_build_info`, as every service has it.
    pub fn new(service: &str, version: &str) -> Result<Maker, Error> {
        let maker = Maker::default();
        maker.registry.register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))?;
        let build = maker.gauges(
            "pipeline_build_info",
            "Always 1; the labels say what runs",
            &["service", "version"],
        )?;
        build.with_label_values(&[service, version]).set(1);
        Ok(maker)
    }

    fn registered<C: Collector + Clone + 'static>(&self, made: Result<C, Error>) -> Result<C, Error> {
        let made = made?;
        self.registry.register(Box::new(made.clone()))?;
        Ok(made)
    }

    /// A whole number that only rises.
    pub fn counter(&self, name: &str, help: &str) -> Result<IntCounter, Error> {
        self.registered(IntCounter::new(name, help))
    }

    /// Whole numbers that only rise, by label.
    pub fn counters(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, Error> {
        self.registered(IntCounterVec::new(Opts::new(name, help), labels))
    }

    /// Amounts such as seconds that only rise, by label.
    pub fn amounts(&self, name: &str, help: &str, labels: &[&str]) -> Result<CounterVec, Error> {
        self.registered(CounterVec::new(Opts::new(name, help), labels))
    }

    /// A whole number.
    pub fn gauge(&self, name: &str, help: &str) -> Result<IntGauge, Error> {
        self.registered(IntGauge::new(name, help))
    }

    /// Whole numbers by label.
    pub fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntGaugeVec, Error> {
        self.registered(IntGaugeVec::new(Opts::new(name, help), labels))
    }

    /// Numbers by label.
    pub fn levels(&self, name: &str, help: &str, labels: &[&str]) -> Result<GaugeVec, Error> {
        self.registered(GaugeVec::new(Opts::new(name, help), labels))
    }

    /// A whole number without a series until it has a value.
    pub fn eventual(&self, name: &str, help: &str) -> Result<Eventual, Error> {
        Ok(Eventual { series: self.gauges(name, help, &[])?, highest: Arc::default() })
    }

    /// How often what was observed lay below each of `bounds`.
    pub fn histogram(&self, name: &str, help: &str, bounds: &[f64]) -> Result<Histogram, Error> {
        self.registered(Histogram::with_opts(HistogramOpts::new(name, help).buckets(bounds.to_vec())))
    }

    /// The same by label.
    pub fn histograms(
        &self,
        (name, help): (&str, &str),
        labels: &[&str],
        bounds: &[f64],
    ) -> Result<HistogramVec, Error> {
        self.registered(HistogramVec::new(HistogramOpts::new(name, help).buckets(bounds.to_vec()), labels))
    }
}

/// A gauge without a series until it has a value: a time of something that has never happened would be one in 1970 as 0.
#[derive(Debug, Clone)]
pub struct Eventual {
    series: IntGaugeVec,
    highest: Arc<AtomicI64>,
}

impl Eventual {
    /// Gives it a value.
    pub fn set(&self, value: i64) {
        self.series.with_label_values(&[] as &[&str]).set(value);
    }

    /// Gives it a positive value, unless a higher one was raised before.
    pub fn raise(&self, value: i64) {
        let highest = self.highest.fetch_max(value, Ordering::Relaxed).max(value);
        if highest > 0 {
            self.set(highest);
        }
    }
}

/// Label of a request that no route takes.
const OTHER_ROUTE: &str = "other";
/// Classes of HTTP status, as labels.
const CLASSES: [&str; 5] = ["1xx", "2xx", "3xx", "4xx", "5xx"];
/// Upper bounds in seconds of the time until an answer begins.
const ANSWER_SECONDS: [f64; 9] = [0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0];

/// Requests to a service. Routes are those of its router, so labels are bounded whatever is asked.
#[derive(Debug, Clone)]
pub struct HttpMetrics {
    requests: IntCounterVec,
    seconds: HistogramVec,
    active: IntGauge,
}

impl HttpMetrics {
    /// Registers them; once per registry.
    pub fn new(registry: &Registry) -> Result<HttpMetrics, Error> {
        let make = Maker { registry: registry.clone() };
        let seconds = ("pipeline_http_request_seconds", "Time until an answer begins");
        let requests = "Requests answered, by route and class of status";
        let metrics = HttpMetrics {
            requests: make.counters("pipeline_http_requests_total", requests, &["route", "status"])?,
            seconds: make.histograms(seconds, &["route"], &ANSWER_SECONDS)?,
            active: make.gauge("pipeline_http_requests_active", "Requests not answered yet")?,
        };
        for status in ["2xx", "5xx"] {
            metrics.requests.with_label_values(&["/metrics", status]);
        }
        Ok(metrics)
    }

    /// A request has come; [`HttpMetrics::answered`] follows.
    pub(crate) fn asked(&self) {
        self.active.inc();
    }

    /// How it was answered, by which route.
    pub(crate) fn answered(&self, route: Option<&str>, status: u16, took: Duration) {
        let route = route.unwrap_or(OTHER_ROUTE);
        let class = CLASSES[usize::from(status / 100).clamp(1, CLASSES.len()) - 1];
        self.active.dec();
        self.requests.with_label_values(&[route, class]).inc();
        self.seconds.with_label_values(&[route]).observe(took.as_secs_f64());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus::TextEncoder;

    #[test]
    fn what_has_never_happened_has_no_series_and_the_latest_time_counts() {
        let make = Maker::default();
        let success = make.eventual("last_success_timestamp_seconds", "When it last succeeded.").unwrap();
        let text = || TextEncoder::new().encode_to_string(&make.registry.gather()).unwrap();
        assert_eq!(text(), "");
        success.raise(0);
        assert_eq!(text(), "");
        success.raise(1_800_000_000);
        success.raise(1_700_000_000);
        assert!(text().ends_with("\nlast_success_timestamp_seconds 1800000000\n"), "{}", text());
    }
}
