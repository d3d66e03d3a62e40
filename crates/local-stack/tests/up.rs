//! What `./run` says and leaves behind when it cannot start: the program itself, in a checkout that holds nothing.
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

/// "Within seconds", on a busy machine.
const SECONDS: Duration = Duration::from_secs(30);

/// The tests run at once; each has ports of its own, from one row looked up before any of them takes a port.
static FIRST: LazyLock<AtomicU16> = LazyLock::new(|| {
    let own = 10_000 + (std::process::id() % 80) as u16 * 120;
    let mut rows = (own..20_000 - 120).step_by(120).chain((10_000..own).step_by(120));
    AtomicU16::new(rows.find(|row| (*row..row + 120).all(is_free)).unwrap())
});
const PORTS_EACH: u16 = 20;

struct Checkout {
    folder: TempDir,
    base: u16,
}

impl Checkout {
    /// A checkout whose cache holds the right folders and no server.
    fn hollow() -> Self {
        let folder = tempfile::tempdir().unwrap();
        for file in [
            "crates/local-stack/Cargo.toml",
            "cache/kafka-4.3.1/none.jar",
            "cache/cassandra-5.0.9/jamm-0.jar",
            "cache/jmx-agent-1.0.1/jmx_prometheus_javaagent-0.jar",
            "cache/prometheus-debian/usr/bin/prometheus",
            // Formatted already, so that the broker itself is what fails.
            ".local/data/kafka/meta.properties",
            "checkpoints/0.redb",
            "checkpoints/.gitkeep",
        ] {
            let file = folder.path().join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, "").unwrap();
        }
        fs::create_dir_all(folder.path().join(".local/run")).unwrap();
        let base = FIRST.fetch_add(PORTS_EACH, Ordering::Relaxed);
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

fn refused(output: &Output, words: &[&str]) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let line = said.lines().last().unwrap_or_default();
    assert!(line.starts_with("fail ") && words.iter().all(|word| line.contains(word)), "{said}");
}

#[test]
fn a_server_that_dies_at_start_is_named_with_its_log_and_nothing_is_left_running() {
    let checkout = Checkout::hollow();
    let since = Instant::now();
    let output = checkout.call(&["up", "--servers-only"]);
    refused(&output, &["ended while starting (exit code 1)", "log: ", ".local/logs/"]);
    assert!(since.elapsed() < SECONDS);
    assert_eq!(checkout.records(), Vec::<PathBuf>::new());
}

#[test]
fn a_start_in_the_background_that_fails_says_why_and_leaves_nothing_running() {
    let checkout = Checkout::hollow();
    let output = checkout.call(&["up", "--servers-only", "--detach"]);
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.lines().last().is_some_and(|line| line.starts_with("fail ") && line.contains("log: ")),
        "{said}"
    );
    assert_eq!(checkout.records(), Vec::<PathBuf>::new());
}

#[test]
fn a_part_that_refused_is_shown_with_its_last_words() {
    let checkout = Checkout::hollow();
    let mut record = Record::of_this_process("stream-processor");
    record.started_ticks += 1;
    record.restarts = 2;
    let words = "another layout".to_owned();
    record.down = Some(Down { ended: "exit code 3".to_owned(), words, refused: true });
    record.write(&checkout.run_folder()).unwrap();
    let said = String::from_utf8(checkout.call(&["status"]).stdout).unwrap();
    let row = said.lines().find(|line| line.trim_start().starts_with("stream-processor ")).unwrap();
    assert_eq!(row.split_whitespace().collect::<Vec<_>>(), ["stream-processor", "refused", "2"], "{said}");
    assert!(said.contains("stream-processor: exit code 3: another layout"), "{said}");
    let json = String::from_utf8(checkout.call(&["status", "--json"]).stdout).unwrap();
    assert!(json.contains(r#""last_words":"another layout""#) && json.contains(r#""restarts":2"#), "{json}");
}

#[test]
fn a_taken_port_is_named_with_the_way_out() {
    let checkout = Checkout::hollow();
    let taken = checkout.base + 2;
    let _listener = TcpListener::bind(("127.0.0.1", taken)).unwrap();
    let output = checkout.call(&["up", "--servers-only"]);
    refused(&output, &[&format!("{taken} (cassandra)"), "--port-base"]);
    assert_eq!(checkout.records(), Vec::<PathBuf>::new());
}

#[test]
fn another_java_is_named_with_the_way_out() {
    let checkout = Checkout::hollow();
    let java = checkout.folder.path().join("jdk/bin/java");
    fs::create_dir_all(java.parent().unwrap()).unwrap();
    fs::write(&java, "#!/bin/sh\necho 'openjdk version \"21.0.2\" 2024-01-16' >&2\n").unwrap();
    fs::set_permissions(&java, fs::Permissions::from_mode(0o755)).unwrap();
    let home = checkout.folder.path().join("jdk");
    let output = checkout.command(&["up", "--servers-only"]).env("JAVA_HOME", home).output().unwrap();
    refused(&output, &["is Java 21", "needs 17", "JAVA_HOME"]);
}

#[test]
fn what_runs_is_neither_started_twice_nor_reset() {
    let checkout = Checkout::hollow();
    Record::of_this_process("kafka").write(&checkout.run_folder()).unwrap();
    refused(&checkout.call(&["up", "--servers-only"]), &["already running", "./run stop"]);
    refused(&checkout.call(&["reset"]), &["kafka", "./run stop"]);
    assert!(checkout.folder.path().join("checkpoints/0.redb").exists());
}

#[test]
fn a_process_that_only_has_the_pid_of_a_part_is_never_killed() {
    let checkout = Checkout::hollow();
    let mut bystander = Command::new("sleep").arg("600").spawn().unwrap();
    let mut record = Record::of_this_process("kafka");
    record.pid = bystander.id();
    // As if the part had ended long ago and its pid belonged to another process now.
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
fn reset_removes_data_and_checkpoints_and_keeps_the_folder() {
    let checkout = Checkout::hollow();
    assert!(checkout.call(&["reset"]).status.success());
    assert!(!checkout.folder.path().join(".local").exists());
    assert!(!checkout.folder.path().join("checkpoints/0.redb").exists());
    assert!(checkout.folder.path().join("checkpoints/.gitkeep").exists());
}
