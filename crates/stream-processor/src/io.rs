//! Cassandra, the dead-letter topic, state files, and a reader of topics outside the consumer group.

pub mod dead_letters;
pub mod log_reader;
pub mod state;
pub mod store;
