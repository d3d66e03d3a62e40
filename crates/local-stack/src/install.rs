//! Downloads the servers into the cache: Kafka, Cassandra and the JMX agent with Maven, and Prometheus from its Debian
//! package. A folder in the cache is either complete or absent, and is never downloaded again.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Instant;

use tokio::process::Command;

use crate::config::Settings;
use crate::error::{Error, Result};
use crate::terminal::Terminal;

/// Downloads with Maven: title, folder in the cache, POM.
const JARS: [(&str, &str, &str); 3] = [
    ("kafka 4.3.1", KAFKA, include_str!("../resources/kafka.pom.xml")),
    ("cassandra 5.0.9", CASSANDRA, include_str!("../resources/cassandra.pom.xml")),
    ("jmx agent 1.0.1", JMX_AGENT, include_str!("../resources/jmx-agent.pom.xml")),
];

const KAFKA: &str = "kafka-4.3.1";
const CASSANDRA: &str = "cassandra-5.0.9";
const JMX_AGENT: &str = "jmx-agent-1.0.1";
const PROMETHEUS: &str = "prometheus-debian";

/// The plugin version is pinned, because the default version depends on the installed Maven.
const COPY_DEPENDENCIES: &str = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies";

/// Locations of the downloaded servers.
#[derive(Clone, Debug)]
pub struct Installed {
    /// Folder of the Kafka jars.
    pub kafka: PathBuf,
    /// Folder of the Cassandra jars.
    pub cassandra: PathBuf,
    /// Jar of the JMX agent.
    pub jmx_agent: PathBuf,
    /// Prometheus executable; `None` if its package could not be downloaded.
    pub prometheus: Option<PathBuf>,
}

impl Installed {
    /// Downloads everything that is missing from the cache. Takes only milliseconds if nothing is missing.
    pub async fn fetch(settings: &Settings, terminal: Terminal) -> Result<Self> {
        let cache = &settings.cache;
        fs::create_dir_all(cache).map_err(Error::io(cache))?;
        for (title, folder, pom) in JARS {
            if !cache.join(folder).is_dir() {
                terminal.started("fetch", &format!("{title} into {}", cache.display()));
                let started = Instant::now();
                fetch_jars(cache, folder, pom).await?;
                terminal.done("fetch", title, started.elapsed());
            }
        }
        Ok(Self {
            kafka: cache.join(KAFKA),
            cassandra: cache.join(CASSANDRA),
            jmx_agent: one_file(&cache.join(JMX_AGENT), "jmx_prometheus_javaagent-")?,
            prometheus: prometheus(cache, terminal).await?,
        })
    }
}

/// Returns a file in `folder` whose name starts with `prefix`.
pub fn one_file(folder: &Path, prefix: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(folder).map_err(Error::io(folder))?;
    entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix)))
        .ok_or_else(|| {
            Error::Refused(format!(
                "{} contains no {prefix}*; delete the folder and start again",
                folder.display()
            ))
        })
}

async fn fetch_jars(cache: &Path, folder: &str, pom: &str) -> Result<()> {
    let work = TempFolder::new(cache, folder)?;
    let pom_file = work.0.join("pom.xml");
    fs::write(&pom_file, pom).map_err(Error::io(&pom_file))?;
    let jars = work.0.join("jars");
    let mut maven = Command::new("mvn");
    maven.args(["-q", "-B", "-f"]).arg(&pom_file).arg(COPY_DEPENDENCIES);
    maven.arg("-DincludeScope=runtime").arg(format!("-DoutputDirectory={}", jars.display()));
    let output = run(maven, "mvn").await?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let cause = text
            .lines()
            .find(|line| line.contains("ERROR"))
            .unwrap_or("no error in its output")
            .trim()
            .to_owned();
        let hint = "check the network and ~/.m2/settings.xml, then start again".to_owned();
        return Err(Error::Tool { tool: format!("maven could not download {folder}"), cause, hint });
    }
    publish(&jars, &cache.join(folder))
}

/// Returns Prometheus from the cache, or downloads and unpacks its Debian package. Does not install a system service.
async fn prometheus(cache: &Path, terminal: Terminal) -> Result<Option<PathBuf>> {
    let folder = cache.join(PROMETHEUS);
    let binary = folder.join("usr/bin/prometheus");
    if binary.is_file() {
        return Ok(Some(binary));
    }
    let started = Instant::now();
    let work = TempFolder::new(cache, PROMETHEUS)?;
    let mut download = Command::new("apt-get");
    download.args(["-q", "download", "prometheus"]).current_dir(&work.0);
    let downloaded = run(download, "apt-get").await.is_ok_and(|output| output.status.success());
    let Ok(package) = one_file(&work.0, "prometheus_") else {
        terminal.warning("starting without prometheus: apt-get download prometheus delivered no package");
        return Ok(None);
    };
    let tree = work.0.join("tree");
    let mut unpack = Command::new("dpkg");
    unpack.arg("-x").arg(&package).arg(&tree);
    let unpacked = run(unpack, "dpkg").await.is_ok_and(|output| output.status.success());
    if !(downloaded && unpacked && tree.join("usr/bin/prometheus").is_file()) {
        terminal.warning("starting without prometheus: its Debian package could not be unpacked");
        return Ok(None);
    }
    publish(&tree, &folder)?;
    terminal.done(
        "fetch",
        "prometheus from its Debian package, not installed as a service",
        started.elapsed(),
    );
    Ok(Some(binary))
}

async fn run(mut command: Command, tool: &str) -> Result<Output> {
    command.stdin(Stdio::null()).kill_on_drop(true).output().await.map_err(|error| Error::Tool {
        tool: tool.to_owned(),
        cause: error.to_string(),
        hint: "./run doctor lists what is missing".to_owned(),
    })
}

/// Renames a complete folder to its final name. If another process has already done so, keeps that one.
fn publish(from: &Path, to: &Path) -> Result<()> {
    match fs::rename(from, to) {
        Err(error) if !to.is_dir() => Err(Error::io(to)(error)),
        _ => Ok(()),
    }
}

/// A temporary folder in the cache, deleted on drop.
struct TempFolder(PathBuf);

impl TempFolder {
    fn new(cache: &Path, name: &str) -> Result<Self> {
        let folder = cache.join(format!(".fetching-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
        Ok(Self(folder))
    }
}

impl Drop for TempFolder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
