//! The processor's command line and settings.

use crate::start::RecoverPolicy;
use chrono::{DateTime, Utc};
use clap::{Args, Parser, Subcommand};
use common::config::CommonArgs;
use common::event::{MAX_EVENT_TIME_MS, MIN_EVENT_TIME_MS};
use serde::Serialize;
use std::net::SocketAddr;
use std::ops::Range;
use std::path::PathBuf;

/// Counts every event of a stream once: from Kafka into Cassandra, with windows, totals and a checkpoint.
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
    /// Make keyspace, tables and topics, or bring older ones forward; idempotent, refuses what it must not change
    Init(InitArgs),
    /// Process until told to stop
    Run(RunArgs),
    /// Recompute panes and totals from the rows, and print what differs
    Verify(VerifyArgs),
    /// Print tumbling or sliding windows, summed from the stored panes
    Windows(WindowsArgs),
    /// Look at dead letters, send them again, accept too many of them
    #[command(subcommand)]
    Dlq(DlqCommand),
    /// Look at the state files
    #[command(subcommand)]
    Checkpoint(CheckpointCommand),
    /// Have offsets skipped that cannot be read, so that a halted partition goes on
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
    /// Why, for the record
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
    /// Replicas that must have a record before it is acknowledged [default: 1 of up to 2 replicas, 2 of 3]
    #[arg(long, env = "PIPELINE_MIN_INSYNC_REPLICAS", value_parser = clap::value_parser!(i32).range(1..=9))]
    pub min_insync_replicas: Option<i32>,
    /// Seconds to wait for the servers
    #[arg(long, env = "PIPELINE_INIT_SECONDS", default_value_t = 60)]
    pub wait_seconds: u64,
    /// Events per second, for the printed estimate of rows per Cassandra partition
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
    /// Without a state file, or with one behind the progress row
    #[arg(long, env = "PIPELINE_RECOVER", default_value = "auto")]
    pub recover: RecoverPolicy,
    /// Walk again from the earliest offset; readers see nothing go back
    #[arg(long)]
    pub replay: bool,
    /// Records of one batch at most
    #[arg(long, env = "PIPELINE_BATCH_RECORDS", default_value_t = 8000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub batch_records: u32,
    /// Milliseconds to wait for a batch to fill
    #[arg(long, env = "PIPELINE_BATCH_MILLIS", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=5000))]
    pub batch_millis: u32,
    /// Requests to Cassandra in flight at most
    #[arg(long, env = "PIPELINE_IN_FLIGHT", default_value_t = 48, value_parser = clap::value_parser!(u32).range(1..=2048))]
    pub in_flight: u32,
    /// MiB of panes and seen keys per partition, before older panes are looked up instead
    #[arg(long, env = "PIPELINE_SEEN_MEMORY_MIB", default_value_t = 16, value_parser = clap::value_parser!(u32).range(3..=4096))]
    pub seen_memory_mib: u32,
    /// Records in a row that are no events, before the partition pauses
    #[arg(long, env = "PIPELINE_POISON_IN_A_ROW", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    pub poison_in_a_row: u32,
    /// Percent of 10,000 records that are no events, before the partition pauses
    #[arg(long, env = "PIPELINE_POISON_PERCENT", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub poison_percent: u32,
    /// Seconds a partition may take to stop when it moves elsewhere
    #[arg(long, env = "PIPELINE_REVOKE_SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=120))]
    pub revoke_seconds: u64,
    /// Seconds to wait for the servers at start
    #[arg(long, env = "PIPELINE_START_SECONDS", default_value_t = 20)]
    pub start_seconds: u64,
    /// For tests: SIGKILL to this process when it comes to a step for the N-th time, as STEP=N
    #[cfg(feature = "failpoints")]
    #[arg(long, hide = true)]
    #[serde(skip)]
    pub kill_at: Option<crate::kill_at::KillAt>,
}

/// Settings of `verify`.
#[derive(Debug, Clone, Default, Args, Serialize)]
pub struct VerifyArgs {
    /// Only this Kafka partition
    #[arg(long)]
    pub partition: Option<i32>,
    /// Compare rows and totals with Kafka's log too, as far as it is retained
    #[arg(long, conflicts_with = "rebuild")]
    pub kafka: bool,
    /// Write what the rows say, after TRUNCATE of the pane table; the processor must be stopped
    #[arg(long)]
    pub rebuild: bool,
    /// Only panes of events from this time on, such as 2026-11-01T00:00:00Z
    #[arg(long, value_name = "TIME", conflicts_with_all = ["kafka", "rebuild"])]
    pub from: Option<DateTime<Utc>>,
    /// Only panes of events before this time
    #[arg(long, value_name = "TIME", conflicts_with_all = ["kafka", "rebuild"])]
    pub to: Option<DateTime<Utc>>,
    /// MiB for event rows or keys; a pane or a log that needs more is read in several passes
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub memory_mib: u32,
    /// As JSON
    #[arg(long)]
    pub json: bool,
    /// Folder of the state files
    #[arg(long, env = "PIPELINE_CHECKPOINTS", default_value = "checkpoints")]
    pub checkpoints: PathBuf,
}

impl VerifyArgs {
    /// The event times asked for, in Unix milliseconds; `None`: all.
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
    /// From one window's start to the next one's [default: the size, so windows tumble]
    #[arg(long)]
    pub slide: Option<String>,
    /// Group-by column
    #[arg(long)]
    pub by: Option<String>,
    /// How far back from now [default: 1h]
    #[arg(long)]
    pub last: Option<String>,
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

/// What to do about dead letters.
#[derive(Debug, Subcommand)]
pub enum DlqCommand {
    /// List them with their reasons
    List {
        /// At most so many
        #[arg(long, default_value_t = 1000)]
        limit: u32,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Print one with all its headers
    Show {
        /// Its offset in the dead-letter topic
        #[arg(long)]
        offset: i64,
    },
    /// Send one or all again through the events topic
    Replay {
        /// Its offset in the dead-letter topic
        #[arg(long, required_unless_present = "all")]
        offset: Option<i64>,
        /// All of them
        #[arg(long)]
        all: bool,
    },
    /// Let a paused partition go on past its poison
    Accept {
        /// Kafka partition
        #[arg(long)]
        partition: i32,
        /// Poison below this offset is accepted
        #[arg(long)]
        up_to: i64,
    },
}

/// What to do with state files.
#[derive(Debug, Subcommand)]
pub enum CheckpointCommand {
    /// Print where each partition stands
    Show {
        /// Folder of the state files
        #[arg(long, env = "PIPELINE_CHECKPOINTS", default_value = "checkpoints")]
        checkpoints: PathBuf,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Read every state file whole and say whether it can be used; fails where one cannot
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
    fn no_option_of_a_command_hides_one_of_all() {
        let lines = [
            "stream-processor init --partitions 12",
            "stream-processor run --replay --recover refuse",
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
