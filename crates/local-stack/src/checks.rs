//! Checks of the machine before anything starts: free ports, memory, disk space, and the JVM version. The checks change
//! nothing and return the line to print. `bootstrap.sh` checks and installs the tools.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::config::{Heaps, Settings, is_free};
use crate::error::{Error, Result};

/// Disk space that a first start needs for logs, the commit log, checkpoints and a few minutes of events.
const DISK_MIB: u64 = 2048;

/// Memory of both JVMs outside their heaps, the services and Prometheus together. Measured at about 1.1 GiB.
const BESIDE_HEAPS_MIB: u64 = 1100;

/// Java major version that both Kafka 4.3 and Cassandra 5.0 support.
const JAVA_MAJOR: u32 = 17;

/// Runs every check and returns the results by name, in the order of a start. A failed check does not skip the others.
pub fn all(settings: &Settings) -> Vec<(&'static str, Result<String>)> {
    vec![
        ("java", java(&settings.java)),
        ("ports", ports(settings)),
        ("memory", memory(settings.heaps)),
        ("disk", disk(&settings.checkout)),
        ("cache", disk(&settings.cache)),
    ]
}

/// Checks that the JVM runs and has the right major version.
pub fn java(java: &Path) -> Result<String> {
    let failed = |cause: String| Error::Tool {
        tool: java.display().to_string(),
        cause,
        hint: format!("set JAVA_HOME to a JDK {JAVA_MAJOR}; ./run doctor lists what is missing"),
    };
    let output = Command::new(java).arg("-version").output().map_err(|error| failed(error.to_string()))?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    match java_major(&text) {
        Some(JAVA_MAJOR) => Ok(text.lines().next().unwrap_or_default().to_owned()),
        Some(other) => Err(failed(format!("is Java {other}, but Cassandra 5.0 needs {JAVA_MAJOR}"))),
        None => Err(failed("does not print its version".to_owned())),
    }
}

/// Parses the major version from the output of `java -version`, such as `openjdk version "17.0.15"` or
/// `java version "1.8.0_402"`.
fn java_major(text: &str) -> Option<u32> {
    let version = text.split('"').nth(1)?;
    let mut numbers = version.split(['.', '-', '+', '_']);
    match numbers.next()?.parse().ok()? {
        1 => numbers.next()?.parse().ok(),
        major => Some(major),
    }
}

/// Checks that all ports are free.
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

/// Checks that the heaps and everything outside them fit into the available memory.
pub fn memory(heaps: Heaps) -> Result<String> {
    let needed_mib = u64::from(heaps.kafka_mib + heaps.cassandra_mib) + BESIDE_HEAPS_MIB;
    let available_mib = available_memory_mib();
    if available_mib < needed_mib {
        return Err(Error::TooLittleMemory { available_mib, needed_mib });
    }
    Ok(format!("{available_mib} MiB available, {needed_mib} MiB needed"))
}

/// Checks the free space on the disk of a folder. If the folder does not exist yet, its nearest existing parent is
/// used.
pub fn disk(folder: &Path) -> Result<String> {
    let existing = folder.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let disk = rustix::fs::statvfs(existing).map_err(|error| Error::io(existing)(error.into()))?;
    let available_mib = disk.f_bavail.saturating_mul(disk.f_frsize) / (1024 * 1024);
    if available_mib < DISK_MIB {
        return Err(Error::TooLittleDisk { folder: folder.to_owned(), available_mib, needed_mib: DISK_MIB });
    }
    Ok(format!("{available_mib} MiB free at {}", existing.display()))
}

/// Returns the `MemAvailable` of the kernel, or the rest of the memory limit of the container if that is smaller.
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
    fn old_and_new_java_versions_are_parsed() {
        let check = |text: &str, major| assert_eq!(java_major(text), major, "{text}");
        check("openjdk version \"17.0.15\" 2025-04-15\nOpenJDK …", Some(17));
        check("openjdk version \"21\" 2023-09-19", Some(21));
        check("openjdk version \"17-ea\"", Some(17));
        check("java version \"1.8.0_402\"", Some(8));
        check("command not found", None);
    }

    #[test]
    fn available_memory_is_parsed_from_meminfo() {
        assert_eq!(mem_available_kib("MemTotal: 9 kB\nMemAvailable:    2048 kB\n"), Some(2048));
    }

    #[test]
    fn heaps_that_do_not_fit_into_memory_are_refused() {
        let heaps = Heaps { kafka_mib: 1_000_000_000, cassandra_mib: 1 };
        let error = memory(heaps).unwrap_err().to_string();
        assert!(error.contains("1000001101 MiB needed"), "{error}");
    }
}
