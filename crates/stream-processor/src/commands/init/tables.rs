//! Creates keyspace, tables and registration in Cassandra, and migrates those of earlier versions. Every step is
//! idempotent and safe to run in several processes at once.

use super::contract::FoundKeyspace;
use crate::error::ProcessorError;
use common::contracts::schema::{self, ExistingTable, TABLES_COMPONENT, TABLES_VERSION};
use common::contracts::stream::Definition;
use common::contracts::stream::layout::{Changes, Layout};
use common::readers::registry::{Registered, RegistryError, registered, tables_version};
use common::runtime::kafka::{PARTITIONER, Topic};
use scylla::client::session::Session;
use scylla::value::CqlTimestamp;
use std::collections::{BTreeMap, HashMap};

/// Name and version of this program, stored with the version of the tables.
const MADE_BY: &str = concat!("stream-processor ", env!("CARGO_PKG_VERSION"));
/// Maximum attempts to register a change while other processes change the registration.
const REGISTER_TRIES: u32 = 5;

/// The keyspace of a stream, with the session to read and change its tables.
#[derive(Clone, Copy)]
pub(super) struct Keyspace<'a> {
    pub(super) session: &'a Session,
    pub(super) name: &'a str,
    pub(super) stream: &'a str,
}

fn failed(what: &str) -> impl Fn(&dyn std::fmt::Display) -> ProcessorError + '_ {
    move |cause| ProcessorError::Fatal(format!("cassandra: {what}: {cause}"))
}

/// Maps a registry error: an unavailable server is retryable, a refusal ends the process with exit code 3.
pub(crate) fn of_registry(error: RegistryError) -> ProcessorError {
    match error {
        RegistryError::Unavailable { .. } => ProcessorError::Retryable(error.to_string()),
        error if error.is_refusal() => ProcessorError::Refused(error.to_string()),
        error => ProcessorError::Fatal(error.to_string()),
    }
}

fn now() -> CqlTimestamp {
    CqlTimestamp(chrono::Utc::now().timestamp_millis())
}

impl Keyspace<'_> {
    /// Creates the keyspace if it does not exist.
    pub(super) async fn create(&self, datacenter: &str, factor: i32) -> Result<(), ProcessorError> {
        let name = self.name;
        self.execute(&format!(
            "CREATE KEYSPACE IF NOT EXISTS {name} WITH replication = \
             {{'class': 'NetworkTopologyStrategy', '{datacenter}': {factor}}}"
        ))
        .await
    }

    /// Reads how the keyspace is replicated.
    pub(super) async fn found(&self) -> Result<FoundKeyspace, ProcessorError> {
        let select =
            "SELECT durable_writes, replication FROM system_schema.keyspaces WHERE keyspace_name = ?";
        let rows = self.rows::<(bool, HashMap<String, String>)>(select, "reading the keyspace").await?;
        let found =
            rows.into_iter().next().ok_or_else(|| failed("reading the keyspace")(&"it does not exist"))?;
        Ok(FoundKeyspace { durable_writes: found.0, replication: found.1.into_iter().collect() })
    }

    /// Refuses tables that were created by a newer version of this program.
    pub(super) async fn refuse_newer_tables(&self) -> Result<(), ProcessorError> {
        match tables_version(self.session, self.name, self.stream).await.map_err(of_registry)? {
            Some((found, made_by)) if found > TABLES_VERSION => {
                let keyspace = self.name.to_owned();
                Err(of_registry(RegistryError::NewerTables { keyspace, found, made_by }))
            }
            _ => Ok(()),
        }
    }

    /// Reads the registration of the stream. `None` if it is not registered yet.
    pub(super) async fn registered(&self) -> Result<Option<Registered>, ProcessorError> {
        match registered(self.session, self.name, self.stream).await {
            Ok(found) => Ok(Some(found)),
            Err(RegistryError::NotSetUp { .. }) => Ok(None),
            Err(error) => Err(of_registry(error)),
        }
    }

    /// Creates missing tables and adds columns that older tables lack. Returns the ALTER statements that were executed.
    pub(super) async fn create_tables(&self, definition: &Definition) -> Result<Vec<String>, ProcessorError> {
        let tables = [schema::shared_tables(), schema::stream_tables(definition)].concat();
        for table in &tables {
            self.execute(&table.create(self.name)).await?;
        }
        let found = self.existing().await?;
        let mut altered = Vec::new();
        for table in &tables {
            let existing = found.get(&table.name).cloned().unwrap_or_default();
            let statements = table.bring_forward(self.name, &existing);
            for statement in statements.map_err(|e| ProcessorError::Refused(e.to_string()))? {
                self.execute(&statement).await?;
                altered.push(statement);
            }
        }
        self.store_version().await?;
        Ok(altered)
    }

    async fn existing(&self) -> Result<BTreeMap<String, ExistingTable>, ProcessorError> {
        let what = "reading the tables";
        let columns =
            "SELECT table_name, column_name, type FROM system_schema.columns WHERE keyspace_name = ?";
        let ttls =
            "SELECT table_name, default_time_to_live FROM system_schema.tables WHERE keyspace_name = ?";
        let mut found: BTreeMap<String, ExistingTable> = BTreeMap::new();
        for (table, column, cql_type) in self.rows::<(String, String, String)>(columns, what).await? {
            found.entry(table).or_default().columns.insert(column, cql_type);
        }
        for (table, ttl_seconds) in self.rows::<(String, Option<i32>)>(ttls, what).await? {
            found.entry(table).or_default().ttl_seconds = ttl_seconds.unwrap_or(0).into();
        }
        Ok(found)
    }

    /// Stores the version of the tables. A stored version never decreases.
    async fn store_version(&self) -> Result<(), ProcessorError> {
        let table = format!("{}.schema_versions", self.name);
        let insert = format!(
            "INSERT INTO {table} (component, version, made_by, updated_at) VALUES (?, ?, ?, ?) IF NOT EXISTS"
        );
        let update = format!(
            "UPDATE {table} SET version = ?, made_by = ?, updated_at = ? WHERE component = ? IF version < ?"
        );
        let stored = async {
            self.session.query_unpaged(insert, (TABLES_COMPONENT, TABLES_VERSION, MADE_BY, now())).await?;
            let values = (TABLES_VERSION, MADE_BY, now(), TABLES_COMPONENT, TABLES_VERSION);
            self.session.query_unpaged(update, values).await
        };
        stored.await.map(drop).map_err(|e| failed("storing the version of the tables")(&e))
    }

    /// Registers the stream, or the changes that stored data survives, and returns these changes. Refuses all other
    /// changes.
    pub(super) async fn register(&self, layout: &Layout, topic: &Topic) -> Result<Changes, ProcessorError> {
        let failed = failed("registering the stream");
        let insert = format!(
            "INSERT INTO {}.streams (stream, layout, cluster_id, partitions, partitioner, created_at) \
             VALUES (?, ?, ?, ?, ?, ?) IF NOT EXISTS",
            self.name
        );
        let values =
            (self.stream, layout.to_string(), &topic.cluster_id, topic.partitions, PARTITIONER, now());
        self.session.query_unpaged(insert, values).await.map_err(|e| failed(&e))?;
        let change = format!(
            "UPDATE {}.streams SET layout = ?, changed_at = ? WHERE stream = ? IF layout = ?",
            self.name
        );
        let mut applied = Changes::default();
        for _ in 0..REGISTER_TRIES {
            let found = registered(self.session, self.name, self.stream).await.map_err(of_registry)?;
            let changes = check_change(self.stream, &found, layout)?;
            if changes.is_empty() {
                return Ok(applied);
            }
            let next = found.layout.replaced_by(layout).to_string();
            let values = (&next, now(), self.stream, &found.layout_text);
            self.session.query_unpaged(change.as_str(), values).await.map_err(|e| failed(&e))?;
            applied = changes;
        }
        Err(failed(&"other processes keep changing the registration; run `init` in one process at a time"))
    }

    async fn execute(&self, cql: &str) -> Result<(), ProcessorError> {
        self.session.query_unpaged(cql, ()).await.map(drop).map_err(|e| failed(cql)(&e))
    }

    /// Executes a query on `system_schema` that takes the name of this keyspace, and returns all rows.
    async fn rows<Row>(&self, select: &str, what: &str) -> Result<Vec<Row>, ProcessorError>
    where
        Row: for<'r> scylla::deserialize::row::DeserializeRow<'r, 'r>,
    {
        let failed = failed(what);
        let found = self.session.query_unpaged(select, (self.name,)).await.map_err(|e| failed(&e))?;
        let found = found.into_rows_result().map_err(|e| failed(&e))?;
        let rows = found.rows::<Row>().map_err(|e| failed(&e))?;
        rows.collect::<Result<_, _>>().map_err(|e| failed(&e))
    }
}

/// Returns the changes from the registered layout to `layout`. Refuses changes that stored data does not survive.
pub(super) fn check_change(
    stream: &str,
    registered: &Registered,
    layout: &Layout,
) -> Result<Changes, ProcessorError> {
    let changes = registered.layout.changes_to(layout);
    if changes.refused.is_empty() {
        return Ok(changes);
    }
    let (stream, differences) = (stream.to_owned(), changes.to_string());
    Err(of_registry(RegistryError::Another { stream, differences }))
}
