//! Ports, folders, heap sizes and tools on this machine. Only this module reads the environment.

use std::net::TcpListener;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Number of consecutive ports that `--port-base B` uses, starting at `B`.
pub const PORTS: u16 = 12;

/// Settings of every command that starts or inspects parts.
#[derive(Args, Clone, Debug, Default)]
pub struct PlaceArgs {
    /// Use the ports B, B+1, … instead of the usual ones, for a second checkout on the same machine
    #[arg(long, value_name = "B", env = "PIPELINE_PORT_BASE", value_parser = clap::value_parser!(u16).range(1024..=65000))]
    pub port_base: Option<u16>,

    /// Folder of downloaded servers, shared by all checkouts [default: `~/.cache/event-pipeline`]
    #[arg(long, value_name = "FOLDER", env = "PIPELINE_CACHE")]
    pub cache: Option<PathBuf>,
}

/// Loopback ports of all parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ports {
    /// Kafka listener for clients.
    pub kafka: u16,
    /// KRaft controller of Kafka.
    pub controller: u16,
    /// CQL port of Cassandra.
    pub cassandra: u16,
    /// Internode port of Cassandra.
    pub storage: u16,
    /// JMX port of Cassandra, for nodetool.
    pub jmx: u16,
    /// `/metrics` of the JMX agent in Kafka.
    pub kafka_agent: u16,
    /// `/metrics` of the JMX agent in Cassandra.
    pub cassandra_agent: u16,
    /// Source simulator.
    pub source: u16,
    /// Admin address of ingest-producer.
    pub producer: u16,
    /// Admin address of stream-processor.
    pub processor: u16,
    /// Page, API and metrics of metrics-dashboard.
    pub dashboard: u16,
    /// Prometheus.
    pub prometheus: u16,
}

impl Default for Ports {
    /// The ports used without `--port-base`.
    fn default() -> Self {
        Self {
            kafka: 9092,
            controller: 9093,
            cassandra: 9042,
            storage: 7000,
            jmx: 7199,
            kafka_agent: 9404,
            cassandra_agent: 9405,
            source: 8090,
            producer: 9101,
            processor: 9102,
            dashboard: 8050,
            prometheus: 9090,
        }
    }
}

impl Ports {
    /// Assigns `base`, `base + 1`, … in the order of the fields. `base` must be at most 65,000.
    pub fn from_base(base: u16) -> Self {
        Self {
            kafka: base,
            controller: base + 1,
            cassandra: base + 2,
            storage: base + 3,
            jmx: base + 4,
            kafka_agent: base + 5,
            cassandra_agent: base + 6,
            source: base + 7,
            producer: base + 8,
            processor: base + 9,
            dashboard: base + 10,
            prometheus: base + 11,
        }
    }

    /// Finds ports that are free now, below the ephemeral range of the operating system.
    pub fn private() -> Result<Self> {
        let first = 20_000 + (std::process::id() % 500) as u16 * 20;
        (0..500u16)
            .map(|step| 20_000 + (first - 20_000 + step * 20) % 10_000)
            .map(Self::from_base)
            .find(|ports| ports.all().iter().all(|(_, port)| is_free(*port)))
            .ok_or_else(|| {
                Error::Refused(
                    "no twelve consecutive free ports between 20000 and 30000; free some of them".to_owned(),
                )
            })
    }

    /// All ports, each with the name of the part that listens on it.
    pub fn all(&self) -> [(&'static str, u16); PORTS as usize] {
        [
            ("kafka", self.kafka),
            ("kafka controller", self.controller),
            ("cassandra", self.cassandra),
            ("cassandra storage", self.storage),
            ("cassandra jmx", self.jmx),
            ("kafka metrics", self.kafka_agent),
            ("cassandra metrics", self.cassandra_agent),
            ("source", self.source),
            ("ingest-producer", self.producer),
            ("stream-processor", self.processor),
            ("metrics-dashboard", self.dashboard),
            ("prometheus", self.prometheus),
        ]
    }
}

/// Returns whether the loopback port is free now.
pub fn is_free(port: u16) -> bool {
    TcpListener::bind(("127.0.0.1", port)).is_ok()
}

/// The address `127.0.0.1:PORT`.
pub fn loopback(port: u16) -> String {
    format!("127.0.0.1:{port}")
}

/// Heap sizes of the two servers, in MiB.
#[derive(Clone, Copy, Debug)]
pub struct Heaps {
    /// Heap of Kafka.
    pub kafka_mib: u32,
    /// Heap of Cassandra.
    pub cassandra_mib: u32,
}

impl Heaps {
    /// Small heaps: the whole system fits into 4 GiB of free memory.
    pub const SMALL: Self = Self { kafka_mib: 512, cassandra_mib: 1024 };
}

/// Folders of one running system.
#[derive(Clone, Debug)]
pub struct Folders {
    /// `.local` in the checkout, or a temporary folder of a test or measurement.
    pub root: PathBuf,
}

impl Folders {
    /// Data of Kafka, Cassandra and Prometheus.
    pub fn data(&self) -> PathBuf {
        self.root.join("data")
    }

    /// Generated configuration files.
    pub fn config(&self) -> PathBuf {
        self.root.join("config")
    }

    /// Log files, one per part.
    pub fn logs(&self) -> PathBuf {
        self.root.join("logs")
    }

    /// Process records ([`Record`](crate::process::Record)), one per running part.
    pub fn run(&self) -> PathBuf {
        self.root.join("run")
    }

    /// Deletes the data of the servers, to save space when the folder is kept only for its logs.
    pub fn drop_data(&self) {
        let _ = std::fs::remove_dir_all(self.data());
    }

    /// Creates all folders.
    pub fn create(&self) -> Result<()> {
        for folder in [self.data(), self.config(), self.logs(), self.run()] {
            std::fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
        }
        Ok(())
    }
}

/// Settings of a command, resolved for this machine and this checkout.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Root of the checkout, which is the current folder.
    pub checkout: PathBuf,
    /// Folders that the parts write to.
    pub folders: Folders,
    /// Checkpoint folder of the processor.
    pub checkpoints: PathBuf,
    /// Folder of the downloaded servers.
    pub cache: PathBuf,
    /// The `java` executable that runs Kafka and Cassandra.
    pub java: PathBuf,
    /// Ports of all parts.
    pub ports: Ports,
    /// Heap sizes of the two servers.
    pub heaps: Heaps,
    /// Folder of the programs of this workspace, which is the folder of this program.
    pub binaries: PathBuf,
    /// Stream definition of the services.
    pub stream: PathBuf,
    /// Value of `PIPELINE_SOURCE_ORIGIN`; `None` if the user did not set it.
    pub source_origin: Option<String>,
    /// Cargo executable: the value of `CARGO`, or `cargo`.
    pub cargo: PathBuf,
}

impl Settings {
    /// Reads the environment. Fails if the current folder is not the root of a checkout.
    pub fn load(args: &PlaceArgs) -> Result<Self> {
        let checkout = std::env::current_dir().map_err(Error::io("."))?;
        if !checkout.join("crates/local-stack/Cargo.toml").is_file() {
            return Err(Error::Refused(format!(
                "{} is not a checkout of the pipeline; start ./run or ./test in the root of a checkout",
                checkout.display()
            )));
        }
        let binaries = std::env::current_exe().map_err(Error::io("the path of this program"))?;
        let binaries = binaries.parent().unwrap_or(Path::new("/")).to_owned();
        let stream = variable("PIPELINE_STREAM").unwrap_or_else(|| "streams/user_created.toml".to_owned());
        Ok(Self {
            folders: Folders { root: checkout.join(".local") },
            checkpoints: checkout.join("checkpoints"),
            cache: args.cache.clone().map_or_else(default_cache, Ok)?,
            java: variable("JAVA_HOME").map_or("java".into(), |home| Path::new(&home).join("bin/java")),
            ports: args.port_base.map_or_else(Ports::default, Ports::from_base),
            heaps: Heaps::SMALL,
            stream: checkout.join(stream),
            source_origin: variable("PIPELINE_SOURCE_ORIGIN"),
            cargo: variable("CARGO").unwrap_or_else(|| "cargo".to_owned()).into(),
            binaries,
            checkout,
        })
    }

    /// Path of a program of this workspace. Fails if it is not built.
    pub fn program(&self, name: &str) -> Result<PathBuf> {
        let program = self.binaries.join(name);
        if program.is_file() {
            return Ok(program);
        }
        let program = program.display();
        Err(Error::Refused(format!(
            "{program} is not built; run ./run, or cargo build --release --workspace"
        )))
    }

    /// A copy of these settings with free ports, whose parts write everything below `folder`.
    pub fn private(&self, folder: &Path) -> Result<Self> {
        Ok(Self {
            folders: Folders { root: folder.to_owned() },
            checkpoints: folder.join("checkpoints"),
            ports: Ports::private()?,
            ..self.clone()
        })
    }
}

/// Returns `false` if the user has set `NO_COLOR` (<https://no-color.org>).
pub fn colours_allowed() -> bool {
    variable("NO_COLOR").is_none()
}

fn default_cache() -> Result<PathBuf> {
    variable("HOME").map(|home| Path::new(&home).join(".cache/event-pipeline")).ok_or_else(|| {
        Error::Refused("HOME is not set; set it, or choose a cache folder with --cache FOLDER".to_owned())
    })
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_base_moves_every_port_to_a_distinct_one() {
        let ports: std::collections::BTreeSet<u16> =
            Ports::from_base(20_000).all().map(|(_, port)| port).into();
        assert_eq!(ports, (20_000..20_000 + PORTS).collect());
    }

    #[test]
    fn private_ports_are_free_and_below_the_ephemeral_range() {
        let ports = Ports::private().unwrap();
        assert!(ports.all().iter().all(|(_, port)| (20_000..30_100).contains(port) && is_free(*port)));
    }
}
