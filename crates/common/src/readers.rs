//! Readers of stored data that several services share: panes, windows and the registration of a stream.

pub mod pane_reader;
pub mod registry;
pub mod windows;
