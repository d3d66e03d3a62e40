//! What can go wrong here, sorted by what the caller does about it. Nothing a reader of other people's data does can
//! poison it: what does not answer is asked again, and what can never work ends the service at its start.

use crate::reason::{Reason, Source};
use common::cassandra::ConnectError;
use common::kafka::KafkaError;
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
    Kafka(#[from] KafkaError),
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

    /// What the page and the API say of it.
    pub fn reason(&self) -> Reason {
        let cassandra = |message: &str| Reason::new(Source::Cassandra, message);
        let no_tables = "the stream's tables cannot be read; run `stream-processor init` first";
        match self {
            Error::Cassandra(words) | Error::Panes(PaneReadError::Failed(words)) => {
                cassandra("cassandra did not answer a read; it is asked again").with_detail(words)
            }
            Error::NoTables(words) => cassandra(no_tables).with_detail(words),
            Error::Panes(PaneReadError::NotPrepared(cause)) => {
                cassandra(no_tables).with_detail(cause.to_string())
            }
            Error::Registry(
                error @ (RegistryError::NotSetUp { cause, .. } | RegistryError::Unavailable { cause, .. }),
            ) => Reason::without_cause(Source::Cassandra, error, cause),
            Error::Registry(error @ RegistryError::Another { stream, .. }) => cassandra(&format!(
                "stream `{stream}` is registered with another layout; use the stream file that init was run with last, or give the \
                 changed stream a new name"
            ))
            .with_detail(error.to_string()),
            Error::Registry(error @ RegistryError::NotRegistered { stream, .. }) => cassandra(&format!(
                "the stream file has changes that are not registered; run `stream-processor init` for stream `{stream}`"
            ))
            .with_detail(error.to_string()),
            Error::Registry(error) => cassandra(&error.to_string()),
            Error::NoConnection(error @ ConnectError::Unreachable { cause, .. }) => {
                Reason::without_cause(Source::Cassandra, error, cause)
            }
            Error::NoConnection(error) => cassandra(&error.to_string()),
            Error::Kafka(error @ KafkaError::Unreachable { cause, .. }) => {
                Reason::without_cause(Source::Kafka, error, cause)
            }
            Error::Kafka(error) => Reason::new(Source::Kafka, error.to_string()),
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

    #[test]
    fn a_reason_is_one_line_and_keeps_the_drivers_words_apart() {
        let words = "Database returned an error: ...\n  at node 3";
        let differences = || "  - one\n  - two".to_owned();
        let another = RegistryError::Another { stream: "s".into(), differences: differences() };
        let edited = RegistryError::NotRegistered { stream: "s".into(), differences: differences() };
        let unreachable =
            |cause: &str| ConnectError::Unreachable { nodes: "n:1".into(), cause: cause.into() };
        let errors = [
            (Error::Cassandra(words.into()), "asked again"),
            (Error::NoTables(words.into()), "run `stream-processor init`"),
            (Error::Panes(PaneReadError::Failed(words.into())), "asked again"),
            (Error::Registry(another), "give the changed stream a new name"),
            (Error::Registry(edited), "run `stream-processor init` for stream `s`"),
            (Error::NoConnection(unreachable(words)), "cassandra at n:1 does not answer; is it running"),
            (
                Error::Kafka(KafkaError::Unreachable { brokers: "k:1".into(), cause: words.into() }),
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
