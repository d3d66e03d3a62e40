//! The binary: parses the command line, initializes logging, and serves until a signal arrives.

use std::process::ExitCode;

use clap::Parser;
use source_simulator::Config;

#[tokio::main]
#[expect(clippy::print_stderr, reason = "the reason of a failed start is for the user")]
async fn main() -> ExitCode {
    let config = Config::parse();
    tracing_subscriber::fmt().with_writer(std::io::stderr).json().flatten_event(true).init();
    match source_simulator::serve(config).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("source-simulator: {error:#}");
            ExitCode::FAILURE
        }
    }
}
