//! Suspended servers. SIGSTOP and SIGCONT simulate a long pause of a server's JVM. All services must recover without
//! help and count exactly. `./test e2e` runs these tests alone after the others, because they suspend the servers that
//! all tests share.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking, helpers included")]

#[path = "e2e/harness.rs"]
#[expect(dead_code, reason = "shared with the end-to-end tests")]
mod harness;
#[path = "e2e/oracle.rs"]
#[expect(dead_code, reason = "shared with the end-to-end tests")]
mod oracle;

use std::time::Duration;

use harness::{LONG_TIMEOUT, Pipeline, Service, TIMEOUT, is_long_run, text, wait_until};
use rustix::process::{Pid, Signal, kill_process};

/// Pauses in seconds, shorter and longer than the session timeout of a group member.
const PAUSES: [u64; 4] = [3, 12, 25, 90];
/// The pauses that `./test` uses without `long`, in seconds.
const DEFAULT_PAUSES: [u64; 1] = [12];
/// Environment variables with the process ids of the servers.
const KAFKA: &str = "PIPELINE_TEST_KAFKA_PID";
const CASSANDRA: &str = "PIPELINE_TEST_CASSANDRA_PID";
/// Events per second of the load.
const RATE: &str = "500";

/// Suspends a server until it is dropped.
struct SuspendedServer(Pid);

impl SuspendedServer {
    fn new(variable: &str) -> SuspendedServer {
        let pid = std::env::var(variable).unwrap_or_else(|_| panic!("{variable} is not set"));
        let pid = Pid::from_raw(pid.parse().unwrap()).unwrap();
        kill_process(pid, Signal::STOP).unwrap();
        SuspendedServer(pid)
    }
}

impl Drop for SuspendedServer {
    fn drop(&mut self) {
        kill_process(self.0, Signal::CONT).unwrap();
    }
}

fn pauses() -> &'static [u64] {
    if is_long_run() { &PAUSES } else { &DEFAULT_PAUSES }
}

/// Asserts that `instances` processors count every event once after a server was suspended under load.
async fn assert_survives_pause(name: &str, server: &str, instances: usize, seconds: u64) {
    let pipeline = Pipeline::initialised(name).await;
    let mut processors = Vec::new();
    for number in 0..instances {
        let mut processor = pipeline.processor(&format!("{number}"));
        processor.ready().await;
        processors.push(processor);
    }
    let length = (seconds + 10).to_string();
    let mut load =
        pipeline.start_producer_command("load", &["stress", "--rate", RATE, "--seconds", &length], &[]);
    wait_until("the first events of the load are processed", TIMEOUT, || async {
        pipeline.progress().await.events > 0
    })
    .await;
    {
        let _suspended = SuspendedServer::new(server);
        tokio::time::sleep(Duration::from_secs(seconds)).await;
    }
    // The single client of `stress` may not reconnect after a pause of the broker. It then fails, and another `stress`
    // follows.
    let delivered = load.end_within(LONG_TIMEOUT).await.success();
    assert!(delivered || server == KAFKA, "{}", load.log_text());
    pipeline.stress(1_000).await;
    for processor in &processors {
        wait_until("every processor is ready", LONG_TIMEOUT, || async { processor.is_ready().await }).await;
    }
    wait_until("the whole log is processed", LONG_TIMEOUT, || async {
        pipeline.progress().await.next_offsets == pipeline.log_end(&pipeline.topic).await
    })
    .await;
    let shares = wait_for_shares(&processors).await;
    assert_eq!(shares.iter().sum::<f64>(), 6.0, "{shares:?}");
    pipeline.assert_counted_once(pipeline.ids_in_the_log().await).await;
    pipeline.verify().await;
    for processor in processors {
        processor.stop().await;
    }
}

/// Waits until all six partitions have an owner. Returns the number of partitions of each processor.
async fn wait_for_shares(processors: &[Service]) -> Vec<f64> {
    harness::wait_for("every partition has an owner", LONG_TIMEOUT, || async {
        let mut shares = Vec::new();
        for processor in processors {
            shares.push(processor.metric("processor_partitions").await?);
        }
        (shares.iter().sum::<f64>() == 6.0).then_some(shares)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn processing_continues_after_a_pause_of_the_broker() {
    for seconds in pauses() {
        for instances in [1, 3] {
            assert_survives_pause(&format!("broker_{instances}_{seconds}"), KAFKA, instances, *seconds).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn processing_continues_after_a_pause_of_cassandra() {
    for seconds in pauses() {
        for instances in [1, 3] {
            let name = format!("cassandra_{instances}_{seconds}");
            assert_survives_pause(&name, CASSANDRA, instances, *seconds).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_producer_executes_commands_again_after_a_pause_of_the_broker() {
    for seconds in pauses() {
        let pipeline = Pipeline::initialised(&format!("producer_{seconds}")).await;
        let _source = pipeline.source().await;
        let mut producer = pipeline.producer();
        producer.ready().await;
        pipeline.spike().await;
        {
            let _suspended = SuspendedServer::new(KAFKA);
            tokio::time::sleep(Duration::from_secs(*seconds)).await;
        }
        pipeline.spike().await;
        producer.stop().await;
    }
}

impl Pipeline {
    /// Sends a spike command to the running producer. The spike must succeed.
    async fn spike(&self) {
        let spike = ["control", "--wait", "spike", "--rate", "100", "--seconds", "1"];
        let output = self.run("ingest-producer", &spike, &[]).await;
        assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_stops_a_processor_while_both_servers_are_suspended() {
    let pipeline = Pipeline::initialised("sigterm").await;
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    let mut load =
        pipeline.start_producer_command("load", &["stress", "--rate", RATE, "--seconds", "5"], &[]);
    wait_until("the first events of the load are processed", TIMEOUT, || async {
        pipeline.progress().await.events > 0
    })
    .await;
    {
        let _suspended = (SuspendedServer::new(KAFKA), SuspendedServer::new(CASSANDRA));
        assert_eq!(processor.stop().await.code(), Some(143));
    }
    load.end_within(LONG_TIMEOUT).await;
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    wait_until("the whole log is processed", LONG_TIMEOUT, || async {
        pipeline.progress().await.next_offsets == pipeline.log_end(&pipeline.topic).await
    })
    .await;
    pipeline.assert_counted_once(pipeline.ids_in_the_log().await).await;
    processor.stop().await;
}
