//! Logging to stderr: JSON lines with RFC 3339 times in UTC, or a human-readable format on a terminal.

use crate::runtime::config::{CommonArgs, LogFormat};
use std::io::IsTerminal;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::time::UtcTime;

/// Directives that silence noisy targets unless the filter names them: librdkafka and the Cassandra driver log the same
/// error over and over while a server is down, and the job scheduler logs each job.
const QUIET: [&str; 3] = ["scylla=off", "librdkafka=error", "tokio_cron_scheduler=error"];

/// Initializes logging. Fails if the configured log filter is invalid.
pub fn init(settings: &CommonArgs) -> Result<(), String> {
    let mut filter = EnvFilter::try_new(&settings.log).map_err(|e| {
        format!("log filter `{}`: {e}; use for example `info` or `info,stream_processor=debug`", settings.log)
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
    started.map_err(|e| format!("logging: {e}"))
}
