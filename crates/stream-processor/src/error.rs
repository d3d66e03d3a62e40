//! Errors of the processor, sorted by what the caller does about them.

use crate::partition::LaterOffset;
use crate::start::Refusal;
use common::cassandra::{ConnectError, DatacenterError};

/// An error of the processor. A record that cannot be decoded is not an error: it goes to the dead-letter topic.
#[derive(Debug, thiserror::Error)]
pub enum ProcessorError {
    /// The call has used up its own deadline; it may succeed later.
    #[error("{0}")]
    Retryable(String),
    /// It will never work: end this process.
    #[error("{0}")]
    Fatal(String),
    /// History is lost, or the stream has another layout: end this process with exit code 3.
    #[error("{0}")]
    Refused(String),
    /// What the start of this partition was decided on is no longer true: open the partition again.
    #[error("{0}")]
    Reopen(String),
    /// This partition cannot go on; the others can.
    #[error(transparent)]
    Halted(#[from] Halt),
    /// Shutdown or a rebalance began before the call was done.
    #[error("stopped")]
    Stopped,
}

/// Why a partition stands still at an offset that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("partition {partition} stands at offset {offset}: {cause}; {}", self.way_on())]
pub struct Halt {
    /// Kafka partition.
    pub partition: i32,
    /// First offset that cannot be read.
    pub offset: i64,
    /// Kafka's words.
    pub cause: String,
    /// First offset after it that can be read, where one was found.
    pub readable_from: Option<i64>,
}

impl Halt {
    /// What an operator can do.
    fn way_on(&self) -> String {
        let to = self.readable_from.map_or_else(|| "OFFSET".to_owned(), |to| to.to_string());
        format!(
            "it is tried again by itself; if the records are lost for good, `stream-processor skip --partition {} --from {} \
             --to {to}` goes on without them",
            self.partition, self.offset
        )
    }
}

impl ProcessorError {
    /// Exit code of a process that ends with this error.
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
        ProcessorError::Refused(format!("{error}; give the stream a new name, or bring the old topic back"))
    }
}
