//! What the machine must offer before anything starts: free ports, memory, disk, a JVM of the right version. Only
//! looks; what is missing comes back as the line to print. Tools and their installation are `bootstrap.sh`'s.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::config::{Heaps, Settings, is_free};
use crate::error::{Error, Result};

/// Disk that a first start writes: logs, commitlog, checkpoints, some minutes of events.
const DISK_MIB: u64 = 2048;

/// Both JVMs beside their heaps, the services and Prometheus together (measured: about 1.1 GiB).
const BESIDE_HEAPS_MIB: u64 = 1100;

/// The Java major that Kafka 4.3 and Cassandra 5.0 both run on.
const JAVA_MAJOR: u32 = 17;

/// Every check in the order a start makes them, with its name: none is left out when another fails.
pub fn all(settings: &Settings) -> Vec<(&'static str, Result<String>)> {
    vec![
        ("java", java(&settings.java)),
        ("ports", ports(settings)),
        ("memory", memory(settings.heaps)),
        ("disk", disk(&settings.checkout)),
        ("cache", disk(&settings.cache)),
    ]
}

/// The JVM runs and is of the right major version.
pub fn java(java: &Path) -> Result<String> {
    let failed = |cause: String| Error::Tool {
        tool: java.display().to_string(),
        cause,
        way_out: format!("set JAVA_HOME to a JDK {JAVA_MAJOR}; ./run doctor names what is missing"),
    };
    let output = Command::new(java).arg("-version").output().map_err(|error| failed(error.to_string()))?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    match java_major(&said) {
        Some(JAVA_MAJOR) => Ok(said.lines().next().unwrap_or_default().to_owned()),
        Some(other) => Err(failed(format!("is Java {other}, and Cassandra 5.0 needs {JAVA_MAJOR}"))),
        None => Err(failed("does not tell its version".to_owned())),
    }
}

/// The major version in what `java -version` prints: `openjdk version "17.0.15"`, `java version "1.8.0_402"`.
fn java_major(said: &str) -> Option<u32> {
    let version = said.split('"').nth(1)?;
    let mut numbers = version.split(['.', '-', '+', '_']);
    match numbers.next()?.parse().ok()? {
        1 => numbers.next()?.parse().ok(),
        major => Some(major),
    }
}

/// Nobody listens on any of the ports.
pub fn ports(settings: &Settings) -> Result<String> {
    let taken: Vec<String> = settings
        .ports
        .all()
        .iter()
        .filter(|(_, port)| !is_free(*port))
        .map(|(name, port)| format!("{port} ({name})"))
        .collect();
    if taken.is_empty() {
        Ok(format!("all {} free", settings.ports.all().len()))
    } else {
        Err(Error::PortsTaken { ports: taken.join(", ") })
    }
}

/// The heaps and what comes beside them fit into memory.
pub fn memory(heaps: Heaps) -> Result<String> {
    let needed_mib = u64::from(heaps.kafka_mib + heaps.cassandra_mib) + BESIDE_HEAPS_MIB;
    let available_mib = available_memory_mib();
    if available_mib < needed_mib {
        return Err(Error::TooLittleMemory { available_mib, needed_mib });
    }
    Ok(format!("{available_mib} MiB available, {needed_mib} MiB needed"))
}

/// The folder's disk has room; a folder that is not there yet counts as its parent.
pub fn disk(folder: &Path) -> Result<String> {
    let existing = folder.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let disk = rustix::fs::statvfs(existing).map_err(|error| Error::io(existing)(error.into()))?;
    let available_mib = disk.f_bavail.saturating_mul(disk.f_frsize) / (1024 * 1024);
    if available_mib < DISK_MIB {
        return Err(Error::TooLittleDisk { folder: folder.to_owned(), available_mib, needed_mib: DISK_MIB });
    }
    Ok(format!("{available_mib} MiB free at {}", existing.display()))
}

/// What the kernel calls available, or less where a container's limit is nearer.
fn available_memory_mib() -> u64 {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let machine = mem_available_kib(&meminfo).map_or(u64::MAX, |kib| kib / 1024);
    let cgroup = |file: &str| {
        fs::read_to_string(Path::new("/sys/fs/cgroup").join(file)).ok()?.trim().parse::<u64>().ok()
    };
    let container = match (cgroup("memory.max"), cgroup("memory.current")) {
        (Some(limit), Some(used)) => limit.saturating_sub(used) / (1024 * 1024),
        _ => u64::MAX,
    };
    machine.min(container)
}

fn mem_available_kib(meminfo: &str) -> Option<u64> {
    meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?
        .split_whitespace()
        .next()?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn java_versions_old_and_new_are_read() {
        let check = |said: &str, major| assert_eq!(java_major(said), major, "{said}");
        check("openjdk version \"17.0.15\" 2025-04-15\nOpenJDK …", Some(17));
        check("openjdk version \"21\" 2023-09-19", Some(21));
        check("openjdk version \"17-ea\"", Some(17));
        check("java version \"1.8.0_402\"", Some(8));
        check("command not found", None);
    }

    #[test]
    fn available_memory_is_read_from_meminfo() {
        assert_eq!(mem_available_kib("MemTotal: 9 kB\nMemAvailable:    2048 kB\n"), Some(2048));
    }

    #[test]
    fn a_heap_larger_than_the_machine_is_refused_with_both_figures() {
        let heaps = Heaps { kafka_mib: 1_000_000_000, cassandra_mib: 1 };
        let error = memory(heaps).unwrap_err().to_string();
        assert!(error.contains("1000001101 MiB needed"), "{error}");
    }
}
