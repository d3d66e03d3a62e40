//! `./test metrics`: promtool over configuration, rules and their tests, then the whole system with Prometheus, and the
//! target `metrics` against it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::{Closing, FEATURES, Step, call};
use crate::cli::{TestArgs, TestPart};
use crate::config::{Settings, loopback};
use crate::error::{Error, Result};
use crate::private::{self, Private};
use crate::stack::{Extent, Stack};
use crate::terminal::Terminal;

/// The tests that take minutes and leave the stack broken: they come last.
const PROVOKED: &str = "provoked";

/// Starts everything on ports and folders of its own, runs the checks, stops everything whatever happened.
pub(super) async fn run(settings: &Settings, args: &TestArgs, terminal: Terminal) -> Result<Vec<Closing>> {
    let folder = private::folder(settings, "metrics-")?;
    let own = Private::prepare(settings, folder, terminal).await?;
    let mut stack = Stack::new(own.settings.clone(), terminal);
    let closings = tokio::select! {
        closings = checks(&own, &mut stack, args, terminal) => closings,
        error = private::interrupted() => Err(error),
    };
    stack.stop().await;
    if !matches!(&closings, Ok(closings) if closings.iter().all(|closing| closing.passed)) {
        own.keep(terminal);
    }
    closings
}

async fn checks(
    own: &Private,
    stack: &mut Stack,
    args: &TestArgs,
    terminal: Terminal,
) -> Result<Vec<Closing>> {
    let Some(promtool) = promtool(own.installed.prometheus.as_deref()) else {
        let line =
            "Prometheus is not here: Debian's package brings it (`apt-get download prometheus` must work)";
        return Ok(vec![Closing { title: "metrics", passed: false, lines: vec![line.to_owned()] }]);
    };
    let cargo = |title, arguments: &[&str]| cargo(&own.settings, &promtool, title, arguments);
    let mut closings = Vec::new();
    for step in promtool_steps(&own.settings, &promtool)? {
        closings.push(call(step, terminal).await?);
    }
    // Built before the servers start: the compiler would take their memory and time.
    let built = call(cargo("metrics: build", &["--no-run"]), terminal).await?;
    if !built.passed {
        closings.push(built);
        return Ok(closings);
    }
    stack.start(&own.installed, Extent::All).await?;
    let every = "metrics: every expression on the real stack";
    let mut steps = Vec::new();
    match &args.only {
        Some(name) => steps.push(cargo(every, &["--", "--nocapture", name])),
        None => steps.push(cargo(every, &["--", "--test-threads=1", "--skip", PROVOKED])),
    }
    if args.part == TestPart::Long {
        steps.push(cargo("metrics: alerts provoked", &["--", "--nocapture", PROVOKED]));
    }
    for step in steps {
        closings.push(call(step, terminal).await?);
    }
    Ok(closings)
}

/// promtool comes with Prometheus.
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
    let words = |words: &[&str]| words.iter().map(OsString::from).collect::<Vec<_>>();
    Ok(vec![
        step("promtool check config", &folder, words(&["check", "config", "prometheus.yml"])),
        step("promtool test rules", &tests, [words(&["test", "rules"]), files].concat()),
    ])
}

fn cargo(own: &Settings, promtool: &Path, title: &'static str, arguments: &[&str]) -> Step {
    let http = |port| format!("http://{}", loopback(port));
    let ports = own.ports;
    Step {
        title,
        program: own.cargo.clone(),
        arguments: ["test", "--workspace", FEATURES, "--test", "metrics"]
            .iter()
            .chain(arguments)
            .map(OsString::from)
            .collect(),
        folder: own.checkout.clone(),
        environment: vec![
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
        ],
    }
}
