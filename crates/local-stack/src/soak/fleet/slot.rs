//! One part of a soak with its present process.

use std::process::ExitStatus;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tokio::task::JoinHandle;

use crate::config::Folders;
use crate::error::{Error, Result};
use crate::process::{Process, Spec, cause_in_log};
use crate::servers::Probe;
use crate::soak::recovery::{FaultId, SharedClock};

/// How long a server may need to answer again; after SIGKILL both check their logs first.
const SERVER_WITHIN: Duration = Duration::from_secs(180);

/// How often a server that starts is asked.
const ASK_EVERY: Duration = Duration::from_millis(250);

/// What a part does.
#[derive(Debug)]
pub(super) enum State {
    /// It does not run, and is not started before this time.
    Down { not_before: Instant },
    /// It was started and has not answered yet; the task ends once it does.
    Starting { since: Instant, asking: JoinHandle<()> },
    /// It runs, and answers where that is asked.
    Running,
    /// It stands still.
    Paused { since: Instant, until: Instant },
}

/// One part.
#[derive(Debug)]
pub(super) struct Slot {
    process: Option<Process>,
    pub(super) state: State,
    /// What must be done before the next start.
    preparing: Option<JoinHandle<Result<()>>>,
    lives: u64,
    /// Faults of this part that are not over yet.
    pub(super) faults: Vec<FaultId>,
    /// Started again whenever it ends.
    pub(super) wanted: bool,
}

impl Slot {
    /// A part that does not run.
    pub(super) fn new() -> Self {
        Self {
            process: None,
            state: State::Down { not_before: Instant::now() },
            preparing: None,
            lives: 0,
            faults: Vec::new(),
            wanted: false,
        }
    }

    /// Takes a process that was started elsewhere and answers.
    pub(super) fn runs(&mut self, process: Process) {
        self.process = Some(process);
        self.state = State::Running;
        self.lives = 1;
        self.wanted = true;
    }

    /// Starts the part; where there is a probe, it counts as running once that is answered.
    pub(super) fn start(&mut self, mut spec: Spec, probe: Option<Probe>, folders: &Folders) -> Result<()> {
        self.lives += 1;
        // Each life has a log of its own: they are the evidence.
        spec.name = format!("{}-{:04}", spec.name, self.lives);
        self.process = Some(Process::spawn(&spec, folders)?);
        self.state = match probe {
            None => State::Running,
            Some(probe) => State::Starting {
                since: Instant::now(),
                asking: tokio::spawn(async move {
                    while !probe.answers().await {
                        tokio::time::sleep(ASK_EVERY).await;
                    }
                }),
            },
        };
        Ok(())
    }

    /// Whether it is down, and may be started now.
    pub(super) fn is_due(&self) -> bool {
        let prepared = self.preparing.as_ref().is_none_or(JoinHandle::is_finished);
        prepared && matches!(self.state, State::Down { not_before } if Instant::now() >= not_before)
    }

    /// Keeps the part down for so long.
    pub(super) fn down_for(&mut self, length: Duration) {
        self.state = State::Down { not_before: Instant::now() + length };
    }

    /// Something that blocks and must be done before the part starts again.
    pub(super) fn prepare(&mut self, work: impl FnOnce() -> Result<()> + Send + 'static) {
        self.preparing = Some(tokio::task::spawn_blocking(work));
    }

    /// The outcome of [`Slot::prepare`], once that is over.
    pub(super) async fn prepared(&mut self) -> Result<()> {
        match self.preparing.take() {
            None => Ok(()),
            Some(preparing) => preparing.await.map_err(|error| Error::Refused(error.to_string()))?,
        }
    }

    /// How long it took to answer, when a part that was starting does so now; an error once it has taken too long.
    pub(super) fn answers(&mut self) -> Result<Option<Duration>> {
        let State::Starting { since, asking } = &self.state else { return Ok(None) };
        let took = since.elapsed();
        if asking.is_finished() {
            self.state = State::Running;
            return Ok(Some(took));
        }
        match &self.process {
            Some(process) if took > SERVER_WITHIN => {
                Err(process.not_ready("its port after a kill", SERVER_WITHIN))
            }
            _ => Ok(None),
        }
    }

    /// How a process has ended that should run, and the line that tells it.
    pub(super) fn ended(&mut self) -> Option<(ExitStatus, String)> {
        let process = self.process.as_mut()?;
        let status = process.ended()?;
        Some((status, process.death(status).to_string().replace(" while starting", "")))
    }

    /// Whether it runs and answers: a fault meets a part that works.
    pub(super) fn can_be_hit(&self) -> bool {
        self.process.is_some() && matches!(self.state, State::Running)
    }

    /// SIGSTOP; the part stands still for so long.
    pub(super) fn pause(&mut self, length: Duration, id: FaultId) {
        if let Some(process) = &self.process {
            process.record.signal(Signal::STOP);
        }
        self.state = State::Paused { since: Instant::now(), until: Instant::now() + length };
        self.faults.push(id);
    }

    /// SIGCONT.
    pub(super) fn go_on(&mut self) {
        if let Some(process) = &self.process {
            process.record.signal(Signal::CONT);
        }
        self.state = State::Running;
    }

    /// The faults of this part are over.
    pub(super) fn faults_end(&mut self, clock: &SharedClock) {
        for id in self.faults.drain(..) {
            clock.end(id);
        }
    }

    /// SIGKILL, if it runs.
    pub(super) async fn kill(&mut self) {
        self.ask_no_more();
        if let Some(mut process) = self.process.take() {
            process.kill().await;
        }
        self.down_for(Duration::ZERO);
    }

    /// Ends the part in peace; it is not started again.
    pub(super) async fn stop(&mut self) {
        self.wanted = false;
        self.go_on();
        self.ask_no_more();
        if let Some(mut process) = self.process.take() {
            process.stop().await;
        }
        self.down_for(Duration::ZERO);
    }

    /// The line of its log that says most.
    pub(super) fn says(&self) -> String {
        self.process.as_ref().map_or_else(String::new, |process| cause_in_log(&process.record.log))
    }

    fn ask_no_more(&mut self) {
        if let State::Starting { asking, .. } = &self.state {
            asking.abort();
        }
    }
}
