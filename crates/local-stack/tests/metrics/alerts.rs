//! Alerts provoked for real, one after the other: what breaks, and how long it takes until it is told. Minutes by nature, so
//! only `./test long` asks for it; it leaves the stack broken and comes last.

use std::path::Path;
use std::time::{Duration, Instant};

use local_stack::process::Record;
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

fn poison() {
    let producer: BaseProducer =
        ClientConfig::new().set("bootstrap.servers", variable("PIPELINE_TEST_KAFKA")).create().unwrap();
    for number in 0..POISON {
        let key = number.to_string();
        producer
            .send(BaseRecord::to("user_created").key(&key).payload("no event"))
            .map_err(|(e, _)| e)
            .unwrap();
    }
    producer.flush(Duration::from_secs(10)).unwrap();
}

/// The processor as `./run` starts it.
fn processor() -> Child {
    let listen = variable("PIPELINE_TEST_PROCESSOR").replace("http://", "");
    let folder = variable("PIPELINE_TEST_FOLDER");
    let log = std::fs::File::create(Path::new(&folder).join("logs/stream-processor-again.log")).unwrap();
    Command::new(Path::new(&variable("PIPELINE_TEST_BIN")).join("stream-processor"))
        .arg("run")
        .env("PIPELINE_KAFKA_BROKERS", variable("PIPELINE_TEST_KAFKA"))
        .env("PIPELINE_CASSANDRA_NODES", variable("PIPELINE_TEST_CASSANDRA"))
        .env("PIPELINE_CHECKPOINTS", Path::new(&folder).join("checkpoints"))
        .env("PIPELINE_STREAM", sources::root().join("streams/user_created.toml"))
        .env("PIPELINE_HTTP_LISTEN", listen)
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

#[tokio::test]
async fn provoked_for_real_each_alert_tells_what_broke() {
    let _load = load();
    // A counter that is first seen after it has risen shows no rise.
    wait_until("counters are known", "count_over_time(processor_committed_dead_letters_total[1m]) > 2").await;
    let since = Instant::now();
    signal("source", Signal::KILL);
    poison();
    told("poison", since, &["DeadLetters"]).await;
    told("source stopped", since, &["IngestNoSuccess"]).await;
    let since = Instant::now();
    signal("stream-processor", Signal::KILL);
    told(
        "processor stopped",
        since,
        &["ProcessingStalled", "TargetDown stream-processor", "LagOverObjective", "CheckpointStaleUnknown"],
    )
    .await;
    let _processor = processor();
    wait_until("all parts answer again", "count(up == 1) == 6").await;
    let since = Instant::now();
    signal("cassandra", Signal::KILL);
    told("cassandra stopped", since, &["SinkErrors", "TargetDown cassandra", "LagOverObjectiveUnknown"])
        .await;
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
