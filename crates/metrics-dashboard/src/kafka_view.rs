//! What Kafka says about the events topic: end offsets, leaders and copies, and the time stamp of the first record that
//! waits. Blocking; the feed calls it from a thread of its own. It joins no group and commits nothing.

use crate::error::Error;
use crate::lag::{self, Watermarks};
use crate::overview::{Figure, KafkaFacts, PartitionFacts};
use crate::reason::{Reason, Source};
use common::kafka::{KafkaError, Replaced, client_config};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::metadata::MetadataPartition;
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Longest wait for the answer to one question.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);
/// Longest wait for the ends of all partitions together: after that their facts would be old.
const ENDS_LIMIT: Duration = Duration::from_secs(3);
/// Longest wait for the first waiting records of all partitions together.
const RECORDS_LIMIT: Duration = Duration::from_millis(800);
/// How long one poll waits; it returns as soon as a record is there.
const POLL: Duration = Duration::from_millis(50);
/// Bytes asked for to see one record. A broker gives a batch larger than that to only one partition of an answer, so less
/// would make the others wait in turn.
const FETCH_BYTES: &str = "262144";
/// Most KiB of records that wait unread in the client.
const QUEUED_KIB: &str = "4096";
/// A partition that has one record waiting pauses this long; the default of 1 s would outlive the assignment.
const QUEUE_BACKOFF_MS: &str = "5";

/// Asks Kafka about one topic.
pub struct KafkaView {
    consumer: Replaced<BaseConsumer>,
    brokers: String,
    topic: String,
    /// Time stamp of the record at an offset, by partition: a position that stands still costs nothing.
    known: BTreeMap<i32, (i64, i64)>,
}

fn consumer(brokers: &str, topic: &str) -> ClientConfig {
    let mut config = client_config(brokers, "metrics-dashboard");
    config
        // The client insists on a group's name to read by assignment; it never joins one.
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
    /// Makes the client; nothing is sent yet.
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

    /// Reads everything once. `next_offsets`: where the processor stands, by partition; `None` where that is not known,
    /// then no record is read.
    pub fn read(&mut self, next_offsets: Option<&BTreeMap<i32, i64>>) -> Result<KafkaFacts, Error> {
        let unreachable = |cause: rdkafka::error::KafkaError| KafkaError::Unreachable {
            brokers: self.brokers.clone(),
            cause: cause.to_string(),
        };
        let consumer = self.consumer.get()?;
        let metadata = consumer.fetch_metadata(Some(&self.topic), ANSWER_LIMIT);
        let metadata = metadata.inspect_err(|e| self.consumer.doubt(e)).map_err(unreachable)?;
        let topic = metadata.topics().iter().find(|t| t.name() == self.topic && t.error().is_none());
        let described = topic.map(|t| t.partitions()).unwrap_or_default();
        if described.is_empty() {
            return Err(KafkaError::NoTopic { topic: self.topic.clone() }.into());
        }
        let until = Instant::now() + ENDS_LIMIT;
        let mut partitions: BTreeMap<i32, PartitionFacts> =
            described.iter().map(|p| (p.id(), self.partition(&consumer, p, until))).collect();
        if let Some(next_offsets) = next_offsets {
            self.add_record_times(&consumer, &mut partitions, next_offsets);
        }
        Ok(KafkaFacts { partitions })
    }

    fn partition(
        &self,
        consumer: &BaseConsumer,
        described: &MetadataPartition,
        until: Instant,
    ) -> PartitionFacts {
        let id = described.id();
        let leader = Some(described.leader()).filter(|leader| *leader >= 0);
        let log = match leader {
            _ if Instant::now() >= until => Err(Reason::new(
                Source::Kafka,
                format!(
                    "partition {id} of `{}` was not asked for its end: kafka answers too slowly",
                    self.topic
                ),
            )),
            None => Err(Reason::new(
                Source::Kafka,
                format!("partition {id} of `{}` has no leader: is its broker down?", self.topic),
            )),
            Some(_) => consumer
                .fetch_watermarks(&self.topic, id, ANSWER_LIMIT)
                .map(|(low, high)| Watermarks { low, high })
                .map_err(|e| {
                    let message = format!("kafka does not say where partition {id} of `{}` ends", self.topic);
                    Reason::new(Source::Kafka, message).with_detail(e.to_string())
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
        let mut wanted = BTreeMap::new();
        for (id, partition) in partitions.iter() {
            let next = next_offsets.get(id).copied().unwrap_or(0);
            if let Some(first) = partition.log.as_ref().ok().and_then(|log| lag::first_waiting(*log, next)) {
                wanted.insert(*id, first);
            }
        }
        let times = self.record_times(consumer, &wanted);
        for (id, offset) in wanted {
            if let (Some(partition), Some(time)) = (partitions.get_mut(&id), times.get(&id)) {
                partition.record_time = Some((offset, time.clone()));
            }
        }
    }

    /// The time stamps of the records at the `wanted` offsets, by partition.
    fn record_times(
        &mut self,
        consumer: &BaseConsumer,
        wanted: &BTreeMap<i32, i64>,
    ) -> BTreeMap<i32, Figure<i64>> {
        self.known.retain(|id, (offset, _)| wanted.get(id) == Some(offset));
        let missing: BTreeMap<i32, i64> =
            wanted.iter().filter(|(id, _)| !self.known.contains_key(id)).map(|(id, o)| (*id, *o)).collect();
        let trouble = if missing.is_empty() { None } else { self.fetch_times(consumer, &missing).err() };
        let time = |id: &i32, offset: &i64| {
            let known = self.known.get(id).map(|(_, time)| *time);
            known.ok_or_else(|| Reason {
                source: Source::Kafka,
                message: format!(
                    "the record at offset {offset} of partition {id} was not read within {} ms",
                    RECORDS_LIMIT.as_millis()
                ),
                detail: trouble.as_ref().map(ToString::to_string),
            })
        };
        wanted.iter().map(|(id, offset)| (*id, time(id, offset))).collect()
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
        let until = Instant::now() + RECORDS_LIMIT;
        let mut trouble = None;
        while missing.keys().any(|id| !self.known.contains_key(id)) && Instant::now() < until {
            match consumer.poll(POLL) {
                None => {}
                Some(Err(e)) => trouble = Some(e),
                Some(Ok(record)) => {
                    let (id, time) = (record.partition(), record.timestamp().to_millis());
                    let wanted = missing.get(&id).filter(|wanted| record.offset() >= **wanted);
                    if let (Some(wanted), Some(time)) = (wanted, time) {
                        self.known.entry(id).or_insert((*wanted, time));
                    }
                }
            }
        }
        consumer.unassign()?;
        trouble.map_or(Ok(()), Err)
    }
}
