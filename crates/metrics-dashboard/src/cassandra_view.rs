//! Reads progress, throughput, instances and the latest runs from Cassandra. Never writes. The feed decides when to
//! read.

use crate::error::Error;
use crate::overview::{ProgressRow, StoreFacts};
use crate::rates::{History, Sample, WINDOW_SECONDS};
use crate::services::{RefusalRow, ServiceRow};
use common::contracts::event::{DAY_MS, floor_to};
use common::contracts::schema::Resolution;
use common::contracts::stream::Definition;
use common::readers::pane_reader::PaneReader;
use common::readers::registry::{check_layout, check_tables};
use common::runtime::config::CommonArgs;
use common::runtime::shutdown::Shutdown;
use futures::TryStreamExt;
use scylla::client::session::Session;
use scylla::errors::{DbError, PrepareError, RequestAttemptError};
use scylla::statement::prepared::PreparedStatement;
use scylla::value::CqlTimestamp;
use serde::Serialize;
use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

/// Longest wait for a connection before the reason is shown.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Each read repeats the rows of this many seconds, because the processor may write rows late.
const OVERLAP_SECONDS: i64 = 30;
/// Most runs in the list.
const MAX_RUNS: i32 = 25;
/// How far before the last hour the one-minute rows are searched for the total at its start.
const BASELINE_SECONDS: i64 = 2 * 86_400;
/// The services whose instances are listed.
const SERVICES: [&str; 3] = ["ingest-producer", "stream-processor", "metrics-dashboard"];

/// A row of `ingest_runs`; times in Unix milliseconds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RunRow {
    /// First millisecond of the interval.
    pub interval_start: i64,
    /// First millisecond after it.
    pub interval_end: Option<i64>,
    /// Name of a [`common::contracts::run_ledger::RunState`].
    pub state: Option<String>,
    /// Name of a [`common::contracts::run_ledger::RunType`].
    pub run_type: Option<String>,
    /// Number of attempts started.
    pub attempt: Option<i32>,
    /// Records fetched.
    pub records: Option<i64>,
    /// Records acknowledged by Kafka.
    pub acked: Option<i64>,
    /// When the last attempt started.
    pub started_at: Option<i64>,
    /// When the last attempt ended.
    pub finished_at: Option<i64>,
    /// Why the last attempt failed.
    pub error: Option<String>,
}

/// A session with its prepared statements, and the throughput of the last hour.
pub struct CassandraView {
    session: Arc<Session>,
    stream: String,
    statements: Statements,
    panes: PaneReader,
    zero_at_start: bool,
    seconds: RwLock<Seconds>,
}

struct Seconds {
    history: History,
    /// Rows are read up to this time, in Unix seconds.
    read_until: i64,
}

struct Statements {
    progress: PreparedStatement,
    throughput: PreparedStatement,
    services: PreparedStatement,
    refusals: PreparedStatement,
    runs: PreparedStatement,
}

/// Keeps only the first line of the error. The other lines describe internals of the driver.
fn failed(error: impl std::fmt::Display) -> Error {
    let text = error.to_string();
    Error::Cassandra(text.lines().next().unwrap_or_default().to_owned())
}

/// If Cassandra rejected the statement, keeps only its own message without the context that the driver adds.
fn not_prepared(error: PrepareError) -> Error {
    match error {
        PrepareError::AllAttemptsFailed {
            first_attempt: RequestAttemptError::DbError(DbError::Invalid, message),
        } => Error::NoTables(message),
        error => failed(error),
    }
}

impl CassandraView {
    /// Connects, prepares the statements and reads the throughput of the last hour. `now` is in Unix seconds.
    pub async fn open(
        settings: &CommonArgs,
        definition: &Definition,
        now: i64,
        shutdown: &Shutdown,
    ) -> Result<CassandraView, Error> {
        let stream = definition.stream.name.as_str();
        let session = common::runtime::cassandra::connect(settings, CONNECT_TIMEOUT, shutdown).await?;
        check_tables(&session, &settings.keyspace, stream).await?;
        let statements = Statements::prepare(&session, &settings.keyspace).await?;
        check_layout(&session, &settings.keyspace, definition).await?;
        let panes = PaneReader::new(session.clone(), &settings.keyspace, definition).await?;
        let created_at = created_at(&session, &settings.keyspace, stream).await?;
        let baseline_from = now - WINDOW_SECONDS - BASELINE_SECONDS;
        let zero_at_start = created_at.is_some_and(|at| at / 1000 > baseline_from);
        let seconds = RwLock::new(Seconds {
            history: History::new(i64::from(Resolution::SECONDS.step), zero_at_start),
            read_until: 0,
        });
        let view =
            CassandraView { session, stream: stream.to_owned(), statements, panes, zero_at_start, seconds };
        view.load_history(now).await?;
        Ok(view)
    }

    /// Reads progress and rates as of `now`, in Unix seconds.
    pub async fn read(&self, now: i64) -> Result<StoreFacts, Error> {
        let since = self.with_seconds(|s| s.read_until) - OVERLAP_SECONDS;
        let (progress, samples) =
            futures::try_join!(self.progress(), self.samples(Resolution::SECONDS, since, now + 1))?;
        let rates = self.with_seconds(|s| {
            samples.into_iter().for_each(|sample| s.history.observe(sample));
            s.history.forget_before(now - WINDOW_SECONDS);
            s.read_until = now;
            s.history.rates(now)
        });
        Ok(StoreFacts { progress, rates })
    }

    /// The throughput of the last hour in steps of one second, and the Unix second up to which it has been read.
    pub fn last_hour(&self) -> (History, i64) {
        self.with_seconds(|s| (s.history.clone(), s.read_until))
    }

    /// Reads the throughput in `[from, to)`, in Unix seconds, in steps of one minute.
    pub async fn minutes(&self, from: i64, to: i64) -> Result<History, Error> {
        let mut history = History::new(i64::from(Resolution::MINUTES.step), self.zero_at_start);
        for sample in self.samples(Resolution::MINUTES, from - DAY_MS / 1000, to).await? {
            history.observe(sample);
        }
        history.forget_before(from);
        Ok(history)
    }

    /// Reads the latest runs of today and yesterday, newest first. `now_ms` is in Unix milliseconds.
    pub async fn runs(&self, now_ms: i64) -> Result<Vec<RunRow>, Error> {
        let today = floor_to(now_ms, DAY_MS);
        let (mut runs, yesterday) =
            futures::try_join!(self.runs_of_day(today), self.runs_of_day(today - DAY_MS))?;
        runs.extend(yesterday);
        runs.truncate(usize::try_from(MAX_RUNS).unwrap_or(0));
        Ok(runs)
    }

    /// Reads the rows of all instances that sent a heartbeat within the last minute, and of all that refused to run.
    pub async fn services(&self) -> Result<(Vec<ServiceRow>, Vec<RefusalRow>), Error> {
        let (session, values) = (&self.session, (&SERVICES[..],));
        let (alive, refused) = futures::try_join!(
            session.execute_unpaged(&self.statements.services, values),
            session.execute_unpaged(&self.statements.refusals, values)
        )
        .map_err(failed)?;
        let (alive, refused) =
            (alive.into_rows_result().map_err(failed)?, refused.into_rows_result().map_err(failed)?);
        type At = Option<CqlTimestamp>;
        let mut rows = Vec::new();
        type Held = Option<BTreeMap<i32, String>>;
        type Alive = (String, String, Option<String>, At, At, Option<bool>, Option<String>, Held);
        for row in alive.rows::<Alive>().map_err(failed)? {
            let (service, instance, version, started_at, seen_at, ready, stream, partitions) =
                row.map_err(failed)?;
            let (started_at, seen_at) = (started_at.map(|t| t.0), seen_at.map(|t| t.0));
            let ready = ready.unwrap_or(false);
            let partitions = partitions.filter(|_| stream.as_ref() == Some(&self.stream)).unwrap_or_default();
            rows.push(ServiceRow { service, instance, version, started_at, seen_at, ready, partitions });
        }
        let mut refusals = Vec::new();
        for row in refused.rows::<(String, String, Option<String>, At)>().map_err(failed)? {
            let (service, instance, reason, at) = row.map_err(failed)?;
            let (reason, at) = (reason.unwrap_or_default(), at.map_or(0, |t| t.0));
            refusals.push(RefusalRow { service, instance, reason, at });
        }
        Ok((rows, refusals))
    }

    /// Reads pane rows, over the same session.
    pub fn panes(&self) -> &PaneReader {
        &self.panes
    }

    /// The session, which also sends the heartbeats of this instance.
    pub fn session(&self) -> Arc<Session> {
        self.session.clone()
    }

    fn with_seconds<T>(&self, act: impl FnOnce(&mut Seconds) -> T) -> T {
        act(&mut self.seconds.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// Reads the last hour in steps of one second, and the minutes before it to find the totals at its start.
    async fn load_history(&self, now: i64) -> Result<(), Error> {
        let hour = floor_to(now - WINDOW_SECONDS, i64::from(Resolution::MINUTES.step));
        let (before, within) = futures::try_join!(
            self.samples(Resolution::MINUTES, hour - BASELINE_SECONDS, hour),
            self.samples(Resolution::SECONDS, hour, now + 1)
        )?;
        self.with_seconds(|s| {
            before.into_iter().chain(within).for_each(|sample| s.history.observe(sample));
            s.history.forget_before(now - WINDOW_SECONDS);
            s.read_until = now;
        });
        Ok(())
    }

    async fn progress(&self) -> Result<BTreeMap<i32, ProgressRow>, Error> {
        let found =
            self.session.execute_unpaged(&self.statements.progress, (&self.stream,)).await.map_err(failed)?;
        let found = found.into_rows_result().map_err(failed)?;
        type Row = (i32, Option<i64>, Option<i64>, Option<i64>, Option<i64>, Option<i64>, Option<i64>);
        let mut progress = BTreeMap::new();
        for row in found.rows::<Row>().map_err(failed)? {
            let (partition, next_offset, events, duplicates, revised, late, dead_letters) =
                row.map_err(failed)?;
            let row = ProgressRow {
                next_offset: next_offset.unwrap_or(0),
                events: events.unwrap_or(0),
                duplicates: duplicates.unwrap_or(0),
                revised: revised.unwrap_or(0),
                late: late.unwrap_or(0),
                dead_letters: dead_letters.unwrap_or(0),
            };
            progress.insert(partition, row);
        }
        Ok(progress)
    }

    /// Reads the rows of `throughput` with `from <= at < to`, in Unix seconds, slot by slot.
    async fn samples(&self, resolution: Resolution, from: i64, to: i64) -> Result<Vec<Sample>, Error> {
        let mut samples = Vec::new();
        let mut slot = floor_to(from, resolution.slot);
        while slot < to {
            let (slot_at, from_at, to_at) =
                (ms(slot), ms(from.max(slot)), ms(to.min(slot + resolution.slot)));
            let key = (&self.stream, resolution.step, slot_at, from_at, to_at);
            let rows =
                self.session.execute_iter(self.statements.throughput.clone(), key).await.map_err(failed)?;
            let mut rows = rows.rows_stream::<(CqlTimestamp, i32, Option<i64>)>().map_err(failed)?;
            while let Some((at, partition, total)) = rows.try_next().await.map_err(failed)? {
                samples.extend(total.map(|total| Sample { partition, at: at.0.div_euclid(1000), total }));
            }
            slot += resolution.slot;
        }
        Ok(samples)
    }

    async fn runs_of_day(&self, day_ms: i64) -> Result<Vec<RunRow>, Error> {
        let key = (&self.stream, CqlTimestamp(day_ms), MAX_RUNS);
        let found = self.session.execute_unpaged(&self.statements.runs, key).await.map_err(failed)?;
        let found = found.into_rows_result().map_err(failed)?;
        type At = Option<CqlTimestamp>;
        type Text = Option<String>;
        type Row = (CqlTimestamp, At, Text, Text, Option<i32>, Option<i64>, Option<i64>, At, At, Text);
        let mut runs = Vec::new();
        for row in found.rows::<Row>().map_err(failed)? {
            let (start, end, state, run_type, attempt, records, acked, started, finished, error) =
                row.map_err(failed)?;
            runs.push(RunRow {
                interval_start: start.0,
                interval_end: end.map(|t| t.0),
                state,
                run_type,
                attempt,
                records,
                acked,
                started_at: started.map(|t| t.0),
                finished_at: finished.map(|t| t.0),
                error,
            });
        }
        Ok(runs)
    }
}

impl Statements {
    async fn prepare(session: &Session, keyspace: &str) -> Result<Statements, Error> {
        let prepare = async |cql: String| session.prepare(cql).await.map_err(not_prepared);
        Ok(Statements {
            progress: prepare(format!(
                "SELECT kafka_partition, next_offset, events, duplicates, revised, late, dead_letters \
                 FROM {keyspace}.partition_progress WHERE stream = ?"
            ))
            .await?,
            throughput: prepare(format!(
                "SELECT at, kafka_partition, total FROM {keyspace}.throughput \
                 WHERE stream = ? AND resolution = ? AND slot = ? AND at >= ? AND at < ?"
            ))
            .await?,
            services: prepare(format!(
                "SELECT service, instance, version, started_at, seen_at, ready, stream, partitions FROM {keyspace}.services \
                 WHERE service IN ?"
            ))
            .await?,
            refusals: prepare(format!(
                "SELECT service, instance, reason, at FROM {keyspace}.refusals WHERE service IN ?"
            ))
            .await?,
            runs: prepare(format!(
                "SELECT interval_start, interval_end, state, run_type, attempt, records, acked, started_at, \
                 finished_at, error FROM {keyspace}.ingest_runs WHERE stream = ? AND day = ? \
                 ORDER BY interval_start DESC LIMIT ?"
            ))
            .await?,
        })
    }
}

/// When `init` registered the stream, in Unix milliseconds.
async fn created_at(session: &Session, keyspace: &str, stream: &str) -> Result<Option<i64>, Error> {
    let query = format!("SELECT created_at FROM {keyspace}.streams WHERE stream = ?");
    let statement = session.prepare(query).await.map_err(not_prepared)?;
    let found = session.execute_unpaged(&statement, (stream,)).await.map_err(failed)?;
    let row = found.into_rows_result().map_err(failed)?.maybe_first_row::<(Option<CqlTimestamp>,)>();
    Ok(row.map_err(failed)?.and_then(|(at,)| at).map(|at| at.0))
}

fn ms(seconds: i64) -> CqlTimestamp {
    CqlTimestamp(seconds * 1000)
}
