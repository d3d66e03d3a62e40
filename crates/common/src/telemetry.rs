//! Logs: JSON lines with RFC 3339 UTC times, pretty on a terminal, always on stderr. Metrics are each service's own.

use crate::config::{CommonArgs, LogFormat};
use std::io::IsTerminal;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::time::UtcTime;

/// What an operator would want quiet at `info`: librdkafka repeats itself while a broker is away, and so does the driver.
const QUIET: [&str; 2] = ["scylla=off", "librdkafka=error"];

/// Starts logging for `service`; the error names the filter that cannot be read.
pub fn init(service: &'static str, settings: &CommonArgs) -> Result<(), String> {
    let mut filter = EnvFilter::try_new(&settings.log).map_err(|e| {
        format!("log filter `{}`: {e}; such as `info` or `info,stream_processor=debug`", settings.log)
    })?;
    for quiet in QUIET {
        let target = quiet.split('=').next().unwrap_or(quiet);
        if !settings.log.contains(target) {
            filter = filter.add_directive(quiet.parse().map_err(|e| format!("log directive {quiet}: {e}"))?);
        }
    }
    let pretty = match settings.log_format {
        LogFormat::Auto => std::io::stderr().is_terminal(),
        LogFormat::Json => false,
        LogFormat::Pretty => true,
    };
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let started = if pretty {
        builder.with_timer(UtcTime::rfc_3339()).with_target(false).try_init()
    } else {
        builder.with_timer(UtcTime::rfc_3339()).json().flatten_event(true).with_current_span(false).try_init()
    };
    started.map_err(|e| format!("logging: {e}"))?;
    tracing::info!(service, version = env!("CARGO_PKG_VERSION"), "starting");
    Ok(())
}
