//! Unusual topics: partitions that are added later, transactions, damaged batches, and compression codecs.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::time::Duration;

use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::{Offset, TopicPartitionList};
use system_tests::kafka::add_partitions;
use system_tests::kafka::sender::{Events, Sender};

use crate::harness::{LONG_TIMEOUT, Pipeline, TIMEOUT, now_ms, text, wait_until};

const KAFKA_TIMEOUT: Duration = Duration::from_secs(20);
/// Number of partitions that a stream is registered with by default.
const PARTITIONS: i32 = 6;

#[tokio::test(flavor = "multi_thread")]
async fn partitions_added_later_are_reported_and_not_processed() {
    let pipeline = Pipeline::initialised("added").await;
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    pipeline.stress(300).await;
    wait_until("all events are processed", LONG_TIMEOUT, || async {
        pipeline.progress().await.events == 300
    })
    .await;
    add_partitions(&pipeline.kafka, &pipeline.topic, 12).await.unwrap();
    pipeline.send_events(PARTITIONS + 1, 0..5).await;
    pipeline.send_events(0, 5..8).await;
    // librdkafka detects new partitions within half a minute.
    wait_until("the processor is not ready", LONG_TIMEOUT, || async { !processor.is_ready().await }).await;
    wait_until("the added partitions are counted", TIMEOUT, || async {
        processor.metric("processor_unregistered_partitions").await == Some(6.0)
    })
    .await;
    wait_until("the registered partitions are processed", TIMEOUT, || async {
        pipeline.progress().await.events == 303
    })
    .await;
    let report = processor.json("/readyz").await.unwrap().to_string();
    for part in ["was registered with 6", "give the stream a new name"] {
        assert!(report.contains(part) && processor.log_text().contains(part), "`{part}` is not in {report}");
    }
    assert_eq!(pipeline.rows().await, 303);
    processor.stop().await;

    // Neither a restart nor `init` registers the added partitions.
    let processor = pipeline.processor("one");
    wait_until("the registered partitions run after the restart", TIMEOUT, || async {
        processor.metric("processor_partitions").await == Some(6.0)
    })
    .await;
    assert_eq!(pipeline.progress().await.next_offsets, 303);
    processor.stop().await;
    let output = pipeline.run("stream-processor", &["init"], &[]).await;
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{stderr}");
    assert!(
        stderr.contains("has 12 partitions, but stream `user_created` was registered with 6"),
        "{stderr}"
    );
    assert!(!stderr.contains("PIPELINE_PARTITIONS=12"), "{stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn transactions_at_the_end_of_a_partition_leave_no_lag() {
    let pipeline = Pipeline::initialised("transactions").await;
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    let sends: [(&str, bool, std::ops::Range<u32>); 4] =
        [("a", true, 0..40), ("b", false, 40..80), ("a", true, 80..90), ("b", false, 90..130)];
    for (id, commits, numbers) in sends {
        pipeline.transaction(id, commits, numbers).await;
    }
    // The consumer receives neither transaction markers nor aborted records.
    wait_until("no partition has lag", LONG_TIMEOUT, || async {
        pipeline.next_offsets().await == pipeline.ends(&pipeline.topic).await
    })
    .await;
    assert_eq!(pipeline.progress().await.events, 50);
    pipeline.assert_counted_once(50).await;
    processor.stop().await;
    assert_eq!(pipeline.group_offsets().await, pipeline.ends(&pipeline.topic).await);

    // The processor finds the last record in front of the markers, with the state files and without them.
    for lose in [false, true] {
        if lose {
            pipeline.lose_checkpoints();
        }
        let mut processor = pipeline.processor("one");
        processor.ready().await;
        let events = pipeline.progress().await.events;
        pipeline
            .transaction(
                "a",
                true,
                u32::try_from(events).unwrap() + 100..u32::try_from(events).unwrap() + 110,
            )
            .await;
        wait_until("the next events are counted", LONG_TIMEOUT, || async {
            pipeline.progress().await.events == events + 10
        })
        .await;
        processor.stop().await;
    }
    pipeline.verify().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_batch_halts_only_its_partition_until_an_operator_skips_it() {
    const DAMAGED: i32 = 3;
    let pipeline = Pipeline::initialised("damaged").await;
    pipeline.send_events(DAMAGED, 0..10).await;
    pipeline.send_events(DAMAGED, 10..20).await;
    pipeline.send_events(DAMAGED, 20..30).await;
    pipeline.send_events(1, 30..40).await;
    pipeline.damage(DAMAGED, 10);
    let processor = pipeline.processor("one");
    wait_until("the partition is halted", TIMEOUT, || async {
        processor.metric(&format!("processor_halted{{partition=\"{DAMAGED}\"}}")).await == Some(1.0)
    })
    .await;
    wait_until("all other records are processed", TIMEOUT, || async {
        pipeline.progress().await.events == 20
    })
    .await;
    pipeline.send_events(1, 40..50).await;
    wait_until("the other partitions are processed", TIMEOUT, || async {
        pipeline.progress().await.events == 30
    })
    .await;
    assert!(!processor.is_ready().await);
    let report = processor.json("/readyz").await.unwrap().to_string();
    let remedy = "stream-processor skip --partition 3 --from 10 --to 20";
    for part in ["partition 3 is halted at offset 10", "BadMessage", remedy] {
        assert!(report.contains(part) && processor.log_text().contains(part), "`{part}` is not in {report}");
    }

    let refused = ["skip", "--partition", "3", "--from", "9", "--to", "20"];
    let output = pipeline.run("stream-processor", &refused, &[]).await;
    assert!(text(&output.stderr).contains("below offset 10 is processed already"), "{output:?}");
    let skip = ["skip", "--partition", "3", "--from", "10", "--to", "20", "--reason", "damaged by a test"];
    let output = pipeline.run("stream-processor", &skip, &[]).await;
    assert!(output.status.success(), "{}", text(&output.stderr));
    wait_until("the partition continues", LONG_TIMEOUT, || async { pipeline.progress().await.events == 40 })
        .await;
    wait_until("the processor is ready again", TIMEOUT, || async { processor.is_ready().await }).await;
    assert_eq!(pipeline.skipped().await, BTreeMap::from([(DAMAGED, 10)]));
    let metric = format!("processor_committed_skipped_offsets_total{{partition=\"{DAMAGED}\"}}");
    assert_eq!(processor.metric(&metric).await, Some(10.0));
    pipeline.verify().await;
    processor.stop().await;

    // A replay reaches the same batch. It skips the batch again without counting the offsets twice.
    let replay = pipeline.processor_replaying("one");
    wait_until("the replay has caught up", LONG_TIMEOUT, || async {
        replay.metric(&format!("processor_next_offset{{partition=\"{DAMAGED}\"}}")).await == Some(30.0)
            && replay.is_ready().await
    })
    .await;
    replay.stop().await;
    assert_eq!(pipeline.progress().await.events, 40);
    assert_eq!(pipeline.skipped().await, BTreeMap::from([(DAMAGED, 10)]));
    assert_eq!(pipeline.rows().await, 40);
}

#[tokio::test(flavor = "multi_thread")]
async fn records_of_every_codec_are_processed() {
    let pipeline = Pipeline::initialised("codecs").await;
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    for (codec, sent) in ["gzip", "snappy", "lz4", "zstd", "uncompressed"].into_iter().zip(1..) {
        pipeline.configure(&pipeline.topic, &[("compression.type", codec)]).await;
        pipeline.stress(100).await;
        wait_until(codec, TIMEOUT, || async { pipeline.progress().await.events == 100 * sent }).await;
    }
    pipeline.verify().await;
}

/// Sends one event for each number in one batch.
fn send(sender: &Sender, partition: Option<i32>, numbers: std::ops::Range<u32>) {
    let ids: Vec<String> = numbers.map(|number| format!("event-{number}")).collect();
    let time = chrono::DateTime::from_timestamp_millis(now_ms()).unwrap().to_rfc3339();
    let value = format!(r#"{{"first_name":"Ada","last_name":"{}"}}"#, "L".repeat(50));
    sender.send(partition, Events { ids: &ids, time: &time, value: value.as_bytes() }).unwrap();
}

impl Pipeline {
    /// Sends one event for each number in one batch to one partition.
    async fn send_events(&self, partition: i32, numbers: std::ops::Range<u32>) {
        let (kafka, topic) = (self.kafka.clone(), self.topic.clone());
        let send = move || {
            let sender = Sender::new(&kafka, &topic).unwrap();
            send(&sender, Some(partition), numbers);
        };
        tokio::task::spawn_blocking(send).await.unwrap();
    }

    /// Sends one event for each number in a transaction, which commits or aborts.
    async fn transaction(&self, id: &str, commits: bool, numbers: std::ops::Range<u32>) {
        let (kafka, topic) = (self.kafka.clone(), self.topic.clone());
        let id = format!("{topic}.{id}");
        let send = move || {
            let sender = Sender::begin(&kafka, &topic, &id).unwrap();
            send(&sender, None, numbers);
            sender.end(commits).unwrap();
        };
        tokio::task::spawn_blocking(send).await.unwrap();
    }

    /// Inverts a byte in the batch that starts at `offset`, as a failing disk might.
    fn damage(&self, partition: i32, offset: i64) {
        let mut file = File::options().read(true).write(true).open(self.segment(partition)).unwrap();
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        let mut at = 0;
        loop {
            // A batch starts with its base offset and the length of the rest.
            let base = i64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
            let length = i32::from_be_bytes(bytes[at + 8..at + 12].try_into().unwrap());
            let length = usize::try_from(length).unwrap();
            if base == offset {
                let middle = at + 12 + length * 3 / 4;
                file.seek(SeekFrom::Start(middle as u64)).unwrap();
                file.write_all(&[!bytes[middle]]).unwrap();
                return;
            }
            at += 12 + length;
        }
    }

    /// The first log segment of a partition of the events topic in the broker's data folder.
    fn segment(&self, partition: i32) -> PathBuf {
        let name = format!("{}-{partition}", self.topic);
        let mut folders = vec![self.folder.ancestors().nth(2).unwrap().to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).into_iter().flatten().map(Result::unwrap) {
                let path = entry.path();
                if path.is_dir() && entry.file_name().to_str() == Some(name.as_str()) {
                    return path.join("00000000000000000000.log");
                }
                if path.is_dir() {
                    folders.push(path);
                }
            }
        }
        panic!("no log folder {name}");
    }

    /// Number of skipped offsets of each partition that has any.
    async fn skipped(&self) -> BTreeMap<i32, i64> {
        let query = format!("SELECT kafka_partition, skipped FROM {}.partition_progress", self.keyspace);
        let rows = self.session.query_unpaged(query, ()).await.unwrap().into_rows_result().unwrap();
        let rows = rows.rows::<(i32, i64)>().unwrap().map(Result::unwrap);
        rows.filter(|(_, skipped)| *skipped > 0).collect()
    }

    /// The committed offset of the consumer group in each partition. 0 if there is none.
    async fn group_offsets(&self) -> BTreeMap<i32, i64> {
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", &self.kafka)
            .set("group.id", &self.topic)
            .create()
            .unwrap();
        let topic = self.topic.clone();
        let offsets = tokio::task::spawn_blocking(move || {
            let mut list = TopicPartitionList::new();
            list.add_partition_range(&topic, 0, PARTITIONS - 1);
            let committed = consumer.committed_offsets(list, KAFKA_TIMEOUT).unwrap();
            let offset = |offset| match offset {
                Offset::Offset(offset) => offset,
                _ => 0,
            };
            committed.elements().iter().map(|of| (of.partition(), offset(of.offset()))).collect()
        });
        offsets.await.unwrap()
    }
}
