//! Writes to the events topic in transactions, like another program. Only committed events may be counted.

use std::time::Duration;

use local_stack::config::{Settings, loopback};
use local_stack::error::{Error, Result};
use local_stack::terminal::Terminal;
use tokio::task::JoinHandle;

use super::NAME;
use super::plan::TransactionEnd;
use super::recovery::{FaultId, SharedClock};
use crate::kafka::TopicReader;
use crate::kafka::sender::{Events, Sender};

/// Number of events per transaction.
const EVENTS: u64 = 200;

/// Runs the transactions of a soak, one at a time.
pub(super) struct Transactions {
    settings: Settings,
    clock: SharedClock,
    running: Option<JoinHandle<Result<()>>>,
    number: u64,
    failed: u64,
}

impl Transactions {
    /// Creates the runner without an open transaction.
    pub(super) fn new(settings: &Settings, clock: SharedClock) -> Self {
        Self { settings: settings.clone(), clock, running: None, number: 0, failed: 0 }
    }

    /// Returns whether a transaction is open.
    pub(super) fn is_open(&self) -> bool {
        self.running.is_some()
    }

    /// Returns the number of transactions that failed or could not be ended as planned.
    pub(super) fn failed(&self) -> u64 {
        self.failed
    }

    /// Begins a transaction that stays open for the duration `open`.
    pub(super) fn begin(&mut self, id: FaultId, ending: TransactionEnd, open: Duration) {
        self.number += 1;
        let (settings, clock, number) = (self.settings.clone(), self.clock.clone(), self.number);
        self.running = Some(tokio::task::spawn_blocking(move || {
            let outcome = transaction(&settings, number, ending, open);
            clock.end(id);
            outcome
        }));
    }

    /// Detects that the open transaction has ended, and reports its failure.
    pub(super) async fn poll(&mut self, terminal: Terminal) {
        let Some(ended) = self.running.take_if(|running| running.is_finished()) else { return };
        let outcome = ended.await.unwrap_or_else(|error| Err(Error::Refused(error.to_string())));
        if let Err(error) = outcome {
            // Faults hit Kafka too. It aborts the transaction after the transaction timeout.
            self.failed += 1;
            terminal.warning(&format!("transaction {} failed: {error}", self.number));
        }
    }
}

fn transaction(settings: &Settings, number: u64, ending: TransactionEnd, open: Duration) -> Result<()> {
    let brokers = loopback(settings.ports.kafka);
    let value = sample_value(settings)?;
    let ids: Vec<String> = (0..EVENTS).map(|event| format!("transaction-{number}-{event}")).collect();
    let time = chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Millis, true);
    let begin = || Sender::begin(&brokers, NAME, NAME);
    let sender = begin()?;
    sender.send(None, Events { ids: &ids, time: &time, value: &value })?;
    std::thread::sleep(open);
    match ending {
        TransactionEnd::Committed => sender.end(true),
        TransactionEnd::Aborted => sender.end(false),
        TransactionEnd::Abandoned => {
            drop(sender);
            begin()?.end(false)
        }
    }
}

/// Returns the value of an event of the load, so that it matches the stream definition.
pub(super) fn sample_value(settings: &Settings) -> Result<Vec<u8>> {
    TopicReader::new(settings, NAME)?.first_value(0)
}
