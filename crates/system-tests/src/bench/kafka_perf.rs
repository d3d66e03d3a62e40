//! Runs `kafka-producer-perf-test` on the same broker. Its payloads are sampled from the records that the producer has
//! just sent: each payload contains the key, headers and value of one record.

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use common::runtime::kafka::client_config;
use local_stack::config::{Settings, loopback};
use local_stack::error::{Error, Result};
use local_stack::install::Installed;
use local_stack::process::{Process, Spec};
use local_stack::servers::kafka;
use local_stack::terminal::Terminal;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::message::{Headers, Message};

use crate::kafka::TopicReader;

/// Topic of the test, deleted afterwards.
const TOPIC: &str = "bench_perf";
/// Number of different payloads, the same as the number of different values of the producer.
const SAMPLE: usize = 2048;
/// Time limit for the test to send all messages.
const RUN_TIMEOUT: Duration = Duration::from_secs(1800);
/// Heap of `kafka-producer-perf-test`. Its send buffer alone takes 256 MiB.
const HEAP_MIB: u32 = 768;
const ADMIN_TIMEOUT: Duration = Duration::from_secs(30);

/// Results of the test.
#[derive(Debug, Clone, Copy)]
pub(super) struct PerfResult {
    /// Mean size of a record in bytes: key, headers and value.
    pub(super) record_bytes: u64,
    /// Records per second, with all records acknowledged.
    pub(super) records_per_second: f64,
}

/// Sends `messages` records with payloads sampled from the topic `like`, to a topic with the same number of partitions.
pub(super) async fn run(
    private: &Settings,
    installed: &Installed,
    like: &str,
    messages: u64,
    terminal: Terminal,
) -> Result<PerfResult> {
    let since = Instant::now();
    let reader = TopicReader::new(private, like)?;
    let sampling = tokio::task::spawn_blocking(move || Ok((reader.partitions()?, sample(&reader)?)));
    let (partitions, payloads) = sampling.await.map_err(|error| Error::Refused(error.to_string()))??;
    let record_bytes = payloads.iter().map(Vec::len).sum::<usize>() / payloads.len().max(1);
    let file = private.folders.root.join("perf-payloads");
    fs::write(&file, payloads.join(&b"\n"[..])).map_err(Error::io(&file))?;
    create_topic(private, partitions).await?;
    let spec = perf_test(private, installed, messages, &file);
    Process::spawn(&spec, &private.folders)?.finished(RUN_TIMEOUT).await?;
    let log = private.folders.logs().join(format!("{}.log", spec.name));
    let text = fs::read_to_string(&log).map_err(Error::io(&log))?;
    let records_per_second = records_per_second(&text).ok_or_else(|| Error::Tool {
        tool: spec.name,
        cause: "its output contains no rate".to_owned(),
        hint: format!("see its output in {}", log.display()),
    })?;
    admin(private)?.delete_topics(&[TOPIC], &options()).await.map_err(failed)?;
    let what = format!("{messages} records of {record_bytes} bytes, {records_per_second:.0} per second");
    terminal.done("kafka perf test", &what, since.elapsed());
    Ok(PerfResult { record_bytes: record_bytes as u64, records_per_second })
}

/// `kafka-producer-perf-test` with the producer settings of the pipeline. It sends as fast as it can, waits for all
/// acknowledgements, and exits.
fn perf_test(settings: &Settings, installed: &Installed, records: u64, payloads: &Path) -> Spec {
    let mut arguments = kafka::jvm(settings, installed, HEAP_MIB);
    let options = format!(
        "org.apache.kafka.tools.ProducerPerformance --topic {TOPIC} --num-records {records} --throughput -1 --producer-props \
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

/// Returns the key, headers and value of the first records, joined to one payload per record without line breaks.
fn sample(reader: &TopicReader) -> Result<Vec<Vec<u8>>> {
    let mut payloads = Vec::new();
    reader.read(0, |message| {
        if payloads.len() == SAMPLE {
            return;
        }
        let mut payload = message.key().unwrap_or_default().to_vec();
        for header in message.headers().iter().flat_map(|headers| headers.iter()) {
            payload.extend_from_slice(header.key.as_bytes());
            payload.extend_from_slice(header.value.unwrap_or_default());
        }
        payload.extend_from_slice(message.payload().unwrap_or_default());
        payload.iter_mut().filter(|byte| **byte == b'\n').for_each(|byte| *byte = b' ');
        payloads.push(payload);
    })?;
    Ok(payloads)
}

fn admin(private: &Settings) -> Result<AdminClient<DefaultClientContext>> {
    client_config(&loopback(private.ports.kafka), "system-tests").create().map_err(failed)
}

fn options() -> AdminOptions {
    AdminOptions::new().operation_timeout(Some(ADMIN_TIMEOUT))
}

async fn create_topic(private: &Settings, partitions: i32) -> Result<()> {
    let topic = NewTopic::new(TOPIC, partitions, TopicReplication::Fixed(1))
        .set("compression.type", "producer")
        .set("message.timestamp.type", "LogAppendTime");
    admin(private)?.create_topics([&topic], &options()).await.map_err(failed)?;
    Ok(())
}

fn failed(error: rdkafka::error::KafkaError) -> Error {
    Error::Tool {
        tool: "kafka".to_owned(),
        cause: error.to_string(),
        hint: "see its log in the folder that is kept".to_owned(),
    }
}

/// Parses the rate from the closing line: the number before `records/sec`.
fn records_per_second(text: &str) -> Option<f64> {
    let line = text.lines().rfind(|line| line.contains("records/sec"))?;
    line.split(" records/sec").next()?.split_whitespace().last()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_parsed_from_the_closing_line() {
        let text = "499 records sent, 99.8 records/sec (0.01 MB/sec), 2.2 ms avg latency, 210.0 ms max latency.\n\
                    1000 records sent, 123456.7 records/sec (58.87 MB/sec), 1.5 ms avg latency, 9.0 ms max latency, 1 ms 50th.\n";
        assert_eq!(records_per_second(text), Some(123_456.7));
        assert_eq!(records_per_second("no figure"), None);
    }
}
