//! A separate pipeline for each test on the servers that all tests share. Each pipeline has its own keyspace, topics,
//! consumer group, checkpoint folder, source simulator and ports. The harness starts and kills services as a user
//! would. The tests contain the assertions.

use std::fs::{self, File};
use std::future::Future;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use common::contracts::stream::Definition;
use local_stack::servers::http_client;
use rustix::process::{Pid, Signal, kill_process};
use scylla::client::session::Session;
use scylla::client::session_builder::SessionBuilder;
use serde_json::Value;
use tokio::process::{Child, Command};

/// Timeout for one step, such as a service start. Long enough for a slow machine.
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// Timeout for processing a load or recovering from a fault.
pub const LONG_TIMEOUT: Duration = Duration::from_secs(300);

/// Pause between two checks of a condition.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// Number of the next pipeline. It keeps the names within one test run unique.
static NEXT_PIPELINE: AtomicU32 = AtomicU32::new(0);

/// One pipeline and the resources it owns.
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

/// A service process. Dropping it kills the process.
pub struct Service {
    pub name: String,
    pub log: PathBuf,
    pub address: String,
    child: Child,
}

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set; run these tests with ./test e2e"))
}

/// Whether `./test long` runs the tests. Some tests then use longer loads and outages.
pub fn is_long_run() -> bool {
    variable("PIPELINE_TEST_LONG") == "1"
}

/// Path of a stream file in `streams/`.
pub fn shipped(stream: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../streams").join(stream).with_extension("toml")
}

/// The current time in Unix milliseconds.
pub fn now_ms() -> i64 {
    chrono::Utc::now().timestamp_millis()
}

/// A port that is free at the moment of the call.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Polls until `poll` returns a value. Panics with `what` after `within`.
pub async fn wait_for<T, F: Future<Output = Option<T>>>(
    what: &str,
    within: Duration,
    mut poll: impl FnMut() -> F,
) -> T {
    let deadline = Instant::now() + within;
    let mut ticks = tokio::time::interval(POLL_INTERVAL);
    loop {
        ticks.tick().await;
        if let Some(value) = poll().await {
            return value;
        }
        assert!(Instant::now() < deadline, "timed out after {} s: {what}", within.as_secs());
    }
}

/// Polls until `check` returns true. Panics with `what` after `within`.
pub async fn wait_until<F: Future<Output = bool>>(
    what: &str,
    within: Duration,
    mut check: impl FnMut() -> F,
) {
    wait_for(what, within, || {
        let checked = check();
        async move { checked.await.then_some(()) }
    })
    .await;
}

impl Pipeline {
    /// A pipeline of the default stream with its file changed by `edit`. Creates no keyspace or topics.
    pub async fn with_stream(name: &str, edit: impl Fn(String) -> String) -> Self {
        Self::with_file(name, "user_created", edit).await
    }

    /// A pipeline of the stream file `stream` changed by `edit`. Creates no keyspace or topics.
    pub async fn with_file(name: &str, stream: &str, edit: impl Fn(String) -> String) -> Self {
        let name = format!("{name}_{}_{}", std::process::id(), NEXT_PIPELINE.fetch_add(1, Ordering::Relaxed));
        let folder = Path::new(&variable("PIPELINE_TEST_FOLDER")).join("tests").join(&name);
        fs::create_dir_all(folder.join("checkpoints")).unwrap();
        let file = format!("{stream}.toml");
        let text = edit(fs::read_to_string(shipped(stream)).unwrap());
        let stream_file = folder.join(&file);
        fs::write(&stream_file, &text).unwrap();
        let cassandra = variable("PIPELINE_TEST_CASSANDRA");
        let session = SessionBuilder::new()
            .known_node(&cassandra)
            .build()
            .await
            .expect("a connection to the test cassandra");
        // A test may use a stream file that does not parse. The definition of the default stream then replaces it.
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

    /// The content of the stream file.
    pub fn stream_text(&self) -> String {
        fs::read_to_string(&self.stream_file).unwrap()
    }

    /// Replaces the stream file. The new content may be invalid.
    pub fn set_stream_text(&self, text: &str) {
        fs::write(&self.stream_file, text).unwrap();
    }

    /// Changes the stream file. Running services keep the definition that they read at start.
    pub fn edit_stream(&mut self, edit: impl Fn(String) -> String) {
        let text = edit(fs::read_to_string(&self.stream_file).unwrap());
        self.definition = Definition::parse("edited", &text).unwrap();
        fs::write(&self.stream_file, text).unwrap();
    }

    /// A pipeline of the default stream. Creates no keyspace or topics.
    pub async fn new(name: &str) -> Self {
        Self::with_stream(name, |text| text).await
    }

    /// A pipeline of the default stream with its keyspace, tables and topics.
    pub async fn initialised(name: &str) -> Self {
        let pipeline = Self::new(name).await;
        pipeline.init().await;
        pipeline
    }

    /// Runs `stream-processor init`, which must succeed.
    pub async fn init(&self) {
        let output = self.run("stream-processor", &["init"], &[]).await;
        assert!(output.status.success(), "init: {}", text(&output.stderr));
    }

    /// Runs `stream-processor verify --kafka`, which must find no difference.
    pub async fn verify(&self) {
        let output = self.run("stream-processor", &["verify", "--kafka"], &[]).await;
        assert!(output.status.success(), "verify: {}{}", text(&output.stdout), text(&output.stderr));
    }

    /// Runs a program until it exits. `more` contains further environment variables.
    pub async fn run(&self, program: &str, arguments: &[&str], more: &[(&str, String)]) -> Output {
        self.command(program, arguments, more).output().await.unwrap()
    }

    /// Starts the source simulator and waits until it listens.
    pub async fn source(&self) -> Service {
        let listen = format!("127.0.0.1:{}", self.source_port);
        let command = self.command("source-simulator", &["--listen", &listen], &[]);
        let service = self.spawn("source", command, self.source_port);
        wait_until("the source simulator listens", TIMEOUT, || async {
            tokio::net::TcpStream::connect(&listen).await.is_ok()
        })
        .await;
        service
    }

    /// Scheme, host and port of the source.
    pub fn source_origin(&self) -> String {
        format!("http://127.0.0.1:{}", self.source_port)
    }

    /// A listener at the address of the source, for tests that replace the simulator.
    pub async fn source_listener(&self) -> tokio::net::TcpListener {
        tokio::net::TcpListener::bind(("127.0.0.1", self.source_port)).await.unwrap()
    }

    /// Starts a source that answers every request with `page` until the test ends. It replaces the simulator.
    pub async fn source_serving(&self, page: String) {
        let listener = self.source_listener().await;
        let router = axum::Router::new().fallback(move || std::future::ready(page.clone()));
        tokio::spawn(async move { axum::serve(listener, router).await });
    }

    /// Sets the faults of the source simulator. `faults` is the body of `PUT /faults`.
    pub async fn faults(&self, faults: &Value) {
        let url = format!("http://127.0.0.1:{}/faults", self.source_port);
        let answer = http_client().unwrap().put(url).body(faults.to_string()).send().await.unwrap();
        assert!(answer.status().is_success(), "{faults}: {}", answer.text().await.unwrap());
    }

    /// Starts `ingest-producer run`.
    pub fn producer(&self) -> Service {
        self.service("ingest-producer", "ingest-producer", &["run"], &[])
    }

    /// Starts `ingest-producer run` with this instance name and further settings.
    pub fn producer_with(&self, instance: &str, more: &[(&str, String)]) -> Service {
        let more = [&[("PIPELINE_INSTANCE", instance.to_owned())], more].concat();
        self.service(&format!("ingest-producer-{instance}"), "ingest-producer", &["run"], &more)
    }

    /// Starts an `ingest-producer` command without waiting for it, so that the test can kill or stop it.
    pub fn start_producer_command(&self, name: &str, arguments: &[&str], more: &[(&str, String)]) -> Service {
        self.service(name, "ingest-producer", arguments, more)
    }

    /// Starts `stream-processor run` with this instance name.
    pub fn processor(&self, instance: &str) -> Service {
        self.processor_with(instance, &[])
    }

    /// Starts `stream-processor run` with this instance name and further settings.
    pub fn processor_with(&self, instance: &str, more: &[(&str, String)]) -> Service {
        let more = [&[("PIPELINE_INSTANCE", instance.to_owned())], more].concat();
        self.service(&format!("stream-processor-{instance}"), "stream-processor", &["run"], &more)
    }

    /// Starts `stream-processor run --replay` with this instance name.
    pub fn processor_replaying(&self, instance: &str) -> Service {
        let more = [("PIPELINE_INSTANCE", instance.to_owned())];
        self.service(&format!("replaying-{instance}"), "stream-processor", &["run", "--replay"], &more)
    }

    /// The steps at which the processor's test build can kill itself. Its error for an unknown step lists them.
    pub async fn steps(&self) -> Vec<String> {
        let output = self.run("stream-processor", &["run", "--kill-at", "?=1"], &[]).await;
        let stderr = text(&output.stderr);
        let names = stderr.lines().find_map(|line| line.split_once("one of ")).map(|(_, names)| names);
        names.unwrap_or_else(|| panic!("{stderr}")).split(", ").map(str::to_owned).collect()
    }

    /// Starts `stream-processor run --kill-at STEP=N`. It kills itself when it reaches the step for the Nth time.
    pub fn processor_killed_at(&self, step: &str) -> Service {
        // Small batches, so that the processor reaches every step often.
        let more = [("PIPELINE_INSTANCE", "one"), ("PIPELINE_BATCH_RECORDS", "200")];
        let more = more.map(|(name, value)| (name, value.to_owned()));
        self.service(&format!("killed-{step}"), "stream-processor", &["run", "--kill-at", step], &more)
    }

    /// Starts `metrics-dashboard`.
    pub fn dashboard(&self) -> Service {
        self.dashboard_with(&[])
    }

    /// Starts `metrics-dashboard` with further settings.
    pub fn dashboard_with(&self, more: &[(&str, String)]) -> Service {
        self.service("metrics-dashboard", "metrics-dashboard", &[], more)
    }

    /// Runs `ingest-producer stress`, which must deliver every message.
    pub async fn stress(&self, messages: u64) {
        self.stress_with(&["--messages", &messages.to_string()]).await;
    }

    /// Runs `ingest-producer stress` with these arguments. It must deliver every message.
    pub async fn stress_with(&self, arguments: &[&str]) {
        let output = self.run("ingest-producer", &[&["stress"], arguments].concat(), &[]).await;
        assert!(output.status.success(), "stress: {}{}", text(&output.stdout), text(&output.stderr));
    }

    /// Empties the checkpoint folder, as if its volume were lost.
    pub fn lose_checkpoints(&self) {
        let checkpoints = self.folder.join("checkpoints");
        fs::remove_dir_all(&checkpoints).unwrap();
        fs::create_dir(&checkpoints).unwrap();
    }

    /// The address of Cassandra, for tests that put a proxy in front of it.
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
            .env("PIPELINE_SOURCE_ORIGIN", self.source_origin())
            .envs(more.iter().map(|(name, value)| (*name, value)));
        command
    }
}

impl Service {
    /// Waits until `/readyz` returns success. Panics if the process exits first.
    pub async fn ready(&mut self) {
        let (url, name, log) = (format!("{}/readyz", self.address), self.name.clone(), self.log.clone());
        let client = http_client().unwrap();
        let deadline = Instant::now() + TIMEOUT;
        let mut ticks = tokio::time::interval(POLL_INTERVAL);
        loop {
            ticks.tick().await;
            if client.get(&url).send().await.is_ok_and(|answer| answer.status().is_success()) {
                return;
            }
            let ended = self.child.try_wait().unwrap();
            let log_text = || fs::read_to_string(&log).unwrap_or_default();
            assert!(ended.is_none(), "{name} exited ({ended:?}): {}", log_text());
            assert!(Instant::now() < deadline, "{name} is not ready: {}", log_text());
        }
    }

    /// Whether `/readyz` returns success.
    pub async fn is_ready(&self) -> bool {
        let url = format!("{}/readyz", self.address);
        http_client().unwrap().get(url).send().await.is_ok_and(|answer| answer.status().is_success())
    }

    /// The JSON answer to a GET of `path`. `None` if the request fails or the answer is not JSON.
    pub async fn json(&self, path: &str) -> Option<Value> {
        let answer = http_client().unwrap().get(format!("{}{path}", self.address)).send().await.ok()?;
        answer.json().await.ok()
    }

    /// The value of the series `name`. `None` if the scrape fails or does not contain the series.
    pub async fn metric(&self, name: &str) -> Option<f64> {
        local_stack::servers::metric(&self.address, name).await
    }

    /// Sends SIGKILL and waits until the process has exited.
    pub async fn kill(mut self) {
        self.child.start_kill().unwrap();
        self.child.wait().await.unwrap();
    }

    /// Sends SIGTERM and returns the exit status. Panics after [`TIMEOUT`].
    pub async fn stop(mut self) -> ExitStatus {
        kill_process(self.pid(), Signal::TERM).unwrap();
        let ended = tokio::select! {
            ended = self.child.wait() => Some(ended.unwrap()),
            () = tokio::time::sleep(TIMEOUT) => None,
        };
        ended.unwrap_or_else(|| panic!("{} does not stop: {}", self.name, self.log_text()))
    }

    /// Waits until the process exits on its own, for at most [`TIMEOUT`].
    pub async fn end(&mut self) -> ExitStatus {
        self.end_within(TIMEOUT).await
    }

    /// Waits until the process exits on its own. Panics after `within`.
    pub async fn end_within(&mut self, within: Duration) -> ExitStatus {
        let ended = tokio::select! {
            ended = self.child.wait() => Some(ended.unwrap()),
            () = tokio::time::sleep(within) => None,
        };
        ended.unwrap_or_else(|| panic!("{} does not exit: {}", self.name, self.log_text()))
    }

    /// The log so far, stdout and stderr together. Empty if the file cannot be read.
    pub fn log_text(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The state files (`*.redb`) in `folder` that the process has open, sorted by path.
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
        let pid = self.child.id().unwrap_or_else(|| panic!("{} has exited", self.name));
        Pid::from_raw(i32::try_from(pid).unwrap()).unwrap()
    }
}

/// The output of a program as text.
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
