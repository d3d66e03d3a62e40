//! Runs the whole pipeline on one machine without Docker: Kafka, Cassandra and Prometheus as plain processes, the
//! services and a source simulator. The services run as separate processes, as they do in production.
//!
//! The modules, from the command line down:
//!
//! - [`cli`] defines the command line, [`config`] the ports, folders and tools, and [`commands`] implements `./run`.
//! - [`forward`] executes the sibling programs of the commands that this crate does not implement.
//! - [`checks`] verifies the prerequisites of the machine, and [`install`] downloads the servers into the cache.
//! - [`servers`] and [`services`] define how each part is started, and [`stack`] defines the order.
//! - [`process`] controls a single process, and [`supervise`] restarts it when it exits.

pub mod checks;
pub mod cli;
pub mod commands;
pub mod config;
pub mod error;
pub mod forward;
pub mod install;
pub mod process;
pub mod servers;
pub mod services;
pub mod stack;
pub mod supervise;
pub mod terminal;

use std::process::ExitCode;

use cli::{Cli, Command, UpArgs};
use commands::up::Outcome;
use config::{PlaceArgs, Settings};
use install::Installed;
use terminal::Terminal;

/// The program of the tests and measurements.
const SYSTEM_TESTS: &str = "system-tests";

/// Runs the given command and returns its exit code: 0 on success, 1 on failure, or 128 plus the signal number if a
/// signal stopped it.
pub async fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let terminal = Terminal::default();
    let settings = || Settings::load(&PlaceArgs::default());
    match cli.command.unwrap_or(Command::Up(cli.up)) {
        Command::Up(args) => up(&args, terminal).await,
        Command::Stop => Ok(commands::stop(&settings()?, terminal).await.map(|()| ExitCode::SUCCESS)?),
        Command::Status(args) => {
            commands::status(&settings()?, &args, terminal).await;
            Ok(ExitCode::SUCCESS)
        }
        Command::Logs(args) => {
            Ok(commands::logs(&settings()?, &args, terminal).await.map(|()| ExitCode::SUCCESS)?)
        }
        Command::Reset => Ok(commands::reset(&settings()?, terminal).map(|()| ExitCode::SUCCESS)?),
        Command::Doctor(place) => {
            let healthy = commands::doctor(&Settings::load(&place)?, terminal);
            Ok(if healthy { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Command::Source(args) => Ok(args.execute(&settings()?, "source-simulator", &[])?),
        Command::Test(args) => Ok(args.execute(&settings()?, SYSTEM_TESTS, &["test"])?),
        Command::Bench(args) => Ok(args.execute(&settings()?, SYSTEM_TESTS, &["bench"])?),
        Command::Soak(args) => Ok(args.execute(&settings()?, SYSTEM_TESTS, &["soak"])?),
        Command::Fetch(place) => {
            Installed::fetch(&Settings::load(&place)?, terminal).await?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

async fn up(args: &UpArgs, terminal: Terminal) -> anyhow::Result<ExitCode> {
    let settings = Settings::load(&args.place)?;
    let outcome = if args.detach {
        commands::detach::detach(&settings, args).await?
    } else {
        commands::up::up(&settings, args, terminal).await?
    };
    Ok(match outcome {
        Outcome::Detached => ExitCode::SUCCESS,
        Outcome::Failed => ExitCode::FAILURE,
        // By shell convention, a process stopped by signal N exits with code 128 + N.
        Outcome::Stopped(signal) => ExitCode::from(128 + signal),
    })
}
