//! The dependencies of each crate: which crates of the workspace it may import, and that it uses what it declares.

use super::{assert_none, code, files, is_test, read};

/// Every crate that another one could import.
const CRATES: [&str; 6] =
    ["common", "local-stack", "source-simulator", "ingest-producer", "stream-processor", "metrics-dashboard"];
#[test]
fn crates_import_only_the_crates_below_them() {
    let mut broken = Vec::new();
    for manifest in files("crates", "Cargo.toml") {
        let name = manifest.split('/').nth(1).unwrap();
        let allowed: &[&str] = match name {
            "common" => &[],
            "system-tests" => &["common", "local-stack", "source-simulator"],
            _ => &["common"],
        };
        let text = read(&manifest);
        let imported = CRATES.iter().filter(|other| text.contains(&format!("\n{other}.workspace")));
        broken.extend(
            imported.filter(|other| !allowed.contains(other)).map(|other| format!("{name} imports {other}")),
        );
    }
    assert_none(&broken, "services share only `common`, Kafka and Cassandra");
}

/// The names in a section of a manifest.
fn declared(manifest: &str, section: &str) -> Vec<String> {
    let text = read(manifest);
    let body = text.split(&format!("\n[{section}]\n")).nth(1).unwrap_or_default();
    let body = body.split("\n[").next().unwrap();
    let names = body.lines().filter(|line| line.starts_with(|c: char| c.is_ascii_lowercase()));
    names.map(|line| line.split(['.', ' ', '=']).next().unwrap().to_owned()).collect()
}

/// Whether code names the crate `dependency`, as in `crate::item`.
fn is_used(dependency: &str, code: &str) -> bool {
    let path = format!("{}::", dependency.replace('-', "_"));
    let lines = code.lines().filter(|line| !line.trim_start().starts_with("//"));
    lines
        .flat_map(|line| line.match_indices(&path).map(move |(at, _)| &line[..at]))
        .any(|before| !before.ends_with(|c: char| c.is_alphanumeric() || c == '_') && !before.ends_with("::"))
}

#[test]
fn every_dependency_is_used() {
    let mut broken = Vec::new();
    for manifest in files("crates", "Cargo.toml") {
        let folder = manifest.trim_end_matches("Cargo.toml");
        let sources = files(folder, ".rs");
        let program: String = sources.iter().filter(|file| !is_test(file)).map(|file| code(file)).collect();
        let tests: String = sources.iter().map(|file| read(file)).collect();
        for (section, code) in [("dependencies", &program), ("dev-dependencies", &tests)] {
            let unused = declared(&manifest, section).into_iter().filter(|name| !is_used(name, code));
            broken.extend(unused.map(|name| format!("{manifest}: {name} in [{section}]")));
        }
    }
    let all: String = files("crates", "Cargo.toml").iter().map(|manifest| read(manifest)).collect();
    let unused = declared("Cargo.toml", "workspace.dependencies")
        .into_iter()
        .filter(|name| !all.contains(&format!("\n{name}.")) && !all.contains(&format!("\n{name} =")));
    broken.extend(unused.map(|name| format!("Cargo.toml: {name}")));
    assert_none(&broken, "the source of a crate names each of its dependencies");
}
