//! What is watched, on the real stack: Kafka and Cassandra with their agents, the three services, a source and Prometheus
//! with the rules, started and named in the environment by `./test metrics`, with load put through. Every expression of
//! boards, rules and alerts must return series; and the check itself must notice what is wrong.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, helpers included")]

mod alerts;
mod checker;
mod mutants;
mod promql;
mod scrapes;
mod sources;

use std::process::Stdio;
use std::time::{Duration, Instant};

use checker::Prometheus;
use promql::asked;
use sources::{Expression, of_boards, of_rules};
use tokio::process::{Child, Command};

/// Rates look a minute back, so every figure is there within two minutes of load.
const WITHIN: Duration = Duration::from_secs(180);

const ASK_EVERY: Duration = Duration::from_secs(3);

/// A variable that `./test metrics` sets.
pub fn variable(name: &str) -> String {
    std::env::var(name)
        .unwrap_or_else(|_| panic!("{name} is not set: these tests are started by ./test metrics"))
}

/// The Prometheus that scrapes the stack.
pub fn prometheus() -> Prometheus {
    Prometheus::at(&variable("PIPELINE_TEST_PROMETHEUS"))
}

/// Events at a steady rate, this many percent of them twice, until it is dropped.
pub fn load(duplicates: u32) -> Child {
    let program = std::path::Path::new(&variable("PIPELINE_TEST_BIN")).join("ingest-producer");
    Command::new(program)
        .args(["stress", "--seconds", "3600", "--rate", "200", "--duplicates", &duplicates.to_string()])
        .env("PIPELINE_KAFKA_BROKERS", variable("PIPELINE_TEST_KAFKA"))
        .env("PIPELINE_CASSANDRA_NODES", variable("PIPELINE_TEST_CASSANDRA"))
        .env("PIPELINE_STREAM", sources::root().join("streams/user_created.toml"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

/// Asks until nothing is wrong; panics with what is still wrong after [`WITHIN`].
async fn until_nothing_is_wrong(prometheus: &mut Prometheus, expressions: &[Expression]) {
    let since = Instant::now();
    let mut ticks = tokio::time::interval(ASK_EVERY);
    loop {
        ticks.tick().await;
        prometheus.look_again();
        let mut wrong = Vec::new();
        for expression in expressions {
            let faults = prometheus.faults(expression).await;
            wrong.extend(
                faults
                    .into_iter()
                    .map(|fault| format!("{}: {fault}\n    {}", expression.place, expression.text)),
            );
        }
        if wrong.is_empty() {
            return;
        }
        assert!(since.elapsed() < WITHIN, "after {} s of load:\n  {}", WITHIN.as_secs(), wrong.join("\n  "));
    }
}

#[tokio::test]
async fn every_expression_returns_series_and_the_check_notices_each_mistake() {
    let mut load = load(5);
    let mut prometheus = prometheus();
    let expressions = [of_boards(), of_rules()].concat();
    assert!(expressions.len() > 200, "boards and rules are no longer found: {}", expressions.len());
    until_nothing_is_wrong(&mut prometheus, &expressions).await;
    assert!(load.try_wait().unwrap().is_none(), "the load has ended before the check");
    let mut unnoticed = Vec::new();
    let mut tried = 0;
    for expression in &expressions {
        for (mistake, text) in mistakes(expression) {
            tried += 1;
            let broken = Expression { text, ..expression.clone() };
            if prometheus.faults(&broken).await.is_empty() {
                unnoticed.push(format!("{}: {mistake}: {}", broken.place, broken.text));
            }
        }
    }
    assert!(unnoticed.is_empty(), "mistakes that the check lets pass:\n  {}", unnoticed.join("\n  "));
    assert!(tried > 500, "only {tried} mistakes were tried");
    let firing = prometheus.firing().await;
    assert!(firing.is_empty(), "alerts fire although all is well: {firing:?}");
}

/// A renamed metric, a wrong suffix, a mistyped label: each expression once with each of them, wherever it fits.
fn mistakes(expression: &Expression) -> Vec<(&'static str, String)> {
    let text = &expression.text;
    let asked = asked(text);
    let mut made = Vec::new();
    for selector in asked.selectors.iter().filter(|selector| selector.name != "ALERTS") {
        let with = |name: &str| {
            let (before, after) = (&text[..selector.at], &text[selector.at + selector.name.len()..]);
            format!("{before}{name}{after}")
        };
        made.push(("renamed metric", with(&format!("{}_old", selector.name))));
        let suffix = match selector.name.strip_suffix("_total") {
            Some(bare) => bare.to_owned(),
            None => format!("{}_total", selector.name),
        };
        made.push(("wrong suffix", with(&suffix)));
        for label in &selector.labels {
            let matchers = &selector.text[selector.name.len()..];
            let mistyped = matchers.replacen(label.as_str(), &format!("{label}x"), 1);
            made.push(("mistyped label", text.replacen(matchers, &mistyped, 1)));
        }
    }
    for label in &asked.groupings {
        let list = |end: &str| (format!("({label}{end}"), format!("({label}x{end}"));
        for (right, wrong) in [list(")"), list(",")] {
            if text.contains(&right) {
                made.push(("mistyped grouping", text.replacen(&right, &wrong, 1)));
            }
        }
    }
    made
}
