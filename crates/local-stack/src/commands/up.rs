//! `./run`: checks the machine, starts everything, says what runs where, and stays until it is told to stop.

use std::fs::{self, File, TryLockError};
use std::time::{Duration, Instant};

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::{SUPERVISOR, running};
use crate::checks;
use crate::cli::UpArgs;
use crate::config::{Ports, Settings, loopback};
use crate::error::{Error, Result};
use crate::install::Installed;
use crate::process::{LOOK_AGAIN, Record};
use crate::services;
use crate::stack::{Extent, Stack};
use crate::terminal::Terminal;

/// How often a running stack is looked at for parts that ended.
const WATCH_EVERY: Duration = Duration::from_millis(500);

/// How long ports may stay taken after a stop.
const PORTS_WITHIN: Duration = Duration::from_secs(1);

/// How a start ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Everything runs on without this process.
    Detached,
    /// Everything was stopped on SIGHUP, SIGINT or SIGTERM, whose number is given.
    Stopped(u8),
    /// Everything that was started has ended by itself or was stopped from outside.
    AllEnded,
}

/// Starts everything; in the foreground it also stops everything.
pub async fn up(settings: &Settings, args: &UpArgs, terminal: Terminal) -> Result<Outcome> {
    let extent = if args.servers_only { Extent::Servers } else { Extent::All };
    settings.folders.create()?;
    let _lock = lock(settings)?;
    let mut stop = StopSignals::new()?;
    preflight(settings, extent).await?;
    let since = Instant::now();
    let supervisor = Record::of_this_process(SUPERVISOR).write(&settings.folders.run())?;
    let mut stack = Stack::new(settings.clone(), terminal);
    let started = tokio::select! {
        started = fetch_and_start(&mut stack, settings, extent, terminal) => started.map(|()| None),
        number = stop.received() => Ok(Some(number)),
    };
    let outcome = match started {
        Ok(None) => {
            report(settings, extent, terminal, since.elapsed());
            if args.detach {
                terminal.progress("running in the background: ./run status, ./run logs SERVICE, ./run stop");
                Ok(Outcome::Detached)
            } else {
                terminal.progress("Ctrl-C stops everything");
                Ok(watch(&mut stack, &mut stop, terminal).await)
            }
        }
        Ok(Some(number)) => Ok(Outcome::Stopped(number)),
        Err(error) => Err(error),
    };
    if !matches!(outcome, Ok(Outcome::Detached)) && !stack.is_empty() {
        terminal.progress("stopping everything in order");
        stack.stop().await;
    }
    let _ = fs::remove_file(supervisor);
    outcome
}

async fn fetch_and_start(
    stack: &mut Stack,
    settings: &Settings,
    extent: Extent,
    terminal: Terminal,
) -> Result<()> {
    let installed = Installed::fetch(settings, terminal).await?;
    stack.start(&installed, extent).await
}

/// Two starts of one checkout at once would both find the ports free.
fn lock(settings: &Settings) -> Result<File> {
    let already = || Error::Refused("already running; ./run status shows it, ./run stop ends it".to_owned());
    let path = settings.folders.run().join("lock");
    let file = File::create(&path).map_err(Error::io(&path))?;
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => return Err(already()),
        Err(TryLockError::Error(error)) => return Err(Error::io(path)(error)),
        Ok(()) => {}
    }
    if running(&settings.folders).is_empty() { Ok(file) } else { Err(already()) }
}

async fn preflight(settings: &Settings, extent: Extent) -> Result<()> {
    checks::java(&settings.java)?;
    // The kernel may need a moment to close the sockets of a part that was just stopped.
    let since = Instant::now();
    while checks::ports(settings).is_err() && since.elapsed() < PORTS_WITHIN {
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    checks::ports(settings)?;
    checks::memory(settings.heaps)?;
    checks::disk(&settings.checkout)?;
    checks::disk(&settings.cache)?;
    let missing = services::programs(settings).into_iter().find(|program| !program.is_file());
    match missing {
        Some(program) if extent == Extent::All => Err(Error::Refused(format!(
            "{} is not built; cargo build --release --workspace builds it",
            program.display()
        ))),
        _ => Ok(()),
    }
}

/// Stays until a signal comes or nothing runs any more.
async fn watch(stack: &mut Stack, stop: &mut StopSignals, terminal: Terminal) -> Outcome {
    loop {
        tokio::select! {
            number = stop.received() => return Outcome::Stopped(number),
            () = tokio::time::sleep(WATCH_EVERY) => {
                for (name, line) in stack.ended() {
                    terminal.failure(&line.replace(" while starting", ""));
                    terminal.progress(&format!("everything but {name} runs on; ./run stop and ./run start it again"));
                }
                if stack.is_empty() {
                    return Outcome::AllEnded;
                }
            }
        }
    }
}

fn report(settings: &Settings, extent: Extent, terminal: Terminal, took: Duration) {
    let ports = settings.ports;
    let http = |port: u16, path: &str| format!("http://{}{path}", loopback(port));
    terminal.progress(&format!("\neverything is ready after {:.1} s\n", took.as_secs_f64()));
    let row = |what: &str, address: String, metrics: String| [what.to_owned(), address, metrics];
    let mut rows = Vec::new();
    if extent == Extent::All {
        rows.push(row("page", http(ports.dashboard, "/"), http(ports.dashboard, "/metrics")));
        rows.push(row("API", http(ports.dashboard, "/api/v1/overview"), String::new()));
        rows.push(row("ingest-producer", http(ports.producer, "/readyz"), http(ports.producer, "/metrics")));
        rows.push(row(
            "stream-processor",
            http(ports.processor, "/readyz"),
            http(ports.processor, "/metrics"),
        ));
        rows.push(row("source simulator", http(ports.source, "/"), String::new()));
        if Record::read(&settings.folders.run().join("prometheus.json")).is_some() {
            rows.push(row("Prometheus", http(ports.prometheus, "/"), http(ports.prometheus, "/metrics")));
        }
    }
    rows.push(row("Kafka", loopback(ports.kafka), http(ports.kafka_agent, "/metrics")));
    rows.push(row("Cassandra", loopback(ports.cassandra), http(ports.cassandra_agent, "/metrics")));
    terminal.table(["what", "where", "metrics"], &rows);
    if extent == Extent::All {
        try_next(settings, terminal);
    }
}

fn try_next(settings: &Settings, terminal: Terminal) {
    let ports = settings.ports;
    let brokers = if ports == Ports::default() {
        String::new()
    } else {
        format!("PIPELINE_KAFKA_BROKERS={} ", loopback(ports.kafka))
    };
    let page = loopback(ports.dashboard);
    terminal.data("\ntry next:");
    terminal.data(&format!("  open http://{page}/ and watch the counters"));
    let producer = settings.binaries.join("ingest-producer");
    let producer = producer.strip_prefix(&settings.checkout).unwrap_or(&producer).display();
    terminal.data(&format!("  {brokers}{producer} stress --messages 100000"));
    terminal
        .data("  ./run stop and ./run again: everything goes on where it was, nothing is counted twice\n");
}

struct StopSignals {
    hangup: Signal,
    interrupt: Signal,
    terminate: Signal,
}

impl StopSignals {
    fn new() -> Result<Self> {
        let listen = |kind| signal(kind).map_err(Error::io("signal handler"));
        Ok(Self {
            // The terminal was closed: nobody could press Ctrl-C any more.
            hangup: listen(SignalKind::hangup())?,
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
        })
    }

    /// The number of the signal that came.
    async fn received(&mut self) -> u8 {
        tokio::select! {
            _ = self.hangup.recv() => 1,
            _ = self.interrupt.recv() => 2,
            _ = self.terminate.recv() => 15,
        }
    }
}
