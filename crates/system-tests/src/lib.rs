//! Tests and measurements of the whole pipeline, on servers of their own that `local-stack` starts.
//!
//! - [`test_parts`] implements `./test`, [`bench`] measures performance, and [`soak`] injects faults under load.
//! - [`private`] prepares the folder, ports and servers of one run.
//! - [`kafka`] reads and writes topics from outside the pipeline.
//!
//! The tests themselves are in `tests/`: `e2e` and `pauses` need Kafka and Cassandra, `metrics` needs Prometheus too,
//! `observability` and `tree` check files only.

pub mod bench;
pub mod cli;
pub mod kafka;
pub mod private;
pub mod soak;
pub mod test_parts;

use std::process::ExitCode;

use local_stack::config::Settings;
use local_stack::terminal::Terminal;

use cli::{Cli, Command};

/// Runs the given command and returns its exit code: 0 if everything passed, otherwise 1.
pub async fn run(cli: Cli, terminal: Terminal) -> anyhow::Result<ExitCode> {
    let passed = match cli.command {
        Command::Test(args) => test_parts::run(&Settings::load(&args.place)?, &args, terminal).await?,
        Command::Bench(args) => {
            bench::run(&Settings::load(&args.place)?, &args, terminal).await.map(|()| true)?
        }
        Command::Soak(args) => soak::run(&Settings::load(&args.place)?, &args, terminal).await?.passed(),
    };
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
