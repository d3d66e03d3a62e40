//! The row of table `streams`, which `stream-processor init` writes and every service must agree with, and the version of the
//! tables.

use crate::cassandra::{Failure, classify};
use crate::kafka::Topic;
use crate::schema::{TABLES_COMPONENT, TABLES_VERSION};
use crate::stream::layout::Layout;
use crate::stream::{Definition, Store};
use scylla::client::session::Session;
use std::time::Duration;

/// How often a service looks whether the registration has changed.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Version of the tables that do not note it.
const FIRST_TABLES_VERSION: i32 = 1;

/// A stream as it was made.
#[derive(Debug, Clone, PartialEq)]
pub struct Registered {
    /// Layout of the stream.
    pub layout: Layout,
    /// The layout as stored.
    pub layout_text: String,
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
    /// Its layout cannot be compared: exit code 3.
    #[error("the registered layout of stream `{stream}` is of no use: {cause}")]
    Unknown {
        /// The stream.
        stream: String,
        /// Why.
        cause: String,
    },
    /// It was made otherwise, and its data would not survive the change: exit code 3.
    #[error(
        "stream `{stream}` is registered with another layout than the stream file has:\n{differences}\nuse the stream file that \
         `stream-processor init` was run with last, or give the changed stream a new name"
    )]
    Another {
        /// The stream.
        stream: String,
        /// One a line.
        differences: String,
    },
    /// The stream file has changes that the stream's data survives, but that are not registered.
    #[error(
        "the stream file changes stream `{stream}`:\n{differences}\nrun `stream-processor init` to register that"
    )]
    NotRegistered {
        /// The stream.
        stream: String,
        /// One a line.
        differences: String,
    },
    /// `init` has registered changes since this process started: it has to start again.
    #[error(
        "stream `{stream}` was registered again, with changes:\n{differences}\nstart again with the stream file that `stream-processor init` was \
         run with"
    )]
    Changed {
        /// The stream.
        stream: String,
        /// One a line.
        differences: String,
    },
    /// An earlier version made the tables.
    #[error(
        "the tables of keyspace `{keyspace}` have version {found}, this program needs {TABLES_VERSION}; run its `stream-processor \
         init` first"
    )]
    OlderTables {
        /// The keyspace.
        keyspace: String,
        /// Their version.
        found: i32,
    },
    /// A later version made the tables: exit code 3.
    #[error(
        "the tables of keyspace `{keyspace}` have version {found}, made by {made_by}; this program knows {TABLES_VERSION}: run \
         that version of it"
    )]
    NewerTables {
        /// The keyspace.
        keyspace: String,
        /// Their version.
        found: i32,
        /// Program and version that brought them there.
        made_by: String,
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
    /// A partition of its topic is beyond the registered ones.
    #[error(
        "partition {partition} of topic `{topic}` is not processed: stream `{stream}` was registered with {registered} \
         partitions, and with more of them keys hash to other partitions, so repeated events would be counted twice. Kafka \
         cannot remove partitions: give the stream a new name, or delete the topic, create it again with {registered} \
         partitions and fill it from a copy"
    )]
    AddedPartition {
        /// The stream.
        stream: String,
        /// Its topic.
        topic: String,
        /// As it was made.
        registered: i32,
        /// The one that was added.
        partition: i32,
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
        !matches!(
            self,
            RegistryError::NotSetUp { .. }
                | RegistryError::Unavailable { .. }
                | RegistryError::NotRegistered { .. }
                | RegistryError::Changed { .. }
                | RegistryError::OlderTables { .. }
        )
    }
}

impl Registered {
    /// Refuses a definition of another layout. What the stream's data would survive has to be registered first.
    pub fn check_layout(&self, definition: &Definition) -> Result<(), RegistryError> {
        let stream = definition.stream.name.clone();
        let changes = self.layout.changes_to(&definition.layout());
        let differences = changes.to_string();
        if !changes.refused.is_empty() {
            return Err(RegistryError::Another { stream, differences });
        }
        if !changes.allowed.is_empty() {
            return Err(RegistryError::NotRegistered { stream, differences });
        }
        Ok(())
    }

    /// The definition with what only the registration knows.
    pub fn complete(&self, definition: Definition) -> Definition {
        let shortest_ttl_seconds = Some(self.layout.shortest_ttl_seconds());
        Definition { store: Store { shortest_ttl_seconds, ..definition.store }, ..definition }
    }

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

/// Asks for one row about `stream`; `None`: there is none.
async fn one_row<Row>(
    session: &Session,
    select: String,
    key: &str,
    stream: &str,
) -> Result<Option<Row>, RegistryError>
where
    Row: for<'r> scylla::deserialize::row::DeserializeRow<'r, 'r>,
{
    let not_set_up = |cause: &dyn std::fmt::Display| RegistryError::NotSetUp {
        stream: stream.to_owned(),
        cause: cause.to_string(),
    };
    let rows = session.query_unpaged(select, (key,)).await.map_err(|e| match classify(&e) {
        Failure::Refused => not_set_up(&e),
        Failure::Overloaded | Failure::Unavailable => {
            RegistryError::Unavailable { stream: stream.to_owned(), cause: e.to_string() }
        }
    })?;
    let rows = rows.into_rows_result().map_err(|e| not_set_up(&e))?;
    rows.maybe_first_row::<Row>().map_err(|e| not_set_up(&e))
}

/// Reads how a stream was made.
pub async fn registered(
    session: &Session,
    keyspace: &str,
    stream: &str,
) -> Result<Registered, RegistryError> {
    let select = format!("SELECT layout, cluster_id, partitions FROM {keyspace}.streams WHERE stream = ?");
    let row = one_row::<(String, String, i32)>(session, select, stream, stream).await?;
    let (layout_text, cluster_id, partitions) = row.ok_or_else(|| RegistryError::NotSetUp {
        stream: stream.to_owned(),
        cause: "no row in table streams".to_owned(),
    })?;
    let layout = Layout::parse(&layout_text)
        .map_err(|e| RegistryError::Unknown { stream: stream.to_owned(), cause: e.to_string() })?;
    Ok(Registered { layout, layout_text, cluster_id, partitions })
}

/// Refuses tables of another version than this program's.
pub async fn check_tables(session: &Session, keyspace: &str, stream: &str) -> Result<(), RegistryError> {
    match tables_version(session, keyspace, stream).await? {
        Some((found, made_by)) if found > TABLES_VERSION => {
            Err(RegistryError::NewerTables { keyspace: keyspace.to_owned(), found, made_by })
        }
        Some((TABLES_VERSION, _)) => Ok(()),
        found => {
            let found = found.map_or(FIRST_TABLES_VERSION, |(found, _)| found);
            Err(RegistryError::OlderTables { keyspace: keyspace.to_owned(), found })
        }
    }
}

/// Version of the tables, and what made them; `None`: there are none, or they are of the version that did not note it.
pub async fn tables_version(
    session: &Session,
    keyspace: &str,
    stream: &str,
) -> Result<Option<(i32, String)>, RegistryError> {
    let select = format!("SELECT version, made_by FROM {keyspace}.schema_versions WHERE component = ?");
    match one_row(session, select, TABLES_COMPONENT, stream).await {
        Err(RegistryError::NotSetUp { .. }) => Ok(None),
        found => found,
    }
}

/// Refuses a definition of another layout than the stream was made with; returns how it was made.
pub async fn check_layout(
    session: &Session,
    keyspace: &str,
    definition: &Definition,
) -> Result<Registered, RegistryError> {
    let stream = &definition.stream.name;
    let registered = registered(session, keyspace, stream).await?;
    registered.check_layout(definition).map(|()| registered)
}

/// Returns once the stream has been registered with another layout than `definition` has; otherwise never.
pub async fn changed(session: &Session, keyspace: &str, definition: &Definition) -> RegistryError {
    let (stream, own) = (&definition.stream.name, definition.layout());
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        // While Cassandra does not answer, nothing is written under the old layout either.
        if let Ok(now) = registered(session, keyspace, stream).await {
            let changes = own.changes_to(&now.layout);
            if !changes.is_empty() {
                return RegistryError::Changed { stream: stream.clone(), differences: changes.to_string() };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn definition() -> Definition {
        Definition::parse("user_created.toml", include_str!("../../../streams/user_created.toml")).unwrap()
    }

    fn registered(definition: &Definition) -> Registered {
        let (layout, cluster_id) = (definition.layout(), "one".to_owned());
        Registered { layout_text: layout.to_string(), layout, cluster_id, partitions: 6 }
    }

    fn check(cluster_id: &str, partitions: i32) -> Result<(), RegistryError> {
        registered(&definition()).check_topic(
            "s",
            "t",
            &Topic { cluster_id: cluster_id.to_owned(), partitions },
        )
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

    #[test]
    fn a_file_is_used_as_registered_an_edited_one_asks_for_init_and_an_old_one_is_refused() {
        let (old, mut new) = (definition(), definition());
        new.columns.push(crate::stream::Column { name: "phone".to_owned(), ..old.columns[0].clone() });
        new.columns.iter_mut().for_each(|column| column.required = false);
        let old = Definition { columns: new.columns[..old.columns.len()].to_vec(), ..old };
        registered(&old).check_layout(&old).unwrap();
        let edited = registered(&old).check_layout(&new).unwrap_err();
        assert!(!edited.is_refusal() && edited.to_string().contains("column `phone`: new"), "{edited}");
        assert!(edited.to_string().contains("run `stream-processor init`"), "{edited}");
        let stale = registered(&new).check_layout(&old).unwrap_err();
        assert!(
            stale.is_refusal() && stale.to_string().contains("`phone`: registered, but no longer"),
            "{stale}"
        );
        assert!(stale.to_string().contains("that `stream-processor init` was run with last"), "{stale}");
    }

    #[test]
    fn rows_written_before_the_ttl_was_raised_keep_their_ttl() {
        let (old, mut new) = (registered(&definition()), definition());
        new.store.ttl_seconds *= 2;
        let layout = old.layout.replaced_by(&new.layout());
        let registered = Registered { layout, ..old };
        registered.check_layout(&new).unwrap();
        let store = registered.complete(new).store;
        assert_eq!((store.ttl_seconds, store.least_ttl_seconds()), (63_072_000, 31_536_000));
    }
}
