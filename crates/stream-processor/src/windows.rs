//! Panes (tumbling windows of the smallest size), what is kept of them in memory, and how copies are recognised. Pure.

pub mod filter;
pub mod hot;
pub mod pane;
