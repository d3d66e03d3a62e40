//! Errors of reads from Kafka and Cassandra, and how the caller handles them. The service only reads, so it can retry
//! every failed read. Only invalid settings end it.

use crate::reason::{Origin, Reason};
use common::readers::pane_reader::PaneReadError;
use common::readers::registry::RegistryError;
use common::runtime::cassandra::{ConnectError, Failure, classify_prepare};
use common::runtime::kafka::KafkaError;

/// How the caller handles an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Show the reason and retry in a second.
    Retryable,
    /// Stop, because the settings are wrong.
    Fatal,
}

/// Why a read failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Cassandra does not respond, or rejects the request.
    #[error("cassandra: {0}")]
    Cassandra(String),
    /// The tables do not exist.
    #[error("cassandra: {0}; has `stream-processor init` run?")]
    NoTables(String),
    /// The panes cannot be read.
    #[error(transparent)]
    Panes(#[from] PaneReadError),
    /// The stream is not registered, or its registration does not match.
    #[error("cassandra: {0}")]
    Registry(#[from] RegistryError),
    /// There is no connection to Cassandra.
    #[error(transparent)]
    NoConnection(#[from] ConnectError),
    /// Kafka does not respond, or the topic does not exist.
    #[error("{0}")]
    Kafka(#[from] KafkaError),
}

impl Error {
    /// How the caller handles the error.
    pub fn kind(&self) -> Kind {
        match self {
            Error::NoConnection(ConnectError::Config(_)) => Kind::Fatal,
            Error::Cassandra(_)
            | Error::NoTables(_)
            | Error::Panes(_)
            | Error::Registry(_)
            | Error::NoConnection(_)
            | Error::Kafka(_) => Kind::Retryable,
        }
    }

    /// The reason that the page and the API show.
    pub fn reason(&self) -> Reason {
        let cassandra = |message: &str| Reason::new(Origin::Cassandra, message);
        let no_tables = "the stream's tables cannot be read; run `stream-processor init` first";
        let read_failed = "a read from cassandra failed and is retried";
        match self {
            Error::Cassandra(detail) | Error::Panes(PaneReadError::Failed(detail)) => {
                cassandra(read_failed).with_detail(detail)
            }
            Error::NoTables(detail) => cassandra(no_tables).with_detail(detail),
            Error::Panes(PaneReadError::NotPrepared(cause)) => {
                let is_missing = classify_prepare(cause) == Failure::Refused;
                cassandra(if is_missing { no_tables } else { read_failed }).with_detail(cause.to_string())
            }
            Error::Registry(
                error @ (RegistryError::NotSetUp { cause, .. } | RegistryError::Unavailable { cause, .. }),
            ) => Reason::without_cause(Origin::Cassandra, error, cause),
            Error::Registry(error @ RegistryError::Another { stream, .. }) => cassandra(&format!(
                "stream `{stream}` is registered with another layout; use the stream file that `stream-processor init` \
                 was last run with, or give the changed stream a new name"
            ))
            .with_detail(error.to_string()),
            Error::Registry(error @ RegistryError::NotRegistered { stream, .. }) => cassandra(&format!(
                "the stream file has changes that are not registered; run `stream-processor init` for stream `{stream}`"
            ))
            .with_detail(error.to_string()),
            Error::Registry(error) => cassandra(&error.to_string()),
            Error::NoConnection(error @ ConnectError::Unreachable { cause, .. }) => {
                Reason::without_cause(Origin::Cassandra, error, cause)
            }
            Error::NoConnection(error) => cassandra(&error.to_string()),
            Error::Kafka(error @ KafkaError::Unreachable { cause, .. }) => {
                Reason::without_cause(Origin::Kafka, error, cause)
            }
            Error::Kafka(error) => Reason::new(Origin::Kafka, error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use scylla::errors::{ConnectionPoolError, DbError, PrepareError, RequestAttemptError};

    #[test]
    fn a_read_from_a_server_that_is_down_is_retried() {
        assert_eq!(Error::Cassandra("no node answers".into()).kind(), Kind::Retryable);
        let missing = Error::NoTables("unconfigured table throughput".into());
        assert_eq!(missing.kind(), Kind::Retryable);
        assert!(missing.to_string().ends_with("has `stream-processor init` run?"));
    }

    #[test]
    fn a_server_that_is_down_is_not_reported_as_missing_tables() {
        let message = |error| Error::Panes(PaneReadError::NotPrepared(error)).reason().message;
        let is_down = PrepareError::ConnectionPoolError(ConnectionPoolError::Initializing);
        assert_eq!(message(is_down), "a read from cassandra failed and is retried");
        let first_attempt = RequestAttemptError::DbError(DbError::Invalid, "unconfigured table".into());
        let is_missing = message(PrepareError::AllAttemptsFailed { first_attempt });
        assert!(is_missing.contains("run `stream-processor init` first"), "{is_missing}");
    }

    #[test]
    fn a_reason_is_one_line_and_has_the_error_of_the_driver_as_its_detail() {
        let cause = "Database returned an error: ...\n  at node 3";
        let differences = || "  - one\n  - two".to_owned();
        let another = RegistryError::Another { stream: "s".into(), differences: differences() };
        let edited = RegistryError::NotRegistered { stream: "s".into(), differences: differences() };
        let unreachable =
            |cause: &str| ConnectError::Unreachable { nodes: "n:1".into(), cause: cause.into() };
        let errors = [
            (Error::Cassandra(cause.into()), "is retried"),
            (Error::NoTables(cause.into()), "run `stream-processor init`"),
            (Error::Panes(PaneReadError::Failed(cause.into())), "is retried"),
            (Error::Registry(another), "give the changed stream a new name"),
            (Error::Registry(edited), "run `stream-processor init` for stream `s`"),
            (Error::NoConnection(unreachable(cause)), "cassandra at n:1 does not answer; is it running"),
            (
                Error::Kafka(KafkaError::Unreachable { brokers: "k:1".into(), cause: cause.into() }),
                "kafka at k:1 does not answer; is it running",
            ),
        ];
        for (error, part) in errors {
            let reason = error.reason();
            assert!(reason.message.contains(part) && !reason.message.contains('\n'), "{reason:?}");
            assert!(reason.detail.is_some_and(|detail| detail.contains('\n')), "{error:?}");
        }
    }
}
