//! Every expression of the project, each with the place where it stands: panels, variables and annotations of the boards,
//! recording rules and alerts. Reads files, asks nobody.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::promql::with_variables;

/// What `$__rate_interval` is in Grafana: four times the longest scrape interval, which the datasource names.
pub const RATE_INTERVAL: &str = "1m";

/// What an expression is for, which decides what it must return.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// Shown; the labels that its legend names.
    Panel(Vec<String>),
    /// Marks that appear only when something happens; the labels that its title names.
    Annotation(Vec<String>),
    /// Values of one label.
    Variable(String),
    /// Kept under this name.
    Record(String),
    /// Fires under this name.
    Alert(String),
}

/// One expression.
#[derive(Debug, Clone)]
pub struct Expression {
    /// Where it stands, for people.
    pub place: String,
    /// As Prometheus is asked.
    pub text: String,
    /// What for.
    pub kind: Kind,
}

/// Root of the checkout.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// Files of a folder of the checkout with this ending, by name.
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

/// All boards by file name.
pub fn boards() -> Vec<(String, Value)> {
    files("grafana/dashboards", ".json")
        .into_iter()
        .map(|(name, text)| {
            let board = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{name}: {e}"));
            (name, board)
        })
        .collect()
}

/// A list in a board; absent is empty.
pub fn list<'a>(value: &'a Value, path: &str) -> &'a [Value] {
    value.pointer(path).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// A text in a board; absent is empty.
pub fn text<'a>(value: &'a Value, path: &str) -> &'a str {
    value.pointer(path).and_then(Value::as_str).unwrap_or_default()
}

/// Everything that the boards ask.
pub fn of_boards() -> Vec<Expression> {
    boards().iter().flat_map(|(_, board)| of_board(board)).collect()
}

fn of_board(board: &Value) -> Vec<Expression> {
    let title = text(board, "/title");
    let mut found = Vec::new();
    let mut add = |place: String, expression: &str, kind| {
        found.push(Expression { place, text: with_variables(expression, RATE_INTERVAL), kind });
    };
    for panel in list(board, "/panels") {
        for target in list(panel, "/targets") {
            let place = format!("{title} / {} / {}", text(panel, "/title"), text(target, "/refId"));
            add(place, text(target, "/expr"), Kind::Panel(braced(text(target, "/legendFormat"))));
        }
    }
    for variable in list(board, "/templating/list") {
        let query = text(variable, "/definition");
        let inner = query.strip_prefix("label_values(").and_then(|q| q.strip_suffix(')'));
        let (metric, label) =
            inner.and_then(|q| q.rsplit_once(',')).unwrap_or_else(|| panic!("{title}: {query}"));
        add(format!("{title} / variable"), metric, Kind::Variable(label.trim().to_owned()));
    }
    for annotation in list(board, "/annotations/list").iter().filter(|a| a.get("expr").is_some()) {
        let place = format!("{title} / annotation {}", text(annotation, "/name"));
        add(place, text(annotation, "/expr"), Kind::Annotation(braced(text(annotation, "/titleFormat"))));
    }
    found
}

/// Everything in the rule files: each rule begins with `record` or `alert`, its expression stands in `expr`, on the same line
/// or folded below.
pub fn of_rules() -> Vec<Expression> {
    files("prometheus/rules", ".yml").iter().flat_map(|(file, text)| of_rule_file(file, text)).collect()
}

fn of_rule_file(file: &str, text: &str) -> Vec<Expression> {
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
            let kind = kind.take().unwrap_or_else(|| panic!("{file}: `{line}` belongs to no rule"));
            let place = match &kind {
                Kind::Record(name) | Kind::Alert(name) => format!("{file} / {name}"),
                _ => file.to_owned(),
            };
            found.push(Expression { place, text, kind });
        }
    }
    found
}

/// Labels in double braces.
fn braced(text: &str) -> Vec<String> {
    text.split("{{").skip(1).filter_map(|rest| Some(rest.split_once("}}")?.0.trim().to_owned())).collect()
}
