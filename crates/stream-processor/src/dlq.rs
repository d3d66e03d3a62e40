//! `dlq list | show | replay | accept`: what an operator does about dead letters. Reads the dead-letter topic from its
//! beginning to its end at the time of the call.

use crate::config::DlqCommand;
use crate::error::ProcessorError;
use crate::log_reader::LogReader;
use common::cassandra::connect;
use common::config::CommonArgs;
use common::kafka::producer_config;
use common::schema::dead_letter_topic;
use common::shutdown::Shutdown;
use common::stream::Definition;
use futures::future::try_join_all;
use rdkafka::Message;
use rdkafka::message::{Header, Headers, OwnedHeaders, OwnedMessage};
use rdkafka::producer::{FutureProducer, FutureRecord};
use scylla::value::CqlTimestamp;
use serde::Serialize;
use std::io::Write;
use std::time::Duration;

const DEADLINE: Duration = Duration::from_secs(20);
/// Headers that say why a record was refused begin so.
const ERROR_HEADERS: &str = "__connect.errors.";
/// Dead letters held in memory at once while they are sent again.
const REPLAY_PAGE: usize = 64;
/// Where a record that was sent again comes from.
const REPLAYED_FROM: &str = "replayed_from";

/// One line of `dlq list`.
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

fn say(text: &str) -> Result<(), ProcessorError> {
    writeln!(std::io::stdout(), "{text}").map_err(|e| failed("stdout")(&e))
}

/// Carries out one command.
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
            accept(common, &definition.stream.name, (*partition, *up_to), shutdown).await
        }
    }
}

/// The dead letters, from `from` on. Blocking.
fn open(common: &CommonArgs, topic: &str, from: Option<i64>) -> Result<LogReader, ProcessorError> {
    let topic = dead_letter_topic(topic);
    let reader = LogReader::open(&common.kafka_brokers, &topic, 0, from)?;
    let (low, end) = (reader.low, reader.end);
    match from.filter(|from| !(low..=end).contains(from)) {
        Some(from) => Err(ProcessorError::Fatal(format!("{topic} holds offsets {low} to {end}, not {from}"))),
        None => Ok(reader),
    }
}

/// The next ones, at most `most`; none: the end. Blocking.
fn page(reader: &mut LogReader, most: usize) -> Result<Vec<OwnedMessage>, ProcessorError> {
    let mut letters = Vec::new();
    while letters.len() < most
        && let Some(letter) = reader.next_record()?
    {
        letters.push(letter.detach());
    }
    Ok(letters)
}

/// The dead letters from `from` on, at most `most`.
fn read(
    common: &CommonArgs,
    topic: &str,
    from: Option<i64>,
    most: usize,
) -> Result<Vec<OwnedMessage>, ProcessorError> {
    tokio::task::block_in_place(|| page(&mut open(common, topic, from)?, most))
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
        return say(&serde_json::to_string_pretty(&lines).map_err(|e| failed("json")(&e))?);
    }
    let mut table = comfy_table::Table::new();
    table.set_header(["offset", "source", "reason"]);
    for line in &lines {
        let source = format!("{}/{}", line.source_partition, line.source_offset);
        table.add_row([line.offset.to_string(), source, format!("{}: {}", line.class, line.message)]);
    }
    say(&table.to_string())
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
            say(&format!("{}: {}", header.key, text(header.value)))?;
        }
    }
    say(&format!("key: {}\n\n{}", text(letter.key()), text(letter.payload())))
}

/// Sends dead letters again through the events topic, page by page. What is refused once more meanwhile comes after the end
/// that was read first, and is not sent a second time.
async fn replay(common: &CommonArgs, topic: &str, only: Option<i64>) -> Result<(), ProcessorError> {
    let producer: FutureProducer = producer_config(&common.kafka_brokers, "stream-processor-dlq")
        .create()
        .map_err(|e| failed("kafka")(&e))?;
    let mut reader = tokio::task::block_in_place(|| open(common, topic, only))?;
    let most = if only.is_some() { 1 } else { REPLAY_PAGE };
    let mut sent = 0;
    loop {
        let letters = tokio::task::block_in_place(|| page(&mut reader, most))?;
        try_join_all(letters.iter().map(|letter| send_again(&producer, topic, letter))).await?;
        sent += letters.len();
        if letters.is_empty() || only.is_some() {
            return say(&format!("{sent} dead letters sent again to {topic}"));
        }
    }
}

/// Without the error headers, with where it comes from; into the partition it came from, so that a copy of it is recognised
/// whatever its key.
async fn send_again(
    producer: &FutureProducer,
    topic: &str,
    letter: &OwnedMessage,
) -> Result<(), ProcessorError> {
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

/// Lets a paused partition go on past its poison.
async fn accept(
    common: &CommonArgs,
    stream: &str,
    (partition, up_to): (i32, i64),
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
    say(&format!(
        "partition {partition}: poison below offset {up_to} goes to the dead letters without a pause"
    ))
}
