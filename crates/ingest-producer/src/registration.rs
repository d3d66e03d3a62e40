//! Whether the events topic still is what the stream was registered with. Asked before each run and each load: with another
//! number of partitions the same record would go elsewhere, and be counted again.

use crate::error::AttemptError;
use crate::publish::KafkaPublisher;
use async_trait::async_trait;
use common::cassandra::ConnectError;
use common::config::CommonArgs;
use common::kafka;
use common::registry::{RegistryError, changed, check_layout, registered};
use common::shutdown::Shutdown;
use common::stream::Definition;
use rdkafka::consumer::Consumer;
use scylla::client::session::Session;
use std::sync::Arc;
use std::time::Duration;

/// How long processors may take to notice another layout, and to end.
const PROCESSORS_FIRST: Duration = Duration::from_secs(20);
/// How long Kafka may take to describe the topic.
const DEADLINE: Duration = Duration::from_secs(10);

/// Whether no retry changes it: the stream was made otherwise, or it is not known which datacenter to ask.
pub fn is_refusal(error: &anyhow::Error) -> bool {
    error.downcast_ref().is_some_and(RegistryError::is_refusal)
        || matches!(error.downcast_ref(), Some(ConnectError::Datacenter(_)))
}

/// Begins shutdown once `init` has registered another layout, and the processors have had the time to start again: rows of events
/// that they take before would lack the columns that are new.
pub async fn watch(
    session: &Session,
    keyspace: &str,
    definition: &Definition,
    shutdown: &Shutdown,
) -> Result<(), RegistryError> {
    let changed = async {
        let changed = changed(session, keyspace, definition).await;
        tracing::warn!(
            seconds = PROCESSORS_FIRST.as_secs(),
            "{changed}; this producer ends after the processors"
        );
        tokio::time::sleep(PROCESSORS_FIRST).await;
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

/// Refuses a load on its own, which has no [`RegisteredTopic`]. Waits for Kafka and Cassandra, each at most `deadline`.
pub async fn check_load(
    common: &CommonArgs,
    definition: &Definition,
    deadline: Duration,
    shutdown: &Shutdown,
) -> anyhow::Result<()> {
    let (stream, topic) = (&definition.stream.name, common.topic_of(definition));
    let session = common::cassandra::connect(common, deadline, shutdown).await?;
    let registered = check_layout(&session, &common.keyspace, definition).await?;
    let (brokers, name) = (common.kafka_brokers.clone(), topic.clone());
    let found = tokio::task::spawn_blocking(move || {
        let probe = kafka::wait_for_broker(&brokers, deadline)?;
        kafka::describe(probe.client(), &brokers, &name, deadline)
    });
    Ok(registered.check_topic(stream, &topic, &found.await??)?)
}

/// Compares a topic with its stream's registration, or a fake that does not.
#[async_trait]
pub trait CheckTopic: Send + Sync {
    /// Refuses where nothing may be produced.
    async fn check(&self) -> Result<(), AttemptError>;
}

/// The events topic of a registered stream.
pub struct RegisteredTopic {
    /// Whose topic it is.
    pub publisher: Arc<KafkaPublisher>,
    /// Where the registration stands.
    pub session: Arc<Session>,
    /// Keyspace of the registration.
    pub keyspace: String,
    /// The stream.
    pub stream: String,
}

impl RegisteredTopic {
    /// Asks Cassandra and Kafka again, and lets the publisher know the number of partitions.
    pub async fn compare(&self) -> anyhow::Result<()> {
        let registered = registered(&self.session, &self.keyspace, &self.stream).await?;
        let publisher = self.publisher.clone();
        let found = tokio::task::spawn_blocking(move || publisher.describe(DEADLINE)).await??;
        registered.check_topic(&self.stream, self.publisher.topic(), &found)?;
        self.publisher.place_keys_among(found.partitions);
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
