//! Jobs of tokio-cron-scheduler that wake the services.

use crate::harness::{Pipeline, TIMEOUT, wait_until};
use crate::ingest::short_intervals;

#[tokio::test(flavor = "multi_thread")]
async fn a_job_at_the_end_of_each_interval_triggers_its_run() {
    const TRIGGERED: &str = "ingest_plannings_total{trigger=\"interval\"}";
    let edit = |text| short_intervals(text, "5s").replace("catch_up = 2000", "catch_up = 1");
    let pipeline = Pipeline::with_stream("jobs", edit).await;
    pipeline.init().await;
    let _source = pipeline.source().await;
    let mut producer = pipeline.producer();
    producer.ready().await;
    wait_until("three intervals have ended and succeeded", TIMEOUT, || async {
        let succeeded = pipeline.runs().await.values().filter(|run| run.state == "succeeded").count();
        succeeded >= 4 && producer.metric(TRIGGERED).await >= Some(3.0)
    })
    .await;
    producer.stop().await;
}
