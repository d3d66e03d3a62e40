//! Creates missing topics in Kafka and reads the settings of existing ones.

use super::contract::{FoundTopic, TopicContract};
use super::fatal;
use crate::error::ProcessorError;
use common::runtime::kafka::client_config;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, ResourceSpecifier, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use std::time::Duration;

/// Maximum duration of one administrative request.
pub(super) const ADMIN_DEADLINE: Duration = Duration::from_secs(30);
/// Maximum attempts to fetch the metadata of a topic. Metadata of a new topic reaches the brokers with a delay.
const METADATA_TRIES: u32 = 300;
/// Pause between two attempts to fetch metadata.
const METADATA_PAUSE: Duration = Duration::from_millis(100);

/// An admin client.
pub(super) struct Admin(AdminClient<DefaultClientContext>);

impl Admin {
    pub(super) fn new(brokers: &str, client_id: &str) -> Result<Admin, ProcessorError> {
        client_config(brokers, client_id).create().map(Admin).map_err(|e| fatal("kafka")(&e))
    }

    /// Creates the topics that do not exist, with `factor` replicas. Does not change existing ones.
    pub(super) async fn create_topics(
        &self,
        contracts: &[TopicContract],
        factor: i32,
    ) -> Result<(), ProcessorError> {
        let topics: Vec<NewTopic<'_>> = contracts
            .iter()
            .map(|topic| {
                let new_topic = NewTopic::new(&topic.name, topic.partitions, TopicReplication::Fixed(factor));
                // The broker stores batches as the producers compressed them.
                let new_topic = new_topic.set("compression.type", "producer");
                topic.settings.iter().fold(new_topic, |new_topic, s| new_topic.set(s.name, &s.value))
            })
            .collect();
        let options = AdminOptions::new().operation_timeout(Some(ADMIN_DEADLINE));
        let results = self.0.create_topics(&topics, &options).await;
        for result in results.map_err(|e| fatal("kafka: creating topics")(&e))? {
            match result {
                Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                Err((name, code)) => {
                    return Err(ProcessorError::Fatal(format!("kafka: creating topic {name}: {code}")));
                }
            }
        }
        Ok(())
    }

    /// Returns the number of partitions of a topic, and the smallest number of replicas of any of them. Waits until the
    /// broker lists the topic.
    pub(super) async fn partitions(&self, topic: &str) -> Result<(i32, i32), ProcessorError> {
        let mut last = "the broker does not list it".to_owned();
        for _ in 0..METADATA_TRIES {
            match self.listed(topic) {
                Ok(Some(found)) => return Ok(found),
                Ok(None) => {}
                Err(e) => last = e.to_string(),
            }
            tokio::time::sleep(METADATA_PAUSE).await;
        }
        Err(ProcessorError::Retryable(format!("kafka: no metadata for topic {topic}: {last}")))
    }

    /// Like [`Admin::partitions`], without waiting. `None` if the broker does not list the topic.
    fn listed(&self, topic: &str) -> Result<Option<(i32, i32)>, KafkaError> {
        let metadata =
            tokio::task::block_in_place(|| self.0.inner().fetch_metadata(Some(topic), ADMIN_DEADLINE))?;
        let found = metadata.topics().iter().find(|t| t.name() == topic && t.error().is_none());
        Ok(found.filter(|t| !t.partitions().is_empty()).map(|found| {
            let copies = found.partitions().iter().map(|p| p.replicas().len()).min();
            (found.partitions().len() as i32, copies.unwrap_or(0) as i32)
        }))
    }

    /// Reads the settings of a topic. `None` if the topic does not exist or this user may not read its settings.
    pub(super) async fn settings(&self, topic: &str) -> Result<Option<FoundTopic>, ProcessorError> {
        let failed = |e: &dyn std::fmt::Display| {
            ProcessorError::Retryable(format!("kafka: reading the settings of topic {topic}: {e}"))
        };
        let options = AdminOptions::new().request_timeout(Some(ADMIN_DEADLINE));
        let response = self.0.describe_configs(&[ResourceSpecifier::Topic(topic)], &options).await;
        let resource = match response.map_err(|e| failed(&e))?.into_iter().next() {
            Some(Ok(resource)) => resource,
            Some(Err(
                RDKafkaErrorCode::UnknownTopicOrPartition
                | RDKafkaErrorCode::TopicAuthorizationFailed
                | RDKafkaErrorCode::ClusterAuthorizationFailed,
            )) => return Ok(None),
            Some(Err(code)) => return Err(failed(&code)),
            None => return Err(failed(&"no answer")),
        };
        let settings = resource.entries.into_iter().filter_map(|entry| Some((entry.name, entry.value?)));
        let settings = settings.collect();
        // The topic may have been deleted since its settings were read.
        let listed = self.listed(topic).map_err(|e| failed(&e))?;
        Ok(listed.map(|(_, factor)| FoundTopic { factor, settings }))
    }
}
