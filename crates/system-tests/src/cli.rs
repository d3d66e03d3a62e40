//! The command line of `system-tests`. `./run` and `./test` pass their arguments to it.

use clap::{Args, Parser, Subcommand, ValueEnum};
use local_stack::config::PlaceArgs;

/// Tests, measures and damages the whole pipeline on private servers
#[derive(Debug, Parser)]
#[command(name = "system-tests", version)]
pub struct Cli {
    /// What to run.
    #[command(subcommand)]
    pub command: Command,
}

/// Commands of `system-tests`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the tests of this checkout; ./test installs what they need
    Test(TestArgs),
    /// Measure throughput, latency and memory on private servers
    Bench(BenchArgs),
    /// Inject random faults under load on private servers, then compare all results with the log in Kafka
    Soak(SoakArgs),
}

/// Options of `test`.
#[derive(Args, Debug)]
pub struct TestArgs {
    /// Part of the test suite to run
    #[arg(default_value = "all")]
    pub part: TestPart,
    /// Run only the end-to-end or metrics tests whose name contains TEXT
    #[arg(long, value_name = "TEXT")]
    pub only: Option<String>,
    /// Ports and cache folder.
    #[command(flatten)]
    pub place: PlaceArgs,
}

/// Options of `bench`.
#[derive(Args, Clone, Debug)]
pub struct BenchArgs {
    /// Load to measure
    #[arg(value_enum, default_value_t)]
    pub part: BenchPart,
    /// Number of events to preload and drain
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1_000..=50_000_000))]
    pub messages: u64,
    /// Number of concurrent batches of the bare driver
    #[arg(long, default_value_t = 24, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub in_flight: u32,
    /// Print a JSON object instead of a table
    #[arg(long)]
    pub json: bool,
    /// Ports and cache folder.
    #[command(flatten)]
    pub place: PlaceArgs,
}

/// Load of a benchmark.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum BenchPart {
    /// Throughput of producer, bare driver and processor on new events
    #[default]
    Drain,
    /// Throughput on events spread over the last week, with a concurrent live load
    Cold,
    /// Latency at a steady rate, and recovery time of a killed processor
    Latency,
    /// Memory while a large backlog is drained
    Backlog,
    /// Memory with the stream definition that needs the most of it
    Worst,
}

/// Options of `soak`.
#[derive(Args, Clone, Debug)]
pub struct SoakArgs {
    /// Duration in minutes
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=1440))]
    pub minutes: u64,
    /// Run for as long as this many kills take, instead of for --minutes
    #[arg(long, value_name = "N", conflicts_with = "minutes", value_parser = clap::value_parser!(u64).range(1..=20_000))]
    pub kills: Option<u64>,
    /// Kills per minute; of 22 kills, one hits Kafka, one Cassandra, and the rest processors and producers (two to one)
    #[arg(long, default_value_t = 22, value_parser = clap::value_parser!(u64).range(0..=60))]
    pub kills_per_minute: u64,
    /// Pauses (SIGSTOP) per minute of Kafka, Cassandra, a processor or the producer
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(0..=10))]
    pub pauses_per_minute: u64,
    /// Longest pause or source outage, in seconds; the shortest is 3 seconds
    #[arg(long, default_value_t = 60, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(3..=600))]
    pub longest_pause: u64,
    /// Percentage of faults that are injected alone, after the pipeline has recovered from all others; these give the
    /// most accurate recovery times
    #[arg(long, default_value_t = 10, value_name = "PERCENT", value_parser = clap::value_parser!(u64).range(0..=100))]
    pub percent_alone: u64,
    /// Kinds of faults to inject
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = FaultKind::ALL)]
    pub faults: Vec<FaultKind>,
    /// Number of stream processors
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=6))]
    pub processors: u64,
    /// Give each processor its own checkpoint folder, as on machines without a shared disk
    #[arg(long)]
    pub own_checkpoints: bool,
    /// Seed of the fault schedule [default: random, printed]
    #[arg(long)]
    pub seed: Option<u64>,
    /// Events per second, in addition to those of the source
    #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    pub rate: u64,
    /// Print a JSON object instead of tables
    #[arg(long)]
    pub json: bool,
    /// Ports and cache folder.
    #[command(flatten)]
    pub place: PlaceArgs,
}

impl Default for SoakArgs {
    /// The same defaults as on the command line.
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

/// Kinds of faults that a soak injects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FaultKind {
    /// SIGKILL of processors, producers, Kafka and Cassandra, some with loss of the state files
    Kills,
    /// SIGSTOP of Kafka, Cassandra, processors and the producer, like a long GC pause
    Pauses,
    /// Restore of Cassandra from an older snapshot
    Restores,
    /// Outages of the source
    Outages,
    /// Transactions that are committed, aborted or abandoned
    Transactions,
    /// Partitions added to the topic at the end of the run
    Partitions,
}

impl FaultKind {
    /// Every kind of fault.
    pub const ALL: [Self; 6] =
        [Self::Kills, Self::Pauses, Self::Restores, Self::Outages, Self::Transactions, Self::Partitions];
}

/// Parts of the test suite.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TestPart {
    /// Formatting, lints, and the unit tests of the crates and the page
    Unit,
    /// End-to-end tests on real Kafka and Cassandra
    E2e,
    /// Tests of the page in a real browser
    Page,
    /// Rules, alerts and dashboards on the whole system with Prometheus
    Metrics,
    /// Fault injection under load for three minutes (fifteen with `long`)
    Soak,
    /// Everything except the additional tests of `long`
    All,
    /// Everything, including the tests that take many minutes
    Long,
}
