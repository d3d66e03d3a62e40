//! The processor's turn: its time, CPU seconds and memory while it drains the topic, read from outside.

use std::fs;
use std::time::{Duration, Instant};

use common::kafka::client_config;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use scylla::client::session::Session;

use crate::config::{Settings, loopback};
use crate::error::{Error, Result};
use crate::process::{Process, Stat};
use crate::servers::cassandra::{connect, failed};
use crate::services;
use crate::terminal::Terminal;

/// How often progress is read; the error of a measured time is at most this.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(50);

/// How long the processor may take for all messages before the run is given up.
const DRAIN_WITHIN: Duration = Duration::from_secs(1800);

/// How long the consumer may take for all messages.
const CONSUME_WITHIN: Duration = Duration::from_secs(600);

/// What was seen of the processor.
#[derive(Debug)]
pub(super) struct Drained {
    /// From its start until every event was counted in Cassandra.
    pub(super) whole: Duration,
    /// Rate between the first sight of counted events and the last.
    pub(super) steady_events_per_second: f64,
    /// User and system time together.
    pub(super) cpu_seconds: f64,
    /// `VmHWM` of `/proc/PID/status`.
    pub(super) peak_resident_mib: f64,
}

/// Starts the processor and waits until `partition_progress` counts so many messages in all.
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
    let stat = stat.ok_or_else(|| Error::Refused("the processor ended before it was measured".to_owned()))?;
    terminal.done("processor", &format!("{messages} events counted"), whole);
    let steady = (whole - first.after).as_secs_f64().max(f64::EPSILON);
    Ok(Drained {
        whole,
        steady_events_per_second: (messages - first.events.min(messages)) as f64 / steady,
        cpu_seconds: stat.cpu_ticks as f64 / rustix::param::clock_ticks_per_second() as f64,
        peak_resident_mib: peak,
    })
}

/// Messages per second of a consumer that takes so many from the earliest offsets and looks at none, from its first one on.
pub(super) async fn consume(private: &Settings, topic: &'static str, messages: u64) -> Result<f64> {
    let brokers = loopback(private.ports.kafka);
    let taken = tokio::task::spawn_blocking(move || {
        let consumer: BaseConsumer = client_config(&brokers, "bench-consumer")
            .set("group.id", "bench-consumer")
            .set("auto.offset.reset", "earliest")
            .create()?;
        consumer.subscribe(&[topic])?;
        let (begun, mut first, mut taken) = (Instant::now(), None, 0);
        while taken < messages {
            match consumer.poll(LOOK_EVERY) {
                Some(message) => {
                    message?;
                    first.get_or_insert_with(Instant::now);
                    taken += 1;
                }
                // A change of the group ends a poll as well.
                None if begun.elapsed() < CONSUME_WITHIN => {}
                None => return Err(KafkaError::NoMessageReceived),
            }
        }
        Ok(messages as f64 / first.unwrap_or(begun).elapsed().as_secs_f64())
    });
    let failed = |cause: KafkaError| Error::Refused(format!("the consumer of the bench: {cause}"));
    taken.await.map_err(|e| Error::Refused(e.to_string()))?.map_err(failed)
}

struct Sight {
    after: Duration,
    events: u64,
}

async fn watch(
    session: &Session,
    keyspace: &str,
    messages: u64,
    since: Instant,
    process: &mut Process,
) -> Result<(Sight, Duration)> {
    let mut first = None;
    loop {
        if let Some(status) = process.ended() {
            return Err(process.death(status));
        }
        let events = processed(session, keyspace).await?;
        let after = since.elapsed();
        if events > 0 && first.is_none() {
            first = Some(Sight { after, events });
        }
        if events >= messages {
            return Ok((first.unwrap_or(Sight { after, events }), after));
        }
        if after > DRAIN_WITHIN {
            return Err(
                process.not_ready(&format!("{messages} events, {events} counted so far"), DRAIN_WITHIN)
            );
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Events and duplicates together: what the processor has dealt with.
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

/// Messages per second in the closing line of `ingest-producer stress`: the number before `msg/s`.
pub(super) fn messages_per_second(text: &str) -> Option<f64> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let at = words.iter().rposition(|word| word.starts_with("msg/s"))?;
    words.get(at.checked_sub(1)?)?.replace([',', '_'], "").parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_producers_closing_line_tells_its_rate() {
        let check = |text: &str, rate| assert_eq!(messages_per_second(text), rate, "{text}");
        check("… 10 msg/s\n1000 messages acked: 312,500 msg/s, ack p50 4 ms\n", Some(312_500.0));
        check("no figure", None);
        check("msg/s", None);
    }
}
