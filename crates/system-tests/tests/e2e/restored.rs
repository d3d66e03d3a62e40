//! Cassandra is restored from an older snapshot while processors are stopped or running. The lost data is processed
//! again from Kafka's log.

use std::collections::BTreeMap;

use futures::TryStreamExt;
use scylla::value::CqlTimestamp;
use serde_json::Value;

use crate::harness::{LONG_TIMEOUT, Pipeline, wait_until};

/// Counts the starts of partitions for which Cassandra had lost acknowledged data.
const STORE_BEHIND: &str = "processor_partition_starts_total{how=\"store_behind\"}";

/// Each table that the processor writes, with its rows as JSON and their write times in microseconds.
struct Snapshot(Vec<(String, Vec<(String, i64)>)>);

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_processor_brings_a_restored_older_snapshot_up_to_date() {
    let pipeline = Pipeline::initialised("restored").await;
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    pipeline.send_up_to(500).await;
    let snapshot = pipeline.snapshot().await;
    pipeline.send_up_to(1_500).await;
    processor.stop().await;
    pipeline.restore(&snapshot).await;
    assert_eq!(pipeline.progress().await.events, 500);

    let mut processor = pipeline.processor("one");
    processor.ready().await;
    pipeline.wait_until_caught_up(1_500).await;
    assert!(processor.metric(STORE_BEHIND).await.unwrap() > 0.0);
    assert!(processor.log_text().contains("cassandra has lost acknowledged writes"));
    pipeline.verify().await;
    pipeline.assert_running_totals(1_500).await;
    processor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_processor_detects_a_restored_older_snapshot_and_brings_it_up_to_date() {
    let pipeline = Pipeline::initialised("restored_under").await;
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    pipeline.send_up_to(500).await;
    let snapshot = pipeline.snapshot().await;
    pipeline.send_up_to(1_000).await;
    // No events arrive, so no write of the processor can detect the restore.
    pipeline.restore(&snapshot).await;
    pipeline.wait_until_caught_up(1_000).await;
    assert!(processor.log_text().contains("an older snapshot was restored"));
    pipeline.send_up_to(1_500).await;
    pipeline.assert_counted_once(1_500).await;
    pipeline.verify().await;
    processor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn processing_continues_from_cassandra_when_the_state_files_are_older() {
    let pipeline = Pipeline::initialised("newer").await;
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    pipeline.send_up_to(500).await;
    processor.stop().await;
    let (volume, aside) = (pipeline.folder.join("checkpoints"), pipeline.folder.join("aside"));
    copy_folder(&volume, &aside);
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    pipeline.send_up_to(1_000).await;
    processor.stop().await;
    std::fs::remove_dir_all(&volume).unwrap();
    copy_folder(&aside, &volume);
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    pipeline.send_up_to(1_200).await;
    assert!(processor.log_text().contains("recovering from the progress row"));
    pipeline.assert_counted_once(1_200).await;
    pipeline.verify().await;
    processor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_emptied_keyspace_is_filled_from_a_complete_log_and_refused_with_an_incomplete_one() {
    let pipeline = Pipeline::initialised("emptied").await;
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    pipeline.send_up_to(600).await;
    processor.stop().await;
    let empty = Snapshot(pipeline.written_tables().into_iter().map(|table| (table, Vec::new())).collect());
    pipeline.restore(&empty).await;
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    pipeline.wait_until_caught_up(600).await;
    pipeline.verify().await;
    processor.stop().await;

    pipeline.restore(&empty).await;
    pipeline.remove_below(0, 5).await;
    let mut processor = pipeline.processor("one");
    assert_eq!(processor.end().await.code(), Some(3));
    let log = processor.log_text();
    for part in ["partition 0: cassandra acknowledged everything below", "no progress row", "offsets 0 to 4"]
    {
        assert!(log.contains(part), "`{part}` is not in {log}");
    }
}

fn copy_folder(from: &std::path::Path, to: &std::path::Path) {
    std::fs::create_dir_all(to).unwrap();
    for file in std::fs::read_dir(from).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), to.join(file.file_name())).unwrap();
    }
}

impl Pipeline {
    /// Sends events until there are `events` in total, and waits until a running processor has counted them.
    async fn send_up_to(&self, events: i64) {
        let processed = self.progress().await.events;
        self.stress(u64::try_from(events - processed).unwrap()).await;
        self.wait_until_caught_up(events).await;
    }

    /// Waits until `events` events are processed, and asserts that each counts once.
    async fn wait_until_caught_up(&self, events: i64) {
        wait_until("all events are processed", LONG_TIMEOUT, || async {
            self.progress().await.events == events
        })
        .await;
        self.assert_counted_once(events).await;
    }

    /// The tables that the processor writes.
    fn written_tables(&self) -> Vec<String> {
        let stream = &self.definition.stream.name;
        vec![stream.clone(), format!("{stream}_panes"), "partition_progress".into(), "throughput".into()]
    }

    /// The current content of the tables, like a snapshot of the node's files.
    async fn snapshot(&self) -> Snapshot {
        let mut tables = Vec::new();
        for table in self.written_tables() {
            // A column that every row has, to read the write time of the row.
            let column = match table.as_str() {
                "partition_progress" => "next_offset",
                "throughput" => "total",
                other if other.ends_with("_panes") => "count",
                _ => "kafka_offset",
            };
            let timestamps = self.column::<i64>(&format!("WRITETIME({column})"), &table).await;
            let rows = self.column::<String>("JSON *", &table).await;
            tables.push((table, rows.into_iter().zip(timestamps).collect()));
        }
        Snapshot(tables)
    }

    /// The values of the selector `selected` in all rows of a table.
    async fn column<T>(&self, selected: &str, table: &str) -> Vec<T>
    where
        T: for<'f, 'm> scylla::deserialize::value::DeserializeValue<'f, 'm> + Send + 'static,
    {
        let query = format!("SELECT {selected} FROM {}.{table}", self.keyspace);
        let pager = self.session.query_iter(query, ()).await.unwrap();
        pager.rows_stream::<(T,)>().unwrap().map_ok(|(value,)| value).try_collect().await.unwrap()
    }

    /// Replaces the content of the tables with the snapshot.
    async fn restore(&self, Snapshot(tables): &Snapshot) {
        for (table, rows) in tables {
            self.session.query_unpaged(format!("TRUNCATE {}.{table}", self.keyspace), ()).await.unwrap();
            let insert =
                format!("INSERT INTO {}.{table} JSON ? DEFAULT UNSET USING TIMESTAMP ?", self.keyspace);
            let insert = self.session.prepare(insert).await.unwrap();
            for (json, timestamp) in rows {
                let mut row: Value = serde_json::from_str(json).unwrap();
                row.as_object_mut().unwrap().retain(|_, value| !value.is_null());
                self.session.execute_unpaged(&insert, (row.to_string(), timestamp)).await.unwrap();
            }
        }
    }

    /// Asserts that the latest running totals of all partitions add up to `records` in both resolutions.
    async fn assert_running_totals(&self, records: i64) {
        let query =
            format!("SELECT resolution, kafka_partition, at, total FROM {}.throughput", self.keyspace);
        let pager = self.session.query_iter(query, ()).await.unwrap();
        let mut rows = pager.rows_stream::<(i32, i32, CqlTimestamp, i64)>().unwrap();
        let mut last: BTreeMap<(i32, i32), (i64, i64)> = BTreeMap::new();
        while let Some((resolution, partition, at, total)) = rows.try_next().await.unwrap() {
            let slot = last.entry((resolution, partition)).or_default();
            *slot = (*slot).max((at.0, total));
        }
        for resolution in [1, 60] {
            let of_resolution = last.iter().filter(|((of, _), _)| *of == resolution);
            let sum: i64 = of_resolution.map(|(_, (_, total))| total).sum();
            assert_eq!(sum, records, "resolution {resolution}");
        }
    }
}
