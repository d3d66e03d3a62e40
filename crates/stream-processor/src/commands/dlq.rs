//! `dlq list | show | replay | accept`: operator commands for dead letters. The commands read the dead-letter topic up
//! to its end at the time of the call.

use crate::config::DlqCommand;
use crate::error::ProcessorError;
use crate::io::log_reader::LogReader;
use common::contracts::stream::Definition;
use common::contracts::topics::dead_letter_topic;
use common::runtime::cassandra::connect;
use common::runtime::config::CommonArgs;
use common::runtime::kafka::producer_config;
use common::runtime::shutdown::Shutdown;
use futures::future::try_join_all;
use rdkafka::Message;
use rdkafka::message::{Header, Headers, OwnedHeaders, OwnedMessage};
use rdkafka::producer::{FutureProducer, FutureRecord};
use scylla::value::CqlTimestamp;
use serde::Serialize;
use std::io::Write;
use std::time::Duration;

/// Maximum duration of one request to Kafka or Cassandra.
const DEADLINE: Duration = Duration::from_secs(20);
/// Prefix of the headers that describe why a record is a dead letter.
const ERROR_HEADERS: &str = "__connect.errors.";
/// Maximum number of dead letters in memory during a replay.
const REPLAY_PAGE: usize = 64;
/// Header that names the source of a replayed record: topic, partition and offset of the dead letter.
const REPLAYED_FROM: &str = "replayed_from";

/// One entry of `dlq list`.
#[derive(Debug, Serialize)]
struct Line {
    offset: i64,
    source_partition: String,
    source_offset: String,
    class: String,
    message: String,
}

fn failed(what: &str) -> impl Fn(&dyn std::fmt::Display) -> ProcessorError + '_ {
    move |cause| ProcessorError::Retryable(format!("{what}: {cause}"))
}

fn print_line(text: &str) -> Result<(), ProcessorError> {
    writeln!(std::io::stdout(), "{text}").map_err(|e| failed("stdout")(&e))
}

/// Runs one `dlq` command.
pub async fn run(
    common: &CommonArgs,
    definition: &Definition,
    command: &DlqCommand,
    shutdown: &Shutdown,
) -> Result<(), ProcessorError> {
    let topic = common.topic_of(definition);
    match command {
        DlqCommand::List { limit, json } => list(common, &topic, *limit as usize, *json),
        DlqCommand::Show { offset } => show(common, &topic, *offset),
        DlqCommand::Replay { offset, all } => replay(common, &topic, offset.filter(|_| !all)).await,
        DlqCommand::Accept { partition, up_to } => {
            accept(common, &definition.stream.name, *partition, *up_to, shutdown).await
        }
    }
}

/// Opens the dead-letter topic at offset `from`, or at its first record. Blocking.
fn open(common: &CommonArgs, topic: &str, from: Option<i64>) -> Result<LogReader, ProcessorError> {
    let topic = dead_letter_topic(topic);
    let reader = LogReader::open(&common.kafka_brokers, &topic, 0, from)?;
    let (low, end) = (reader.low, reader.end);
    match from.filter(|from| !(low..=end).contains(from)) {
        Some(from) => Err(ProcessorError::Fatal(format!(
            "{topic} has no offset {from}; use an offset from {low} to {end}"
        ))),
        None => Ok(reader),
    }
}

/// Reads the next dead letters, at most `max`. Returns none at the end. Blocking.
fn page(reader: &mut LogReader, max: usize) -> Result<Vec<OwnedMessage>, ProcessorError> {
    let mut letters = Vec::new();
    while letters.len() < max
        && let Some(letter) = reader.next_record()?
    {
        letters.push(letter.detach());
    }
    Ok(letters)
}

/// Reads at most `max` dead letters, starting at offset `from` or at the first one.
fn read(
    common: &CommonArgs,
    topic: &str,
    from: Option<i64>,
    max: usize,
) -> Result<Vec<OwnedMessage>, ProcessorError> {
    tokio::task::block_in_place(|| page(&mut open(common, topic, from)?, max))
}

fn header(letter: &OwnedMessage, name: &str) -> String {
    let found = letter.headers().and_then(|h| h.iter().find(|h| h.key == name).and_then(|h| h.value));
    found.map(|v| String::from_utf8_lossy(v).into_owned()).unwrap_or_default()
}

fn list(common: &CommonArgs, topic: &str, limit: usize, json: bool) -> Result<(), ProcessorError> {
    let letters = read(common, topic, None, limit)?;
    let lines: Vec<Line> = letters
        .iter()
        .map(|letter| Line {
            offset: letter.offset(),
            source_partition: header(letter, "__connect.errors.partition"),
            source_offset: header(letter, "__connect.errors.offset"),
            class: header(letter, "__connect.errors.exception.class.name"),
            message: header(letter, "__connect.errors.exception.message"),
        })
        .collect();
    if json {
        return print_line(&serde_json::to_string_pretty(&lines).map_err(|e| failed("json")(&e))?);
    }
    let mut table = comfy_table::Table::new();
    table.set_header(["offset", "source", "reason"]);
    for line in &lines {
        let source = format!("{}/{}", line.source_partition, line.source_offset);
        table.add_row([line.offset.to_string(), source, format!("{}: {}", line.class, line.message)]);
    }
    print_line(&table.to_string())
}

fn show(common: &CommonArgs, topic: &str, offset: i64) -> Result<(), ProcessorError> {
    let letters = read(common, topic, Some(offset), 1)?;
    let Some(letter) = letters.first() else {
        return Err(ProcessorError::Fatal(format!(
            "{} has no offset {offset} yet",
            dead_letter_topic(topic)
        )));
    };
    let text = |bytes: Option<&[u8]>| bytes.map_or("(none)".into(), String::from_utf8_lossy).into_owned();
    if let Some(headers) = letter.headers() {
        for header in headers.iter() {
            print_line(&format!("{}: {}", header.key, text(header.value)))?;
        }
    }
    print_line(&format!("key: {}\n\n{}", text(letter.key()), text(letter.payload())))
}

/// Sends dead letters to the events topic again, one page at a time. A record that becomes a dead letter again is
/// appended after the end that was read at the start, so it is not sent twice.
async fn replay(common: &CommonArgs, topic: &str, only: Option<i64>) -> Result<(), ProcessorError> {
    let producer: FutureProducer = producer_config(&common.kafka_brokers, "stream-processor-dlq")
        .create()
        .map_err(|e| failed("kafka")(&e))?;
    let mut reader = tokio::task::block_in_place(|| open(common, topic, only))?;
    let max = if only.is_some() { 1 } else { REPLAY_PAGE };
    let mut sent = 0;
    loop {
        let letters = tokio::task::block_in_place(|| page(&mut reader, max))?;
        try_join_all(letters.iter().map(|letter| resend(&producer, topic, letter))).await?;
        sent += letters.len();
        if letters.is_empty() || only.is_some() {
            return print_line(&format!("{sent} dead letters sent again to {topic}"));
        }
    }
}

/// Sends one dead letter to the events topic without its error headers and with its source in [`REPLAYED_FROM`]. It
/// goes to its original partition, so that copies are detected whatever the key.
async fn resend(producer: &FutureProducer, topic: &str, letter: &OwnedMessage) -> Result<(), ProcessorError> {
    let from = format!("{}/0/{}", dead_letter_topic(topic), letter.offset());
    let kept =
        letter.headers().into_iter().flat_map(|h| h.iter().filter(|h| !h.key.starts_with(ERROR_HEADERS)));
    let headers = kept
        .chain([Header { key: REPLAYED_FROM, value: Some(from.as_bytes()) }])
        .fold(OwnedHeaders::new(), OwnedHeaders::insert);
    let mut record: FutureRecord<'_, [u8], [u8]> = FutureRecord::to(topic).headers(headers);
    record.key = letter.key();
    record.payload = letter.payload();
    record.partition = header(letter, "__connect.errors.partition").parse().ok();
    let sent = producer.send(record, DEADLINE).await;
    sent.map(|_| ()).map_err(|(e, _)| failed(&format!("sending {from} again"))(&e))
}

/// Lets a paused partition continue: its undecodable records below `up_to` become dead letters.
async fn accept(
    common: &CommonArgs,
    stream: &str,
    partition: i32,
    up_to: i64,
    shutdown: &Shutdown,
) -> Result<(), ProcessorError> {
    let session = connect(common, DEADLINE, shutdown).await?;
    let insert = format!(
        "INSERT INTO {}.dead_letters_accepted (stream, kafka_partition, up_to, accepted_at) VALUES (?, ?, ?, ?)",
        common.keyspace
    );
    let now = CqlTimestamp(chrono::Utc::now().timestamp_millis());
    session
        .query_unpaged(insert, (stream, partition, up_to, now))
        .await
        .map_err(|e| failed("cassandra")(&e))?;
    print_line(&format!(
        "partition {partition}: undecodable records below offset {up_to} become dead letters \
         without pausing the partition"
    ))
}
