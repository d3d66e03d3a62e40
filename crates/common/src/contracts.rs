//! What the services agree on: events, stream definitions, tables, topics, the run ledger and commands. No I/O.

pub mod control;
pub mod event;
pub mod run_ledger;
pub mod schema;
pub mod stream;
pub mod time;
pub mod topics;
pub mod value;
