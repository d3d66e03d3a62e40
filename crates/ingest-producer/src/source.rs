//! The REST API. Pure modules build requests ([`request`]), find the next page ([`paginate`]), decode bodies ([`body`]),
//! locate values in the text of a page ([`scan`]), find its records ([`records`]) and turn them into events
//! ([`extract`]). `common` contains what the processor uses too. [`client`] sends the requests within limits and guards, with the credentials of [`auth`]. [`walk`]
//! fetches page after page.

pub mod auth;
pub mod body;
pub mod client;
mod guard;
pub mod paginate;
pub mod records;
pub mod request;
pub mod walk;

pub use common::contracts::{extract, scan};
