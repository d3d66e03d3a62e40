//! `control_log`: what became of each command. A trait, so that tests keep it in memory; in Cassandra every write is a
//! lightweight transaction.

use crate::error::shortened;
use crate::ledger::LedgerError;
use crate::ledger::cassandra::{applied, failed, prepare, unreadable};
use async_trait::async_trait;
use common::control::{CommandState, LogKey};
use scylla::DeserializeRow;
use scylla::client::session::Session;
use scylla::statement::Consistency;
use scylla::statement::prepared::PreparedStatement;
use scylla::value::CqlTimestamp;
use serde::Serialize;
use std::sync::Arc;

/// A row.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// Which command.
    pub key: LogKey,
    /// Its name.
    pub command: String,
    /// Its arguments as JSON, or the beginning of what cannot be read.
    pub arguments: String,
    /// Where it stands.
    pub state: CommandState,
    /// In words: what was done, or why not.
    pub outcome: String,
    /// The process that has it.
    pub handled_by: String,
    /// Its last sign of life, Unix milliseconds.
    pub handled_at_ms: i64,
}

/// A change of state.
#[derive(Debug, Clone)]
pub struct Change<'a> {
    /// State it must be in.
    pub from: CommandState,
    /// Owner it must have.
    pub owner: &'a str,
    /// State it gets.
    pub to: CommandState,
    /// Words it gets.
    pub outcome: &'a str,
    /// Now.
    pub now_ms: i64,
}

/// The control log of one stream.
#[async_trait]
pub trait ControlLog: Send + Sync {
    /// Writes the row of a command that has none; the row there is, where there is one.
    async fn begin(&self, entry: &Entry) -> Result<Option<Entry>, LedgerError>;

    /// One row, read so that no compare and set that has been answered is missed.
    async fn get(&self, key: &LogKey) -> Result<Option<Entry>, LedgerError>;

    /// A sign of life of a running command; false: it is no longer the owner's.
    async fn renew(&self, key: &LogKey, owner: &str, now_ms: i64) -> Result<bool, LedgerError>;

    /// Changes a row that is as `change` says; false: it is not.
    async fn change(&self, key: &LogKey, change: &Change<'_>) -> Result<bool, LedgerError>;

    /// The rows of the day that begins at `day_ms`, newest first, at most `limit`.
    async fn of_day(&self, day_ms: i64, limit: u32) -> Result<Vec<Entry>, LedgerError>;
}

/// In Cassandra.
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
    /// Prepares its statements; a missing table is named with the way out.
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
    async fn begin(&self, e: &Entry) -> Result<Option<Entry>, LedgerError> {
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

/// A row for `--json`.
#[derive(Debug, Serialize)]
pub struct Shown<'a> {
    /// The command's id.
    pub id: &'a str,
    /// When it was issued, RFC 3339.
    pub issued_at: String,
    /// Its name.
    pub command: &'a str,
    /// Its arguments as JSON text.
    pub arguments: &'a str,
    /// Where it stands.
    pub state: CommandState,
    /// In words.
    pub outcome: &'a str,
    /// The process that has or had it.
    pub handled_by: &'a str,
    /// Its last sign of life, RFC 3339.
    pub handled_at: String,
}

impl Entry {
    /// For people and programs.
    pub fn shown(&self) -> Shown<'_> {
        Shown {
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
