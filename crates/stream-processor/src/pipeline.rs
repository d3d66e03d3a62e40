//! The running pipeline: the consumer group, and for each partition the start, the fetch thread and the worker that orders
//! all effects.

pub mod fetch;
pub mod group;
#[cfg(feature = "failpoints")]
pub mod kill_at;
pub mod open;
pub mod stages;
pub mod start;
pub mod worker;
