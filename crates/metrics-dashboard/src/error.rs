//! What can go wrong here, sorted by what the caller does about it. Nothing a reader of other people's data does can
//! poison it: what does not answer is asked again, and what can never work ends the service at its start.

use common::cassandra::ConnectError;
use common::pane_reader::PaneReadError;
use common::registry::RegistryError;

/// What the caller does about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Show the reason, ask again in a second.
    Retryable,
    /// Stop: the settings are wrong.
    Fatal,
}

/// A server did not give the answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Cassandra does not answer, or refuses.
    #[error("cassandra: {0}")]
    Cassandra(String),
    /// The tables are not there.
    #[error("cassandra: {0}; has `stream-processor init` run?")]
    NoTables(String),
    /// Panes cannot be read.
    #[error(transparent)]
    Panes(#[from] PaneReadError),
    /// The stream was not made, or was made otherwise.
    #[error("cassandra: {0}")]
    Registry(#[from] RegistryError),
    /// No connection with Cassandra.
    #[error(transparent)]
    NoConnection(#[from] ConnectError),
    /// Kafka does not answer, or has no such topic.
    #[error("{0}")]
    Kafka(#[from] common::kafka::KafkaError),
}

impl Error {
    /// What the caller does about it.
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_is_down_is_asked_again() {
        assert_eq!(Error::Cassandra("no node answers".into()).kind(), Kind::Retryable);
        let missing = Error::NoTables("unconfigured table throughput".into());
        assert_eq!(missing.kind(), Kind::Retryable);
        assert!(missing.to_string().ends_with("has `stream-processor init` run?"));
    }
}
