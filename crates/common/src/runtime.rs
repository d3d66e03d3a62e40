//! What every service runs on: settings, logs, metrics, health, signals, alarms, and the clients of Kafka and Cassandra.

pub mod admin;
pub mod alarm;
pub mod cassandra;
pub mod config;
pub mod kafka;
pub mod metrics;
pub mod presence;
pub mod shutdown;
pub mod telemetry;
