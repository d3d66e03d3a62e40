//! Settings and commands: flag, then `PIPELINE_…` in the environment, then the file of `--config`, then the default. The
//! only place that reads the environment.

use clap::{Args, Parser, Subcommand};
use common::config::CommonArgs;
use common::control::MAX_ACTIVE_RUNS;
use common::run_ledger::{Reprocess, RunState};
use common::stream::redacted;
use serde::{Serialize, Serializer};
use std::net::SocketAddr;

/// Fetches events from a REST API on a schedule that survives outages, and produces them to Kafka.
#[derive(Debug, Clone, Parser, Serialize)]
#[command(name = "ingest-producer", version)]
pub struct Config {
    /// Settings of every service.
    #[command(flatten)]
    #[serde(flatten)]
    pub common: CommonArgs,
    /// Replaces scheme, host and port of the stream definition's source URL
    #[arg(long, global = true, env = "PIPELINE_SOURCE_ORIGIN", value_name = "ORIGIN")]
    #[serde(serialize_with = "shown_origin")]
    pub source_origin: Option<String>,
    /// Seconds a run's lease holds without renewal: after a crash its interval waits as long
    #[arg(long, global = true, env = "PIPELINE_LEASE_SECONDS", default_value_t = 30,
          value_parser = clap::value_parser!(u32).range(3..=3600))]
    pub lease_seconds: u32,
    /// What to do.
    #[command(subcommand)]
    #[serde(skip)]
    pub command: Command,
}

/// What can be done.
#[derive(Debug, Clone, Subcommand)]
pub enum Command {
    /// Run every interval of the schedule, until stopped
    Run(RunArgs),
    /// Produce made-up events as fast as wanted, and measure it
    Stress(StressArgs),
    /// Look at the source of a stream definition
    #[command(subcommand)]
    Source(SourceCommand),
    /// Look at the run ledger and correct it
    #[command(subcommand)]
    Runs(RunsCommand),
    /// Run the intervals of a span of the past
    Backfill {
        /// Which intervals, and how.
        #[command(flatten)]
        args: BackfillArgs,
        /// Only say what would be run
        #[arg(long)]
        dry_run: bool,
    },
    /// Ask running producers to do something, through the control topic
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
    /// How many messages [default: 100000, or as many as fit into --seconds]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=100_000_000_000))]
    pub messages: Option<u64>,
    /// Messages per second; 0: as fast as possible
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(0..=100_000_000))]
    pub rate: u64,
    /// End after so many seconds
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=604_800))]
    pub seconds: Option<u64>,
    /// Size of each value; shorter ones are filled up by a field `padding` [default: as they come, about 250]
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub payload_bytes: Option<u32>,
    /// Messages in a hundred that repeat an earlier one, id and time included
    #[arg(long, value_name = "PERCENT", default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=99))]
    pub duplicates: u8,
    /// Event times rise evenly from so long ago to now, as a backfill's do; needs --messages [default: all are now]
    #[arg(long, value_name = "LENGTH", requires = "messages", value_parser = length_ms)]
    pub span: Option<i64>,
    /// Threads that send
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=16))]
    pub senders: u8,
    /// One JSON object instead of the closing line
    #[arg(long)]
    pub json: bool,
}

fn length_ms(text: &str) -> Result<i64, String> {
    common::windows::length_ms("span", text).map_err(|e| e.to_string())
}

/// What can be done with a source.
#[derive(Debug, Clone, Subcommand)]
pub enum SourceCommand {
    /// Fetch one page twice and show the events it would become, without producing anything
    Check(CheckArgs),
}

/// Settings of `source check`.
#[derive(Debug, Clone, Args)]
pub struct CheckArgs {
    /// How many events to show
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub events: u32,
    /// One JSON array instead of a table
    #[arg(long)]
    pub json: bool,
}

/// What can be done with the ledger.
#[derive(Debug, Clone, Subcommand)]
pub enum RunsCommand {
    /// List runs, newest first
    List(ListArgs),
    /// Show one run with its attempts
    Show(ShowArgs),
    /// Make runs due again, whatever became of them
    Clear(SpanArgs),
    /// Accept that intervals stay without data: they are not tried again, and no longer counted as unresolved
    GiveUp(SpanArgs),
}

/// Settings of `runs list`.
#[derive(Debug, Clone, Args)]
pub struct ListArgs {
    /// Only runs in this state
    #[arg(long, value_parser = |s: &str| s.parse::<RunState>().map_err(|e| e.to_string()))]
    pub state: Option<RunState>,
    /// Intervals that begin at or after this time, RFC 3339 [default: a day ago]
    #[arg(long, value_parser = time)]
    pub from: Option<i64>,
    /// Intervals that begin before this time, RFC 3339 [default: now]
    #[arg(long, value_parser = time)]
    pub to: Option<i64>,
    /// How many at most
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub limit: u32,
    /// One JSON array instead of a table
    #[arg(long)]
    pub json: bool,
}

/// Settings of `runs show`.
#[derive(Debug, Clone, Args)]
pub struct ShowArgs {
    /// Start of its interval, RFC 3339
    #[arg(value_parser = time)]
    pub start: i64,
    /// One JSON object instead of text
    #[arg(long)]
    pub json: bool,
}

/// Settings of `runs clear` and `runs give-up`.
#[derive(Debug, Clone, Args)]
pub struct SpanArgs {
    /// Intervals that begin at or after this time, RFC 3339
    #[arg(long, value_parser = time)]
    pub from: i64,
    /// Intervals that begin before this time, RFC 3339
    #[arg(long, value_parser = time)]
    pub to: i64,
    /// Only runs in this state
    #[arg(long, value_parser = |s: &str| s.parse::<RunState>().map_err(|e| e.to_string()))]
    pub state: Option<RunState>,
}

/// Settings of `backfill` and `control backfill`.
#[derive(Debug, Clone, Args)]
pub struct BackfillArgs {
    /// Intervals that begin at or after this time, RFC 3339
    #[arg(long, value_parser = time)]
    pub from: i64,
    /// Intervals that begin before this time, RFC 3339
    #[arg(long, value_parser = time)]
    pub to: i64,
    /// Which runs that are over are run again
    #[arg(long, default_value = "none")]
    pub reprocess: Reprocess,
    /// Most runs at once
    #[arg(long, default_value_t = 2,
          value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_ACTIVE_RUNS)))]
    pub max_active_runs: u32,
    /// Begin with the newest interval
    #[arg(long)]
    pub newest_first: bool,
}

/// Settings of `control`.
#[derive(Debug, Clone, Args)]
pub struct ControlArgs {
    /// What to ask for.
    #[command(subcommand)]
    pub command: ControlCommand,
    /// Wait for the outcome; exit code 1 where it is not `done`
    #[arg(long, global = true)]
    pub wait: bool,
    /// JSON instead of text
    #[arg(long, global = true)]
    pub json: bool,
    /// The command is not begun after so many seconds
    #[arg(long, global = true, default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub expires_seconds: u32,
}

/// What can be asked for. Bounds are the producer's: it refuses what is beyond them, and says so in `control_log`.
#[derive(Debug, Clone, Subcommand)]
pub enum ControlCommand {
    /// Made-up events, as fast as possible
    Produce {
        /// How many
        #[arg(long)]
        messages: u64,
    },
    /// Made-up events at a rate
    Spike {
        /// Messages per second
        #[arg(long)]
        rate: u64,
        /// For how long
        #[arg(long)]
        seconds: u64,
    },
    /// Stop commands that go on
    Cancel {
        /// Which [default: all]
        #[arg(long)]
        id: Option<String>,
    },
    /// Run the intervals of a span of the past
    Backfill(BackfillArgs),
    /// Make runs due again, whatever became of them
    Clear(SpanArgs),
    /// Begin nothing new of the schedule
    Pause,
    /// Begin it again
    Resume,
    /// List the commands of today and yesterday with their outcomes
    Log {
        /// How many at most
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
        .map_err(|_| format!("`{text}` is no RFC 3339 time such as 2026-01-31T00:00:00Z"))
}

impl Config {
    /// Reads the command line, the environment and the settings file; a mistake ends the process with exit code 2.
    pub fn parse_all() -> Config {
        common::config::parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsString;

    fn parse(line: &str) -> Result<Config, String> {
        let arguments = line.split(' ').map(OsString::from).collect();
        common::config::parse_from(arguments, None).map_err(|e| e.to_string())
    }

    #[test]
    fn every_command_is_understood() {
        let lines = [
            "ingest-producer run --http-listen 127.0.0.1:0 --source-origin http://h:1",
            "ingest-producer stress --messages 500000 --rate 1000 --seconds 5 --payload-bytes 300 --duplicates 10 --json",
            "ingest-producer source check --events 3",
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
    fn mistakes_name_the_value_and_the_way_out() {
        let check = |line: &str, words: &str| {
            let error = parse(line).expect_err(line);
            assert!(error.contains(words), "`{words}` is not in {error}");
        };
        check("ingest-producer runs show yesterday", "no RFC 3339 time such as");
        check("ingest-producer runs list --state done", "one of scheduled, running");
        check("ingest-producer stress --duplicates 100", "0..=99");
        check("ingest-producer run --lease-seconds 1", "3..=3600");
    }
}
