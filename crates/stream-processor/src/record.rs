//! From Kafka records to decoded events. Pure.

pub mod chunk;
pub mod decode;
