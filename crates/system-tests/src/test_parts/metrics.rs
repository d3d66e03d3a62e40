//! `./test metrics`: checks the configuration, the rules and their tests with promtool. Then starts the whole system
//! with Prometheus and runs the test target `metrics` against it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use local_stack::config::{Settings, loopback};
use local_stack::error::{Error, Result};
use local_stack::stack::{Extent, Stack};
use local_stack::terminal::Terminal;

use super::{FEATURES, METRICS_TARGET, Step, StepResult, cargo, run_step};
use crate::cli::{TestArgs, TestPart};
use crate::private::{self, PrivateServers};

/// Name filter of the tests that provoke alerts. They take minutes and leave the stack broken, so they run last.
const PROVOKED_ALERTS: &str = "alerts::";

/// Starts the whole system on private ports and folders, runs the checks, and stops the system in any case.
pub(super) async fn run(settings: &Settings, args: &TestArgs, terminal: Terminal) -> Result<Vec<StepResult>> {
    let folder = private::folder(settings, "metrics-")?;
    let own = PrivateServers::prepare(settings, folder, terminal).await?;
    let mut stack = Stack::new(own.settings.clone(), terminal);
    let results = tokio::select! {
        results = checks(&own, &mut stack, args, terminal) => results,
        error = private::interrupted() => Err(error),
    };
    stack.stop().await;
    if !matches!(&results, Ok(results) if results.iter().all(|result| result.passed)) {
        own.keep(terminal);
    }
    results
}

async fn checks(
    own: &PrivateServers,
    stack: &mut Stack,
    args: &TestArgs,
    terminal: Terminal,
) -> Result<Vec<StepResult>> {
    let Some(promtool) = promtool(own.installed.prometheus.as_deref()) else {
        let line = "Prometheus is missing; check that `apt-get download prometheus` works";
        return Ok(vec![StepResult { title: "metrics", passed: false, lines: vec![line.to_owned()] }]);
    };
    let cargo = |title, arguments: &str| metrics_step(&own.settings, &promtool, title, arguments);
    let mut results = Vec::new();
    for step in promtool_steps(&own.settings, &promtool)? {
        results.push(run_step(step, terminal).await?);
    }
    // The tests are built before the servers start, because the compiler would compete for memory and CPU.
    let built = run_step(cargo("metrics: build", "--no-run"), terminal).await?;
    if !built.passed {
        results.push(built);
        return Ok(results);
    }
    stack.start(&own.installed, Extent::All).await?;
    let title = "metrics: every expression on the real stack";
    let mut steps = Vec::new();
    match &args.only {
        Some(name) => steps.push(cargo(title, &format!("-- --nocapture {name}"))),
        None => steps.push(cargo(title, &format!("-- --test-threads=1 --skip {PROVOKED_ALERTS}"))),
    }
    if args.part == TestPart::Long {
        steps.push(cargo("metrics: alerts provoked", &format!("-- --nocapture {PROVOKED_ALERTS}")));
    }
    for step in steps {
        results.push(run_step(step, terminal).await?);
    }
    Ok(results)
}

/// Returns the promtool executable, which is installed next to Prometheus.
fn promtool(prometheus: Option<&Path>) -> Option<PathBuf> {
    prometheus.map(|prometheus| prometheus.with_file_name("promtool")).filter(|promtool| promtool.is_file())
}

fn promtool_steps(settings: &Settings, promtool: &Path) -> Result<Vec<Step>> {
    let folder = settings.checkout.join("prometheus");
    let tests = folder.join("tests");
    let mut files: Vec<OsString> = std::fs::read_dir(&tests)
        .map_err(Error::io(&tests))?
        .filter_map(|entry| Some(entry.ok()?.file_name()))
        .filter(|name| Path::new(name).extension().is_some_and(|extension| extension == "yml"))
        .collect();
    files.sort();
    let step = |title, folder: &Path, arguments: Vec<OsString>| Step {
        title,
        program: promtool.to_owned(),
        arguments,
        folder: folder.to_owned(),
        environment: Vec::new(),
    };
    let arguments = |list: &[&str]| list.iter().map(OsString::from).collect::<Vec<_>>();
    Ok(vec![
        step("promtool check config", &folder, arguments(&["check", "config", "prometheus.yml"])),
        step("promtool test rules", &tests, [arguments(&["test", "rules"]), files].concat()),
    ])
}

fn metrics_step(own: &Settings, promtool: &Path, title: &'static str, arguments: &str) -> Step {
    let http = |port| format!("http://{}", loopback(port));
    let ports = own.ports;
    let mut step = cargo(own, title, &format!("test --workspace {FEATURES} {METRICS_TARGET} {arguments}"));
    step.environment = vec![
        ("PIPELINE_TEST_PROMETHEUS", http(ports.prometheus)),
        ("PIPELINE_TEST_PROMTOOL", promtool.display().to_string()),
        ("PIPELINE_TEST_KAFKA_AGENT", http(ports.kafka_agent)),
        ("PIPELINE_TEST_CASSANDRA_AGENT", http(ports.cassandra_agent)),
        ("PIPELINE_TEST_PROCESSOR", http(ports.processor)),
        ("PIPELINE_TEST_SOURCE", http(ports.source)),
        ("PIPELINE_TEST_KAFKA", loopback(ports.kafka)),
        ("PIPELINE_TEST_CASSANDRA", loopback(ports.cassandra)),
        ("PIPELINE_TEST_BIN", own.binaries.display().to_string()),
        ("PIPELINE_TEST_FOLDER", own.folders.root.display().to_string()),
    ];
    step
}
