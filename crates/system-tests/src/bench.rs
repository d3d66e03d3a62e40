//! `./run bench`: one measurement on private servers. The default load runs these steps in order:
//!
//! 1. The producer fills the topic.
//! 2. The producer is measured on a second topic.
//! 3. `kafka-producer-perf-test` sends the same number of records, with the same bytes, to a third topic.
//! 4. The bare driver writes the rows of the first topic.
//! 5. A bare consumer reads the first topic.
//! 6. The processor drains the first topic.
//! 7. The bare driver writes its rows again.
//!
//! The bare driver runs before and after the processor, so that warm-up of the servers does not distort the ratio
//! between the two. The modules in `bench/` implement the steps and the other loads of `bench PART`.

mod bare;
mod kafka_perf;
mod loads;
mod measure;
mod worst;

use std::time::{Duration, Instant};

use local_stack::checks;
use local_stack::config::{Heaps, Settings};
use local_stack::error::{Error, Result};
use local_stack::process::{Process, Spec};
use local_stack::services;
use local_stack::stack::{Extent, Stack};
use local_stack::terminal::Terminal;
use serde::Serialize;

use crate::cli::{BenchArgs, BenchPart};
use crate::private::{self, PrivateServers};

/// Keyspace and topic of the processor.
const NAME: &str = "bench";

/// Keyspace and topic of the producer measurement.
const PRODUCED: &str = "bench_produced";

/// Heaps that are large enough for garbage collection not to dominate the results. Used if they fit into memory.
const HEAPS: Heaps = Heaps { kafka_mib: 2048, cassandra_mib: 6144 };

/// Time limit for the producer to send all messages.
const PRELOAD_TIMEOUT: Duration = Duration::from_secs(1800);

/// Time limit for `init`.
const INIT_TIMEOUT: Duration = Duration::from_secs(120);

/// Results of one run of the default load.
#[derive(Debug, Serialize)]
pub struct Figures {
    /// Number of events preloaded and drained.
    messages: u64,
    /// Whether the servers ran with the heap sizes for measurements.
    bench_heaps: bool,
    /// (a) Rows per second of the bare driver, before and after the processor.
    bare_rows_per_second: [f64; 2],
    /// (b) Events per second of the processor, from its start until Cassandra counts all events.
    processor_events_per_second: f64,
    /// (b) Like the previous figure, but without the time until the first events were counted.
    processor_steady_events_per_second: f64,
    /// (c) Ratio of (b) to the mean of (a).
    ratio: f64,
    /// (d) CPU time of the processor in seconds per million events.
    cpu_seconds_per_million: f64,
    /// (e) Peak resident memory of the processor in MiB.
    peak_resident_mib: f64,
    /// (f) Messages per second of the producer, with all messages acknowledged.
    producer_messages_per_second: f64,
    /// (g) Messages per second of `kafka-producer-perf-test` with the same acks, compression, linger and record size.
    kafka_perf_messages_per_second: f64,
    /// (h) Messages per second of a bare consumer of the same topic, which decodes and writes nothing.
    consumer_messages_per_second: f64,
    /// Mean size of a record in (f) and (g) in bytes: key, headers and value.
    record_bytes: u64,
}

/// Runs the selected measurement on private servers and prints the results.
pub async fn run(settings: &Settings, args: &BenchArgs, terminal: Terminal) -> Result<()> {
    let bench_heaps = checks::memory(HEAPS).is_ok();
    let heaps = if bench_heaps { HEAPS } else { settings.heaps };
    let sized = Settings { heaps, ..settings.clone() };
    let own = PrivateServers::prepare(&sized, private::folder(settings, "bench-")?, terminal).await?;
    let mut stack = Stack::new(own.settings.clone(), terminal);
    let measured = tokio::select! {
        measured = async {
            stack.start(&own.installed, Extent::Servers).await?;
            init(&own.settings, NAME).await?;
            measure_part(&own, args, bench_heaps, terminal).await
        } => measured,
        error = private::interrupted() => Err(error),
    };
    stack.stop().await;
    if measured.is_err() {
        own.keep(terminal);
    }
    measured
}

/// Runs the selected measurement. All loads except the drain print their results as JSON.
async fn measure_part(
    own: &PrivateServers,
    args: &BenchArgs,
    bench_heaps: bool,
    terminal: Terminal,
) -> Result<()> {
    let private = &own.settings;
    let figures = match args.part {
        BenchPart::Drain => {
            let figures = measure_drain(own, args, bench_heaps, terminal).await?;
            print(&figures, args.json, terminal);
            return Ok(());
        }
        BenchPart::Cold => serde_json::to_string_pretty(&loads::cold(private, args, terminal).await?),
        BenchPart::Latency => serde_json::to_string_pretty(&loads::latency(private, terminal).await?),
        BenchPart::Worst => serde_json::to_string_pretty(&worst::run(private, terminal).await?),
        BenchPart::Backlog => serde_json::to_string_pretty(&loads::backlog(private, args, terminal).await?),
    };
    terminal.data(&figures.unwrap_or_default());
    Ok(())
}

async fn measure_drain(
    own: &PrivateServers,
    args: &BenchArgs,
    bench_heaps: bool,
    terminal: Terminal,
) -> Result<Figures> {
    let private = &own.settings;
    // Filling the topic also warms up the JVM of the broker, before the producer is measured.
    stress(private, NAME, &["--messages", &args.messages.to_string()]).await?;
    let producer = producer(private, args.messages, terminal).await?;
    let perf = kafka_perf::run(private, &own.installed, NAME, args.messages, terminal).await?;
    let bare = bare::BareDriver::prepare(private, NAME, args, terminal).await?;
    bare.warm_up(terminal).await?;
    let before = bare.run("bare driver", terminal).await?;
    // This is also the first consumer group, so the broker creates its group metadata before the processor joins.
    let consumer = measure::consume(private, NAME, args.messages).await?;
    let drained = measure::drain(private, NAME, args.messages, terminal).await?;
    let after = bare.run("bare driver again", terminal).await?;
    let events_per_second = args.messages as f64 / drained.whole.as_secs_f64();
    Ok(Figures {
        messages: args.messages,
        bench_heaps,
        bare_rows_per_second: [before, after],
        processor_events_per_second: events_per_second,
        processor_steady_events_per_second: drained.steady_events_per_second,
        ratio: events_per_second / ((before + after) / 2.0),
        cpu_seconds_per_million: drained.cpu_seconds / (args.messages as f64 / 1e6),
        peak_resident_mib: drained.peak_resident_mib,
        consumer_messages_per_second: consumer,
        producer_messages_per_second: producer,
        kafka_perf_messages_per_second: perf.records_per_second,
        record_bytes: perf.record_bytes,
    })
}

/// Measures the producer on a separate topic. Returns the acknowledged messages per second that the producer reports.
async fn producer(private: &Settings, messages: u64, terminal: Terminal) -> Result<f64> {
    init(private, PRODUCED).await?;
    let since = Instant::now();
    stress(private, PRODUCED, &["--messages", &messages.to_string()]).await?;
    let log = private.folders.logs().join("stress.log");
    let text = std::fs::read_to_string(&log).map_err(Error::io(&log))?;
    let rate = measure::messages_per_second(&text).unwrap_or(messages as f64 / since.elapsed().as_secs_f64());
    terminal.done(
        "producer",
        &format!("{messages} messages acknowledged, {rate:.0} per second"),
        since.elapsed(),
    );
    Ok(rate)
}

/// Runs `ingest-producer stress` into a topic and waits until it exits.
async fn stress(private: &Settings, name: &str, arguments: &[&str]) -> Result<()> {
    run_to_end(private, name, services::stress(private, arguments)?, PRELOAD_TIMEOUT).await
}

/// Runs `stream-processor init` for a keyspace and a topic.
async fn init(private: &Settings, name: &str) -> Result<()> {
    run_to_end(private, name, services::init(private)?, INIT_TIMEOUT).await
}

async fn run_to_end(private: &Settings, name: &str, mut spec: Spec, timeout: Duration) -> Result<()> {
    spec.environment.extend(services::names(name));
    Process::spawn(&spec, &private.folders)?.finished(timeout).await
}

fn print(figures: &Figures, json: bool, terminal: Terminal) {
    if json {
        terminal.data(&serde_json::to_string(figures).unwrap_or_default());
        return;
    }
    let [before, after] = figures.bare_rows_per_second;
    let row = |figure: &str, value: String, target: &str| [figure.to_owned(), value, target.to_owned()];
    terminal.data(&format!(
        "\n{} events, {} heaps\n",
        figures.messages,
        if figures.bench_heaps { "bench" } else { "small" }
    ));
    terminal.table(
        ["figure", "measured", "target"],
        &[
            row("(a) bare driver, before and after", format!("{before:.0} and {after:.0} rows/s"), ""),
            row(
                "(b) processor, from its start",
                format!("{:.0} events/s", figures.processor_events_per_second),
                "",
            ),
            row(
                "    processor, after its start-up",
                format!("{:.0} events/s", figures.processor_steady_events_per_second),
                "",
            ),
            row("(c) ratio of (b) to (a)", format!("{:.2}", figures.ratio), "≥ 0.80"),
            row("(d) CPU per million events", format!("{:.2} s", figures.cpu_seconds_per_million), "≤ 5 s"),
            row(
                "(e) peak memory of the processor",
                format!("{:.0} MiB", figures.peak_resident_mib),
                "≤ 300 MiB",
            ),
            row(
                "(f) producer, all acknowledged",
                format!("{:.0} messages/s", figures.producer_messages_per_second),
                "≥ 300,000",
            ),
            row(
                "(g) kafka-producer-perf-test",
                format!(
                    "{:.0} messages/s of {} bytes",
                    figures.kafka_perf_messages_per_second, figures.record_bytes
                ),
                "",
            ),
            row(
                "(h) bare consumer of the topic",
                format!("{:.0} messages/s", figures.consumer_messages_per_second),
                "",
            ),
        ],
    );
}
