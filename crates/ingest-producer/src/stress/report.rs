//! The progress bar and the report of `stress`.

use super::StressContext;
use hdrhistogram::Histogram;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use std::fmt;
use std::io::IsTerminal;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// The result of a `stress` run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Messages handed to the Kafka client.
    pub messages: u64,
    /// Messages acknowledged.
    pub acked: u64,
    /// Messages not delivered.
    pub failures: u64,
    /// Cause of the first failure; absent if there was none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_failure: Option<String>,
    /// Seconds from the first message to the last acknowledgement.
    pub seconds: f64,
    /// Acknowledged messages per second.
    pub messages_per_second: f64,
    /// Mean size of a value in bytes.
    pub value_bytes: u64,
    /// Latency from the due time of a message to its acknowledgement.
    pub ack_ms: Latency,
}

/// Latency percentiles in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Latency {
    /// Median.
    pub p50: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Maximum.
    pub max: f64,
}

impl Latency {
    fn of(latencies: &Histogram<u64>) -> Latency {
        let ms = |us: u64| us as f64 / 1000.0;
        Latency {
            p50: ms(latencies.value_at_quantile(0.5)),
            p99: ms(latencies.value_at_quantile(0.99)),
            max: ms(latencies.max()),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} messages in {:.2} s: {:.0} msg/s, ack latency p50 {:.1} ms p99 {:.1} ms, {} failures",
            self.messages,
            self.seconds,
            self.messages_per_second,
            self.ack_ms.p50,
            self.ack_ms.p99,
            self.failures
        )?;
        match &self.first_failure {
            Some(cause) => write!(f, " (first: {cause})"),
            None => Ok(()),
        }
    }
}

pub(super) fn report(context: &StressContext, messages: u64, took: Duration, value_bytes: u64) -> Report {
    let acked = context.acked.load(Ordering::Relaxed);
    Report {
        messages,
        acked,
        failures: context.failed.load(Ordering::Relaxed),
        first_failure: context.first_failure.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        seconds: took.as_secs_f64(),
        messages_per_second: acked as f64 / took.as_secs_f64().max(1e-9),
        value_bytes,
        ack_ms: Latency::of(&context.latencies.lock().unwrap_or_else(PoisonError::into_inner)),
    }
}

/// Creates the progress bar, which is hidden unless stderr is a terminal.
pub(super) fn progress_bar(total: u64, seconds: Option<u64>) -> ProgressBar {
    let counted = seconds.is_none() || total < u64::MAX;
    let bar = if counted { ProgressBar::new(total) } else { ProgressBar::no_length() };
    bar.set_draw_target(if std::io::stderr().is_terminal() {
        ProgressDrawTarget::stderr_with_hz(10)
    } else {
        ProgressDrawTarget::hidden()
    });
    let template = if counted {
        "{bar:40} {human_pos}/{human_len} acked, {per_sec}, {eta} left"
    } else {
        "{spinner} {human_pos} acked, {per_sec}, {elapsed}"
    };
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
