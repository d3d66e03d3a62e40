//! Transactions of another program on the events topic: only what is committed may count.

use std::time::Duration;

use tokio::task::JoinHandle;

use super::NAME;
use super::plan::Ending;
use super::recovery::{FaultId, SharedClock};
use crate::config::{Settings, loopback};
use crate::error::{Error, Result};
use crate::servers::kafka::Reader;
use crate::servers::kafka::sender::{Events, Sender};
use crate::terminal::Terminal;

/// Events of one transaction.
const EVENTS: u64 = 200;

/// The transactions of a run, one at a time.
pub(super) struct Transactions {
    settings: Settings,
    clock: SharedClock,
    running: Option<JoinHandle<Result<()>>>,
    number: u64,
    failed: u64,
}

impl Transactions {
    /// No transaction yet.
    pub(super) fn new(settings: &Settings, clock: SharedClock) -> Self {
        Self { settings: settings.clone(), clock, running: None, number: 0, failed: 0 }
    }

    /// Whether one is under way.
    pub(super) fn is_open(&self) -> bool {
        self.running.is_some()
    }

    /// Transactions that Kafka did not take or end as they were meant to.
    pub(super) fn failed(&self) -> u64 {
        self.failed
    }

    /// Begins a transaction that stays open for so long.
    pub(super) fn begin(&mut self, id: FaultId, ending: Ending, open: Duration) {
        self.number += 1;
        let (settings, clock, number) = (self.settings.clone(), self.clock.clone(), self.number);
        self.running = Some(tokio::task::spawn_blocking(move || {
            let outcome = transaction(&settings, number, ending, open);
            clock.end(id);
            outcome
        }));
    }

    /// Notices the end of the transaction that was under way.
    pub(super) async fn tend(&mut self, terminal: Terminal) {
        let Some(ended) = self.running.take_if(|running| running.is_finished()) else { return };
        let outcome = ended.await.unwrap_or_else(|error| Err(Error::Refused(error.to_string())));
        if let Err(error) = outcome {
            // Kafka is struck, too. It ends the transaction by itself after a while.
            self.failed += 1;
            terminal.warning(&format!("transaction {}: {error}", self.number));
        }
    }
}

fn transaction(settings: &Settings, number: u64, ending: Ending, open: Duration) -> Result<()> {
    let brokers = loopback(settings.ports.kafka);
    let value = a_value(settings)?;
    let ids: Vec<String> = (0..EVENTS).map(|event| format!("transaction-{number}-{event}")).collect();
    let time = chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Millis, true);
    let begin = || Sender::begin(&brokers, NAME, NAME);
    let sender = begin()?;
    sender.send(None, Events { ids: &ids, time: &time, value: &value })?;
    std::thread::sleep(open);
    match ending {
        Ending::Committed => sender.end(true),
        Ending::Aborted => sender.end(false),
        Ending::Abandoned => {
            drop(sender);
            begin()?.end(false)
        }
    }
}

/// The value of some event of the load: the stream's definition decides what it must look like.
pub(super) fn a_value(settings: &Settings) -> Result<Vec<u8>> {
    Reader::new(settings, NAME)?.first_value(0)
}
