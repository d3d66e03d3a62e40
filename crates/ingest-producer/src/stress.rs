//! `stress`: produces synthetic events at a given rate. It never waits for a single acknowledgement. Latency is
//! measured from the time at which a message was due, so that a slow broker that delays the sender is visible
//! (coordinated omission).

mod made_up;
mod report;

use crate::config::StressArgs;
use anyhow::Context;
use common::contracts::event;
use common::contracts::stream::Definition;
use common::runtime::kafka;
use common::runtime::shutdown::Shutdown;
use hdrhistogram::Histogram;
use made_up::{Identity, Pool, Repeats};
use rdkafka::client::ClientContext;
use rdkafka::error::RDKafkaErrorCode;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseRecord, DeliveryResult, Producer, ProducerContext, ThreadedProducer};
pub use report::Report;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Number of messages if neither a number nor a duration is given.
const DEFAULT_MESSAGES: u64 = 100_000;
/// Maximum messages in the client's queue. With a longer queue, messages leave the CPU caches before they are sent.
const QUEUE_MESSAGES: u64 = 20_000;
/// Maximum messages of a batch, so that several batches fill while one is in flight.
const BATCH_MESSAGES: u64 = 2000;
/// Maximum size of the client's queue in kilobytes.
const QUEUE_KBYTES: u64 = 262_144;
/// How long the client tries to deliver one message.
const DELIVERY_TIMEOUT_MS: u64 = 120_000;
/// Pause before sending to a full queue is retried.
const FULL_QUEUE_PAUSE: Duration = Duration::from_micros(500);
/// How far a sender must be ahead of its rate to sleep instead of sending.
const AHEAD: Duration = Duration::from_micros(500);
/// How long to wait for the first broker.
const START_DEADLINE: Duration = Duration::from_secs(15);
/// Highest recorded latency in microseconds: ten minutes.
const MAX_LATENCY_US: u64 = 600_000_000;

/// Counts acknowledgements. The opaque value of a message is its due time in microseconds since `started`.
#[derive(Debug)]
struct StressContext {
    started: Instant,
    acked: AtomicU64,
    failed: AtomicU64,
    /// Only the polling thread locks it while messages are sent.
    latencies: Mutex<Histogram<u64>>,
    first_failure: Mutex<Option<String>>,
}

impl ClientContext for StressContext {}

impl ProducerContext for StressContext {
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, intended_us: usize) {
        match result {
            Ok(_) => {
                let waited = micros(self.started.elapsed()).saturating_sub(intended_us as u64);
                let mut latencies = self.latencies.lock().unwrap_or_else(PoisonError::into_inner);
                latencies.saturating_record(waited.max(1));
                drop(latencies);
                self.acked.fetch_add(1, Ordering::Relaxed);
            }
            Err((error, _)) => {
                let mut first = self.first_failure.lock().unwrap_or_else(PoisonError::into_inner);
                first.get_or_insert_with(|| error.to_string());
                self.failed.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

/// What one sender thread sends.
struct Plan<'a> {
    args: &'a StressArgs,
    topic: &'a str,
    partitions: i32,
    pool: &'a Pool,
    /// Number of messages of this sender.
    messages: u64,
    /// Messages per second of this sender; 0 means as fast as possible.
    rate: f64,
    /// Header `ce_type`.
    event_type: &'a str,
    /// Header `ce_source`.
    source: &'a str,
    /// Header `run_id`.
    run_id: String,
    sent: &'a AtomicU64,
    shutdown: &'a Shutdown,
}

/// Sends all messages, waits for every acknowledgement and returns the report. Blocking; do not call it on the async
/// runtime.
pub fn run(
    brokers: &str,
    topic: &str,
    definition: &Definition,
    args: &StressArgs,
    shutdown: &Shutdown,
) -> anyhow::Result<Report> {
    let context = StressContext {
        started: Instant::now(),
        acked: AtomicU64::new(0),
        failed: AtomicU64::new(0),
        latencies: Mutex::new(Histogram::new_with_max(MAX_LATENCY_US, 3).context("latencies")?),
        first_failure: Mutex::new(None),
    };
    let producer: ThreadedProducer<StressContext> = kafka::producer_config(brokers, "ingest-producer-stress")
        .set("message.timeout.ms", DELIVERY_TIMEOUT_MS.to_string())
        .set("queue.buffering.max.messages", QUEUE_MESSAGES.to_string())
        .set("queue.buffering.max.kbytes", QUEUE_KBYTES.to_string())
        .set("linger.ms", "10")
        .set("batch.num.messages", BATCH_MESSAGES.to_string())
        .set("batch.size", "1000000")
        .create_with_context(context)
        .context("cannot create the kafka client")?;
    let partitions = kafka::partition_count(producer.client(), brokers, topic, START_DEADLINE)?;
    let pool = Pool::new(definition, args.payload_bytes);
    let total = args.messages.unwrap_or(if args.seconds.is_some() { u64::MAX } else { DEFAULT_MESSAGES });
    let (sent, run_id) = (AtomicU64::new(0), uuid::Uuid::new_v4());
    let senders = u64::from(args.senders);
    let source = format!("stress:{}", definition.stream.name);
    let plan = |sender: u64| Plan {
        args,
        topic,
        partitions,
        pool: &pool,
        messages: total / senders + u64::from(sender < total % senders),
        rate: args.rate as f64 / senders as f64,
        event_type: &definition.event.event_type,
        source: &source,
        run_id: run_id.to_string(),
        sent: &sent,
        shutdown,
    };
    let sending_started = Instant::now();
    let bar = report::progress_bar(total, args.seconds);
    let sending: anyhow::Result<()> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..senders)
            .map(|sender| {
                let (plan, producer) = (plan(sender), &producer);
                scope.spawn(move || send_all(producer, &plan, sender))
            })
            .collect();
        while threads.iter().any(|thread| !thread.is_finished()) {
            bar.set_position(producer.context().acked.load(Ordering::Relaxed));
            std::thread::park_timeout(Duration::from_millis(50));
        }
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().map_err(|_| anyhow::anyhow!("a sender panicked"))?)
    });
    sending?;
    wait_for_all(&producer, sent.load(Ordering::Relaxed), &bar)?;
    bar.finish_and_clear();
    Ok(report::report(
        producer.context(),
        sent.load(Ordering::Relaxed),
        sending_started.elapsed(),
        pool.value_bytes(),
    ))
}

fn wait_for_all(
    producer: &ThreadedProducer<StressContext>,
    sent: u64,
    bar: &indicatif::ProgressBar,
) -> anyhow::Result<()> {
    // The loop ends, because the client applies a timeout to each message.
    loop {
        let context = producer.context();
        let settled = context.acked.load(Ordering::Relaxed) + context.failed.load(Ordering::Relaxed);
        bar.set_position(settled);
        if settled >= sent {
            return Ok(());
        }
        match producer.flush(Duration::from_millis(20)) {
            Ok(()) => {}
            Err(e) if e.rdkafka_error_code() == Some(RDKafkaErrorCode::OperationTimedOut) => {}
            Err(e) => return Err(e).context("waiting for acknowledgements"),
        }
    }
}

fn send_all(producer: &ThreadedProducer<StressContext>, plan: &Plan<'_>, sender: u64) -> anyhow::Result<()> {
    let started = producer.context().started;
    let sender_started = Instant::now();
    let deadline = plan.args.seconds.map(|seconds| sender_started + Duration::from_secs(seconds));
    let mut identity = Identity::new(sender);
    let mut repeats = Repeats::new(plan.args.duplicates);
    for index in 0..plan.messages {
        let intended = intended_at(sender_started, index, plan.rate).unwrap_or_else(Instant::now);
        wait_until(intended);
        if plan.shutdown.has_begun() || deadline.is_some_and(|deadline| intended >= deadline) {
            break;
        }
        let number = repeats.choose(index, event_time(plan, index));
        identity.set(number.index, number.time_ms);
        let intended_us = micros(intended.duration_since(started)) as usize;
        send(producer, plan, &identity, intended_us)?;
    }
    Ok(())
}

/// The event time of a message: now, or its position in `--span`.
fn event_time(plan: &Plan<'_>, index: u64) -> i64 {
    let left = |span: i64| (span as f64 * (1.0 - index as f64 / plan.messages as f64)) as i64;
    now_ms() - plan.args.span.map_or(0, left)
}

fn send(
    producer: &ThreadedProducer<StressContext>,
    plan: &Plan<'_>,
    identity: &Identity,
    intended_us: usize,
) -> anyhow::Result<()> {
    let mut record = BaseRecord::with_opaque_to(plan.topic, intended_us)
        .key(identity.id())
        .partition(event::partition_of(identity.id(), plan.partitions))
        .payload(plan.pool.value(identity.index()))
        .headers(headers(plan, identity));
    loop {
        match producer.send(record) {
            Ok(()) => {
                plan.sent.fetch_add(1, Ordering::Relaxed);
                return Ok(());
            }
            Err((error, again)) if error.rdkafka_error_code() == Some(RDKafkaErrorCode::QueueFull) => {
                // The client takes ownership of the headers only on success, so the record can be sent again.
                record = again;
                std::thread::park_timeout(FULL_QUEUE_PAUSE);
            }
            Err((error, _)) => return Err(error).context("the kafka client rejected a message"),
        }
    }
}

/// The headers of an event, without `content-type` and `traceparent`. Synthetic events do not need these, and each
/// header costs the client an allocation.
fn headers(plan: &Plan<'_>, identity: &Identity) -> OwnedHeaders {
    let mut produced_at = [0u8; 20];
    let produced_at = made_up::decimal(micros(since_epoch()), &mut produced_at);
    let text = |key, value| Header { key, value: Some(value) };
    OwnedHeaders::new_with_capacity(7)
        .insert(text(event::HEADER_ID, identity.id()))
        .insert(text(event::HEADER_SOURCE, plan.source.as_bytes()))
        .insert(text(event::HEADER_TYPE, plan.event_type.as_bytes()))
        .insert(text(event::HEADER_SPEC_VERSION, event::SPEC_VERSION.as_bytes()))
        .insert(text(event::HEADER_TIME, identity.time()))
        .insert(text(event::HEADER_RUN_ID, plan.run_id.as_bytes()))
        .insert(text(event::HEADER_PRODUCED_AT, produced_at))
}

/// When a message is due. Delays of earlier messages do not move it, so that a stall adds to the latency of every message
/// queued behind it. Returns `None` if the rate is unlimited.
fn intended_at(start: Instant, index: u64, rate: f64) -> Option<Instant> {
    (rate > 0.0).then(|| start + Duration::from_secs_f64(index as f64 / rate))
}

fn wait_until(intended: Instant) {
    let ahead = intended.saturating_duration_since(Instant::now());
    if ahead > AHEAD {
        std::thread::sleep(ahead);
    }
}

fn since_epoch() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

fn now_ms() -> i64 {
    i64::try_from(since_epoch().as_millis()).unwrap_or(0)
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
#[path = "stress/tests.rs"]
mod tests;
