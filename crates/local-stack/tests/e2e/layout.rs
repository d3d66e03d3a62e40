//! Streams that change, keyspaces of earlier versions, and servers that are not set up as they must be.

use std::time::Duration;

use rdkafka::admin::{AdminOptions, AlterConfig, ResourceSpecifier};
use serde_json::Value;

use crate::harness::{PATIENT, Pipeline, SOON, Service, text, wait_until};

/// The tables of the first version, as it made them, and a layout as it wrote it.
const TABLES_1: &str = include_str!("../../../common/tests/golden/tables_1.cql");
const LAYOUT_1: &str = include_str!("../../../common/tests/golden/layout_1_user_created.json");
const PHONE: &str = "\n[[column]]\nname = \"phone\"\ntype = \"text\"\npointer = \"/phone\"\n";
const REFUSED: i32 = 3;

#[tokio::test(flavor = "multi_thread")]
async fn a_column_is_appended_to_a_stream_with_data() {
    let mut pipeline = Pipeline::initialised("appended").await;
    let mut running = pipeline.processor("one");
    running.ready().await;
    pipeline.stress(300).await;
    pipeline.has_processed(300).await;
    let (panes, progress) = (pipeline.panes().await, pipeline.progress().await);
    let old_file = pipeline.stream_text();

    pipeline.edit_stream(|text| text + PHONE);
    for (program, arguments) in [("stream-processor", "run"), ("ingest-producer", "stress")] {
        let words = ["column `phone`: new, text", "run `stream-processor init`"];
        pipeline.assert_ends(program, arguments, 1, &words).await;
    }
    pipeline.init().await;
    assert_eq!(running.end().await.code(), Some(1), "{}", running.words());
    assert!(running.words().contains("was registered again, with changes"), "{}", running.words());
    assert_eq!((pipeline.panes().await, pipeline.progress().await), (panes, progress));

    let mut processor = pipeline.processor("one");
    processor.ready().await;
    pipeline.wait_for_partitions(&processor).await;
    let resumed = processor.words().matches(r#""how":"resume""#).count();
    assert_eq!(resumed, 6, "state files of the old layout are used: {}", processor.words());
    assert_eq!(pipeline.phones().await, (300, 0), "old rows lack it");
    pipeline.stress(200).await;
    pipeline.has_processed(500).await;
    assert_eq!(pipeline.phones().await, (300, 200), "new rows have it");
    pipeline.assert_counted_once(500).await;
    pipeline.verify().await;
    processor.stop().await;
    let check = pipeline.run("stream-processor", &["checkpoint", "check"], &[]).await;
    assert!(check.status.success(), "{}{}", text(&check.stdout), text(&check.stderr));

    pipeline.set_stream_text(&old_file);
    let gone = ["column `phone`: registered, but no longer declared", "give the changed stream a new name"];
    for (program, arguments) in
        [("stream-processor", "run"), ("stream-processor", "init"), ("ingest-producer", "run")]
    {
        pipeline.assert_ends(program, arguments, REFUSED, &gone).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lateness_and_a_longer_ttl_are_registered_and_a_shorter_one_is_refused() {
    let mut pipeline = Pipeline::initialised("ttl").await;
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    pipeline.stress(200).await;
    pipeline.has_processed(200).await;
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
    pipeline.has_processed(300).await;
    pipeline.assert_counted_once(300).await;
    processor.stop().await;
    pipeline.edit_stream(|text| text.replace("730d", "365d"));
    pipeline.assert_ends("stream-processor", "init", REFUSED, &["`store.ttl`", "raised, not lowered"]).await;
    assert_eq!(pipeline.ttl_of("user_created").await, 730 * 86_400);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_keyspace_of_the_first_version_is_brought_forward_by_two_inits_at_once_and_goes_on() {
    let mut pipeline = Pipeline::initialised("forward").await;
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    pipeline.stress(300).await;
    pipeline.has_processed(300).await;
    processor.stop().await;
    let made_now = pipeline.keyspace.clone();
    pipeline.keyspace = format!("{made_now}_old");
    pipeline.make_first_version(&made_now).await;
    pipeline.lose_checkpoints();

    let words = ["have version 1, this program needs 2", "run its `stream-processor init` first"];
    pipeline.assert_ends("stream-processor", "run", 1, &words).await;
    tokio::join!(pipeline.init(), pipeline.init());
    pipeline.init().await;
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    pipeline.stress(200).await;
    pipeline.has_processed(500).await;
    pipeline.assert_counted_once(500).await;
    pipeline.verify().await;
    processor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_inits_of_a_new_keyspace_at_once_both_succeed() {
    let pipeline = Pipeline::new("two_inits").await;
    tokio::join!(pipeline.init(), pipeline.init());
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    processor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_of_a_newer_version_are_refused_and_left_as_they_are() {
    let pipeline = Pipeline::initialised("newer").await;
    let update = format!(
        "UPDATE {}.schema_versions SET version = 99, made_by = 'stream-processor 9.9.9' \
         WHERE component = 'tables' IF EXISTS",
        pipeline.keyspace
    );
    pipeline.session.query_unpaged(update, ()).await.unwrap();
    let words = ["have version 99, made by stream-processor 9.9.9", "run that version"];
    for (program, arguments) in
        [("stream-processor", "init"), ("stream-processor", "run"), ("ingest-producer", "run")]
    {
        pipeline.assert_ends(program, arguments, REFUSED, &words).await;
    }
    let query = format!("SELECT version FROM {}.schema_versions", pipeline.keyspace);
    let rows = pipeline.session.query_unpaged(query, ()).await.unwrap().into_rows_result().unwrap();
    assert_eq!(rows.single_row::<(i32,)>().unwrap().0, 99);
}

#[tokio::test(flavor = "multi_thread")]
async fn topics_replication_and_datacenter_that_are_not_as_they_must_be_are_told_with_the_way_to_put_them_right()
 {
    let pipeline = Pipeline::initialised("topics_told").await;
    let command = |topic: &str, values: &str| {
        format!("--alter --entity-type topics --entity-name {topic} --add-config {values}")
    };
    pipeline.configure(&pipeline.topic, &[("cleanup.policy", "compact"), ("retention.ms", "1000")]).await;
    let put_right = command(&pipeline.topic, "cleanup.policy=delete,retention.ms=604800000");
    let words =
        ["cleanup.policy is compact, must be delete", "retention.ms is 1000, must be 604800000", &put_right];
    pipeline.assert_ends("stream-processor", "init", REFUSED, &words).await;
    pipeline.assert_ends("stream-processor", "run", REFUSED, &words[..1]).await;
    pipeline.configure(&pipeline.topic, &[]).await;

    let dead_letters = format!("{}.dlq", pipeline.topic);
    pipeline.configure(&dead_letters, &[("retention.ms", "1000")]).await;
    let words = [format!("topic `{dead_letters}`: retention.ms is 1000, must be 2592000000")];
    pipeline.assert_ends("stream-processor", "init", REFUSED, &[&words[0]]).await;
    pipeline.configure(&dead_letters, &[("retention.ms", "2592000000")]).await;
    pipeline.init().await;

    let three = [("PIPELINE_REPLICATION", "3".to_owned())];
    let output = pipeline.run("stream-processor", &["init"], &three).await;
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(REFUSED), "{said}");
    for words in ["has 1 replicas, must have 3", "min.insync.replicas is 1, must be 2", "ALTER KEYSPACE"] {
        assert!(said.contains(words), "`{words}` is not in {said}");
    }

    let nowhere = [("PIPELINE_CASSANDRA_DATACENTER", "nowhere".to_owned())];
    let output = pipeline.run("stream-processor", &["init"], &nowhere).await;
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(REFUSED), "{said}");
    assert!(
        said.contains("PIPELINE_CASSANDRA_DATACENTER=nowhere: the cassandra cluster has datacenter1"),
        "{said}"
    );
    let here = [("PIPELINE_CASSANDRA_DATACENTER", "datacenter1".to_owned())];
    let mut processor = pipeline.processor_with("one", &here);
    processor.ready().await;
    processor.stop().await;
}

impl Pipeline {
    async fn has_processed(&self, events: i64) {
        wait_until("all is processed", PATIENT, || async { self.progress().await.events == events }).await;
    }

    async fn wait_for_partitions(&self, processor: &Service) {
        wait_until("all partitions are here", SOON, || async {
            processor.metric("processor_partitions").await == Some(6.0)
        })
        .await;
    }

    /// The program must end by itself with this exit code, and say all these words.
    async fn assert_ends(&self, program: &str, argument: &str, code: i32, words: &[&str]) {
        let settings = [("PIPELINE_INSTANCE", "ends"), ("PIPELINE_HTTP_LISTEN", "127.0.0.1:0")];
        let settings = settings.map(|(name, value)| (name, value.to_owned()));
        let arguments = [argument];
        let output = tokio::select! {
            output = self.run(program, &arguments, &settings) => output,
            () = tokio::time::sleep(SOON) => panic!("{program} {argument} does not end"),
        };
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{program} {argument}: {said}");
        for words in words {
            assert!(said.contains(words), "{program} {argument} does not say `{words}`: {said}");
        }
    }

    /// Rows without and with a phone.
    async fn phones(&self) -> (usize, usize) {
        let query = format!("SELECT phone FROM {}.{}", self.keyspace, self.definition.stream.name);
        let rows = self.session.query_unpaged(query, ()).await.unwrap().into_rows_result().unwrap();
        let (with, without): (Vec<_>, Vec<_>) =
            rows.rows::<(Option<String>,)>().unwrap().partition(|row| row.as_ref().unwrap().0.is_some());
        (without.len(), with.len())
    }

    async fn ttl_of(&self, table: &str) -> i32 {
        let query = "SELECT default_time_to_live FROM system_schema.tables WHERE keyspace_name = ? AND table_name = ?";
        let rows = self.session.query_unpaged(query, (&self.keyspace, table)).await.unwrap();
        rows.into_rows_result().unwrap().single_row::<(i32,)>().unwrap().0
    }

    /// Makes this keyspace as the first version would have left it after processing what `from` holds.
    async fn make_first_version(&self, from: &str) {
        let cql = |text: String| async move { self.session.query_unpaged(text, ()).await.unwrap() };
        let replication = "{'class': 'NetworkTopologyStrategy', 'replication_factor': 1}";
        cql(format!("CREATE KEYSPACE {} WITH replication = {replication}", self.keyspace)).await;
        for table in TABLES_1.lines() {
            cql(table.replace("EXISTS pipeline.", &format!("EXISTS {}.", self.keyspace))).await;
        }
        let added = ["skipped", "first_offset", "last_offset", "written_to"];
        for (table, stamp) in [
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
                let stamp = stamp.map_or(String::new(), |stamp| format!(" USING TIMESTAMP {}", row[stamp]));
                let insert = format!("INSERT INTO {}.{table} JSON ? DEFAULT UNSET{stamp}", self.keyspace);
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
        self.session.query_unpaged(insert, (LAYOUT_1.trim_end(), cluster_id)).await.unwrap();
    }

    /// Sets these of a topic's settings, leaves the events topic's time stamps as they are, and the rest at the broker's defaults
    /// or as `init` sets it.
    pub async fn configure(&self, topic: &str, changes: &[(&str, &str)]) {
        let stamps = if topic == self.topic { "LogAppendTime" } else { "CreateTime" };
        let mut settings = vec![
            ("cleanup.policy", "delete"),
            ("retention.ms", "604800000"),
            ("segment.ms", "86400000"),
            ("max.message.bytes", "4194304"),
            ("message.timestamp.type", stamps),
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
