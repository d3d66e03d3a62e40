//! End to end on real Kafka and Cassandra, the services as processes: what a user does, with faults that users meet.
//! `./test e2e` starts the servers and names them in the environment; `harness.rs` drives the services.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking, helpers included")]

mod checkpoints;
mod control;
mod dashboard;
mod dead_letters;
mod harness;
mod ingest;
mod ingest_kills;
mod ingest_records;
mod ingest_refusals;
mod instances;
mod layout;
mod ledger;
mod oracle;
mod outages;
mod path;
mod refusals;
mod restored;
mod streams;
mod stress;
mod supervision;
mod topics;
mod truth;
mod verify;
