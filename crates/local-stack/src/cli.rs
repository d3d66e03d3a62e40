//! The command line of `local-stack`, which is also that of `./run` and `./test`.

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::config::PlaceArgs;
use crate::source::SourceArgs;

/// The whole pipeline on one machine: real Kafka, real Cassandra, the services and their page
#[derive(Debug, Parser)]
#[command(name = "local-stack", version, args_conflicts_with_subcommands = true)]
pub struct Cli {
    /// Without a command everything is started.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// How to start it.
    #[command(flatten)]
    pub up: UpArgs,
}

/// What can be done beside starting everything.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start everything (the default)
    Up(UpArgs),
    /// Stop everything in order
    Stop,
    /// Show what runs where
    Status(StatusArgs),
    /// Print the log of one part
    Logs(LogsArgs),
    /// Remove data, logs and checkpoints of this checkout; refused while something runs
    Reset,
    /// Report what this machine lacks, change nothing
    Doctor(PlaceArgs),
    /// Fetch the servers into the cache and end
    Fetch(PlaceArgs),
    /// Serve the simulated REST APIs of the shipped stream definitions
    Source(SourceArgs),
    /// Run tests of this checkout (./test sets up what they need)
    Test(TestArgs),
    /// Measure throughput on servers of its own
    Bench(BenchArgs),
    /// Strike processes and servers of its own at random under load, then compare everything with Kafka's log
    Soak(SoakArgs),
}

/// How to start everything.
#[derive(Args, Clone, Debug)]
pub struct UpArgs {
    /// Return when everything is ready; a supervisor in the background keeps it running until ./run stop
    #[arg(long)]
    pub detach: bool,
    /// Be that supervisor
    #[arg(long, hide = true, conflicts_with = "detach")]
    pub supervise: bool,
    /// Start Kafka and Cassandra only
    #[arg(long)]
    pub servers_only: bool,
    /// Ports and cache.
    #[command(flatten)]
    pub place: PlaceArgs,
}

/// How to show the state.
#[derive(Args, Debug)]
pub struct StatusArgs {
    /// One JSON array instead of a table
    #[arg(long)]
    pub json: bool,
}

/// Which log to print.
#[derive(Args, Debug)]
pub struct LogsArgs {
    /// kafka, cassandra, source, init, ingest-producer, stream-processor, metrics-dashboard, prometheus or supervisor
    pub service: String,
    /// Go on printing what is added
    #[arg(short, long)]
    pub follow: bool,
    /// How many of the last lines to print first
    #[arg(short = 'n', long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(0..=100_000))]
    pub lines: u32,
}

/// Which tests to run.
#[derive(Args, Debug)]
pub struct TestArgs {
    /// Part to run
    #[arg(default_value = "all")]
    pub part: TestPart,
    /// Only end-to-end or metrics tests whose name contains this
    #[arg(long, value_name = "TEXT")]
    pub only: Option<String>,
    /// Cache of the servers.
    #[command(flatten)]
    pub place: PlaceArgs,
}

/// What to measure.
#[derive(Args, Clone, Debug)]
pub struct BenchArgs {
    /// What to measure
    #[arg(value_enum, default_value_t)]
    pub part: BenchPart,
    /// Events to preload and drain
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1_000..=50_000_000))]
    pub messages: u64,
    /// Batches of the bare driver in flight
    #[arg(long, default_value_t = 24, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub in_flight: u32,
    /// One JSON object instead of a table
    #[arg(long)]
    pub json: bool,
    /// Cache of the servers.
    #[command(flatten)]
    pub place: PlaceArgs,
}

/// What a benchmark measures.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum BenchPart {
    /// Producer, bare driver, and the processor draining new events
    #[default]
    Drain,
    /// The processor draining old events, spread over a week, beside a live load
    Cold,
    /// Latency at a steady rate, and the restart of a killed processor under it
    Latency,
    /// The processor's memory against a large backlog
    Backlog,
    /// The processor's memory under the worst definition that passes the checks
    Worst,
}

/// How long and how hard to soak.
#[derive(Args, Clone, Debug)]
pub struct SoakArgs {
    /// Minutes under load and faults
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=1440))]
    pub minutes: u64,
    /// Kill so often in all, and go on for as many minutes as that takes
    #[arg(long, value_name = "N", conflicts_with = "minutes", value_parser = clap::value_parser!(u64).range(1..=20_000))]
    pub kills: Option<u64>,
    /// Kills a minute: of 22 one hits Kafka, one Cassandra, the others processors and producers, two to one
    #[arg(long, default_value_t = 22, value_parser = clap::value_parser!(u64).range(0..=60))]
    pub kills_per_minute: u64,
    /// Pauses a minute: SIGSTOP for Kafka, Cassandra, a processor or the producer
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(0..=10))]
    pub pauses_per_minute: u64,
    /// Seconds that a pause, or an outage of the source, lasts at most; at least 3
    #[arg(long, default_value_t = 60, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(3..=600))]
    pub longest_pause: u64,
    /// Of so many faults in a hundred, each strikes a system that has recovered from all others: their recovery times say
    /// most. The run takes longer by the time that nothing else strikes
    #[arg(long, default_value_t = 10, value_name = "PERCENT", value_parser = clap::value_parser!(u64).range(0..=100))]
    pub percent_alone: u64,
    /// Faults to include
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = FaultKind::ALL)]
    pub faults: Vec<FaultKind>,
    /// Stream processors
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=6))]
    pub processors: u64,
    /// Give each processor a checkpoint folder of its own, as on machines without a common disk
    #[arg(long)]
    pub own_checkpoints: bool,
    /// Decides which fault comes when [default: another one each time, printed]
    #[arg(long)]
    pub seed: Option<u64>,
    /// Events a second, besides those of the source
    #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    pub rate: u64,
    /// One JSON object instead of tables
    #[arg(long)]
    pub json: bool,
    /// Cache of the servers.
    #[command(flatten)]
    pub place: PlaceArgs,
}

impl Default for SoakArgs {
    /// What the command line says when nothing is said.
    fn default() -> Self {
        Self {
            minutes: 10,
            kills: None,
            kills_per_minute: 22,
            pauses_per_minute: 1,
            longest_pause: 60,
            percent_alone: 10,
            faults: FaultKind::ALL.into(),
            processors: 3,
            own_checkpoints: false,
            seed: None,
            rate: 2_000,
            json: false,
            place: PlaceArgs::default(),
        }
    }
}

/// Faults of a soak.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FaultKind {
    /// SIGKILL of processors, producers, Kafka and Cassandra; sometimes the state files are lost, too
    Kills,
    /// SIGSTOP of Kafka, Cassandra, processors and the producer, as a long pause of a JVM
    Pauses,
    /// Cassandra goes back to an older snapshot
    Restores,
    /// The source goes away and comes back
    Outages,
    /// Transactions that are committed, aborted or abandoned
    Transactions,
    /// At the end the topic gets partitions that the stream was not registered with
    Partitions,
}

impl FaultKind {
    /// Every one.
    pub const ALL: [Self; 6] =
        [Self::Kills, Self::Pauses, Self::Restores, Self::Outages, Self::Transactions, Self::Partitions];
}

/// Parts of `./test`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TestPart {
    /// Formatting, lints, unit tests and the page's
    Unit,
    /// End to end on real Kafka and Cassandra
    E2e,
    /// The page in a real browser
    Page,
    /// Rules, alerts and boards on the whole system with Prometheus
    Metrics,
    /// Faults of every kind under load for three minutes (`long`: for fifteen)
    Soak,
    /// Everything but `long`
    All,
    /// Everything, with the tests that take many minutes
    Long,
}
