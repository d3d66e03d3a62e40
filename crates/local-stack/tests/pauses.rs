//! Servers that stand still, as a long pause of their JVM does: SIGSTOP for seconds, then SIGCONT. Everything goes on by itself and
//! counts exactly. Run alone, because it stops the servers that all tests share: `./test e2e` does so after the others.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking, helpers included")]

#[path = "e2e/harness.rs"]
#[expect(dead_code, reason = "shared with the end-to-end tests")]
mod harness;
#[path = "e2e/oracle.rs"]
#[expect(dead_code, reason = "shared with the end-to-end tests")]
mod oracle;

use std::time::Duration;

use harness::{PATIENT, Pipeline, SOON, Service, long, text, wait_until};
use rustix::process::{Pid, Signal, kill_process};

/// Pauses in seconds: shorter and longer than the session of a group's member.
const PAUSES: [u64; 4] = [3, 12, 25, 90];
/// The one that `./test` tries.
const USUAL: [u64; 1] = [12];
/// Where the servers' process ids stand.
const KAFKA: &str = "PIPELINE_TEST_KAFKA_PID";
const CASSANDRA: &str = "PIPELINE_TEST_CASSANDRA_PID";
/// Events a second while servers stand still.
const RATE: &str = "500";

/// A server that stands still as long as this lives.
struct Stopped(Pid);

impl Stopped {
    fn new(variable: &str) -> Stopped {
        let pid = std::env::var(variable).unwrap_or_else(|_| panic!("{variable} is not set"));
        let pid = Pid::from_raw(pid.parse().unwrap()).unwrap();
        kill_process(pid, Signal::STOP).unwrap();
        Stopped(pid)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        kill_process(self.0, Signal::CONT).unwrap();
    }
}

fn pauses() -> &'static [u64] {
    if long() { &PAUSES } else { &USUAL }
}

/// `instances` processors under load while a server stands still; then everything sent is counted once.
async fn survives(name: &str, server: &str, instances: usize, seconds: u64) {
    let pipeline = Pipeline::initialised(name).await;
    let mut processors = Vec::new();
    for number in 0..instances {
        let mut processor = pipeline.processor(&format!("{number}"));
        processor.ready().await;
        processors.push(processor);
    }
    let length = (seconds + 10).to_string();
    let mut load = pipeline.begun("load", &["stress", "--rate", RATE, "--seconds", &length], &[]);
    wait_until("the load is on", SOON, || async { pipeline.progress().await.events > 0 }).await;
    {
        let _stopped = Stopped::new(server);
        tokio::time::sleep(Duration::from_secs(seconds)).await;
    }
    // `stress` has one client. After its broker stood still it may be deaf: then it ends with failures, and another one sends on.
    let delivered = load.end_within(PATIENT).await.success();
    assert!(delivered || server == KAFKA, "{}", load.words());
    pipeline.stress(1_000).await;
    for processor in &processors {
        wait_until("every processor is ready", PATIENT, || async { processor.is_ready().await }).await;
    }
    wait_until("all is processed", PATIENT, || async {
        pipeline.progress().await.next_offsets == pipeline.log_end(&pipeline.topic).await
    })
    .await;
    let shares = wait_shares(&processors).await;
    assert_eq!(shares.iter().sum::<f64>(), 6.0, "{shares:?}");
    pipeline.assert_counted_once(pipeline.ids_in_the_log().await).await;
    pipeline.verify().await;
    for processor in processors {
        processor.stop().await;
    }
}

/// Partitions of each processor, once all six have an owner.
async fn wait_shares(processors: &[Service]) -> Vec<f64> {
    harness::wait_for("every partition has an owner", PATIENT, || async {
        let mut shares = Vec::new();
        for processor in processors {
            shares.push(processor.metric("processor_partitions").await?);
        }
        (shares.iter().sum::<f64>() == 6.0).then_some(shares)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_stands_still_is_gone_on_with_once_it_is_back() {
    for seconds in pauses() {
        for instances in [1, 3] {
            survives(&format!("broker_{instances}_{seconds}"), KAFKA, instances, *seconds).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cassandra_that_stands_still_is_gone_on_with_once_it_is_back() {
    for seconds in pauses() {
        for instances in [1, 3] {
            let name = format!("cassandra_{instances}_{seconds}");
            survives(&name, CASSANDRA, instances, *seconds).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_producer_takes_commands_and_sends_records_again_once_the_broker_is_back() {
    for seconds in pauses() {
        let pipeline = Pipeline::initialised(&format!("producer_{seconds}")).await;
        let _source = pipeline.source().await;
        let mut producer = pipeline.producer();
        producer.ready().await;
        pipeline.spike().await;
        {
            let _stopped = Stopped::new(KAFKA);
            tokio::time::sleep(Duration::from_secs(*seconds)).await;
        }
        pipeline.spike().await;
        producer.stop().await;
    }
}

impl Pipeline {
    /// Asks the running producer for a spike, which must succeed.
    async fn spike(&self) {
        let spike = ["control", "--wait", "spike", "--rate", "100", "--seconds", "1"];
        let output = self.run("ingest-producer", &spike, &[]).await;
        assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_ends_a_processor_while_both_servers_stand_still() {
    let pipeline = Pipeline::initialised("sigterm").await;
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    let mut load = pipeline.begun("load", &["stress", "--rate", RATE, "--seconds", "5"], &[]);
    wait_until("the load is on", SOON, || async { pipeline.progress().await.events > 0 }).await;
    {
        let _stopped = (Stopped::new(KAFKA), Stopped::new(CASSANDRA));
        assert_eq!(processor.stop().await.code(), Some(143));
    }
    load.end_within(PATIENT).await;
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    wait_until("all is processed", PATIENT, || async {
        pipeline.progress().await.next_offsets == pipeline.log_end(&pipeline.topic).await
    })
    .await;
    pipeline.assert_counted_once(pipeline.ids_in_the_log().await).await;
    processor.stop().await;
}
