//! The command line of `local-stack`. `./run` and `./test` accept the same commands and flags.

use clap::{Args, Parser, Subcommand};

use crate::config::PlaceArgs;
use crate::forward::Forwarded;

/// Runs the whole pipeline on one machine: Kafka, Cassandra, the services and Prometheus
#[derive(Debug, Parser)]
#[command(name = "local-stack", version, args_conflicts_with_subcommands = true)]
pub struct Cli {
    /// Command to run; without one, everything is started.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Options of the default command, `up`.
    #[command(flatten)]
    pub up: UpArgs,
}

/// Commands of `local-stack`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start everything (the default)
    Up(UpArgs),
    /// Stop everything
    Stop,
    /// Show the state of every process
    Status(StatusArgs),
    /// Print the log of a service
    Logs(LogsArgs),
    /// Delete the data, logs and checkpoints of this checkout; fails while anything is running
    Reset,
    /// Report missing prerequisites without changing anything
    Doctor(PlaceArgs),
    /// Download the servers into the cache
    Fetch(PlaceArgs),
    /// Serve the simulated REST APIs of the shipped stream definitions
    Source(Forwarded),
    /// Run the tests of this checkout; ./test installs what they need
    Test(Forwarded),
    /// Measure throughput, latency and memory on private servers
    Bench(Forwarded),
    /// Inject random faults under load on private servers, then compare all results with the log in Kafka
    Soak(Forwarded),
}

/// Options of `up`.
#[derive(Args, Clone, Debug)]
pub struct UpArgs {
    /// Return when everything is ready; a supervisor in the background restarts what fails until ./run stop
    #[arg(long)]
    pub detach: bool,
    /// Run as the supervisor of --detach
    #[arg(long, hide = true, conflicts_with = "detach")]
    pub supervise: bool,
    /// Start Kafka and Cassandra only
    #[arg(long)]
    pub servers_only: bool,
    /// Ports and cache folder.
    #[command(flatten)]
    pub place: PlaceArgs,
}

/// Options of `status`.
#[derive(Args, Debug)]
pub struct StatusArgs {
    /// Print a JSON array instead of a table
    #[arg(long)]
    pub json: bool,
}

/// Options of `logs`.
#[derive(Args, Debug)]
pub struct LogsArgs {
    /// One of kafka, cassandra, source, init, ingest-producer, stream-processor, metrics-dashboard, prometheus or
    /// supervisor
    pub service: String,
    /// Keep printing new lines
    #[arg(short, long)]
    pub follow: bool,
    /// Number of existing lines to print, counted from the end of the log
    #[arg(short = 'n', long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(0..=100_000))]
    pub lines: u32,
}
