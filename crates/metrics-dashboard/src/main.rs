//! The binary: parses the settings, initializes logging, runs the service and returns its exit code.

use metrics_dashboard::config::Config;
use std::process::ExitCode;

fn main() -> ExitCode {
    let config = Config::parse_all();
    if config.common.print_config {
        return print_settings(&config);
    }
    if let Err(error) = common::runtime::telemetry::init(&config.common) {
        return fail(&error, 2);
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().worker_threads(2).build() {
        Ok(runtime) => runtime,
        Err(cause) => return fail(&format!("cannot start threads: {cause}"), 1),
    };
    let outcome = runtime.block_on(metrics_dashboard::run(&config));
    // Do not wait for a blocking read of Kafka that is still in progress.
    runtime.shutdown_background();
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(error) => fail(&format!("{error:#}"), 1),
    }
}

#[expect(clippy::print_stdout, reason = "--print-config writes to stdout")]
fn print_settings(config: &Config) -> ExitCode {
    match serde_json::to_string_pretty(config) {
        Ok(text) => println!("{text}"),
        Err(cause) => return fail(&cause.to_string(), 1),
    }
    ExitCode::SUCCESS
}

#[expect(clippy::print_stderr, reason = "logging may not be initialized yet")]
fn fail(message: &str, code: u8) -> ExitCode {
    eprintln!("metrics-dashboard: {message}");
    ExitCode::from(code)
}
