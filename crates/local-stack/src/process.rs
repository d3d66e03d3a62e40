//! Processes of the stack. Each runs in its own process group, is recorded in `.local/run`, and is stopped with a
//! deadline. The record holds the pid and the start time, so that a process with a reused pid is never killed. This
//! module does not know which parts exist.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Seek, SeekFrom};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use serde::{Deserialize, Serialize};

use crate::config::Folders;
use crate::error::{Error, Result};

/// Poll interval while waiting for a process to start or exit.
pub const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Number of lines at the end of a log that are searched for the cause of a failure.
const CAUSE_LINES: usize = 400;

/// Maximum length of a cause in characters. Longer ones are truncated; the log has the full text.
const CAUSE_CHARACTERS: usize = 300;

/// A process to start.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Name of the part, also used for its log and its record.
    pub name: String,
    /// Program to execute.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// Variables added to the environment of this process.
    pub environment: Vec<(String, String)>,
    /// Working folder.
    pub folder: PathBuf,
    /// Address that it will serve; empty if it does not serve one.
    pub address: String,
    /// Time limit for the exit after SIGTERM; then it is killed.
    pub grace: Duration,
}

/// The record of a running process, stored as JSON and shared between invocations of `local-stack`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Name of the part.
    pub name: String,
    /// Process id, which is also the id of its process group.
    pub pid: u32,
    /// Start time in clock ticks since boot. Together with the pid it identifies the process.
    pub started_ticks: u64,
    /// Log file.
    pub log: PathBuf,
    /// Address that it serves; empty if there is none.
    pub address: String,
    /// Time limit for the exit after SIGTERM, in seconds.
    pub grace_seconds: u64,
    /// Number of restarts after an unexpected exit.
    #[serde(default)]
    pub restarts: u64,
    /// How it exited, if it is down although it should run.
    #[serde(default)]
    pub down: Option<Down>,
}

/// The unexpected exit of a process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Down {
    /// How it exited, such as `exit code 1` or `signal 9`.
    pub ended: String,
    /// The line of its log that most likely names the cause; empty if a signal ended it.
    #[serde(rename = "words")]
    pub last_words: String,
    /// Whether it refused to run; then it is not restarted.
    pub refused: bool,
}

/// A child process of this program.
#[derive(Debug)]
pub struct Process {
    /// Its record, as other invocations of `local-stack` read it.
    pub record: Record,
    spec: Spec,
    child: Child,
    record_file: PathBuf,
    /// Length of its log in bytes at its latest start.
    log_start: u64,
}

impl Process {
    /// Starts and records the process with an empty log. The previous log is kept as `NAME.log.1`.
    pub fn spawn(spec: &Spec, folders: &Folders) -> Result<Self> {
        let log = folders.logs().join(format!("{}.log", spec.name));
        if log.exists() {
            fs::rename(&log, log.with_extension("log.1")).map_err(Error::io(&log))?;
        }
        let child = spec.start(&log)?;
        let record = Record {
            name: spec.name.clone(),
            pid: child.id(),
            started_ticks: Stat::read(child.id()).map_or(0, |stat| stat.started_ticks),
            log,
            address: spec.address.clone(),
            grace_seconds: spec.grace.as_secs(),
            restarts: 0,
            down: None,
        };
        let record_file = record.write(&folders.run())?;
        Ok(Self { record, spec: spec.clone(), child, record_file, log_start: 0 })
    }

    /// Restarts a process that has exited. It appends to the same log.
    pub fn respawn(&mut self) -> Result<()> {
        self.log_start = fs::metadata(&self.record.log).map_or(0, |log| log.len());
        self.child = self.spec.start(&self.record.log)?;
        self.record.pid = self.child.id();
        self.record.started_ticks = Stat::read(self.record.pid).map_or(0, |stat| stat.started_ticks);
        self.record.restarts += 1;
        self.record.down = None;
        self.record.write_to(&self.record_file)
    }

    /// Records the unexpected exit of this process.
    pub fn record_exit(&mut self, status: ExitStatus, refused: bool) -> Result<Down> {
        // The log of a killed process does not contain the cause of its exit.
        let last_words = match status.code() {
            Some(_) => cause(&tail(&self.record.log, self.log_start, CAUSE_LINES)),
            None => String::new(),
        };
        let down = Down { ended: describe(status), last_words, refused };
        self.record.down = Some(down.clone());
        self.record.write_to(&self.record_file)?;
        Ok(down)
    }

    /// Removes the record of a process that has exited.
    pub fn remove_record(&self) {
        let _ = fs::remove_file(&self.record_file);
    }

    /// Returns the exit status of the process, or `None` while it runs.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Returns the error for a process that exited although it should keep running.
    pub fn exit_error(&self, status: ExitStatus) -> Error {
        Error::DiedAtStart {
            name: self.record.name.clone(),
            ended: describe(status),
            cause: cause_in_log(&self.record.log),
            log: self.record.log.clone(),
        }
    }

    /// Waits for a process that is expected to exit, such as `stream-processor init`. Stops it after the timeout.
    pub async fn finished(&mut self, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        let status = loop {
            if let Some(status) = self.ended() {
                break status;
            }
            if Instant::now() >= deadline {
                self.stop().await;
                return Err(self.not_ready("its exit", timeout));
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        };
        let _ = fs::remove_file(&self.record_file);
        if status.success() { Ok(()) } else { Err(self.exit_error(status)) }
    }

    /// Returns the error for a process that runs but is not ready. `awaited` is the address or event waited for.
    pub fn not_ready(&self, awaited: &str, waited: Duration) -> Error {
        Error::NotReady {
            name: self.record.name.clone(),
            awaited: awaited.to_owned(),
            seconds: waited.as_secs(),
            cause: cause_in_log(&self.record.log),
            log: self.record.log.clone(),
        }
    }

    /// Stops the process with SIGTERM, and kills its group after the grace period. Returns `false` if it was killed.
    pub async fn stop(&mut self) -> bool {
        let deadline = Instant::now() + Duration::from_secs(self.record.grace_seconds);
        self.record.signal(Signal::TERM);
        let mut graceful = true;
        while self.ended().is_none() {
            if graceful && Instant::now() >= deadline {
                graceful = false;
                self.record.kill_group();
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        let _ = fs::remove_file(&self.record_file);
        graceful
    }

    /// Kills the process group with SIGKILL and waits until the process has exited.
    pub async fn kill(&mut self) {
        self.record.kill_group();
        while self.ended().is_none() {
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        let _ = fs::remove_file(&self.record_file);
    }
}

impl Spec {
    /// Starts the process, which appends its output to `log`.
    fn start(&self, log: &Path) -> Result<Child> {
        let output = File::options().create(true).append(true).open(log).map_err(Error::io(log))?;
        let errors = output.try_clone().map_err(Error::io(log))?;
        Command::new(&self.program)
            .args(&self.arguments)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .current_dir(&self.folder)
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            .process_group(0)
            .spawn()
            .map_err(Error::io(&self.program))
    }
}

impl Record {
    /// Creates a record of the current process.
    pub fn of_this_process(name: &str) -> Self {
        let pid = std::process::id();
        Self {
            name: name.to_owned(),
            pid,
            started_ticks: Stat::read(pid).map_or(0, |stat| stat.started_ticks),
            log: PathBuf::new(),
            address: String::new(),
            grace_seconds: 120,
            restarts: 0,
            down: None,
        }
    }

    /// Writes the record to `NAME.json` in the folder `run` and returns the path of the file.
    pub fn write(&self, run: &Path) -> Result<PathBuf> {
        let file = run.join(format!("{}.json", self.name));
        self.write_to(&file)?;
        Ok(file)
    }

    /// Replaces the file atomically, because other processes may be reading it.
    fn write_to(&self, file: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self).unwrap_or_default();
        let new = file.with_extension("new");
        fs::write(&new, text).map_err(Error::io(&new))?;
        fs::rename(&new, file).map_err(Error::io(file))
    }

    /// Reads a record. Returns `None` if the file is missing or not valid.
    pub fn read(file: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(file).ok()?).ok()
    }

    /// Returns whether the recorded process still runs. A zombie does not count as running.
    pub fn is_alive(&self) -> bool {
        Stat::read(self.pid).is_some_and(|stat| stat.started_ticks == self.started_ticks && !stat.is_zombie())
    }

    /// Returns the resident memory in MiB and the uptime in seconds, or `None` if the process does not run.
    pub fn usage(&self) -> Option<(u64, u64)> {
        let stat = Stat::read(self.pid).filter(|_| self.is_alive())?;
        let uptime: f64 = fs::read_to_string("/proc/uptime").ok()?.split_whitespace().next()?.parse().ok()?;
        let ticks = rustix::param::clock_ticks_per_second();
        let running = uptime as u64 - (stat.started_ticks / ticks).min(uptime as u64);
        Some((stat.resident_pages * rustix::param::page_size() as u64 / (1024 * 1024), running))
    }

    /// Sends a signal to the recorded process, if it still runs.
    pub fn signal(&self, signal: Signal) {
        if let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw)
            && self.is_alive()
        {
            let _ = kill_process(pid, signal);
        }
    }

    fn kill_group(&self) {
        if let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw)
            && self.is_alive()
        {
            let _ = kill_process_group(pid, Signal::KILL);
        }
    }

    /// Stops a process that another `local-stack` started. Returns `false` if it had to be killed.
    pub async fn stop(&self) -> bool {
        let deadline = Instant::now() + Duration::from_secs(self.grace_seconds);
        self.signal(Signal::TERM);
        let mut graceful = true;
        while self.is_alive() {
            if graceful && Instant::now() >= deadline {
                graceful = false;
                self.kill_group();
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        graceful
    }
}

/// Fields of `/proc/PID/stat` that are used here; see proc_pid_stat(5).
#[derive(Debug, PartialEq, Eq)]
pub struct Stat {
    state: char,
    /// Start time in clock ticks since boot (field 22).
    pub started_ticks: u64,
    /// User and system CPU time in clock ticks (fields 14 and 15).
    pub cpu_ticks: u64,
    /// Number of threads (field 20).
    threads: u64,
    resident_pages: u64,
}

impl Stat {
    /// Reads the state of a process. Returns `None` if it does not exist.
    pub fn read(pid: u32) -> Option<Self> {
        Self::parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    fn parse(text: &str) -> Option<Self> {
        // The program name is in parentheses and may contain any character. The text after it starts with field 3.
        let fields: Vec<&str> = text.get(text.rfind(')')? + 1..)?.split_whitespace().collect();
        let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
        Some(Self {
            state: fields.first()?.chars().next()?,
            started_ticks: number(22)?,
            cpu_ticks: number(14)? + number(15)?,
            threads: number(20)?,
            resident_pages: number(24)?,
        })
    }

    /// Returns whether no thread of the process runs any more. The first thread of a JVM becomes a zombie while other
    /// threads still run and hold its ports.
    fn is_zombie(&self) -> bool {
        matches!(self.state, 'Z' | 'X' | 'x') && self.threads <= 1
    }
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "unknown exit status".to_owned(),
    }
}

/// Returns the line near the end of a log that most likely names the cause of a failure.
pub fn cause_in_log(log: &Path) -> String {
    cause(&last_lines(log, CAUSE_LINES))
}

fn cause(lines: &[String]) -> String {
    let cause = message_of(&most_relevant(lines));
    if cause.is_empty() {
        "its log is empty".to_owned()
    } else {
        cause.chars().take(CAUSE_CHARACTERS).collect()
    }
}

/// Extracts the message of a log line in JSON. Other lines are returned unchanged.
fn message_of(line: &str) -> String {
    let fields: serde_json::Value = serde_json::from_str(line).unwrap_or_default();
    let message = ["error", "cause", "message"].iter().find_map(|field| fields[*field].as_str());
    message.unwrap_or(line).replace('\n', " ")
}

/// Returns up to `count` lines from the end of a file; none if the file cannot be read.
pub fn last_lines(file: &Path, count: usize) -> Vec<String> {
    tail(file, 0, count)
}

/// Like [`last_lines`], but ignores the first `skipped` bytes of the file.
fn tail(file: &Path, skipped: u64, count: usize) -> Vec<String> {
    let Ok(mut file) = File::open(file) else { return Vec::new() };
    if file.seek(SeekFrom::Start(skipped)).is_err() {
        return Vec::new();
    }
    let mut last = VecDeque::with_capacity(count);
    for line in BufReader::new(file).split(b'\n').map_while(std::result::Result::ok) {
        if last.len() == count {
            last.pop_front();
        }
        last.push_back(String::from_utf8_lossy(&line).into_owned());
    }
    last.into()
}

fn most_relevant(lines: &[String]) -> String {
    const MARKS_BY_PRIORITY: [&[&str]; 3] = [
        &["Caused by:", "BindException", "OutOfMemoryError", "Could not reserve"],
        &["Exception", "FATAL", "ERROR", "\"level\":\"ERROR\"", "Error:", "error:", "panicked at"],
        &[""],
    ];
    MARKS_BY_PRIORITY
        .iter()
        .find_map(|marks| {
            let matches =
                |line: &&String| !line.trim().is_empty() && marks.iter().any(|mark| line.contains(mark));
            lines.iter().rev().find(matches)
        })
        .map(|line| line.trim().to_owned())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(log: &str, cause: &str) {
        let lines: Vec<String> = log.lines().map(str::to_owned).collect();
        assert_eq!(most_relevant(&lines), cause);
    }

    #[test]
    fn the_innermost_cause_in_the_log_is_chosen() {
        check("INFO start\nERROR no disk\nINFO bye\n", "ERROR no disk");
        check(
            "java.io.IOException: x\nCaused by: java.net.BindException: taken\n  at a.b\n",
            "Caused by: java.net.BindException: taken",
        );
        check("only this\n\n", "only this");
        check("", "");
    }

    #[test]
    fn the_message_is_extracted_from_a_json_line() {
        let check = |line: &str, message: &str| assert_eq!(message_of(line), message);
        check(
            r#"{"level":"ERROR","message":"ended","error":"another layout:\n  now"}"#,
            "another layout:   now",
        );
        check(r#"{"level":"INFO","message":"starting"}"#, "starting");
        check("ingest-producer: no", "ingest-producer: no");
    }

    #[test]
    fn a_stat_line_is_parsed_when_the_name_contains_parentheses() {
        let line =
            "7 (a) b) S 1 7 7 0 -1 4194560 1 0 0 0 30 12 0 0 20 0 3 0 5000 1000 99 18446744073709551615";
        let stat = Stat::parse(line).unwrap();
        assert_eq!(
            stat,
            Stat { state: 'S', started_ticks: 5000, cpu_ticks: 42, threads: 3, resident_pages: 99 }
        );
    }

    #[test]
    fn a_reused_pid_is_not_the_recorded_process() {
        let mut record = Record::of_this_process("test");
        assert!(record.is_alive());
        record.started_ticks += 1;
        assert!(!record.is_alive());
    }

    #[tokio::test]
    async fn the_error_of_a_process_that_exits_at_once_contains_its_last_words() {
        let folder = tempfile::tempdir().unwrap();
        let folders = Folders { root: folder.path().to_owned() };
        folders.create().unwrap();
        let spec = Spec {
            name: "part".to_owned(),
            program: "/bin/sh".into(),
            arguments: ["-c", "echo 'ERROR out of luck'; exit 3"].map(OsString::from).into(),
            environment: Vec::new(),
            folder: folder.path().to_owned(),
            address: String::new(),
            grace: Duration::from_secs(1),
        };
        let mut process = Process::spawn(&spec, &folders).unwrap();
        let error = process.finished(Duration::from_secs(10)).await.unwrap_err().to_string();
        assert!(error.contains("exit code 3") && error.contains("ERROR out of luck"), "{error}");
        assert!(Record::read(&folders.run().join("part.json")).is_none());
    }
}
