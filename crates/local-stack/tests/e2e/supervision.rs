//! `./run --detach` with servers of its own: what is killed comes back by itself, what refuses stays down and says why, and no
//! server that stands still keeps a service from stopping.

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

use crate::harness::{PATIENT, text, wait_for, wait_until};

/// How long the broker stands still: long enough to be fenced when it goes on.
const STILL: Duration = Duration::from_secs(25);

/// Far more than any service's grace.
const STOPPED: Duration = Duration::from_secs(60);

const SERVICES: [&str; 3] = ["ingest-producer", "stream-processor", "metrics-dashboard"];

/// What `./run` needs of a checkout, and everything that runs in it.
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

    async fn call(&self, arguments: &[&str]) -> Output {
        let program = PathBuf::from(std::env::var("PIPELINE_TEST_BIN").unwrap()).join("local-stack");
        let base = self.ports.kafka.to_string();
        let mut command = Command::new(program);
        command.args(arguments).current_dir(self.folder.path()).env("PIPELINE_PORT_BASE", base);
        command.stdin(Stdio::null()).output().await.unwrap()
    }

    fn record(&self, part: &str) -> Record {
        let file = self.folder.path().join(format!(".local/run/{part}.json"));
        Record::read(&file).unwrap_or_else(|| panic!("no record of {part}"))
    }

    /// A part as `./run status --json` shows it.
    async fn status(&self, part: &str) -> Option<Value> {
        let list: Value = serde_json::from_slice(&self.call(&["status", "--json"]).await.stdout).ok()?;
        list.as_array()?.iter().find(|one| one["name"] == part).cloned()
    }

    async fn is_in_state(&self, part: &str, state: &str) -> bool {
        self.status(part).await.is_some_and(|status| status["state"] == state)
    }

    async fn logs(&self) -> String {
        let mut all = String::new();
        for part in ["supervisor", "stream-processor"] {
            all.push_str(&text(&self.call(&["logs", part]).await.stdout));
        }
        all
    }

    async fn kill_and_see_it_return(&self, part: &str, state: &str) {
        let before = self.record(part);
        before.signal(Signal::KILL);
        wait_until(&format!("{part} runs again"), PATIENT, || async {
            let record = self.record(part);
            record.pid != before.pid && record.is_alive() && record.restarts == before.restarts + 1
        })
        .await;
        wait_until(&format!("{part} is {state} again"), PATIENT, || self.is_in_state(part, state)).await;
    }

    /// Each service ends on SIGTERM although neither server answers, and is started again.
    async fn services_stop_while_the_servers_stand_still(&self) {
        let servers = ["kafka", "cassandra"].map(|server| self.record(server));
        servers.iter().for_each(|server| server.signal(Signal::STOP));
        let records = SERVICES.map(|service| self.record(service));
        records.iter().for_each(|record| record.signal(Signal::TERM));
        for record in &records {
            wait_until(&format!("{} has ended", record.name), STOPPED, || async { !record.is_alive() }).await;
        }
        servers.iter().for_each(|server| server.signal(Signal::CONT));
        for service in SERVICES {
            wait_until(&format!("{service} is ready"), PATIENT, || self.is_in_state(service, "ready")).await;
        }
    }

    /// Records in Kafka as the page's service says it; `None`: it does not know.
    async fn produced(&self) -> Option<i64> {
        let url = format!("http://127.0.0.1:{}/api/v1/overview", self.ports.dashboard);
        let overview: Value = http_client().unwrap().get(url).send().await.ok()?.json().await.ok()?;
        overview["events_produced"].as_i64()
    }

    /// The page's service knows nothing of a broker that stands still, and knows it again when it goes on.
    async fn the_page_goes_on_after_a_broker_stood_still(&self) {
        wait_until("the log is known", PATIENT, || async { self.produced().await.is_some() }).await;
        let broker = self.record("kafka");
        broker.signal(Signal::STOP);
        let since = Instant::now();
        wait_until("the log is unknown", PATIENT, || async { self.produced().await.is_none() }).await;
        wait_until("it stood still long enough", PATIENT, || async { since.elapsed() >= STILL }).await;
        broker.signal(Signal::CONT);
        wait_until("the log is known again", PATIENT, || async { self.produced().await.is_some() }).await;
    }

    /// The processor is given another layout than the stream was made with.
    async fn a_refusal_stays_down_and_is_told(&self) {
        let stream = self.folder.path().join("streams/user_created.toml");
        let definition = fs::read_to_string(&stream).unwrap();
        fs::write(&stream, definition.replace("[\"female\", \"male\"]", "[\"female\"]")).unwrap();
        self.record("stream-processor").signal(Signal::KILL);
        wait_until("it refuses", PATIENT, || self.is_in_state("stream-processor", "refused")).await;
        let status = self.status("stream-processor").await.unwrap();
        assert_eq!(status["ended"], "exit code 3", "{status}");
        assert!(status["last_words"].as_str().unwrap().contains("registered"), "{status}");
        let told = self.logs().await;
        assert!(told.contains("stream-processor refuses to run"), "{told}");
        let url = format!("http://127.0.0.1:{}/api/v1/services", self.ports.dashboard);
        let reason = wait_for("the page's service says it too", PATIENT, || async {
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
async fn what_ends_is_started_again_until_everything_is_stopped() {
    let checkout = Checkout::new();
    let started = checkout.call(&["up", "--detach"]).await;
    assert!(started.status.success(), "{started:?}");
    let again = checkout.call(&["up", "--detach"]).await;
    assert!(text(&again.stderr).contains("already running"), "{again:?}");
    for service in SERVICES {
        checkout.kill_and_see_it_return(service, "ready").await;
    }
    for part in ["source", "prometheus", "kafka", "cassandra"] {
        let state = if part == "prometheus" { "ready" } else { "running" };
        checkout.kill_and_see_it_return(part, state).await;
    }
    checkout.the_page_goes_on_after_a_broker_stood_still().await;
    checkout.services_stop_while_the_servers_stand_still().await;
    checkout.a_refusal_stays_down_and_is_told().await;
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
    /// A test that failed must not leave servers behind.
    fn drop(&mut self) {
        let program = PathBuf::from(std::env::var("PIPELINE_TEST_BIN").unwrap()).join("local-stack");
        let mut command = std::process::Command::new(program);
        let _ = command.arg("stop").current_dir(self.folder.path()).stdin(Stdio::null()).output();
    }
}
