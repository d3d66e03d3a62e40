//! The main path: from the REST source through Kafka and Cassandra to the dashboard, and a resume after a stop.

use serde_json::Value;

use crate::harness::{LONG_TIMEOUT, Pipeline, Service, TIMEOUT, text, wait_for, wait_until};

/// Number of intervals that the default stream catches up at its first start.
const CAUGHT_UP: i64 = 10;
/// Records of an interval, in two pages of 500.
const RECORDS: i64 = 1000;

#[tokio::test(flavor = "multi_thread")]
async fn init_creates_tables_and_topics_and_a_second_run_changes_nothing() {
    let pipeline = Pipeline::new("init").await;
    pipeline.init().await;
    let first = pipeline.layout_written_at().await;
    pipeline.init().await;
    assert_eq!(pipeline.layout_written_at().await, first, "the second init wrote the layout again");
    assert_eq!(pipeline.partitions(&pipeline.topic).await, 6);
    assert_eq!(pipeline.partitions(&format!("{}.dlq", pipeline.topic)).await, 1);
    assert_eq!(pipeline.partitions(&format!("{}.control", pipeline.topic)).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn events_arrive_from_the_source_at_the_overview() {
    let pipeline = Pipeline::initialised("path").await;
    let _source = pipeline.source().await;
    let mut producer = pipeline.producer();
    let mut processor = pipeline.processor("one");
    let mut dashboard = pipeline.dashboard();
    producer.ready().await;
    processor.ready().await;
    dashboard.ready().await;

    let least = CAUGHT_UP * RECORDS;
    wait_until("the intervals of the catch-up are processed", LONG_TIMEOUT, || async {
        pipeline.progress().await.events >= least
    })
    .await;
    // Without the producer no record is added, so all figures can be compared.
    producer.stop().await;
    let sent = pipeline.log_end(&pipeline.topic).await;
    wait_until("the whole log is processed", TIMEOUT, || async {
        pipeline.progress().await.next_offsets == sent
    })
    .await;
    let events = pipeline.progress().await.events;
    pipeline.assert_counted_once(events).await;
    assert_eq!(
        pipeline.acknowledged().await,
        sent,
        "records that Kafka acknowledged according to the run ledger"
    );

    let overview = wait_for("the overview shows the same figures", TIMEOUT, || async {
        let overview = dashboard.json("/api/v1/overview").await?;
        // The dashboard reads Kafka and Cassandra separately, so the figures may differ for a moment.
        let agrees = overview["events_processed"] == sent && overview["events_produced"] == sent;
        (agrees && overview["lag_messages"] == 0).then_some(overview)
    })
    .await;
    assert_eq!(overview["rows_written"], events, "{overview}");
    assert_eq!(overview["dead_letters"], 0, "{overview}");
    assert_eq!(overview["lag_seconds"], 0.0, "{overview}");
    pipeline.assert_windows(&dashboard, events).await;
    assert_eq!(processor.stop().await.code(), Some(143));
    assert_eq!(dashboard.stop().await.code(), Some(143));
    let output = pipeline.run("stream-processor", &["checkpoint", "check"], &[]).await;
    assert!(text(&output.stdout).contains("6 state files, all usable"), "{}", text(&output.stderr));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_processor_resumes_where_it_stopped() {
    let pipeline = Pipeline::initialised("goes_on").await;
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    pipeline.stress(20_000).await;
    wait_until("the first half is processed", LONG_TIMEOUT, || async {
        pipeline.progress().await.events == 20_000
    })
    .await;
    processor.stop().await;
    pipeline.stress(20_000).await;
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    wait_until("both halves are processed", LONG_TIMEOUT, || async {
        pipeline.progress().await.events == 40_000
    })
    .await;
    pipeline.assert_counted_once(40_000).await;
    assert_eq!(pipeline.progress().await.duplicates, 0);
    processor.stop().await;
}

impl Pipeline {
    /// Asserts that the API and the command line return the same sliding windows. Each event is in two overlapping
    /// windows.
    async fn assert_windows(&self, dashboard: &Service, events: i64) {
        let path = "/api/v1/windows?size=4m&slide=2m&by=gender&last=2h";
        let answer = dashboard.json(path).await.unwrap();
        let of_api = without_complete(answer["windows"].clone());
        let counts = of_api.as_array().unwrap().iter().map(|window| window["count"].as_i64().unwrap());
        assert_eq!(counts.sum::<i64>(), events * 2, "{of_api}");
        let arguments =
            ["windows", "--size", "4m", "--slide", "2m", "--by", "gender", "--last", "2h", "--json"];
        let output = self.run("stream-processor", &arguments, &[]).await;
        let printed = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
        assert_eq!(without_complete(printed), of_api);
        let refused = dashboard.json("/api/v1/windows?size=90s").await.unwrap();
        assert!(refused.to_string().contains("multiple of the pane"), "{refused}");
    }

    /// Cassandra's write time of the registered layout.
    async fn layout_written_at(&self) -> i64 {
        let query = format!("SELECT WRITETIME(layout) FROM {}.streams", self.keyspace);
        let rows = self.session.query_unpaged(query, ()).await.unwrap().into_rows_result().unwrap();
        rows.single_row::<(i64,)>().unwrap().0
    }

    /// Number of acknowledged records of all runs. A succeeded run must have all of its records acknowledged.
    async fn acknowledged(&self) -> i64 {
        let query = format!("SELECT state, records, acked FROM {}.ingest_runs", self.keyspace);
        let rows = self.session.query_unpaged(query, ()).await.unwrap().into_rows_result().unwrap();
        let mut sum = 0;
        for row in rows.rows::<(String, Option<i64>, Option<i64>)>().unwrap() {
            let (state, records, acked) = row.unwrap();
            if state == "succeeded" {
                assert_eq!(records, acked, "a succeeded run has every record acknowledged");
            }
            sum += acked.unwrap_or(0);
        }
        sum
    }
}

/// Removes `complete` from each window, because a window may become complete between two queries.
fn without_complete(mut windows: Value) -> Value {
    for window in windows.as_array_mut().unwrap() {
        window.as_object_mut().unwrap().remove("complete");
    }
    windows
}
