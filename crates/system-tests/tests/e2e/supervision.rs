//! `./run --detach` with separate servers. Killed processes are restarted, a service that refuses to run stays down
//! with its reason, and a suspended server does not prevent a service from stopping.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use local_stack::config::Ports;
use local_stack::process::Record;
use local_stack::servers::http_client;
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;
use tokio::process::Command;

use crate::harness::{LONG_TIMEOUT, text, wait_for, wait_until};

/// Duration of the broker's suspension. Long enough that the controller fences the broker.
const SUSPENSION: Duration = Duration::from_secs(25);

/// Timeout for a service to stop. Far longer than the grace period of any service.
const STOP_TIMEOUT: Duration = Duration::from_secs(60);

const SERVICES: [&str; 3] = ["ingest-producer", "stream-processor", "metrics-dashboard"];

/// A minimal checkout for `./run`, and the processes that run in it.
struct Checkout {
    folder: TempDir,
    ports: Ports,
}

impl Checkout {
    fn new() -> Self {
        let real = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap();
        let folder = tempfile::tempdir().unwrap();
        for file in ["crates/local-stack/Cargo.toml", "streams/user_created.toml"] {
            let copy = folder.path().join(file);
            fs::create_dir_all(copy.parent().unwrap()).unwrap();
            fs::copy(real.join(file), copy).unwrap();
        }
        std::os::unix::fs::symlink(real.join("prometheus"), folder.path().join("prometheus")).unwrap();
        fs::create_dir(folder.path().join("checkpoints")).unwrap();
        Self { folder, ports: Ports::private().unwrap() }
    }

    /// Runs `local-stack` in the checkout.
    async fn call(&self, arguments: &[&str]) -> Output {
        let program = PathBuf::from(std::env::var("PIPELINE_TEST_BIN").unwrap()).join("local-stack");
        let base = self.ports.kafka.to_string();
        let mut command = Command::new(program);
        command.args(arguments).current_dir(self.folder.path()).env("PIPELINE_PORT_BASE", base);
        command.stdin(Stdio::null()).output().await.unwrap()
    }

    fn record(&self, part: &str) -> Record {
        let file = self.folder.path().join(format!(".local/run/{part}.json"));
        Record::read(&file).unwrap_or_else(|| panic!("no process record of {part}"))
    }

    /// The entry of a part in `./run status --json`.
    async fn status(&self, part: &str) -> Option<Value> {
        let list: Value = serde_json::from_slice(&self.call(&["status", "--json"]).await.stdout).ok()?;
        list.as_array()?.iter().find(|one| one["name"] == part).cloned()
    }

    async fn is_in_state(&self, part: &str, state: &str) -> bool {
        self.status(part).await.is_some_and(|status| status["state"] == state)
    }

    /// The logs of the supervisor and the processor.
    async fn logs(&self) -> String {
        let mut all = String::new();
        for part in ["supervisor", "stream-processor"] {
            all.push_str(&text(&self.call(&["logs", part]).await.stdout));
        }
        all
    }

    /// Kills a part and waits until the supervisor has restarted it and it is in `state`.
    async fn kill_and_wait_for_restart(&self, part: &str, state: &str) {
        let before = self.record(part);
        before.signal(Signal::KILL);
        wait_until(&format!("{part} is restarted"), LONG_TIMEOUT, || async {
            let record = self.record(part);
            record.pid != before.pid && record.is_alive() && record.restarts == before.restarts + 1
        })
        .await;
        wait_until(&format!("{part} is {state} again"), LONG_TIMEOUT, || self.is_in_state(part, state)).await;
    }

    /// Asserts that each service exits on SIGTERM while both servers are suspended, and that it is restarted.
    async fn assert_services_stop_while_servers_are_suspended(&self) {
        let servers = ["kafka", "cassandra"].map(|server| self.record(server));
        servers.iter().for_each(|server| server.signal(Signal::STOP));
        let records = SERVICES.map(|service| self.record(service));
        records.iter().for_each(|record| record.signal(Signal::TERM));
        for record in &records {
            wait_until(&format!("{} has exited", record.name), STOP_TIMEOUT, || async { !record.is_alive() })
                .await;
        }
        servers.iter().for_each(|server| server.signal(Signal::CONT));
        for service in SERVICES {
            wait_until(&format!("{service} is ready"), LONG_TIMEOUT, || self.is_in_state(service, "ready"))
                .await;
        }
    }

    /// Number of records in Kafka according to the dashboard service. `None` while the service does not know it.
    async fn events_produced(&self) -> Option<i64> {
        let url = format!("http://127.0.0.1:{}/api/v1/overview", self.ports.dashboard);
        let overview: Value = http_client().unwrap().get(url).send().await.ok()?.json().await.ok()?;
        overview["events_produced"].as_i64()
    }

    /// Asserts that the dashboard does not know the log while the broker is suspended, and knows it again afterwards.
    async fn assert_dashboard_recovers_from_a_suspended_broker(&self) {
        wait_until("the log is known", LONG_TIMEOUT, || async { self.events_produced().await.is_some() })
            .await;
        let broker = self.record("kafka");
        broker.signal(Signal::STOP);
        let since = Instant::now();
        wait_until("the log is unknown", LONG_TIMEOUT, || async { self.events_produced().await.is_none() })
            .await;
        wait_until("the broker was suspended long enough", LONG_TIMEOUT, || async {
            since.elapsed() >= SUSPENSION
        })
        .await;
        broker.signal(Signal::CONT);
        wait_until("the log is known again", LONG_TIMEOUT, || async {
            self.events_produced().await.is_some()
        })
        .await;
    }

    /// Gives the processor a layout that differs from the registered one. Asserts that it is reported as refused and
    /// not restarted.
    async fn assert_refusal_is_reported_and_not_restarted(&self) {
        let stream = self.folder.path().join("streams/user_created.toml");
        let definition = fs::read_to_string(&stream).unwrap();
        fs::write(&stream, definition.replace("[\"female\", \"male\"]", "[\"female\"]")).unwrap();
        self.record("stream-processor").signal(Signal::KILL);
        wait_until("the processor is listed as refused", LONG_TIMEOUT, || {
            self.is_in_state("stream-processor", "refused")
        })
        .await;
        let status = self.status("stream-processor").await.unwrap();
        assert_eq!(status["ended"], "exit code 3", "{status}");
        assert!(status["last_words"].as_str().unwrap().contains("registered"), "{status}");
        let logs = self.logs().await;
        assert!(logs.contains("stream-processor refuses to run"), "{logs}");
        let url = format!("http://127.0.0.1:{}/api/v1/services", self.ports.dashboard);
        let reason = wait_for("the dashboard lists the processor as refused", LONG_TIMEOUT, || async {
            let answer = http_client().unwrap().get(&url).send().await.ok()?;
            let services = answer.json::<Value>().await.ok()?;
            let mut services = services["services"].as_array()?.iter();
            services.find(|one| one["state"] == "refused").map(|one| one["reason"].clone())
        })
        .await;
        assert!(reason.as_str().unwrap().contains("registered"), "{reason}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_parts_are_restarted_until_the_stack_is_stopped() {
    let checkout = Checkout::new();
    let started = checkout.call(&["up", "--detach"]).await;
    assert!(started.status.success(), "{started:?}");
    let again = checkout.call(&["up", "--detach"]).await;
    assert!(text(&again.stderr).contains("already running"), "{again:?}");
    for service in SERVICES {
        checkout.kill_and_wait_for_restart(service, "ready").await;
    }
    for part in ["source", "prometheus", "kafka", "cassandra"] {
        let state = if part == "prometheus" { "ready" } else { "running" };
        checkout.kill_and_wait_for_restart(part, state).await;
    }
    checkout.assert_dashboard_recovers_from_a_suspended_broker().await;
    checkout.assert_services_stop_while_servers_are_suspended().await;
    checkout.assert_refusal_is_reported_and_not_restarted().await;
    let supervisor = checkout.record("supervisor");
    let stopped = checkout.call(&["stop"]).await;
    assert!(stopped.status.success() && !supervisor.is_alive(), "{stopped:?}");
    assert_eq!(
        fs::read_dir(checkout.folder.path().join(".local/run")).unwrap().count(),
        1,
        "only the lock is left"
    );
}

impl Drop for Checkout {
    /// Stops the servers of a failed test.
    fn drop(&mut self) {
        let program = PathBuf::from(std::env::var("PIPELINE_TEST_BIN").unwrap()).join("local-stack");
        let mut command = std::process::Command::new(program);
        let _ = command.arg("stop").current_dir(self.folder.path()).stdin(Stdio::null()).output();
    }
}
