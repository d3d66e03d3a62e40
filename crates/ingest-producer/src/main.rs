//! The binary: parses the configuration, sets up logging, runs the command and maps its result to an exit code.

use ingest_producer::config::Config;
use ingest_producer::registration::is_refusal;
use std::process::ExitCode;

/// The Kafka client allocates in one thread and frees in another, about ten times per message. With glibc's allocator
/// this takes a third of the time of `stress`. The override also covers allocations of the C library.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let config = Config::parse_all();
    if config.common.print_config {
        return print(&serde_json::to_string_pretty(&config).unwrap_or_default(), 0);
    }
    if let Err(mistake) = common::runtime::telemetry::init(&config.common) {
        return fail(&mistake, 2);
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().worker_threads(2).build() {
        Ok(runtime) => runtime,
        Err(cause) => return fail(&format!("cannot start threads: {cause}"), 1),
    };
    let outcome = runtime.block_on(ingest_producer::run(&config));
    // Threads that still wait for a server must not keep the process alive.
    runtime.shutdown_background();
    match outcome {
        Ok(done) => print(&done.text, done.code),
        Err(error) => fail(&format!("{error:#}"), if is_refusal(&error) { 3 } else { 1 }),
    }
}

/// Prints data to stdout. Logs go to stderr.
fn print(text: &str, code: u8) -> ExitCode {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    // A closed pipe, as with `head`, is not an error.
    let _ = if text.is_empty() { Ok(()) } else { writeln!(out, "{}", text.trim_end()) };
    ExitCode::from(code)
}

#[expect(clippy::print_stderr, reason = "the process exits with this message")]
fn fail(message: &str, code: u8) -> ExitCode {
    eprintln!("ingest-producer: {message}");
    ExitCode::from(code)
}
