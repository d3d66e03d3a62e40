//! Contracts and plumbing that every part of the pipeline shares. This crate contains no business logic.
//!
//! Pure contracts: [`stream`] (the stream definition), [`event`] (envelope, ids, placement), [`schema`] (tables as
//! CQL), [`run_ledger`] (states and types of runs), [`control`] (commands), [`windows`] (windows computed from panes).
//!
//! Plumbing: [`config`] (settings), [`telemetry`] (logs), [`admin`] (health, readiness, `/metrics`), [`metrics`]
//! (metric registration), [`presence`] (heartbeats of instances), [`registry`] (how a stream is registered),
//! [`shutdown`] (signals), [`kafka`] and [`cassandra`] (client setup), [`pane_reader`] (pane rows for [`windows`]).

pub mod admin;
pub mod cassandra;
pub mod config;
pub mod control;
pub mod event;
pub mod kafka;
pub mod metrics;
pub mod pane_reader;
pub mod presence;
pub mod registry;
pub mod run_ledger;
pub mod schema;
pub mod shutdown;
pub mod stream;
pub mod telemetry;
pub mod windows;
