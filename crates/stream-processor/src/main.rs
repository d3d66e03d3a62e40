//! Entry point: parses the settings, starts logging, runs the command and returns its exit code.

#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "errors before logging starts, and the output of --print-config"
)]

use std::process::ExitCode;
use stream_processor::config::{Cli, Command};

fn main() -> ExitCode {
    let cli: Cli = common::runtime::config::parse();
    if cli.common.print_config {
        let command = match &cli.command {
            Command::Init(args) => serde_json::json!(args),
            Command::Run(args) => serde_json::json!(args),
            Command::Verify(args) => serde_json::json!(args),
            Command::Windows(args) => serde_json::json!(args),
            Command::Skip(args) => serde_json::json!(args),
            Command::Dlq(_) | Command::Checkpoint(_) => serde_json::Value::Null,
        };
        println!("{:#}", serde_json::json!({"common": cli.common, "command": command}));
        return ExitCode::SUCCESS;
    }
    if let Err(e) = common::runtime::telemetry::init(&cli.common) {
        eprintln!("{e}");
        return ExitCode::from(2);
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => {
            tracing::error!(error = %e, "cannot start the async runtime");
            return ExitCode::FAILURE;
        }
    };
    let ended = runtime.block_on(stream_processor::run(cli));
    runtime.shutdown_timeout(std::time::Duration::from_secs(2));
    match ended {
        Ok(code) => ExitCode::from(code),
        Err(e) => {
            tracing::error!(error = %e, "stream-processor failed");
            ExitCode::from(e.exit_code())
        }
    }
}
