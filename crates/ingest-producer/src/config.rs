//! Settings and commands. A flag overrides a `PIPELINE_…` environment variable, which overrides the `--config` file,
//! which overrides the default. Only this module reads the environment.

use clap::{Args, Parser, Subcommand};
use common::contracts::control::MAX_ACTIVE_RUNS;
use common::contracts::run_ledger::{Reprocess, RunState};
use common::contracts::stream::redacted;
use common::runtime::config::CommonArgs;
use serde::{Serialize, Serializer};
use std::net::SocketAddr;
use std::path::PathBuf;

/// Fetches events from a REST API on a schedule and produces them to Kafka.
#[derive(Debug, Clone, Parser, Serialize)]
#[command(name = "ingest-producer", version)]
pub struct Config {
    /// Settings of every service.
    #[command(flatten)]
    #[serde(flatten)]
    pub common: CommonArgs,
    /// Replaces scheme, host and port of the source URL in the stream definition
    #[arg(long, global = true, env = "PIPELINE_SOURCE_ORIGIN", value_name = "ORIGIN")]
    #[serde(serialize_with = "shown_origin")]
    pub source_origin: Option<String>,
    /// How long the lease of a run lasts without renewal, in seconds; after a crash its interval waits that long
    #[arg(long, global = true, env = "PIPELINE_LEASE_SECONDS", default_value_t = 30,
          value_parser = clap::value_parser!(u32).range(3..=3600))]
    pub lease_seconds: u32,
    /// The command to execute.
    #[command(subcommand)]
    #[serde(skip)]
    pub command: Command,
}

/// The commands of the producer.
#[derive(Debug, Clone, Subcommand)]
pub enum Command {
    /// Fetch every interval of the schedule until stopped
    Run(RunArgs),
    /// Produce synthetic events at a chosen rate and report throughput and latency
    Stress(StressArgs),
    /// Test the source of a stream definition
    #[command(subcommand)]
    Source(SourceCommand),
    /// Inspect and edit the run ledger
    #[command(subcommand)]
    Runs(RunsCommand),
    /// Fetch the intervals of a past time range
    Backfill {
        /// Which intervals to fetch, and how.
        #[command(flatten)]
        args: BackfillArgs,
        /// Only print what would be fetched
        #[arg(long)]
        dry_run: bool,
    },
    /// Send commands to running producers through the control topic
    Control(ControlArgs),
}

/// Settings of `run`.
#[derive(Debug, Clone, Args, Serialize)]
pub struct RunArgs {
    /// Address of /healthz, /readyz and /metrics
    #[arg(long, env = "PIPELINE_HTTP_LISTEN", default_value = "127.0.0.1:9101")]
    pub http_listen: SocketAddr,
}

/// Settings of `stress`.
#[derive(Debug, Clone, Args)]
pub struct StressArgs {
    /// Number of messages [default: 100000, or as many as fit into --seconds]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=100_000_000_000))]
    pub messages: Option<u64>,
    /// Messages per second; 0 means as fast as possible
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(0..=100_000_000))]
    pub rate: u64,
    /// Stop after this many seconds
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=604_800))]
    pub seconds: Option<u64>,
    /// Size of each value; shorter values are padded with a field `padding` [default: no padding, about 250]
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub payload_bytes: Option<u32>,
    /// Percentage of messages that repeat an earlier one, including its id and time
    #[arg(long, value_name = "PERCENT", default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=99))]
    pub duplicates: u8,
    /// Spread event times evenly over this period up to now, as a backfill does; requires --messages [default: all now]
    #[arg(long, value_name = "LENGTH", requires = "messages", value_parser = length_ms)]
    pub span: Option<i64>,
    /// Number of sender threads
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=16))]
    pub senders: u8,
    /// Print one JSON object instead of the summary line
    #[arg(long)]
    pub json: bool,
}

fn length_ms(text: &str) -> Result<i64, String> {
    common::readers::windows::length_ms("span", text).map_err(|e| e.to_string())
}

/// The commands for a source.
#[derive(Debug, Clone, Subcommand)]
pub enum SourceCommand {
    /// Walk the pages of an interval and print their events without producing them; exit code 1 if a record would become a
    /// dead letter
    Check(CheckArgs),
    /// Fetch one page of an unknown API and draft a stream definition from it, with a comment on every guess
    New(NewArgs),
}

/// Settings of `source new`.
#[derive(Debug, Clone, Args)]
pub struct NewArgs {
    /// URL of a page with records, as for a browser: with real values instead of placeholders
    pub url: String,
    /// Name of the stream [default: from the URL]
    #[arg(long)]
    pub name: Option<String>,
    /// Request header; may be given several times. Secrets are not written to the definition
    #[arg(long, value_name = "NAME: VALUE", value_parser = header)]
    pub header: Vec<(String, String)>,
    /// Allow private and loopback addresses
    #[arg(long)]
    pub allow_private: bool,
    /// Write the definition to this file, which must not exist [default: print it]
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

fn header(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once(':').ok_or("is not a header; write for example 'X-Api-Key: abc'")?;
    Ok((name.trim().to_owned(), value.trim().to_owned()))
}

/// Settings of `source check`.
#[derive(Debug, Clone, Args)]
pub struct CheckArgs {
    /// Most pages to fetch
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub pages: u32,
    /// Number of events to print
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub events: u32,
    /// Print a JSON object instead of a table
    #[arg(long)]
    pub json: bool,
}

/// The commands for the run ledger.
#[derive(Debug, Clone, Subcommand)]
pub enum RunsCommand {
    /// List runs, newest first
    List(ListArgs),
    /// Show one run with its attempts
    Show(ShowArgs),
    /// Schedule runs again, whatever their state
    Clear(SpanArgs),
    /// Give up intervals: they are not retried and no longer counted as unresolved
    GiveUp(SpanArgs),
}

/// Settings of `runs list`.
#[derive(Debug, Clone, Args)]
pub struct ListArgs {
    /// Include only runs in this state
    #[arg(long, value_parser = |s: &str| s.parse::<RunState>().map_err(|e| e.to_string()))]
    pub state: Option<RunState>,
    /// Intervals that start at or after this time, RFC 3339 [default: one day before --to]
    #[arg(long, value_parser = time)]
    pub from: Option<i64>,
    /// Intervals that start before this time, RFC 3339 [default: now]
    #[arg(long, value_parser = time)]
    pub to: Option<i64>,
    /// Maximum number of entries
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub limit: u32,
    /// Print a JSON array instead of a table
    #[arg(long)]
    pub json: bool,
}

/// Settings of `runs show`.
#[derive(Debug, Clone, Args)]
pub struct ShowArgs {
    /// Start of the interval of the run, RFC 3339
    #[arg(value_parser = time)]
    pub start: i64,
    /// Print a JSON object instead of text
    #[arg(long)]
    pub json: bool,
}

/// Settings of `runs clear` and `runs give-up`.
#[derive(Debug, Clone, Args)]
pub struct SpanArgs {
    /// Intervals that start at or after this time, RFC 3339
    #[arg(long, value_parser = time)]
    pub from: i64,
    /// Intervals that start before this time, RFC 3339
    #[arg(long, value_parser = time)]
    pub to: i64,
    /// Include only runs in this state
    #[arg(long, value_parser = |s: &str| s.parse::<RunState>().map_err(|e| e.to_string()))]
    pub state: Option<RunState>,
}

/// Settings of `backfill` and `control backfill`.
#[derive(Debug, Clone, Args)]
pub struct BackfillArgs {
    /// Intervals that start at or after this time, RFC 3339
    #[arg(long, value_parser = time)]
    pub from: i64,
    /// Intervals that start before this time, RFC 3339
    #[arg(long, value_parser = time)]
    pub to: i64,
    /// Which finished runs to fetch again
    #[arg(long, default_value = "none")]
    pub reprocess: Reprocess,
    /// Maximum number of concurrent runs
    #[arg(long, default_value_t = 2,
          value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_ACTIVE_RUNS)))]
    pub max_active_runs: u32,
    /// Start with the newest interval
    #[arg(long)]
    pub newest_first: bool,
}

/// Settings of `control`.
#[derive(Debug, Clone, Args)]
pub struct ControlArgs {
    /// The command to send.
    #[command(subcommand)]
    pub command: ControlCommand,
    /// Wait for the outcome; exit with 1 unless it is `done`
    #[arg(long, global = true)]
    pub wait: bool,
    /// Print JSON instead of text
    #[arg(long, global = true)]
    pub json: bool,
    /// How long the command may wait to be started, in seconds
    #[arg(long, global = true, default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub expires_seconds: u32,
}

/// The commands that can be sent. The producer checks their limits and records a refusal in `control_log`.
#[derive(Debug, Clone, Subcommand)]
pub enum ControlCommand {
    /// Produce synthetic events as fast as possible
    Produce {
        /// Number of messages
        #[arg(long)]
        messages: u64,
    },
    /// Produce synthetic events at a fixed rate
    Spike {
        /// Messages per second
        #[arg(long)]
        rate: u64,
        /// Duration in seconds
        #[arg(long)]
        seconds: u64,
    },
    /// Cancel running commands
    Cancel {
        /// Id of the command [default: all]
        #[arg(long)]
        id: Option<String>,
    },
    /// Fetch the intervals of a past time range
    Backfill(BackfillArgs),
    /// Schedule runs again, whatever their state
    Clear(SpanArgs),
    /// Pause the schedule: start no new runs
    Pause,
    /// Resume the schedule
    Resume,
    /// List the commands of today and yesterday with their outcomes
    Log {
        /// Maximum number of entries
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000))]
        limit: u32,
    },
}

fn shown_origin<S: Serializer>(origin: &Option<String>, serializer: S) -> Result<S::Ok, S::Error> {
    origin.as_deref().map(redacted).serialize(serializer)
}

fn time(text: &str) -> Result<i64, String> {
    chrono::DateTime::parse_from_rfc3339(text)
        .map(|at| at.timestamp_millis())
        .map_err(|_| format!("`{text}` is not an RFC 3339 time such as 2026-01-31T00:00:00Z"))
}

impl Config {
    /// Reads the command line, the environment and the settings file; an invalid setting ends the process with exit
    /// code 2.
    pub fn parse_all() -> Config {
        common::runtime::config::parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsString;

    fn parse(line: &str) -> Result<Config, String> {
        let arguments = line.split(' ').map(OsString::from).collect();
        common::runtime::config::parse_from(arguments, None).map_err(|e| e.to_string())
    }

    #[test]
    fn every_command_can_be_parsed() {
        let lines = [
            "ingest-producer run --http-listen 127.0.0.1:0 --source-origin http://h:1",
            "ingest-producer stress --messages 500000 --rate 1000 --seconds 5 --payload-bytes 300 --duplicates 10 --json",
            "ingest-producer source check --events 3",
            "ingest-producer source new http://h/items?page=1 --name mine --header X-Api-Version:2 --allow-private --output f",
            "ingest-producer runs list --state failed --from 2026-01-01T00:00:00Z",
            "ingest-producer runs show 2026-01-01T00:00:00Z --json",
            "ingest-producer runs clear --from 2026-01-01T00:00:00Z --to 2026-01-02T00:00:00Z --state failed",
            "ingest-producer runs give-up --from 2026-01-01T00:00:00Z --to 2026-01-02T00:00:00Z",
            "ingest-producer control spike --rate 3000 --seconds 10 --wait",
            "ingest-producer control pause --expires-seconds 5 --json",
            "ingest-producer control backfill --from 2026-01-01T00:00:00Z --to 2026-01-02T00:00:00Z --newest-first",
            "ingest-producer control log",
            "ingest-producer backfill --from 2026-01-01T00:00:00Z --to 2026-01-02T00:00:00Z --reprocess failed --dry-run",
        ];
        for line in lines {
            parse(line).unwrap_or_else(|e| panic!("{line}: {e}"));
        }
    }

    #[test]
    fn an_error_names_the_invalid_value_and_what_is_allowed() {
        let check = |line: &str, expected: &str| {
            let error = parse(line).expect_err(line);
            assert!(error.contains(expected), "`{expected}` is not in {error}");
        };
        check("ingest-producer runs show yesterday", "is not an RFC 3339 time such as");
        check("ingest-producer runs list --state done", "one of scheduled, running");
        check("ingest-producer stress --duplicates 100", "0..=99");
        check("ingest-producer run --lease-seconds 1", "3..=3600");
    }
}
