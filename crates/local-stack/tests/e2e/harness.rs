//! A pipeline of its own for each test, on the servers all tests share: keyspace, topics, group, checkpoint folder,
//! source simulator and ports. Starts and kills services the way a user does. What must hold is in the tests.

use std::fs::{self, File};
use std::future::Future;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use common::stream::Definition;
use local_stack::servers::http_client;
use rustix::process::{Pid, Signal, kill_process};
use scylla::client::session::Session;
use scylla::client::session_builder::SessionBuilder;
use serde_json::Value;
use tokio::process::{Child, Command};

/// Long enough for a slow machine, short enough for a person.
pub const SOON: Duration = Duration::from_secs(60);

/// For loads and recoveries.
pub const PATIENT: Duration = Duration::from_secs(300);

const ASK_EVERY: Duration = Duration::from_millis(100);

/// Distinguishes the pipelines of one run.
static NEXT: AtomicU32 = AtomicU32::new(0);

/// One pipeline and everything it owns.
pub struct Pipeline {
    pub keyspace: String,
    pub topic: String,
    pub definition: Definition,
    pub folder: PathBuf,
    pub session: Arc<Session>,
    pub kafka: String,
    cassandra: String,
    stream_file: PathBuf,
    binaries: PathBuf,
    source_port: u16,
}

/// A service that was started.
pub struct Service {
    pub name: String,
    pub log: PathBuf,
    pub address: String,
    child: Child,
}

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: these tests are started by ./test e2e"))
}

/// Whether the tests that take many minutes were asked for.
pub fn long() -> bool {
    variable("PIPELINE_TEST_LONG") == "1"
}

/// A shipped stream file.
pub fn shipped(stream: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../streams").join(stream).with_extension("toml")
}

/// Unix milliseconds.
pub fn now_ms() -> i64 {
    chrono::Utc::now().timestamp_millis()
}

/// A port nobody listens on now.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Asks until the answer is there; panics with `what` after `within`.
pub async fn wait_for<T, F: Future<Output = Option<T>>>(
    what: &str,
    within: Duration,
    mut ask: impl FnMut() -> F,
) -> T {
    let deadline = Instant::now() + within;
    let mut ticks = tokio::time::interval(ASK_EVERY);
    loop {
        ticks.tick().await;
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(Instant::now() < deadline, "not within {} s: {what}", within.as_secs());
    }
}

/// [`wait_for`] a claim to become true.
pub async fn wait_until<F: Future<Output = bool>>(what: &str, within: Duration, mut ask: impl FnMut() -> F) {
    wait_for(what, within, || {
        let answer = ask();
        async move { answer.await.then_some(()) }
    })
    .await;
}

impl Pipeline {
    /// A pipeline of the default stream, changed by `edit`, of which nothing exists yet.
    pub async fn with_stream(name: &str, edit: impl Fn(String) -> String) -> Self {
        Self::with_file(name, "user_created", edit).await
    }

    /// A pipeline of a shipped stream, changed by `edit`, of which nothing exists yet.
    pub async fn with_file(name: &str, stream: &str, edit: impl Fn(String) -> String) -> Self {
        let name = format!("{name}_{}_{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let folder = Path::new(&variable("PIPELINE_TEST_FOLDER")).join("tests").join(&name);
        fs::create_dir_all(folder.join("checkpoints")).unwrap();
        let file = format!("{stream}.toml");
        let text = edit(fs::read_to_string(shipped(stream)).unwrap());
        let stream_file = folder.join(&file);
        fs::write(&stream_file, &text).unwrap();
        let cassandra = variable("PIPELINE_TEST_CASSANDRA");
        let session =
            SessionBuilder::new().known_node(&cassandra).build().await.expect("cassandra of the tests");
        // A test may want a file that does not parse: then the shipped one stands for it.
        let definition = Definition::parse(&file, &text).unwrap_or_else(|_| {
            Definition::parse("user_created.toml", include_str!("../../../../streams/user_created.toml"))
                .unwrap()
        });
        Self {
            keyspace: format!("e2e_{name}"),
            topic: format!("e2e_{name}"),
            definition,
            session: Arc::new(session),
            kafka: variable("PIPELINE_TEST_KAFKA"),
            cassandra,
            stream_file,
            binaries: variable("PIPELINE_TEST_BIN").into(),
            source_port: free_port(),
            folder,
        }
    }

    /// The stream file.
    pub fn stream_text(&self) -> String {
        fs::read_to_string(&self.stream_file).unwrap()
    }

    /// Replaces the stream file by one that may be refused.
    pub fn set_stream_text(&self, text: &str) {
        fs::write(&self.stream_file, text).unwrap();
    }

    /// Changes the stream file; services that run keep what they have read.
    pub fn edit_stream(&mut self, edit: impl Fn(String) -> String) {
        let text = edit(fs::read_to_string(&self.stream_file).unwrap());
        self.definition = Definition::parse("edited", &text).unwrap();
        fs::write(&self.stream_file, text).unwrap();
    }

    /// A pipeline of the default stream.
    pub async fn new(name: &str) -> Self {
        Self::with_stream(name, |text| text).await
    }

    /// A new pipeline with keyspace, tables and topics.
    pub async fn initialised(name: &str) -> Self {
        let pipeline = Self::new(name).await;
        pipeline.init().await;
        pipeline
    }

    /// `stream-processor init`, which must succeed.
    pub async fn init(&self) {
        let output = self.run("stream-processor", &["init"], &[]).await;
        assert!(output.status.success(), "init: {}", text(&output.stderr));
    }

    /// `stream-processor verify --kafka`, which must find no difference.
    pub async fn verify(&self) {
        let output = self.run("stream-processor", &["verify", "--kafka"], &[]).await;
        assert!(output.status.success(), "verify: {}{}", text(&output.stdout), text(&output.stderr));
    }

    /// Runs a program to its end.
    pub async fn run(&self, program: &str, arguments: &[&str], more: &[(&str, String)]) -> Output {
        self.command(program, arguments, more).output().await.unwrap()
    }

    /// The source simulator, answering.
    pub async fn source(&self) -> Service {
        let listen = format!("127.0.0.1:{}", self.source_port);
        let command = self.command("local-stack", &["source", "--listen", &listen], &[]);
        let service = self.spawn("source", command, self.source_port);
        wait_until("source simulator listens", SOON, || async {
            tokio::net::TcpStream::connect(&listen).await.is_ok()
        })
        .await;
        service
    }

    /// A source in place of the simulator that answers every request with `page`, until the end of the test.
    pub async fn source_of(&self, page: String) {
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", self.source_port)).await.unwrap();
        let router = axum::Router::new().fallback(move || std::future::ready(page.clone()));
        tokio::spawn(async move { axum::serve(listener, router).await });
    }

    /// What goes wrong with the source from now on, as `PUT /faults` takes it.
    pub async fn faults(&self, faults: &Value) {
        let url = format!("http://127.0.0.1:{}/faults", self.source_port);
        let answer = http_client().unwrap().put(url).body(faults.to_string()).send().await.unwrap();
        assert!(answer.status().is_success(), "{faults}: {}", answer.text().await.unwrap());
    }

    /// `ingest-producer run`.
    pub fn producer(&self) -> Service {
        self.service("ingest-producer", "ingest-producer", &["run"], &[])
    }

    /// `ingest-producer run` as this instance, with further settings.
    pub fn producer_with(&self, instance: &str, more: &[(&str, String)]) -> Service {
        let more = [&[("PIPELINE_INSTANCE", instance.to_owned())], more].concat();
        self.service(&format!("ingest-producer-{instance}"), "ingest-producer", &["run"], &more)
    }

    /// A command of the producer that goes on for a while, to be killed or stopped.
    pub fn begun(&self, name: &str, arguments: &[&str], more: &[(&str, String)]) -> Service {
        self.service(name, "ingest-producer", arguments, more)
    }

    /// `stream-processor run` as this instance.
    pub fn processor(&self, instance: &str) -> Service {
        self.processor_with(instance, &[])
    }

    /// `stream-processor run` with further settings.
    pub fn processor_with(&self, instance: &str, more: &[(&str, String)]) -> Service {
        let more = [&[("PIPELINE_INSTANCE", instance.to_owned())], more].concat();
        self.service(&format!("stream-processor-{instance}"), "stream-processor", &["run"], &more)
    }

    /// `stream-processor run --replay`.
    pub fn processor_replaying(&self, instance: &str) -> Service {
        let more = [("PIPELINE_INSTANCE", instance.to_owned())];
        self.service(&format!("replaying-{instance}"), "stream-processor", &["run", "--replay"], &more)
    }

    /// The steps of the processor's loop, as its build for tests names them.
    pub async fn steps(&self) -> Vec<String> {
        let output = self.run("stream-processor", &["run", "--kill-at", "?=1"], &[]).await;
        let words = text(&output.stderr);
        let names = words.lines().find_map(|line| line.split_once("one of ")).map(|(_, names)| names);
        names.unwrap_or_else(|| panic!("{words}")).split(", ").map(str::to_owned).collect()
    }

    /// `stream-processor run` that kills itself at a step, given as STEP=N.
    pub fn processor_killed_at(&self, step: &str) -> Service {
        // Small batches, so that every step is come to often.
        let more = [("PIPELINE_INSTANCE", "one"), ("PIPELINE_BATCH_RECORDS", "200")];
        let more = more.map(|(name, value)| (name, value.to_owned()));
        self.service(&format!("killed-{step}"), "stream-processor", &["run", "--kill-at", step], &more)
    }

    /// `metrics-dashboard`.
    pub fn dashboard(&self) -> Service {
        self.dashboard_with(&[])
    }

    /// `metrics-dashboard` with further settings.
    pub fn dashboard_with(&self, more: &[(&str, String)]) -> Service {
        self.service("metrics-dashboard", "metrics-dashboard", &[], more)
    }

    /// `ingest-producer stress`, which must deliver every message.
    pub async fn stress(&self, messages: u64) {
        self.stress_with(&["--messages", &messages.to_string()]).await;
    }

    /// `ingest-producer stress` with these arguments, which must deliver every message.
    pub async fn stress_with(&self, arguments: &[&str]) {
        let output = self.run("ingest-producer", &[&["stress"], arguments].concat(), &[]).await;
        assert!(output.status.success(), "stress: {}{}", text(&output.stdout), text(&output.stderr));
    }

    /// Empties the checkpoint folder, as a lost volume would be.
    pub fn lose_checkpoints(&self) {
        let checkpoints = self.folder.join("checkpoints");
        fs::remove_dir_all(&checkpoints).unwrap();
        fs::create_dir(&checkpoints).unwrap();
    }

    /// Cassandra itself, for tests that put something in between.
    pub fn cassandra_address(&self) -> String {
        self.cassandra.clone()
    }

    fn service(&self, name: &str, program: &str, arguments: &[&str], more: &[(&str, String)]) -> Service {
        let port = free_port();
        let more = [more, &[("PIPELINE_HTTP_LISTEN", format!("127.0.0.1:{port}"))]].concat();
        self.spawn(name, self.command(program, arguments, &more), port)
    }

    fn spawn(&self, name: &str, mut command: Command, port: u16) -> Service {
        let log = self.folder.join(format!("{name}.log"));
        let output = File::options().create(true).append(true).open(&log).unwrap();
        let child = command.stdout(output.try_clone().unwrap()).stderr(output).spawn().unwrap();
        Service { name: name.to_owned(), log, address: format!("http://127.0.0.1:{port}"), child }
    }

    fn command(&self, program: &str, arguments: &[&str], more: &[(&str, String)]) -> Command {
        let mut command = Command::new(self.binaries.join(program));
        command.args(arguments).current_dir(&self.folder).stdin(Stdio::null()).kill_on_drop(true);
        command
            .env("PIPELINE_KAFKA_BROKERS", &self.kafka)
            .env("PIPELINE_CASSANDRA_NODES", &self.cassandra)
            .env("PIPELINE_KEYSPACE", &self.keyspace)
            .env("PIPELINE_STREAM", &self.stream_file)
            .env("PIPELINE_TOPIC", &self.topic)
            .env("PIPELINE_CONTROL_TOPIC", format!("{}.control", self.topic))
            .env("PIPELINE_GROUP_ID", &self.topic)
            .env("PIPELINE_CHECKPOINTS", self.folder.join("checkpoints"))
            .env("PIPELINE_SOURCE_ORIGIN", format!("http://127.0.0.1:{}", self.source_port))
            .envs(more.iter().map(|(name, value)| (*name, value)));
        command
    }
}

impl Service {
    /// Waits until `/readyz` says yes.
    pub async fn ready(&mut self) {
        let (url, name, log) = (format!("{}/readyz", self.address), self.name.clone(), self.log.clone());
        let client = http_client().unwrap();
        let deadline = Instant::now() + SOON;
        let mut ticks = tokio::time::interval(ASK_EVERY);
        loop {
            ticks.tick().await;
            if client.get(&url).send().await.is_ok_and(|answer| answer.status().is_success()) {
                return;
            }
            let ended = self.child.try_wait().unwrap();
            let words = || fs::read_to_string(&log).unwrap_or_default();
            assert!(ended.is_none(), "{name} ended ({ended:?}): {}", words());
            assert!(Instant::now() < deadline, "{name} is not ready: {}", words());
        }
    }

    /// Whether `/readyz` says yes now.
    pub async fn is_ready(&self) -> bool {
        let url = format!("{}/readyz", self.address);
        http_client().unwrap().get(url).send().await.is_ok_and(|answer| answer.status().is_success())
    }

    /// The JSON at a path, `None` while it cannot be had.
    pub async fn json(&self, path: &str) -> Option<Value> {
        let answer = http_client().unwrap().get(format!("{}{path}", self.address)).send().await.ok()?;
        answer.json().await.ok()
    }

    /// The value of a metric without labels, `None` while it cannot be had.
    pub async fn metric(&self, name: &str) -> Option<f64> {
        local_stack::servers::metric(&self.address, name).await
    }

    /// SIGKILL, as `kill -9` does it, and the end of the process.
    pub async fn kill(mut self) {
        self.child.start_kill().unwrap();
        self.child.wait().await.unwrap();
    }

    /// SIGTERM, and how the process ended.
    pub async fn stop(mut self) -> ExitStatus {
        kill_process(self.pid(), Signal::TERM).unwrap();
        let ended = tokio::select! {
            ended = self.child.wait() => Some(ended.unwrap()),
            () = tokio::time::sleep(SOON) => None,
        };
        ended.unwrap_or_else(|| panic!("{} does not stop: {}", self.name, self.words()))
    }

    /// How the process ended by itself, soon.
    pub async fn end(&mut self) -> ExitStatus {
        self.end_within(SOON).await
    }

    /// How the process ended by itself.
    pub async fn end_within(&mut self, within: Duration) -> ExitStatus {
        let ended = tokio::select! {
            ended = self.child.wait() => Some(ended.unwrap()),
            () = tokio::time::sleep(within) => None,
        };
        ended.unwrap_or_else(|| panic!("{} does not end: {}", self.name, self.words()))
    }

    /// Everything it logged.
    pub fn words(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Files below `folder` that the process has open, by name.
    pub fn open_files(&self, folder: &Path) -> Vec<PathBuf> {
        let open = fs::read_dir(format!("/proc/{}/fd", self.pid().as_raw_nonzero())).unwrap();
        let mut files: Vec<PathBuf> = open
            .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
            .filter(|file| {
                file.starts_with(folder) && file.extension().is_some_and(|extension| extension == "redb")
            })
            .collect();
        files.sort();
        files
    }

    fn pid(&self) -> Pid {
        let pid = self.child.id().unwrap_or_else(|| panic!("{} has ended", self.name));
        Pid::from_raw(i32::try_from(pid).unwrap()).unwrap()
    }
}

/// What a program printed.
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
