//! Entry point of `local-stack`: parses the command line, runs the command, and returns its exit code.

use std::process::ExitCode;

use clap::Parser;
use local_stack::cli::Cli;
use local_stack::terminal::Terminal;

#[tokio::main]
async fn main() -> ExitCode {
    match local_stack::run(Cli::parse()).await {
        Ok(code) => code,
        Err(error) => {
            Terminal::default().failure(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}
