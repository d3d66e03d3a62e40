//! Entry point of `system-tests`: parses the command line, runs the command, and returns its exit code.

use std::process::ExitCode;

use clap::Parser;
use local_stack::terminal::Terminal;
use system_tests::cli::Cli;

#[tokio::main]
async fn main() -> ExitCode {
    let terminal = Terminal::default();
    match system_tests::run(Cli::parse(), terminal).await {
        Ok(code) => code,
        Err(error) => {
            terminal.failure(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}
