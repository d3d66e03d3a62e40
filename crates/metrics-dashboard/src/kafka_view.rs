//! Reads the state of the events topic from Kafka: offsets, leaders, replicas, and the timestamp of the first
//! unprocessed record of each partition. Blocking, so the feed calls it on a blocking thread. It joins no consumer
//! group and commits no offsets.

use crate::error::Error;
use crate::lag::{self, Watermarks};
use crate::overview::{Figure, KafkaFacts, PartitionFacts};
use crate::reason::{Origin, Reason};
use common::runtime::kafka::{KafkaError, Replaced, client_config};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::metadata::MetadataPartition;
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Timeout of one request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);
/// Timeout of reading the offsets of all partitions. Later, the first results would already be stale.
const OFFSETS_TIMEOUT: Duration = Duration::from_secs(3);
/// Timeout of reading the first unprocessed records of all partitions.
const RECORDS_TIMEOUT: Duration = Duration::from_millis(800);
/// Longest wait of one poll, which returns as soon as a record arrives.
const POLL: Duration = Duration::from_millis(50);
/// Fetch size per partition to read one record. A broker returns a batch larger than this for only one partition of a
/// response, so a smaller size would make the other partitions wait for further responses.
const FETCH_BYTES: &str = "262144";
/// Most KiB of records in the queue of the client.
const QUEUED_KIB: &str = "4096";
/// How long a partition with a full queue waits before its next fetch. The default of 1 s is longer than an assignment
/// lasts.
const QUEUE_BACKOFF_MS: &str = "5";

/// A client that reads the state of one topic.
pub struct KafkaView {
    consumer: Replaced<BaseConsumer>,
    brokers: String,
    topic: String,
    /// Cached offset and timestamp by partition. A partition whose position does not move is not read again.
    known: BTreeMap<i32, (i64, i64)>,
}

fn consumer(brokers: &str, topic: &str) -> ClientConfig {
    let mut config = client_config(brokers, "metrics-dashboard");
    config
        // The client requires a group id to assign partitions. It never joins the group.
        .set("group.id", format!("metrics-dashboard.{topic}"))
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        .set("auto.offset.reset", "error")
        .set("isolation.level", "read_uncommitted")
        .set("queued.min.messages", "1")
        .set("queued.max.messages.kbytes", QUEUED_KIB)
        .set("fetch.queue.backoff.ms", QUEUE_BACKOFF_MS)
        .set("fetch.message.max.bytes", FETCH_BYTES)
        .set("fetch.wait.max.ms", "10");
    config
}

impl KafkaView {
    /// Creates the client. It does not connect yet.
    pub fn new(brokers: &str, topic: &str) -> Result<KafkaView, Error> {
        let config = consumer(brokers, topic);
        let build = move || config.create().map_err(|e| KafkaError::Client(e.to_string()));
        Ok(KafkaView {
            consumer: Replaced::new(build)?,
            brokers: brokers.to_owned(),
            topic: topic.to_owned(),
            known: BTreeMap::new(),
        })
    }

    /// Reads the state of all partitions. `next_offsets` are the positions of the processor by partition. If they are
    /// `None` because they are not known, no record timestamps are read.
    pub fn read(&mut self, next_offsets: Option<&BTreeMap<i32, i64>>) -> Result<KafkaFacts, Error> {
        let unreachable = |cause: rdkafka::error::KafkaError| KafkaError::Unreachable {
            brokers: self.brokers.clone(),
            cause: cause.to_string(),
        };
        let consumer = self.consumer.get()?;
        let metadata = consumer.fetch_metadata(Some(&self.topic), REQUEST_TIMEOUT);
        let metadata = metadata.inspect_err(|e| self.consumer.doubt(e)).map_err(unreachable)?;
        let topic = metadata.topics().iter().find(|t| t.name() == self.topic && t.error().is_none());
        let described = topic.map(|t| t.partitions()).unwrap_or_default();
        if described.is_empty() {
            return Err(KafkaError::NoTopic { topic: self.topic.clone() }.into());
        }
        let deadline = Instant::now() + OFFSETS_TIMEOUT;
        let mut partitions: BTreeMap<i32, PartitionFacts> =
            described.iter().map(|p| (p.id(), self.partition(&consumer, p, deadline))).collect();
        if let Some(next_offsets) = next_offsets {
            self.add_record_times(&consumer, &mut partitions, next_offsets);
        }
        Ok(KafkaFacts { partitions })
    }

    fn partition(
        &self,
        consumer: &BaseConsumer,
        described: &MetadataPartition,
        deadline: Instant,
    ) -> PartitionFacts {
        let id = described.id();
        let leader = Some(described.leader()).filter(|leader| *leader >= 0);
        let log = match leader {
            _ if Instant::now() >= deadline => Err(Reason::new(
                Origin::Kafka,
                format!(
                    "the offsets of partition {id} of `{}` were not read: kafka responds too slowly",
                    self.topic
                ),
            )),
            None => Err(Reason::new(
                Origin::Kafka,
                format!("partition {id} of `{}` has no leader: is its broker down?", self.topic),
            )),
            Some(_) => consumer
                .fetch_watermarks(&self.topic, id, REQUEST_TIMEOUT)
                .map(|(low, high)| Watermarks { low, high })
                .map_err(|e| {
                    let message = format!("cannot read the offsets of partition {id} of `{}`", self.topic);
                    Reason::new(Origin::Kafka, message).with_detail(e.to_string())
                }),
        };
        let (replicas, in_sync) = (described.replicas().len(), described.isr().len());
        PartitionFacts { log, leader, replicas, in_sync, record_time: None }
    }

    fn add_record_times(
        &mut self,
        consumer: &BaseConsumer,
        partitions: &mut BTreeMap<i32, PartitionFacts>,
        next_offsets: &BTreeMap<i32, i64>,
    ) {
        let mut offsets = BTreeMap::new();
        for (id, partition) in partitions.iter() {
            let next = next_offsets.get(id).copied().unwrap_or(0);
            if let Some(first) = partition.log.as_ref().ok().and_then(|log| lag::first_waiting(*log, next)) {
                offsets.insert(*id, first);
            }
        }
        let times = self.record_times(consumer, &offsets);
        for (id, offset) in offsets {
            if let (Some(partition), Some(time)) = (partitions.get_mut(&id), times.get(&id)) {
                partition.record_time = Some((offset, time.clone()));
            }
        }
    }

    /// The timestamps of the records at `offsets`, by partition.
    fn record_times(
        &mut self,
        consumer: &BaseConsumer,
        offsets: &BTreeMap<i32, i64>,
    ) -> BTreeMap<i32, Figure<i64>> {
        self.known.retain(|id, (offset, _)| offsets.get(id) == Some(offset));
        let missing: BTreeMap<i32, i64> =
            offsets.iter().filter(|(id, _)| !self.known.contains_key(id)).map(|(id, o)| (*id, *o)).collect();
        let error = if missing.is_empty() { None } else { self.fetch_times(consumer, &missing).err() };
        let time = |id: &i32, offset: &i64| {
            let known = self.known.get(id).map(|(_, time)| *time);
            known.ok_or_else(|| Reason {
                source: Origin::Kafka,
                message: format!(
                    "the record at offset {offset} of partition {id} was not read within {} ms",
                    RECORDS_TIMEOUT.as_millis()
                ),
                detail: error.as_ref().map(ToString::to_string),
            })
        };
        offsets.iter().map(|(id, offset)| (*id, time(id, offset))).collect()
    }

    fn fetch_times(
        &mut self,
        consumer: &BaseConsumer,
        missing: &BTreeMap<i32, i64>,
    ) -> Result<(), rdkafka::error::KafkaError> {
        let mut list = TopicPartitionList::new();
        for (id, offset) in missing {
            list.add_partition_offset(&self.topic, *id, Offset::Offset(*offset))?;
        }
        consumer.assign(&list)?;
        let deadline = Instant::now() + RECORDS_TIMEOUT;
        let mut last_error = None;
        while missing.keys().any(|id| !self.known.contains_key(id)) && Instant::now() < deadline {
            match consumer.poll(POLL) {
                None => {}
                Some(Err(e)) => last_error = Some(e),
                Some(Ok(record)) => {
                    let (id, time) = (record.partition(), record.timestamp().to_millis());
                    let offset = missing.get(&id).filter(|offset| record.offset() >= **offset);
                    if let (Some(offset), Some(time)) = (offset, time) {
                        self.known.entry(id).or_insert((*offset, time));
                    }
                }
            }
        }
        consumer.unassign()?;
        last_error.map_or(Ok(()), Err)
    }
}
