//! The registration of a stream, and the version of the tables. `stream-processor init` writes the registration to
//! table `streams`. Every service checks that its stream file, topic and tables match it.

use crate::contracts::schema::{TABLES_COMPONENT, TABLES_VERSION};
use crate::contracts::stream::layout::Layout;
use crate::contracts::stream::{Definition, StoreSettings};
use crate::runtime::cassandra::{Failure, classify};
use crate::runtime::kafka::Topic;
use scylla::client::session::Session;
use std::time::Duration;

/// Interval between checks whether the registration has changed.
const POLL_INTERVAL: Duration = Duration::from_secs(2);
/// Version of tables that have no row in `schema_versions`.
const FIRST_TABLES_VERSION: i32 = 1;

/// The registration of a stream.
#[derive(Debug, Clone, PartialEq)]
pub struct Registered {
    /// Layout of the stream.
    pub layout: Layout,
    /// The layout as stored, one line of JSON.
    pub layout_text: String,
    /// Id of the Kafka cluster that holds the events topic.
    pub cluster_id: String,
    /// Number of partitions of the events topic.
    pub partitions: i32,
}

/// Why a service cannot work on a stream.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The stream has no registration.
    #[error("stream `{stream}` is not set up ({cause}); run `stream-processor init` first")]
    NotSetUp {
        /// Name of the stream.
        stream: String,
        /// The error of the driver, or what is missing.
        cause: String,
    },
    /// Cassandra did not respond.
    #[error("cannot read the registration of stream `{stream}` from cassandra: {cause}")]
    Unavailable {
        /// Name of the stream.
        stream: String,
        /// The error of the driver.
        cause: String,
    },
    /// The registered layout cannot be parsed. The process exits with code 3.
    #[error("the registered layout of stream `{stream}` cannot be used: {cause}")]
    Unknown {
        /// Name of the stream.
        stream: String,
        /// Why the layout cannot be used.
        cause: String,
    },
    /// The stream file makes changes that the stored data does not survive. The process exits with code 3.
    #[error(
        "stream `{stream}` is registered with another layout than the one in the stream file:\n{differences}\nuse the \
         stream file that `stream-processor init` was last run with, or give the changed stream a new name"
    )]
    Another {
        /// Name of the stream.
        stream: String,
        /// One difference per line.
        differences: String,
    },
    /// The stream file makes changes that the stored data survives, but that are not registered.
    #[error(
        "the stream file changes stream `{stream}`:\n{differences}\nrun `stream-processor init` to register the changes"
    )]
    NotRegistered {
        /// Name of the stream.
        stream: String,
        /// One difference per line.
        differences: String,
    },
    /// `init` has registered changes since this process started. The process has to restart.
    #[error(
        "stream `{stream}` was registered again, with changes:\n{differences}\nrestart with the stream file that \
         `stream-processor init` was run with"
    )]
    Changed {
        /// Name of the stream.
        stream: String,
        /// One difference per line.
        differences: String,
    },
    /// The tables have an older version than this program needs.
    #[error(
        "the tables of keyspace `{keyspace}` have version {found}, this program needs {TABLES_VERSION}; run its \
         `stream-processor init` first"
    )]
    OlderTables {
        /// Name of the keyspace.
        keyspace: String,
        /// Version of the tables.
        found: i32,
    },
    /// The tables have a newer version than this program knows. The process exits with code 3.
    #[error(
        "the tables of keyspace `{keyspace}` have version {found}, made by {made_by}; this program knows \
         {TABLES_VERSION}: run that version of the program"
    )]
    NewerTables {
        /// Name of the keyspace.
        keyspace: String,
        /// Version of the tables.
        found: i32,
        /// Program and version that created or migrated the tables.
        made_by: String,
    },
    /// The topic has another number of partitions than registered. The process exits with code 3.
    #[error(
        "topic `{topic}` has {found} partitions, but stream `{stream}` was registered with {registered}: keys hash to \
         other partitions than before, so repeated events would be counted twice. Kafka cannot remove partitions: give \
         the stream a new name, or delete the topic, create it again with {registered} partitions and fill it from a \
         copy"
    )]
    OtherPartitions {
        /// Name of the stream.
        stream: String,
        /// Name of the topic.
        topic: String,
        /// Registered number of partitions.
        registered: i32,
        /// Current number of partitions.
        found: i32,
    },
    /// A partition of the topic is not among the registered ones.
    #[error(
        "partition {partition} of topic `{topic}` is not processed: stream `{stream}` was registered with {registered} \
         partitions. With more partitions, keys hash to other partitions than before, so repeated events would be \
         counted twice. Kafka cannot remove partitions: give the stream a new name, or delete the topic, create it \
         again with {registered} partitions and fill it from a copy"
    )]
    AddedPartition {
        /// Name of the stream.
        stream: String,
        /// Name of the topic.
        topic: String,
        /// Registered number of partitions.
        registered: i32,
        /// The added partition.
        partition: i32,
    },
    /// The topic is in another cluster than registered. The process exits with code 3.
    #[error(
        "the Kafka cluster is `{found}`, but stream `{stream}` was registered with cluster `{registered}`: point \
         PIPELINE_KAFKA_BROKERS at that cluster, or give the stream a new name"
    )]
    OtherCluster {
        /// Name of the stream.
        stream: String,
        /// Id of the registered cluster.
        registered: String,
        /// Id of the current cluster.
        found: String,
    },
}

impl RegistryError {
    /// Whether the mismatch is permanent, so that a retry cannot succeed and the process exits with code 3.
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
    /// Fails if `definition` has another layout. `init` must register even the changes that the stored data survives.
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

    /// Adds the values to `definition` that only the registration contains.
    pub fn complete(&self, definition: Definition) -> Definition {
        let shortest_ttl_seconds = Some(self.layout.shortest_ttl_seconds());
        Definition { store: StoreSettings { shortest_ttl_seconds, ..definition.store }, ..definition }
    }

    /// Fails if `found` is in another cluster or has another number of partitions than registered.
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

/// Reads at most one row with the given key. `None` if the row does not exist.
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

/// Reads the registration of a stream.
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

/// Fails if the tables have another version than [`TABLES_VERSION`].
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

/// The version of the tables, and the program that wrote it. `None` if the tables do not exist, or if they are of
/// version 1, which did not store it.
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

/// Reads the registration of a stream. Fails if `definition` has another layout.
pub async fn check_layout(
    session: &Session,
    keyspace: &str,
    definition: &Definition,
) -> Result<Registered, RegistryError> {
    let stream = &definition.stream.name;
    let registered = registered(session, keyspace, stream).await?;
    registered.check_layout(definition).map(|()| registered)
}

/// Waits until the stream is registered with another layout than the one of `definition`. Never returns otherwise.
pub async fn changed(session: &Session, keyspace: &str, definition: &Definition) -> RegistryError {
    let (stream, own) = (&definition.stream.name, definition.layout());
    loop {
        tokio::time::sleep(POLL_INTERVAL).await;
        // An error can be ignored: while Cassandra does not respond, nothing is written under the old layout either.
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
        Definition::parse("user_created.toml", include_str!("../../../../streams/user_created.toml")).unwrap()
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
    fn a_topic_other_than_the_registered_one_is_refused_with_both_values_and_a_remedy() {
        check("one", 6).unwrap();
        let more = check("one", 12).unwrap_err();
        let text = more.to_string();
        assert!(
            more.is_refusal() && text.contains("has 12 partitions") && text.contains("registered with 6")
        );
        assert!(text.contains("create it again with 6 partitions"), "{text}");
        assert!(
            !text.contains("PIPELINE_PARTITIONS"),
            "the error must not suggest to accept the added partitions: {text}"
        );
        let text = check("two", 6).unwrap_err().to_string();
        assert!(text.contains("cluster is `two`") && text.contains("cluster `one`"), "{text}");
    }

    #[test]
    fn a_registered_file_is_accepted_an_extended_one_needs_init_and_an_outdated_one_is_refused() {
        let (old, mut new) = (definition(), definition());
        new.columns
            .push(crate::contracts::stream::Column { name: "phone".to_owned(), ..old.columns[0].clone() });
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
        assert!(stale.to_string().contains("that `stream-processor init` was last run with"), "{stale}");
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
