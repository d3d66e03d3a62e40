//! The processor under three loads other than a drain of new events: old events beside new ones, a steady rate with a kill, and a
//! backlog far larger than its memory.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::measure::Drained;
use super::{NAME, PRELOAD_WITHIN, finish, measure, stress};
use crate::cli::BenchArgs;
use crate::config::Settings;
use crate::error::{Error, Result};
use crate::process::Process;
use crate::servers::cassandra::connect;
use crate::servers::http_client;
use crate::services;
use crate::terminal::Terminal;

/// Events that make the present known before old ones come.
const NEW_EVENTS: u64 = 60_000;

/// Rate of the live load beside the old events.
const LIVE_RATE: u64 = 500;

/// Rate at which old events are produced: slow enough that new ones come in between.
const OLD_RATE: u64 = 50_000;

/// How long `verify` may take.
const VERIFY_WITHIN: Duration = Duration::from_secs(300);

/// How old the old events are at most: rising from there to now in the order of the log.
const OLD: &str = "7d";

/// Rate at which latency is measured.
const STEADY_RATE: u64 = 3000;

/// How long latency is measured, after a warm-up as long.
const STEADY_SECONDS: u64 = 30;

const LATENCY: &str = "processor_produce_to_commit_seconds";

/// Old events drained beside a live load.
#[derive(Debug, Serialize)]
pub(super) struct Cold {
    pub(super) old_events: u64,
    pub(super) live_events_per_second: u64,
    /// Old and live ones together.
    pub(super) events_per_second: f64,
    pub(super) cpu_seconds_per_million: f64,
    pub(super) peak_resident_mib: f64,
}

/// A steady rate, then a kill under it.
#[derive(Debug, Serialize)]
pub(super) struct Latency {
    pub(super) events_per_second: u64,
    /// Produced until readable, of the oldest event of each batch; upper bounds of the histogram's buckets.
    pub(super) p50_seconds: f64,
    pub(super) p99_seconds: f64,
    /// From the start of the new process until it has surely processed what its predecessor had not.
    pub(super) restart_to_new_rows_seconds: f64,
}

/// A long drain.
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

/// Drains old events with new ones among them, while more new ones keep coming; then holds the panes against the rows.
pub(super) async fn cold(private: &Settings, args: &BenchArgs, terminal: Terminal) -> Result<Cold> {
    stress(private, NAME, &["--messages", &NEW_EVENTS.to_string()]).await?;
    measure::drain(private, NAME, NEW_EVENTS, terminal).await?;
    // Long enough for the slowest drain; ended with it.
    let mut live = services::load(private, PRELOAD_WITHIN.as_secs(), LIVE_RATE)?;
    live.environment.extend(services::names(NAME));
    let mut live = Process::spawn(&live, &private.folders)?;
    let drained = old(private, args, terminal).await;
    live.stop().await;
    let drained = drained?;
    finish(private, NAME, services::verify(private)?, VERIFY_WITHIN).await?;
    Ok(Cold {
        old_events: args.messages,
        live_events_per_second: LIVE_RATE,
        events_per_second: args.messages as f64 / drained.whole.as_secs_f64(),
        cpu_seconds_per_million: drained.cpu_seconds / (args.messages as f64 / 1e6),
        peak_resident_mib: drained.peak_resident_mib,
    })
}

async fn old(private: &Settings, args: &BenchArgs, terminal: Terminal) -> Result<Drained> {
    let since = Instant::now();
    let (messages, rate) = (args.messages.to_string(), OLD_RATE.to_string());
    stress(private, NAME, &["--messages", &messages, "--span", OLD, "--rate", &rate]).await?;
    terminal.done("old events", &format!("{messages} over the last {OLD}"), since.elapsed());
    measure::drain(private, NAME, NEW_EVENTS + args.messages, terminal).await
}

/// Measures how long events take at a steady rate, and how long a killed processor's successor takes to new rows.
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
    terminal.done("latency", &format!("{STEADY_RATE} events a second"), Duration::from_secs(STEADY_SECONDS));
    processor.kill().await;
    let at_kill = measure::processed(&session, NAME).await?;
    let since = Instant::now();
    let mut processor = Process::spawn(&spec, &private.folders)?;
    // What was in flight at the kill is at most a second's load.
    while measure::processed(&session, NAME).await? < at_kill + STEADY_RATE {
        if let Some(status) = processor.ended() {
            return Err(processor.death(status));
        }
        tokio::time::sleep(measure::LOOK_EVERY).await;
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

/// Peak memory while a large backlog is drained.
pub(super) async fn backlog(private: &Settings, args: &BenchArgs, terminal: Terminal) -> Result<Backlog> {
    let since = Instant::now();
    stress(private, NAME, &["--messages", &args.messages.to_string()]).await?;
    terminal.done("backlog", &format!("{} events", args.messages), since.elapsed());
    let drained = measure::drain(private, NAME, args.messages, terminal).await?;
    Ok(Backlog::new(args.messages, &drained))
}

/// Cumulative counts by upper bound of the bucket.
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

/// The upper bound of the bucket that holds the quantile of what came between two readings.
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
    fn a_quantile_is_the_bound_of_its_bucket() {
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
