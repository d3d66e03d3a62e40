//! Tests of the dashboards, rules and alerts on a real stack under load. `./test metrics` starts Kafka and Cassandra
//! with their JMX agents, the three services, a source and Prometheus, and passes their addresses in environment
//! variables. Every expression must return series, and the check itself must detect mistakes.
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
use promql::parse;
use sources::{Expression, dashboard_expressions, rule_expressions};
use tokio::process::{Child, Command};

/// Rates cover one minute, so every expression has a value after two minutes of load.
const WITHIN: Duration = Duration::from_secs(180);

/// Pause between two checks of a condition.
const POLL_INTERVAL: Duration = Duration::from_secs(3);

/// The value of an environment variable that `./test metrics` sets.
pub fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set; run these tests with ./test metrics"))
}

/// A client of the Prometheus that scrapes the stack.
pub fn prometheus() -> Prometheus {
    Prometheus::at(&variable("PIPELINE_TEST_PROMETHEUS"))
}

/// Sends events at a steady rate until the returned process is dropped. `duplicates` percent of them are sent twice.
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

/// Checks all expressions until none has a fault. Panics with the remaining faults after [`WITHIN`].
async fn wait_until_no_faults(prometheus: &mut Prometheus, expressions: &[Expression]) {
    let since = Instant::now();
    let mut ticks = tokio::time::interval(POLL_INTERVAL);
    loop {
        ticks.tick().await;
        prometheus.clear_cache();
        let mut found = Vec::new();
        for expression in expressions {
            let faults = prometheus.faults(expression).await;
            found.extend(
                faults
                    .into_iter()
                    .map(|fault| format!("{}: {fault}\n    {}", expression.place, expression.text)),
            );
        }
        if found.is_empty() {
            return;
        }
        assert!(since.elapsed() < WITHIN, "after {} s of load:\n  {}", WITHIN.as_secs(), found.join("\n  "));
    }
}

#[tokio::test]
async fn every_expression_returns_series_and_the_check_detects_every_mistake() {
    let mut load = load(5);
    let mut prometheus = prometheus();
    let expressions = [dashboard_expressions(), rule_expressions()].concat();
    assert!(
        expressions.len() > 200,
        "only {} expressions are found in dashboards and rules",
        expressions.len()
    );
    wait_until_no_faults(&mut prometheus, &expressions).await;
    assert!(load.try_wait().unwrap().is_none(), "the load has ended before the check");
    let mut undetected = Vec::new();
    let mut tried = 0;
    for expression in &expressions {
        for (mistake, text) in mistakes(expression) {
            tried += 1;
            let broken = Expression { text, ..expression.clone() };
            if prometheus.faults(&broken).await.is_empty() {
                undetected.push(format!("{}: {mistake}: {}", broken.place, broken.text));
            }
        }
    }
    assert!(
        undetected.is_empty(),
        "the check does not detect these mistakes:\n  {}",
        undetected.join("\n  ")
    );
    assert!(tried > 500, "only {tried} mistakes were tried");
    let firing = prometheus.firing().await;
    assert!(firing.is_empty(), "alerts fire on a healthy stack: {firing:?}");
}

/// Variants of an expression with one mistake each: a renamed metric, a wrong suffix or a mistyped label.
fn mistakes(expression: &Expression) -> Vec<(&'static str, String)> {
    let text = &expression.text;
    let query = parse(text);
    let mut variants = Vec::new();
    for selector in query.selectors.iter().filter(|selector| selector.name != "ALERTS") {
        let with = |name: &str| {
            let (before, after) = (&text[..selector.at], &text[selector.at + selector.name.len()..]);
            format!("{before}{name}{after}")
        };
        variants.push(("renamed metric", with(&format!("{}_old", selector.name))));
        let suffix = match selector.name.strip_suffix("_total") {
            Some(bare) => bare.to_owned(),
            None => format!("{}_total", selector.name),
        };
        variants.push(("wrong suffix", with(&suffix)));
        for label in &selector.labels {
            let matchers = &selector.text[selector.name.len()..];
            let mistyped = matchers.replacen(label.as_str(), &format!("{label}x"), 1);
            variants.push(("mistyped label", text.replacen(matchers, &mistyped, 1)));
        }
    }
    for label in &query.groupings {
        let list = |end: &str| (format!("({label}{end}"), format!("({label}x{end}"));
        for (right, wrong) in [list(")"), list(",")] {
            if text.contains(&right) {
                variants.push(("mistyped grouping", text.replacen(&right, &wrong, 1)));
            }
        }
    }
    variants
}
