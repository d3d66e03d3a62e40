//! What the services agree on: events and how a record becomes one, stream definitions, tables, topics, the run ledger
//! and commands. No I/O.

pub mod control;
pub mod event;
pub mod extract;
pub mod run_ledger;
pub mod scan;
pub mod schema;
pub mod stream;
pub mod time;
pub mod topics;
pub mod value;
