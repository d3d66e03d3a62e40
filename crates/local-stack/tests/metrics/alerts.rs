//! Alerts provoked for real, one after the other: what breaks, and how long it takes until it is told. Minutes by nature, so
//! only `./test long` asks for it; it leaves the stack broken and comes last.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use local_stack::process::Record;
use local_stack::servers::http_client;
use rdkafka::ClientConfig;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use rustix::process::Signal;
use tokio::process::{Child, Command};

use crate::{load, prometheus, sources, variable};

/// Longer than the longest of the alerts provoked here may take: two intervals, a pending time, a scrape.
const WITHIN: Duration = Duration::from_secs(420);

const ASK_EVERY: Duration = Duration::from_secs(1);

/// Records that are no events: enough to be told, too few to pause a partition.
const POISON: usize = 5;

/// More in a row than a partition takes by default.
const TOO_MUCH_POISON: usize = 5000;

fn signal(part: &str, signal: Signal) {
    let file = Path::new(&variable("PIPELINE_TEST_FOLDER")).join(format!("run/{part}.json"));
    Record::read(&file).unwrap_or_else(|| panic!("{} is not there", file.display())).signal(signal);
}

/// Waits until each of `expected` fires, and says how long that took since `broken`.
#[expect(clippy::print_stdout, reason = "the times are figures for BENCHMARKS.md")]
async fn told(what: &str, broken: Instant, expected: &[&str]) {
    let prometheus = prometheus();
    let mut missing = expected.to_vec();
    let mut ticks = tokio::time::interval(ASK_EVERY);
    while !missing.is_empty() {
        ticks.tick().await;
        let firing = prometheus.firing().await;
        missing.retain(|name| {
            let fires = firing.iter().any(|firing| firing == name);
            if fires {
                println!("{what}: {name} fires after {} s", broken.elapsed().as_secs());
            }
            !fires
        });
        assert!(
            broken.elapsed() < WITHIN,
            "{what}: {missing:?} do not fire within {} s; {firing:?} do",
            WITHIN.as_secs()
        );
    }
}

/// Records that are no events, all of one partition.
fn poison(records: usize) {
    let producer: BaseProducer =
        ClientConfig::new().set("bootstrap.servers", variable("PIPELINE_TEST_KAFKA")).create().unwrap();
    for _ in 0..records {
        let record = BaseRecord::to("user_created").key("poison").payload("no event");
        producer.send(record).map_err(|(e, _)| e).unwrap();
    }
    producer.flush(Duration::from_secs(10)).unwrap();
}

/// Every answer of the source says that there is nothing: no retry changes it.
async fn refuse_all() {
    let url = format!("{}/faults", variable("PIPELINE_TEST_SOURCE"));
    let faults = r#"{"faults": {"not_found": {"rate": 1.0}}}"#;
    let answer = http_client().unwrap().put(url).body(faults).send().await.unwrap();
    assert!(answer.status().is_success());
}

/// The processor as `./run` starts it.
fn processor(arguments: &[&str]) -> Child {
    let listen = variable("PIPELINE_TEST_PROCESSOR").replace("http://", "");
    let folder = variable("PIPELINE_TEST_FOLDER");
    let log = std::fs::File::create(Path::new(&folder).join("logs/stream-processor-again.log")).unwrap();
    Command::new(Path::new(&variable("PIPELINE_TEST_BIN")).join("stream-processor"))
        .arg("run")
        .args(arguments)
        .env("PIPELINE_KAFKA_BROKERS", variable("PIPELINE_TEST_KAFKA"))
        .env("PIPELINE_CASSANDRA_NODES", variable("PIPELINE_TEST_CASSANDRA"))
        .env("PIPELINE_CHECKPOINTS", checkpoints())
        .env("PIPELINE_STREAM", sources::root().join("streams/user_created.toml"))
        .env("PIPELINE_HTTP_LISTEN", listen)
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

fn checkpoints() -> PathBuf {
    Path::new(&variable("PIPELINE_TEST_FOLDER")).join("checkpoints")
}

#[tokio::test]
async fn provoked_for_real_each_alert_tells_what_broke() {
    let _load = load(5);
    let copies = Instant::now();
    let sent_again = load(80);
    // A counter that is first seen after it has risen shows no rise.
    wait_until("counters are known", "count_over_time(processor_committed_dead_letters_total[1m]) > 2").await;
    let since = Instant::now();
    poison(POISON);
    told("poison", since, &["DeadLetters"]).await;
    refuse_all().await;
    told("source without data", since, &["IngestUnresolvedIntervals"]).await;
    let since = Instant::now();
    signal("source", Signal::KILL);
    told("source stopped", since, &["IngestNoSuccess"]).await;
    told("most records sent again", copies, &["DuplicatesJump"]).await;
    drop(sent_again);
    from_the_processor_on().await;
}

async fn from_the_processor_on() {
    let since = Instant::now();
    signal("stream-processor", Signal::KILL);
    let alerts = [
        "ProcessingStalled",
        "TargetDown stream-processor",
        "LagOverObjective",
        "CheckpointStaleUnknown",
        "LagGrowing",
    ];
    told("processor stopped", since, &alerts).await;
    std::fs::remove_dir_all(checkpoints()).unwrap();
    std::fs::create_dir(checkpoints()).unwrap();
    let since = Instant::now();
    let mut recovered = processor(&[]);
    told("checkpoints lost", since, &["CheckpointRecovered"]).await;
    recovered.kill().await.unwrap();
    let since = Instant::now();
    let mut replaying = processor(&["--replay"]);
    told("started with --replay", since, &["PartitionReplayed"]).await;
    replaying.kill().await.unwrap();
    let _processor = processor(&[]);
    wait_until(
        "all is processed",
        "sum(dashboard_lag_messages) < 5000 and sum(up{job='stream-processor'}) == 1",
    )
    .await;
    let since = Instant::now();
    poison(TOO_MUCH_POISON);
    told("too much poison", since, &["PartitionPaused", "CheckpointStale stream-processor"]).await;
    let since = Instant::now();
    signal("cassandra", Signal::KILL);
    told("cassandra stopped", since, &["SinkErrors", "TargetDown cassandra", "LagOverObjectiveUnknown"])
        .await;
    let since = Instant::now();
    signal("kafka", Signal::KILL);
    told("kafka stopped", since, &["TargetDown kafka", "KafkaOfflinePartitionsUnknown"]).await;
}

/// Waits until an expression has a series.
async fn wait_until(what: &str, expression: &str) {
    let (mut prometheus, since) = (prometheus(), Instant::now());
    let mut ticks = tokio::time::interval(ASK_EVERY);
    while prometheus.query(expression).await.unwrap().is_empty() {
        prometheus.look_again();
        ticks.tick().await;
        assert!(since.elapsed() < WITHIN, "not within {} s: {what}", WITHIN.as_secs());
    }
}
