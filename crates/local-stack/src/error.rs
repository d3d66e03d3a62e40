//! What can go wrong on the local machine, each as one line that names the cause, the log file and the way out.
//! Nothing here decides what to do about it: the commands print the line and end.

use std::path::PathBuf;

/// A result whose error is already the line that the user reads.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a command of `local-stack` could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Ports that something else holds, as `9092 (kafka), 9042 (cassandra)`.
    #[error("ports taken: {ports}; free them, or move every port with --port-base 20000")]
    PortsTaken {
        /// The ports with the parts that want them.
        ports: String,
    },
    /// Less memory than the parts need together.
    #[error(
        "{available_mib} MiB of memory available, {needed_mib} MiB needed; close something or use a larger machine"
    )]
    TooLittleMemory {
        /// What the machine (or its container) can still give.
        available_mib: u64,
        /// What the parts need together.
        needed_mib: u64,
    },
    /// Less disk than a first start needs.
    #[error("{available_mib} MiB free on the disk of {}, {needed_mib} MiB needed; free some or move the checkout", folder.display())]
    TooLittleDisk {
        /// The folder whose disk is meant.
        folder: PathBuf,
        /// What is left there.
        available_mib: u64,
        /// What a start needs.
        needed_mib: u64,
    },
    /// A part that ended although it should run.
    #[error("{name} ended while starting ({ended}): {cause}; log: {}", log.display())]
    DiedAtStart {
        /// The part.
        name: String,
        /// How it ended, as `exit code 1`.
        ended: String,
        /// The line of its log that says most.
        cause: String,
        /// The whole log.
        log: PathBuf,
    },
    /// A part that runs and does not answer.
    #[error("{name} runs but does not answer at {address} after {seconds} s: {cause}; log: {}", log.display())]
    NotReady {
        /// The part.
        name: String,
        /// Where an answer was expected.
        address: String,
        /// How long it was waited for.
        seconds: u64,
        /// The line of its log that says most.
        cause: String,
        /// The whole log.
        log: PathBuf,
    },
    /// A tool such as Maven that failed or is not there.
    #[error("{tool}: {cause}; {way_out}")]
    Tool {
        /// What was called.
        tool: String,
        /// What it said.
        cause: String,
        /// What the user can do.
        way_out: String,
    },
    /// A request that makes no sense now, with the way out in the text.
    #[error("{0}")]
    Refused(String),
    /// A file or folder that could not be used.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

impl Error {
    /// A start of what runs already.
    pub fn already_running() -> Self {
        Self::Refused("already running; ./run status shows it, ./run stop ends it".to_owned())
    }

    /// Names the path of a failed file operation: `fs::read(&path).map_err(Error::io(&path))`.
    pub fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}
