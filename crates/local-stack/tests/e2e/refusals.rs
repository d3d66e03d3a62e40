//! Bad input, another shape and lost history: each is refused or set aside with a word that names it.

use std::fs;

use rdkafka::admin::{AdminClient, AdminOptions};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::message::Message;
use rdkafka::{Offset, TopicPartitionList};

use crate::harness::{PATIENT, Pipeline, SOON, free_port, text, wait_until};
use crate::oracle::header;

#[tokio::test(flavor = "multi_thread")]
async fn garbage_is_dead_lettered_unchanged_and_everything_else_goes_on() {
    const GARBAGE: [(&[u8], &[u8]); 3] =
        [(b"a", b"\xff\xfe\x00 not json"), (b"b", b"{\"age\": \"no headers\"}"), (b"c", b"")];
    let pipeline = Pipeline::initialised("garbage").await;
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    pipeline.stress(1_000).await;
    pipeline.send_raw(GARBAGE.to_vec()).await;
    pipeline.stress(1_000).await;
    wait_until("everything is processed", PATIENT, || async {
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
async fn an_unknown_key_in_the_stream_file_is_refused_by_its_name() {
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
        let words = text(&output.stderr);
        assert!(!output.status.success() && words.contains("shrads"), "{program} {arguments:?}: {words}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreachable_kafka_is_named_at_start() {
    let pipeline = Pipeline::new("no_kafka").await;
    let nowhere = format!("127.0.0.1:{}", free_port());
    let settings = [("PIPELINE_KAFKA_BROKERS", nowhere.clone()), ("PIPELINE_START_SECONDS", "3".to_owned())];
    let mut processor = pipeline.processor_with("one", &settings);
    let in_force = || async { processor.words().contains("settings in force") };
    wait_until("the log says the settings in force", SOON, in_force).await;
    assert!(!processor.is_ready().await);
    assert_eq!(processor.end().await.code(), Some(1));
    let words = processor.words();
    assert!(words.contains(&format!("kafka at {nowhere} does not answer")), "{words}");
    assert!(words.contains("is PIPELINE_KAFKA_BROKERS right?"), "{words}");
}

/// The exit code of a refusal.
const REFUSED: i32 = 3;

#[tokio::test(flavor = "multi_thread")]
async fn another_shape_cluster_or_a_lost_volume_is_refused_with_both_sides_and_the_ways_on() {
    const WAYS_ON: &str = "or give the changed stream a new name";
    let mut pipeline = Pipeline::initialised("other_shape").await;
    pipeline.process(200).await;
    let volume = pipeline.folder.join("checkpoints");
    let aside = pipeline.folder.join("checkpoints-aside");
    let (four, eight) = ("shards = 4", "shards = 8");
    let (ten, five) = ("step = 10\ncount = 10", "step = 5\ncount = 20");
    for (old, new, sides) in [
        (four, eight, ["registered as 4", "now 8"]),
        (ten, five, ["from:0.0,step:10.0,count:10", "from:0.0,step:5.0,count:20"]),
    ] {
        pipeline.edit_stream(|text| text.replace(old, new));
        let [was, is] = sides;
        pipeline.assert_refused(&["run"], &["registered with another layout", was, is, WAYS_ON]).await;
        pipeline.assert_refused(&["init"], &[was, is, WAYS_ON]).await;
        fs::rename(&volume, &aside).unwrap();
        fs::create_dir(&volume).unwrap();
        pipeline.assert_refused(&["run"], &[was, is, WAYS_ON]).await;
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
    let words = ["no state file at or after offset", "progress row", "--recover auto", "volume back"];
    pipeline.assert_refused(&["run", "--recover", "refuse"], &words).await;
    fs::remove_dir_all(&volume).unwrap();
    fs::rename(&aside, &volume).unwrap();

    pipeline.assert_counted_once(200).await;
    pipeline.process(400).await;
    pipeline.assert_counted_once(400).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_lost_or_changed_its_records_is_refused_and_nothing_is_written() {
    let pipeline = Pipeline::initialised("lost_log").await;
    pipeline.process(300).await;
    let (progress, next_offsets) = (pipeline.progress().await, pipeline.next_offsets().await);
    let next = next_offsets[&0];

    // Records that nobody has read are removed, as retention would.
    pipeline.stress(300).await;
    pipeline.remove_below(0, next + 5).await;
    let sides = [format!("offset {next} comes next"), format!("the log begins at {}", next + 5)];
    let ways_on = "bring the records back, or accept the gap by giving the stream a new name";
    pipeline.assert_refused(&["run"], &["partition 0", &sides[0], &sides[1], ways_on]).await;

    let ways_on = "bring the topic back, or give the stream a new name";
    pipeline.recreate_topic().await;
    pipeline.stress(30).await;
    let words = ["was reached, but the log ends at", "shrank or was created again", ways_on];
    pipeline.assert_refused(&["run"], &words).await;

    // As long as before, so that only the records themselves tell; then longer, and without the state files.
    pipeline.recreate_topic().await;
    for (partition, next) in &next_offsets {
        let values = (0..*next).map(|number| format!("other {number}")).collect();
        pipeline.send_to_partition(*partition, &[], values).await;
    }
    let way_on = "bring the old topic back, or give the stream a new name";
    let words =
        ["not the one that was processed", "fingerprint", "expected", "deleted and created again", way_on];
    pipeline.assert_refused(&["run"], &words).await;
    pipeline.stress(300).await;
    pipeline.assert_refused(&["run"], &words).await;
    pipeline.assert_refused(&["run", "--replay"], &words).await;
    pipeline.lose_checkpoints();
    pipeline.assert_refused(&["run"], &words).await;

    assert_eq!((pipeline.progress().await, pipeline.rows().await), (progress, 300));
    assert_eq!(pipeline.panes().await, pipeline.panes_of_rows().await);
}

impl Pipeline {
    /// Sends events until there are `events`, has them processed, and stops the processor.
    async fn process(&self, events: i64) {
        let mut processor = self.processor("one");
        processor.ready().await;
        let there = self.progress().await.events;
        self.stress(u64::try_from(events - there).unwrap()).await;
        wait_until("all is processed", PATIENT, || async { self.progress().await.events == events }).await;
        processor.stop().await;
    }

    /// `stream-processor …` must end by itself with the exit code of a refusal, and say all these words.
    async fn assert_refused(&self, arguments: &[&str], words: &[&str]) {
        let settings = [("PIPELINE_INSTANCE", "one"), ("PIPELINE_HTTP_LISTEN", "127.0.0.1:0")];
        let settings = settings.map(|(name, value)| (name, value.to_owned()));
        let ended = tokio::select! {
            output = self.run("stream-processor", arguments, &settings) => Some(output),
            () = tokio::time::sleep(SOON) => None,
        };
        let output = ended.unwrap_or_else(|| panic!("{arguments:?} is not refused: it goes on"));
        // Values are JSON, quoted by the log.
        let said = text(&output.stderr).replace(['"', '\\'], "");
        assert_eq!(output.status.code(), Some(REFUSED), "{arguments:?}: {said}");
        for words in words {
            assert!(said.contains(words), "{arguments:?} does not say `{words}`: {said}");
        }
    }

    /// The cluster the stream is registered with.
    async fn cluster_id(&self) -> String {
        let query = format!("SELECT cluster_id FROM {}.streams", self.keyspace);
        let rows = self.session.query_unpaged(query, ()).await.unwrap().into_rows_result().unwrap();
        rows.single_row::<(String,)>().unwrap().0
    }

    async fn set_cluster_id(&self, cluster: &str) {
        // The row was written by a lightweight transaction: so must be what follows.
        let update =
            format!("UPDATE {}.streams SET cluster_id = ? WHERE stream = ? IF EXISTS", self.keyspace);
        self.session.query_unpaged(update, (cluster, &self.definition.stream.name)).await.unwrap();
    }

    /// Removes the events topic's records of `partition` below `offset`, as retention would.
    pub async fn remove_below(&self, partition: i32, offset: i64) {
        let mut list = TopicPartitionList::new();
        list.add_partition_offset(&self.topic, partition, Offset::Offset(offset)).unwrap();
        let removed = self.admin().delete_records(&list, &AdminOptions::new()).await.unwrap();
        removed.elements().iter().for_each(|partition| partition.error().unwrap());
    }

    /// The events topic is deleted and created again, empty.
    async fn recreate_topic(&self) {
        let deleted = self.admin().delete_topics(&[&self.topic], &AdminOptions::new()).await.unwrap();
        deleted.into_iter().for_each(|topic| assert!(topic.is_ok(), "{topic:?}"));
        wait_until("the topic is gone", SOON, || async { self.partitions(&self.topic).await == 0 }).await;
        self.init().await;
    }

    pub fn admin(&self) -> AdminClient<DefaultClientContext> {
        ClientConfig::new().set("bootstrap.servers", &self.kafka).create().unwrap()
    }
}
