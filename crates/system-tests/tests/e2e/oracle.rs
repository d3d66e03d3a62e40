//! The actual state of Kafka and Cassandra, read without the pipeline's own code: event rows, panes, progress rows and
//! topics. Nothing here depends on how the processor works.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use futures::TryStreamExt;
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{Header, Headers, Message, OwnedHeaders, OwnedMessage};
use rdkafka::producer::{BaseRecord, DefaultProducerContext, Producer, ThreadedProducer};
use rdkafka::{Offset, TopicPartitionList};

use crate::harness::Pipeline;

const KAFKA_TIMEOUT: Duration = Duration::from_secs(20);

/// The columns of `partition_progress`, summed over all Kafka partitions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TotalProgress {
    pub next_offsets: i64,
    pub events: i64,
    pub duplicates: i64,
    pub revised: i64,
    pub dead_letters: i64,
}

impl Pipeline {
    /// Number of rows in the event table. One query for each Cassandra partition.
    pub async fn rows(&self) -> i64 {
        let table = format!("{}.{}", self.keyspace, self.definition.stream.name);
        let partitions =
            self.session.query_unpaged(format!("SELECT DISTINCT bucket, shard FROM {table}"), ()).await;
        let partitions = partitions.unwrap().into_rows_result().unwrap();
        let count = format!("SELECT COUNT(*) FROM {table} WHERE bucket = ? AND shard = ?");
        let count = self.session.prepare(count).await.unwrap();
        let mut rows = 0;
        for partition in partitions.rows::<(scylla::value::CqlTimestamp, i32)>().unwrap() {
            let counted = self.session.execute_unpaged(&count, partition.unwrap()).await.unwrap();
            rows += counted.into_rows_result().unwrap().single_row::<(i64,)>().unwrap().0;
        }
        rows
    }

    /// Event counts of the stored panes by pane start in Unix milliseconds, summed over the Kafka partitions.
    pub async fn panes(&self) -> BTreeMap<i64, i64> {
        let table = format!("{}.{}_panes", self.keyspace, self.definition.stream.name);
        let query = format!("SELECT pane_start, dimension, count FROM {table}");
        let pager = self.session.query_iter(query, ()).await.unwrap();
        let mut rows = pager.rows_stream::<(scylla::value::CqlTimestamp, String, i64)>().unwrap();
        let mut panes = BTreeMap::new();
        while let Some((start, dimension, count)) = rows.try_next().await.unwrap() {
            if dimension.is_empty() {
                *panes.entry(start.0).or_default() += count;
            }
        }
        panes
    }

    /// Event counts computed from the event rows, by pane start in Unix milliseconds.
    pub async fn panes_of_rows(&self) -> BTreeMap<i64, i64> {
        let table = format!("{}.{}", self.keyspace, self.definition.stream.name);
        let pager = self.session.query_iter(format!("SELECT event_time FROM {table}"), ()).await.unwrap();
        let mut rows = pager.rows_stream::<(scylla::value::CqlTimestamp,)>().unwrap();
        let mut panes = BTreeMap::new();
        while let Some((time,)) = rows.try_next().await.unwrap() {
            let pane = self.definition.windows.pane_ms;
            *panes.entry(time.0.div_euclid(pane) * pane).or_default() += 1;
        }
        panes
    }

    /// The summed progress of all Kafka partitions.
    pub async fn progress(&self) -> TotalProgress {
        let query = format!(
            "SELECT next_offset, events, duplicates, revised, dead_letters FROM {}.partition_progress",
            self.keyspace
        );
        let rows = self.session.query_unpaged(query, ()).await.unwrap().into_rows_result().unwrap();
        let mut sum = TotalProgress::default();
        for row in rows.rows::<(i64, Option<i64>, Option<i64>, Option<i64>, Option<i64>)>().unwrap() {
            let (next_offset, events, duplicates, revised, dead_letters) = row.unwrap();
            sum.next_offsets += next_offset;
            sum.events += events.unwrap_or(0);
            sum.duplicates += duplicates.unwrap_or(0);
            sum.revised += revised.unwrap_or(0);
            sum.dead_letters += dead_letters.unwrap_or(0);
        }
        sum
    }

    /// Asserts that rows, panes and progress agree after the processor has read the whole log of `events` distinct
    /// events.
    pub async fn assert_counted_once(&self, events: i64) {
        assert_eq!(self.rows().await, events, "rows of {}", self.keyspace);
        assert_eq!(self.panes().await, self.panes_of_rows().await, "panes and rows of {}", self.keyspace);
        let progress = self.progress().await;
        assert_eq!(progress.events, events, "{progress:?}");
        assert_eq!(progress.next_offsets, self.log_end(&self.topic).await, "{progress:?}");
    }

    /// The sum of the end offsets of a topic's partitions.
    pub async fn log_end(&self, topic: &str) -> i64 {
        self.ends(topic).await.values().sum()
    }

    /// The end offset of each partition of a topic.
    pub async fn ends(&self, topic: &str) -> BTreeMap<i32, i64> {
        let consumer = self.consumer();
        let topic = topic.to_owned();
        // A broker that has just restarted may not be the leader of its partitions yet.
        let end = |consumer: &BaseConsumer, topic: &str, partition| {
            let deadline = Instant::now() + KAFKA_TIMEOUT;
            loop {
                match consumer.fetch_watermarks(topic, partition, KAFKA_TIMEOUT) {
                    Ok((_, end)) => break end,
                    Err(error) => assert!(Instant::now() < deadline, "{error}"),
                }
            }
        };
        let ends = tokio::task::spawn_blocking(move || {
            (0..partitions(&consumer, &topic)).map(|p| (p, end(&consumer, &topic, p))).collect()
        });
        ends.await.unwrap()
    }

    /// The next offset of each Kafka partition according to the progress rows.
    pub async fn next_offsets(&self) -> BTreeMap<i32, i64> {
        let query = format!("SELECT kafka_partition, next_offset FROM {}.partition_progress", self.keyspace);
        let rows = self.session.query_unpaged(query, ()).await.unwrap().into_rows_result().unwrap();
        rows.rows::<(i32, i64)>().unwrap().map(Result::unwrap).collect()
    }

    /// Number of partitions of a topic. 0 if the topic does not exist.
    pub async fn partitions(&self, topic: &str) -> i32 {
        let consumer = self.consumer();
        let topic = topic.to_owned();
        tokio::task::spawn_blocking(move || partitions(&consumer, &topic)).await.unwrap()
    }

    /// All records of a topic that has one partition.
    pub async fn records(&self, topic: &str) -> Vec<OwnedMessage> {
        let consumer = self.consumer();
        let topic = topic.to_owned();
        tokio::task::spawn_blocking(move || read(&consumer, &topic, 0)).await.unwrap()
    }

    /// All records of a topic, partition by partition.
    pub async fn all_records(&self, topic: &str) -> Vec<OwnedMessage> {
        let consumer = self.consumer();
        let topic = topic.to_owned();
        let all = tokio::task::spawn_blocking(move || {
            (0..partitions(&consumer, &topic)).flat_map(|p| read(&consumer, &topic, p)).collect()
        });
        all.await.unwrap()
    }

    /// Number of distinct event ids in the events topic.
    pub async fn ids_in_the_log(&self) -> i64 {
        let records = self.all_records(&self.topic).await;
        let ids: BTreeSet<String> = records.iter().filter_map(|record| header(record, "ce_id")).collect();
        i64::try_from(ids.len()).unwrap()
    }

    /// Sends pairs of key and value to the events topic, without headers.
    pub async fn send_raw(&self, records: Vec<(&'static [u8], &'static [u8])>) {
        let producer: ThreadedProducer<DefaultProducerContext> =
            ClientConfig::new().set("bootstrap.servers", &self.kafka).create().unwrap();
        let topic = self.topic.clone();
        let sent = tokio::task::spawn_blocking(move || {
            for (key, value) in records {
                producer
                    .send(BaseRecord::to(&topic).key(key).payload(value))
                    .map_err(|(error, _)| error)
                    .unwrap();
            }
            producer.flush(KAFKA_TIMEOUT).unwrap();
        });
        sent.await.unwrap();
    }

    /// Sends one record without key and headers to `topic`.
    pub async fn send_to(&self, topic: &str, value: String) {
        let producer: ThreadedProducer<DefaultProducerContext> =
            ClientConfig::new().set("bootstrap.servers", &self.kafka).create().unwrap();
        let topic = topic.to_owned();
        let sent = tokio::task::spawn_blocking(move || {
            producer
                .send(BaseRecord::<(), String>::to(&topic).payload(&value))
                .map_err(|(error, _)| error)
                .unwrap();
            producer.flush(KAFKA_TIMEOUT).unwrap();
        });
        sent.await.unwrap();
    }

    /// Sends values to one partition of the events topic in order. All records have the same key and headers.
    pub async fn send_to_partition(&self, partition: i32, headers: &[(&str, &str)], values: Vec<String>) {
        let producer: ThreadedProducer<DefaultProducerContext> =
            ClientConfig::new().set("bootstrap.servers", &self.kafka).create().unwrap();
        let topic = self.topic.clone();
        let headers = headers.iter().fold(OwnedHeaders::new(), |headers, (key, value)| {
            headers.insert(Header { key, value: Some(*value) })
        });
        let sent = tokio::task::spawn_blocking(move || {
            for value in values {
                let record = BaseRecord::to(&topic).partition(partition).headers(headers.clone());
                producer.send(record.key("key").payload(&value)).map_err(|(error, _)| error).unwrap();
            }
            producer.flush(KAFKA_TIMEOUT).unwrap();
        });
        sent.await.unwrap();
    }

    /// Sends one record without a key to one partition of the events topic.
    pub async fn send_keyless(&self, partition: i32, headers: &[(&str, &str)], value: &str) {
        let producer: ThreadedProducer<DefaultProducerContext> =
            ClientConfig::new().set("bootstrap.servers", &self.kafka).create().unwrap();
        let headers = headers.iter().fold(OwnedHeaders::new(), |headers, (key, value)| {
            headers.insert(Header { key, value: Some(*value) })
        });
        let (topic, value) = (self.topic.clone(), value.to_owned());
        let sent = tokio::task::spawn_blocking(move || {
            let record = BaseRecord::<(), String>::to(&topic).partition(partition).headers(headers);
            producer.send(record.payload(&value)).map_err(|(error, _)| error).unwrap();
            producer.flush(KAFKA_TIMEOUT).unwrap();
        });
        sent.await.unwrap();
    }

    fn consumer(&self) -> BaseConsumer {
        ClientConfig::new()
            .set("bootstrap.servers", &self.kafka)
            .set("group.id", format!("{}.oracle", self.topic))
            .set("enable.auto.commit", "false")
            .create()
            .unwrap()
    }
}

/// All records of a partition up to its current high watermark.
fn read(consumer: &BaseConsumer, topic: &str, partition: i32) -> Vec<OwnedMessage> {
    let (low, high) = consumer.fetch_watermarks(topic, partition, KAFKA_TIMEOUT).unwrap();
    let mut assignment = TopicPartitionList::new();
    assignment.add_partition_offset(topic, partition, Offset::Offset(low)).unwrap();
    consumer.assign(&assignment).unwrap();
    let mut records: Vec<OwnedMessage> = Vec::new();
    while records.last().map_or(low, |last| last.offset() + 1) < high {
        let record = consumer.poll(KAFKA_TIMEOUT).expect("a record below the high watermark").unwrap();
        // Records that were fetched for an earlier assignment may still arrive.
        if record.partition() == partition {
            records.push(record.detach());
        }
    }
    records
}

fn partitions(consumer: &BaseConsumer, topic: &str) -> i32 {
    let metadata = consumer.fetch_metadata(Some(topic), KAFKA_TIMEOUT).unwrap();
    let found = metadata.topics().iter().find(|found| found.name() == topic && found.error().is_none());
    found.map_or(0, |found| i32::try_from(found.partitions().len()).unwrap())
}

/// The value of a record's header. `None` if the header is missing or has no value.
pub fn header(record: &OwnedMessage, name: &str) -> Option<String> {
    let header = record.headers()?.iter().find(|header| header.key == name)?;
    header.value.map(|value| String::from_utf8_lossy(value).into_owned())
}
