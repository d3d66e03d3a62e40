//! `docs/sources.md` against the parser: every example is valid, and every key is documented.

use common::contracts::stream::Definition;
use std::collections::BTreeSet;
use toml::{Table, Value};

const DOCUMENT: &str = include_str!("../../../docs/sources.md");

/// What an example does not show.
const BASE: &str = r#"
[stream]
name = "example"
[source]
url = "https://api.example.com/"
[event]
id = "/id"
type = "example"
[[column]]
name = "value"
type = "text"
"#;

/// The examples, each as a complete definition.
fn examples() -> Vec<Table> {
    let blocks = DOCUMENT.split("```toml\n").skip(1).map(|rest| rest.split("```").next().unwrap_or_default());
    blocks
        .map(|block| {
            let mut table: Table = BASE.parse().unwrap_or_else(|e| panic!("{e}"));
            merge(&mut table, block.parse().unwrap_or_else(|e| panic!("{e} in {block}")));
            table
        })
        .collect()
}

fn merge(base: &mut Table, more: Table) {
    for (key, value) in more {
        match (base.get_mut(&key), value) {
            (Some(Value::Table(inner)), Value::Table(more)) => merge(inner, more),
            (_, value) => drop(base.insert(key, value)),
        }
    }
}

#[test]
fn every_example_is_valid() {
    let examples = examples();
    assert!(examples.len() > 15, "only {} examples", examples.len());
    for example in examples {
        if let Err(e) = Definition::parse("example", &example.to_string()) {
            panic!("{e}\n{example}");
        }
    }
}

/// Adds an unknown key to each table whose keys the parser checks.
fn with_unknown_keys(table: &mut Table) {
    for (name, value) in table.iter_mut() {
        let is_free = ["query", "headers", "body", "fields"].contains(&name.as_str());
        match value {
            Value::Table(inner) if !is_free => with_unknown_keys(inner),
            Value::Array(items) => {
                items.iter_mut().filter_map(Value::as_table_mut).for_each(with_unknown_keys)
            }
            _ => {}
        }
    }
    table.insert("unknown_key".to_owned(), Value::Boolean(true));
}

#[test]
fn every_key_of_a_source_an_event_and_a_column_is_documented() {
    let mut keys = BTreeSet::new();
    for mut example in examples() {
        with_unknown_keys(&mut example);
        for problem in Definition::parse("example", &example.to_string()).unwrap_err().problems {
            let is_ours =
                ["`stream", "`source", "`event", "`column"].iter().any(|table| problem.starts_with(table));
            if let Some((_, known)) = problem.split_once("unknown key; use one of ").filter(|_| is_ours) {
                keys.extend(known.split(", ").map(str::to_owned));
            }
        }
    }
    assert!(keys.len() > 50, "{keys:?}");
    let words: BTreeSet<&str> = DOCUMENT.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').collect();
    let missing: Vec<&String> = keys.iter().filter(|key| !words.contains(key.as_str())).collect();
    assert!(missing.is_empty(), "docs/sources.md does not name {missing:?}");
}
