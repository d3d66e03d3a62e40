//! Collects every PromQL expression of the project with its location: panels, variables and annotations of the Grafana
//! dashboards, recording rules and alerts. Reads only files.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::promql::with_variables;

/// The value of `$__rate_interval` in Grafana: four times the scrape interval that the data source sets.
pub const RATE_INTERVAL: &str = "1m";

/// The use of an expression, which determines what it must return.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A query of a panel, with the labels that its legend uses.
    Panel(Vec<String>),
    /// An annotation query, with the labels that its title uses. It may have no series.
    Annotation(Vec<String>),
    /// A dashboard variable that lists the values of this label.
    Variable(String),
    /// A recording rule with this name.
    Record(String),
    /// An alert with this name.
    Alert(String),
}

/// A PromQL expression.
#[derive(Debug, Clone)]
pub struct Expression {
    /// The location of the expression, for error messages.
    pub place: String,
    /// The expression with all Grafana variables replaced.
    pub text: String,
    /// The use of the expression.
    pub kind: Kind,
}

/// The root folder of the checkout.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// Name and content of the files in a folder of the checkout that end with `ending`, sorted by name.
pub fn files(folder: &str, ending: &str) -> Vec<(String, String)> {
    let mut files: Vec<(String, String)> = std::fs::read_dir(root().join(folder))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.to_string_lossy().ends_with(ending))
        .map(|path| {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            (name, std::fs::read_to_string(&path).unwrap())
        })
        .collect();
    files.sort();
    assert!(!files.is_empty(), "no {ending} files in {folder}");
    files
}

/// The Grafana dashboards with their file names.
pub fn dashboards() -> Vec<(String, Value)> {
    files("grafana/dashboards", ".json")
        .into_iter()
        .map(|(name, text)| {
            let dashboard = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{name}: {e}"));
            (name, dashboard)
        })
        .collect()
}

/// The list at a JSON pointer. Empty if it is absent.
pub fn list<'a>(value: &'a Value, path: &str) -> &'a [Value] {
    value.pointer(path).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// The string at a JSON pointer. Empty if it is absent.
pub fn text<'a>(value: &'a Value, path: &str) -> &'a str {
    value.pointer(path).and_then(Value::as_str).unwrap_or_default()
}

/// All expressions of the Grafana dashboards.
pub fn dashboard_expressions() -> Vec<Expression> {
    dashboards().iter().flat_map(|(_, dashboard)| expressions_of_dashboard(dashboard)).collect()
}

fn expressions_of_dashboard(dashboard: &Value) -> Vec<Expression> {
    let title = text(dashboard, "/title");
    let mut found = Vec::new();
    let mut add = |place: String, expression: &str, kind| {
        found.push(Expression { place, text: with_variables(expression, RATE_INTERVAL), kind });
    };
    for panel in list(dashboard, "/panels") {
        for target in list(panel, "/targets") {
            let place = format!("{title} / {} / {}", text(panel, "/title"), text(target, "/refId"));
            add(place, text(target, "/expr"), Kind::Panel(braced(text(target, "/legendFormat"))));
        }
    }
    for variable in list(dashboard, "/templating/list") {
        let query = text(variable, "/definition");
        let inner = query.strip_prefix("label_values(").and_then(|q| q.strip_suffix(')'));
        let (metric, label) =
            inner.and_then(|q| q.rsplit_once(',')).unwrap_or_else(|| panic!("{title}: {query}"));
        add(format!("{title} / variable"), metric, Kind::Variable(label.trim().to_owned()));
    }
    for annotation in list(dashboard, "/annotations/list").iter().filter(|a| a.get("expr").is_some()) {
        let place = format!("{title} / annotation {}", text(annotation, "/name"));
        add(place, text(annotation, "/expr"), Kind::Annotation(braced(text(annotation, "/titleFormat"))));
    }
    found
}

/// All expressions of the rule files. Each rule starts with `record` or `alert`. Its expression follows `expr` on the
/// same line or as a folded block below it.
pub fn rule_expressions() -> Vec<Expression> {
    files("prometheus/rules", ".yml")
        .iter()
        .flat_map(|(file, text)| expressions_of_rule_file(file, text))
        .collect()
}

fn expressions_of_rule_file(file: &str, text: &str) -> Vec<Expression> {
    let mut found = Vec::new();
    let mut kind = None;
    let mut lines = text.lines().peekable();
    while let Some(line) = lines.next() {
        let line = line.trim().trim_start_matches("- ");
        if let Some(name) = line.strip_prefix("record: ") {
            kind = Some(Kind::Record(name.to_owned()));
        } else if let Some(name) = line.strip_prefix("alert: ") {
            kind = Some(Kind::Alert(name.to_owned()));
        } else if let Some(expression) = line.strip_prefix("expr: ") {
            let mut text = expression.trim_matches('\'').replace("''", "'");
            if expression == ">-" {
                let deep = |line: &&str| line.starts_with("          ");
                text =
                    std::iter::from_fn(|| lines.next_if(deep)).map(str::trim).collect::<Vec<_>>().join(" ");
            }
            let kind = kind.take().unwrap_or_else(|| panic!("{file}: `{line}` does not belong to a rule"));
            let place = match &kind {
                Kind::Record(name) | Kind::Alert(name) => format!("{file} / {name}"),
                _ => file.to_owned(),
            };
            found.push(Expression { place, text, kind });
        }
    }
    found
}

/// The label names in double braces.
fn braced(text: &str) -> Vec<String> {
    text.split("{{").skip(1).filter_map(|rest| Some(rest.split_once("}}")?.0.trim().to_owned())).collect()
}
