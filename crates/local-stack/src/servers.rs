//! The servers that are not ours, as processes: their configuration, command lines and signs of life.

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

/// How long Kafka or Cassandra may take until they answer; both need 5 to 20 s on two cores.
const READY_WITHIN: Duration = Duration::from_secs(120);

/// How often a server that starts is asked.
const ASK_EVERY: Duration = Duration::from_millis(150);

/// A question whose answer says that a part is ready.
#[derive(Clone, Debug)]
pub enum Probe {
    /// Kafka's metadata names a broker.
    Kafka(String),
    /// Cassandra answers CQL.
    Cassandra(String),
    /// Somebody accepts connections.
    Tcp(String),
    /// `GET` answers 200.
    Http(String),
}

impl Probe {
    /// Asks once.
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

/// Whether `GET url` answers 200; every failure is a no.
pub async fn http_ok(url: &str) -> bool {
    match http_client() {
        Ok(client) => client.get(url).send().await.is_ok_and(|answer| answer.status().as_u16() == 200),
        Err(_) => false,
    }
}

/// The value of a metric at `ADDRESS/metrics`, its name with its labels as they stand there; none where the service does not
/// answer or does not have it.
pub async fn metric(address: &str, name: &str) -> Option<f64> {
    let answer = http_client().ok()?.get(format!("{address}/metrics")).send().await.ok()?;
    let text = answer.text().await.ok()?;
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?.parse().ok()
}

/// A client for loopback: short timeouts, no proxy.
pub fn http_client() -> reqwest::Result<reqwest::Client> {
    // Only the first call installs the provider; reqwest refuses to build a client without one.
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(5)).build()
}

/// Waits until a started process answers; fails at once when it ends.
pub async fn wait_until_ready(process: &mut Process, probe: &Probe, within: Duration) -> Result<()> {
    let deadline = Instant::now() + within;
    loop {
        if let Some(status) = process.ended() {
            return Err(process.death(status));
        }
        if probe.answers().await {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(process.not_ready(probe.address(), within));
        }
        tokio::time::sleep(ASK_EVERY).await;
    }
}

/// Starts Kafka and Cassandra side by side. Whatever was started is in `started`, also when this fails.
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
        async { wait_until_ready(kafka, &kafka_probe, READY_WITHIN).await.map(|()| kafka_ready()) },
        async {
            wait_until_ready(cassandra, &cassandra_probe, READY_WITHIN).await.map(|()| cassandra_ready())
        },
    )?;
    Ok(())
}

/// Writes a configuration file made from a template, whose `@name@` places take the values.
fn write_config(file: &Path, template: &str, values: &[(&str, String)]) -> Result<()> {
    let text = values
        .iter()
        .fold(template.to_owned(), |text, (name, value)| text.replace(&format!("@{name}@"), value));
    std::fs::write(file, text).map_err(Error::io(file))
}
