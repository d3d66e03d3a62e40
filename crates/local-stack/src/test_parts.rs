//! `./test`: which runners are called in which order, on which servers, and the closing summary in the runners' own
//! words. What is tested stands in the crates, in `tests/e2e` and in the page's folder.

mod metrics;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Instant;

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;

use crate::cli::{FaultKind, SoakArgs, TestArgs, TestPart};
use crate::config::{Settings, loopback};
use crate::error::{Error, Result};
use crate::private::{self, Private};
use crate::process::Record;
use crate::soak;
use crate::stack::{Extent, Stack};
use crate::terminal::Terminal;

/// Most end-to-end tests at once: each starts processes of its own on the same two servers.
const E2E_THREADS: &str = "2";

/// What `bootstrap.sh` builds the tested programs with: another choice would build them again.
const FEATURES: &str = "--features=stream-processor/failpoints";

/// One runner to call.
struct Step {
    title: &'static str,
    program: PathBuf,
    arguments: Vec<OsString>,
    folder: PathBuf,
    environment: Vec<(&'static str, String)>,
}

/// How a runner ended, with its own closing lines.
struct Closing {
    title: &'static str,
    passed: bool,
    lines: Vec<String>,
}

/// Runs the asked part; tells whether everything passed.
pub async fn run(settings: &Settings, args: &TestArgs, terminal: Terminal) -> Result<bool> {
    let since = Instant::now();
    let mut closings = Vec::new();
    let whole = matches!(args.part, TestPart::All | TestPart::Long);
    if whole || args.part == TestPart::Unit {
        for step in unit(settings) {
            closings.push(call(step, terminal).await?);
        }
    }
    if (whole || args.part == TestPart::Page)
        && let Some(step) = page(settings)
    {
        closings.push(call(step, terminal).await?);
    }
    if whole || args.part == TestPart::E2e {
        closings.push(e2e(settings, args, terminal).await?);
    }
    if whole || args.part == TestPart::Metrics {
        closings.extend(metrics::run(settings, args, terminal).await?);
    }
    if whole || args.part == TestPart::Soak {
        closings.push(soak(settings, args.part == TestPart::Long, terminal).await?);
    }
    Ok(close(&closings, since, terminal))
}

fn close(closings: &[Closing], since: Instant, terminal: Terminal) -> bool {
    terminal.data(&format!("\nafter {} s:", since.elapsed().as_secs()));
    for closing in closings {
        let verdict = if closing.passed { "ok  " } else { "FAIL" };
        terminal.data(&format!("{verdict} {}", closing.title));
        for line in &closing.lines {
            terminal.data(&format!("       {line}"));
        }
    }
    let passed = closings.iter().all(|closing| closing.passed);
    terminal.data(if passed { "everything passed" } else { "something failed: see above" });
    passed
}

fn unit(settings: &Settings) -> Vec<Step> {
    let cargo = |title, arguments: &[&str]| Step {
        title,
        program: settings.cargo.clone(),
        arguments: arguments.iter().map(Into::into).collect(),
        folder: settings.checkout.clone(),
        environment: Vec::new(),
    };
    let mut steps = vec![
        cargo("cargo fmt", &["fmt", "--all", "--check"]),
        cargo("cargo clippy", &["clippy", "--workspace", FEATURES, "--all-targets", "--", "-D", "warnings"]),
        // What needs servers is left out of `--all-targets`, as of `cargo test`.
        cargo(
            "cargo clippy of what needs servers",
            &[
                "clippy",
                "--workspace",
                FEATURES,
                "--test",
                "e2e",
                "--test",
                "ledger",
                "--test",
                "pauses",
                "--test",
                "metrics",
                "--",
                "-D",
                "warnings",
            ],
        ),
        cargo("cargo test", &["test", "--workspace", FEATURES]),
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

/// Starts one Kafka and one Cassandra of its own, runs the target, stops them whatever happened.
async fn e2e(settings: &Settings, args: &TestArgs, terminal: Terminal) -> Result<Closing> {
    let folder =
        tempfile::Builder::new().prefix("pipeline-e2e-").tempdir().map_err(Error::io("temporary folder"))?;
    let own = Private::prepare(settings, folder, terminal).await?;
    let mut stack = Stack::new(own.settings.clone(), terminal);
    let closing = tokio::select! {
        closing = async {
            // Built before the servers start: the compiler would take their memory and time.
            let built = call(e2e_build(&own.settings), terminal).await?;
            if !built.passed {
                return Ok(built);
            }
            stack.start(&own.installed, Extent::Servers).await?;
            let closing = call(e2e_step(&own.settings, args), terminal).await?;
            if !closing.passed {
                return Ok(closing);
            }
            let pauses = call(pauses_step(&own.settings, args), terminal).await?;
            Ok(Closing { lines: [closing.lines, pauses.lines].concat(), ..pauses })
        } => closing,
        error = private::interrupted() => Err(error),
    };
    stack.stop().await;
    if !matches!(&closing, Ok(closing) if closing.passed) {
        own.keep(terminal);
    }
    closing
}

/// Faults of every kind under load. Partitions are added in the long one only: it takes librdkafka half a minute to notice,
/// and `topics.rs` of the end-to-end tests tries it, too.
async fn soak(settings: &Settings, long: bool, terminal: Terminal) -> Result<Closing> {
    let (title, args) = if long {
        let args = SoakArgs { minutes: 15, own_checkpoints: true, ..SoakArgs::default() };
        ("soak: faults under load for fifteen minutes", args)
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
        ("soak: faults under load for three minutes", args)
    };
    terminal.begins("test", title);
    let report = soak::run(settings, &args, terminal).await?;
    Ok(Closing { title, passed: report.passed(), lines: vec![report.summary()] })
}

fn e2e_build(private: &Settings) -> Step {
    Step {
        title: "end to end: build",
        program: private.cargo.clone(),
        arguments: [
            "test",
            "--workspace",
            FEATURES,
            "--test",
            "e2e",
            "--test",
            "ledger",
            "--test",
            "pauses",
            "--no-run",
        ]
        .map(OsString::from)
        .into(),
        folder: private.checkout.clone(),
        environment: Vec::new(),
    }
}

fn e2e_step(private: &Settings, args: &TestArgs) -> Step {
    let title = "end to end: cargo test --test e2e";
    server_step(private, args, title, &["e2e", "ledger"], E2E_THREADS)
}

/// After the others: it stops the servers for a while.
fn pauses_step(private: &Settings, args: &TestArgs) -> Step {
    server_step(private, args, "end to end: cargo test --test e2e, --test pauses", &["pauses"], "1")
}

fn server_step(
    private: &Settings,
    args: &TestArgs,
    title: &'static str,
    targets: &[&str],
    threads: &str,
) -> Step {
    let mut arguments: Vec<OsString> = ["test", "--workspace", FEATURES].map(OsString::from).into();
    arguments.extend(targets.iter().flat_map(|target| ["--test", target]).map(OsString::from));
    arguments.push("--".into());
    arguments.extend(args.only.iter().map(OsString::from));
    arguments.push(format!("--test-threads={threads}").into());
    let pid = |server: &str| {
        let record = Record::read(&private.folders.run().join(format!("{server}.json")));
        record.map(|record| record.pid.to_string()).unwrap_or_default()
    };
    Step {
        title,
        program: private.cargo.clone(),
        arguments,
        folder: private.checkout.clone(),
        environment: vec![
            ("PIPELINE_TEST_KAFKA", loopback(private.ports.kafka)),
            ("PIPELINE_TEST_CASSANDRA", loopback(private.ports.cassandra)),
            ("PIPELINE_TEST_KAFKA_PID", pid("kafka")),
            ("PIPELINE_TEST_CASSANDRA_PID", pid("cassandra")),
            ("PIPELINE_TEST_BIN", private.binaries.display().to_string()),
            ("PIPELINE_TEST_FOLDER", private.folders.root.display().to_string()),
            ("PIPELINE_TEST_LONG", u8::from(args.part == TestPart::Long).to_string()),
        ],
    }
}

/// Calls a runner, passes on what it prints, and keeps its closing lines.
async fn call(step: Step, terminal: Terminal) -> Result<Closing> {
    terminal.begins("test", step.title);
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
            if is_closing_line(&line) {
                lines.push(line.trim().to_owned());
            }
        }
    }
    let status = child.wait().await.map_err(Error::io(&step.program))?;
    Ok(Closing { title: step.title, passed: status.success(), lines: merged(lines) })
}

/// Lines in which cargo's test programs and node's runner sum up.
fn is_closing_line(line: &str) -> bool {
    let node = |line: &str| ["tests ", "pass ", "fail "].iter().any(|word| line.starts_with(word));
    line.starts_with("test result:")
        || line.strip_prefix("# ").is_some_and(node)
        || line.strip_prefix("ℹ ").is_some_and(node)
}

/// A test program without tests has nothing to say.
fn merged(lines: Vec<String>) -> Vec<String> {
    lines.into_iter().filter(|line| !line.starts_with("test result: ok. 0 passed; 0 failed")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summaries_of_both_runners_are_recognised() {
        let yes = ["test result: ok. 3 passed; 0 failed", "# pass 3", "ℹ fail 0", "# tests 3"];
        let no = ["running 3 tests", "# Subtest: x", "test a ... ok", "ℹ duration_ms 3"];
        assert!(yes.iter().all(|line| is_closing_line(line)));
        assert!(!no.iter().any(|line| is_closing_line(line)));
    }

    #[test]
    fn test_programs_without_tests_are_not_listed() {
        let lines = vec![
            "test result: ok. 0 passed; 0 failed; 0 ignored".to_owned(),
            "test result: ok. 1 passed".to_owned(),
        ];
        assert_eq!(merged(lines), ["test result: ok. 1 passed"]);
    }
}
