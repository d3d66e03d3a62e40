//! Errors of the commands. Each one displays as a single line with the cause, the log file and a way to fix it. The
//! commands print that line and exit.

use std::path::PathBuf;

/// A result whose error displays as the line that the user reads.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a command of `local-stack` failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Some ports are in use.
    #[error("ports in use: {ports}; free them, or move all ports with --port-base 20000")]
    PortsTaken {
        /// The ports and the parts that need them, such as `9092 (kafka), 9042 (cassandra)`.
        ports: String,
    },
    /// The machine has too little memory.
    #[error(
        "{available_mib} MiB of memory available, {needed_mib} MiB needed; close something or use a larger machine"
    )]
    TooLittleMemory {
        /// Memory available on the machine or in its container.
        available_mib: u64,
        /// Memory that all parts need together.
        needed_mib: u64,
    },
    /// The disk has too little free space.
    #[error("{available_mib} MiB free on the disk of {}, {needed_mib} MiB needed; free some space or move the checkout", folder.display())]
    TooLittleDisk {
        /// A folder on that disk.
        folder: PathBuf,
        /// Free space on that disk.
        available_mib: u64,
        /// Space that a first start needs.
        needed_mib: u64,
    },
    /// A part exited although it should keep running.
    #[error("{name} ended while starting ({ended}): {cause}; log: {}", log.display())]
    DiedAtStart {
        /// Name of the part.
        name: String,
        /// How it exited, such as `exit code 1` or `signal 9`.
        ended: String,
        /// The line of its log that most likely names the cause.
        cause: String,
        /// Path of its log.
        log: PathBuf,
    },
    /// A part runs but does not become ready.
    #[error("{name} is running but not ready after {seconds} s (waiting for {awaited}): {cause}; log: {}", log.display())]
    NotReady {
        /// Name of the part.
        name: String,
        /// Address or event that this process waited for.
        awaited: String,
        /// How long this process waited, in seconds.
        seconds: u64,
        /// The line of its log that most likely names the cause.
        cause: String,
        /// Path of its log.
        log: PathBuf,
    },
    /// A tool such as Maven failed or is not installed.
    #[error("{tool}: {cause}; {hint}")]
    Tool {
        /// Name of the tool.
        tool: String,
        /// Its error message.
        cause: String,
        /// What the user can do about it.
        hint: String,
    },
    /// Any other failure. The text includes the way to fix it.
    #[error("{0}")]
    Refused(String),
    /// A file or folder could not be accessed.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Error of the operating system.
        source: std::io::Error,
    },
}

impl Error {
    /// The error for a start while the stack of this checkout is already running.
    pub fn already_running() -> Self {
        Self::Refused("already running; see ./run status, or stop it with ./run stop".to_owned())
    }

    /// Adds the path to the error of a file operation: `fs::read(&path).map_err(Error::io(&path))`.
    pub fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}
