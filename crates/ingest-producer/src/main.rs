//! The binary: settings, logs, run, exit code.

use ingest_producer::config::Config;
use ingest_producer::registration::is_refusal;
use std::process::ExitCode;

/// Kafka's client takes memory in one thread and gives it back in another, ten pieces a message: with glibc's allocator
/// that costs a third of `stress`. The override reaches the C library's allocations too.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let config = Config::parse_all();
    if config.common.print_config {
        return print(&serde_json::to_string_pretty(&config).unwrap_or_default(), 0);
    }
    if let Err(mistake) = common::telemetry::init("ingest-producer", &config.common) {
        return fail(&mistake, 2);
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().worker_threads(2).build() {
        Ok(runtime) => runtime,
        Err(cause) => return fail(&format!("cannot start threads: {cause}"), 1),
    };
    let outcome = runtime.block_on(ingest_producer::run(&config));
    // Threads that still wait for a server must not hold the process.
    runtime.shutdown_background();
    match outcome {
        Ok(done) => print(&done.text, done.code),
        Err(error) => fail(&format!("{error:#}"), if is_refusal(&error) { 3 } else { 1 }),
    }
}

/// Data goes to stdout; logs have gone to stderr.
fn print(text: &str, code: u8) -> ExitCode {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    // A reader that has gone away, such as `head`, is no failure.
    let _ = if text.is_empty() { Ok(()) } else { writeln!(out, "{}", text.trim_end()) };
    ExitCode::from(code)
}

#[expect(clippy::print_stderr, reason = "the last words of a process that cannot go on")]
fn fail(message: &str, code: u8) -> ExitCode {
    eprintln!("ingest-producer: {message}");
    ExitCode::from(code)
}
