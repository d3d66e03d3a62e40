//! The tables, the CQL that creates or migrates them, and the two INSERT statements that several parts use. This module
//! only builds text; `stream-processor init` executes it. ARCHITECTURE.md, "Contracts in Cassandra", describes the
//! contract of each table.

use crate::contracts::stream::Definition;
use std::collections::BTreeMap;

/// Most rows in one batch statement of the processor.
pub const MAX_BATCH_ROWS: usize = 200;
/// Most bytes of values in one batch statement. Cassandra always rejects a mutation larger than half a commit log
/// segment (16 MiB).
pub const MAX_BATCH_BYTES: usize = 512 << 10;
/// TTL of a row of `services`, which each heartbeat renews.
pub const SERVICE_TTL_SECONDS: i64 = 60;
/// TTL of a row of `refusals`: 7 days. The instance clears the row earlier if it starts again.
pub const REFUSAL_TTL_SECONDS: i64 = 7 * 86_400;
/// TTL of a row of `verifications`: 90 days.
const VERIFICATIONS_TTL_SECONDS: i64 = 90 * 86_400;
/// TTL of a row of `batches`: 1 day.
const BATCHES_TTL_SECONDS: i64 = 86_400;
/// A resolution of table `throughput`, in seconds.
#[derive(Debug, Clone, Copy)]
pub struct Resolution {
    /// Step between two rows of a partition.
    pub step: i32,
    /// Length of a slot, which is one Cassandra partition.
    pub slot: i64,
    /// TTL of a row.
    pub ttl: i32,
}

impl Resolution {
    /// The resolution for the last hours.
    pub const SECONDS: Resolution = Resolution { step: 1, slot: 3600, ttl: 2 * 86_400 };
    /// The resolution for the last weeks.
    pub const MINUTES: Resolution = Resolution { step: 60, slot: 86_400, ttl: 30 * 86_400 };
}

/// Version of the tables that this program needs. Every change of the tables increments it. `tests/golden` contains the
/// tables of each earlier version, and `init` must be able to migrate all of them.
pub const TABLES_VERSION: i32 = 3;
/// Key of the row of table `schema_versions` that holds the version of the tables.
pub const TABLES_COMPONENT: &str = "tables";

/// The definition of a table. Generates its CREATE TABLE statement and the ALTER TABLE statements that migrate an older
/// version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// Name of the table, without the keyspace.
    pub name: String,
    columns: Vec<TableColumn>,
    /// The content of the `PRIMARY KEY (…)` clause.
    key: &'static str,
    /// 0 if rows do not expire.
    ttl_seconds: i64,
    /// CQL options besides the TTL.
    options: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct TableColumn {
    name: String,
    cql_type: String,
}

/// The current definition of a table in Cassandra.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExistingTable {
    /// CQL type of each column, by name.
    pub columns: BTreeMap<String, String>,
    /// The `default_time_to_live`. 0 if rows do not expire.
    pub ttl_seconds: i64,
}

/// A column exists with another type, which ALTER TABLE cannot change.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "table {keyspace}.{table}: column `{column}` is {found}, but must be {expected}: choose another keyspace with \
     PIPELINE_KEYSPACE, or another column or stream name"
)]
pub struct ColumnTypeMismatch {
    keyspace: String,
    table: String,
    column: String,
    found: String,
    expected: String,
}

impl Table {
    /// `columns` lists names and types as in CREATE TABLE.
    fn new(name: &str, columns: &str, key: &'static str) -> Table {
        let table = Table { name: name.to_owned(), columns: vec![], key, ttl_seconds: 0, options: vec![] };
        let columns = columns.split(", ").filter_map(|column| column.split_once(' '));
        columns.fold(table, |table, (name, cql_type)| table.with(name, cql_type))
    }

    fn with(mut self, name: &str, cql_type: &str) -> Table {
        self.columns.push(TableColumn { name: name.to_owned(), cql_type: cql_type.to_owned() });
        self
    }

    fn expiring(self, ttl_seconds: i64) -> Table {
        Table { ttl_seconds, ..self }
    }

    fn option(mut self, option: String) -> Table {
        self.options.push(option);
        self
    }

    fn all_options(&self) -> Vec<String> {
        let ttl = (self.ttl_seconds > 0).then(|| format!("default_time_to_live = {}", self.ttl_seconds));
        ttl.into_iter().chain(self.options.clone()).collect()
    }

    /// The CREATE TABLE IF NOT EXISTS statement.
    pub fn create(&self, keyspace: &str) -> String {
        let columns: String = self.columns.iter().map(|c| format!("{} {}, ", c.name, c.cql_type)).collect();
        let options = self.all_options();
        let options =
            if options.is_empty() { String::new() } else { format!(" WITH {}", options.join(" AND ")) };
        let (name, key) = (&self.name, self.key);
        format!("CREATE TABLE IF NOT EXISTS {keyspace}.{name} ({columns}PRIMARY KEY ({key})){options}")
    }

    /// The statements that migrate `existing` to this definition. They only add columns and set the TTL, and are
    /// idempotent.
    pub fn bring_forward(
        &self,
        keyspace: &str,
        existing: &ExistingTable,
    ) -> Result<Vec<String>, ColumnTypeMismatch> {
        let mut added = Vec::new();
        for TableColumn { name, cql_type } in &self.columns {
            match existing.columns.get(name) {
                None => added.push(format!("{name} {cql_type}")),
                Some(found) if found == cql_type => {}
                Some(found) => {
                    return Err(ColumnTypeMismatch {
                        keyspace: keyspace.to_owned(),
                        table: self.name.clone(),
                        column: name.clone(),
                        found: found.clone(),
                        expected: cql_type.clone(),
                    });
                }
            }
        }
        let alter = format!("ALTER TABLE {keyspace}.{}", self.name);
        let mut statements = Vec::new();
        if !added.is_empty() {
            statements.push(format!("{alter} ADD IF NOT EXISTS ({})", added.join(", ")));
        }
        if existing.ttl_seconds != self.ttl_seconds {
            let options: String = self.options.iter().map(|option| format!(" AND {option}")).collect();
            statements.push(format!("{alter} WITH default_time_to_live = {}{options}", self.ttl_seconds));
        }
        Ok(statements)
    }
}

/// The tables shared by all streams of a keyspace.
pub fn shared_tables() -> Vec<Table> {
    [stream_records(), processing_tables(), presence_tables(), ingestion_tables()].concat()
}

/// Tables of the schema version, the registrations and the state of streams.
fn stream_records() -> Vec<Table> {
    vec![
        Table::new(
            "schema_versions",
            "component text, version int, made_by text, updated_at timestamp",
            "component",
        ),
        Table::new(
            "streams",
            "stream text, layout text, cluster_id text, partitions int, partitioner text, \
             created_at timestamp, changed_at timestamp",
            "stream",
        ),
        Table::new(
            "stream_state",
            "stream text, paused boolean, schedules text, updated_at timestamp",
            "stream",
        ),
    ]
}

/// Tables that the processor writes.
fn processing_tables() -> Vec<Table> {
    vec![
        Table::new(
            "partition_progress",
            "stream text, kafka_partition int, next_offset bigint, events bigint, duplicates bigint, revised bigint, \
             late bigint, dead_letters bigint, skipped bigint, seen_to bigint, first_offset bigint, \
             last_offset bigint, fingerprint bigint, written_to bigint, updated_at timestamp",
            "(stream), kafka_partition",
        ),
        Table::new(
            "skipped_ranges",
            "stream text, kafka_partition int, from_offset bigint, to_offset bigint, reason text, \
             skipped_by text, skipped_at timestamp",
            "(stream), kafka_partition, from_offset",
        ),
        Table::new(
            "dead_letters_accepted",
            "stream text, kafka_partition int, up_to bigint, accepted_at timestamp",
            "(stream), kafka_partition",
        ),
        Table::new(
            "throughput",
            "stream text, resolution int, slot timestamp, at timestamp, kafka_partition int, total bigint",
            "(stream, resolution, slot), at, kafka_partition",
        )
        .expiring(Resolution::MINUTES.ttl.into()),
        Table::new(
            "batches",
            "stream text, hour timestamp, finished_at timestamp, kafka_partition int, first_offset bigint, \
             next_offset bigint, rows int, decode_ms double, lookup_ms double, write_ms double, \
             commit_ms double",
            "(stream, hour), finished_at, kafka_partition",
        )
        .expiring(BATCHES_TTL_SECONDS),
        Table::new(
            "verifications",
            "stream text, day timestamp, kafka_partition int, rows bigint, pane_rows bigint, \
             differences bigint, first_differences text, verified_by text, started_at timestamp, \
             finished_at timestamp",
            "(stream), day, kafka_partition",
        )
        .expiring(VERIFICATIONS_TTL_SECONDS),
    ]
}

/// Tables of the heartbeats and refusals of instances.
fn presence_tables() -> Vec<Table> {
    vec![
        Table::new(
            "services",
            "service text, instance text, version text, started_at timestamp, seen_at timestamp, \
             ready boolean, stream text, life text",
            "(service), instance",
        )
        .with("partitions", "frozen<map<int, text>>")
        .expiring(SERVICE_TTL_SECONDS)
        .option("gc_grace_seconds = 600".to_owned()),
        Table::new(
            "refusals",
            "service text, instance text, reason text, at timestamp",
            "(service), instance",
        )
        .expiring(REFUSAL_TTL_SECONDS),
    ]
}

/// Tables of the run ledger and of commands.
fn ingestion_tables() -> Vec<Table> {
    vec![
        Table::new(
            "ingest_runs",
            "stream text, day timestamp, interval_start timestamp, interval_end timestamp, state text, \
             run_type text, run_id text, attempt int, owner text, epoch bigint, lease_until timestamp, \
             pages int, records bigint, acked bigint, bytes bigint, error text, created_at timestamp, \
             started_at timestamp, finished_at timestamp, retry_at timestamp",
            "(stream, day), interval_start",
        ),
        Table::new(
            "ingest_attempts",
            "stream text, day timestamp, interval_start timestamp, attempt int, run_id text, owner text, \
             outcome text, cause text, http_status int, pages int, records bigint, bytes bigint, \
             started_at timestamp, milliseconds bigint",
            "(stream, day), interval_start, attempt",
        ),
        Table::new(
            "control_log",
            "stream text, day timestamp, issued_at timestamp, command_id text, command text, \
             arguments text, state text, outcome text, handled_by text, handled_at timestamp",
            "(stream, day), issued_at, command_id",
        ),
    ]
}

/// The event table and the pane table of a stream.
pub fn stream_tables(d: &Definition) -> Vec<Table> {
    let ttl = d.store.ttl_seconds;
    // Time windows only help if whole files expire, which needs a TTL. A window of TTL / 30 keeps about 30 files.
    let unified = "compaction = {'class': 'UnifiedCompactionStrategy'}".to_owned();
    let compaction = if ttl == 0 {
        unified.clone()
    } else {
        let days = (ttl / 30 / 86_400).max(1);
        format!(
            "compaction = {{'class': 'TimeWindowCompactionStrategy', 'compaction_window_unit': 'DAYS', \
             'compaction_window_size': {days}}}"
        )
    };
    let events = Table::new(
        &d.stream.name,
        "bucket timestamp, shard int, event_time timestamp, event_id text",
        "(bucket, shard), event_time, event_id",
    );
    let events = d.columns.iter().fold(events, |table, c| table.with(&c.name, c.cql_type.cql()));
    let panes = Table::new(
        &panes_table(d),
        "bucket timestamp, kafka_partition int, pane_start timestamp, dimension text, value text, \
             count bigint",
        "(bucket, kafka_partition), pane_start, dimension, value",
    );
    let panes = d.windows.measures.iter().fold(panes, |table, m| {
        let table = table.with(&format!("{m}_count"), "bigint");
        ["sum", "min", "max"].iter().fold(table, |table, part| table.with(&format!("{m}_{part}"), "double"))
    });
    vec![
        events.with("kafka_offset", "bigint").with("run_id", "text").expiring(ttl).option(compaction),
        panes.with("upto", "bigint").expiring(ttl).option(unified),
    ]
}

/// Name of the pane table of a stream.
pub fn panes_table(d: &Definition) -> String {
    format!("{}_panes", d.stream.name)
}

/// INSERT of an event row. Bind markers in order: bucket, shard, event_time, event_id, kafka_offset, run_id, the
/// declared columns in order, write timestamp (event time in µs).
pub fn insert_event(keyspace: &str, d: &Definition) -> String {
    let declared: String = d.columns.iter().map(|c| format!(", {}", c.name)).collect();
    let markers = ", ?".repeat(d.columns.len());
    format!(
        "INSERT INTO {keyspace}.{} (bucket, shard, event_time, event_id, kafka_offset, run_id{declared}) \
         VALUES (?, ?, ?, ?, ?, ?{markers}) USING TIMESTAMP ?",
        d.stream.name
    )
}

/// INSERT of a pane row. Bind markers in order: bucket, kafka_partition, pane_start, dimension, value, count, upto,
/// then count, sum, min and max of each measure, then the write timestamp (next offset).
pub fn insert_pane(keyspace: &str, d: &Definition) -> String {
    let measures: String =
        d.windows.measures.iter().map(|m| format!(", {m}_count, {m}_sum, {m}_min, {m}_max")).collect();
    let markers = ", ?".repeat(4 * d.windows.measures.len());
    format!(
        "INSERT INTO {keyspace}.{} (bucket, kafka_partition, pane_start, dimension, value, count, upto{measures}) \
         VALUES (?, ?, ?, ?, ?, ?, ?{markers}) USING TIMESTAMP ?",
        panes_table(d)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn definition() -> Definition {
        let text = include_str!("../../../../streams/user_created.toml");
        Definition::parse("user_created.toml", text).unwrap()
    }

    fn tables(d: &Definition) -> Vec<Table> {
        shared_tables().into_iter().chain(stream_tables(d)).collect()
    }

    /// Parses CREATE TABLE statements, one per line, as Cassandra would describe the tables.
    fn existing(cql: &str) -> BTreeMap<String, ExistingTable> {
        let describe = |statement: &str| {
            let (name, rest) =
                statement.strip_prefix("CREATE TABLE IF NOT EXISTS pipeline.")?.split_once(" (")?;
            // Version 1 declares a single-column primary key inline with its column.
            let rest = rest.replace("text PRIMARY KEY, ", "text, ");
            let (columns, rest) = rest.split_at(rest.find(", PRIMARY KEY").or_else(|| rest.find(')'))?);
            // Columns are split at ", ", which also occurs within this type.
            let columns = columns.replace("<int, text>", "<int,text>");
            let columns = columns.split(", ").filter_map(|column| column.trim().split_once(' '));
            let columns = columns
                .map(|(name, cql_type)| (name.to_owned(), cql_type.replace(",text>", ", text>")))
                .collect();
            let ttl = rest.split_once("default_time_to_live = ").map_or("0", |(_, ttl)| ttl);
            let ttl = ttl.split([' ', ';']).next().unwrap().parse().unwrap();
            Some((name.to_owned(), ExistingTable { columns, ttl_seconds: ttl }))
        };
        cql.lines().filter_map(describe).collect()
    }

    #[test]
    fn create_statements_of_version_3() {
        assert_eq!(
            TABLES_VERSION, 3,
            "put the new version into the name of this test and its snapshot, and keep the old snapshot in tests/golden"
        );
        let text: String =
            tables(&definition()).iter().map(|table| table.create("pipeline") + ";\n").collect();
        insta::assert_snapshot!(text);
        for (table, existing) in tables(&definition()).iter().zip(existing_of_each(&text, &definition())) {
            assert_eq!(table.bring_forward("pipeline", &existing).unwrap(), [""; 0], "{}", table.name);
        }
    }

    fn existing_of_each(cql: &str, d: &Definition) -> Vec<ExistingTable> {
        let found = existing(cql);
        tables(d).iter().map(|table| found[&table.name].clone()).collect()
    }

    /// The statements that migrate the tables in `cql`.
    fn migration(cql: &str) -> String {
        let found = existing(cql);
        let mut statements = Vec::new();
        for table in tables(&definition()) {
            match found.get(&table.name) {
                Some(existing) => statements.extend(table.bring_forward("pipeline", existing).unwrap()),
                None => statements.push(format!("CREATE {}", table.name)),
            }
        }
        statements.join("\n")
    }

    #[test]
    fn tables_of_version_1_are_migrated_by_adding_columns() {
        insta::assert_snapshot!(migration(include_str!("../../tests/golden/tables_1.cql")));
    }

    #[test]
    fn tables_of_version_2_are_migrated_by_adding_a_table_and_a_column() {
        let column = "ALTER TABLE pipeline.partition_progress ADD IF NOT EXISTS (revised bigint)";
        let migration = migration(include_str!("../../tests/golden/tables_2.cql"));
        assert_eq!(migration, format!("{column}\nCREATE verifications"));
    }

    #[test]
    fn a_longer_ttl_and_a_new_column_alter_the_tables_but_another_column_type_is_refused() {
        let old = definition();
        let text: String = tables(&old).iter().map(|table| table.create("pipeline") + ";\n").collect();
        let found = existing(&text);
        let mut new = old.clone();
        new.store.ttl_seconds *= 2;
        new.columns
            .push(crate::contracts::stream::Column { name: "phone".to_owned(), ..old.columns[0].clone() });
        let [events, panes] = stream_tables(&new).try_into().unwrap();
        let statements = events.bring_forward("pipeline", &found[&events.name]).unwrap();
        assert_eq!(statements[0], "ALTER TABLE pipeline.user_created ADD IF NOT EXISTS (phone text)");
        assert!(statements[1].contains("default_time_to_live = 63072000 AND compaction"), "{statements:?}");
        assert_eq!(panes.bring_forward("pipeline", &found[&panes.name]).unwrap().len(), 1);
        let mut other = found[&events.name].clone();
        other.columns.insert("phone".to_owned(), "int".to_owned());
        let refused = events.bring_forward("pipeline", &other).unwrap_err().to_string();
        assert!(refused.contains("column `phone` is int, but must be text"), "{refused}");
    }

    #[test]
    fn an_insert_has_a_marker_for_each_column_and_the_timestamp() {
        let d = definition();
        for insert in [insert_event("k", &d), insert_pane("k", &d)] {
            let columns = insert.split('(').nth(1).unwrap().split(')').next().unwrap().split(',').count();
            assert_eq!(insert.matches('?').count(), columns + 1, "{insert}");
        }
    }
}
