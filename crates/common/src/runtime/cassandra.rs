//! Opens the Cassandra session that every service uses: consistency `LOCAL_QUORUM`, no driver retries, and no
//! client-side request timeouts, because an abandoned request keeps its stream id. Keepalive requests detect dead
//! connections. Each service has its own statements.

use crate::runtime::config::{CommonArgs, ConfigError, read_secret};
use crate::runtime::shutdown::Shutdown;
use backon::{BackoffBuilder, ExponentialBuilder};
use scylla::client::execution_profile::ExecutionProfile;
use scylla::client::session::Session;
use scylla::client::session_builder::SessionBuilder;
use scylla::errors::{DbError, ExecutionError, PrepareError, RequestAttemptError};
use scylla::policies::load_balancing::{DefaultPolicy, LoadBalancingPolicy};
use scylla::policies::retry::FallthroughRetryPolicy;
use scylla::statement::prepared::PreparedStatement;
use scylla::statement::{Consistency, SerialConsistency};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Interval between keepalive requests on an idle connection.
const KEEPALIVE: Duration = Duration::from_secs(3);
/// A connection is closed if a keepalive request takes longer than this.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(6);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Pause between attempts to prepare a statement.
const PREPARE_PAUSE: Duration = Duration::from_millis(250);

/// No session could be opened.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// No node answered before the deadline.
    #[error(
        "cassandra at {nodes} does not answer ({cause}); is it running, and is PIPELINE_CASSANDRA_NODES right?"
    )]
    Unreachable {
        /// Contact points.
        nodes: String,
        /// The error of the driver.
        cause: String,
    },
    /// The password file cannot be read.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The datacenter to connect to is missing from the settings or from the cluster. The caller exits with code 3.
    #[error(transparent)]
    Datacenter(#[from] DatacenterError),
    /// Shutdown began before the connection was established.
    #[error("stopped while connecting to cassandra")]
    Stopped,
}

/// The local datacenter is not known. All services must use the same one: what a quorum of one datacenter acknowledged
/// may be missing from a quorum of another.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DatacenterError {
    /// The cluster has several datacenters, and the setting names none.
    #[error(
        "the cassandra cluster has {} datacenters ({}): set PIPELINE_CASSANDRA_DATACENTER to the one that all \
         services of this pipeline connect to", .0.len(), .0.join(", ")
    )]
    Unnamed(Vec<String>),
    /// The cluster has no datacenter with the configured name.
    #[error("PIPELINE_CASSANDRA_DATACENTER={named}: the cassandra cluster has {}", there.join(", "))]
    Unknown {
        /// The configured name.
        named: String,
        /// The datacenters of the cluster.
        there: Vec<String>,
    },
    /// Cassandra stopped before the session could read the nodes of the cluster, so the session knows only its contact points.
    #[error("no cassandra node has reported its datacenter yet")]
    NotReported,
}

/// Chooses the datacenter to connect to. `nodes` holds the datacenter of each node, where known.
fn choose_datacenter(named: Option<&str>, nodes: &[Option<String>]) -> Result<String, DatacenterError> {
    let there: BTreeSet<&String> = nodes.iter().flatten().collect();
    let there: Vec<String> = there.into_iter().cloned().collect();
    match (named.filter(|named| !named.is_empty()), &there[..]) {
        (_, []) => Err(DatacenterError::NotReported),
        (Some(named), there) if there.iter().any(|name| name == named) => Ok(named.to_owned()),
        (Some(named), _) => Err(DatacenterError::Unknown { named: named.to_owned(), there }),
        (None, [one]) => Ok(one.clone()),
        (None, _) => Err(DatacenterError::Unnamed(there)),
    }
}

/// The datacenter that the session sends its requests to.
pub fn local_datacenter(session: &Session, settings: &CommonArgs) -> Result<String, DatacenterError> {
    let state = session.get_cluster_state();
    let nodes: Vec<_> = state.get_nodes_info().iter().map(|node| node.datacenter.clone()).collect();
    choose_datacenter(settings.cassandra_datacenter.as_deref(), &nodes)
}

/// Restricts requests to the configured datacenter. Without one, requests may go to every node.
fn balancing(settings: &CommonArgs) -> Arc<dyn LoadBalancingPolicy> {
    let builder = DefaultPolicy::builder();
    let named = settings.cassandra_datacenter.clone().filter(|named| !named.is_empty());
    match named {
        Some(named) => builder.prefer_datacenter(named).permit_dc_failover(false).build(),
        None => builder.build(),
    }
}

/// Connects, and retries with backoff until `deadline` has passed since the call or shutdown begins.
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
        .load_balancing_policy(balancing(settings))
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
                Ok(session) => match local_datacenter(&session, settings) {
                    Ok(_) => return Ok(Arc::new(session)),
                    Err(error @ DatacenterError::NotReported) => error.to_string(),
                    Err(error) => return Err(error.into()),
                },
                Err(e) => e.to_string(),
            },
        };
        let pause = pauses.next().unwrap_or(Duration::from_secs(1));
        if started.elapsed() + pause > deadline {
            return Err(ConnectError::Unreachable { nodes: settings.cassandra_nodes.clone(), cause });
        }
        tracing::debug!(cause, "cannot connect to cassandra yet, retrying");
        tokio::select! {
            () = shutdown.begun() => return Err(ConnectError::Stopped),
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// How the caller handles a failed request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// The cluster is overloaded: reduce the load, then retry.
    Overloaded,
    /// The request may succeed later: retry.
    Unavailable,
    /// The request can never succeed, because the statement, the schema or the permissions are wrong.
    Refused,
}

/// Maps the error of a request to the way the caller handles it.
pub fn classify(error: &ExecutionError) -> Failure {
    match error {
        ExecutionError::LastAttemptError(error) => classify_attempt(error),
        ExecutionError::PrepareError(error) => classify_prepare(error),
        ExecutionError::BadQuery(_) => Failure::Refused,
        ExecutionError::RequestTimeout(_) => Failure::Overloaded,
        _ => Failure::Unavailable,
    }
}

/// Maps the error of a statement that could not be prepared to the way the caller handles it.
pub fn classify_prepare(error: &PrepareError) -> Failure {
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
    /// The table or column does not exist, or the user lacks the permission.
    #[error("cassandra: {0}; run `stream-processor init` for this stream")]
    NotSetUp(String),
    /// Cassandra did not answer before the deadline.
    #[error("cassandra does not answer: {0}")]
    Unavailable(String),
}

/// Prepares a statement and marks it idempotent. Retries until `deadline` while Cassandra is unavailable or overloaded.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_datacenter_setting_is_required_only_if_the_cluster_has_several() {
        let check = |named: Option<&str>, nodes: &[&str], expected: Result<&str, &str>| {
            let nodes: Vec<_> = nodes.iter().map(|name| Some((*name).to_owned())).collect();
            let chosen = choose_datacenter(named, &nodes);
            match (&chosen, expected) {
                (Ok(chosen), Ok(expected)) => assert_eq!(chosen, expected),
                (Err(error), Err(expected)) => assert!(error.to_string().contains(expected), "{error}"),
                _ => panic!("{named:?} of {nodes:?}: {chosen:?}"),
            }
        };
        check(None, &["dc1", "dc1"], Ok("dc1"));
        check(Some(""), &["dc1"], Ok("dc1"));
        check(Some("dc2"), &["dc1", "dc2"], Ok("dc2"));
        check(None, &[], Err("no cassandra node has reported its datacenter"));
        check(Some("dc1"), &[], Err("no cassandra node has reported its datacenter"));
        check(None, &["dc2", "dc1", "dc1"], Err("2 datacenters (dc1, dc2): set PIPELINE"));
        check(
            Some("dc3"),
            &["dc1", "dc2"],
            Err("PIPELINE_CASSANDRA_DATACENTER=dc3: the cassandra cluster has dc1, dc2"),
        );
    }
}
