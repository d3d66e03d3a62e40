//! Reads the control topic. No position is ever committed: each assignment begins at the topic's first record, and the log
//! says which commands are dealt with.

use super::Control;
use crate::ledger::{Ledger, LedgerError};
use anyhow::Context;
use common::control;
use common::kafka::{KafkaError, Replaced, client_config};
use common::shutdown::Shutdown;
use rdkafka::Message;
use rdkafka::consumer::{Consumer, StreamConsumer};
use rdkafka::error::RDKafkaErrorCode;
use std::sync::Arc;
use std::time::Duration;

/// How often running commands of other processes are looked after.
const LOOK: Duration = Duration::from_secs(1);
/// Pause before a server that failed is asked again.
const PAUSE: Duration = Duration::from_millis(500);
/// How long the group waits for a member that was killed.
const SESSION_MS: &str = "6000";

/// Where commands come from.
#[derive(Debug, Clone)]
pub struct Source {
    /// Bootstrap servers.
    pub brokers: String,
    /// The control topic.
    pub topic: String,
    /// The stream; part of the group's name.
    pub stream: String,
}

/// Carries commands out until shutdown.
pub async fn listen(
    mut control: Control,
    source: Source,
    ledger: Arc<dyn Ledger>,
    shutdown: Shutdown,
) -> anyhow::Result<()> {
    wait_for_schedule(&*ledger, &shutdown).await;
    let group = format!("ingest-producer.{}.{}", source.topic, source.stream);
    let mut config = client_config(&source.brokers, "ingest-producer-control");
    config
        .set("group.id", group)
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        .set("auto.offset.reset", "earliest")
        .set("partition.assignment.strategy", "cooperative-sticky")
        .set("session.timeout.ms", SESSION_MS)
        .set("heartbeat.interval.ms", "1000")
        // People's commands are few and short.
        .set("queued.max.messages.kbytes", "1024");
    let topic = source.topic.clone();
    let subscribed = move || {
        let consumer: StreamConsumer = config.create()?;
        consumer.subscribe(&[&topic])?;
        Ok(consumer)
    };
    let consumers = Replaced::new(move || {
        subscribed().map_err(|e: rdkafka::error::KafkaError| KafkaError::Client(e.to_string()))
    })
    .context("control topic")?;
    let mut looks = tokio::time::interval(LOOK);
    loop {
        let consumer = consumers.get().context("control topic")?;
        let received = tokio::select! {
            () = shutdown.begun() => break,
            _ = looks.tick() => {
                control.look_after().await;
                continue;
            }
            message = consumer.recv() => match message {
                Ok(m) => control::read(m.payload().unwrap_or_default(), m.offset(), m.timestamp().to_millis().unwrap_or(0)),
                Err(error) => {
                    tracing::debug!(%error, topic = source.topic, "control topic");
                    if error.rdkafka_error_code() == Some(RDKafkaErrorCode::AllBrokersDown) {
                        consumers.doubt(&error);
                    }
                    pause(&shutdown).await;
                    continue;
                }
            },
        };
        while let Err(error) = control.handle(&received).await {
            match error {
                LedgerError::Unavailable(_) => tracing::debug!(%error, "control log"),
                // Another command may fare better.
                LedgerError::Refused(_) => {
                    tracing::error!(%error, id = received.key.id, "a command cannot be recorded, and is not begun");
                    break;
                }
            }
            pause(&shutdown).await;
            if shutdown.has_begun() {
                break;
            }
        }
    }
    control.stop().await;
    Ok(())
}

/// A stream that no producer has planned yet can be neither paused nor backfilled.
async fn wait_for_schedule(ledger: &dyn Ledger, shutdown: &Shutdown) {
    while !shutdown.has_begun() {
        if ledger.stream_state().await.is_ok_and(|state| state.schedules.is_some()) {
            return;
        }
        pause(shutdown).await;
    }
}

async fn pause(shutdown: &Shutdown) {
    tokio::select! {
        () = shutdown.begun() => {}
        () = tokio::time::sleep(PAUSE) => {}
    }
}
