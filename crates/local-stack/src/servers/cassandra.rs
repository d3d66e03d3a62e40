//! One Cassandra node on loopback: its configuration, its command line, and sessions.

use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use scylla::client::session::Session;
use scylla::client::session_builder::SessionBuilder;

use super::write_config;
use crate::config::{Settings, loopback};
use crate::error::{Error, Result};
use crate::install::{Installed, one_file};
use crate::process::Spec;

/// Time limit for one connection attempt.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// Process specification of the node.
pub fn spec(settings: &Settings, installed: &Installed) -> Result<Spec> {
    let conf = write_files(settings)?;
    let heap = settings.heaps.cassandra_mib;
    let mut arguments: Vec<OsString> =
        include_str!("../../resources/cassandra.jvm.options").lines().map(OsString::from).collect();
    arguments.push(format!("-Xmx{heap}m").into());
    arguments.push(format!("-Xms{heap}m").into());
    arguments.push(format!("-javaagent:{}", one_file(&installed.cassandra, "jamm-")?.display()).into());
    let rules = settings.checkout.join("prometheus/jmx/cassandra.yml");
    if rules.is_file() {
        let agent = installed.jmx_agent.display();
        let address = loopback(settings.ports.cassandra_agent);
        arguments.push(format!("-javaagent:{agent}={address}:{}", rules.display()).into());
    }
    arguments.push(format!("-Dcassandra.jmx.local.port={}", settings.ports.jmx).into());
    arguments.push(format!("-Dcassandra.storagedir={}", data(settings).display()).into());
    arguments.push(format!("-Dcassandra.logdir={}", settings.folders.logs().display()).into());
    arguments.push("-cp".into());
    arguments.push(format!("{}:{}/*", conf.display(), installed.cassandra.display()).into());
    arguments.push("org.apache.cassandra.service.CassandraDaemon".into());
    Ok(Spec {
        name: "cassandra".to_owned(),
        program: settings.java.clone(),
        arguments,
        environment: vec![("MALLOC_ARENA_MAX".to_owned(), "4".to_owned())],
        folder: settings.folders.logs(),
        address: loopback(settings.ports.cassandra),
        grace: Duration::from_secs(60),
    })
}

/// Returns whether the node answers CQL queries.
pub async fn answers(address: &str) -> bool {
    let session = SessionBuilder::new().known_node(address).connection_timeout(CONNECT_TIMEOUT).build().await;
    match session {
        Ok(session) => session.query_unpaged("SELECT release_version FROM system.local", ()).await.is_ok(),
        Err(_) => false,
    }
}

/// Opens a session on the node.
pub async fn connect(settings: &Settings) -> Result<Session> {
    SessionBuilder::new().known_node(loopback(settings.ports.cassandra)).build().await.map_err(failed)
}

/// The error for a failed request to a private node.
pub fn failed(error: impl std::fmt::Display) -> Error {
    Error::Tool {
        tool: "cassandra".to_owned(),
        cause: error.to_string(),
        hint: "see its log in the folder that is kept".to_owned(),
    }
}

fn write_files(settings: &Settings) -> Result<PathBuf> {
    let conf = settings.folders.config().join("cassandra");
    fs::create_dir_all(&conf).map_err(Error::io(&conf))?;
    fs::create_dir_all(data(settings)).map_err(Error::io(data(settings)))?;
    let values = [
        ("data", data(settings).display().to_string()),
        ("storage", settings.ports.storage.to_string()),
        ("cassandra", settings.ports.cassandra.to_string()),
        // Same as the default of Cassandra: a quarter of the heap size, both on-heap and off-heap.
        ("memtable", (settings.heaps.cassandra_mib / 4).to_string()),
    ];
    write_config(&conf.join("cassandra.yaml"), include_str!("../../resources/cassandra.yaml"), &values)?;
    write_config(&conf.join("logback.xml"), include_str!("../../resources/cassandra-logback.xml"), &[])?;
    Ok(conf)
}

fn data(settings: &Settings) -> PathBuf {
    settings.folders.data().join("cassandra")
}
