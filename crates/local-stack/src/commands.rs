//! The commands of `./run`: start, stop, show the state, print logs, and delete all data.

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
use crate::process::{POLL_INTERVAL, Record, last_lines};
use crate::servers::http_ok;
use crate::terminal::Terminal;

/// Names of all parts in start order. They are stopped in reverse order.
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

/// Record name of the supervisor, which restarts the parts. It is `./run` itself, or the background process that
/// `./run --detach` starts.
pub(crate) const SUPERVISOR: &str = "supervisor";

/// Time limit for the supervisor to stop all parts.
const SUPERVISOR_TIMEOUT: Duration = Duration::from_secs(180);

/// Poll interval while following a log.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(200);

/// Returns the running parts of this checkout in start order.
pub(crate) fn running(folders: &Folders) -> Vec<Record> {
    recorded(folders).into_iter().filter(Record::is_alive).collect()
}

/// Returns the parts that run, and those that are down although they should run, in start order.
fn recorded(folders: &Folders) -> Vec<Record> {
    let records = ORDER.iter().filter_map(|name| Record::read(&folders.run().join(format!("{name}.json"))));
    records.filter(|part| part.down.is_some() || part.is_alive()).collect()
}

/// Removes the records of all parts and of the supervisor.
fn remove_records(folders: &Folders) {
    for name in ORDER.iter().chain([&SUPERVISOR]) {
        let _ = fs::remove_file(folders.run().join(format!("{name}.json")));
    }
}

fn supervisor(folders: &Folders) -> Option<Record> {
    Record::read(&folders.run().join(format!("{SUPERVISOR}.json"))).filter(Record::is_alive)
}

/// Stops all parts of this checkout in order, no matter which process started them.
pub async fn stop(settings: &Settings, terminal: Terminal) -> Result<()> {
    // The supervisor must stop first, because it would restart the parts.
    if let Some(supervisor) = supervisor(&settings.folders) {
        supervisor.signal(Signal::TERM);
        let deadline = Instant::now() + SUPERVISOR_TIMEOUT;
        while supervisor.is_alive() && Instant::now() < deadline {
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }
    let mut parts = running(&settings.folders);
    while let Some(part) = parts.pop() {
        let since = Instant::now();
        let graceful = part.stop().await;
        let how = if graceful { "stopped" } else { "killed after the grace period" };
        terminal.done(&part.name, how, since.elapsed());
    }
    remove_records(&settings.folders);
    terminal.progress("all parts of this checkout are stopped");
    Ok(())
}

/// Prints the state of every part.
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
                       "last_words": part.down.as_ref().map(|down| &down.last_words)})
            })
            .collect();
        terminal.data(&json!(list).to_string());
        return;
    }
    if rows.is_empty() {
        terminal.data("no part of this checkout is running; start everything with ./run");
        return;
    }
    let exits: Vec<String> = rows
        .iter()
        .filter_map(|(part, ..)| {
            part.down.as_ref().map(|down| format!("{}: {}: {}", part.name, down.ended, down.last_words))
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
    for line in exits {
        terminal.data(&line);
    }
    if !supervised {
        terminal.warning(
            "no supervisor is running, so parts that exit are not restarted; run ./run stop, then ./run",
        );
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

/// Prints the last lines of the log of a part. With `--follow`, keeps printing new lines.
pub async fn logs(settings: &Settings, args: &LogsArgs, terminal: Terminal) -> Result<()> {
    let log = settings.folders.logs().join(format!("{}.log", args.service));
    if !ORDER.contains(&args.service.as_str()) && args.service != SUPERVISOR {
        return Err(Error::Refused(format!(
            "unknown part {}; use one of {}, {SUPERVISOR}",
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
        tokio::time::sleep(FOLLOW_INTERVAL).await;
        let now = fs::metadata(&log).map_or(0, |metadata| metadata.len());
        // A log that has become shorter belongs to a new start of the part.
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

/// Deletes the data and logs of all parts, and the checkpoints of the processor.
pub fn reset(settings: &Settings, terminal: Terminal) -> Result<()> {
    let running = running(&settings.folders);
    if let Some(part) = running.first() {
        return Err(Error::Refused(format!(
            "{} and {} more parts are running; stop them first with ./run stop",
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
    terminal.progress(
        "deleted the data, logs and checkpoints of this checkout; the next ./run starts without any data",
    );
    Ok(())
}

/// Prints the result of every check. Returns whether all passed.
pub fn doctor(settings: &Settings, terminal: Terminal) -> bool {
    let running = running(&settings.folders);
    let mut healthy = true;
    for (name, outcome) in checks::all(settings) {
        match outcome {
            Ok(detail) => terminal.data(&format!("ok    {name:<8} {detail}")),
            // The running parts themselves use these ports and this memory.
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
    fn durations_are_shown_in_a_short_form() {
        assert_eq!([5, 65, 3_700].map(duration), ["5s", "1m05s", "1h01m"]);
    }
}
