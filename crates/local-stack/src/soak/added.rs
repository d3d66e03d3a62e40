//! The last fault of a run: the topic gets partitions that the stream was not registered with. The processors must leave them
//! alone and say so, the producer must refuse, and the registered partitions go on.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::NAME;
use super::fleet::Fleet;
use super::plan::Part;
use super::transactions::a_value;
use crate::config::{Settings, loopback};
use crate::error::{Error, Result};
use crate::servers::kafka::add_partitions;
use crate::servers::kafka::sender::{Events, Sender};
use crate::servers::metric;
use crate::terminal::Terminal;

/// Events sent to each partition.
const EVENTS: u64 = 100;

/// How long processors and producer may take; librdkafka looks for new partitions every 30 s.
const NOTICED_WITHIN: Duration = Duration::from_secs(120);

/// How often the processors are asked.
const ASK_EVERY: Duration = Duration::from_millis(500);

/// Added partitions that a processor was assigned, and left alone.
const UNREGISTERED: &str = "processor_unregistered_partitions";

/// What became of the added partitions. That nothing of them was processed is for the oracle to say.
#[derive(Clone, Debug, Serialize)]
pub struct Added {
    /// How many partitions were added.
    pub partitions: i32,
    /// Events sent to them.
    pub events: u64,
    /// The processors counted all of them as unregistered.
    pub noticed: bool,
    /// A new producer ended with the exit code of a refusal.
    pub refused: bool,
}

impl Added {
    /// Whether everybody did what is promised.
    pub fn passed(&self) -> bool {
        self.noticed && self.refused
    }
}

/// Doubles the number of partitions, sends events to all of them, and waits until everybody has noticed.
pub(super) async fn add(
    settings: &Settings,
    fleet: &mut Fleet,
    registered: i32,
    terminal: Terminal,
) -> Result<Added> {
    terminal.begins("fault", "partitions added");
    let since = Instant::now();
    let brokers = loopback(settings.ports.kafka);
    add_partitions(&brokers, NAME, 2 * registered as usize).await?;
    let of_events = settings.clone();
    let sent = tokio::task::spawn_blocking(move || send(&of_events, 2 * registered));
    sent.await.map_err(|error| Error::Refused(error.to_string()))??;
    // A running producer fails each run with this cause; a new one does not run at all.
    let refused = fleet.refuses(Part::Ingest, NOTICED_WITHIN).await?;
    let deadline = Instant::now() + NOTICED_WITHIN;
    let noticed = loop {
        fleet.tend().await?;
        if unregistered(&fleet.processors()).await == f64::from(registered) {
            break true;
        }
        if Instant::now() > deadline {
            break false;
        }
        tokio::time::sleep(ASK_EVERY).await;
    };
    terminal.done("fault", "added partitions noticed", since.elapsed());
    Ok(Added { partitions: registered, events: registered as u64 * EVENTS, noticed, refused })
}

fn send(settings: &Settings, partitions: i32) -> Result<()> {
    let value = a_value(settings)?;
    let time = chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Millis, true);
    let sender = Sender::new(&loopback(settings.ports.kafka), NAME)?;
    for partition in 0..partitions {
        let ids: Vec<String> = (0..EVENTS).map(|event| format!("added-{partition}-{event}")).collect();
        sender.send(Some(partition), Events { ids: &ids, time: &time, value: &value })?;
    }
    Ok(())
}

/// What all processors together count.
async fn unregistered(processors: &[String]) -> f64 {
    let mut sum = 0.0;
    for processor in processors {
        sum += metric(processor, UNREGISTERED).await.unwrap_or_default();
    }
    sum
}
