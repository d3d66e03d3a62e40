//! The counters of committed events in `/metrics` never exceed the rows in Cassandra, not even during kills and
//! outages.

use std::time::{Duration, Instant};

use local_stack::servers::http_client;

use crate::harness::{LONG_TIMEOUT, Pipeline, Service, TIMEOUT, text, wait_until};
use crate::outages::Proxy;

/// Events of one round. Each round injects another fault.
const ROUND_EVENTS: i64 = 15_000;

/// Length of the outage.
const OUTAGE: Duration = Duration::from_secs(3);

/// The committed counters of the processor, summed over its partitions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Committed {
    events: i64,
    duplicates: i64,
}

/// Reads the counters from one scrape. `None` if the processor does not answer.
async fn committed(service: &Service) -> Option<Committed> {
    let answer = http_client().unwrap().get(format!("{}/metrics", service.address)).send().await.ok()?;
    let scrape = answer.text().await.ok()?;
    let sum = |counter: &str| {
        let name = format!("processor_committed_{counter}_total{{");
        let series = scrape.lines().filter(|line| line.starts_with(&name));
        series.filter_map(|line| line.rsplit(' ').next()?.parse::<i64>().ok()).sum()
    };
    Some(Committed { events: sum("events"), duplicates: sum("duplicates") })
}

/// Statistics of the samples taken during the faults.
#[derive(Default)]
struct Watch {
    samples: usize,
    /// Samples taken while a round was partly counted.
    while_counting: usize,
}

impl Watch {
    /// Reads the counters and then the rows. The number of rows only grows, so the counters must not exceed it.
    async fn sample(&mut self, processor: &Service, pipeline: &Pipeline, sent: i64) {
        let Some(committed) = committed(processor).await else { return };
        let rows = pipeline.rows().await;
        assert!(committed.events <= rows, "{committed:?}, but {rows} rows in Cassandra");
        self.samples += 1;
        let counted = committed.events + committed.duplicates;
        self.while_counting += usize::from(counted > sent - ROUND_EVENTS && counted < sent);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn counters_never_exceed_the_rows_during_faults_and_equal_them_afterwards() {
    let pipeline = Pipeline::initialised("truth").await;
    let proxy = Proxy::to(pipeline.cassandra_address()).await;
    // Small batches give more opportunities for a wrong counter.
    let settings =
        [("PIPELINE_CASSANDRA_NODES", proxy.address.clone()), ("PIPELINE_BATCH_RECORDS", "250".to_owned())];
    let mut processor = pipeline.processor_with("one", &settings);
    processor.ready().await;
    let mut watch = Watch::default();
    let mut sent = 0;
    for fault in ["kill", "outage", "kill", "wipe", "nothing"] {
        let arguments = ["stress", "--messages", &ROUND_EVENTS.to_string(), "--duplicates", "5"];
        let output = pipeline.run("ingest-producer", &arguments, &[]).await;
        assert!(output.status.success(), "stress: {}", text(&output.stderr));
        sent += ROUND_EVENTS;
        watch.sample(&processor, &pipeline, sent).await;
        match fault {
            "kill" | "wipe" => {
                processor.kill().await;
                if fault == "wipe" {
                    std::fs::remove_dir_all(pipeline.folder.join("checkpoints")).unwrap();
                    std::fs::create_dir(pipeline.folder.join("checkpoints")).unwrap();
                }
                processor = pipeline.processor_with("one", &settings);
            }
            "outage" => {
                proxy.open.send_replace(false);
                let since = Instant::now();
                while since.elapsed() < OUTAGE {
                    watch.sample(&processor, &pipeline, sent).await;
                }
                proxy.open.send_replace(true);
            }
            _ => {}
        }
        let since = Instant::now();
        while committed(&processor).await.is_none_or(|done| done.events + done.duplicates < sent) {
            watch.sample(&processor, &pipeline, sent).await;
            assert!(since.elapsed() < LONG_TIMEOUT, "after {fault}: {}", processor.log_text());
        }
    }
    let all = async || pipeline.progress().await.events + pipeline.progress().await.duplicates == sent;
    wait_until("the progress rows have the same counts", TIMEOUT, all).await;
    let (counters, progress) = (committed(&processor).await.unwrap(), pipeline.progress().await);
    assert_eq!(counters, Committed { events: pipeline.rows().await, duplicates: progress.duplicates });
    assert!(counters.duplicates > 0, "the load contained no duplicates");
    assert!(watch.while_counting >= 3, "{} samples, {} while counting", watch.samples, watch.while_counting);
    processor.stop().await;
}
