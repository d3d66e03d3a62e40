//! Deduplication, counting and windows. Pure.

pub mod partition;
pub mod poison_gate;
pub mod windows;
pub mod write_plan;
