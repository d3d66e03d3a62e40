//! Invalid input, changed stream layouts and lost history. Each is refused or dead-lettered with an error that names
//! the cause.

use std::fs;

use rdkafka::admin::{AdminClient, AdminOptions};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::message::Message;
use rdkafka::{Offset, TopicPartitionList};

use crate::harness::{LONG_TIMEOUT, Pipeline, TIMEOUT, free_port, text, wait_until};
use crate::oracle::header;

#[tokio::test(flavor = "multi_thread")]
async fn undecodable_records_are_dead_lettered_unchanged_and_all_others_are_processed() {
    const GARBAGE: [(&[u8], &[u8]); 3] =
        [(b"a", b"\xff\xfe\x00 not json"), (b"b", b"{\"age\": \"no headers\"}"), (b"c", b"")];
    let pipeline = Pipeline::initialised("garbage").await;
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    pipeline.stress(1_000).await;
    pipeline.send_raw(GARBAGE.to_vec()).await;
    pipeline.stress(1_000).await;
    wait_until("everything is processed", LONG_TIMEOUT, || async {
        pipeline.progress().await.next_offsets == 2_003
    })
    .await;
    let progress = pipeline.progress().await;
    assert_eq!((progress.events, progress.dead_letters), (2_000, 3));
    pipeline.assert_counted_once(2_000).await;

    let dead = pipeline.records(&format!("{}.dlq", pipeline.topic)).await;
    let mut seen: Vec<_> =
        dead.iter().map(|record| (record.key().unwrap(), record.payload().unwrap_or(b""))).collect();
    seen.sort_unstable();
    assert_eq!(seen, GARBAGE);
    for record in &dead {
        assert_eq!(header(record, "__connect.errors.topic").as_ref(), Some(&pipeline.topic));
        for name in ["__connect.errors.partition", "__connect.errors.offset"] {
            assert!(header(record, name).is_some_and(|number| number.parse::<i64>().is_ok()), "{name}");
        }
        assert!(
            header(record, "__connect.errors.exception.message").is_some_and(|message| !message.is_empty())
        );
    }
    processor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_key_in_the_stream_file_is_named_in_the_error() {
    let pipeline =
        Pipeline::with_stream("unknown_key", |text| text.replace("shards = 4", "shrads = 4")).await;
    for (program, arguments) in [
        ("stream-processor", &["init"][..]),
        ("stream-processor", &["run"]),
        ("ingest-producer", &["run"]),
        ("metrics-dashboard", &[]),
    ] {
        let output =
            pipeline.run(program, arguments, &[("PIPELINE_HTTP_LISTEN", "127.0.0.1:0".to_owned())]).await;
        let stderr = text(&output.stderr);
        assert!(!output.status.success() && stderr.contains("shrads"), "{program} {arguments:?}: {stderr}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreachable_kafka_is_named_in_the_start_error() {
    let pipeline = Pipeline::new("no_kafka").await;
    let nowhere = format!("127.0.0.1:{}", free_port());
    let settings = [("PIPELINE_KAFKA_BROKERS", nowhere.clone()), ("PIPELINE_START_SECONDS", "3".to_owned())];
    let mut processor = pipeline.processor_with("one", &settings);
    let in_force = || async { processor.log_text().contains("settings in force") };
    wait_until("the processor logs its settings", TIMEOUT, in_force).await;
    assert!(!processor.is_ready().await);
    assert_eq!(processor.end().await.code(), Some(1));
    let log = processor.log_text();
    assert!(log.contains(&format!("kafka at {nowhere} does not answer")), "{log}");
    assert!(log.contains("is PIPELINE_KAFKA_BROKERS right?"), "{log}");
}

/// Exit code of a service that refuses to run.
const REFUSED: i32 = 3;

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_layout_another_cluster_and_a_lost_volume_are_refused_with_a_remedy() {
    const REMEDY: &str = "or give the changed stream a new name";
    let mut pipeline = Pipeline::initialised("other_shape").await;
    pipeline.process(200).await;
    let volume = pipeline.folder.join("checkpoints");
    let aside = pipeline.folder.join("checkpoints-aside");
    let (four, eight) = ("shards = 4", "shards = 8");
    let (ten, five) = ("step = 10\ncount = 10", "step = 5\ncount = 20");
    for (old, new, values) in [
        (four, eight, ["registered as 4", "now 8"]),
        (ten, five, ["from:0.0,step:10.0,count:10", "from:0.0,step:5.0,count:20"]),
    ] {
        pipeline.edit_stream(|text| text.replace(old, new));
        let [registered, declared] = values;
        pipeline
            .assert_refused(&["run"], &["registered with another layout", registered, declared, REMEDY])
            .await;
        pipeline.assert_refused(&["init"], &[registered, declared, REMEDY]).await;
        fs::rename(&volume, &aside).unwrap();
        fs::create_dir(&volume).unwrap();
        pipeline.assert_refused(&["run"], &[registered, declared, REMEDY]).await;
        fs::remove_dir_all(&volume).unwrap();
        fs::rename(&aside, &volume).unwrap();
        pipeline.edit_stream(|text| text.replace(new, old));
    }

    let cluster = pipeline.cluster_id().await;
    pipeline.set_cluster_id("another-cluster").await;
    pipeline.assert_refused(&["run"], &["another-cluster", &cluster, "or give the stream a new name"]).await;
    pipeline.set_cluster_id(&cluster).await;

    fs::rename(&volume, &aside).unwrap();
    fs::create_dir(&volume).unwrap();
    let expected = [
        "no state file at or after offset",
        "progress row",
        "--recover auto",
        "restore the checkpoint volume",
    ];
    pipeline.assert_refused(&["run", "--recover", "refuse"], &expected).await;
    fs::remove_dir_all(&volume).unwrap();
    fs::rename(&aside, &volume).unwrap();

    pipeline.assert_counted_once(200).await;
    pipeline.process(400).await;
    pipeline.assert_counted_once(400).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_with_lost_or_changed_records_is_refused_and_nothing_is_written() {
    let pipeline = Pipeline::initialised("lost_log").await;
    pipeline.process(300).await;
    let (progress, next_offsets) = (pipeline.progress().await, pipeline.next_offsets().await);
    let next = next_offsets[&0];

    // Remove unprocessed records, as retention would.
    pipeline.stress(300).await;
    pipeline.remove_below(0, next + 5).await;
    let offsets = [format!("the next offset is {next}"), format!("the log starts at {}", next + 5)];
    let remedy = "restore the records, or accept the gap by giving the stream a new name";
    pipeline.assert_refused(&["run"], &["partition 0", &offsets[0], &offsets[1], remedy]).await;

    let remedy = "restore the topic, or give the stream a new name";
    pipeline.recreate_topic().await;
    pipeline.stress(30).await;
    let expected = ["was reached, but the log ends at", "truncated or created again", remedy];
    pipeline.assert_refused(&["run"], &expected).await;

    // The new log is as long as the old one, so only the records differ. Later it is longer, and the state files are
    // lost.
    pipeline.recreate_topic().await;
    for (partition, next) in &next_offsets {
        let values = (0..*next).map(|number| format!("other {number}")).collect();
        pipeline.send_to_partition(*partition, &[], values).await;
    }
    let remedy = "restore the original topic, or give the stream a new name";
    let expected =
        ["not the one that was processed", "fingerprint", "expected", "deleted and created again", remedy];
    pipeline.assert_refused(&["run"], &expected).await;
    pipeline.stress(300).await;
    pipeline.assert_refused(&["run"], &expected).await;
    pipeline.assert_refused(&["run", "--replay"], &expected).await;
    pipeline.lose_checkpoints();
    pipeline.assert_refused(&["run"], &expected).await;

    assert_eq!((pipeline.progress().await, pipeline.rows().await), (progress, 300));
    assert_eq!(pipeline.panes().await, pipeline.panes_of_rows().await);
}

impl Pipeline {
    /// Sends events until there are `events` in total, processes them, and stops the processor.
    async fn process(&self, events: i64) {
        let mut processor = self.processor("one");
        processor.ready().await;
        let processed = self.progress().await.events;
        self.stress(u64::try_from(events - processed).unwrap()).await;
        wait_until("all events are processed", LONG_TIMEOUT, || async {
            self.progress().await.events == events
        })
        .await;
        processor.stop().await;
    }

    /// Asserts that `stream-processor` refuses to run and that its stderr contains all `expected` texts.
    async fn assert_refused(&self, arguments: &[&str], expected: &[&str]) {
        let settings = [("PIPELINE_INSTANCE", "one"), ("PIPELINE_HTTP_LISTEN", "127.0.0.1:0")];
        let settings = settings.map(|(name, value)| (name, value.to_owned()));
        let ended = tokio::select! {
            output = self.run("stream-processor", arguments, &settings) => Some(output),
            () = tokio::time::sleep(TIMEOUT) => None,
        };
        let output = ended.unwrap_or_else(|| panic!("{arguments:?} is not refused but still runs"));
        // The log quotes JSON values.
        let stderr = text(&output.stderr).replace(['"', '\\'], "");
        assert_eq!(output.status.code(), Some(REFUSED), "{arguments:?}: {stderr}");
        for part in expected {
            assert!(stderr.contains(part), "{arguments:?} does not print `{part}`: {stderr}");
        }
    }

    /// Id of the Kafka cluster that the stream is registered with.
    async fn cluster_id(&self) -> String {
        let query = format!("SELECT cluster_id FROM {}.streams", self.keyspace);
        let rows = self.session.query_unpaged(query, ()).await.unwrap().into_rows_result().unwrap();
        rows.single_row::<(String,)>().unwrap().0
    }

    async fn set_cluster_id(&self, cluster: &str) {
        // A lightweight transaction wrote the row, so later writes to it must be lightweight transactions too.
        let update =
            format!("UPDATE {}.streams SET cluster_id = ? WHERE stream = ? IF EXISTS", self.keyspace);
        self.session.query_unpaged(update, (cluster, &self.definition.stream.name)).await.unwrap();
    }

    /// Deletes the records of `partition` of the events topic below `offset`, as retention would.
    pub async fn remove_below(&self, partition: i32, offset: i64) {
        let mut list = TopicPartitionList::new();
        list.add_partition_offset(&self.topic, partition, Offset::Offset(offset)).unwrap();
        let removed = self.admin().delete_records(&list, &AdminOptions::new()).await.unwrap();
        removed.elements().iter().for_each(|partition| partition.error().unwrap());
    }

    /// Deletes the events topic and creates it again, empty.
    async fn recreate_topic(&self) {
        let deleted = self.admin().delete_topics(&[&self.topic], &AdminOptions::new()).await.unwrap();
        deleted.into_iter().for_each(|topic| assert!(topic.is_ok(), "{topic:?}"));
        wait_until("the topic is gone", TIMEOUT, || async { self.partitions(&self.topic).await == 0 }).await;
        self.init().await;
    }

    /// A Kafka admin client.
    pub fn admin(&self) -> AdminClient<DefaultClientContext> {
        ClientConfig::new().set("bootstrap.servers", &self.kafka).create().unwrap()
    }
}
