//! The Cassandra session set up the one right way: `LOCAL_QUORUM`, no retries and no client-side timeouts of the driver's
//! own (a request given up on keeps its stream id), dead connections found by keepalive. What to ask is each service's own.

use crate::config::{CommonArgs, ConfigError, read_secret};
use crate::shutdown::Shutdown;
use backon::{BackoffBuilder, ExponentialBuilder};
use scylla::client::execution_profile::ExecutionProfile;
use scylla::client::session::Session;
use scylla::client::session_builder::SessionBuilder;
use scylla::errors::{DbError, ExecutionError, PrepareError, RequestAttemptError};
use scylla::policies::retry::FallthroughRetryPolicy;
use scylla::statement::prepared::PreparedStatement;
use scylla::statement::{Consistency, SerialConsistency};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often an idle connection is asked whether it lives.
const KEEPALIVE: Duration = Duration::from_secs(3);
/// How long it may take to answer.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(6);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Pause between attempts to prepare a statement.
const PREPARE_PAUSE: Duration = Duration::from_millis(250);

/// Cassandra could not be reached in time.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// No node answered before the deadline.
    #[error(
        "cassandra at {nodes} does not answer ({cause}); is it running, and is PIPELINE_CASSANDRA_NODES right?"
    )]
    Unreachable {
        /// Contact points.
        nodes: String,
        /// The driver's words.
        cause: String,
    },
    /// The password file cannot be read.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Asked to stop while connecting.
    #[error("stopped while connecting to cassandra")]
    Stopped,
}

/// Connects, trying again until `deadline` has passed or shutdown begins.
pub async fn connect(
    settings: &CommonArgs,
    deadline: Duration,
    shutdown: &Shutdown,
) -> Result<Arc<Session>, ConnectError> {
    let nodes: Vec<&str> =
        settings.cassandra_nodes.split(',').map(str::trim).filter(|n| !n.is_empty()).collect();
    let profile = ExecutionProfile::builder()
        .consistency(Consistency::LocalQuorum)
        .serial_consistency(Some(SerialConsistency::LocalSerial))
        .request_timeout(None)
        .retry_policy(Arc::new(FallthroughRetryPolicy::new()))
        .build();
    let mut builder = SessionBuilder::new()
        .known_nodes(&nodes)
        .default_execution_profile_handle(profile.into_handle())
        .connection_timeout(CONNECT_TIMEOUT)
        .keepalive_interval(KEEPALIVE)
        .keepalive_timeout(KEEPALIVE_TIMEOUT)
        .tcp_nodelay(true);
    let user = settings.cassandra_user.as_ref().filter(|user| !user.is_empty());
    if let (Some(user), Some(file)) = (user, &settings.cassandra_password_file) {
        builder = builder.user(user, read_secret(file)?);
    }
    let started = Instant::now();
    let mut pauses = ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(100))
        .with_max_delay(Duration::from_secs(2))
        .with_jitter()
        .without_max_times()
        .build();
    loop {
        let cause = tokio::select! {
            () = shutdown.begun() => return Err(ConnectError::Stopped),
            connected = builder.build() => match connected {
                Ok(session) => return Ok(Arc::new(session)),
                Err(e) => e.to_string(),
            },
        };
        let pause = pauses.next().unwrap_or(Duration::from_secs(1));
        if started.elapsed() + pause > deadline {
            return Err(ConnectError::Unreachable { nodes: settings.cassandra_nodes.clone(), cause });
        }
        tracing::debug!(cause, "cassandra not yet reachable");
        tokio::select! {
            () = shutdown.begun() => return Err(ConnectError::Stopped),
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// What the caller does about a failed request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// The cluster has too much to do: shrink what is in flight, then try again.
    Overloaded,
    /// It may work later: try again.
    Unavailable,
    /// It will never work: the statement, the schema or the rights are wrong.
    Refused,
}

/// Sorts an error of a request by what the caller does about it.
pub fn classify(error: &ExecutionError) -> Failure {
    match error {
        ExecutionError::LastAttemptError(error) => classify_attempt(error),
        ExecutionError::PrepareError(error) => classify_prepare(error),
        ExecutionError::BadQuery(_) => Failure::Refused,
        ExecutionError::RequestTimeout(_) => Failure::Overloaded,
        _ => Failure::Unavailable,
    }
}

fn classify_prepare(error: &PrepareError) -> Failure {
    match error {
        PrepareError::AllAttemptsFailed { first_attempt } => classify_attempt(first_attempt),
        _ => Failure::Unavailable,
    }
}

fn classify_attempt(error: &RequestAttemptError) -> Failure {
    match error {
        RequestAttemptError::DbError(db, _) => match db {
            DbError::Overloaded | DbError::WriteTimeout { .. } | DbError::ReadTimeout { .. } => {
                Failure::Overloaded
            }
            DbError::SyntaxError
            | DbError::Invalid
            | DbError::Unauthorized
            | DbError::ConfigError
            | DbError::AlreadyExists { .. }
            | DbError::FunctionFailure { .. }
            | DbError::AuthenticationError => Failure::Refused,
            _ => Failure::Unavailable,
        },
        RequestAttemptError::SerializationError(_) | RequestAttemptError::CqlRequestSerialization(_) => {
            Failure::Refused
        }
        RequestAttemptError::UnableToAllocStreamId => Failure::Overloaded,
        _ => Failure::Unavailable,
    }
}

/// A statement could not be prepared.
#[derive(Debug, thiserror::Error)]
pub enum StatementError {
    /// Cassandra knows no such table or column, or denies the right to it.
    #[error("cassandra: {0}; run `stream-processor init` for this stream")]
    NotSetUp(String),
    /// Cassandra did not answer before the deadline.
    #[error("cassandra does not answer: {0}")]
    Unavailable(String),
}

/// Prepares an idempotent statement; tries again while Cassandra is unavailable, at most until `deadline`.
pub async fn prepare(
    session: &Session,
    cql: &str,
    deadline: Instant,
) -> Result<PreparedStatement, StatementError> {
    loop {
        let error = match session.prepare(cql).await {
            Ok(mut statement) => {
                statement.set_is_idempotent(true);
                return Ok(statement);
            }
            Err(error) => error,
        };
        match classify_prepare(&error) {
            Failure::Refused => return Err(StatementError::NotSetUp(error.to_string())),
            _ if Instant::now() + PREPARE_PAUSE > deadline => {
                return Err(StatementError::Unavailable(error.to_string()));
            }
            _ => tokio::time::sleep(PREPARE_PAUSE).await,
        }
    }
}
