//! `local-stack bench`: one run on one machine with servers of its own. In order: the producer fills the topic, then one of its own,
//! Kafka's own `kafka-producer-perf-test` sends as many records of the same bytes to another, the bare driver writes the same rows,
//! the processor drains the topic, the bare driver once more; so the ratio compares the processor with a driver that was no
//! warmer. How each is measured, and the other loads of `bench PART`, is in `bench/`.

mod bare;
mod kafka_perf;
mod loads;
mod measure;
mod worst;

use std::time::{Duration, Instant};

use serde::Serialize;

use crate::cli::{BenchArgs, BenchPart};
use crate::config::Settings;
use crate::error::{Error, Result};
use crate::private::{self, Private};
use crate::process::{Process, Spec};
use crate::services;
use crate::stack::{Extent, Stack};
use crate::terminal::Terminal;

/// Keyspace and topic that the processor works on.
const NAME: &str = "bench";

/// Keyspace and topic of the producer's own turn.
const PRODUCED: &str = "bench_produced";

/// How long the producer may take for all messages.
const PRELOAD_WITHIN: Duration = Duration::from_secs(1800);

/// How long `init` may take.
const INIT_WITHIN: Duration = Duration::from_secs(120);

/// The figures of one run.
#[derive(Debug, Serialize)]
pub struct Figures {
    /// Events preloaded and drained.
    messages: u64,
    /// Whether the servers had the heaps meant for measurements.
    bench_heaps: bool,
    /// (a) Rows per second of the bare driver before and after the processor's turn.
    bare_rows_per_second: [f64; 2],
    /// (b) Events per second of the processor, from its start until all are counted in Cassandra.
    processor_events_per_second: f64,
    /// (b) The same without the time until the first events were counted.
    processor_steady_events_per_second: f64,
    /// (c) (b) over the mean of (a).
    ratio: f64,
    /// (d) CPU seconds of the processor per million events.
    cpu_seconds_per_million: f64,
    /// (e) Peak resident memory of the processor in MiB.
    peak_resident_mib: f64,
    /// (f) Messages per second of the producer, all acknowledged.
    producer_messages_per_second: f64,
    /// (g) The same of Kafka's own `kafka-producer-perf-test`, same acks, compression, linger and record size.
    kafka_perf_messages_per_second: f64,
    /// (h) Messages per second of a bare consumer of the same topic: nothing decoded, nothing written.
    consumer_messages_per_second: f64,
    /// Mean bytes of a record in (f) and (g): key, headers and value.
    record_bytes: u64,
}

/// Measures and prints.
pub async fn run(settings: &Settings, args: &BenchArgs, terminal: Terminal) -> Result<()> {
    let (sized, bench_heaps) = settings.clone().with_bench_heaps();
    let own = Private::prepare(&sized, private::folder(settings, "bench-")?, terminal).await?;
    let mut stack = Stack::new(own.settings.clone(), terminal);
    let measured = tokio::select! {
        measured = async {
            stack.start(&own.installed, Extent::Servers).await?;
            init(&own.settings, NAME).await?;
            part(&own, args, bench_heaps, terminal).await
        } => measured,
        error = private::interrupted() => Err(error),
    };
    stack.stop().await;
    if measured.is_err() {
        own.keep(terminal);
    }
    measured
}

/// Measures what was asked for; a part other than the drain prints its figures as JSON.
async fn part(own: &Private, args: &BenchArgs, bench_heaps: bool, terminal: Terminal) -> Result<()> {
    let private = &own.settings;
    let figures = match args.part {
        BenchPart::Drain => {
            let figures = all(own, args, bench_heaps, terminal).await?;
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

async fn all(own: &Private, args: &BenchArgs, bench_heaps: bool, terminal: Terminal) -> Result<Figures> {
    let private = &own.settings;
    // The broker's JVM compiles while the topic is filled; then the producer is measured.
    stress(private, NAME, &["--messages", &args.messages.to_string()]).await?;
    let producer = producer(private, args.messages, terminal).await?;
    let perf = kafka_perf::run(private, &own.installed, NAME, args.messages, terminal).await?;
    let bare = bare::Bare::prepare(private, NAME, args, terminal).await?;
    bare.warm_up(terminal).await?;
    let before = bare.run("bare driver", terminal).await?;
    // Also the broker's first group: what it sets up for groups is there before the processor joins one.
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

/// Fills a topic of its own; gives messages per second as the producer itself counts them, all acknowledged.
async fn producer(private: &Settings, messages: u64, terminal: Terminal) -> Result<f64> {
    init(private, PRODUCED).await?;
    let since = Instant::now();
    stress(private, PRODUCED, &["--messages", &messages.to_string()]).await?;
    let log = private.folders.logs().join("stress.log");
    let text = std::fs::read_to_string(&log).map_err(Error::io(&log))?;
    let rate = measure::messages_per_second(&text).unwrap_or(messages as f64 / since.elapsed().as_secs_f64());
    terminal.done(
        "producer",
        &format!("{messages} messages acknowledged, {rate:.0} a second"),
        since.elapsed(),
    );
    Ok(rate)
}

/// `ingest-producer stress` into a topic, to its end.
async fn stress(private: &Settings, name: &str, arguments: &[&str]) -> Result<()> {
    finish(private, name, services::stress(private, arguments)?, PRELOAD_WITHIN).await
}

/// `stream-processor init` of a keyspace and topic.
async fn init(private: &Settings, name: &str) -> Result<()> {
    finish(private, name, services::init(private)?, INIT_WITHIN).await
}

async fn finish(private: &Settings, name: &str, mut spec: Spec, within: Duration) -> Result<()> {
    spec.environment.extend(services::names(name));
    Process::spawn(&spec, &private.folders)?.finished(within).await
}

fn print(figures: &Figures, json: bool, terminal: Terminal) {
    if json {
        terminal.data(&serde_json::to_string(figures).unwrap_or_default());
        return;
    }
    let [before, after] = figures.bare_rows_per_second;
    let row = |what: &str, value: String, aim: &str| [what.to_owned(), value, aim.to_owned()];
    terminal.data(&format!(
        "\n{} events, {} heaps\n",
        figures.messages,
        if figures.bench_heaps { "bench" } else { "small" }
    ));
    terminal.table(
        ["figure", "measured", "aim"],
        &[
            row("(a) bare driver, before and after", format!("{before:.0} and {after:.0} rows/s"), ""),
            row(
                "(b) processor, from its start",
                format!("{:.0} events/s", figures.processor_events_per_second),
                "",
            ),
            row(
                "    processor, once it runs",
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
