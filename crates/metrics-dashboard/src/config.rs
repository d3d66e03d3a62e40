//! Settings of this service. See [`common::runtime::config`] for their sources and precedence.

use clap::Parser;
use common::runtime::config::CommonArgs;
use serde::Serialize;
use std::net::SocketAddr;

/// Serves the live page, the JSON API, the event stream and the metrics.
#[derive(Debug, Clone, Parser, Serialize)]
#[command(name = "metrics-dashboard", version)]
pub struct Config {
    /// Address of the page, the API, /healthz, /readyz and /metrics
    #[arg(long, env = "PIPELINE_HTTP_LISTEN", default_value = "127.0.0.1:8050")]
    pub http_listen: SocketAddr,
    /// Settings of every service.
    #[command(flatten)]
    #[serde(flatten)]
    pub common: CommonArgs,
}

impl Config {
    /// Parses the command line, the environment and the settings file. Exits with code 2 if a setting is invalid.
    pub fn parse_all() -> Config {
        common::runtime::config::parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsString;

    #[test]
    fn a_flag_overrides_the_default_address() {
        let parse = |arguments: &[&str]| {
            let arguments = arguments.iter().map(OsString::from).collect();
            common::runtime::config::parse_from::<Config>(arguments, None).unwrap()
        };
        let given = parse(&["metrics-dashboard", "--http-listen", "127.0.0.1:9", "--keyspace", "k"]);
        assert_eq!((given.http_listen.port(), given.common.keyspace.as_str()), (9, "k"));
    }
}
