//! Creates and registers metrics, and defines the metrics that every service exports. Each service defines all of its
//! other metrics in its own `metrics.rs`.

use prometheus::{
    CounterVec, Error, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, core::Collector,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

/// Creates metrics and registers them in its registry.
#[derive(Debug, Default)]
pub struct MetricFactory {
    /// The registry that `/metrics` exports.
    pub registry: Registry,
}

impl MetricFactory {
    /// A factory whose registry contains the process metrics and `pipeline_build_info`.
    pub fn new(service: &str, version: &str) -> Result<MetricFactory, Error> {
        let factory = MetricFactory::default();
        factory.registry.register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))?;
        let build = factory.gauges(
            "pipeline_build_info",
            "Always 1; the labels name the service and its version",
            &["service", "version"],
        )?;
        build.with_label_values(&[service, version]).set(1);
        Ok(factory)
    }

    fn registered<C: Collector + Clone + 'static>(&self, metric: Result<C, Error>) -> Result<C, Error> {
        let metric = metric?;
        self.registry.register(Box::new(metric.clone()))?;
        Ok(metric)
    }

    /// An integer counter.
    pub fn counter(&self, name: &str, help: &str) -> Result<IntCounter, Error> {
        self.registered(IntCounter::new(name, help))
    }

    /// Integer counters with labels.
    pub fn counters(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, Error> {
        self.registered(IntCounterVec::new(Opts::new(name, help), labels))
    }

    /// Floating-point counters with labels, for amounts such as seconds.
    pub fn amounts(&self, name: &str, help: &str, labels: &[&str]) -> Result<CounterVec, Error> {
        self.registered(CounterVec::new(Opts::new(name, help), labels))
    }

    /// An integer gauge.
    pub fn gauge(&self, name: &str, help: &str) -> Result<IntGauge, Error> {
        self.registered(IntGauge::new(name, help))
    }

    /// Integer gauges with labels.
    pub fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntGaugeVec, Error> {
        self.registered(IntGaugeVec::new(Opts::new(name, help), labels))
    }

    /// Floating-point gauges with labels.
    pub fn levels(&self, name: &str, help: &str, labels: &[&str]) -> Result<GaugeVec, Error> {
        self.registered(GaugeVec::new(Opts::new(name, help), labels))
    }

    /// An integer gauge that exports no series until it has a value.
    pub fn eventual(&self, name: &str, help: &str) -> Result<Eventual, Error> {
        Ok(Eventual { series: self.gauges(name, help, &[])?, highest: Arc::default() })
    }

    /// A histogram with these upper bounds.
    pub fn histogram(&self, name: &str, help: &str, bounds: &[f64]) -> Result<Histogram, Error> {
        self.registered(Histogram::with_opts(HistogramOpts::new(name, help).buckets(bounds.to_vec())))
    }

    /// Histograms with labels and these upper bounds.
    pub fn histograms(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
        bounds: &[f64],
    ) -> Result<HistogramVec, Error> {
        self.registered(HistogramVec::new(HistogramOpts::new(name, help).buckets(bounds.to_vec()), labels))
    }
}

/// A gauge that exports no series until it has a value. A timestamp gauge needs this: 0 would mean that the event
/// happened in 1970.
#[derive(Debug, Clone)]
pub struct Eventual {
    series: IntGaugeVec,
    highest: Arc<AtomicI64>,
}

impl Eventual {
    /// Sets the value.
    pub fn set(&self, value: i64) {
        self.series.with_label_values(&[] as &[&str]).set(value);
    }

    /// Sets the value to the highest one passed to this method so far. Exports nothing while that is not positive.
    pub fn raise(&self, value: i64) {
        let highest = self.highest.fetch_max(value, Ordering::Relaxed).max(value);
        if highest > 0 {
            self.set(highest);
        }
    }
}

/// Label of a request that matches no route.
const OTHER_ROUTE: &str = "other";
/// Classes of HTTP status, as labels.
const CLASSES: [&str; 5] = ["1xx", "2xx", "3xx", "4xx", "5xx"];
/// Upper bounds of the histogram of response times, in seconds.
const RESPONSE_SECONDS: [f64; 9] = [0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0];

/// Metrics of HTTP requests. The `route` label is a route of the router, so clients cannot create new series.
#[derive(Debug, Clone)]
pub struct HttpMetrics {
    requests: IntCounterVec,
    seconds: HistogramVec,
    active: IntGauge,
}

impl HttpMetrics {
    /// Registers the metrics. Fails if `registry` already contains them.
    pub fn new(registry: &Registry) -> Result<HttpMetrics, Error> {
        let make = MetricFactory { registry: registry.clone() };
        let seconds = "Time from a request to the start of its response";
        let requests = "HTTP requests by route and status class";
        let metrics = HttpMetrics {
            requests: make.counters("pipeline_http_requests_total", requests, &["route", "status"])?,
            seconds: make.histograms(
                "pipeline_http_request_seconds",
                seconds,
                &["route"],
                &RESPONSE_SECONDS,
            )?,
            active: make.gauge("pipeline_http_requests_active", "HTTP requests in progress")?,
        };
        for status in ["2xx", "5xx"] {
            metrics.requests.with_label_values(&["/metrics", status]);
        }
        Ok(metrics)
    }

    /// Counts a request in progress. The caller calls [`HttpMetrics::request_finished`] once for each.
    pub(crate) fn request_started(&self) {
        self.active.inc();
    }

    /// Counts a finished request. `route` is `None` if no route matched.
    pub(crate) fn request_finished(&self, route: Option<&str>, status: u16, took: Duration) {
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
    fn a_gauge_without_a_value_has_no_series_and_the_latest_timestamp_wins() {
        let make = MetricFactory::default();
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
