//! What `./run` offers beside starting: look, stop, print logs, start over.

pub mod detach;
pub mod up;

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::json;

use crate::checks;
use crate::cli::{LogsArgs, StatusArgs};
use crate::config::{Folders, Settings};
use crate::error::{Error, Result};
use crate::process::{LOOK_AGAIN, Record, last_lines};
use crate::servers::http_ok;
use crate::terminal::Terminal;

/// Parts in the order of their start; stopping goes backwards.
const ORDER: [&str; 8] = [
    "cassandra",
    "kafka",
    "source",
    "init",
    "ingest-producer",
    "stream-processor",
    "metrics-dashboard",
    "prometheus",
];

/// Name of the record of the process that keeps everything running: `./run`, or what `./run --detach` leaves in the background.
pub(crate) const SUPERVISOR: &str = "supervisor";

/// How long the supervisor may take to stop everything.
const SUPERVISOR_WITHIN: Duration = Duration::from_secs(180);

/// How often a followed log is read again.
const FOLLOW_EVERY: Duration = Duration::from_millis(200);

/// The parts of this checkout that run now, in the order of their start.
pub(crate) fn running(folders: &Folders) -> Vec<Record> {
    recorded(folders).into_iter().filter(Record::is_alive).collect()
}

/// The parts that run and those that are down although they should run, in the order of their start.
fn recorded(folders: &Folders) -> Vec<Record> {
    let records = ORDER.iter().filter_map(|name| Record::read(&folders.run().join(format!("{name}.json"))));
    records.filter(|part| part.down.is_some() || part.is_alive()).collect()
}

/// Removes the records of what has ended.
fn forget_all(folders: &Folders) {
    for name in ORDER.iter().chain([&SUPERVISOR]) {
        let _ = fs::remove_file(folders.run().join(format!("{name}.json")));
    }
}

fn supervisor(folders: &Folders) -> Option<Record> {
    Record::read(&folders.run().join(format!("{SUPERVISOR}.json"))).filter(Record::is_alive)
}

/// Stops everything in order, whoever started it.
pub async fn stop(settings: &Settings, terminal: Terminal) -> Result<()> {
    // First the supervisor: it would start again what is stopped.
    if let Some(supervisor) = supervisor(&settings.folders) {
        supervisor.signal(Signal::TERM);
        let deadline = Instant::now() + SUPERVISOR_WITHIN;
        while supervisor.is_alive() && Instant::now() < deadline {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }
    let mut parts = running(&settings.folders);
    while let Some(part) = parts.pop() {
        let since = Instant::now();
        let gently = part.stop().await;
        let how = if gently { "stopped" } else { "killed: it did not stop in time" };
        terminal.done(&part.name, how, since.elapsed());
    }
    forget_all(&settings.folders);
    terminal.progress("nothing of this checkout runs");
    Ok(())
}

/// Prints what runs where.
pub async fn status(settings: &Settings, args: &StatusArgs, terminal: Terminal) {
    let supervised = supervisor(&settings.folders).is_some();
    let mut rows = Vec::new();
    for part in recorded(&settings.folders) {
        let usage = part.usage().unwrap_or_default();
        let state = match &part.down {
            None => health(&part).await,
            Some(down) if down.refused => "refused",
            Some(_) if supervised => "restarting",
            Some(_) => "down",
        };
        rows.push((part, usage, state));
    }
    if args.json {
        let list: Vec<_> = rows
            .iter()
            .map(|(part, (mib, seconds), state)| {
                json!({"name": part.name, "pid": part.pid, "address": part.address, "state": state,
                       "restarts": part.restarts, "resident_mib": mib, "uptime_seconds": seconds, "log": part.log,
                       "ended": part.down.as_ref().map(|down| &down.ended),
                       "last_words": part.down.as_ref().map(|down| &down.words)})
            })
            .collect();
        terminal.data(&json!(list).to_string());
        return;
    }
    if rows.is_empty() {
        terminal.data("nothing of this checkout runs; ./run starts everything");
        return;
    }
    let ends: Vec<String> = rows
        .iter()
        .filter_map(|(part, ..)| {
            part.down.as_ref().map(|down| format!("{}: {}: {}", part.name, down.ended, down.words))
        })
        .collect();
    let rows: Vec<[String; 7]> = rows
        .into_iter()
        .map(|(part, (mib, seconds), state)| {
            let log = part.log.strip_prefix(&settings.checkout).unwrap_or(&part.log).display().to_string();
            let (memory, up) = match part.down {
                None => (format!("{mib} MiB"), duration(seconds)),
                Some(_) => (String::new(), String::new()),
            };
            [part.name, state.to_owned(), part.restarts.to_string(), part.address, memory, up, log]
        })
        .collect();
    terminal.table(["part", "state", "restarts", "address", "memory", "up", "log"], &rows);
    for line in ends {
        terminal.data(&line);
    }
    if !supervised {
        terminal.warning("no supervisor runs: what ends stays down; ./run stop and ./run start it again");
    }
}

async fn health(part: &Record) -> &'static str {
    let path = match part.name.as_str() {
        "ingest-producer" | "stream-processor" | "metrics-dashboard" => "/readyz",
        "prometheus" => "/-/ready",
        _ => return "running",
    };
    if http_ok(&format!("{}{path}", part.address)).await { "ready" } else { "not ready" }
}

fn duration(seconds: u64) -> String {
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s}s"),
        (0, m, s) => format!("{m}m{s:02}s"),
        (h, m, _) => format!("{h}h{m:02}m"),
    }
}

/// Prints the end of a part's log, and what is added to it.
pub async fn logs(settings: &Settings, args: &LogsArgs, terminal: Terminal) -> Result<()> {
    let log = settings.folders.logs().join(format!("{}.log", args.service));
    if !ORDER.contains(&args.service.as_str()) && args.service != SUPERVISOR {
        return Err(Error::Refused(format!(
            "no part is called {}; one of {}, {SUPERVISOR}",
            args.service,
            ORDER.join(", ")
        )));
    }
    let mut length = fs::metadata(&log).map_err(Error::io(&log))?.len();
    for line in last_lines(&log, args.lines as usize) {
        terminal.data(&line);
    }
    if !args.follow {
        return Ok(());
    }
    loop {
        tokio::time::sleep(FOLLOW_EVERY).await;
        let now = fs::metadata(&log).map_or(0, |metadata| metadata.len());
        // A shorter log is that of a new start.
        length = copy_from(&log, if now < length { 0 } else { length })?;
    }
}

fn copy_from(log: &Path, offset: u64) -> Result<u64> {
    let mut file = File::open(log).map_err(Error::io(log))?;
    file.seek(SeekFrom::Start(offset)).map_err(Error::io(log))?;
    let mut added = Vec::new();
    file.read_to_end(&mut added).map_err(Error::io(log))?;
    std::io::stdout().write_all(&added).map_err(Error::io("stdout"))?;
    Ok(offset + added.len() as u64)
}

/// Removes what the parts wrote, and what the processor remembers.
pub fn reset(settings: &Settings, terminal: Terminal) -> Result<()> {
    let running = running(&settings.folders);
    if let Some(part) = running.first() {
        return Err(Error::Refused(format!(
            "{} and {} more parts run; ./run stop first",
            part.name,
            running.len() - 1
        )));
    }
    let root = &settings.folders.root;
    if root.exists() {
        fs::remove_dir_all(root).map_err(Error::io(root))?;
    }
    for entry in fs::read_dir(&settings.checkpoints).into_iter().flatten().flatten() {
        if entry.file_name() != ".gitkeep" {
            let path = entry.path();
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(Error::io(&path))?;
        }
    }
    terminal
        .progress("data, logs and checkpoints of this checkout are gone; the next ./run starts from nothing");
    Ok(())
}

/// Reports every check; tells whether all hold.
pub fn doctor(settings: &Settings, terminal: Terminal) -> bool {
    let running = running(&settings.folders);
    let mut healthy = true;
    for (name, outcome) in checks::all(settings) {
        match outcome {
            Ok(detail) => terminal.data(&format!("ok    {name:<8} {detail}")),
            // A running system holds its own ports and memory.
            Err(Error::PortsTaken { .. } | Error::TooLittleMemory { .. }) if !running.is_empty() => {
                terminal.data(&format!("ok    {name:<8} in use by the {} running parts", running.len()));
            }
            Err(error) => {
                healthy = false;
                terminal.data(&format!("fail  {name:<8} {error}"));
            }
        }
    }
    healthy
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_short() {
        assert_eq!([5, 65, 3_700].map(duration), ["5s", "1m05s", "1h01m"]);
    }
}
