//! Errors of the processor, classified by how the caller handles them.

use crate::count::partition::LaterOffset;
use crate::pipeline::start::Refusal;
use common::runtime::cassandra::{ConnectError, DatacenterError};

/// An error of the processor. An undecodable record is not an error: it goes to the dead-letter topic.
#[derive(Debug, thiserror::Error)]
pub enum ProcessorError {
    /// The call did not succeed within its deadline. It may succeed later.
    #[error("{0}")]
    Retryable(String),
    /// A retry cannot succeed. The process must exit.
    #[error("{0}")]
    Fatal(String),
    /// History is lost, or the stream has another layout. The process must exit with code 3.
    #[error("{0}")]
    Refused(String),
    /// The facts that the partition's start was decided on are no longer true. The partition must be reopened.
    #[error("{0}")]
    Reopen(String),
    /// This partition cannot continue. Other partitions are not affected.
    #[error(transparent)]
    Halted(#[from] Halt),
    /// Shutdown or a rebalance started before the call finished.
    #[error("stopped")]
    Stopped,
}

/// Why a partition is halted at an offset that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("partition {partition} is halted at offset {offset}: {cause}; {}", self.remedy())]
pub struct Halt {
    /// Kafka partition.
    pub partition: i32,
    /// First offset that cannot be read.
    pub offset: i64,
    /// Error reported by Kafka.
    pub cause: String,
    /// First readable offset after `offset`; `None` if none was found.
    pub readable_from: Option<i64>,
}

impl Halt {
    /// What an operator can do about it.
    fn remedy(&self) -> String {
        let to = self.readable_from.map_or_else(|| "OFFSET".to_owned(), |to| to.to_string());
        format!(
            "the processor keeps retrying; if the records are lost for good, run `stream-processor skip --partition {} \
             --from {} --to {to}` to continue without them",
            self.partition, self.offset
        )
    }
}

impl ProcessorError {
    /// Exit code of a process that exits because of this error.
    pub fn exit_code(&self) -> u8 {
        match self {
            ProcessorError::Refused(_) => 3,
            _ => 1,
        }
    }
}

impl From<ConnectError> for ProcessorError {
    fn from(error: ConnectError) -> Self {
        match error {
            ConnectError::Datacenter(error) => error.into(),
            error => ProcessorError::Retryable(error.to_string()),
        }
    }
}

impl From<DatacenterError> for ProcessorError {
    fn from(error: DatacenterError) -> Self {
        match error {
            DatacenterError::NotReported => ProcessorError::Retryable(error.to_string()),
            error => ProcessorError::Refused(error.to_string()),
        }
    }
}

impl From<Refusal> for ProcessorError {
    fn from(refusal: Refusal) -> Self {
        ProcessorError::Refused(refusal.to_string())
    }
}

impl From<LaterOffset> for ProcessorError {
    fn from(error: LaterOffset) -> Self {
        ProcessorError::Refused(format!("{error}; restore the original topic, or give the stream a new name"))
    }
}
