//! Mutation tests of the promtool tests. Each mutation of an alert's expression must fail one of that alert's tests.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::sources::{Kind, files, rule_expressions};
use crate::variable;

const COMPARISONS: [(&str, &str); 4] = [(" > ", " <= "), (" < ", " >= "), (" == ", " != "), (" != ", " == ")];

const SET_OPERATORS: [&str; 3] = [" and ", " unless ", " or "];

/// The mutations of an expression: always false, always true, each comparison negated, each threshold multiplied and
/// divided by ten, and each operand of an outermost set operator alone.
fn mutants(expression: &str) -> Vec<String> {
    let mut mutants = vec!["vector(0) == 1".to_owned(), "vector(1)".to_owned()];
    for (comparison, negated) in COMPARISONS {
        for (at, _) in expression.match_indices(comparison) {
            let (left, right) = (&expression[..at], &expression[at + comparison.len()..]);
            mutants.push(format!("{left}{negated}{right}"));
            let digits = right.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(right.len());
            if let Some(threshold) = right[..digits].parse::<f64>().ok().filter(|threshold| *threshold != 0.0)
            {
                for factor in [10.0, 0.1] {
                    mutants.push(format!("{left}{comparison}{}{}", threshold * factor, &right[digits..]));
                }
            }
        }
    }
    for operator in SET_OPERATORS {
        for (at, _) in expression.match_indices(operator) {
            let (left, right) = (&expression[..at], &expression[at + operator.len()..]);
            if left.matches('(').count() == left.matches(')').count() {
                let right = right.strip_prefix("on ").map_or(right, |on| on.split_once(") ").unwrap().1);
                mutants.extend([left.to_owned(), right.to_owned()]);
            }
        }
    }
    mutants
}

/// The rule file with the expressions of the alerts in `mutants` replaced by their mutations.
fn mutated(text: &str, mutants: &BTreeMap<&str, &str>) -> String {
    let (mut lines, mut alert) = (Vec::new(), None);
    let mut rest = text.lines().peekable();
    while let Some(line) = rest.next() {
        alert = line.trim().strip_prefix("- alert: ").or(alert);
        match alert.filter(|_| line.trim().starts_with("expr: ")).and_then(|alert| mutants.get(alert)) {
            Some(mutant) => {
                lines.push(format!("        expr: '{}'", mutant.replace('\'', "''")));
                while rest.next_if(|line| line.starts_with("          ")).is_some() {}
            }
            None => lines.push(line.to_owned()),
        }
    }
    lines.join("\n")
}

/// The names of the alerts with a failing test.
fn failing(promtool: &str, tests: &Path) -> Vec<String> {
    let names = files("prometheus/tests", ".yml").into_iter().map(|(name, _)| name);
    let output =
        Command::new(promtool).args(["test", "rules"]).args(names).current_dir(tests).output().unwrap();
    let printed = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).replace('\\', "");
    let names = printed.split("alertname=\"").skip(1).map(|rest| rest.split('"').next().unwrap().to_owned());
    let names: Vec<String> = names.collect();
    assert!(output.status.success() || !names.is_empty(), "{printed}");
    names
}

#[test]
fn a_changed_alert_fails_one_of_its_tests() {
    let promtool = variable("PIPELINE_TEST_PROMTOOL");
    let mut mutants_by_alert = BTreeMap::new();
    for rule in rule_expressions() {
        if let Kind::Alert(name) = rule.kind {
            mutants_by_alert.insert(name, mutants(&rule.text));
        }
    }
    let folder = tempfile::tempdir().unwrap();
    for part in ["rules", "tests"] {
        fs::create_dir(folder.path().join(part)).unwrap();
    }
    for (name, text) in files("prometheus/tests", ".yml") {
        fs::write(folder.path().join("tests").join(name), text).unwrap();
    }
    let mut survivors = Vec::new();
    // Each round mutates all alerts at once, because no alert depends on another.
    for round in 0..mutants_by_alert.values().map(Vec::len).max().unwrap() {
        let mutants: BTreeMap<&str, &str> = mutants_by_alert
            .iter()
            .filter_map(|(name, mutants)| Some((name.as_str(), mutants.get(round)?.as_str())))
            .collect();
        for (name, text) in files("prometheus/rules", ".yml") {
            fs::write(folder.path().join("rules").join(name), mutated(&text, &mutants)).unwrap();
        }
        let failing = failing(&promtool, &folder.path().join("tests"));
        let undetected =
            mutants.into_iter().filter(|(name, _)| !failing.iter().any(|failing| failing == name));
        survivors.extend(undetected.map(|(name, mutant)| format!("{name}: {mutant}")));
    }
    assert!(
        survivors.is_empty(),
        "no test fails although an alert was changed to\n  {}",
        survivors.join("\n  ")
    );
}
