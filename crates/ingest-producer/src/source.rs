//! The REST API. Pure modules build requests ([`request`]), find the next page ([`paginate`]), locate values in the
//! text of a page ([`scan`]) and turn records into events ([`extract`]). [`client`] sends the requests within limits
//! and guards.

pub mod client;
pub mod extract;
pub mod paginate;
pub mod request;
pub mod scan;
