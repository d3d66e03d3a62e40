//! Checks the rules of CONTRIBUTING.md that a program can check, on the files that git tracks.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking, helpers included")]

mod docs;
mod manifests;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Maximum number of lines of a file without its tests.
const MAX_LINES: usize = 500;
/// The crate whose unit tests do not follow the rule yet.
const UNSORTED_TESTS: &str = "crates/ingest-producer/";
const SERVICES: [&str; 3] = ["ingest-producer", "stream-processor", "metrics-dashboard"];
/// Folders whose modules must contain no async code, clock, I/O or logging.
const PURE_FOLDERS: [&str; 4] = [
    "common/src/contracts",
    "ingest-producer/src/draft",
    "stream-processor/src/record",
    "stream-processor/src/count",
];
/// Single modules for which the same holds.
const PURE_MODULES: [&str; 14] = [
    "common/src/readers/windows.rs",
    "ingest-producer/src/draft.rs",
    "ingest-producer/src/schedule.rs",
    "ingest-producer/src/planner.rs",
    "ingest-producer/src/source/request.rs",
    "ingest-producer/src/source/paginate.rs",
    "stream-processor/src/commands/init/contract.rs",
    "stream-processor/src/commands/verify/compare.rs",
    "stream-processor/src/pipeline/start.rs",
    "metrics-dashboard/src/rates.rs",
    "metrics-dashboard/src/lag.rs",
    "metrics-dashboard/src/overview.rs",
    "metrics-dashboard/src/reason.rs",
    "metrics-dashboard/src/services.rs",
];
/// Code that must not occur in a pure module.
const IMPURE_CODE: [&str; 9] = [
    "async fn",
    ".await",
    "tokio::",
    "tracing::",
    "SystemTime",
    "Instant::now",
    "Utc::now",
    "std::fs",
    "std::net",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// Files below `under` that end with `ending`, sorted by path. Includes untracked files that git does not ignore.
fn files(under: &str, ending: &str) -> Vec<String> {
    let listed = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard", "--", under])
        .current_dir(root())
        .output()
        .expect("git lists the files");
    let mut files: Vec<String> = String::from_utf8(listed.stdout)
        .unwrap()
        .lines()
        .filter(|f| f.ends_with(ending) && root().join(f).is_file())
        .map(str::to_owned)
        .collect();
    files.sort();
    assert!(!files.is_empty(), "no {ending} files below {under}");
    files
}

fn read(file: &str) -> String {
    std::fs::read_to_string(root().join(file)).unwrap_or_else(|e| panic!("{file}: {e}"))
}

/// The text of a source file without its test module.
fn code(file: &str) -> String {
    const MARK: &str = "\n#[cfg(test)]\n";
    let text = read(file);
    let opens_tests = |at: &usize| {
        let next = text[at + MARK.len()..].lines().next().unwrap_or_default();
        next.contains("mod ") && next.ends_with('{')
    };
    let tests = text.match_indices(MARK).map(|(at, _)| at).find(opens_tests);
    text[..tests.unwrap_or(text.len())].to_owned()
}

fn is_test(file: &str) -> bool {
    file.contains("/tests/") || file.ends_with("/tests.rs")
}

/// Asserts that nothing breaks `rule`.
fn assert_none(broken: &[String], rule: &str) {
    assert!(broken.is_empty(), "{rule}:\n  {}", broken.join("\n  "));
}

#[test]
fn every_file_starts_with_a_doc_comment() {
    let broken: Vec<_> = files("crates", ".rs").into_iter().filter(|f| !read(f).starts_with("//!")).collect();
    assert_none(&broken, "a file starts with `//!`");
}

#[test]
fn no_file_exceeds_the_maximum_length() {
    let broken: Vec<_> = files("crates", ".rs")
        .into_iter()
        .filter_map(|f| Some((code(&f).lines().count(), f)).filter(|(lines, _)| *lines > MAX_LINES))
        .map(|(lines, f)| format!("{f}: {lines} lines without tests, at most {MAX_LINES}"))
        .collect();
    assert_none(&broken, "files are short enough");
}

#[test]
fn unit_tests_are_in_their_file_if_it_stays_short_enough_and_otherwise_beside_it() {
    let mut broken = Vec::new();
    for file in files("crates", ".rs").into_iter().filter(|file| file.contains("/src/")) {
        if file.starts_with(UNSORTED_TESTS) {
            continue;
        }
        let text = read(&file);
        let beside = file.replace(".rs", "/tests.rs");
        let lines = text.lines().count();
        if text.contains("#[cfg(test)]\nmod tests;") {
            let together = lines + read(&beside).lines().count();
            if together <= MAX_LINES {
                broken.push(format!("{beside} belongs into {file}: together they have {together} lines"));
            }
        } else if lines > MAX_LINES {
            broken
                .push(format!("the tests of {file} belong into {beside}: together they have {lines} lines"));
        }
    }
    assert_none(
        &broken,
        "unit tests are at the end of their file, or in NAME/tests.rs if it would be too long",
    );
}

#[test]
fn no_file_marks_unfinished_work() {
    let marks = [["TO", "DO"].concat(), ["FIX", "ME"].concat(), ["#[ig", "nore"].concat()];
    let mut broken = Vec::new();
    for file in [files("crates", ".rs"), files("crates", ".ts"), files("crates", ".sh")].concat() {
        for (number, line) in read(&file).lines().enumerate() {
            if marks.iter().any(|mark| line.contains(mark.as_str())) {
                broken.push(format!("{file}:{}: {}", number + 1, line.trim()));
            }
        }
    }
    assert_none(&broken, "no file marks unfinished work or ignores a test");
}

#[test]
fn pure_modules_stay_pure() {
    let mut broken = Vec::new();
    let in_folders = PURE_FOLDERS.iter().flat_map(|folder| files(&format!("crates/{folder}"), ".rs"));
    let modules = PURE_MODULES.iter().map(|file| format!("crates/{file}"));
    for file in in_folders.chain(modules).filter(|file| !is_test(file)) {
        let code = code(&file);
        for line in code.lines().filter(|l| !l.trim_start().starts_with("//")) {
            if let Some(word) = IMPURE_CODE.iter().find(|w| line.contains(**w)) {
                broken.push(format!("{file}: {word}"));
            }
        }
    }
    assert_none(&broken, "pure modules have no async, clock, I/O or logging");
}

#[test]
fn only_config_reads_the_environment() {
    let readers = ["env::var", "env::vars", "env::args"];
    let broken: Vec<_> = files("crates", ".rs")
        .into_iter()
        .filter(|f| !f.ends_with("/config.rs") && !is_test(f))
        .filter(|f| readers.iter().any(|r| code(f).contains(r)))
        .collect();
    assert_none(&broken, "only config.rs reads the environment");
}

/// The metric names: string literals in `metrics.rs` that start with a prefix of the pipeline's metrics.
fn metrics() -> BTreeSet<String> {
    let prefixes = ["processor_", "ingest_", "dashboard_", "pipeline_"];
    let mut names = BTreeSet::new();
    for file in files("crates", "/metrics.rs")
        .iter()
        .filter(|file| file.contains("/src/") && !file.contains("system-tests"))
    {
        let code = code(file);
        for literal in code.split('"').skip(1).step_by(2) {
            let is_name = literal.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
            if is_name && prefixes.iter().any(|p| literal.starts_with(p) && literal.len() > p.len()) {
                names.insert(literal.to_owned());
            }
        }
    }
    assert!(names.len() > 20, "only these metrics are found in metrics.rs: {names:?}");
    names
}

#[test]
fn only_metrics_rs_contains_metric_names() {
    let names = metrics();
    let broken: Vec<_> = files("crates", ".rs")
        .into_iter()
        .filter(|f| SERVICES.iter().any(|s| f.starts_with(&format!("crates/{s}/src/"))))
        .filter(|f| !f.ends_with("/metrics.rs") && !is_test(f))
        .filter(|f| names.iter().any(|n| code(f).contains(&format!("\"{n}\""))))
        .collect();
    assert_none(&broken, "only metrics.rs contains metric names");
}

#[test]
fn no_committed_file_contains_a_home_folder_or_a_package_registry() {
    let forbidden = [
        ["/ro", "ot/"].concat(),
        ["static.cr", "ates.io"].concat(),
        ["registry.npm", "js.org"].concat(),
        ["repo1.ma", "ven.org"].concat(),
        ["repo.maven.ap", "ache.org"].concat(),
    ];
    let mut broken = Vec::new();
    for file in files(".", "") {
        // The lock file contains the address of the registry index.
        if file == "Cargo.lock" {
            continue;
        }
        let Ok(text) = std::fs::read_to_string(root().join(&file)) else { continue };
        broken.extend(forbidden.iter().filter(|w| text.contains(w.as_str())).map(|w| format!("{file}: {w}")));
    }
    assert_none(&broken, "committed files contain no home folder and no package registry");
}
