//! The whole pipeline on one machine without Docker: real Kafka, Cassandra and Prometheus as plain processes, the
//! services beside them, a source simulator, end-to-end tests and benchmarks. The services are driven as processes,
//! the way a user does it; of the workspace only `common` is imported.
//!
//! A tour: [`cli`] says what can be asked, [`config`] where everything is, [`checks`] what the machine must offer.
//! [`install`] brings servers into the cache, [`servers`] and [`services`] know how each part is started,
//! [`process`] keeps it under control, [`supervise`] starts again what ends, [`stack`] knows the order, [`commands`] is what
//! `./run` does with all that.
//! [`source`] is the simulated REST API, [`test_parts`] is `./test`, [`bench`] measures, [`soak`] kills under load; these
//! three have servers of their own from [`private`].

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

/// Does what the command line asks; the code is 0, 1 for a refusal or failure, 130 or 143 after a signal.
pub async fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let terminal = Terminal::default();
    let here = || Settings::load(&PlaceArgs::default());
    match cli.command.unwrap_or(Command::Up(cli.up)) {
        Command::Up(args) => up(&args, terminal).await,
        Command::Stop => Ok(commands::stop(&here()?, terminal).await.map(|()| ExitCode::SUCCESS)?),
        Command::Status(args) => {
            commands::status(&here()?, &args, terminal).await;
            Ok(ExitCode::SUCCESS)
        }
        Command::Logs(args) => {
            Ok(commands::logs(&here()?, &args, terminal).await.map(|()| ExitCode::SUCCESS)?)
        }
        Command::Reset => Ok(commands::reset(&here()?, terminal).map(|()| ExitCode::SUCCESS)?),
        Command::Doctor(place) => {
            let healthy = commands::doctor(&Settings::load(&place)?, terminal);
            Ok(if healthy { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Command::Source(args) => {
            // The other commands speak to people through the terminal; this one is a server.
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
        // Shells report an end by signal N as 128 + N.
        Outcome::Stopped(signal) => ExitCode::from(128 + signal),
    })
}
