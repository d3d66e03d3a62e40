//! Processes of the stack: started in groups of their own, recorded in `.local/run` by pid and start time (so that
//! a recycled pid is never killed), stopped with a deadline. Which parts there are is not known here.

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

/// How often a process that should end or answer is looked at.
pub const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// How many of the last lines of a log are searched for the cause of a failure.
const CAUSE_LINES: usize = 400;

/// A cause longer than this many characters is cut: the log has the rest.
const CAUSE_CHARACTERS: usize = 300;

/// A process to start.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Name of the part: also of its log and its record.
    pub name: String,
    /// Program to execute.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// Variables set on top of this process's own.
    pub environment: Vec<(String, String)>,
    /// Folder it runs in.
    pub folder: PathBuf,
    /// Where it will answer, as the user names it.
    pub address: String,
    /// How long it may take to end after SIGTERM.
    pub grace: Duration,
}

/// What is remembered of a running process, across processes of `local-stack`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Name of the part.
    pub name: String,
    /// Process id, which is also its process group.
    pub pid: u32,
    /// Start time in clock ticks since boot: with the pid the identity of the process.
    pub started_ticks: u64,
    /// Log file.
    pub log: PathBuf,
    /// Where it answers.
    pub address: String,
    /// Seconds it may take to end.
    pub grace_seconds: u64,
    /// How often it was started again after it had ended by itself.
    #[serde(default)]
    pub restarts: u64,
    /// How it ended, where it is down although it should run.
    #[serde(default)]
    pub down: Option<Down>,
}

/// The end of a process that should run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Down {
    /// As `exit code 1` or `signal 9`.
    pub ended: String,
    /// The line of its log that says most; empty where a signal ended it.
    pub words: String,
    /// It refuses to run and is not started again.
    pub refused: bool,
}

/// A process this program started itself.
#[derive(Debug)]
pub struct Process {
    /// What others can know of it.
    pub record: Record,
    spec: Spec,
    child: Child,
    record_file: PathBuf,
    /// Bytes in its log when it was last started.
    log_begins: u64,
}

impl Process {
    /// Starts the process with a fresh log (the previous one is kept as `NAME.log.1`) and records it.
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
        Ok(Self { record, spec: spec.clone(), child, record_file, log_begins: 0 })
    }

    /// Starts a process that has ended once more; its log goes on in the same file.
    pub fn spawn_again(&mut self) -> Result<()> {
        self.log_begins = fs::metadata(&self.record.log).map_or(0, |log| log.len());
        self.child = self.spec.start(&self.record.log)?;
        self.record.pid = self.child.id();
        self.record.started_ticks = Stat::read(self.record.pid).map_or(0, |stat| stat.started_ticks);
        self.record.restarts += 1;
        self.record.down = None;
        self.record.write_to(&self.record_file)
    }

    /// Records how a process ended that should run.
    pub fn went_down(&mut self, status: ExitStatus, refused: bool) -> Result<Down> {
        // A process that was killed has no last words: the end of its log has nothing to do with it.
        let words = match status.code() {
            Some(_) => cause(&tail(&self.record.log, self.log_begins, CAUSE_LINES)),
            None => String::new(),
        };
        let down = Down { ended: describe(status), words, refused };
        self.record.down = Some(down.clone());
        self.record.write_to(&self.record_file)?;
        Ok(down)
    }

    /// Removes the record of a process that has ended.
    pub fn forget(&self) {
        let _ = fs::remove_file(&self.record_file);
    }

    /// How the process ended, once it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// The error for a process that ended although it should run.
    pub fn death(&self, status: ExitStatus) -> Error {
        Error::DiedAtStart {
            name: self.record.name.clone(),
            ended: describe(status),
            cause: cause_in_log(&self.record.log),
            log: self.record.log.clone(),
        }
    }

    /// Waits for a process that does its work and ends, such as `stream-processor init`.
    pub async fn finished(&mut self, within: Duration) -> Result<()> {
        let deadline = Instant::now() + within;
        let status = loop {
            if let Some(status) = self.ended() {
                break status;
            }
            if Instant::now() >= deadline {
                self.stop().await;
                return Err(self.not_ready("its end", within));
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        };
        let _ = fs::remove_file(&self.record_file);
        if status.success() { Ok(()) } else { Err(self.death(status)) }
    }

    /// The error for a process that runs and does not answer.
    pub fn not_ready(&self, address: &str, waited: Duration) -> Error {
        Error::NotReady {
            name: self.record.name.clone(),
            address: address.to_owned(),
            seconds: waited.as_secs(),
            cause: cause_in_log(&self.record.log),
            log: self.record.log.clone(),
        }
    }

    /// Ends the process: SIGTERM, and SIGKILL for its group after the grace. Tells whether it ended by itself.
    pub async fn stop(&mut self) -> bool {
        let deadline = Instant::now() + Duration::from_secs(self.record.grace_seconds);
        self.record.signal(Signal::TERM);
        let mut gently = true;
        while self.ended().is_none() {
            if gently && Instant::now() >= deadline {
                gently = false;
                self.record.kill_group();
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        let _ = fs::remove_file(&self.record_file);
        gently
    }

    /// SIGKILL for the whole group, as `kill -9` does it, and the end of the process.
    pub async fn kill(&mut self) {
        self.record.kill_group();
        while self.ended().is_none() {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        let _ = fs::remove_file(&self.record_file);
    }
}

impl Spec {
    /// Starts it; what it prints is added to `log`.
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
    /// The record of this very process.
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

    /// Keeps the record as `NAME.json`; gives the file.
    pub fn write(&self, run: &Path) -> Result<PathBuf> {
        let file = run.join(format!("{}.json", self.name));
        self.write_to(&file)?;
        Ok(file)
    }

    /// Replaces the file at once: others read it meanwhile.
    fn write_to(&self, file: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self).unwrap_or_default();
        let new = file.with_extension("new");
        fs::write(&new, text).map_err(Error::io(&new))?;
        fs::rename(&new, file).map_err(Error::io(file))
    }

    /// Reads one record; none when the file is absent or unreadable.
    pub fn read(file: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(file).ok()?).ok()
    }

    /// Whether this very process still runs (a zombie does not).
    pub fn is_alive(&self) -> bool {
        Stat::read(self.pid).is_some_and(|stat| stat.started_ticks == self.started_ticks && !stat.is_zombie())
    }

    /// Resident memory in MiB and seconds since the start, as far as the process runs.
    pub fn usage(&self) -> Option<(u64, u64)> {
        let stat = Stat::read(self.pid).filter(|_| self.is_alive())?;
        let uptime: f64 = fs::read_to_string("/proc/uptime").ok()?.split_whitespace().next()?.parse().ok()?;
        let ticks = rustix::param::clock_ticks_per_second();
        let running = uptime as u64 - (stat.started_ticks / ticks).min(uptime as u64);
        Some((stat.resident_pages * rustix::param::page_size() as u64 / (1024 * 1024), running))
    }

    /// Sends a signal to the process, if it still is this very process.
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

    /// Ends a process that another `local-stack` started; tells whether it ended by itself.
    pub async fn stop(&self) -> bool {
        let deadline = Instant::now() + Duration::from_secs(self.grace_seconds);
        self.signal(Signal::TERM);
        let mut gently = true;
        while self.is_alive() {
            if gently && Instant::now() >= deadline {
                gently = false;
                self.kill_group();
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        gently
    }
}

/// The fields of `/proc/PID/stat` that are used here (proc_pid_stat(5)).
#[derive(Debug, PartialEq, Eq)]
pub struct Stat {
    state: char,
    /// Field 22.
    pub started_ticks: u64,
    /// Fields 14 and 15 together: CPU time in clock ticks.
    pub cpu_ticks: u64,
    /// Field 20.
    threads: u64,
    resident_pages: u64,
}

impl Stat {
    /// Reads the process's state; none when there is no such process.
    pub fn read(pid: u32) -> Option<Self> {
        Self::parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    fn parse(text: &str) -> Option<Self> {
        // The program's name stands in parentheses and may hold anything, so count from behind it: field 3.
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

    /// Nothing of the process runs. The first thread of a JVM is a zombie some time before the last one has ended,
    /// and until then its ports are taken.
    fn is_zombie(&self) -> bool {
        matches!(self.state, 'Z' | 'X' | 'x') && self.threads <= 1
    }
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "unknown end".to_owned(),
    }
}

/// The line of a log's end that most likely names the cause.
pub fn cause_in_log(log: &Path) -> String {
    cause(&last_lines(log, CAUSE_LINES))
}

fn cause(lines: &[String]) -> String {
    let cause = in_words(&most_telling(lines));
    if cause.is_empty() {
        "its log is empty".to_owned()
    } else {
        cause.chars().take(CAUSE_CHARACTERS).collect()
    }
}

/// What a line of a log in JSON says for people.
fn in_words(line: &str) -> String {
    let fields: serde_json::Value = serde_json::from_str(line).unwrap_or_default();
    let said = ["error", "cause", "message"].iter().find_map(|field| fields[*field].as_str());
    said.unwrap_or(line).replace('\n', " ")
}

/// The last lines of a file, fewer where it has fewer, none where it cannot be read.
pub fn last_lines(file: &Path, count: usize) -> Vec<String> {
    tail(file, 0, count)
}

/// The same, of what stands behind the first `skipped` bytes.
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

fn most_telling(lines: &[String]) -> String {
    const BY_WEIGHT: [&[&str]; 3] = [
        &["Caused by:", "BindException", "OutOfMemoryError", "Could not reserve"],
        &["Exception", "FATAL", "ERROR", "\"level\":\"ERROR\"", "Error:", "error:", "panicked at"],
        &[""],
    ];
    BY_WEIGHT
        .iter()
        .find_map(|marks| {
            let telling =
                |line: &&String| !line.trim().is_empty() && marks.iter().any(|mark| line.contains(mark));
            lines.iter().rev().find(telling)
        })
        .map(|line| line.trim().to_owned())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(log: &str, cause: &str) {
        let lines: Vec<String> = log.lines().map(str::to_owned).collect();
        assert_eq!(most_telling(&lines), cause);
    }

    #[test]
    fn the_cause_is_the_innermost_that_the_log_names() {
        check("INFO start\nERROR no disk\nINFO bye\n", "ERROR no disk");
        check(
            "java.io.IOException: x\nCaused by: java.net.BindException: taken\n  at a.b\n",
            "Caused by: java.net.BindException: taken",
        );
        check("only this\n\n", "only this");
        check("", "");
    }

    #[test]
    fn a_line_in_json_is_told_in_words() {
        let check = |line: &str, words: &str| assert_eq!(in_words(line), words);
        check(
            r#"{"level":"ERROR","message":"ended","error":"another layout:\n  now"}"#,
            "another layout:   now",
        );
        check(r#"{"level":"INFO","message":"starting"}"#, "starting");
        check("ingest-producer: no", "ingest-producer: no");
    }

    #[test]
    fn a_stat_line_is_read_past_a_name_with_parentheses() {
        let line =
            "7 (a) b) S 1 7 7 0 -1 4194560 1 0 0 0 30 12 0 0 20 0 3 0 5000 1000 99 18446744073709551615";
        let stat = Stat::parse(line).unwrap();
        assert_eq!(
            stat,
            Stat { state: 'S', started_ticks: 5000, cpu_ticks: 42, threads: 3, resident_pages: 99 }
        );
    }

    #[test]
    fn a_recycled_pid_is_not_the_recorded_process() {
        let mut record = Record::of_this_process("test");
        assert!(record.is_alive());
        record.started_ticks += 1;
        assert!(!record.is_alive());
    }

    #[tokio::test]
    async fn a_process_that_ends_at_once_names_its_last_words() {
        let folder = tempfile::tempdir().unwrap();
        let folders = Folders { root: folder.path().to_owned() };
        folders.create().unwrap();
        let spec = Spec {
            name: "liar".to_owned(),
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
        assert!(Record::read(&folders.run().join("liar.json")).is_none());
    }
}
