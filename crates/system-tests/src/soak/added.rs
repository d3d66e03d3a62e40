//! The last fault of a run: partitions are added to the topic that are not registered for the stream. The processors
//! must not process them and must report them, a new producer must refuse to run, and processing of the registered
//! partitions must continue.

use std::time::{Duration, Instant};

use local_stack::config::{Settings, loopback};
use local_stack::error::{Error, Result};
use local_stack::servers::metric;
use local_stack::terminal::Terminal;
use serde::Serialize;

use super::NAME;
use super::fleet::Fleet;
use super::plan::Part;
use super::transactions::sample_value;
use crate::kafka::add_partitions;
use crate::kafka::sender::{Events, Sender};

/// Number of events sent to each partition.
const EVENTS: u64 = 100;

/// Time limit for the processors and the producer to notice. librdkafka checks for new partitions every 30 s.
const NOTICED_TIMEOUT: Duration = Duration::from_secs(120);

/// Poll interval for the metric of the processors.
const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// Metric with the number of added partitions that are assigned to a processor and not processed.
const UNREGISTERED: &str = "processor_unregistered_partitions";

/// Result of adding partitions. The oracle checks that no event in them was processed.
#[derive(Clone, Debug, Serialize)]
pub struct AddedPartitions {
    /// Number of partitions added.
    pub partitions: i32,
    /// Number of events sent to the added partitions.
    pub events: u64,
    /// Whether the processors reported all added partitions as unregistered.
    pub noticed: bool,
    /// Whether a new producer exited with the exit code of a refusal.
    pub refused: bool,
}

impl AddedPartitions {
    /// Returns whether the processors and the producer behaved as expected.
    pub fn passed(&self) -> bool {
        self.noticed && self.refused
    }
}

/// Doubles the number of partitions, sends events to all of them, and waits until the producer and the processors have
/// noticed.
pub(super) async fn add(
    settings: &Settings,
    fleet: &mut Fleet,
    registered: i32,
    terminal: Terminal,
) -> Result<AddedPartitions> {
    terminal.started("fault", "adding partitions");
    let since = Instant::now();
    let brokers = loopback(settings.ports.kafka);
    add_partitions(&brokers, NAME, 2 * registered as usize).await?;
    let of_events = settings.clone();
    let sent = tokio::task::spawn_blocking(move || send(&of_events, 2 * registered));
    sent.await.map_err(|error| Error::Refused(error.to_string()))??;
    // With added partitions, a running producer fails every run. A new producer exits at once.
    let refused = fleet.refuses(Part::Ingest, NOTICED_TIMEOUT).await?;
    let deadline = Instant::now() + NOTICED_TIMEOUT;
    let noticed = loop {
        fleet.poll().await?;
        if unregistered(&fleet.processors()).await == f64::from(registered) {
            break true;
        }
        if Instant::now() > deadline {
            break false;
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    };
    terminal.done("fault", "added partitions noticed", since.elapsed());
    Ok(AddedPartitions { partitions: registered, events: registered as u64 * EVENTS, noticed, refused })
}

fn send(settings: &Settings, partitions: i32) -> Result<()> {
    let value = sample_value(settings)?;
    let time = chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Millis, true);
    let sender = Sender::new(&loopback(settings.ports.kafka), NAME)?;
    for partition in 0..partitions {
        let ids: Vec<String> = (0..EVENTS).map(|event| format!("added-{partition}-{event}")).collect();
        sender.send(Some(partition), Events { ids: &ids, time: &time, value: &value })?;
    }
    Ok(())
}

/// Returns the sum of the metric over all processors.
async fn unregistered(processors: &[String]) -> f64 {
    let mut sum = 0.0;
    for processor in processors {
        sum += metric(processor, UNREGISTERED).await.unwrap_or_default();
    }
    sum
}
