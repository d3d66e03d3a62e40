//! The processor's command line and settings.

use crate::pipeline::start::RecoverPolicy;
use chrono::{DateTime, NaiveTime, Timelike, Utc};
use clap::{Args, Parser, Subcommand};
use common::contracts::event::{MAX_EVENT_TIME_MS, MIN_EVENT_TIME_MS};
use common::runtime::config::CommonArgs;
use serde::Serialize;
use std::net::SocketAddr;
use std::ops::Range;
use std::path::PathBuf;
use std::str::FromStr;

/// Writes events from Kafka to Cassandra and counts each exactly once, with windows, totals and checkpoints.
#[derive(Debug, Parser)]
#[command(name = "stream-processor", version)]
pub struct Cli {
    /// Settings of every service.
    #[command(flatten)]
    pub common: CommonArgs,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Create or upgrade the keyspace, tables and topics; idempotent
    Init(InitArgs),
    /// Process events until stopped
    Run(RunArgs),
    /// Recompute panes and totals from the event rows and report differences
    Verify(VerifyArgs),
    /// Print tumbling or sliding windows, summed from the stored panes
    Windows(WindowsArgs),
    /// Inspect and replay dead letters, and resume partitions paused by too many of them
    #[command(subcommand)]
    Dlq(DlqCommand),
    /// Inspect the state files
    #[command(subcommand)]
    Checkpoint(CheckpointCommand),
    /// Skip offsets that cannot be read, so that a halted partition continues
    Skip(SkipArgs),
}

/// Which offsets to skip.
#[derive(Debug, Clone, Args, Serialize)]
pub struct SkipArgs {
    /// Kafka partition
    #[arg(long)]
    pub partition: i32,
    /// First offset to skip
    #[arg(long)]
    pub from: i64,
    /// Offset after the last one to skip
    #[arg(long)]
    pub to: i64,
    /// Reason, stored with the skipped range
    #[arg(long, default_value = "")]
    pub reason: String,
}

/// Settings of `init`.
#[derive(Debug, Clone, Args, Serialize)]
pub struct InitArgs {
    /// Partitions of the events topic; never changed afterwards
    #[arg(long, env = "PIPELINE_PARTITIONS", default_value_t = 6, value_parser = clap::value_parser!(i32).range(1..=256))]
    pub partitions: i32,
    /// Replicas of each topic partition, and of each row in the datacenter
    #[arg(long, env = "PIPELINE_REPLICATION", default_value_t = 1, value_parser = clap::value_parser!(i32).range(1..=9))]
    pub replication: i32,
    /// Replicas that must store a record before it is acknowledged [default: half of the replicas, rounded up]
    #[arg(long, env = "PIPELINE_MIN_INSYNC_REPLICAS", value_parser = clap::value_parser!(i32).range(1..=9))]
    pub min_insync_replicas: Option<i32>,
    /// How long to wait for Kafka and Cassandra, in seconds
    #[arg(long, env = "PIPELINE_INIT_SECONDS", default_value_t = 60)]
    pub wait_seconds: u64,
    /// Expected events per second, for the printed estimate of rows per Cassandra partition
    #[arg(long, default_value_t = 1000)]
    pub expected_rate: u64,
}

/// Settings of `run`.
#[derive(Debug, Clone, Args, Serialize)]
pub struct RunArgs {
    /// Address of /healthz, /readyz and /metrics
    #[arg(long, env = "PIPELINE_HTTP_LISTEN", default_value = "127.0.0.1:9102")]
    pub http_listen: SocketAddr,
    /// Folder of the state files
    #[arg(long, env = "PIPELINE_CHECKPOINTS", default_value = "checkpoints")]
    pub checkpoints: PathBuf,
    /// Consumer group [default: stream-processor.<stream>]
    #[arg(long, env = "PIPELINE_GROUP_ID")]
    pub group_id: Option<String>,
    /// Without a usable state file: `auto` recovers exactly from Cassandra, `refuse` exits with code 3
    #[arg(long, env = "PIPELINE_RECOVER", default_value = "auto")]
    pub recover: RecoverPolicy,
    /// Reprocess from the earliest offset; readers never see a value decrease
    #[arg(long)]
    pub replay: bool,
    /// Maximum number of records in a batch
    #[arg(long, env = "PIPELINE_BATCH_RECORDS", default_value_t = 8000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub batch_records: u32,
    /// How long to wait for a batch to fill, in milliseconds
    #[arg(long, env = "PIPELINE_BATCH_MILLIS", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=5000))]
    pub batch_millis: u32,
    /// Maximum number of Cassandra requests in flight
    #[arg(long, env = "PIPELINE_IN_FLIGHT", default_value_t = 48, value_parser = clap::value_parser!(u32).range(1..=2048))]
    pub in_flight: u32,
    /// Memory for hot panes and seen keys per partition, in MiB; older panes are read back from Cassandra
    #[arg(long, env = "PIPELINE_SEEN_MEMORY_MIB", default_value_t = 16, value_parser = clap::value_parser!(u32).range(3..=4096))]
    pub seen_memory_mib: u32,
    /// Consecutive records that cannot be decoded before the partition pauses
    #[arg(long, env = "PIPELINE_POISON_IN_A_ROW", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    pub poison_in_a_row: u32,
    /// Percentage of 10,000 records that cannot be decoded at which the partition pauses
    #[arg(long, env = "PIPELINE_POISON_PERCENT", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub poison_percent: u32,
    /// How long a partition may take to stop, in seconds
    #[arg(long, env = "PIPELINE_REVOKE_SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=120))]
    pub revoke_seconds: u64,
    /// How long to wait for Kafka and Cassandra at startup, in seconds
    #[arg(long, env = "PIPELINE_START_SECONDS", default_value_t = 20)]
    pub start_seconds: u64,
    /// When to verify the day before, as a UTC time such as `02:30` or `02:30:15`; `off` never does
    #[arg(long, env = "PIPELINE_VERIFY_AT", default_value = "02:30")]
    pub verify_at: VerifyAt,
    /// For tests: send SIGKILL to this process when it reaches a step for the N-th time, as STEP=N
    #[cfg(feature = "failpoints")]
    #[arg(long, hide = true)]
    #[serde(skip)]
    pub kill_at: Option<crate::pipeline::kill_at::KillAt>,
}

/// When the daily verification starts: a time of day in UTC, or `None` for never.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct VerifyAt(Option<NaiveTime>);

impl VerifyAt {
    /// Milliseconds since midnight UTC. `None` for never.
    pub fn millis(self) -> Option<i64> {
        self.0.map(|at| i64::from(at.num_seconds_from_midnight()) * 1000)
    }
}

impl FromStr for VerifyAt {
    type Err = String;

    fn from_str(text: &str) -> Result<VerifyAt, String> {
        if text == "off" {
            return Ok(VerifyAt(None));
        }
        let parsed =
            NaiveTime::parse_from_str(text, "%H:%M").or_else(|_| NaiveTime::parse_from_str(text, "%H:%M:%S"));
        let at = parsed.map_err(|_| "use a UTC time such as 02:30 or 02:30:15, or `off`".to_owned())?;
        Ok(VerifyAt(Some(at)))
    }
}

/// Settings of `verify`.
#[derive(Debug, Clone, Default, Args, Serialize)]
pub struct VerifyArgs {
    /// Only this Kafka partition
    #[arg(long)]
    pub partition: Option<i32>,
    /// Also compare rows and totals with the log in Kafka, as far as it is retained
    #[arg(long, conflicts_with = "rebuild")]
    pub kafka: bool,
    /// Rewrite the panes from the event rows; first stop the processor and TRUNCATE the pane table
    #[arg(long)]
    pub rebuild: bool,
    /// Only panes of events at or after this time, such as 2026-11-01T00:00:00Z
    #[arg(long, value_name = "TIME", conflicts_with_all = ["kafka", "rebuild"])]
    pub from: Option<DateTime<Utc>>,
    /// Only panes of events before this time
    #[arg(long, value_name = "TIME", conflicts_with_all = ["kafka", "rebuild"])]
    pub to: Option<DateTime<Utc>>,
    /// Memory for event rows or keys, in MiB; a pane or log that needs more is read in several passes
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub memory_mib: u32,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Folder of the state files
    #[arg(long, env = "PIPELINE_CHECKPOINTS", default_value = "checkpoints")]
    pub checkpoints: PathBuf,
}

impl VerifyArgs {
    /// The requested range of event times, in Unix milliseconds; `None` for all.
    pub fn span(&self) -> Option<Range<i64>> {
        (self.from.is_some() || self.to.is_some()).then(|| {
            let from = self.from.map_or(MIN_EVENT_TIME_MS, |at| at.timestamp_millis());
            from..self.to.map_or(MAX_EVENT_TIME_MS + 1, |at| at.timestamp_millis())
        })
    }
}

/// What `windows` prints.
#[derive(Debug, Clone, Args, Serialize)]
pub struct WindowsArgs {
    /// Length of a window, a multiple of the pane [default: the pane]
    #[arg(long)]
    pub size: Option<String>,
    /// Time between the starts of two windows [default: the size, so windows tumble]
    #[arg(long)]
    pub slide: Option<String>,
    /// Group-by column
    #[arg(long)]
    pub by: Option<String>,
    /// How far back from now [default: 1h]
    #[arg(long)]
    pub last: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// What to do about dead letters.
#[derive(Debug, Subcommand)]
pub enum DlqCommand {
    /// List dead letters with their reasons
    List {
        /// Maximum number of dead letters
        #[arg(long, default_value_t = 1000)]
        limit: u32,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Print a dead letter with all its headers
    Show {
        /// Offset in the dead-letter topic
        #[arg(long)]
        offset: i64,
    },
    /// Send one or all dead letters through the events topic again
    Replay {
        /// Offset in the dead-letter topic
        #[arg(long, required_unless_present = "all")]
        offset: Option<i64>,
        /// Replay all dead letters
        #[arg(long)]
        all: bool,
    },
    /// Resume a paused partition beyond its undecodable records
    Accept {
        /// Kafka partition
        #[arg(long)]
        partition: i32,
        /// Accept undecodable records below this offset
        #[arg(long)]
        up_to: i64,
    },
}

/// What to do with state files.
#[derive(Debug, Subcommand)]
pub enum CheckpointCommand {
    /// Print the committed position and totals of each partition
    Show {
        /// Folder of the state files
        #[arg(long, env = "PIPELINE_CHECKPOINTS", default_value = "checkpoints")]
        checkpoints: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Read every state file completely and report whether it is usable; exits with 1 if one is not
    Check {
        /// Folder of the state files
        #[arg(long, env = "PIPELINE_CHECKPOINTS", default_value = "checkpoints")]
        checkpoints: PathBuf,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_daily_verification_has_a_time_of_day_or_is_off() {
        let millis = |text: &str| text.parse::<VerifyAt>().map(VerifyAt::millis);
        assert_eq!(millis("off"), Ok(None));
        assert_eq!(millis("00:00"), Ok(Some(0)));
        assert_eq!(millis("02:30"), Ok(Some(9_000_000)));
        assert_eq!(millis("23:59:59"), Ok(Some(86_399_000)));
        for wrong in ["", "2", "24:00", "12:60", "02:30 ", "0 2 * * *", "never"] {
            assert!(millis(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn command_options_do_not_conflict_with_common_options() {
        let lines = [
            "stream-processor init --partitions 12",
            "stream-processor run --replay --recover refuse --verify-at 03:00",
            "stream-processor verify --kafka --partition 2 --memory-mib 64 --json --log debug",
            "stream-processor verify --from 2026-11-01T00:00:00Z --to 2026-11-02T00:00:00Z",
            "stream-processor windows --size 5m --slide 1m --by age --last 2h --json",
            "stream-processor dlq accept --partition 1 --up-to 7",
            "stream-processor checkpoint check --checkpoints here",
            "stream-processor skip --partition 2 --from 7 --to 9 --reason damaged",
        ];
        for line in lines {
            Cli::try_parse_from(line.split(' ')).unwrap_or_else(|e| panic!("{line}: {e}"));
        }
        let both = Cli::try_parse_from(["stream-processor", "verify", "--kafka", "--rebuild"]);
        assert!(both.unwrap_err().to_string().contains("--rebuild"));
    }
}
