//! Third-party servers as processes: Kafka, Cassandra and Prometheus, with their configuration, command lines and
//! readiness probes.

pub mod cassandra;
pub mod kafka;
pub mod prometheus;

use std::path::Path;
use std::time::{Duration, Instant};

use crate::config::Settings;
use crate::error::{Error, Result};
use crate::install::Installed;
use crate::process::Process;
use crate::terminal::Terminal;

/// Time limit for Kafka or Cassandra to become ready. Both need 5 to 20 s on two cores.
const READY_TIMEOUT: Duration = Duration::from_secs(120);

/// Poll interval while waiting for a server to become ready.
const PROBE_INTERVAL: Duration = Duration::from_millis(150);

/// A readiness probe.
#[derive(Clone, Debug)]
pub enum Probe {
    /// Kafka metadata lists a broker.
    Kafka(String),
    /// Cassandra answers CQL.
    Cassandra(String),
    /// The address accepts connections.
    Tcp(String),
    /// `GET` returns status 200.
    Http(String),
}

impl Probe {
    /// Probes once and returns whether the part is ready.
    pub async fn answers(&self) -> bool {
        match self {
            Self::Kafka(address) => accepts(address).await && kafka::answers(address).await,
            Self::Cassandra(address) => accepts(address).await && cassandra::answers(address).await,
            Self::Tcp(address) => accepts(address).await,
            Self::Http(url) => http_ok(url).await,
        }
    }

    fn address(&self) -> &str {
        match self {
            Self::Kafka(address) | Self::Cassandra(address) | Self::Tcp(address) | Self::Http(address) => {
                address
            }
        }
    }
}

async fn accepts(address: &str) -> bool {
    tokio::net::TcpStream::connect(address).await.is_ok()
}

/// Returns whether `GET url` returns status 200. Any failure counts as `false`.
pub async fn http_ok(url: &str) -> bool {
    match http_client() {
        Ok(client) => client.get(url).send().await.is_ok_and(|answer| answer.status().as_u16() == 200),
        Err(_) => false,
    }
}

/// Reads the value of a metric from `ADDRESS/metrics`. `name` includes the labels exactly as they are exported. Returns
/// `None` if the service does not answer or does not export the metric.
pub async fn metric(address: &str, name: &str) -> Option<f64> {
    let answer = http_client().ok()?.get(format!("{address}/metrics")).send().await.ok()?;
    let text = answer.text().await.ok()?;
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?.parse().ok()
}

/// Creates an HTTP client for loopback addresses, with a short timeout and without a proxy.
pub fn http_client() -> reqwest::Result<reqwest::Client> {
    // reqwest cannot build a client without a provider. Only the first call installs it; later ones have no effect.
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(5)).build()
}

/// Waits until a started process is ready. Fails at once if the process exits.
pub async fn wait_until_ready(process: &mut Process, probe: &Probe, timeout: Duration) -> Result<()> {
    let deadline = Instant::now() + timeout;
    loop {
        if let Some(status) = process.ended() {
            return Err(process.exit_error(status));
        }
        if probe.answers().await {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(process.not_ready(probe.address(), timeout));
        }
        tokio::time::sleep(PROBE_INTERVAL).await;
    }
}

/// Starts Kafka and Cassandra concurrently. Adds every started process to `started`, even if this function fails.
pub async fn start_pair(
    settings: &Settings,
    installed: &Installed,
    terminal: Terminal,
    started: &mut Vec<Process>,
) -> Result<()> {
    let since = Instant::now();
    let ready = |name: &'static str, address: String| move || terminal.done(name, &address, since.elapsed());
    let cassandra_probe = Probe::Cassandra(crate::config::loopback(settings.ports.cassandra));
    let kafka_probe = Probe::Kafka(crate::config::loopback(settings.ports.kafka));
    let first = started.len();
    started.push(Process::spawn(&cassandra::spec(settings, installed)?, &settings.folders)?);
    kafka::format(settings, installed).await?;
    started.push(Process::spawn(&kafka::spec(settings, installed)?, &settings.folders)?);
    let [cassandra, kafka] = &mut started[first..] else { unreachable!("two processes were just pushed") };
    let kafka_ready = ready("kafka", kafka_probe.address().to_owned());
    let cassandra_ready = ready("cassandra", cassandra_probe.address().to_owned());
    tokio::try_join!(
        async { wait_until_ready(kafka, &kafka_probe, READY_TIMEOUT).await.map(|()| kafka_ready()) },
        async {
            wait_until_ready(cassandra, &cassandra_probe, READY_TIMEOUT).await.map(|()| cassandra_ready())
        },
    )?;
    Ok(())
}

/// Writes a configuration file from a template and replaces each `@name@` with its value.
fn write_config(file: &Path, template: &str, values: &[(&str, String)]) -> Result<()> {
    let text = values
        .iter()
        .fold(template.to_owned(), |text, (name, value)| text.replace(&format!("@{name}@"), value));
    std::fs::write(file, text).map_err(Error::io(file))
}
