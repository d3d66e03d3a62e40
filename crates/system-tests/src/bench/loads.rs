//! Measures the processor under three more loads: old events with concurrent new ones, a steady rate with a kill, and a
//! backlog far larger than its memory.

use std::time::{Duration, Instant};

use local_stack::config::Settings;
use local_stack::error::{Error, Result};
use local_stack::process::Process;
use local_stack::servers::cassandra::connect;
use local_stack::servers::http_client;
use local_stack::services;
use local_stack::terminal::Terminal;
use serde::Serialize;

use super::measure::Drained;
use super::{NAME, PRELOAD_TIMEOUT, measure, run_to_end, stress};
use crate::cli::BenchArgs;

/// Number of new events drained before the old ones, so that the old events are old for the processor.
const NEW_EVENTS: u64 = 60_000;

/// Events per second of the live load during the drain of the old events.
const LIVE_RATE: u64 = 500;

/// Events per second at which the old events are produced, slow enough that new events come in between.
const OLD_RATE: u64 = 50_000;

/// Time limit for `verify`.
const VERIFY_TIMEOUT: Duration = Duration::from_secs(300);

/// Maximum age of the old events. Their times rise from this age to the present in log order.
const OLD: &str = "7d";

/// Events per second during the latency measurement.
const STEADY_RATE: u64 = 3000;

/// Duration of the latency measurement in seconds. A warm-up of the same duration precedes it.
const STEADY_SECONDS: u64 = 30;

const LATENCY: &str = "processor_produce_to_commit_seconds";

/// Results of draining old events under a live load.
#[derive(Debug, Serialize)]
pub(super) struct Cold {
    pub(super) old_events: u64,
    pub(super) live_events_per_second: u64,
    /// Old and live events together.
    pub(super) events_per_second: f64,
    pub(super) cpu_seconds_per_million: f64,
    pub(super) peak_resident_mib: f64,
}

/// Results of a steady rate, and of a kill at that rate.
#[derive(Debug, Serialize)]
pub(super) struct Latency {
    pub(super) events_per_second: u64,
    /// Time from production until the event is readable, for the oldest event of each batch. Quantiles are upper bounds
    /// of histogram buckets.
    pub(super) p50_seconds: f64,
    pub(super) p99_seconds: f64,
    /// Time from the start of the new process until it has certainly processed events that the killed one had not.
    pub(super) restart_to_new_rows_seconds: f64,
}

/// Results of draining a large backlog.
#[derive(Debug, Serialize)]
pub(super) struct Backlog {
    pub(super) messages: u64,
    pub(super) events_per_second: f64,
    pub(super) cpu_seconds_per_million: f64,
    pub(super) peak_resident_mib: f64,
}

impl Backlog {
    pub(super) fn new(messages: u64, drained: &Drained) -> Backlog {
        Backlog {
            messages,
            events_per_second: messages as f64 / drained.whole.as_secs_f64(),
            cpu_seconds_per_million: drained.cpu_seconds / (messages as f64 / 1e6),
            peak_resident_mib: drained.peak_resident_mib,
        }
    }
}

/// Drains old events mixed with new ones while a live load continues, then verifies the panes against the rows.
pub(super) async fn cold(private: &Settings, args: &BenchArgs, terminal: Terminal) -> Result<Cold> {
    stress(private, NAME, &["--messages", &NEW_EVENTS.to_string()]).await?;
    measure::drain(private, NAME, NEW_EVENTS, terminal).await?;
    // The load lasts longer than the slowest drain and is stopped after it.
    let mut live = services::load(private, PRELOAD_TIMEOUT.as_secs(), LIVE_RATE)?;
    live.environment.extend(services::names(NAME));
    let mut live = Process::spawn(&live, &private.folders)?;
    let drained = drain_old_events(private, args, terminal).await;
    live.stop().await;
    let drained = drained?;
    run_to_end(private, NAME, services::verify(private)?, VERIFY_TIMEOUT).await?;
    Ok(Cold {
        old_events: args.messages,
        live_events_per_second: LIVE_RATE,
        events_per_second: args.messages as f64 / drained.whole.as_secs_f64(),
        cpu_seconds_per_million: drained.cpu_seconds / (args.messages as f64 / 1e6),
        peak_resident_mib: drained.peak_resident_mib,
    })
}

async fn drain_old_events(private: &Settings, args: &BenchArgs, terminal: Terminal) -> Result<Drained> {
    let since = Instant::now();
    let (messages, rate) = (args.messages.to_string(), OLD_RATE.to_string());
    stress(private, NAME, &["--messages", &messages, "--span", OLD, "--rate", &rate]).await?;
    terminal.done("old events", &format!("{messages} over the last {OLD}"), since.elapsed());
    measure::drain(private, NAME, NEW_EVENTS + args.messages, terminal).await
}

/// Measures the latency at a steady rate, and how long a restarted processor takes to write new rows after SIGKILL.
pub(super) async fn latency(private: &Settings, terminal: Terminal) -> Result<Latency> {
    let session = connect(private).await?;
    let mut load = services::load(private, 4 * STEADY_SECONDS, STEADY_RATE)?;
    load.environment.extend(services::names(NAME));
    let mut load = Process::spawn(&load, &private.folders)?;
    let mut spec = services::processor(private)?;
    spec.environment.extend(services::names(NAME));
    let mut processor = Process::spawn(&spec, &private.folders)?;
    tokio::time::sleep(Duration::from_secs(STEADY_SECONDS)).await;
    let before = histogram(&spec.address).await?;
    tokio::time::sleep(Duration::from_secs(STEADY_SECONDS)).await;
    let after = histogram(&spec.address).await?;
    terminal.done(
        "latency",
        &format!("{STEADY_RATE} events per second"),
        Duration::from_secs(STEADY_SECONDS),
    );
    processor.kill().await;
    let at_kill = measure::processed(&session, NAME).await?;
    let since = Instant::now();
    let mut processor = Process::spawn(&spec, &private.folders)?;
    // At most the load of one second was in flight at the time of the kill.
    while measure::processed(&session, NAME).await? < at_kill + STEADY_RATE {
        if let Some(status) = processor.ended() {
            return Err(processor.exit_error(status));
        }
        tokio::time::sleep(measure::POLL_INTERVAL).await;
    }
    let new_rows = since.elapsed();
    terminal.done("restart", "new rows after SIGKILL", new_rows);
    processor.stop().await;
    load.stop().await;
    Ok(Latency {
        events_per_second: STEADY_RATE,
        p50_seconds: quantile(&before, &after, 0.5),
        p99_seconds: quantile(&before, &after, 0.99),
        restart_to_new_rows_seconds: new_rows.as_secs_f64(),
    })
}

/// Measures the peak memory while draining a large backlog.
pub(super) async fn backlog(private: &Settings, args: &BenchArgs, terminal: Terminal) -> Result<Backlog> {
    let since = Instant::now();
    stress(private, NAME, &["--messages", &args.messages.to_string()]).await?;
    terminal.done("backlog", &format!("{} events", args.messages), since.elapsed());
    let drained = measure::drain(private, NAME, args.messages, terminal).await?;
    Ok(Backlog::new(args.messages, &drained))
}

/// Reads the latency histogram: upper bound and cumulative count of each bucket.
async fn histogram(address: &str) -> Result<Vec<(f64, f64)>> {
    let failed = |cause: reqwest::Error| Error::Refused(format!("{address}/metrics: {cause}"));
    let client = http_client().map_err(failed)?;
    let answer = client.get(format!("{address}/metrics")).send().await.map_err(failed)?;
    Ok(buckets(&answer.text().await.map_err(failed)?))
}

fn buckets(text: &str) -> Vec<(f64, f64)> {
    let prefix = format!("{LATENCY}_bucket{{");
    let lines = text.lines().filter_map(|line| line.strip_prefix(&prefix));
    let bucket = |line: &str| {
        let (labels, count) = line.rsplit_once(' ')?;
        let bound = labels.split("le=\"").nth(1)?.split('"').next()?;
        Some((bound.parse().ok()?, count.parse().ok()?))
    };
    lines.filter_map(bucket).collect()
}

/// Returns the upper bound of the bucket that contains the quantile of all values between two readings.
fn quantile(before: &[(f64, f64)], after: &[(f64, f64)], share: f64) -> f64 {
    let counts: Vec<(f64, f64)> = after.iter().zip(before).map(|(a, b)| (a.0, a.1 - b.1)).collect();
    let all = counts.last().map_or(0.0, |(_, count)| *count);
    let found = counts.iter().find(|(_, count)| all > 0.0 && *count >= share * all);
    found.map_or(f64::NAN, |(bound, _)| *bound)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_is_the_upper_bound_of_its_bucket() {
        let reading = |counts: [u32; 3]| {
            let bounds = ["0.1", "0.2", "+Inf"];
            let line = |(bound, count)| format!("{LATENCY}_bucket{{le=\"{bound}\"}} {count}\n");
            buckets(&bounds.iter().zip(counts).map(line).collect::<String>())
        };
        let (before, after) = (reading([5, 5, 5]), reading([95, 104, 105]));
        assert_eq!((quantile(&before, &after, 0.5), quantile(&before, &after, 0.99)), (0.1, 0.2));
        assert!(quantile(&before, &before, 0.5).is_nan());
    }
}
