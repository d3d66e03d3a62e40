//! The documentation against the code: `docs/settings.md` is generated from the `config.rs` files, `docs/metrics.md` names every
//! metric, and every path and link exists. `UPDATE_DOCS=1 cargo test -p system-tests --test tree` writes the generated file.

use std::collections::BTreeSet;
use std::fmt::Write;

use super::{assert_none, code, files, metrics, read, root};

const SETTINGS: &str = "docs/settings.md";
/// What comes before the generated part.
const MARK: &str =
    "<!-- generated from the config.rs files: UPDATE_DOCS=1 cargo test -p system-tests --test tree -->\n";
/// Sections of the generated part: heading, folder of config.rs, the struct whose fields are listed.
const SECTIONS: [(&str, &str, &str); 7] = [
    ("All services", "common/src/runtime", "CommonArgs"),
    ("ingest-producer", "ingest-producer/src", "Config"),
    ("ingest-producer run", "ingest-producer/src", "RunArgs"),
    ("stream-processor init", "stream-processor/src", "InitArgs"),
    ("stream-processor run", "stream-processor/src", "RunArgs"),
    ("metrics-dashboard", "metrics-dashboard/src", "Config"),
    ("./run and ./test", "local-stack/src", "PlaceArgs"),
];

/// One setting, as a field of a clap struct declares it.
struct Setting {
    flag: String,
    variable: String,
    default: String,
    meaning: String,
}

/// The fields of a struct that an environment variable sets.
fn settings(folder: &str, name: &str) -> Vec<Setting> {
    let code = code(&format!("crates/{folder}/config.rs"));
    let body = code.split(&format!("pub struct {name} {{\n")).nth(1).unwrap_or_else(|| panic!("no {name}"));
    let body = body.split("\n}").next().unwrap();
    let (mut found, mut field) = (Vec::new(), String::new());
    for line in body.lines() {
        field.push_str(line.trim());
        field.push('\n');
        let Some(declared) = line.trim().strip_prefix("pub ") else { continue };
        found.extend(setting(&field, declared.split(':').next().unwrap()));
        field.clear();
    }
    found
}

fn setting(field: &str, name: &str) -> Option<Setting> {
    let quoted = |key: &str| Some(field.split(key).nth(1)?.split('"').next()?.to_owned());
    let variable = quoted("env = \"")?;
    let doc: Vec<&str> = field.lines().filter_map(|line| line.strip_prefix("/// ")).collect();
    let doc = doc.join(" ");
    let (meaning, described) = match doc.split_once(" [default: ") {
        Some((meaning, default)) => (meaning.to_owned(), default.trim_end_matches(']').to_owned()),
        None => (doc, String::new()),
    };
    let number = field.split("default_value_t = ").nth(1).map(|rest| rest.split([',', ')']).next().unwrap());
    let default = quoted("default_value = \"").or_else(|| number.map(|n| n.trim().replace('_', "")));
    let flag = quoted("long = \"").unwrap_or_else(|| name.replace('_', "-"));
    let default = default.filter(|d| !d.is_empty()).map_or(described, |d| format!("`{d}`"));
    Some(Setting { flag: format!("--{flag}"), variable, default, meaning })
}

fn generated() -> String {
    let mut text = String::new();
    for (heading, folder, name) in SECTIONS {
        let _ =
            write!(text, "\n## {heading}\n\n| variable | flag | default | meaning |\n|---|---|---|---|\n");
        let rows = settings(folder, name);
        assert!(!rows.is_empty(), "no settings in {name} of {folder}");
        for Setting { flag, variable, default, meaning } in rows {
            let _ = writeln!(text, "| `{variable}` | `{flag}` | {default} | {meaning} |");
        }
    }
    text
}

#[test]
fn the_settings_are_documented_as_the_code_declares_them() {
    let text = read(SETTINGS);
    let (intro, listed) = text.split_once(MARK).expect("docs/settings.md has a generated part");
    let generated = generated();
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(root().join(SETTINGS), format!("{intro}{MARK}{generated}")).unwrap();
        return;
    }
    assert_eq!(listed, generated, "run UPDATE_DOCS=1 cargo test -p system-tests --test tree");
}

#[test]
fn every_setting_of_the_code_is_documented() {
    let text = read(SETTINGS);
    let mut broken = Vec::new();
    for file in files("crates", "config.rs") {
        for rest in code(&file).split("env = \"").skip(1) {
            let name = rest.split('"').next().unwrap();
            if !text.contains(&format!("`{name}`")) {
                broken.push(format!("{file}: {name}"));
            }
        }
    }
    assert_none(&broken, "each setting is in docs/settings.md");
}

#[test]
fn every_metric_is_documented_and_no_other() {
    let text = read("docs/metrics.md");
    let words = text.split('`').skip(1).step_by(2);
    let prefixes = ["processor_", "ingest_", "dashboard_", "pipeline_"];
    let documented: BTreeSet<String> =
        words.filter(|word| prefixes.iter().any(|p| word.starts_with(p))).map(str::to_owned).collect();
    let exported = metrics();
    let missing: Vec<String> = exported.difference(&documented).cloned().collect();
    assert_none(&missing, "each metric is in docs/metrics.md");
    let unknown: Vec<String> = documented.difference(&exported).cloned().collect();
    assert_none(&unknown, "docs/metrics.md names metrics that exist");
}

#[test]
fn every_path_that_the_documents_name_exists() {
    let mut broken = Vec::new();
    for file in files(".", ".md") {
        let text = read(&file);
        let folder = file.rsplit_once('/').map_or("", |(folder, _)| folder);
        let in_code = text.split('`').skip(1).step_by(2).filter(|path| is_path(path));
        broken
            .extend(in_code.filter(|path| !root().join(path).exists()).map(|path| format!("{file}: {path}")));
        let links = text.split("](").skip(1).map(|rest| rest.split([')', '#']).next().unwrap());
        let links = links.filter(|link| !link.is_empty() && !link.contains(':'));
        broken.extend(
            links
                .filter(|link| !root().join(folder).join(link).exists())
                .map(|link| format!("{file}: {link}")),
        );
    }
    assert_none(&broken, "each path and link in a document exists");
    let named = read("ARCHITECTURE.md").split('`').skip(1).step_by(2).filter(|path| is_path(path)).count();
    assert!(named > 10, "ARCHITECTURE.md names only {named} paths");
}

#[test]
fn the_map_names_every_folder_of_common_and_the_processor() {
    let text = read("ARCHITECTURE.md");
    let mut unnamed = BTreeSet::new();
    for source in ["crates/common/src/", "crates/stream-processor/src/"] {
        for file in files(source, ".rs") {
            let folder = file[source.len()..].split_once('/').map(|(folder, _)| format!("{source}{folder}/"));
            unnamed.extend(folder.filter(|folder| !text.contains(&format!("`{folder}`"))));
        }
    }
    assert_none(&unnamed.into_iter().collect::<Vec<_>>(), "each folder is in the map of ARCHITECTURE.md");
}

/// Whether a word in code style is a path in this repository.
fn is_path(word: &str) -> bool {
    let folders = ["crates/", "prometheus/", "grafana/", "streams/", "docs/"];
    folders.iter().any(|folder| word.starts_with(folder)) && !word.contains([' ', '{', '<', '*', '…'])
}

#[test]
fn the_readme_is_read_in_a_few_minutes() {
    const MOST_LINES: usize = 120;
    let lines = read("README.md").lines().count();
    assert!(lines <= MOST_LINES, "{lines} lines, at most {MOST_LINES}");
}
