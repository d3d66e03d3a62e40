//! Measures the time, CPU time and memory of the processor while it drains the topic. All figures are read from outside
//! the process.

use std::fs;
use std::time::{Duration, Instant};

use common::runtime::kafka::client_config;
use local_stack::config::{Settings, loopback};
use local_stack::error::{Error, Result};
use local_stack::process::{Process, Stat};
use local_stack::servers::cassandra::{connect, failed};
use local_stack::services;
use local_stack::terminal::Terminal;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use scylla::client::session::Session;

/// Poll interval for progress, which is also the maximum error of a measured time.
pub(super) const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Time limit for the processor to drain all messages.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1800);

/// Time limit for the consumer to receive all messages.
const CONSUME_TIMEOUT: Duration = Duration::from_secs(600);

/// Measurements of one drain.
#[derive(Debug)]
pub(super) struct Drained {
    /// Time from the start of the processor until Cassandra counted every event.
    pub(super) whole: Duration,
    /// Events per second between the first and the last observed progress.
    pub(super) steady_events_per_second: f64,
    /// User and system CPU time.
    pub(super) cpu_seconds: f64,
    /// Peak resident memory: `VmHWM` in `/proc/PID/status`.
    pub(super) peak_resident_mib: f64,
}

/// Starts the processor and waits until `partition_progress` counts `messages` in total.
pub(super) async fn drain(
    private: &Settings,
    keyspace: &str,
    messages: u64,
    terminal: Terminal,
) -> Result<Drained> {
    let session = connect(private).await?;
    let mut spec = services::processor(private)?;
    spec.environment.extend(services::names(keyspace));
    let since = Instant::now();
    let mut process = Process::spawn(&spec, &private.folders)?;
    let seen = watch(&session, keyspace, messages, since, &mut process).await;
    let pid = process.record.pid;
    let (stat, peak) = (Stat::read(pid), peak_resident_mib(pid));
    process.stop().await;
    let (first, whole) = seen?;
    let stat = stat.ok_or_else(|| {
        Error::Refused("the processor exited before it was measured; see its log".to_owned())
    })?;
    terminal.done("processor", &format!("{messages} events counted"), whole);
    let steady = (whole - first.after).as_secs_f64().max(f64::EPSILON);
    Ok(Drained {
        whole,
        steady_events_per_second: (messages - first.events.min(messages)) as f64 / steady,
        cpu_seconds: stat.cpu_ticks as f64 / rustix::param::clock_ticks_per_second() as f64,
        peak_resident_mib: peak,
    })
}

/// Consumes `messages` from the earliest offsets without decoding them. Returns the messages per second, measured from
/// the first message.
pub(super) async fn consume(private: &Settings, topic: &'static str, messages: u64) -> Result<f64> {
    let brokers = loopback(private.ports.kafka);
    let received = tokio::task::spawn_blocking(move || {
        let consumer: BaseConsumer = client_config(&brokers, "bench-consumer")
            .set("group.id", "bench-consumer")
            .set("auto.offset.reset", "earliest")
            .create()?;
        consumer.subscribe(&[topic])?;
        let (started, mut first, mut received) = (Instant::now(), None, 0);
        while received < messages {
            match consumer.poll(POLL_INTERVAL) {
                Some(message) => {
                    message?;
                    first.get_or_insert_with(Instant::now);
                    received += 1;
                }
                // A rebalance also ends a poll without a message.
                None if started.elapsed() < CONSUME_TIMEOUT => {}
                None => return Err(KafkaError::NoMessageReceived),
            }
        }
        Ok(messages as f64 / first.unwrap_or(started).elapsed().as_secs_f64())
    });
    let failed = |cause: KafkaError| Error::Refused(format!("the benchmark consumer failed: {cause}"));
    received.await.map_err(|e| Error::Refused(e.to_string()))?.map_err(failed)
}

struct EventsAfter {
    after: Duration,
    events: u64,
}

async fn watch(
    session: &Session,
    keyspace: &str,
    messages: u64,
    since: Instant,
    process: &mut Process,
) -> Result<(EventsAfter, Duration)> {
    let mut first = None;
    loop {
        if let Some(status) = process.ended() {
            return Err(process.exit_error(status));
        }
        let events = processed(session, keyspace).await?;
        let after = since.elapsed();
        if events > 0 && first.is_none() {
            first = Some(EventsAfter { after, events });
        }
        if events >= messages {
            return Ok((first.unwrap_or(EventsAfter { after, events }), after));
        }
        if after > DRAIN_TIMEOUT {
            return Err(
                process.not_ready(&format!("{messages} events, {events} counted so far"), DRAIN_TIMEOUT)
            );
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// Returns the number of records that the processor has handled: events plus duplicates.
pub(super) async fn processed(session: &Session, keyspace: &str) -> Result<u64> {
    let query = format!("SELECT events, duplicates FROM {keyspace}.partition_progress");
    let rows = session.query_unpaged(query, ()).await.map_err(failed)?;
    let rows = rows.into_rows_result().map_err(failed)?;
    let rows = rows.rows::<(Option<i64>, Option<i64>)>().map_err(failed)?;
    let sum: i64 = rows.flatten().map(|(events, copies)| events.unwrap_or(0) + copies.unwrap_or(0)).sum();
    Ok(u64::try_from(sum).unwrap_or(0))
}

fn peak_resident_mib(pid: u32) -> f64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kib = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .and_then(|rest| rest.split_whitespace().next());
    kib.and_then(|kib| kib.parse::<f64>().ok()).unwrap_or(f64::NAN) / 1024.0
}

/// Parses the rate from the closing line of `ingest-producer stress`: the number before `msg/s`.
pub(super) fn messages_per_second(text: &str) -> Option<f64> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let at = words.iter().rposition(|word| word.starts_with("msg/s"))?;
    words.get(at.checked_sub(1)?)?.replace([',', '_'], "").parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_parsed_from_the_closing_line_of_the_producer() {
        let check = |text: &str, rate| assert_eq!(messages_per_second(text), rate, "{text}");
        check("… 10 msg/s\n1000 messages acked: 312,500 msg/s, ack p50 4 ms\n", Some(312_500.0));
        check("no figure", None);
        check("msg/s", None);
    }
}
