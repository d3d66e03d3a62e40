//! What `stress` says while and after it runs.

use super::StressContext;
use hdrhistogram::Histogram;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use std::fmt;
use std::io::IsTerminal;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// The outcome of one `stress`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Messages handed to Kafka's client.
    pub messages: u64,
    /// Messages acknowledged.
    pub acked: u64,
    /// Messages not delivered.
    pub failures: u64,
    /// Why the first was not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_failure: Option<String>,
    /// From the first message to the last acknowledgement.
    pub seconds: f64,
    /// Acknowledged messages per second.
    pub messages_per_second: f64,
    /// Mean size of a value.
    pub value_bytes: u64,
    /// From intended send time to acknowledgement, in milliseconds.
    pub ack_ms: Latency,
}

/// Percentiles in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Latency {
    /// Half were faster.
    pub p50: f64,
    /// 99 of 100 were faster.
    pub p99: f64,
    /// The slowest.
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

/// On a terminal only; hidden elsewhere.
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
