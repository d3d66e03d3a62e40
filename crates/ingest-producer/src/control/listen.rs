//! Reads the control topic. Offsets are never committed. Each assignment starts at the first record of the topic, and
//! the control log tells which commands are already handled.

use super::Control;
use crate::ledger::{Ledger, LedgerError};
use anyhow::Context;
use common::contracts::control;
use common::runtime::kafka::{KafkaError, Replaced, client_config};
use common::runtime::shutdown::Shutdown;
use rdkafka::Message;
use rdkafka::consumer::{Consumer, StreamConsumer};
use rdkafka::error::RDKafkaErrorCode;
use std::sync::Arc;
use std::time::Duration;

/// Interval at which running commands of other processes are checked.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// Pause before a failed request is retried.
const PAUSE: Duration = Duration::from_millis(500);
/// Session timeout of the consumer group: how long it waits for a killed member.
const SESSION_MS: &str = "6000";

/// The source of commands.
#[derive(Debug, Clone)]
pub struct Source {
    /// Kafka bootstrap servers.
    pub brokers: String,
    /// The control topic.
    pub topic: String,
    /// Name of the stream, which is part of the group id.
    pub stream: String,
}

/// Executes commands until shutdown.
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
        // Commands are few and small.
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
    .context("cannot create a consumer of the control topic")?;
    let mut checks = tokio::time::interval(CHECK_INTERVAL);
    loop {
        let consumer = consumers.get().context("cannot create a consumer of the control topic")?;
        let received = tokio::select! {
            () = shutdown.begun() => break,
            _ = checks.tick() => {
                control.interrupt_orphaned().await;
                continue;
            }
            message = consumer.recv() => match message {
                Ok(m) => control::read(m.payload().unwrap_or_default(), m.offset(), m.timestamp().to_millis().unwrap_or(0)),
                Err(error) => {
                    tracing::debug!(%error, topic = source.topic, "reading the control topic failed; retrying");
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
                LedgerError::Unavailable(_) => {
                    tracing::debug!(%error, "the control log is unavailable; retrying")
                }
                // The next command may still succeed.
                LedgerError::Refused(_) => {
                    tracing::error!(%error, id = received.key.id, "a command cannot be recorded and is skipped");
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

/// Waits until a producer has planned the stream. Before that, it can be neither paused nor backfilled.
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
