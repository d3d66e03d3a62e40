//! Contracts and plumbing that all parts of the pipeline share; no business logic.
//!
//! Pure contracts: [`stream`] (the stream definition), [`event`] (envelope, ids, placement), [`schema`] (tables as CQL),
//! [`run_ledger`] (words of the ledger), [`control`] (commands), [`windows`] (what readers make of panes). Plumbing: [`config`]
//! (settings), [`telemetry`] (logs), [`admin`] (health, readiness, `/metrics`), [`metrics`] (made and registered at once),
//! [`presence`] (who is alive), [`registry`] (how a stream was made), [`shutdown`] (signals), [`kafka`] and [`cassandra`] (clients set up the one right way),
//! [`pane_reader`] (pane rows for [`windows`]).

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
