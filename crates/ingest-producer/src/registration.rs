//! Checks that the events topic still matches the registration of its stream. The check precedes each run and each
//! load: if the number of partitions changed, the same key would move to another partition and its event would be
//! counted twice.

use crate::error::AttemptError;
use crate::publish::KafkaPublisher;
use async_trait::async_trait;
use common::contracts::stream::Definition;
use common::readers::registry::{RegistryError, changed, check_layout, registered};
use common::runtime::cassandra::ConnectError;
use common::runtime::config::CommonArgs;
use common::runtime::kafka;
use common::runtime::shutdown::Shutdown;
use rdkafka::consumer::Consumer;
use scylla::client::session::Session;
use std::sync::Arc;
use std::time::Duration;

/// How long processors may take to detect a new layout and restart with it.
const PROCESSOR_RESTART_TIME: Duration = Duration::from_secs(20);
/// Timeout of a describe request to Kafka.
const DEADLINE: Duration = Duration::from_secs(10);

/// Whether a restart would fail with the same error: the stream is registered differently, or the datacenter is
/// unknown.
pub fn is_refusal(error: &anyhow::Error) -> bool {
    error.downcast_ref().is_some_and(RegistryError::is_refusal)
        || matches!(error.downcast_ref(), Some(ConnectError::Datacenter(_)))
}

/// Starts shutdown after `init` has registered another layout and the processors have had time to restart. A processor
/// with the old layout would write the rows of new events without the new columns.
pub async fn watch(
    session: &Session,
    keyspace: &str,
    definition: &Definition,
    shutdown: &Shutdown,
) -> Result<(), RegistryError> {
    let changed = async {
        let changed = changed(session, keyspace, definition).await;
        tracing::warn!(
            seconds = PROCESSOR_RESTART_TIME.as_secs(),
            "{changed}; this producer shuts down after the processors have restarted"
        );
        tokio::time::sleep(PROCESSOR_RESTART_TIME).await;
        changed
    };
    tokio::select! {
        () = shutdown.begun() => Ok(()),
        changed = changed => {
            shutdown.begin();
            Err(changed)
        }
    }
}

/// Checks the topic before a `stress` command, which has no [`RegisteredTopic`]. Waits at most `deadline` each for
/// Kafka and Cassandra.
pub async fn check_load(
    common: &CommonArgs,
    definition: &Definition,
    deadline: Duration,
    shutdown: &Shutdown,
) -> anyhow::Result<()> {
    let (stream, topic) = (&definition.stream.name, common.topic_of(definition));
    let session = common::runtime::cassandra::connect(common, deadline, shutdown).await?;
    let registered = check_layout(&session, &common.keyspace, definition).await?;
    let (brokers, name) = (common.kafka_brokers.clone(), topic.clone());
    let found = tokio::task::spawn_blocking(move || {
        let probe = kafka::wait_for_broker(&brokers, deadline)?;
        kafka::describe(probe.client(), &brokers, &name, deadline)
    });
    Ok(registered.check_topic(stream, &topic, &found.await??)?)
}

/// Checks a topic against the registration of its stream. Tests use a fake.
#[async_trait]
pub trait CheckTopic: Send + Sync {
    /// Fails if nothing may be produced to the topic.
    async fn check(&self) -> Result<(), AttemptError>;
}

/// The events topic of a registered stream.
pub struct RegisteredTopic {
    /// The publisher that produces to the topic.
    pub publisher: Arc<KafkaPublisher>,
    /// The session that reads the registration.
    pub session: Arc<Session>,
    /// Keyspace of the registration.
    pub keyspace: String,
    /// Name of the stream.
    pub stream: String,
}

impl RegisteredTopic {
    /// Compares the topic in Kafka with the registration in Cassandra and passes the number of partitions to the
    /// publisher.
    pub async fn compare(&self) -> anyhow::Result<()> {
        let registered = registered(&self.session, &self.keyspace, &self.stream).await?;
        let publisher = self.publisher.clone();
        let found = tokio::task::spawn_blocking(move || publisher.describe(DEADLINE)).await??;
        registered.check_topic(&self.stream, self.publisher.topic(), &found)?;
        self.publisher.set_partitions(found.partitions);
        Ok(())
    }
}

#[async_trait]
impl CheckTopic for RegisteredTopic {
    async fn check(&self) -> Result<(), AttemptError> {
        self.compare().await.map_err(|error| {
            let attempt_error =
                if is_refusal(&error) { AttemptError::fatal } else { AttemptError::retryable };
            attempt_error(format!("{error:#}"))
        })
    }
}
