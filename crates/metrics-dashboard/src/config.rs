//! Settings: flag, then `PIPELINE_…` in the environment, then the file of `--config`, then the default.

use clap::Parser;
use common::config::CommonArgs;
use serde::Serialize;
use std::net::SocketAddr;

/// Shows what the pipeline does: a live page, JSON, a feed and metrics.
#[derive(Debug, Clone, Parser, Serialize)]
#[command(name = "metrics-dashboard", version)]
pub struct Config {
    /// Settings of every service.
    #[command(flatten)]
    #[serde(flatten)]
    pub common: CommonArgs,
    /// Address of the page, the API, /healthz, /readyz and /metrics
    #[arg(long, env = "PIPELINE_HTTP_LISTEN", default_value = "127.0.0.1:8050")]
    pub http_listen: SocketAddr,
}

impl Config {
    /// Reads the command line, the environment and the settings file; a mistake ends the process with exit code 2.
    pub fn parse_all() -> Config {
        common::config::parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsString;

    #[test]
    fn the_address_has_its_default_and_gives_way_to_a_flag() {
        let parse = |arguments: &[&str]| {
            let arguments = arguments.iter().map(OsString::from).collect();
            common::config::parse_from::<Config>(arguments, None).unwrap()
        };
        let given = parse(&["metrics-dashboard", "--http-listen", "127.0.0.1:9", "--keyspace", "k"]);
        assert_eq!((given.http_listen.port(), given.common.keyspace.as_str()), (9, "k"));
    }
}
