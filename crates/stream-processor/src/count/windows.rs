//! Panes, which are tumbling windows of the smallest size, their state in memory, and the filters that detect copies.
//! Pure.

pub mod filter;
pub mod hot;
pub mod pane;
