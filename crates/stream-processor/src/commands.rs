//! The operator commands.

pub mod checkpoint;
pub mod dlq;
pub mod init;
pub mod report;
pub mod skip;
pub mod verify;
