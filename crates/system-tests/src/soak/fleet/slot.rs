//! One part of a soak and its current process.

use std::process::ExitStatus;
use std::time::{Duration, Instant};

use local_stack::config::Folders;
use local_stack::error::{Error, Result};
use local_stack::process::{Process, Spec, cause_in_log};
use local_stack::servers::Probe;
use rustix::process::Signal;
use tokio::task::JoinHandle;

use crate::soak::recovery::{FaultId, SharedClock};

/// Time limit for a server to become ready again. After SIGKILL, both servers first recover from their logs.
const SERVER_TIMEOUT: Duration = Duration::from_secs(180);

/// Poll interval while waiting for a server to become ready.
const PROBE_INTERVAL: Duration = Duration::from_millis(250);

/// State of a part.
#[derive(Debug)]
pub(super) enum State {
    /// It does not run and is not started before `not_before`.
    Down { not_before: Instant },
    /// It was started and is not ready yet. The task `probing` ends when it is ready.
    Starting { since: Instant, probing: JoinHandle<()> },
    /// It runs, and is ready if it has a probe.
    Running,
    /// It is paused with SIGSTOP.
    Paused { since: Instant, until: Instant },
}

/// One part.
#[derive(Debug)]
pub(super) struct Slot {
    process: Option<Process>,
    pub(super) state: State,
    /// Work that must finish before the next start.
    preparing: Option<JoinHandle<Result<()>>>,
    starts: u64,
    /// Faults of this part that have not ended yet.
    pub(super) faults: Vec<FaultId>,
    /// Whether the part is started whenever it is down.
    pub(super) enabled: bool,
}

impl Slot {
    /// Creates a part that does not run.
    pub(super) fn new() -> Self {
        Self {
            process: None,
            state: State::Down { not_before: Instant::now() },
            preparing: None,
            starts: 0,
            faults: Vec::new(),
            enabled: false,
        }
    }

    /// Adopts a ready process that was started elsewhere.
    pub(super) fn adopt(&mut self, process: Process) {
        self.process = Some(process);
        self.state = State::Running;
        self.starts = 1;
        self.enabled = true;
    }

    /// Starts the part. With a probe, it counts as running only after the probe succeeds.
    pub(super) fn start(&mut self, mut spec: Spec, probe: Option<Probe>, folders: &Folders) -> Result<()> {
        self.starts += 1;
        // Each start gets its own log, so that all logs are available for troubleshooting.
        spec.name = format!("{}-{:04}", spec.name, self.starts);
        self.process = Some(Process::spawn(&spec, folders)?);
        self.state = match probe {
            None => State::Running,
            Some(probe) => State::Starting {
                since: Instant::now(),
                probing: tokio::spawn(async move {
                    while !probe.answers().await {
                        tokio::time::sleep(PROBE_INTERVAL).await;
                    }
                }),
            },
        };
        Ok(())
    }

    /// Returns whether the part is down and may be started now.
    pub(super) fn can_start(&self) -> bool {
        let prepared = self.preparing.as_ref().is_none_or(JoinHandle::is_finished);
        prepared && matches!(self.state, State::Down { not_before } if Instant::now() >= not_before)
    }

    /// Keeps the part down for this duration.
    pub(super) fn down_for(&mut self, length: Duration) {
        self.state = State::Down { not_before: Instant::now() + length };
    }

    /// Starts blocking work that must finish before the part starts again.
    pub(super) fn prepare(&mut self, work: impl FnOnce() -> Result<()> + Send + 'static) {
        self.preparing = Some(tokio::task::spawn_blocking(work));
    }

    /// Waits for the work of [`Slot::prepare`] and returns its result.
    pub(super) async fn prepared(&mut self) -> Result<()> {
        match self.preparing.take() {
            None => Ok(()),
            Some(preparing) => preparing.await.map_err(|error| Error::Refused(error.to_string()))?,
        }
    }

    /// Detects that a starting part has become ready, and returns how long that took. Fails once the time limit is
    /// over.
    pub(super) fn ready_after(&mut self) -> Result<Option<Duration>> {
        let State::Starting { since, probing } = &self.state else { return Ok(None) };
        let took = since.elapsed();
        if probing.is_finished() {
            self.state = State::Running;
            return Ok(Some(took));
        }
        match &self.process {
            Some(process) if took > SERVER_TIMEOUT => {
                Err(process.not_ready("its port after a restart", SERVER_TIMEOUT))
            }
            _ => Ok(None),
        }
    }

    /// Returns the exit status and an error message if the process has exited.
    pub(super) fn ended(&mut self) -> Option<(ExitStatus, String)> {
        let process = self.process.as_mut()?;
        let status = process.ended()?;
        Some((status, process.exit_error(status).to_string().replace(" while starting", "")))
    }

    /// Returns whether the part runs and is ready. Faults are injected only into such parts.
    pub(super) fn is_up(&self) -> bool {
        self.process.is_some() && matches!(self.state, State::Running)
    }

    /// Pauses the part with SIGSTOP for this duration.
    pub(super) fn pause(&mut self, length: Duration, id: FaultId) {
        if let Some(process) = &self.process {
            process.record.signal(Signal::STOP);
        }
        self.state = State::Paused { since: Instant::now(), until: Instant::now() + length };
        self.faults.push(id);
    }

    /// Resumes the part with SIGCONT.
    pub(super) fn resume(&mut self) {
        if let Some(process) = &self.process {
            process.record.signal(Signal::CONT);
        }
        self.state = State::Running;
    }

    /// Ends all faults of this part.
    pub(super) fn end_faults(&mut self, clock: &SharedClock) {
        for id in self.faults.drain(..) {
            clock.end(id);
        }
    }

    /// Kills the part with SIGKILL, if it runs.
    pub(super) async fn kill(&mut self) {
        self.stop_probing();
        if let Some(mut process) = self.process.take() {
            process.kill().await;
        }
        self.down_for(Duration::ZERO);
    }

    /// Stops the part gracefully. It is not started again.
    pub(super) async fn stop(&mut self) {
        self.enabled = false;
        self.resume();
        self.stop_probing();
        if let Some(mut process) = self.process.take() {
            process.stop().await;
        }
        self.down_for(Duration::ZERO);
    }

    /// Returns the most relevant line of its log.
    pub(super) fn last_error(&self) -> String {
        self.process.as_ref().map_or_else(String::new, |process| cause_in_log(&process.record.log))
    }

    fn stop_probing(&mut self) {
        if let State::Starting { probing, .. } = &self.state {
            probing.abort();
        }
    }
}
