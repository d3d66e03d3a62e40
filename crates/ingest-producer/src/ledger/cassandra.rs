//! The run ledger in Cassandra: tables `ingest_runs`, `ingest_attempts` and `stream_state`. All writes are lightweight
//! transactions.

use super::rows::{AttemptRow, DAY_MS, NewRun, RunRow, day, ms, set_if};
use super::{Attempt, Claim, Counts, Ending, Lease, Ledger, LedgerError, Note, StreamState, claim_values};
use crate::error::shortened;
use crate::planner::Run;
use async_trait::async_trait;
use backon::{ExponentialBuilder, Retryable};
use common::contracts::run_ledger::{Interval, RunState, RunType};
use common::runtime::cassandra::{Failure, StatementError, classify};
use scylla::client::session::Session;
use scylla::response::query_result::{QueryResult, QueryRowsResult};
use scylla::serialize::row::SerializeRow;
use scylla::statement::Consistency;
use scylla::statement::prepared::PreparedStatement;
use scylla::value::{CqlTimestamp, CqlValue, MaybeUnset, Row};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Maximum retries of a read, and the first backoff, which doubles with each retry.
const READ_RETRIES: usize = 4;
const READ_PAUSE: Duration = Duration::from_millis(100);
/// How long to retry the preparation of a statement.
const PREPARE_TIMEOUT: Duration = Duration::from_secs(20);
const RUN_COLUMNS: &str = "interval_start, interval_end, state, run_type, run_id, attempt, owner, epoch, lease_until, \
                           pages, records, acked, bytes, error, started_at, finished_at, retry_at";
const RUN_KEY: &str = "stream = ? AND day = ? AND interval_start = ?";

/// The ledger of one stream.
#[derive(Debug)]
pub struct CassandraLedger {
    session: Arc<Session>,
    stream: String,
    statements: Statements,
}

#[derive(Debug)]
struct Statements {
    state: PreparedStatement,
    first_schedules: PreparedStatement,
    schedules: PreparedStatement,
    touch: PreparedStatement,
    pause: PreparedStatement,
    runs: PreparedStatement,
    unfinished: PreparedStatement,
    run: PreparedStatement,
    insert: PreparedStatement,
    claim: PreparedStatement,
    renew: PreparedStatement,
    finish: PreparedStatement,
    overrule: PreparedStatement,
    record: PreparedStatement,
    attempts: PreparedStatement,
}

pub(crate) fn failed(error: &scylla::errors::ExecutionError) -> LedgerError {
    let text = shortened(&error.to_string());
    match classify(error) {
        Failure::Refused => LedgerError::Refused(text),
        Failure::Overloaded | Failure::Unavailable => LedgerError::Unavailable(text),
    }
}

pub(crate) fn unreadable(error: impl std::fmt::Display) -> LedgerError {
    LedgerError::Refused(format!("a row is invalid: {error}"))
}

/// Whether a compare-and-set was applied.
pub(crate) fn applied(result: QueryResult) -> Result<bool, LedgerError> {
    let rows = result.into_rows_result().map_err(unreadable)?;
    let row: Row = rows.first_row().map_err(unreadable)?;
    Ok(matches!(row.columns.first(), Some(Some(CqlValue::Boolean(true)))))
}

/// Prepares a statement. Retries for a while if Cassandra does not answer.
pub(crate) async fn prepare(session: &Session, cql: String) -> Result<PreparedStatement, LedgerError> {
    let deadline = Instant::now() + PREPARE_TIMEOUT;
    match common::runtime::cassandra::prepare(session, &cql, deadline).await {
        Ok(mut statement) => {
            // The driver must not repeat a compare-and-set.
            statement.set_is_idempotent(false);
            Ok(statement)
        }
        Err(e @ StatementError::NotSetUp(_)) => Err(LedgerError::Refused(shortened(&e.to_string()))),
        Err(e @ StatementError::Unavailable(_)) => Err(LedgerError::Unavailable(shortened(&e.to_string()))),
    }
}

impl Statements {
    async fn prepare(session: &Session, k: &str) -> Result<Statements, LedgerError> {
        let prepare = async |cql: String| prepare(session, cql).await;
        let mut run = prepare(format!("SELECT {RUN_COLUMNS} FROM {k}.ingest_runs WHERE {RUN_KEY}")).await?;
        run.set_consistency(Consistency::LocalSerial);
        let update = |set: &str| format!("UPDATE {k}.ingest_runs SET {set} WHERE {RUN_KEY} IF epoch = ?");
        let span = "stream = ? AND day = ? AND interval_start >= ? AND interval_start < ?";
        let runs = format!("SELECT {RUN_COLUMNS} FROM {k}.ingest_runs WHERE {span}");
        Ok(Statements {
            run,
            state: prepare(format!("SELECT paused, schedules, updated_at FROM {k}.stream_state WHERE stream = ?")).await?,
            first_schedules: prepare(format!(
                "INSERT INTO {k}.stream_state (stream, paused, schedules, updated_at) VALUES (?, false, ?, ?) IF NOT EXISTS"
            ))
            .await?,
            schedules: prepare(format!(
                "UPDATE {k}.stream_state SET schedules = ?, updated_at = ? WHERE stream = ? IF schedules = ?"
            ))
            .await?,
            touch: prepare(format!("UPDATE {k}.stream_state SET updated_at = ? WHERE stream = ? IF EXISTS")).await?,
            pause: prepare(format!("UPDATE {k}.stream_state SET paused = ? WHERE stream = ? IF EXISTS")).await?,
            // `succeeded` is the last state in alphabetical order. The filter applies within one partition.
            unfinished: prepare(format!("{runs} AND state < 'succeeded' ALLOW FILTERING")).await?,
            runs: prepare(runs).await?,
            insert: prepare(format!(
                "INSERT INTO {k}.ingest_runs (stream, day, interval_start, interval_end, state, run_type, run_id, attempt, \
                 owner, epoch, lease_until, error, created_at, started_at, finished_at) \
                 VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) IF NOT EXISTS"
            ))
            .await?,
            claim: prepare(update(
                "state = 'running', run_type = ?, run_id = ?, attempt = ?, owner = ?, epoch = ?, lease_until = ?, \
                 started_at = ?",
            ))
            .await?,
            renew: prepare(update("lease_until = ?")).await?,
            finish: prepare(update(
                "state = ?, pages = ?, records = ?, acked = ?, bytes = ?, error = ?, lease_until = ?, finished_at = ?, \
                 retry_at = ?",
            ))
            .await?,
            overrule: prepare(update("state = ?, error = ?, epoch = ?, attempt = ?, retry_at = ?, finished_at = ?"))
                .await?,
            record: prepare(format!(
                "INSERT INTO {k}.ingest_attempts (stream, day, interval_start, attempt, run_id, owner, outcome, cause, \
                 http_status, pages, records, bytes, started_at, milliseconds) \
                 VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) IF NOT EXISTS"
            ))
            .await?,
            attempts: prepare(format!(
                "SELECT interval_start, attempt, run_id, owner, outcome, cause, http_status, pages, records, bytes, \
                 started_at, milliseconds FROM {k}.ingest_attempts WHERE {RUN_KEY}"
            ))
            .await?,
        })
    }
}

impl CassandraLedger {
    /// Prepares all statements. The error names a missing table and how to create it.
    pub async fn new(
        session: Arc<Session>,
        keyspace: &str,
        stream: &str,
    ) -> Result<CassandraLedger, LedgerError> {
        let statements = Statements::prepare(&session, keyspace).await?;
        Ok(CassandraLedger { session, stream: stream.to_owned(), statements })
    }

    async fn execute(
        &self,
        statement: &PreparedStatement,
        values: impl SerializeRow,
    ) -> Result<QueryResult, LedgerError> {
        self.session.execute_unpaged(statement, values).await.map_err(|e| failed(&e))
    }

    /// Executes a read. It is retried, because it may contend with the compare-and-set of other owners.
    async fn rows(
        &self,
        statement: &PreparedStatement,
        values: impl SerializeRow,
    ) -> Result<QueryRowsResult, LedgerError> {
        let pauses = ExponentialBuilder::default().with_min_delay(READ_PAUSE).with_max_times(READ_RETRIES);
        let read = (|| self.execute(statement, &values)).retry(pauses);
        let answer = read.when(|e| matches!(e, LedgerError::Unavailable(_))).await?;
        answer.into_rows_result().map_err(unreadable)
    }

    /// Reads the runs of a time range with `statement`, one day (partition) at a time.
    async fn span(
        &self,
        statement: &PreparedStatement,
        from_ms: i64,
        to_ms: i64,
    ) -> Result<Vec<Run>, LedgerError> {
        let mut found = Vec::new();
        let mut day_ms = day(from_ms).0;
        while day_ms < to_ms {
            let key = (&self.stream, CqlTimestamp(day_ms), CqlTimestamp(from_ms), CqlTimestamp(to_ms));
            let rows = self.rows(statement, key).await?;
            for row in rows.rows::<RunRow>().map_err(unreadable)? {
                found.push(row.map_err(unreadable)?.read()?);
            }
            day_ms += DAY_MS;
        }
        Ok(found)
    }

    async fn insert(&self, row: NewRun<'_>) -> Result<bool, LedgerError> {
        applied(self.execute(&self.statements.insert, row).await?)
    }
}

#[async_trait]
impl Ledger for CassandraLedger {
    async fn stream_state(&self) -> Result<StreamState, LedgerError> {
        let rows = self.rows(&self.statements.state, (&self.stream,)).await?;
        type Stored = (Option<bool>, Option<String>, Option<CqlTimestamp>);
        let row: Option<Stored> = rows.maybe_first_row().map_err(unreadable)?;
        let (paused, schedules, updated_at) = row.unwrap_or_default();
        Ok(StreamState { paused: paused.unwrap_or(false), schedules, updated_at_ms: ms(updated_at) })
    }

    async fn set_schedules(&self, old: Option<&str>, new: &str, now_ms: i64) -> Result<bool, LedgerError> {
        let now = CqlTimestamp(now_ms);
        applied(match old {
            None => self.execute(&self.statements.first_schedules, (&self.stream, new, now)).await?,
            Some(old) => self.execute(&self.statements.schedules, (new, now, &self.stream, old)).await?,
        })
    }

    async fn set_paused(&self, paused: bool) -> Result<bool, LedgerError> {
        applied(self.execute(&self.statements.pause, (paused, &self.stream)).await?)
    }

    async fn touch(&self, now_ms: i64) -> Result<(), LedgerError> {
        self.execute(&self.statements.touch, (CqlTimestamp(now_ms), &self.stream)).await.map(|_| ())
    }

    async fn runs(&self, from_ms: i64, to_ms: i64) -> Result<Vec<Run>, LedgerError> {
        self.span(&self.statements.runs, from_ms, to_ms).await
    }

    async fn unfinished(&self, from_ms: i64, to_ms: i64) -> Result<Vec<Run>, LedgerError> {
        self.span(&self.statements.unfinished, from_ms, to_ms).await
    }

    async fn run(&self, start_ms: i64) -> Result<Option<Run>, LedgerError> {
        let rows =
            self.rows(&self.statements.run, (&self.stream, day(start_ms), CqlTimestamp(start_ms))).await?;
        rows.maybe_first_row::<RunRow>().map_err(unreadable)?.map(RunRow::read).transpose()
    }

    async fn claim(
        &self,
        interval: Interval,
        run_type: RunType,
        seen: Option<&Run>,
        lease: &Lease,
    ) -> Result<Option<Claim>, LedgerError> {
        let (attempt, epoch, first_started_ms) = claim_values(seen, run_type, lease.now_ms);
        let until = CqlTimestamp(lease.until_ms);
        let won = match seen {
            None => {
                self.insert(NewRun {
                    state: RunState::Running.name(),
                    run_type: run_type.name(),
                    run_id: &lease.run_id,
                    attempt,
                    owner: &lease.owner,
                    epoch,
                    lease_until: until,
                    started_at: MaybeUnset::Set(CqlTimestamp(lease.now_ms)),
                    ..NewRun::of(&self.stream, interval, lease.now_ms)
                })
                .await?
            }
            Some(run) => {
                let (day, start) = (day(interval.start_ms), CqlTimestamp(interval.start_ms));
                let (id, owner, started) = (&lease.run_id, &lease.owner, CqlTimestamp(first_started_ms));
                let (kind, stream) = (run_type.name(), &self.stream);
                let values = (kind, id, attempt, owner, epoch, until, started, stream, day, start, run.epoch);
                applied(self.execute(&self.statements.claim, values).await?)?
            }
        };
        // Our earlier attempt to claim may have been applied without a response.
        if !won && self.run(interval.start_ms).await?.is_none_or(|run| run.run_id != lease.run_id) {
            return Ok(None);
        }
        Ok(Some(Claim {
            interval,
            run_type,
            run_id: lease.run_id.clone(),
            owner: lease.owner.clone(),
            attempt,
            epoch,
            first_started_ms,
            started_ms: lease.now_ms,
        }))
    }

    async fn note(&self, note: &Note, now_ms: i64) -> Result<(), LedgerError> {
        let row = NewRun {
            state: note.state.name(),
            run_type: note.run_type.name(),
            error: &note.cause,
            finished_at: set_if(note.state == RunState::Failed, CqlTimestamp(now_ms)),
            ..NewRun::of(&self.stream, note.interval, now_ms)
        };
        self.insert(row).await.map(|_| ())
    }

    async fn renew(&self, claim: &Claim, until_ms: i64) -> Result<bool, LedgerError> {
        let start = claim.interval.start_ms;
        let values = (CqlTimestamp(until_ms), &self.stream, day(start), CqlTimestamp(start), claim.epoch);
        applied(self.execute(&self.statements.renew, values).await?)
    }

    async fn finish(&self, claim: &Claim, ending: &Ending) -> Result<bool, LedgerError> {
        let (start, now) = (claim.interval.start_ms, CqlTimestamp(ending.now_ms));
        let set_if =
            |holds: bool, at: CqlTimestamp| if holds { MaybeUnset::Set(at) } else { MaybeUnset::Unset };
        let finished = set_if(ending.state != RunState::Retrying, now);
        let retry = set_if(ending.state != RunState::Succeeded, CqlTimestamp(ending.retry_at_ms));
        let Counts { pages, records, acked, bytes } = ending.counts;
        let (state, error) = (ending.state.name(), &ending.error);
        let (day, start) = (day(start), CqlTimestamp(start));
        let stream = &self.stream;
        let values = (
            state,
            pages,
            records,
            acked,
            bytes,
            error,
            now,
            finished,
            retry,
            stream,
            day,
            start,
            claim.epoch,
        );
        applied(self.execute(&self.statements.finish, values).await?)
    }

    async fn record(&self, a: &Attempt) -> Result<(), LedgerError> {
        let start = a.interval.start_ms;
        let status = a.http_status.map_or(MaybeUnset::Unset, MaybeUnset::Set);
        let values = (
            &self.stream,
            day(start),
            CqlTimestamp(start),
            a.number,
            &a.run_id,
            &a.owner,
            &a.outcome,
            &a.cause,
            status,
            a.counts.pages,
            a.counts.records,
            a.counts.bytes,
            CqlTimestamp(a.started_ms),
            a.milliseconds,
        );
        self.execute(&self.statements.record, values).await.map(|_| ())
    }

    async fn attempts(&self, start_ms: i64) -> Result<Vec<Attempt>, LedgerError> {
        let key = (&self.stream, day(start_ms), CqlTimestamp(start_ms));
        let rows = self.rows(&self.statements.attempts, key).await?;
        let rows = rows.rows::<AttemptRow>().map_err(unreadable)?;
        rows.map(|row| row.map(AttemptRow::read).map_err(unreadable)).collect()
    }

    async fn overrule(
        &self,
        seen: &Run,
        state: RunState,
        cause: &str,
        now_ms: i64,
    ) -> Result<bool, LedgerError> {
        let (start, now) = (seen.interval.start_ms, CqlTimestamp(now_ms));
        let finished = set_if(state == RunState::GivenUp, now);
        let (epoch, attempt) = (seen.epoch + 1, seen.attempt + 1);
        let (day, start) = (day(start), CqlTimestamp(start));
        let values =
            (state.name(), cause, epoch, attempt, now, finished, &self.stream, day, start, seen.epoch);
        applied(self.execute(&self.statements.overrule, values).await?)
    }
}
