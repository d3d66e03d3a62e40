//! The REST API side: what to ask ([`request`]), where the next page is ([`paginate`]), where values stand in a page's text
//! ([`scan`]), how a record becomes an event ([`extract`]), all pure; and [`client`], which asks, with every bound and guard.

pub mod client;
pub mod extract;
pub mod paginate;
pub mod request;
pub mod scan;
