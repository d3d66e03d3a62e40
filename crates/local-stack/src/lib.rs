//! Runs the whole pipeline on one machine without Docker: Kafka, Cassandra and Prometheus as plain processes, the
//! services, a source simulator, end-to-end tests and benchmarks. The services run as separate processes, as they do in
//! production. Of the other crates in the workspace, this one imports only `common`.
//!
//! The modules, from the command line down:
//!
//! - [`cli`] defines the command line, [`config`] the ports, folders and tools, and [`commands`] implements `./run`.
//! - [`checks`] verifies the prerequisites of the machine, and [`install`] downloads the servers into the cache.
//! - [`servers`] and [`services`] define how each part is started, and [`stack`] defines the order.
//! - [`process`] controls a single process, and [`supervise`] restarts it when it exits.
//! - [`source`] is the simulated REST API.
//! - [`test_parts`] implements `./test`, [`bench`] measures performance, and [`soak`] injects faults under load. These
//!   three start their own servers through [`private`].

pub mod bench;
pub mod checks;
pub mod cli;
pub mod commands;
pub mod config;
pub mod error;
pub mod install;
pub mod private;
pub mod process;
pub mod servers;
pub mod services;
pub mod soak;
pub mod source;
pub mod stack;
pub mod supervise;
pub mod terminal;
pub mod test_parts;

use std::process::ExitCode;

use cli::{Cli, Command, UpArgs};
use commands::up::Outcome;
use config::{PlaceArgs, Settings};
use install::Installed;
use terminal::Terminal;

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
        Command::Source(args) => {
            // Unlike the other commands, this one is a server, so it logs instead of writing to the terminal.
            tracing_subscriber::fmt().with_writer(std::io::stderr).json().flatten_event(true).init();
            source::serve(args).await.map(|()| ExitCode::SUCCESS)
        }
        Command::Test(args) => {
            let passed = test_parts::run(&Settings::load(&args.place)?, &args, terminal).await?;
            Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Command::Bench(args) => {
            bench::run(&Settings::load(&args.place)?, &args, terminal).await?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Soak(args) => {
            let report = soak::run(&Settings::load(&args.place)?, &args, terminal).await?;
            Ok(if report.passed() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
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
