//! Provokes faults one after the other and measures the time until the alerts fire. This takes minutes and leaves the
//! stack broken, so only `./test long` runs it, after all other tests.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use local_stack::process::Record;
use local_stack::servers::http_client;
use rdkafka::ClientConfig;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use rustix::process::Signal;
use tokio::process::{Child, Command};

use crate::{load, prometheus, sources, variable};

/// Time limit for an alert. Longer than the slowest alert here needs: two intervals, its pending time and a scrape.
const WITHIN: Duration = Duration::from_secs(420);

/// Pause between two checks of a condition.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// Number of undecodable records that fire an alert but do not pause the partition.
const POISON: usize = 5;

/// Number of consecutive undecodable records that pauses the partition with the default settings.
const PAUSING_POISON: usize = 5000;

/// Sends a signal to a process of the stack.
fn signal(part: &str, signal: Signal) {
    let file = Path::new(&variable("PIPELINE_TEST_FOLDER")).join(format!("run/{part}.json"));
    Record::read(&file).unwrap_or_else(|| panic!("cannot read {}", file.display())).signal(signal);
}

/// Waits until all `expected` alerts fire. Prints the time since `broken` for each.
#[expect(clippy::print_stdout, reason = "the times are figures for BENCHMARKS.md")]
async fn wait_until_firing(what: &str, broken: Instant, expected: &[&str]) {
    let prometheus = prometheus();
    let mut missing = expected.to_vec();
    let mut ticks = tokio::time::interval(POLL_INTERVAL);
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
            "{what}: {missing:?} did not fire within {} s; firing: {firing:?}",
            WITHIN.as_secs()
        );
    }
}

/// Sends undecodable records to one partition.
fn poison(records: usize) {
    let producer: BaseProducer =
        ClientConfig::new().set("bootstrap.servers", variable("PIPELINE_TEST_KAFKA")).create().unwrap();
    for _ in 0..records {
        let record = BaseRecord::to("user_created").key("poison").payload("no event");
        producer.send(record).map_err(|(e, _)| e).unwrap();
    }
    producer.flush(Duration::from_secs(10)).unwrap();
}

/// Makes the source answer every request with 404. The producer does not retry this error.
async fn fail_all_requests() {
    let url = format!("{}/faults", variable("PIPELINE_TEST_SOURCE"));
    let faults = r#"{"faults": {"not_found": {"rate": 1.0}}}"#;
    let answer = http_client().unwrap().put(url).body(faults).send().await.unwrap();
    assert!(answer.status().is_success());
}

/// Starts the processor with the settings that `./run` uses.
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
async fn alerts_fire_for_the_faults_they_describe() {
    let _load = load(5);
    let duplicates_since = Instant::now();
    let duplicating_load = load(80);
    // `increase` ignores the first sample of a counter, so Prometheus must have scraped it before it rises.
    wait_until("the counter is scraped", "count_over_time(processor_committed_dead_letters_total[1m]) > 2")
        .await;
    let since = Instant::now();
    poison(POISON);
    wait_until_firing("undecodable records", since, &["DeadLetters"]).await;
    fail_all_requests().await;
    wait_until_firing("source without data", since, &["IngestUnresolvedIntervals"]).await;
    let since = Instant::now();
    signal("source", Signal::KILL);
    wait_until_firing("source stopped", since, &["IngestNoSuccess"]).await;
    wait_until_firing("most records sent twice", duplicates_since, &["DuplicatesJump"]).await;
    drop(duplicating_load);
    provoke_processor_and_server_alerts().await;
}

async fn provoke_processor_and_server_alerts() {
    let since = Instant::now();
    signal("stream-processor", Signal::KILL);
    let alerts = [
        "ProcessingStalled",
        "TargetDown stream-processor",
        "LagOverObjective",
        "CheckpointStaleUnknown",
        "LagGrowing",
    ];
    wait_until_firing("processor stopped", since, &alerts).await;
    std::fs::remove_dir_all(checkpoints()).unwrap();
    std::fs::create_dir(checkpoints()).unwrap();
    let since = Instant::now();
    let mut recovered = processor(&[]);
    wait_until_firing("checkpoints lost", since, &["CheckpointRecovered"]).await;
    recovered.kill().await.unwrap();
    let since = Instant::now();
    let mut replaying = processor(&["--replay"]);
    wait_until_firing("started with --replay", since, &["PartitionReplayed"]).await;
    replaying.kill().await.unwrap();
    let _processor = processor(&[]);
    wait_until(
        "the whole log is processed",
        "sum(dashboard_lag_messages) < 5000 and sum(up{job='stream-processor'}) == 1",
    )
    .await;
    let since = Instant::now();
    poison(PAUSING_POISON);
    wait_until_firing(
        "too many undecodable records",
        since,
        &["PartitionPaused", "CheckpointStale stream-processor"],
    )
    .await;
    let since = Instant::now();
    signal("cassandra", Signal::KILL);
    wait_until_firing(
        "cassandra stopped",
        since,
        &["SinkErrors", "TargetDown cassandra", "LagOverObjectiveUnknown"],
    )
    .await;
    let since = Instant::now();
    signal("kafka", Signal::KILL);
    wait_until_firing("kafka stopped", since, &["TargetDown kafka", "KafkaOfflinePartitionsUnknown"]).await;
}

/// Waits until an expression returns a series.
async fn wait_until(what: &str, expression: &str) {
    let (mut prometheus, since) = (prometheus(), Instant::now());
    let mut ticks = tokio::time::interval(POLL_INTERVAL);
    while prometheus.query(expression).await.unwrap().is_empty() {
        prometheus.clear_cache();
        ticks.tick().await;
        assert!(since.elapsed() < WITHIN, "timed out after {} s: {what}", WITHIN.as_secs());
    }
}
