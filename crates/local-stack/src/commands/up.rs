//! `./run`: checks the machine, starts everything, says what runs where, and stays until it is told to stop; meanwhile it starts
//! again what ends.

use std::fs::{self, File, TryLockError};
use std::time::{Duration, Instant};

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::{SUPERVISOR, forget_all, running};
use crate::checks;
use crate::cli::UpArgs;
use crate::config::{Ports, Settings, loopback};
use crate::error::{Error, Result};
use crate::install::Installed;
use crate::process::{LOOK_AGAIN, Record};
use crate::services;
use crate::stack::{Extent, Stack};
use crate::supervise::Change;
use crate::terminal::Terminal;

/// How often a running stack is looked at for parts that ended or are to start again.
const WATCH_EVERY: Duration = Duration::from_millis(100);

/// How long ports may stay taken after a stop.
const PORTS_WITHIN: Duration = Duration::from_secs(1);

/// How a start ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Everything runs on under a supervisor in the background.
    Detached,
    /// The supervisor in the background has ended, and said why.
    Failed,
    /// Everything was stopped on SIGHUP, SIGINT or SIGTERM, whose number is given.
    Stopped(u8),
}

/// Starts everything, keeps it running until a signal comes, and stops everything.
pub async fn up(settings: &Settings, args: &UpArgs, terminal: Terminal) -> Result<Outcome> {
    let extent = if args.servers_only { Extent::Servers } else { Extent::All };
    settings.folders.create()?;
    let _lock = lock(settings)?;
    let mut stop = StopSignals::new(args.supervise)?;
    preflight(settings, extent).await?;
    forget_all(&settings.folders);
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
            report(settings, extent, terminal, since.elapsed());
            terminal.progress(if args.supervise {
                "running in the background: ./run status, ./run logs SERVICE, ./run stop"
            } else {
                "Ctrl-C stops everything"
            });
            // The address tells whoever waits that everything is ready.
            record.address = format!("http://{}", loopback(settings.ports.dashboard));
            record.write(&settings.folders.run())?;
            Ok(watch(&mut stack, &mut stop, terminal).await)
        }
        Ok(Some(number)) => Ok(number),
        Err(error) => Err(error),
    };
    if !stack.is_empty() {
        terminal.progress("stopping everything in order");
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

/// Two starts of one checkout at once would both find the ports free.
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

/// Keeps everything running until a signal comes; gives its number.
async fn watch(stack: &mut Stack, stop: &mut StopSignals, terminal: Terminal) -> u8 {
    loop {
        tokio::select! {
            number = stop.received() => return number,
            () = tokio::time::sleep(WATCH_EVERY) => {
                for (name, change) in stack.tend() {
                    tell(terminal, &name, change);
                }
            }
        }
    }
}

fn tell(terminal: Terminal, name: &str, change: Result<Change>) {
    let at = chrono::Utc::now().format("%H:%M:%SZ");
    let said = |words: &str| if words.is_empty() { String::new() } else { format!(": {words}") };
    match change {
        Ok(Change::Ended(down, pause)) => {
            let (ended, words, pause) = (&down.ended, said(&down.words), pause.as_secs_f64());
            terminal.failure(&format!("{at} {name} ended ({ended}){words}; it starts again in {pause:.1} s"));
        }
        Ok(Change::Refused(down)) => {
            let words = said(&down.words);
            terminal.failure(&format!(
                "{at} {name} refuses to run{words}; it stays down: see ./run logs {name}, then ./run stop and ./run"
            ));
        }
        Ok(Change::Restarted(count)) => {
            terminal.warning(&format!("{at} {name} was started again, restart {count}"));
        }
        Err(error) => terminal.failure(&format!("{at} {name} cannot be started again yet: {error}")),
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
        .data("  kill -9 $(pgrep -f 'stream-processor run'): it starts again, nothing is counted twice\n");
}

/// The signals on which everything stops.
pub(super) struct StopSignals {
    background: bool,
    hangup: Signal,
    interrupt: Signal,
    terminate: Signal,
}

impl StopSignals {
    /// Listens from now on. In the background a closed terminal is no reason to stop.
    pub(super) fn new(background: bool) -> Result<Self> {
        let listen = |kind| signal(kind).map_err(Error::io("signal handler"));
        Ok(Self {
            background,
            // In the foreground nobody could press Ctrl-C any more.
            hangup: listen(SignalKind::hangup())?,
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
        })
    }

    /// The number of the signal that came.
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
