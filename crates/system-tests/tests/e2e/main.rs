//! End-to-end tests. They run the services as processes against a real Kafka and Cassandra and inject the faults that
//! users meet. `./test e2e` starts the servers and passes their addresses in environment variables. `harness.rs` starts
//! and stops the services.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking, helpers included")]

mod ahead;
mod cases;
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
mod other_programs;
mod outages;
mod path;
mod refusals;
mod restored;
mod schedule;
mod streams;
mod stress;
mod supervision;
mod topics;
mod truth;
mod verify;
