//! Counters that cannot lie: whatever is killed and whatever is away, what `/metrics` says is committed is in Cassandra.

use std::time::{Duration, Instant};

use local_stack::servers::http_client;

use crate::harness::{PATIENT, Pipeline, SOON, Service, text, wait_until};
use crate::outages::Way;

/// Events of one round; each round has another fault.
const ROUND: i64 = 15_000;

/// How long an outage is watched.
const AWAY: Duration = Duration::from_secs(3);

/// What the processor says it has committed, over its partitions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Committed {
    events: i64,
    duplicates: i64,
}

/// From one scrape; `None` while nobody answers.
async fn committed(service: &Service) -> Option<Committed> {
    let answer = http_client().unwrap().get(format!("{}/metrics", service.address)).send().await.ok()?;
    let scrape = answer.text().await.ok()?;
    let sum = |what: &str| {
        let name = format!("processor_committed_{what}_total{{");
        let series = scrape.lines().filter(|line| line.starts_with(&name));
        series.filter_map(|line| line.rsplit(' ').next()?.parse::<i64>().ok()).sum()
    };
    Some(Committed { events: sum("events"), duplicates: sum("duplicates") })
}

/// What was seen of the counters while things went wrong.
#[derive(Default)]
struct Watch {
    samples: usize,
    in_between: usize,
}

impl Watch {
    /// The counter first, the rows after it: rows only become more, so the counter must not be ahead of them.
    async fn sample(&mut self, processor: &Service, pipeline: &Pipeline, sent: i64) {
        let Some(committed) = committed(processor).await else { return };
        let rows = pipeline.rows().await;
        assert!(committed.events <= rows, "{committed:?}, but {rows} rows in Cassandra");
        self.samples += 1;
        let taken = committed.events + committed.duplicates;
        self.in_between += usize::from(taken > sent - ROUND && taken < sent);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn counters_never_exceed_the_rows_through_kills_and_an_outage_and_equal_them_at_the_end() {
    let pipeline = Pipeline::initialised("truth").await;
    let way = Way::to(pipeline.cassandra_address()).await;
    // Small batches: more moments at which a counter could be wrong.
    let settings =
        [("PIPELINE_CASSANDRA_NODES", way.address.clone()), ("PIPELINE_BATCH_RECORDS", "250".to_owned())];
    let mut processor = pipeline.processor_with("one", &settings);
    processor.ready().await;
    let mut watch = Watch::default();
    let mut sent = 0;
    for fault in ["kill", "outage", "kill", "wipe", "nothing"] {
        let arguments = ["stress", "--messages", &ROUND.to_string(), "--duplicates", "5"];
        let output = pipeline.run("ingest-producer", &arguments, &[]).await;
        assert!(output.status.success(), "stress: {}", text(&output.stderr));
        sent += ROUND;
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
                way.open.send_replace(false);
                let since = Instant::now();
                while since.elapsed() < AWAY {
                    watch.sample(&processor, &pipeline, sent).await;
                }
                way.open.send_replace(true);
            }
            _ => {}
        }
        let since = Instant::now();
        while committed(&processor).await.is_none_or(|done| done.events + done.duplicates < sent) {
            watch.sample(&processor, &pipeline, sent).await;
            assert!(since.elapsed() < PATIENT, "after {fault}: {}", processor.words());
        }
    }
    let all = async || pipeline.progress().await.events + pipeline.progress().await.duplicates == sent;
    wait_until("the progress rows say so too", SOON, all).await;
    let (said, taken) = (committed(&processor).await.unwrap(), pipeline.progress().await);
    assert_eq!(said, Committed { events: pipeline.rows().await, duplicates: taken.duplicates });
    assert!(said.duplicates > 0, "the load held no copies");
    assert!(watch.in_between >= 3, "{} samples, {} of them while counting", watch.samples, watch.in_between);
    processor.stop().await;
}
