//! `control_log`: the state and outcome of each command. In Cassandra, every write is a lightweight transaction. Tests
//! keep the log in memory.

use crate::error::shortened;
use crate::ledger::LedgerError;
use crate::ledger::cassandra::{applied, failed, prepare, unreadable};
use async_trait::async_trait;
use common::contracts::control::{CommandState, LogKey};
use scylla::DeserializeRow;
use scylla::client::session::Session;
use scylla::statement::Consistency;
use scylla::statement::prepared::PreparedStatement;
use scylla::value::CqlTimestamp;
use serde::Serialize;
use std::sync::Arc;

/// A row of `control_log`.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// Key of the command.
    pub key: LogKey,
    /// Name of the command.
    pub command: String,
    /// Arguments as JSON, or the start of the record if it cannot be parsed.
    pub arguments: String,
    /// Current state.
    pub state: CommandState,
    /// Text for operators: the result, or why the command failed.
    pub outcome: String,
    /// The process that handles the command.
    pub handled_by: String,
    /// When that process last renewed the row, in Unix milliseconds.
    pub handled_at_ms: i64,
}

/// A change of state.
#[derive(Debug, Clone)]
pub struct Change<'a> {
    /// The expected current state.
    pub from: CommandState,
    /// The expected owner.
    pub owner: &'a str,
    /// The new state.
    pub to: CommandState,
    /// The new outcome.
    pub outcome: &'a str,
    /// The current time in Unix milliseconds.
    pub now_ms: i64,
}

/// The control log of one stream.
#[async_trait]
pub trait ControlLog: Send + Sync {
    /// Inserts the row of a command. Returns the existing row if there is one.
    async fn insert(&self, entry: &Entry) -> Result<Option<Entry>, LedgerError>;

    /// Reads one row with serial consistency, so that every completed compare-and-set is visible.
    async fn get(&self, key: &LogKey) -> Result<Option<Entry>, LedgerError>;

    /// Renews the row of a running command. Returns `false` if `owner` no longer owns it.
    async fn renew(&self, key: &LogKey, owner: &str, now_ms: i64) -> Result<bool, LedgerError>;

    /// Applies a change. Returns `false` if the row does not have the expected state and owner.
    async fn change(&self, key: &LogKey, change: &Change<'_>) -> Result<bool, LedgerError>;

    /// Up to `limit` rows of the day that starts at `day_ms`, newest first.
    async fn of_day(&self, day_ms: i64, limit: u32) -> Result<Vec<Entry>, LedgerError>;
}

/// The control log in Cassandra.
#[derive(Debug)]
pub struct CassandraControlLog {
    session: Arc<Session>,
    stream: String,
    insert: PreparedStatement,
    get: PreparedStatement,
    renew: PreparedStatement,
    change: PreparedStatement,
    of_day: PreparedStatement,
}

const COLUMNS: &str = "issued_at, command_id, command, arguments, state, outcome, handled_by, handled_at";
const KEY: &str = "stream = ? AND day = ? AND issued_at = ? AND command_id = ?";

#[derive(Debug, DeserializeRow)]
struct Row {
    issued_at: CqlTimestamp,
    command_id: String,
    command: Option<String>,
    arguments: Option<String>,
    state: Option<String>,
    outcome: Option<String>,
    handled_by: Option<String>,
    handled_at: Option<CqlTimestamp>,
}

impl Row {
    fn read(self) -> Result<Entry, LedgerError> {
        let state = self.state.unwrap_or_default();
        Ok(Entry {
            key: LogKey { issued_at_ms: self.issued_at.0, id: self.command_id },
            command: self.command.unwrap_or_default(),
            arguments: self.arguments.unwrap_or_default(),
            state: CommandState::from_name(&state)
                .ok_or_else(|| unreadable(format!("unknown state `{state}` in control_log")))?,
            outcome: self.outcome.unwrap_or_default(),
            handled_by: self.handled_by.unwrap_or_default(),
            handled_at_ms: self.handled_at.map_or(0, |at| at.0),
        })
    }
}

impl CassandraControlLog {
    /// Prepares all statements. The error names a missing table and how to create it.
    pub async fn new(
        session: Arc<Session>,
        keyspace: &str,
        stream: &str,
    ) -> Result<CassandraControlLog, LedgerError> {
        let (s, table) = (&session, format!("{keyspace}.control_log"));
        let mut get = prepare(s, format!("SELECT {COLUMNS} FROM {table} WHERE {KEY}")).await?;
        get.set_consistency(Consistency::LocalSerial);
        let condition = "IF state = ? AND handled_by = ?";
        let update = |set: &str| format!("UPDATE {table} SET {set} WHERE {KEY} {condition}");
        Ok(CassandraControlLog {
            get,
            insert: prepare(s, format!("INSERT INTO {table} (stream, day, {COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) IF NOT EXISTS")).await?,
            renew: prepare(s, update("handled_at = ?")).await?,
            change: prepare(s, update("state = ?, outcome = ?, handled_at = ?")).await?,
            of_day: prepare(
                s,
                format!(
                    "SELECT {COLUMNS} FROM {table} WHERE stream = ? AND day = ? ORDER BY issued_at DESC, command_id DESC LIMIT ?"
                ),
            )
            .await?,
            stream: stream.to_owned(),
            session,
        })
    }

    fn at<'a>(&'a self, key: &'a LogKey) -> (&'a str, CqlTimestamp, CqlTimestamp, &'a str) {
        (&self.stream, CqlTimestamp(key.day_ms()), CqlTimestamp(key.issued_at_ms), &key.id)
    }
}

#[async_trait]
impl ControlLog for CassandraControlLog {
    async fn insert(&self, e: &Entry) -> Result<Option<Entry>, LedgerError> {
        let (stream, day, issued_at, id) = self.at(&e.key);
        let outcome = shortened(&e.outcome);
        let values = (
            (stream, day, issued_at, id),
            (
                &e.command,
                &e.arguments,
                e.state.name(),
                &outcome,
                &e.handled_by,
                CqlTimestamp(e.handled_at_ms),
            ),
        );
        let ((a, b, c, d), (f, g, h, i, j, k)) = values;
        let written = self.session.execute_unpaged(&self.insert, (a, b, c, d, f, g, h, i, j, k)).await;
        if applied(written.map_err(|e| failed(&e))?)? {
            return Ok(None);
        }
        self.get(&e.key).await
    }

    async fn get(&self, key: &LogKey) -> Result<Option<Entry>, LedgerError> {
        let read = self.session.execute_unpaged(&self.get, self.at(key)).await.map_err(|e| failed(&e))?;
        let rows = read.into_rows_result().map_err(unreadable)?;
        rows.maybe_first_row::<Row>().map_err(unreadable)?.map(Row::read).transpose()
    }

    async fn renew(&self, key: &LogKey, owner: &str, now_ms: i64) -> Result<bool, LedgerError> {
        let (stream, day, issued_at, id) = self.at(key);
        let state = CommandState::Running.name();
        let values = (CqlTimestamp(now_ms), stream, day, issued_at, id, state, owner);
        applied(self.session.execute_unpaged(&self.renew, values).await.map_err(|e| failed(&e))?)
    }

    async fn change(&self, key: &LogKey, c: &Change<'_>) -> Result<bool, LedgerError> {
        let (stream, day, issued_at, id) = self.at(key);
        let (to, from, outcome, now) = (c.to.name(), c.from.name(), c.outcome, CqlTimestamp(c.now_ms));
        let values = (to, outcome, now, stream, day, issued_at, id, from, c.owner);
        applied(self.session.execute_unpaged(&self.change, values).await.map_err(|e| failed(&e))?)
    }

    async fn of_day(&self, day_ms: i64, limit: u32) -> Result<Vec<Entry>, LedgerError> {
        let limit = i32::try_from(limit).unwrap_or(i32::MAX);
        let key = (&self.stream, CqlTimestamp(day_ms), limit);
        let read = self.session.execute_unpaged(&self.of_day, key).await.map_err(|e| failed(&e))?;
        let rows = read.into_rows_result().map_err(unreadable)?;
        rows.rows::<Row>().map_err(unreadable)?.map(|row| row.map_err(unreadable)?.read()).collect()
    }
}

/// A row as printed by `--json`.
#[derive(Debug, Serialize)]
pub struct EntryView<'a> {
    /// Id of the command.
    pub id: &'a str,
    /// When it was issued, RFC 3339.
    pub issued_at: String,
    /// Name of the command.
    pub command: &'a str,
    /// Arguments as JSON text.
    pub arguments: &'a str,
    /// Current state.
    pub state: CommandState,
    /// The result, or why the command failed.
    pub outcome: &'a str,
    /// The process that handles or handled the command.
    pub handled_by: &'a str,
    /// When that process last renewed the row, RFC 3339.
    pub handled_at: String,
}

impl Entry {
    /// Converts the row for output.
    pub fn view(&self) -> EntryView<'_> {
        EntryView {
            id: &self.key.id,
            issued_at: crate::runs::time(self.key.issued_at_ms),
            command: &self.command,
            arguments: &self.arguments,
            state: self.state,
            outcome: &self.outcome,
            handled_by: &self.handled_by,
            handled_at: crate::runs::time(self.handled_at_ms),
        }
    }
}
