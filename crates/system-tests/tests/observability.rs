//! Checks of the Grafana dashboards, alerts and JMX agent rules that need no server. Dashboards must load into any
//! Grafana and explain themselves. Every alert must have annotations, a companion alert and tests. The rules of the
//! agents must match the golden scrapes. `./test metrics` checks the expressions against a real Prometheus.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, helpers included")]

#[path = "metrics/promql.rs"]
mod promql;
#[path = "metrics/sources.rs"]
mod sources;

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use sources::{Kind, dashboard_expressions, dashboards, files, list, root, rule_expressions, text};

/// Servers with a JMX agent.
const AGENTS: [&str; 2] = ["kafka", "cassandra"];
/// Number of columns of Grafana's grid.
const COLUMNS: u64 = 24;
/// Minimum length of a panel's description in bytes.
const MIN_DESCRIPTION_BYTES: usize = 20;

fn read(file: &str) -> String {
    std::fs::read_to_string(root().join(file)).unwrap_or_else(|e| panic!("{file}: {e}"))
}

/// Asserts that no part breaks `rule`.
fn assert_none(broken: &[String], rule: &str) {
    assert!(broken.is_empty(), "{rule}:\n  {}", broken.join("\n  "));
}

/// All panels except rows, each with its location `DASHBOARD / PANEL`.
fn panels() -> Vec<(String, Value)> {
    let of = |dashboard: &Value| {
        let shown = list(dashboard, "/panels").iter().filter(|panel| text(panel, "/type") != "row");
        let place = |panel: &Value| format!("{} / {}", text(dashboard, "/title"), text(panel, "/title"));
        shown.map(|panel| (place(panel), panel.clone())).collect::<Vec<_>>()
    };
    dashboards().iter().flat_map(|(_, dashboard)| of(dashboard)).collect()
}

#[test]
fn every_panel_explains_itself_and_has_a_unit_and_thresholds() {
    let mut broken = Vec::new();
    for (place, panel) in panels() {
        let defaults = "/fieldConfig/defaults";
        let steps = list(&panel, &format!("{defaults}/thresholds/steps"));
        let mut need = |holds: bool, what: &str| {
            if !holds {
                broken.push(format!("{place}: {what}"));
            }
        };
        need(text(&panel, "/description").len() >= MIN_DESCRIPTION_BYTES, "no description");
        need(!text(&panel, &format!("{defaults}/unit")).is_empty(), "no unit");
        need(
            !text(&panel, &format!("{defaults}/noValue")).is_empty(),
            "no text for an empty result (noValue)",
        );
        need(steps.first().is_some_and(|step| step["value"].is_null()), "no thresholds");
        need(
            ["stat", "timeseries"].contains(&text(&panel, "/type")),
            "its type is neither stat nor timeseries",
        );
        need(!list(&panel, "/targets").is_empty(), "no query");
        for target in list(&panel, "/targets") {
            let expression = text(target, "/expr");
            let counts =
                ["rate(", "increase(", "delta("].iter().any(|function| expression.contains(function));
            need(!counts || expression.contains("[$__rate_interval]"), "a rate without $__rate_interval");
            need(!text(target, "/legendFormat").is_empty(), "a query without a legend");
        }
    }
    assert_none(&broken, "every panel explains itself and has a unit, thresholds and queries");
}

#[test]
fn dashboards_load_into_any_grafana_and_link_to_each_other() {
    let provisioned = read("grafana/provisioning/datasources/prometheus.yml");
    let uid = provisioned.lines().find_map(|line| line.trim().strip_prefix("uid: ")).unwrap().to_owned();
    let mut broken = Vec::new();
    let mut uids = BTreeSet::new();
    for (file, dashboard) in dashboards() {
        let mut need = |holds: bool, what: &str| {
            if !holds {
                broken.push(format!("{file}: {what}"));
            }
        };
        let all = dashboard.to_string();
        need(
            uids.insert(text(&dashboard, "/uid").to_owned())
                && text(&dashboard, "/uid").starts_with("pipeline-"),
            "the uid is not unique or does not start with `pipeline-`",
        );
        need(
            dashboard["schemaVersion"].as_u64().is_some_and(|version| version >= 39),
            "the schema version is below 39",
        );
        need(
            !text(&dashboard, "/title").is_empty() && !text(&dashboard, "/description").is_empty(),
            "no title or no description",
        );
        need(
            !all.contains("${DS_") && !all.contains("__inputs"),
            "an input variable that provisioning does not resolve",
        );
        let datasources =
            all.matches("\"type\":\"prometheus\"").count() + all.matches("-- Grafana --").count();
        need(
            all.matches(&format!("\"uid\":\"{uid}\"")).count() + 1 == datasources,
            "a data source with another uid",
        );
        let links: Vec<&str> = list(&dashboard, "/links").iter().map(|link| text(link, "/type")).collect();
        need(links == ["dashboards", "link"], "no links to the other dashboards and the live page");
        need(
            list(&dashboard, "/tags").contains(&"pipeline".into()),
            "no tag `pipeline`, which the links use",
        );
        let annotations: Vec<&str> =
            list(&dashboard, "/annotations/list").iter().map(|a| text(a, "/name")).collect();
        need(
            ["Restarts", "Runs", "Spikes"].iter().all(|name| annotations.contains(name)),
            "an annotation is missing",
        );
        let variables: Vec<&str> =
            list(&dashboard, "/templating/list").iter().map(|v| text(v, "/name")).collect();
        need(!variables.is_empty(), "no variables");
        for name in all
            .split('$')
            .skip(1)
            .map(|rest| rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap())
        {
            need(
                name.starts_with("__") || variables.contains(&name),
                &format!("the variable {name} is not defined"),
            );
        }
        for variable in &variables {
            need(
                all.contains(&format!("\\\"${variable}\\\"")),
                &format!("the variable {variable} is not used"),
            );
        }
    }
    assert_none(&broken, "every dashboard loads and links");
}

#[test]
fn row_titles_are_questions_and_panels_do_not_overlap() {
    let mut broken = Vec::new();
    for (file, dashboard) in dashboards() {
        let (mut ids, mut cells) = (BTreeSet::new(), BTreeSet::new());
        for panel in list(&dashboard, "/panels") {
            let title = text(panel, "/title");
            if !ids.insert(panel["id"].as_u64()) {
                broken.push(format!("{file}: {title}: another panel has the same id"));
            }
            if text(panel, "/type") == "row" && !title.ends_with('?') {
                broken.push(format!("{file}: the title of the row `{title}` is not a question"));
            }
            let side = |name: &str| panel["gridPos"][name].as_u64().unwrap();
            for x in side("x")..side("x") + side("w") {
                for y in side("y")..side("y") + side("h") {
                    if x >= COLUMNS || !cells.insert((x, y)) {
                        broken
                            .push(format!("{file}: {title}: overlaps another panel or the edge at {x}, {y}"));
                    }
                }
            }
        }
        if text(&list(&dashboard, "/panels")[0], "/type") != "row" {
            broken.push(format!("{file}: the first panel is not a row"));
        }
    }
    broken.dedup();
    assert_none(&broken, "panels are grouped by questions and do not overlap");
}

/// The YAML block of each alert in the rule files, by alert name.
fn alert_blocks() -> BTreeMap<String, String> {
    let mut blocks = BTreeMap::new();
    for (_, text) in files("prometheus/rules", ".yml") {
        for block in text.split("- alert: ").skip(1) {
            let name = block.lines().next().unwrap().to_owned();
            assert!(blocks.insert(name.clone(), block.to_owned()).is_none(), "{name} is defined twice");
        }
    }
    blocks
}

#[test]
fn every_alert_has_a_summary_a_reason_a_runbook_and_a_companion_alert() {
    let blocks = alert_blocks();
    let mut broken = Vec::new();
    for (name, block) in &blocks {
        for key in ["summary: \"", "reason: \"", "runbook: \"", "severity: "] {
            if !block.contains(key) {
                broken.push(format!("{name}: no {key}"));
            }
        }
        let is_companion = name.ends_with("Unknown");
        if !is_companion && !blocks.contains_key(&format!("{name}Unknown")) {
            broken.push(format!(
                "{name}: no companion alert {name}Unknown, which fires when the metric disappears"
            ));
        }
        if is_companion != block.contains("absent(") {
            broken.push(format!("{name}: all companion alerts and no other alerts use absent()"));
        }
    }
    assert!(blocks.len() >= 32, "only {} alerts are found in the rule files", blocks.len());
    assert_none(&broken, "alerts are complete");
}

#[test]
fn every_alert_has_one_test_in_which_it_fires_and_one_in_which_it_stays_silent() {
    let tests: String = files("prometheus/tests", ".yml").into_iter().map(|(_, text)| text).collect();
    let mut broken = Vec::new();
    for name in alert_blocks().keys() {
        for (case, samples) in [("fires", "exp_samples: [{ value: 1 }]"), ("stays silent", "exp_samples: []")]
        {
            let title = format!("- name: {name} {case}\n");
            let block = tests.split(&title).nth(1).and_then(|rest| rest.split("  - name: ").next());
            let query = format!("alertname=\"{name}\", alertstate=\"firing\"");
            if !block.is_some_and(|block| block.contains(&query) && block.contains(samples)) {
                broken.push(format!("{name} {case}"));
            }
        }
    }
    assert_none(&broken, "each alert has both tests in prometheus/tests");
}

/// The type of each metric family in a golden scrape, from the `# TYPE` lines.
fn golden(server: &str) -> BTreeMap<String, String> {
    let scrape = read(&format!("crates/system-tests/tests/golden/{server}.prom"));
    let line = |line: &str| {
        let (name, kind) = line.strip_prefix("# TYPE ")?.split_once(' ')?;
        Some((name.to_owned(), kind.to_owned()))
    };
    scrape.lines().filter_map(line).collect()
}

#[test]
fn the_rules_of_each_agent_match_the_families_of_its_golden_scrape() {
    for server in AGENTS {
        let rules = read(&format!("prometheus/jmx/{server}.yml"));
        let mut expected = BTreeMap::new();
        for rule in rules.split("  - pattern: ").skip(1) {
            let field = |name: &str| {
                let line = rule.lines().find_map(|line| line.trim().strip_prefix(name));
                line.unwrap_or_else(|| panic!("{server}: no {name} in {rule}")).to_owned()
            };
            let (name, kind) = (field("name: "), field("type: ").to_lowercase());
            assert!(field("help: ").len() > 10, "{server}: {name} has no help");
            let suffix = if kind == "counter" { "_total" } else { "" };
            assert!(
                expected.insert(format!("{name}{suffix}"), kind).is_none(),
                "{server}: {name} is exported twice"
            );
        }
        let exported: BTreeMap<String, String> =
            golden(server).into_iter().filter(|(name, _)| name.starts_with(&format!("{server}_"))).collect();
        assert_eq!(exported, expected, "{server}");
        let known = |name: &str| ["jvm_", "process_", "jmx_"].iter().any(|prefix| name.starts_with(prefix));
        assert!(golden(server).keys().all(|name| known(name) || exported.contains_key(name)), "{server}");
    }
}

#[test]
fn every_agent_metric_in_an_expression_is_in_a_golden_scrape() {
    let families: BTreeSet<String> = AGENTS.iter().flat_map(|server| golden(server).into_keys()).collect();
    let mut broken = Vec::new();
    for expression in [dashboard_expressions(), rule_expressions()].concat() {
        for selector in promql::parse(&expression.text).selectors {
            let of_agent =
                ["kafka_", "cassandra_", "jvm_"].iter().any(|prefix| selector.name.starts_with(prefix));
            let family = selector.name.trim_end_matches("_sum").trim_end_matches("_count");
            if of_agent && !families.contains(family) && !families.contains(&selector.name) {
                broken.push(format!("{}: {}", expression.place, selector.name));
            }
        }
    }
    assert_none(&broken, "every agent metric in an expression is exported");
}

#[test]
fn both_prometheus_configurations_scrape_the_same_jobs_and_load_the_rules() {
    let jobs = |file: &str| -> Vec<String> {
        let text = read(file);
        assert!(
            text.lines().any(|line| line.starts_with("rule_files: ") && line.contains("rules/*.yml")),
            "{file}"
        );
        text.lines().filter_map(|line| line.trim().strip_prefix("- job_name: ").map(str::to_owned)).collect()
    };
    let compose = jobs("prometheus/prometheus.yml");
    assert_eq!(compose, jobs("prometheus/prometheus-local.yml"));
    assert_eq!(compose.len(), 6);
    let mounted = read("docker-compose.yml");
    for folder in
        ["./prometheus/rules:/etc/prometheus/rules", "./grafana/dashboards:", "./grafana/provisioning:"]
    {
        assert!(mounted.contains(folder), "{folder} is not mounted");
    }
}

#[test]
fn every_recorded_metric_is_used() {
    let expressions = [dashboard_expressions(), rule_expressions()].concat();
    let used: BTreeSet<String> = expressions
        .iter()
        .flat_map(|expression| promql::parse(&promql::with_bool_comparisons(&expression.text)).selectors)
        .map(|selector| selector.name)
        .collect();
    let recorded = expressions.iter().filter_map(|expression| match &expression.kind {
        Kind::Record(name) => Some(name.clone()),
        _ => None,
    });
    let unused: Vec<String> = recorded.filter(|name| !used.contains(name)).collect();
    assert_none(&unused, "every recorded metric is used in an expression");
}
