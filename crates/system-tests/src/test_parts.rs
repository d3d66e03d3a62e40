//! `./test`: runs the test runners in order, starts the servers that they need, and prints a summary of their results.
//! The tests themselves are in the crates, in `tests/e2e`, and in the folder of the page.

mod metrics;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Instant;

use local_stack::config::{Settings, loopback};
use local_stack::error::{Error, Result};
use local_stack::process::Record;
use local_stack::stack::{Extent, Stack};
use local_stack::terminal::Terminal;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;

use crate::cli::{FaultKind, SoakArgs, TestArgs, TestPart};
use crate::private::{self, PrivateServers};
use crate::soak;

/// Number of concurrent end-to-end tests. They share two servers, and each test starts its own processes.
const E2E_THREADS: &str = "2";

/// The same features as in `bootstrap.sh`. Other features would cause a rebuild of the programs.
const FEATURES: &str = "--features=stream-processor/failpoints";

/// The targets of the end-to-end tests.
const E2E_TARGETS: &str = "--test e2e --test ledger";
const PAUSES_TARGET: &str = "--test pauses";
/// The target of the tests with Prometheus.
const METRICS_TARGET: &str = "--test metrics";

/// One test runner to execute.
struct Step {
    title: &'static str,
    program: PathBuf,
    arguments: Vec<OsString>,
    folder: PathBuf,
    environment: Vec<(&'static str, String)>,
}

/// Result of a test runner, with the summary lines that it printed.
struct StepResult {
    title: &'static str,
    passed: bool,
    lines: Vec<String>,
}

/// Runs the selected part of the test suite. Returns whether everything passed.
pub async fn run(settings: &Settings, args: &TestArgs, terminal: Terminal) -> Result<bool> {
    let since = Instant::now();
    let mut results = Vec::new();
    let all = matches!(args.part, TestPart::All | TestPart::Long);
    if all || args.part == TestPart::Unit {
        for step in unit(settings) {
            results.push(run_step(step, terminal).await?);
        }
    }
    if (all || args.part == TestPart::Page)
        && let Some(step) = page(settings)
    {
        results.push(run_step(step, terminal).await?);
    }
    if all || args.part == TestPart::E2e {
        results.push(e2e(settings, args, terminal).await?);
    }
    if all || args.part == TestPart::Metrics {
        results.extend(metrics::run(settings, args, terminal).await?);
    }
    if all || args.part == TestPart::Soak {
        results.push(soak(settings, args.part == TestPart::Long, terminal).await?);
    }
    Ok(print_summary(&results, since, terminal))
}

fn print_summary(results: &[StepResult], since: Instant, terminal: Terminal) -> bool {
    terminal.data(&format!("\nfinished after {} s:", since.elapsed().as_secs()));
    for result in results {
        let verdict = if result.passed { "ok  " } else { "FAIL" };
        terminal.data(&format!("{verdict} {}", result.title));
        for line in &result.lines {
            terminal.data(&format!("       {line}"));
        }
    }
    let passed = results.iter().all(|result| result.passed);
    terminal.data(if passed { "everything passed" } else { "some tests failed; see above" });
    passed
}

/// A call of cargo in the checkout. `arguments` are separated by spaces.
fn cargo(settings: &Settings, title: &'static str, arguments: &str) -> Step {
    Step {
        title,
        program: settings.cargo.clone(),
        arguments: arguments.split_whitespace().map(OsString::from).collect(),
        folder: settings.checkout.clone(),
        environment: Vec::new(),
    }
}

fn unit(settings: &Settings) -> Vec<Step> {
    let clippy = |title, targets: &str| {
        cargo(settings, title, &format!("clippy --workspace {FEATURES} {targets} -- -D warnings"))
    };
    let mut steps = vec![
        cargo(settings, "cargo fmt", "fmt --all --check"),
        clippy("cargo clippy", "--all-targets"),
        // `--all-targets` skips the targets that need servers, as `cargo test` does.
        clippy(
            "cargo clippy of the tests that need servers",
            &format!("{E2E_TARGETS} {PAUSES_TARGET} {METRICS_TARGET}"),
        ),
        cargo(settings, "cargo test", &format!("test --workspace {FEATURES}")),
    ];
    steps.extend(npm(settings, "page: npm test", "test"));
    steps
}

fn page(settings: &Settings) -> Option<Step> {
    npm(settings, "page in a browser: npm run e2e", "e2e")
}

fn npm(settings: &Settings, title: &'static str, script: &str) -> Option<Step> {
    let folder = settings.checkout.join("crates/metrics-dashboard/web");
    folder.join("package.json").is_file().then(|| Step {
        title,
        program: "npm".into(),
        arguments: ["run", "--silent", script].map(OsString::from).into(),
        folder,
        environment: Vec::new(),
    })
}

/// Starts a private Kafka and Cassandra, runs the end-to-end tests, and stops the servers in any case.
async fn e2e(settings: &Settings, args: &TestArgs, terminal: Terminal) -> Result<StepResult> {
    let folder =
        tempfile::Builder::new().prefix("pipeline-e2e-").tempdir().map_err(Error::io("temporary folder"))?;
    let own = PrivateServers::prepare(settings, folder, terminal).await?;
    let mut stack = Stack::new(own.settings.clone(), terminal);
    let result = tokio::select! {
        result = async {
            // The tests are built before the servers start, because the compiler would compete for memory and CPU.
            let built = run_step(e2e_build(&own.settings), terminal).await?;
            if !built.passed {
                return Ok(built);
            }
            stack.start(&own.installed, Extent::Servers).await?;
            let result = run_step(e2e_step(&own.settings, args), terminal).await?;
            if !result.passed {
                return Ok(result);
            }
            let pauses = run_step(pauses_step(&own.settings, args), terminal).await?;
            Ok(StepResult { lines: [result.lines, pauses.lines].concat(), ..pauses })
        } => result,
        error = private::interrupted() => Err(error),
    };
    stack.stop().await;
    if !matches!(&result, Ok(result) if result.passed) {
        own.keep(terminal);
    }
    result
}

/// Injects faults under load. Only the long soak adds partitions, because librdkafka takes half a minute to notice them
/// and the end-to-end tests in `topics.rs` cover them as well.
async fn soak(settings: &Settings, long: bool, terminal: Terminal) -> Result<StepResult> {
    let (title, args) = if long {
        let args = SoakArgs { minutes: 15, own_checkpoints: true, ..SoakArgs::default() };
        ("soak: fault injection under load for fifteen minutes", args)
    } else {
        let faults = FaultKind::ALL.into_iter().filter(|kind| *kind != FaultKind::Partitions);
        let args = SoakArgs {
            minutes: 3,
            pauses_per_minute: 2,
            longest_pause: 6,
            percent_alone: 0,
            processors: 2,
            faults: faults.collect(),
            ..SoakArgs::default()
        };
        ("soak: fault injection under load for three minutes", args)
    };
    terminal.started("test", title);
    let report = soak::run(settings, &args, terminal).await?;
    Ok(StepResult { title, passed: report.passed(), lines: vec![report.summary()] })
}

fn e2e_build(private: &Settings) -> Step {
    let targets = format!("{E2E_TARGETS} {PAUSES_TARGET}");
    cargo(private, "end to end: build", &format!("test --workspace {FEATURES} {targets} --no-run"))
}

fn e2e_step(private: &Settings, args: &TestArgs) -> Step {
    server_step(private, args, "end to end: cargo test --test e2e", E2E_TARGETS, E2E_THREADS)
}

/// This target runs last, because it pauses the servers.
fn pauses_step(private: &Settings, args: &TestArgs) -> Step {
    server_step(private, args, "end to end: cargo test --test e2e, --test pauses", PAUSES_TARGET, "1")
}

fn server_step(
    private: &Settings,
    args: &TestArgs,
    title: &'static str,
    targets: &str,
    threads: &str,
) -> Step {
    let arguments = format!("test --workspace {FEATURES} {targets} -- --test-threads={threads}");
    let mut step = cargo(private, title, &arguments);
    step.arguments.extend(args.only.iter().map(OsString::from));
    let pid = |server: &str| {
        let record = Record::read(&private.folders.run().join(format!("{server}.json")));
        record.map(|record| record.pid.to_string()).unwrap_or_default()
    };
    step.environment = vec![
        ("PIPELINE_TEST_KAFKA", loopback(private.ports.kafka)),
        ("PIPELINE_TEST_CASSANDRA", loopback(private.ports.cassandra)),
        ("PIPELINE_TEST_KAFKA_PID", pid("kafka")),
        ("PIPELINE_TEST_CASSANDRA_PID", pid("cassandra")),
        ("PIPELINE_TEST_BIN", private.binaries.display().to_string()),
        ("PIPELINE_TEST_FOLDER", private.folders.root.display().to_string()),
        ("PIPELINE_TEST_LONG", u8::from(args.part == TestPart::Long).to_string()),
    ];
    step
}

/// Executes a test runner, forwards its output, and keeps its summary lines.
async fn run_step(step: Step, terminal: Terminal) -> Result<StepResult> {
    terminal.started("test", step.title);
    let mut child = Command::new(&step.program)
        .args(&step.arguments)
        .envs(step.environment)
        .current_dir(&step.folder)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(Error::io(&step.program))?;
    let mut lines = Vec::new();
    if let Some(output) = child.stdout.take() {
        let mut output = BufReader::new(output).lines();
        while let Some(line) = output.next_line().await.map_err(Error::io(&step.program))? {
            terminal.data(&line);
            if is_summary_line(&line) {
                lines.push(line.trim().to_owned());
            }
        }
    }
    let status = child.wait().await.map_err(Error::io(&step.program))?;
    Ok(StepResult { title: step.title, passed: status.success(), lines: without_empty_runs(lines) })
}

/// Returns whether a line is a summary line of the test programs of cargo or of the node test runner.
fn is_summary_line(line: &str) -> bool {
    let node = |line: &str| ["tests ", "pass ", "fail "].iter().any(|word| line.starts_with(word));
    line.starts_with("test result:")
        || line.strip_prefix("# ").is_some_and(node)
        || line.strip_prefix("ℹ ").is_some_and(node)
}

/// Drops the summary lines of test programs that ran no tests.
fn without_empty_runs(lines: Vec<String>) -> Vec<String> {
    lines.into_iter().filter(|line| !line.starts_with("test result: ok. 0 passed; 0 failed")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summary_lines_of_both_runners_are_recognised() {
        let yes = ["test result: ok. 3 passed; 0 failed", "# pass 3", "ℹ fail 0", "# tests 3"];
        let no = ["running 3 tests", "# Subtest: x", "test a ... ok", "ℹ duration_ms 3"];
        assert!(yes.iter().all(|line| is_summary_line(line)));
        assert!(!no.iter().any(|line| is_summary_line(line)));
    }

    #[test]
    fn test_programs_that_ran_no_tests_are_not_listed() {
        let lines = vec![
            "test result: ok. 0 passed; 0 failed; 0 ignored".to_owned(),
            "test result: ok. 1 passed".to_owned(),
        ];
        assert_eq!(without_empty_runs(lines), ["test result: ok. 1 passed"]);
    }
}
