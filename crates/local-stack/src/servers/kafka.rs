//! One Kafka broker in the combined mode of KRaft: its configuration, the formatting of its data folder, and its
//! command line. Also reads and changes topics from outside the pipeline; `sender` writes to them.

pub mod sender;

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use rdkafka::admin::{AdminClient, AdminOptions, NewPartitions};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{BorrowedMessage, Message};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};

use super::write_config;
use crate::config::{Settings, loopback};
use crate::error::{Error, Result};
use crate::install::Installed;
use crate::process::Spec;

/// Time limit for one metadata request.
const METADATA_TIMEOUT: Duration = Duration::from_secs(2);

/// Time limit for one record below the high watermark, or for one request about a topic.
const RECORD_TIMEOUT: Duration = Duration::from_secs(10);

/// Heap of `kafka-producer-perf-test`. Its send buffer alone takes 256 MiB.
const PERF_HEAP_MIB: u32 = 768;

/// Length in bytes of a cluster id (`Uuid` in Kafka) before base64 encoding.
const CLUSTER_ID_BYTES: usize = 16;

/// Writes the configuration, and formats the data folder with a new cluster id if it is not formatted yet.
pub async fn format(settings: &Settings, installed: &Installed) -> Result<()> {
    write_properties(settings)?;
    if data(settings).join("meta.properties").is_file() {
        return Ok(());
    }
    let mut tool = tokio::process::Command::new(&settings.java);
    tool.args(jvm(settings, installed, 128)).arg("kafka.tools.StorageTool").args([
        "format",
        "-t",
        &new_cluster_id(),
        "-c",
    ]);
    tool.arg(properties(settings)).stdin(Stdio::null()).kill_on_drop(true);
    let output = tool.output().await.map_err(Error::io(&settings.java))?;
    if output.status.success() {
        return Ok(());
    }
    let output = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&output);
    Err(Error::Tool {
        tool: "kafka.tools.StorageTool".to_owned(),
        cause: text
            .lines()
            .rfind(|line| !line.trim().is_empty())
            .unwrap_or("it failed without output")
            .to_owned(),
        hint: "delete the data folder with ./run reset, then start again".to_owned(),
    })
}

/// Process specification of the broker.
pub fn spec(settings: &Settings, installed: &Installed) -> Result<Spec> {
    write_properties(settings)?;
    let mut arguments = jvm(settings, installed, settings.heaps.kafka_mib);
    let rules = settings.checkout.join("prometheus/jmx/kafka.yml");
    if rules.is_file() {
        let agent = installed.jmx_agent.display();
        let address = loopback(settings.ports.kafka_agent);
        arguments.push(format!("-javaagent:{agent}={address}:{}", rules.display()).into());
    }
    arguments.push("kafka.Kafka".into());
    arguments.push(properties(settings).into());
    Ok(Spec {
        name: "kafka".to_owned(),
        program: settings.java.clone(),
        arguments,
        environment: vec![("MALLOC_ARENA_MAX".to_owned(), "2".to_owned())],
        folder: settings.folders.logs(),
        address: loopback(settings.ports.kafka),
        grace: Duration::from_secs(30),
    })
}

/// `kafka-producer-perf-test` with the producer settings of the pipeline. It sends as fast as it can, waits for all
/// acknowledgements, and exits.
pub fn perf_test(
    settings: &Settings,
    installed: &Installed,
    topic: &str,
    records: u64,
    payloads: &Path,
) -> Spec {
    let mut arguments = jvm(settings, installed, PERF_HEAP_MIB);
    let options = format!(
        "org.apache.kafka.tools.ProducerPerformance --topic {topic} --num-records {records} --throughput -1 --producer-props \
         bootstrap.servers={} acks=all compression.type=lz4 linger.ms=10 batch.size=1000000 buffer.memory=268435456 \
         --payload-file",
        loopback(settings.ports.kafka)
    );
    arguments.extend(options.split_whitespace().map(OsString::from));
    arguments.push(payloads.into());
    Spec {
        name: "kafka-producer-perf-test".to_owned(),
        program: settings.java.clone(),
        arguments,
        environment: Vec::new(),
        folder: settings.folders.logs(),
        address: String::new(),
        grace: Duration::from_secs(5),
    }
}

/// Returns whether the metadata lists a broker.
pub async fn answers(address: &str) -> bool {
    let address = address.to_owned();
    let answered = tokio::task::spawn_blocking(move || {
        let consumer: BaseConsumer = ClientConfig::new().set("bootstrap.servers", address).create().ok()?;
        let metadata = consumer.fetch_metadata(None, METADATA_TIMEOUT).ok()?;
        (!metadata.brokers().is_empty()).then_some(())
    });
    matches!(answered.await, Ok(Some(())))
}

/// Reads a topic without joining a consumer group. All calls block.
#[derive(Clone)]
pub struct Reader {
    consumer: Arc<BaseConsumer>,
    topic: String,
}

impl Reader {
    /// Creates a reader of one topic.
    pub fn new(settings: &Settings, topic: &str) -> Result<Self> {
        let consumer = common::runtime::kafka::client_config(&loopback(settings.ports.kafka), "local-stack")
            .set("group.id", "local-stack")
            .set("enable.auto.commit", "false")
            .set("enable.partition.eof", "true")
            .create()
            .map_err(failed)?;
        Ok(Self { consumer: Arc::new(consumer), topic: topic.to_owned() })
    }

    /// Returns the number of partitions of the topic.
    pub fn partitions(&self) -> Result<i32> {
        let metadata = self.consumer.fetch_metadata(Some(&self.topic), RECORD_TIMEOUT).map_err(failed)?;
        Ok(metadata.topics().first().map_or(0, |topic| topic.partitions().len()) as i32)
    }

    /// Returns the end offset of a partition. Records of open transactions are not included.
    pub fn end(&self, partition: i32, timeout: Duration) -> Result<i64> {
        let watermarks = self.consumer.fetch_watermarks(&self.topic, partition, timeout);
        watermarks.map(|(_, high)| high).map_err(failed)
    }

    /// Returns the value of the first record of a partition.
    pub fn first_value(&self, partition: i32) -> Result<Vec<u8>> {
        let mut value = None;
        self.read_while(partition, |message| {
            value = message.payload().map(<[u8]>::to_vec);
            value.is_none()
        })?;
        value
            .ok_or_else(|| Error::Refused(format!("topic {}, partition {partition}: no records", self.topic)))
    }

    /// Passes every record of a partition to `handle`, up to the current end offset, which it returns. Aborted records
    /// and transaction markers occupy offsets but are not passed.
    pub fn read(&self, partition: i32, mut handle: impl FnMut(&BorrowedMessage<'_>)) -> Result<i64> {
        self.read_while(partition, |message| {
            handle(message);
            true
        })
    }

    /// Like [`Reader::read`], but stops when `handle` returns `false`.
    fn read_while(
        &self,
        partition: i32,
        mut handle: impl FnMut(&BorrowedMessage<'_>) -> bool,
    ) -> Result<i64> {
        let (consumer, topic) = (&self.consumer, &self.topic);
        let (low, high) = consumer.fetch_watermarks(topic, partition, RECORD_TIMEOUT).map_err(failed)?;
        let mut assignment = TopicPartitionList::new();
        assignment.add_partition_offset(topic, partition, Offset::Offset(low)).map_err(failed)?;
        consumer.assign(&assignment).map_err(failed)?;
        let mut next = low;
        while next < high {
            match consumer.poll(RECORD_TIMEOUT) {
                // Records that were fetched for an earlier assignment may still arrive.
                Some(Ok(message)) if message.partition() != partition => {}
                Some(Ok(message)) if handle(&message) => next = message.offset() + 1,
                Some(Ok(_)) => break,
                // The partition ends with transaction markers or aborted records.
                Some(Err(KafkaError::PartitionEOF(of))) if of == partition => break,
                Some(Err(KafkaError::PartitionEOF(_))) => {}
                Some(Err(error)) => return Err(failed(error)),
                None => {
                    let why =
                        format!("topic {topic}, partition {partition}: no record received at offset {next}");
                    return Err(Error::Refused(why));
                }
            }
        }
        Ok(high)
    }
}

/// Increases the number of partitions of a topic to `count`.
pub async fn add_partitions(brokers: &str, topic: &str, count: usize) -> Result<()> {
    let admin: AdminClient<DefaultClientContext> =
        common::runtime::kafka::client_config(brokers, "local-stack").create().map_err(failed)?;
    let more = NewPartitions::new(topic, count);
    let answers = admin.create_partitions([&more], &AdminOptions::new()).await.map_err(failed)?;
    for answer in answers {
        answer.map_err(|(topic, code)| {
            Error::Refused(format!("cannot increase topic {topic} to {count} partitions: {code}"))
        })?;
    }
    Ok(())
}

fn failed(error: KafkaError) -> Error {
    Error::Tool {
        tool: "kafka".to_owned(),
        cause: error.to_string(),
        hint: "see its log in the folder that is kept".to_owned(),
    }
}

fn jvm(settings: &Settings, installed: &Installed, heap_mib: u32) -> Vec<OsString> {
    let logging = settings.folders.config().join("kafka-log4j2.yaml");
    vec![
        format!("-Xmx{heap_mib}m").into(),
        format!("-Xms{}m", heap_mib.min(256)).into(),
        "-XX:+UseG1GC".into(),
        "-XX:MaxGCPauseMillis=20".into(),
        "-XX:+ExitOnOutOfMemoryError".into(),
        "-Djava.awt.headless=true".into(),
        format!("-Dlog4j2.configurationFile={}", logging.display()).into(),
        format!("-Dkafka.logs.dir={}", settings.folders.logs().display()).into(),
        "-cp".into(),
        installed.kafka.join("*").into(),
    ]
}

fn write_properties(settings: &Settings) -> Result<()> {
    let logging = settings.folders.config().join("kafka-log4j2.yaml");
    write_config(&logging, include_str!("../../resources/kafka-log4j2.yaml"), &[])?;
    fs::create_dir_all(data(settings)).map_err(Error::io(data(settings)))?;
    let values = [
        ("kafka", settings.ports.kafka.to_string()),
        ("controller_port", settings.ports.controller.to_string()),
        ("data", data(settings).display().to_string()),
    ];
    write_config(&properties(settings), include_str!("../../resources/kafka.properties"), &values)
}

fn properties(settings: &Settings) -> PathBuf {
    settings.folders.config().join("kafka.properties")
}

fn data(settings: &Settings) -> PathBuf {
    settings.folders.data().join("kafka")
}

/// Generates a random cluster id in URL-safe base64 without padding, like `kafka-storage random-uuid`.
fn new_cluster_id() -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let bits = uuid::Uuid::new_v4().as_u128();
    let digits = (CLUSTER_ID_BYTES * 8).div_ceil(6);
    // The first digit holds the highest six bits. The last one holds the lowest two, padded with zeros.
    let digit = |place: usize| {
        let shift = 122 - 6 * place as i32;
        let value = if shift >= 0 { bits >> shift } else { bits << -shift };
        char::from(ALPHABET[(value & 63) as usize])
    };
    let id: String = (0..digits).map(digit).collect();
    // The storage tool would parse a leading hyphen as an option.
    if id.starts_with('-') { new_cluster_id() } else { id }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_id_has_the_format_that_kafka_expects() {
        for _ in 0..200 {
            let id = new_cluster_id();
            assert_eq!(id.len(), 22);
            assert!(
                !id.starts_with('-')
                    && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
            );
            assert!("AQgw".contains(&id[21..]), "the last digit must hold two bits: {id}");
        }
    }
}
