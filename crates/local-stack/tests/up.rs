//! Errors and cleanup of `./run` when the stack cannot start. The tests run the program in a checkout without servers.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, helpers included")]

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use local_stack::config::is_free;
use local_stack::process::{Down, Record};
use tempfile::TempDir;

/// Time limit for a failing start, long enough for a busy machine.
const FAIL_WITHIN: Duration = Duration::from_secs(30);

/// The first port of the next test. The tests run in parallel, so each gets its own ports from one free range of 120.
static NEXT_BASE: LazyLock<AtomicU16> = LazyLock::new(|| {
    let own = 10_000 + (std::process::id() % 80) as u16 * 120;
    let mut ranges = (own..20_000 - 120).step_by(120).chain((10_000..own).step_by(120));
    AtomicU16::new(ranges.find(|first| (*first..first + 120).all(is_free)).unwrap())
});
const PORTS_PER_TEST: u16 = 20;

/// A temporary checkout, and the first of its ports.
struct Checkout {
    folder: TempDir,
    base: u16,
}

impl Checkout {
    /// A checkout whose cache has the expected folders but no servers.
    fn without_servers() -> Self {
        let folder = tempfile::tempdir().unwrap();
        for file in [
            "crates/local-stack/Cargo.toml",
            "cache/kafka-4.3.1/none.jar",
            "cache/cassandra-5.0.9/jamm-0.jar",
            "cache/jmx-agent-1.0.1/jmx_prometheus_javaagent-0.jar",
            "cache/prometheus-debian/usr/bin/prometheus",
            // The data folder counts as formatted, so that the start of the broker fails and not the formatting.
            ".local/data/kafka/meta.properties",
            "checkpoints/0.redb",
            "checkpoints/.gitkeep",
        ] {
            let file = folder.path().join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, "").unwrap();
        }
        fs::create_dir_all(folder.path().join(".local/run")).unwrap();
        let base = NEXT_BASE.fetch_add(PORTS_PER_TEST, Ordering::Relaxed);
        Self { folder, base }
    }

    fn call(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_local-stack"));
        command.args(arguments).current_dir(self.folder.path()).stdin(Stdio::null());
        command.env("PIPELINE_CACHE", self.folder.path().join("cache"));
        command.env("PIPELINE_PORT_BASE", self.base.to_string());
        command
    }

    fn run_folder(&self) -> PathBuf {
        self.folder.path().join(".local/run")
    }

    fn records(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.run_folder()).unwrap().map(|entry| entry.unwrap().path());
        entries.filter(|path| path.extension().is_some_and(|extension| extension == "json")).collect()
    }
}

/// Asserts that the program failed and that the last line of its stderr contains all `expected` texts.
fn assert_fails(output: &Output, expected: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    let line = stderr.lines().last().unwrap_or_default();
    assert!(line.starts_with("fail ") && expected.iter().all(|part| line.contains(part)), "{stderr}");
}

#[test]
fn a_server_that_exits_during_the_start_is_named_with_its_log_and_nothing_keeps_running() {
    let checkout = Checkout::without_servers();
    let since = Instant::now();
    let output = checkout.call(&["up", "--servers-only"]);
    assert_fails(&output, &["ended while starting (exit code 1)", "log: ", ".local/logs/"]);
    assert!(since.elapsed() < FAIL_WITHIN);
    assert_eq!(checkout.records(), Vec::<PathBuf>::new());
}

#[test]
fn a_failed_detached_start_reports_the_cause_and_leaves_nothing_running() {
    let checkout = Checkout::without_servers();
    let output = checkout.call(&["up", "--servers-only", "--detach"]);
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{stdout}");
    assert!(
        stdout.lines().last().is_some_and(|line| line.starts_with("fail ") && line.contains("log: ")),
        "{stdout}"
    );
    assert_eq!(checkout.records(), Vec::<PathBuf>::new());
}

#[test]
fn status_shows_a_refused_part_with_its_last_log_line() {
    let checkout = Checkout::without_servers();
    let mut record = Record::of_this_process("stream-processor");
    record.started_ticks += 1;
    record.restarts = 2;
    let last_words = "another layout".to_owned();
    record.down = Some(Down { ended: "exit code 3".to_owned(), last_words, refused: true });
    record.write(&checkout.run_folder()).unwrap();
    let stdout = String::from_utf8(checkout.call(&["status"]).stdout).unwrap();
    let row = stdout.lines().find(|line| line.trim_start().starts_with("stream-processor ")).unwrap();
    assert_eq!(row.split_whitespace().collect::<Vec<_>>(), ["stream-processor", "refused", "2"], "{stdout}");
    assert!(stdout.contains("stream-processor: exit code 3: another layout"), "{stdout}");
    let json = String::from_utf8(checkout.call(&["status", "--json"]).stdout).unwrap();
    assert!(json.contains(r#""last_words":"another layout""#) && json.contains(r#""restarts":2"#), "{json}");
}

#[test]
fn an_occupied_port_is_named_with_a_remedy() {
    let checkout = Checkout::without_servers();
    let occupied = checkout.base + 2;
    let _listener = TcpListener::bind(("127.0.0.1", occupied)).unwrap();
    let output = checkout.call(&["up", "--servers-only"]);
    assert_fails(&output, &[&format!("{occupied} (cassandra)"), "--port-base"]);
    assert_eq!(checkout.records(), Vec::<PathBuf>::new());
}

#[test]
fn a_wrong_java_version_is_named_with_a_remedy() {
    let checkout = Checkout::without_servers();
    let java = checkout.folder.path().join("jdk/bin/java");
    fs::create_dir_all(java.parent().unwrap()).unwrap();
    fs::write(&java, "#!/bin/sh\necho 'openjdk version \"21.0.2\" 2024-01-16' >&2\n").unwrap();
    fs::set_permissions(&java, fs::Permissions::from_mode(0o755)).unwrap();
    let home = checkout.folder.path().join("jdk");
    let output = checkout.command(&["up", "--servers-only"]).env("JAVA_HOME", home).output().unwrap();
    assert_fails(&output, &["is Java 21", "needs 17", "JAVA_HOME"]);
}

#[test]
fn a_running_part_is_neither_started_again_nor_reset() {
    let checkout = Checkout::without_servers();
    Record::of_this_process("kafka").write(&checkout.run_folder()).unwrap();
    assert_fails(&checkout.call(&["up", "--servers-only"]), &["already running", "./run stop"]);
    assert_fails(&checkout.call(&["reset"]), &["kafka", "./run stop"]);
    assert!(checkout.folder.path().join("checkpoints/0.redb").exists());
}

#[test]
fn an_unrelated_process_with_the_pid_of_a_part_is_not_killed() {
    let checkout = Checkout::without_servers();
    let mut bystander = Command::new("sleep").arg("600").spawn().unwrap();
    let mut record = Record::of_this_process("kafka");
    record.pid = bystander.id();
    // The start time differs, as if the part had exited and another process had its pid now.
    record.started_ticks -= 1;
    record.write(&checkout.run_folder()).unwrap();
    let output = checkout.call(&["stop"]);
    let alive = bystander.try_wait().unwrap().is_none();
    bystander.kill().unwrap();
    bystander.wait().unwrap();
    assert!(output.status.success() && alive);
    assert_eq!(checkout.records(), Vec::<PathBuf>::new());
}

#[test]
fn reset_removes_data_and_checkpoints_but_keeps_the_checkpoint_folder() {
    let checkout = Checkout::without_servers();
    assert!(checkout.call(&["reset"]).status.success());
    assert!(!checkout.folder.path().join(".local").exists());
    assert!(!checkout.folder.path().join("checkpoints/0.redb").exists());
    assert!(checkout.folder.path().join("checkpoints/.gitkeep").exists());
}
