//! The row of table `streams`: what `stream-processor init` wrote once, and every service must agree with.

use crate::cassandra::{Failure, classify};
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
    #[error("cassandra does not answer ({0})")]
    Unavailable(String),
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
}

/// What to say of a topic that has more partitions than its stream was registered with.
pub fn added_partitions(topic: &str, in_topic: i32, registered: i32) -> String {
    format!(
        "topic `{topic}` has {in_topic} partitions, but the stream was registered with {registered}: keys now hash to other \
         partitions, so what is in the added ones is not processed, lest events count twice; kafka cannot remove partitions: give \
         the stream a new name, or delete the topic and create it again with {registered} partitions from a copy"
    )
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
        Failure::Overloaded | Failure::Unavailable => RegistryError::Unavailable(e.to_string()),
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
