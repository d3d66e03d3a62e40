//! What every part of the pipeline shares. This crate contains no business logic.
//!
//! [`contracts`]: what the services agree on, without I/O: `stream` (the stream definition), `event` (envelope, ids,
//! placement), `schema` (tables as CQL), `run_ledger` (states and types of runs), `control` (commands).
//! [`runtime`]: what every service runs on: `config` (settings), `telemetry` (logs), `admin` (health, readiness,
//! `/metrics`), `metrics` (metric registration), `presence` (heartbeats of instances), `shutdown` (signals), `alarm`
//! (jobs at a given time), `kafka` and `cassandra` (client setup).
//! [`readers`]: `registry` (how a stream is registered), `pane_reader` (pane rows) and `windows` (sums of panes).

pub mod contracts;
pub mod readers;
pub mod runtime;
