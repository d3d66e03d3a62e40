//! `./run`: checks the machine, starts all parts, prints their addresses, and restarts parts that exit until a signal
//! stops it.

use std::fs::{self, File, TryLockError};
use std::time::{Duration, Instant};

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::{SUPERVISOR, remove_records, running};
use crate::checks;
use crate::cli::UpArgs;
use crate::config::{Ports, Settings, loopback};
use crate::error::{Error, Result};
use crate::install::Installed;
use crate::process::{POLL_INTERVAL, Record};
use crate::services;
use crate::stack::{Extent, Stack};
use crate::supervise::Change;
use crate::terminal::Terminal;

/// Poll interval for parts that have exited or are due for a restart.
const SUPERVISE_INTERVAL: Duration = Duration::from_millis(100);

/// How long to wait for ports to become free after a previous stop.
const PORTS_TIMEOUT: Duration = Duration::from_secs(1);

/// How the command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All parts run under a supervisor in the background.
    Detached,
    /// The supervisor in the background has exited and printed the reason.
    Failed,
    /// All parts were stopped by SIGHUP, SIGINT or SIGTERM. Holds the signal number.
    Stopped(u8),
}

/// Starts all parts, keeps them running until a signal arrives, then stops them.
pub async fn up(settings: &Settings, args: &UpArgs, terminal: Terminal) -> Result<Outcome> {
    let extent = if args.servers_only { Extent::Servers } else { Extent::All };
    settings.folders.create()?;
    let _lock = lock(settings)?;
    let mut stop = StopSignals::new(args.supervise)?;
    preflight(settings, extent).await?;
    remove_records(&settings.folders);
    let since = Instant::now();
    let mut record = Record::of_this_process(SUPERVISOR);
    let record_file = record.write(&settings.folders.run())?;
    let mut stack = Stack::new(settings.clone(), terminal);
    let started = tokio::select! {
        started = fetch_and_start(&mut stack, settings, extent, terminal) => started.map(|()| None),
        number = stop.received() => Ok(Some(number)),
    };
    let outcome = match started {
        Ok(None) => {
            print_summary(settings, extent, terminal, since.elapsed());
            terminal.progress(if args.supervise {
                "running in the background; use ./run status, ./run logs SERVICE or ./run stop"
            } else {
                "Ctrl-C stops everything"
            });
            // A record with an address tells the waiting `./run --detach` that everything is ready.
            record.address = format!("http://{}", loopback(settings.ports.dashboard));
            record.write(&settings.folders.run())?;
            Ok(watch(&mut stack, &mut stop, terminal).await)
        }
        Ok(Some(number)) => Ok(number),
        Err(error) => Err(error),
    };
    if !stack.is_empty() {
        terminal.progress("stopping all parts in order");
        stack.stop().await;
    }
    let _ = fs::remove_file(record_file);
    outcome.map(Outcome::Stopped)
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

/// Locks the checkout. Without the lock, two concurrent starts could both find the ports free.
fn lock(settings: &Settings) -> Result<File> {
    let path = settings.folders.run().join("lock");
    let file = File::create(&path).map_err(Error::io(&path))?;
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => return Err(Error::already_running()),
        Err(TryLockError::Error(error)) => return Err(Error::io(path)(error)),
        Ok(()) => {}
    }
    if running(&settings.folders).is_empty() { Ok(file) } else { Err(Error::already_running()) }
}

async fn preflight(settings: &Settings, extent: Extent) -> Result<()> {
    checks::java(&settings.java)?;
    // The kernel may still be closing the sockets of a part that has just stopped.
    let since = Instant::now();
    while checks::ports(settings).is_err() && since.elapsed() < PORTS_TIMEOUT {
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    checks::ports(settings)?;
    checks::memory(settings.heaps)?;
    checks::disk(&settings.checkout)?;
    checks::disk(&settings.cache)?;
    if extent == Extent::All {
        for program in services::PROGRAMS {
            settings.program(program)?;
        }
    }
    Ok(())
}

/// Restarts parts that exit until a signal arrives. Returns the signal number.
async fn watch(stack: &mut Stack, stop: &mut StopSignals, terminal: Terminal) -> u8 {
    loop {
        tokio::select! {
            number = stop.received() => return number,
            () = tokio::time::sleep(SUPERVISE_INTERVAL) => {
                for (name, change) in stack.poll() {
                    print_change(terminal, &name, change);
                }
            }
        }
    }
}

fn print_change(terminal: Terminal, name: &str, change: Result<Change>) {
    let at = chrono::Utc::now().format("%H:%M:%SZ");
    let suffix = |cause: &str| if cause.is_empty() { String::new() } else { format!(": {cause}") };
    match change {
        Ok(Change::Ended(down, pause)) => {
            let (ended, cause, delay) = (&down.ended, suffix(&down.last_words), pause.as_secs_f64());
            terminal.failure(&format!("{at} {name} exited ({ended}){cause}; restarting it in {delay:.1} s"));
        }
        Ok(Change::Refused(down)) => {
            let cause = suffix(&down.last_words);
            terminal.failure(&format!(
                "{at} {name} refuses to run{cause}; see ./run logs {name}, fix the cause, then ./run stop and ./run"
            ));
        }
        Ok(Change::Restarted(count)) => {
            terminal.warning(&format!("{at} {name} restarted (restart {count})"));
        }
        Err(error) => terminal
            .failure(&format!("{at} {name} could not be restarted: {error}; trying again after a delay")),
    }
}

fn print_summary(settings: &Settings, extent: Extent, terminal: Terminal, took: Duration) {
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
    terminal.table(["name", "address", "metrics"], &rows);
    if extent == Extent::All {
        print_next_steps(settings, terminal);
    }
}

fn print_next_steps(settings: &Settings, terminal: Terminal) {
    let ports = settings.ports;
    let brokers = if ports == Ports::default() {
        String::new()
    } else {
        format!("PIPELINE_KAFKA_BROKERS={} ", loopback(ports.kafka))
    };
    let page = loopback(ports.dashboard);
    terminal.data("\nnext steps:");
    terminal.data(&format!("  open http://{page}/ and watch the counters"));
    let producer = settings.binaries.join("ingest-producer");
    let producer = producer.strip_prefix(&settings.checkout).unwrap_or(&producer).display();
    terminal.data(&format!("  {brokers}{producer} stress --messages 100000"));
    terminal.data(
        "  kill -9 $(pgrep -f 'stream-processor run')   # it is restarted, and no event is counted twice\n",
    );
}

/// The signals that stop all parts.
pub(super) struct StopSignals {
    background: bool,
    hangup: Signal,
    interrupt: Signal,
    terminate: Signal,
}

impl StopSignals {
    /// Starts to listen for the signals. In the background, SIGHUP is ignored, so that closing the terminal stops
    /// nothing.
    pub(super) fn new(background: bool) -> Result<Self> {
        let listen = |kind| signal(kind).map_err(Error::io("signal handler"));
        Ok(Self {
            background,
            // In the foreground, SIGHUP stops everything: after the terminal is closed, nobody can press Ctrl-C.
            hangup: listen(SignalKind::hangup())?,
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
        })
    }

    /// Waits for a signal and returns its number.
    pub(super) async fn received(&mut self) -> u8 {
        loop {
            tokio::select! {
                _ = self.hangup.recv() => if !self.background { return 1 },
                _ = self.interrupt.recv() => return 2,
                _ = self.terminate.recv() => return 15,
            }
        }
    }
}
