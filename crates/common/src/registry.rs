//! The row of table `streams`: what `stream-processor init` wrote once, and every service must agree with.

use crate::cassandra::{Failure, classify};
use crate::kafka::Topic;
use crate::stream::Definition;
use scylla::client::session::Session;

/// A stream as it was made.
#[derive(Debug, PartialEq, Eq)]
pub struct Registered {
    /// Layout of the stream.
    pub layout: String,
    /// Kafka cluster.
    pub cluster_id: String,
    /// Partitions of the events topic.
    pub partitions: i32,
}

/// Why a service does not work on a stream.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// Nothing says how it was made.
    #[error("stream `{stream}` is not set up ({cause}); run `stream-processor init` first")]
    NotSetUp {
        /// The stream.
        stream: String,
        /// The driver's words.
        cause: String,
    },
    /// Cassandra did not answer.
    #[error("cassandra does not answer what stream `{stream}` was registered with: {cause}")]
    Unavailable {
        /// The stream.
        stream: String,
        /// The driver's words.
        cause: String,
    },
    /// It was made otherwise: exit code 3.
    #[error(
        "stream `{stream}` is registered in another shape\n  registered: {registered}\n  now:        {now}\n\
         put the old definition and servers back, or give the changed stream a new name"
    )]
    Another {
        /// The stream.
        stream: String,
        /// As it was made.
        registered: String,
        /// As it would be now.
        now: String,
    },
    /// Its topic has another number of partitions: exit code 3.
    #[error(
        "topic `{topic}` has {found} partitions, but stream `{stream}` was registered with {registered}: keys hash to other \
         partitions than before, so repeated events would be counted twice. Kafka cannot remove partitions: give the stream a \
         new name, or delete the topic, create it again with {registered} partitions and fill it from a copy"
    )]
    OtherPartitions {
        /// The stream.
        stream: String,
        /// Its topic.
        topic: String,
        /// As it was made.
        registered: i32,
        /// As it is.
        found: i32,
    },
    /// Its topic is in another cluster: exit code 3.
    #[error(
        "the Kafka cluster is `{found}`, but stream `{stream}` was registered with cluster `{registered}`: point \
         PIPELINE_KAFKA_BROKERS at that cluster, or give the stream a new name"
    )]
    OtherCluster {
        /// The stream.
        stream: String,
        /// As it was made.
        registered: String,
        /// As it is.
        found: String,
    },
}

impl RegistryError {
    /// Whether the stream was made otherwise, which no retry changes: exit code 3.
    pub fn is_refusal(&self) -> bool {
        !matches!(self, RegistryError::NotSetUp { .. } | RegistryError::Unavailable { .. })
    }
}

impl Registered {
    /// Refuses a topic that is not the one that stream `stream` was made with.
    pub fn check_topic(&self, stream: &str, topic: &str, found: &Topic) -> Result<(), RegistryError> {
        let stream = stream.to_owned();
        if found.cluster_id != self.cluster_id {
            let (registered, found) = (self.cluster_id.clone(), found.cluster_id.clone());
            return Err(RegistryError::OtherCluster { stream, registered, found });
        }
        if found.partitions != self.partitions {
            let (registered, found) = (self.partitions, found.partitions);
            return Err(RegistryError::OtherPartitions {
                stream,
                topic: topic.to_owned(),
                registered,
                found,
            });
        }
        Ok(())
    }
}

/// Reads how a stream was made.
pub async fn registered(
    session: &Session,
    keyspace: &str,
    stream: &str,
) -> Result<Registered, RegistryError> {
    let select = format!("SELECT layout, cluster_id, partitions FROM {keyspace}.streams WHERE stream = ?");
    let not_set_up = |cause: &dyn std::fmt::Display| RegistryError::NotSetUp {
        stream: stream.to_owned(),
        cause: cause.to_string(),
    };
    let rows = session.query_unpaged(select, (stream,)).await.map_err(|e| match classify(&e) {
        Failure::Refused => not_set_up(&e),
        Failure::Overloaded | Failure::Unavailable => {
            RegistryError::Unavailable { stream: stream.to_owned(), cause: e.to_string() }
        }
    })?;
    let rows = rows.into_rows_result().map_err(|e| not_set_up(&e))?;
    let row = rows.maybe_first_row::<(String, String, i32)>().map_err(|e| not_set_up(&e))?;
    let (layout, cluster_id, partitions) = row.ok_or_else(|| not_set_up(&"no row in table streams"))?;
    Ok(Registered { layout, cluster_id, partitions })
}

/// Refuses a definition of another layout than the stream was made with.
pub async fn check_layout(
    session: &Session,
    keyspace: &str,
    definition: &Definition,
) -> Result<(), RegistryError> {
    let stream = &definition.stream.name;
    let (registered, now) = (registered(session, keyspace, stream).await?.layout, definition.layout());
    if registered == now {
        return Ok(());
    }
    Err(RegistryError::Another { stream: stream.clone(), registered, now })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(cluster_id: &str, partitions: i32) -> Result<(), RegistryError> {
        let (layout, cluster) = (String::new(), "one".to_owned());
        let registered = Registered { layout, cluster_id: cluster, partitions: 6 };
        registered.check_topic("s", "t", &Topic { cluster_id: cluster_id.to_owned(), partitions })
    }

    #[test]
    fn a_topic_that_is_not_the_registered_one_is_refused_with_both_sides_and_a_way_on() {
        check("one", 6).unwrap();
        let more = check("one", 12).unwrap_err();
        let words = more.to_string();
        assert!(
            more.is_refusal() && words.contains("has 12 partitions") && words.contains("registered with 6")
        );
        assert!(words.contains("create it again with 6 partitions"), "{words}");
        assert!(!words.contains("PIPELINE_PARTITIONS"), "that would bless what went wrong: {words}");
        let words = check("two", 6).unwrap_err().to_string();
        assert!(words.contains("cluster is `two`") && words.contains("cluster `one`"), "{words}");
    }
}
