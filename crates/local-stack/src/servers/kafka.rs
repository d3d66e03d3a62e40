//! One Kafka broker in the combined mode of KRaft: its configuration, the formatting of its data folder, and its
//! command line.

use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};

use super::write_config;
use crate::config::{Settings, loopback};
use crate::error::{Error, Result};
use crate::install::Installed;
use crate::process::Spec;

/// Time limit for one metadata request.
const METADATA_TIMEOUT: Duration = Duration::from_secs(2);

/// Length in bytes of a cluster id (`Uuid` in Kafka) before base64 encoding.
const CLUSTER_ID_BYTES: usize = 16;

/// Writes the configuration, and formats the data folder with a new cluster id if it is not formatted yet.
pub async fn format(settings: &Settings, installed: &Installed) -> Result<()> {
    write_properties(settings)?;
    if data(settings).join("meta.properties").is_file() {
        return Ok(());
    }
    let mut tool = tokio::process::Command::new(&settings.java);
    tool.args(jvm(settings, installed, 128)).arg("kafka.tools.StorageTool").args([
        "format",
        "-t",
        &new_cluster_id(),
        "-c",
    ]);
    tool.arg(properties(settings)).stdin(Stdio::null()).kill_on_drop(true);
    let output = tool.output().await.map_err(Error::io(&settings.java))?;
    if output.status.success() {
        return Ok(());
    }
    let output = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&output);
    Err(Error::Tool {
        tool: "kafka.tools.StorageTool".to_owned(),
        cause: text
            .lines()
            .rfind(|line| !line.trim().is_empty())
            .unwrap_or("it failed without output")
            .to_owned(),
        hint: "delete the data folder with ./run reset, then start again".to_owned(),
    })
}

/// Process specification of the broker.
pub fn spec(settings: &Settings, installed: &Installed) -> Result<Spec> {
    write_properties(settings)?;
    let mut arguments = jvm(settings, installed, settings.heaps.kafka_mib);
    let rules = settings.checkout.join("prometheus/jmx/kafka.yml");
    if rules.is_file() {
        let agent = installed.jmx_agent.display();
        let address = loopback(settings.ports.kafka_agent);
        arguments.push(format!("-javaagent:{agent}={address}:{}", rules.display()).into());
    }
    arguments.push("kafka.Kafka".into());
    arguments.push(properties(settings).into());
    Ok(Spec {
        name: "kafka".to_owned(),
        program: settings.java.clone(),
        arguments,
        environment: vec![("MALLOC_ARENA_MAX".to_owned(), "2".to_owned())],
        folder: settings.folders.logs(),
        address: loopback(settings.ports.kafka),
        grace: Duration::from_secs(30),
    })
}

/// Returns whether the metadata lists a broker.
pub async fn answers(address: &str) -> bool {
    let address = address.to_owned();
    let answered = tokio::task::spawn_blocking(move || {
        let consumer: BaseConsumer = ClientConfig::new().set("bootstrap.servers", address).create().ok()?;
        let metadata = consumer.fetch_metadata(None, METADATA_TIMEOUT).ok()?;
        (!metadata.brokers().is_empty()).then_some(())
    });
    matches!(answered.await, Ok(Some(())))
}

/// Arguments of the JVM for a program of Kafka with this heap; the main class and its arguments follow.
pub fn jvm(settings: &Settings, installed: &Installed, heap_mib: u32) -> Vec<OsString> {
    let logging = settings.folders.config().join("kafka-log4j2.yaml");
    vec![
        format!("-Xmx{heap_mib}m").into(),
        format!("-Xms{}m", heap_mib.min(256)).into(),
        "-XX:+UseG1GC".into(),
        "-XX:MaxGCPauseMillis=20".into(),
        "-XX:+ExitOnOutOfMemoryError".into(),
        "-Djava.awt.headless=true".into(),
        format!("-Dlog4j2.configurationFile={}", logging.display()).into(),
        format!("-Dkafka.logs.dir={}", settings.folders.logs().display()).into(),
        "-cp".into(),
        installed.kafka.join("*").into(),
    ]
}

fn write_properties(settings: &Settings) -> Result<()> {
    let logging = settings.folders.config().join("kafka-log4j2.yaml");
    write_config(&logging, include_str!("../../resources/kafka-log4j2.yaml"), &[])?;
    fs::create_dir_all(data(settings)).map_err(Error::io(data(settings)))?;
    let values = [
        ("kafka", settings.ports.kafka.to_string()),
        ("controller_port", settings.ports.controller.to_string()),
        ("data", data(settings).display().to_string()),
    ];
    write_config(&properties(settings), include_str!("../../resources/kafka.properties"), &values)
}

fn properties(settings: &Settings) -> PathBuf {
    settings.folders.config().join("kafka.properties")
}

fn data(settings: &Settings) -> PathBuf {
    settings.folders.data().join("kafka")
}

/// Generates a random cluster id in URL-safe base64 without padding, like `kafka-storage random-uuid`.
fn new_cluster_id() -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let bits = uuid::Uuid::new_v4().as_u128();
    let digits = (CLUSTER_ID_BYTES * 8).div_ceil(6);
    // The first digit holds the highest six bits. The last one holds the lowest two, padded with zeros.
    let digit = |place: usize| {
        let shift = 122 - 6 * place as i32;
        let value = if shift >= 0 { bits >> shift } else { bits << -shift };
        char::from(ALPHABET[(value & 63) as usize])
    };
    let id: String = (0..digits).map(digit).collect();
    // The storage tool would parse a leading hyphen as an option.
    if id.starts_with('-') { new_cluster_id() } else { id }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_id_has_the_format_that_kafka_expects() {
        for _ in 0..200 {
            let id = new_cluster_id();
            assert_eq!(id.len(), 22);
            assert!(
                !id.starts_with('-')
                    && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
            );
            assert!("AQgw".contains(&id[21..]), "the last digit must hold two bits: {id}");
        }
    }
}
