//! What can be said of boards, rules and agents without a server: that boards load into any Grafana and explain themselves,
//! that every alert has its words, its twin and its tests, that rules and golden scrapes of the agents agree. `./test metrics`
//! asks a real Prometheus.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, helpers included")]

#[path = "metrics/promql.rs"]
mod promql;
#[path = "metrics/sources.rs"]
mod sources;

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use sources::{Kind, boards, files, list, of_boards, of_rules, root, text};

const AGENTS: [&str; 2] = ["kafka", "cassandra"];
/// Columns of Grafana's grid.
const COLUMNS: u64 = 24;
/// A description says what to conclude, not only what is shown.
const SHORTEST_DESCRIPTION: usize = 20;

fn read(file: &str) -> String {
    std::fs::read_to_string(root().join(file)).unwrap_or_else(|e| panic!("{file}: {e}"))
}

fn assert_none(broken: &[String], rule: &str) {
    assert!(broken.is_empty(), "{rule}:\n  {}", broken.join("\n  "));
}

/// Panels that show something, each with `board / panel`.
fn panels() -> Vec<(String, Value)> {
    let of = |board: &Value| {
        let shown = list(board, "/panels").iter().filter(|panel| text(panel, "/type") != "row");
        let place = |panel: &Value| format!("{} / {}", text(board, "/title"), text(panel, "/title"));
        shown.map(|panel| (place(panel), panel.clone())).collect::<Vec<_>>()
    };
    boards().iter().flat_map(|(_, board)| of(board)).collect()
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
        need(text(&panel, "/description").len() >= SHORTEST_DESCRIPTION, "no description");
        need(!text(&panel, &format!("{defaults}/unit")).is_empty(), "no unit");
        need(!text(&panel, &format!("{defaults}/noValue")).is_empty(), "says nothing when it is empty");
        need(steps.first().is_some_and(|step| step["value"].is_null()), "no thresholds");
        need(["stat", "timeseries"].contains(&text(&panel, "/type")), "a panel type the boards do not use");
        need(!list(&panel, "/targets").is_empty(), "asks nothing");
        for target in list(&panel, "/targets") {
            let expression = text(target, "/expr");
            let counts =
                ["rate(", "increase(", "delta("].iter().any(|function| expression.contains(function));
            need(!counts || expression.contains("[$__rate_interval]"), "a rate over a fixed time");
            need(!text(target, "/legendFormat").is_empty(), "a series without a name");
        }
    }
    assert_none(&broken, "panels explain themselves");
}

#[test]
fn boards_load_into_any_grafana_and_lead_to_one_another() {
    let provisioned = read("grafana/provisioning/datasources/prometheus.yml");
    let uid = provisioned.lines().find_map(|line| line.trim().strip_prefix("uid: ")).unwrap().to_owned();
    let mut broken = Vec::new();
    let mut uids = BTreeSet::new();
    for (file, board) in boards() {
        let mut need = |holds: bool, what: &str| {
            if !holds {
                broken.push(format!("{file}: {what}"));
            }
        };
        let all = board.to_string();
        need(
            uids.insert(text(&board, "/uid").to_owned()) && text(&board, "/uid").starts_with("pipeline-"),
            "its uid",
        );
        need(board["schemaVersion"].as_u64().is_some_and(|version| version >= 39), "its schema version");
        need(
            !text(&board, "/title").is_empty() && !text(&board, "/description").is_empty(),
            "title and description",
        );
        need(!all.contains("${DS_") && !all.contains("__inputs"), "an input that nobody resolves");
        let datasources =
            all.matches("\"type\":\"prometheus\"").count() + all.matches("-- Grafana --").count();
        need(
            all.matches(&format!("\"uid\":\"{uid}\"")).count() + 1 == datasources,
            "a datasource by another uid",
        );
        let links: Vec<&str> = list(&board, "/links").iter().map(|link| text(link, "/type")).collect();
        need(links == ["dashboards", "link"], "links to the other boards and the page");
        need(list(&board, "/tags").contains(&"pipeline".into()), "the tag that links look for");
        let marks: Vec<&str> = list(&board, "/annotations/list").iter().map(|a| text(a, "/name")).collect();
        need(["Restarts", "Runs", "Spikes"].iter().all(|mark| marks.contains(mark)), "marks");
        let variables: Vec<&str> =
            list(&board, "/templating/list").iter().map(|v| text(v, "/name")).collect();
        need(!variables.is_empty(), "variables");
        for name in all
            .split('$')
            .skip(1)
            .map(|rest| rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap())
        {
            need(name.starts_with("__") || variables.contains(&name), &format!("the variable {name}"));
        }
        for variable in &variables {
            need(
                all.contains(&format!("\\\"${variable}\\\"")),
                &format!("the variable {variable} is used nowhere"),
            );
        }
    }
    assert_none(&broken, "a board lacks or has wrong");
}

#[test]
fn rows_ask_a_question_and_panels_do_not_overlap() {
    let mut broken = Vec::new();
    for (file, board) in boards() {
        let (mut ids, mut cells) = (BTreeSet::new(), BTreeSet::new());
        for panel in list(&board, "/panels") {
            let title = text(panel, "/title");
            if !ids.insert(panel["id"].as_u64()) {
                broken.push(format!("{file}: {title}: its id is another's"));
            }
            if text(panel, "/type") == "row" && !title.ends_with('?') {
                broken.push(format!("{file}: the row `{title}` asks nothing"));
            }
            let side = |name: &str| panel["gridPos"][name].as_u64().unwrap();
            for x in side("x")..side("x") + side("w") {
                for y in side("y")..side("y") + side("h") {
                    if x >= COLUMNS || !cells.insert((x, y)) {
                        broken.push(format!("{file}: {title}: overlaps at {x}, {y}"));
                    }
                }
            }
        }
        if text(&list(&board, "/panels")[0], "/type") != "row" {
            broken.push(format!("{file}: begins without a question"));
        }
    }
    broken.dedup();
    assert_none(&broken, "boards are laid out for a reader");
}

/// Blocks of the rule files, by alert.
fn alert_blocks() -> BTreeMap<String, String> {
    let mut blocks = BTreeMap::new();
    for (_, text) in files("prometheus/rules", ".yml") {
        for block in text.split("- alert: ").skip(1) {
            let name = block.lines().next().unwrap().to_owned();
            assert!(blocks.insert(name.clone(), block.to_owned()).is_none(), "{name} is there twice");
        }
    }
    blocks
}

#[test]
fn every_alert_says_why_it_is_there_and_what_to_do_and_has_a_twin() {
    let blocks = alert_blocks();
    let mut broken = Vec::new();
    for (name, block) in &blocks {
        for word in ["summary: \"", "reason: \"", "runbook: \"", "severity: "] {
            if !block.contains(word) {
                broken.push(format!("{name}: no {word}"));
            }
        }
        let is_twin = name.ends_with("Unknown");
        if !is_twin && !blocks.contains_key(&format!("{name}Unknown")) {
            broken.push(format!("{name}: no {name}Unknown for the day its figures are gone"));
        }
        if is_twin != block.contains("absent(") {
            broken.push(format!("{name}: absences are the twins' matter, and only theirs"));
        }
    }
    assert!(blocks.len() >= 32, "the alerts are no longer found");
    assert_none(&broken, "alerts are complete");
}

#[test]
fn every_alert_has_a_test_in_which_it_fires_and_one_in_which_it_does_not() {
    let tests: String = files("prometheus/tests", ".yml").into_iter().map(|(_, text)| text).collect();
    let mut broken = Vec::new();
    for name in alert_blocks().keys() {
        for (case, samples) in [("fires", "exp_samples: [{ value: 1 }]"), ("keeps still", "exp_samples: []")]
        {
            let title = format!("- name: {name} {case}\n");
            let block = tests.split(&title).nth(1).and_then(|rest| rest.split("  - name: ").next());
            let asks = format!("alertname=\"{name}\", alertstate=\"firing\"");
            if !block.is_some_and(|block| block.contains(&asks) && block.contains(samples)) {
                broken.push(format!("{name} {case}"));
            }
        }
    }
    assert_none(&broken, "no test of this kind in prometheus/tests");
}

/// Families with their types, as `# TYPE` tells them.
fn golden(server: &str) -> BTreeMap<String, String> {
    let scrape = read(&format!("crates/local-stack/tests/golden/{server}.prom"));
    let line = |line: &str| {
        let (name, kind) = line.strip_prefix("# TYPE ")?.split_once(' ')?;
        Some((name.to_owned(), kind.to_owned()))
    };
    scrape.lines().filter_map(line).collect()
}

#[test]
fn each_rule_of_an_agent_exports_one_family_of_its_type_and_nothing_else_is_exported() {
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
                "{server}: {name} is there twice"
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
fn everything_asked_of_the_agents_is_in_the_golden_scrapes() {
    let families: BTreeSet<String> = AGENTS.iter().flat_map(|server| golden(server).into_keys()).collect();
    let mut broken = Vec::new();
    for expression in [of_boards(), of_rules()].concat() {
        for selector in promql::asked(&expression.text).selectors {
            let of_agent =
                ["kafka_", "cassandra_", "jvm_"].iter().any(|prefix| selector.name.starts_with(prefix));
            let family = selector.name.trim_end_matches("_sum").trim_end_matches("_count");
            if of_agent && !families.contains(family) && !families.contains(&selector.name) {
                broken.push(format!("{}: {}", expression.place, selector.name));
            }
        }
    }
    assert_none(&broken, "no agent exports this");
}

#[test]
fn both_configurations_scrape_the_same_parts_and_load_the_rules() {
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
fn every_recorded_figure_is_used() {
    let expressions = [of_boards(), of_rules()].concat();
    let asked: BTreeSet<String> = expressions
        .iter()
        .flat_map(|expression| promql::asked(&promql::comparing_all(&expression.text)).selectors)
        .map(|selector| selector.name)
        .collect();
    let recorded = expressions.iter().filter_map(|expression| match &expression.kind {
        Kind::Record(name) => Some(name.clone()),
        _ => None,
    });
    let unused: Vec<String> = recorded.filter(|name| !asked.contains(name)).collect();
    assert_none(&unused, "recorded and asked for by nobody");
}
