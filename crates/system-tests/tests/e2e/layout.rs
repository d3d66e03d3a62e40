//! Changed stream definitions, keyspaces of earlier versions, and servers with wrong settings.

use std::time::Duration;

use rdkafka::admin::{AdminOptions, AlterConfig, ResourceSpecifier};
use serde_json::Value;

use crate::harness::{LONG_TIMEOUT, Pipeline, Service, TIMEOUT, text, wait_until};

/// The CREATE TABLE statements and a layout of version 1.
const TABLES_V1: &str = include_str!("../../../common/tests/golden/tables_1.cql");
const LAYOUT_V1: &str = include_str!("../../../common/tests/golden/layout_1_user_created.json");
/// A column to append to the stream file.
const PHONE: &str = "\n[[column]]\nname = \"phone\"\ntype = \"text\"\npointer = \"/phone\"\n";
/// Exit code of a service that refuses to run.
const REFUSED: i32 = 3;

#[tokio::test(flavor = "multi_thread")]
async fn a_column_can_be_appended_to_a_stream_with_data() {
    let mut pipeline = Pipeline::initialised("appended").await;
    let mut running = pipeline.processor("one");
    running.ready().await;
    pipeline.stress(300).await;
    pipeline.wait_for_events(300).await;
    let (panes, progress) = (pipeline.panes().await, pipeline.progress().await);
    let old_file = pipeline.stream_text();

    pipeline.edit_stream(|text| text + PHONE);
    for (program, arguments) in [("stream-processor", "run"), ("ingest-producer", "stress")] {
        let expected = ["column `phone`: new, text", "run `stream-processor init`"];
        pipeline.assert_exits(program, arguments, 1, &expected).await;
    }
    pipeline.init().await;
    assert_eq!(running.end().await.code(), Some(1), "{}", running.log_text());
    assert!(running.log_text().contains("was registered again, with changes"), "{}", running.log_text());
    assert_eq!((pipeline.panes().await, pipeline.progress().await), (panes, progress));

    let mut processor = pipeline.processor("one");
    processor.ready().await;
    pipeline.wait_for_partitions(&processor).await;
    let resumed = processor.log_text().matches(r#""how":"resume""#).count();
    assert_eq!(resumed, 6, "the state files of the old layout must be used: {}", processor.log_text());
    assert_eq!(pipeline.phones().await, (300, 0), "old rows have no phone");
    pipeline.stress(200).await;
    pipeline.wait_for_events(500).await;
    assert_eq!(pipeline.phones().await, (300, 200), "new rows have a phone");
    pipeline.assert_counted_once(500).await;
    pipeline.verify().await;
    processor.stop().await;
    let check = pipeline.run("stream-processor", &["checkpoint", "check"], &[]).await;
    assert!(check.status.success(), "{}{}", text(&check.stdout), text(&check.stderr));

    pipeline.set_stream_text(&old_file);
    let removed =
        ["column `phone`: registered, but no longer declared", "give the changed stream a new name"];
    for (program, arguments) in
        [("stream-processor", "run"), ("stream-processor", "init"), ("ingest-producer", "run")]
    {
        pipeline.assert_exits(program, arguments, REFUSED, &removed).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn init_registers_lateness_and_a_longer_ttl_and_refuses_a_shorter_ttl() {
    let mut pipeline = Pipeline::initialised("ttl").await;
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    pipeline.stress(200).await;
    pipeline.wait_for_events(200).await;
    processor.stop().await;
    pipeline
        .edit_stream(|text| text.replace("365d", "730d").replace("lateness = \"10m\"", "lateness = \"20m\""));
    pipeline.init().await;
    for table in ["user_created", "user_created_panes"] {
        assert_eq!(pipeline.ttl_of(table).await, 730 * 86_400);
    }
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    pipeline.stress(100).await;
    pipeline.wait_for_events(300).await;
    pipeline.assert_counted_once(300).await;
    processor.stop().await;
    pipeline.edit_stream(|text| text.replace("730d", "365d"));
    pipeline.assert_exits("stream-processor", "init", REFUSED, &["`store.ttl`", "raised, not lowered"]).await;
    assert_eq!(pipeline.ttl_of("user_created").await, 730 * 86_400);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_concurrent_inits_migrate_a_keyspace_of_version_1_and_processing_continues() {
    let mut pipeline = Pipeline::initialised("forward").await;
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    pipeline.stress(300).await;
    pipeline.wait_for_events(300).await;
    processor.stop().await;
    let current = pipeline.keyspace.clone();
    pipeline.keyspace = format!("{current}_old");
    pipeline.create_version_1_keyspace(&current).await;
    pipeline.lose_checkpoints();

    let expected = ["have version 1, this program needs 3", "run its `stream-processor init` first"];
    pipeline.assert_exits("stream-processor", "run", 1, &expected).await;
    tokio::join!(pipeline.init(), pipeline.init());
    pipeline.init().await;
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    pipeline.stress(200).await;
    pipeline.wait_for_events(500).await;
    pipeline.assert_counted_once(500).await;
    pipeline.verify().await;
    processor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_concurrent_inits_of_a_new_keyspace_both_succeed() {
    let pipeline = Pipeline::new("two_inits").await;
    tokio::join!(pipeline.init(), pipeline.init());
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    processor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_of_a_newer_version_are_refused_and_not_changed() {
    let pipeline = Pipeline::initialised("newer").await;
    let update = format!(
        "UPDATE {}.schema_versions SET version = 99, made_by = 'stream-processor 9.9.9' \
         WHERE component = 'tables' IF EXISTS",
        pipeline.keyspace
    );
    pipeline.session.query_unpaged(update, ()).await.unwrap();
    let expected = ["have version 99, made by stream-processor 9.9.9", "run that version"];
    for (program, arguments) in
        [("stream-processor", "init"), ("stream-processor", "run"), ("ingest-producer", "run")]
    {
        pipeline.assert_exits(program, arguments, REFUSED, &expected).await;
    }
    let query = format!("SELECT version FROM {}.schema_versions", pipeline.keyspace);
    let rows = pipeline.session.query_unpaged(query, ()).await.unwrap().into_rows_result().unwrap();
    assert_eq!(rows.single_row::<(i32,)>().unwrap().0, 99);
}

#[tokio::test(flavor = "multi_thread")]
async fn init_refuses_wrong_topic_settings_replication_and_datacenter_with_a_remedy() {
    let pipeline = Pipeline::initialised("wrong_settings").await;
    let command = |topic: &str, values: &str| {
        format!("--alter --entity-type topics --entity-name {topic} --add-config {values}")
    };
    pipeline.configure(&pipeline.topic, &[("cleanup.policy", "compact"), ("retention.ms", "1000")]).await;
    let remedy = command(&pipeline.topic, "cleanup.policy=delete,retention.ms=604800000");
    let expected =
        ["cleanup.policy is compact, must be delete", "retention.ms is 1000, must be 604800000", &remedy];
    pipeline.assert_exits("stream-processor", "init", REFUSED, &expected).await;
    pipeline.assert_exits("stream-processor", "run", REFUSED, &expected[..1]).await;
    pipeline.configure(&pipeline.topic, &[]).await;

    let dead_letters = format!("{}.dlq", pipeline.topic);
    pipeline.configure(&dead_letters, &[("retention.ms", "1000")]).await;
    let expected = [format!("topic `{dead_letters}`: retention.ms is 1000, must be 2592000000")];
    pipeline.assert_exits("stream-processor", "init", REFUSED, &[&expected[0]]).await;
    pipeline.configure(&dead_letters, &[("retention.ms", "2592000000")]).await;
    pipeline.init().await;

    let three = [("PIPELINE_REPLICATION", "3".to_owned())];
    let output = pipeline.run("stream-processor", &["init"], &three).await;
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(REFUSED), "{stderr}");
    for part in ["has 1 replicas, must have 3", "min.insync.replicas is 1, must be 2", "ALTER KEYSPACE"] {
        assert!(stderr.contains(part), "`{part}` is not in {stderr}");
    }

    let nowhere = [("PIPELINE_CASSANDRA_DATACENTER", "nowhere".to_owned())];
    let output = pipeline.run("stream-processor", &["init"], &nowhere).await;
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(REFUSED), "{stderr}");
    assert!(
        stderr.contains("PIPELINE_CASSANDRA_DATACENTER=nowhere: the cassandra cluster has datacenter1"),
        "{stderr}"
    );
    let here = [("PIPELINE_CASSANDRA_DATACENTER", "datacenter1".to_owned())];
    let mut processor = pipeline.processor_with("one", &here);
    processor.ready().await;
    processor.stop().await;
}

impl Pipeline {
    /// Waits until `events` events are processed.
    async fn wait_for_events(&self, events: i64) {
        wait_until("all events are processed", LONG_TIMEOUT, || async {
            self.progress().await.events == events
        })
        .await;
    }

    /// Waits until this processor has all partitions.
    async fn wait_for_partitions(&self, processor: &Service) {
        wait_until("the processor has all partitions", TIMEOUT, || async {
            processor.metric("processor_partitions").await == Some(6.0)
        })
        .await;
    }

    /// Asserts that the program exits with this code and that its stderr contains all `expected` texts.
    async fn assert_exits(&self, program: &str, argument: &str, code: i32, expected: &[&str]) {
        let settings = [("PIPELINE_INSTANCE", "ends"), ("PIPELINE_HTTP_LISTEN", "127.0.0.1:0")];
        let settings = settings.map(|(name, value)| (name, value.to_owned()));
        let arguments = [argument];
        let output = tokio::select! {
            output = self.run(program, &arguments, &settings) => output,
            () = tokio::time::sleep(TIMEOUT) => panic!("{program} {argument} does not exit"),
        };
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{program} {argument}: {stderr}");
        for part in expected {
            assert!(stderr.contains(part), "{program} {argument} does not print `{part}`: {stderr}");
        }
    }

    /// Number of rows without and with a phone.
    async fn phones(&self) -> (usize, usize) {
        let query = format!("SELECT phone FROM {}.{}", self.keyspace, self.definition.stream.name);
        let rows = self.session.query_unpaged(query, ()).await.unwrap().into_rows_result().unwrap();
        let (with, without): (Vec<_>, Vec<_>) =
            rows.rows::<(Option<String>,)>().unwrap().partition(|row| row.as_ref().unwrap().0.is_some());
        (without.len(), with.len())
    }

    /// Default TTL of a table in seconds.
    async fn ttl_of(&self, table: &str) -> i32 {
        let query = "SELECT default_time_to_live FROM system_schema.tables WHERE keyspace_name = ? AND table_name = ?";
        let rows = self.session.query_unpaged(query, (&self.keyspace, table)).await.unwrap();
        rows.into_rows_result().unwrap().single_row::<(i32,)>().unwrap().0
    }

    /// Creates this keyspace with the tables of version 1 and copies the rows of the keyspace `from` into it.
    async fn create_version_1_keyspace(&self, from: &str) {
        let cql = |text: String| async move { self.session.query_unpaged(text, ()).await.unwrap() };
        let replication = "{'class': 'NetworkTopologyStrategy', 'replication_factor': 1}";
        cql(format!("CREATE KEYSPACE {} WITH replication = {replication}", self.keyspace)).await;
        for table in TABLES_V1.lines() {
            cql(table.replace("EXISTS pipeline.", &format!("EXISTS {}.", self.keyspace))).await;
        }
        // Columns that version 1 did not have.
        let added = ["revised", "skipped", "first_offset", "last_offset", "written_to"];
        for (table, timestamp) in [
            ("user_created", None),
            ("user_created_panes", Some("upto")),
            ("partition_progress", Some("next_offset")),
        ] {
            let rows = cql(format!("SELECT JSON * FROM {from}.{table}")).await.into_rows_result().unwrap();
            for row in rows.rows::<(String,)>().unwrap() {
                let mut row: Value = serde_json::from_str(&row.unwrap().0).unwrap();
                row.as_object_mut()
                    .unwrap()
                    .retain(|name, value| !value.is_null() && !added.contains(&&**name));
                let timestamp = timestamp
                    .map_or(String::new(), |timestamp| format!(" USING TIMESTAMP {}", row[timestamp]));
                let insert = format!("INSERT INTO {}.{table} JSON ? DEFAULT UNSET{timestamp}", self.keyspace);
                self.session.query_unpaged(insert, (row.to_string(),)).await.unwrap();
            }
        }
        let copied = cql(format!("SELECT cluster_id FROM {from}.streams")).await.into_rows_result().unwrap();
        let cluster_id = copied.single_row::<(String,)>().unwrap().0;
        let insert = format!(
            "INSERT INTO {}.streams (stream, layout, cluster_id, partitions, partitioner, created_at) \
             VALUES ('user_created', ?, ?, 6, 'murmur2_random', toTimestamp(now())) IF NOT EXISTS",
            self.keyspace
        );
        self.session.query_unpaged(insert, (LAYOUT_V1.trim_end(), cluster_id)).await.unwrap();
    }

    /// Applies `changes` to a topic's settings. The settings that `init` sets keep their values unless `changes`
    /// overrides them. All others return to the broker's defaults.
    pub async fn configure(&self, topic: &str, changes: &[(&str, &str)]) {
        let timestamps = if topic == self.topic { "LogAppendTime" } else { "CreateTime" };
        let mut settings = vec![
            ("cleanup.policy", "delete"),
            ("retention.ms", "604800000"),
            ("segment.ms", "86400000"),
            ("max.message.bytes", "4194304"),
            ("message.timestamp.type", timestamps),
        ];
        for (name, value) in changes {
            settings.retain(|(known, _)| known != name);
            settings.push((name, value));
        }
        let resource = AlterConfig::new(ResourceSpecifier::Topic(topic));
        let resource = settings.iter().fold(resource, |resource, (name, value)| resource.set(name, value));
        let options = AdminOptions::new().request_timeout(Some(Duration::from_secs(20)));
        let altered = self.admin().alter_configs(&[resource], &options).await.unwrap();
        altered.into_iter().for_each(|topic| assert!(topic.is_ok(), "{topic:?}"));
    }
}
