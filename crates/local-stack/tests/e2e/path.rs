//! The main job: from the REST source to the overview, and on where it was after a stop.

use serde_json::Value;

use crate::harness::{PATIENT, Pipeline, SOON, Service, text, wait_for, wait_until};

/// Intervals that the default stream catches up at its first start, and records of each (two pages of 500).
const CAUGHT_UP: i64 = 10;
const RECORDS: i64 = 1000;

#[tokio::test(flavor = "multi_thread")]
async fn init_makes_tables_and_topics_once_and_changes_nothing_the_second_time() {
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
async fn events_travel_from_the_source_to_the_overview() {
    let pipeline = Pipeline::initialised("path").await;
    let _source = pipeline.source().await;
    let mut producer = pipeline.producer();
    let mut processor = pipeline.processor("one");
    let mut dashboard = pipeline.dashboard();
    producer.ready().await;
    processor.ready().await;
    dashboard.ready().await;

    let least = CAUGHT_UP * RECORDS;
    wait_until("the intervals of the first start are processed", PATIENT, || async {
        pipeline.progress().await.events >= least
    })
    .await;
    // From here on nothing is added, so that every figure can be compared.
    producer.stop().await;
    let sent = pipeline.log_end(&pipeline.topic).await;
    wait_until("the log is processed", SOON, || async { pipeline.progress().await.next_offsets == sent })
        .await;
    let events = pipeline.progress().await.events;
    pipeline.assert_counted_once(events).await;
    assert_eq!(pipeline.acknowledged().await, sent, "records that succeeded runs say Kafka acknowledged");

    let overview = wait_for("the overview agrees", SOON, || async {
        let overview = dashboard.json("/api/v1/overview").await?;
        // Both servers are asked by themselves: for a moment one may know more than the other.
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
async fn a_stopped_processor_goes_on_where_it_was() {
    let pipeline = Pipeline::initialised("goes_on").await;
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    pipeline.stress(20_000).await;
    wait_until("the first half is processed", PATIENT, || async {
        pipeline.progress().await.events == 20_000
    })
    .await;
    processor.stop().await;
    pipeline.stress(20_000).await;
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    wait_until("both halves are processed", PATIENT, || async { pipeline.progress().await.events == 40_000 })
        .await;
    pipeline.assert_counted_once(40_000).await;
    assert_eq!(pipeline.progress().await.duplicates, 0);
    processor.stop().await;
}

impl Pipeline {
    /// Page and command line give the same sliding windows, and each event is in as many of them as overlap.
    async fn assert_windows(&self, dashboard: &Service, events: i64) {
        let asked = "/api/v1/windows?size=4m&slide=2m&by=gender&last=2h";
        let answer = dashboard.json(asked).await.unwrap();
        let of_page = without_complete(answer["windows"].clone());
        let counts = of_page.as_array().unwrap().iter().map(|window| window["count"].as_i64().unwrap());
        assert_eq!(counts.sum::<i64>(), events * 2, "{of_page}");
        let arguments =
            ["windows", "--size", "4m", "--slide", "2m", "--by", "gender", "--last", "2h", "--json"];
        let output = self.run("stream-processor", &arguments, &[]).await;
        let printed = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
        assert_eq!(without_complete(printed), of_page);
        let refused = dashboard.json("/api/v1/windows?size=90s").await.unwrap();
        assert!(refused.to_string().contains("multiple of the pane"), "{refused}");
    }

    /// Cassandra's write time of the one layout.
    async fn layout_written_at(&self) -> i64 {
        let query = format!("SELECT WRITETIME(layout) FROM {}.streams", self.keyspace);
        let rows = self.session.query_unpaged(query, ()).await.unwrap().into_rows_result().unwrap();
        rows.single_row::<(i64,)>().unwrap().0
    }

    /// Records of all runs of the ledger, each of which must have succeeded with every record acknowledged.
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

/// Windows settle while they are asked for twice.
fn without_complete(mut windows: Value) -> Value {
    for window in windows.as_array_mut().unwrap() {
        window.as_object_mut().unwrap().remove("complete");
    }
    windows
}
