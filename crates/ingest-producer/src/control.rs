//! Executes the commands of the control topic. `common::contracts::control` defines the commands and their limits.
//!
//! The table `control_log`, not a committed offset, determines which commands are new. Each start reads the topic from
//! the beginning ([`listen`]) and skips commands that have a row. The row is inserted with a compare-and-set before
//! the command starts, and renewed while it runs. If its producer stops renewing it, the command becomes
//! `interrupted`. So no command runs twice and none is lost. The topic has one partition, so one member of the
//! consumer group starts all commands in order.

pub mod listen;
pub mod log;
pub mod send;
pub mod work;

use crate::ledger::LedgerError;
use crate::metrics::Metrics;
use crate::run::Clock;
use common::contracts::control::{Action, Command, CommandState, LogKey, Received};
use common::runtime::shutdown::Shutdown;
use log::{ControlLog, Entry};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinHandle;
use work::Work;

/// How long the row of a running command may go without renewal before its producer is considered dead, in
/// milliseconds.
pub const SILENCE_MS: i64 = 10_000;
/// Interval at which the row of a running command is renewed.
const RENEW: Duration = Duration::from_secs(1);
/// Pause before a call of the log is retried, and the maximum number of tries. Together they cover an outage of two
/// minutes.
const LOG_PAUSE: Duration = Duration::from_millis(500);
const LOG_TRIES: u32 = 240;
/// Maximum number of remembered command ids. The log detects repeated commands beyond that.
const MAX_KNOWN: usize = 100_000;
/// How long to wait at shutdown for running commands to stop.
const DRAIN: Duration = Duration::from_secs(5);

/// Kinds of long-running commands. One command of each kind runs at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Load,
    Backfill,
    Clear,
}

impl Kind {
    fn of(action: &Action) -> Option<Kind> {
        match action {
            Action::Produce { .. } | Action::Spike { .. } => Some(Kind::Load),
            Action::Backfill { .. } => Some(Kind::Backfill),
            Action::Clear { .. } => Some(Kind::Clear),
            Action::Cancel { .. } | Action::Pause | Action::Resume => None,
        }
    }

    /// The kind of a command by its name in `control_log.command`.
    fn of_name(name: &str) -> Option<Kind> {
        match name {
            "produce" | "spike" => Some(Kind::Load),
            "backfill" => Some(Kind::Backfill),
            "clear" => Some(Kind::Clear),
            _ => None,
        }
    }
}

/// A command that runs in this process.
struct Job {
    key: LogKey,
    kind: Kind,
    stop: Shutdown,
    task: JoinHandle<()>,
}

/// The dependencies of commands, shared with their tasks.
#[derive(Clone)]
pub struct CommandContext {
    /// Name of the stream whose commands are executed.
    pub stream: String,
    /// Name of this process as owner of commands. It is unique, even across restarts of the same instance.
    pub owner: String,
    /// The log of commands and their outcomes.
    pub log: Arc<dyn ControlLog>,
    /// Executes the actions.
    pub work: Arc<dyn Work>,
    /// The clock.
    pub clock: Clock,
    /// The metrics of the producer.
    pub metrics: Metrics,
}

/// Starts commands in order.
pub struct Control {
    context: CommandContext,
    /// Keys of the commands read so far, by id.
    known: HashMap<String, LogKey>,
    jobs: Vec<Job>,
    /// Commands of other processes that were running when last read.
    foreign: Vec<Entry>,
    /// Signals that this process is stopping.
    stopping: Shutdown,
}

impl Control {
    /// Creates the executor without reading the log.
    pub fn new(context: CommandContext) -> Control {
        Control {
            context,
            known: HashMap::new(),
            jobs: Vec::new(),
            foreign: Vec::new(),
            stopping: Shutdown::default(),
        }
    }

    /// Starts or refuses one command. On an error, which means that the log failed, the call can be repeated.
    pub async fn handle(&mut self, received: &Received) -> Result<(), LedgerError> {
        let context = self.context.clone();
        if received.stream.as_ref().is_some_and(|stream| *stream != context.stream) {
            return Ok(());
        }
        let key = &received.key;
        let reused = match self.known.get(&key.id) {
            Some(known) if known == key => return Ok(()),
            known => known.is_some(),
        };
        let now_ms = (context.clock)();
        let verdict = received.command.clone().and_then(|command| {
            command.check(now_ms)?;
            if reused {
                return Err("its id was already used by another command".to_owned());
            }
            self.check_kind_is_free(&command.action)?;
            Ok(command)
        });
        let (state, outcome) = match &verdict {
            Ok(_) => (CommandState::Running, String::new()),
            Err(reason) => (CommandState::Refused, reason.clone()),
        };
        let entry = Entry {
            key: key.clone(),
            command: received.name.clone(),
            arguments: received.arguments.clone(),
            state,
            outcome,
            handled_by: context.owner.clone(),
            handled_at_ms: now_ms,
        };
        let found = context.log.insert(&entry).await?;
        if self.known.len() >= MAX_KNOWN {
            self.known.clear();
        }
        if !reused {
            self.known.insert(key.id.clone(), key.clone());
        }
        match (found, verdict) {
            // A running row of ours without a job: an earlier insert was applied without a response.
            (Some(found), _) if found.state == CommandState::Running && found.handled_by != context.owner => {
                self.foreign.push(found);
            }
            (Some(found), _) if found.state != CommandState::Running => {}
            (_, Ok(command)) => self.start(command).await,
            (Some(_), Err(reason)) => context.record_outcome(key, Err(reason), false).await,
            (_, Err(reason)) => {
                context.metrics.command_ended(CommandState::Refused);
                tracing::warn!(id = key.id, command = received.name, reason, "command refused");
            }
        }
        Ok(())
    }

    /// Checks that no command of the same kind is running.
    fn check_kind_is_free(&self, action: &Action) -> Result<(), String> {
        let Some(kind) = Kind::of(action) else { return Ok(()) };
        let own = self.jobs.iter().filter(|job| job.kind == kind && !job.task.is_finished());
        let others = self.foreign.iter().filter(|entry| Kind::of_name(&entry.command) == Some(kind));
        match own.map(|job| &job.key).chain(others.map(|entry| &entry.key)).next() {
            Some(busy) => {
                Err(format!("command {} of the same kind is running; wait for it or cancel it", busy.id))
            }
            None => Ok(()),
        }
    }

    async fn start(&mut self, command: Command) {
        tracing::info!(
            id = command.id,
            command = command.action.name(),
            arguments = command.action.arguments(),
            issued_by = command.issued_by,
            "command started"
        );
        let key = command.key();
        match (&command.action, Kind::of(&command.action)) {
            (Action::Cancel { id }, _) => {
                let outcome = self.cancel(id.as_deref(), &command.id).await;
                self.context.record_outcome(&key, outcome, false).await;
            }
            (action, None) => {
                let outcome = self.context.work.carry_out(action, &Shutdown::default()).await;
                self.context.record_outcome(&key, outcome, false).await;
            }
            (_, Some(kind)) => {
                let stop = Shutdown::default();
                let (context, stopping) = (self.context.clone(), self.stopping.clone());
                let supervised = context.supervise(key.clone(), command.action, stop.clone(), stopping);
                self.jobs.push(Job { key, kind, stop, task: tokio::spawn(supervised) });
            }
        }
    }

    async fn cancel(&mut self, id: Option<&str>, by: &str) -> Result<String, String> {
        let is_selected = |key: &LogKey| id.is_none_or(|id| id == key.id);
        let own =
            self.jobs.iter().filter(|job| !job.task.is_finished()).map(|job| (&job.key, &self.context.owner));
        let others = self.foreign.iter().map(|entry| (&entry.key, &entry.handled_by));
        let outcome = format!("cancelled by command {by}");
        let mut cancelled = 0;
        for (key, owner) in own.chain(others).filter(|(key, _)| is_selected(key)) {
            let change = log::Change {
                from: CommandState::Running,
                owner,
                to: CommandState::Cancelled,
                outcome: &outcome,
                now_ms: (self.context.clock)(),
            };
            cancelled += u32::from(self.context.change(key, &change).await == Some(true));
        }
        for job in self.jobs.iter().filter(|job| is_selected(&job.key)) {
            job.stop.begin();
        }
        match (cancelled, id) {
            (0, Some(id)) => Err(format!("command {id} is not running")),
            (0, None) => Ok("no command is running".to_owned()),
            (1, _) => Ok("1 command cancelled".to_owned()),
            _ => Ok(format!("{cancelled} commands cancelled")),
        }
    }

    /// Marks commands whose process has died as interrupted. Must be called regularly.
    pub async fn interrupt_orphaned(&mut self) {
        self.jobs.retain(|job| !job.task.is_finished());
        let now_ms = (self.context.clock)();
        let mut still = Vec::new();
        for seen in std::mem::take(&mut self.foreign) {
            match self.context.log.get(&seen.key).await {
                Ok(Some(entry)) if entry.state == CommandState::Running => {
                    if entry.handled_at_ms + SILENCE_MS > now_ms {
                        still.push(entry);
                        continue;
                    }
                    let outcome =
                        format!("its producer {} stopped before the command ended", entry.handled_by);
                    let change = log::Change {
                        from: CommandState::Running,
                        owner: &entry.handled_by,
                        to: CommandState::Interrupted,
                        outcome: &outcome,
                        now_ms,
                    };
                    if self.context.change(&entry.key, &change).await == Some(true) {
                        tracing::warn!(id = entry.key.id, outcome, "command interrupted");
                    }
                }
                Ok(_) => {}
                Err(e) => {
                    tracing::debug!(error = %e, "the control log is unavailable; retrying");
                    still.push(seen);
                }
            }
        }
        self.foreign = still;
    }

    /// Stops the running commands. Each records its outcome.
    pub async fn stop(mut self) {
        self.stopping.begin();
        let deadline = tokio::time::sleep(DRAIN);
        tokio::pin!(deadline);
        for job in &mut self.jobs {
            job.stop.begin();
            tokio::select! {
                _ = &mut job.task => {}
                // The next producer marks the command as interrupted.
                () = &mut deadline => return,
            }
        }
    }
}

impl CommandContext {
    /// Runs a command to its end and keeps renewing its row. Stops the command if another producer has taken over the row.
    async fn supervise(self, key: LogKey, action: Action, stop: Shutdown, stopping: Shutdown) {
        let (work, work_stop) = (self.work.clone(), stop.clone());
        let mut working = tokio::spawn(async move { work.carry_out(&action, &work_stop).await });
        let mut renewed_ms = (self.clock)();
        let outcome = loop {
            tokio::select! {
                ended = &mut working => break ended.unwrap_or_else(|e| Err(format!("the command was aborted: {e}"))),
                () = tokio::time::sleep(RENEW) => {}
            }
            let now_ms = (self.clock)();
            match self.log.renew(&key, &self.owner, now_ms).await {
                Ok(true) => renewed_ms = now_ms,
                Ok(false) => stop.begin(),
                // Other processes consider the command dead by now.
                Err(_) if renewed_ms + SILENCE_MS <= now_ms => stop.begin(),
                Err(e) => {
                    tracing::debug!(error = %e, id = key.id, "renewing the command's row failed; retrying")
                }
            }
        };
        self.record_outcome(&key, outcome, stopping.has_begun()).await;
    }

    /// Records the outcome of a command of this process.
    async fn record_outcome(&self, key: &LogKey, outcome: Result<String, String>, stopped: bool) {
        let (mut state, text) = match outcome {
            Ok(text) => (CommandState::Done, text),
            Err(text) => (CommandState::Failed, text),
        };
        let text = if stopped { format!("the producer was stopped: {text}") } else { text };
        if stopped {
            state = CommandState::Interrupted;
        }
        let now_ms = (self.clock)();
        let running = CommandState::Running;
        let mut change = log::Change { from: running, owner: &self.owner, to: state, outcome: &text, now_ms };
        let mut written = self.change(key, &change).await;
        if written == Some(false) {
            state = CommandState::Cancelled;
            (change.from, change.to) = (state, state);
            written = self.change(key, &change).await;
        }
        self.metrics.command_ended(state);
        let (id, state) = (&key.id, state.name());
        match written {
            Some(true) => tracing::info!(id, state, outcome = text, "command ended"),
            _ => tracing::warn!(id, state, outcome = text, "command ended, but its outcome was not recorded"),
        }
    }

    /// Changes a row and retries while the log is unavailable. Returns `None` if it stayed unavailable or rejected the
    /// change.
    async fn change(&self, key: &LogKey, change: &log::Change<'_>) -> Option<bool> {
        for _ in 0..LOG_TRIES {
            match self.log.change(key, change).await {
                Ok(true) => return Some(true),
                // An earlier try may have been applied without a response.
                Ok(false) => match self.log.get(key).await {
                    Ok(found) => {
                        return Some(
                            found.is_some_and(|e| e.state == change.to && e.outcome == change.outcome),
                        );
                    }
                    Err(e) => tracing::debug!(error = %e, "the control log is unavailable; retrying"),
                },
                Err(e @ LedgerError::Refused(_)) => {
                    tracing::error!(error = %e, id = key.id, "the outcome of a command cannot be recorded");
                    return None;
                }
                Err(e) => tracing::debug!(error = %e, "the control log is unavailable; retrying"),
            }
            tokio::time::sleep(LOG_PAUSE).await;
        }
        None
    }
}

#[cfg(test)]
#[path = "control/tests.rs"]
mod tests;
