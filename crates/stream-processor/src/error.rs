//! What can go wrong, by what the caller does about it.

use crate::partition::LaterOffset;
use crate::start::Refusal;

/// An error of the processor. Poison is no error here: it is data, and goes to the dead-letter topic.
#[derive(Debug, thiserror::Error)]
pub enum ProcessorError {
    /// May work later; the part that asked has already tried until its deadline.
    #[error("{0}")]
    Retryable(String),
    /// Will never work: stop this process.
    #[error("{0}")]
    Fatal(String),
    /// Lost history or another layout: stop with exit code 3.
    #[error("{0}")]
    Refused(String),
    /// Asked to stop before it was done.
    #[error("stopped")]
    Stopped,
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
