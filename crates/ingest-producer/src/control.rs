//! Commands of the control topic, carried out. What a command is and its bounds are `common::control`'s.
//!
//! `control_log` decides, not a position in the topic: the topic's day is read again at each start ([`listen`]), and a command
//! whose row is there is not begun. The row is written, with a compare and set, before anything is done, and kept alive while
//! it goes on; one whose producer fell silent becomes `interrupted`. So none runs twice and none vanishes. One member of
//! a consumer group has the topic's only partition: commands are begun one after the other, by one producer.

pub mod listen;
pub mod log;
pub mod send;
pub mod work;

use crate::ledger::LedgerError;
use crate::metrics::Metrics;
use crate::run::Clock;
use common::control::{Action, Command, CommandState, LogKey, Received};
use common::shutdown::Shutdown;
use log::{ControlLog, Entry};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinHandle;
use work::Work;

/// How long a running command's row may go without a sign of life, in milliseconds.
pub const SILENCE_MS: i64 = 10_000;
/// How often a running command gives one.
const RENEW: Duration = Duration::from_secs(1);
/// Pause before the log is asked again, and how often at most: two minutes of an outage.
const LOG_PAUSE: Duration = Duration::from_millis(500);
const LOG_TRIES: u32 = 240;
/// Most ids remembered; beyond, the log alone knows.
const MAX_KNOWN: usize = 100_000;
/// How long commands may take to stop with their producer.
const DRAIN: Duration = Duration::from_secs(5);

/// Of each kind one command goes on at a time; the others do not take long enough to meet.
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

    /// By the name in `control_log.command`.
    fn of_name(name: &str) -> Option<Kind> {
        match name {
            "produce" | "spike" => Some(Kind::Load),
            "backfill" => Some(Kind::Backfill),
            "clear" => Some(Kind::Clear),
            _ => None,
        }
    }
}

/// A command that goes on in this process.
struct Job {
    key: LogKey,
    kind: Kind,
    stop: Shutdown,
    task: JoinHandle<()>,
}

/// What commands touch, shared with their tasks.
#[derive(Clone)]
pub struct Desk {
    /// The stream whose commands these are.
    pub stream: String,
    /// Unlike that of any other process, also of this one's next life.
    pub owner: String,
    /// Where outcomes stand.
    pub log: Arc<dyn ControlLog>,
    /// What does the work.
    pub work: Arc<dyn Work>,
    /// Now.
    pub clock: Clock,
    /// What is counted.
    pub metrics: Metrics,
}

/// Begins commands one after the other.
pub struct Control {
    desk: Desk,
    /// Keys of the commands read so far, by id.
    known: HashMap<String, LogKey>,
    jobs: Vec<Job>,
    /// Rows of other processes, running when last seen.
    foreign: Vec<Entry>,
    /// Begins when this process stops.
    stopping: Shutdown,
}

impl Control {
    /// Nothing is read yet.
    pub fn new(desk: Desk) -> Control {
        Control {
            desk,
            known: HashMap::new(),
            jobs: Vec::new(),
            foreign: Vec::new(),
            stopping: Shutdown::default(),
        }
    }

    /// Begins one command or refuses it. An error means that the log could not be asked: call it again.
    pub async fn handle(&mut self, received: &Received) -> Result<(), LedgerError> {
        let desk = self.desk.clone();
        if received.stream.as_ref().is_some_and(|stream| *stream != desk.stream) {
            return Ok(());
        }
        let key = &received.key;
        let reused = match self.known.get(&key.id) {
            Some(known) if known == key => return Ok(()),
            known => known.is_some(),
        };
        let now_ms = (desk.clock)();
        let verdict = received.command.clone().and_then(|command| {
            command.check(now_ms)?;
            if reused {
                return Err("its id was used before".to_owned());
            }
            self.check_room(&command.action)?;
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
            handled_by: desk.owner.clone(),
            handled_at_ms: now_ms,
        };
        let found = desk.log.begin(&entry).await?;
        if self.known.len() >= MAX_KNOWN {
            self.known.clear();
        }
        if !reused {
            self.known.insert(key.id.clone(), key.clone());
        }
        match (found, verdict) {
            // Ours without a job: an earlier try to begin it got no answer.
            (Some(found), _) if found.state == CommandState::Running && found.handled_by != desk.owner => {
                self.foreign.push(found);
            }
            (Some(found), _) if found.state != CommandState::Running => {}
            (_, Ok(command)) => self.begin(command).await,
            (Some(_), Err(reason)) => desk.conclude(key, Err(reason), false).await,
            (_, Err(reason)) => {
                desk.metrics.command_ended(CommandState::Refused);
                tracing::warn!(id = key.id, command = received.name, reason, "command refused");
            }
        }
        Ok(())
    }

    /// Of each kind one goes on at a time.
    fn check_room(&self, action: &Action) -> Result<(), String> {
        let Some(kind) = Kind::of(action) else { return Ok(()) };
        let own = self.jobs.iter().filter(|job| job.kind == kind && !job.task.is_finished());
        let others = self.foreign.iter().filter(|entry| Kind::of_name(&entry.command) == Some(kind));
        match own.map(|job| &job.key).chain(others.map(|entry| &entry.key)).next() {
            Some(busy) => Err(format!("command {} of this kind goes on; wait for it or cancel it", busy.id)),
            None => Ok(()),
        }
    }

    async fn begin(&mut self, command: Command) {
        tracing::info!(
            id = command.id,
            command = command.action.name(),
            arguments = command.action.arguments(),
            issued_by = command.issued_by,
            "command begins"
        );
        let key = command.key();
        match (&command.action, Kind::of(&command.action)) {
            (Action::Cancel { id }, _) => {
                let outcome = self.cancel(id.as_deref(), &command.id).await;
                self.desk.conclude(&key, outcome, false).await;
            }
            (action, None) => {
                let outcome = self.desk.work.carry_out(action, &Shutdown::default()).await;
                self.desk.conclude(&key, outcome, false).await;
            }
            (_, Some(kind)) => {
                let stop = Shutdown::default();
                let (desk, stopping) = (self.desk.clone(), self.stopping.clone());
                let going = desk.go_on(key.clone(), command.action, stop.clone(), stopping);
                self.jobs.push(Job { key, kind, stop, task: tokio::spawn(going) });
            }
        }
    }

    async fn cancel(&mut self, id: Option<&str>, by: &str) -> Result<String, String> {
        let wanted = |key: &LogKey| id.is_none_or(|id| id == key.id);
        let own =
            self.jobs.iter().filter(|job| !job.task.is_finished()).map(|job| (&job.key, &self.desk.owner));
        let others = self.foreign.iter().map(|entry| (&entry.key, &entry.handled_by));
        let outcome = format!("cancelled by command {by}");
        let mut cancelled = 0;
        for (key, owner) in own.chain(others).filter(|(key, _)| wanted(key)) {
            let change = log::Change {
                from: CommandState::Running,
                owner,
                to: CommandState::Cancelled,
                outcome: &outcome,
                now_ms: (self.desk.clock)(),
            };
            cancelled += u32::from(self.desk.change(key, &change).await == Some(true));
        }
        for job in self.jobs.iter().filter(|job| wanted(&job.key)) {
            job.stop.begin();
        }
        match (cancelled, id) {
            (0, Some(id)) => Err(format!("command {id} does not go on")),
            (0, None) => Ok("nothing goes on".to_owned()),
            (1, _) => Ok("1 command cancelled".to_owned()),
            _ => Ok(format!("{cancelled} commands cancelled")),
        }
    }

    /// Looks after commands of processes that may be gone; to be called now and then.
    pub async fn look_after(&mut self) {
        self.jobs.retain(|job| !job.task.is_finished());
        let now_ms = (self.desk.clock)();
        let mut still = Vec::new();
        for seen in std::mem::take(&mut self.foreign) {
            match self.desk.log.get(&seen.key).await {
                Ok(Some(entry)) if entry.state == CommandState::Running => {
                    if entry.handled_at_ms + SILENCE_MS > now_ms {
                        still.push(entry);
                        continue;
                    }
                    let outcome = format!("its producer {} ended before it did", entry.handled_by);
                    let change = log::Change {
                        from: CommandState::Running,
                        owner: &entry.handled_by,
                        to: CommandState::Interrupted,
                        outcome: &outcome,
                        now_ms,
                    };
                    if self.desk.change(&entry.key, &change).await == Some(true) {
                        tracing::warn!(id = entry.key.id, outcome, "command interrupted");
                    }
                }
                Ok(_) => {}
                Err(e) => {
                    tracing::debug!(error = %e, "control log");
                    still.push(seen);
                }
            }
        }
        self.foreign = still;
    }

    /// Stops what goes on; each writes what became of it.
    pub async fn stop(mut self) {
        self.stopping.begin();
        let deadline = tokio::time::sleep(DRAIN);
        tokio::pin!(deadline);
        for job in &mut self.jobs {
            job.stop.begin();
            tokio::select! {
                _ = &mut job.task => {}
                // The next producer finds the row silent.
                () = &mut deadline => return,
            }
        }
    }
}

impl Desk {
    /// One command to its end; its row is kept alive meanwhile, and lost when somebody else ends it.
    async fn go_on(self, key: LogKey, action: Action, stop: Shutdown, stopping: Shutdown) {
        let (work, told) = (self.work.clone(), stop.clone());
        let mut working = tokio::spawn(async move { work.carry_out(&action, &told).await });
        let mut renewed_ms = (self.clock)();
        let outcome = loop {
            tokio::select! {
                ended = &mut working => break ended.unwrap_or_else(|e| Err(format!("the command broke off: {e}"))),
                () = tokio::time::sleep(RENEW) => {}
            }
            let now_ms = (self.clock)();
            match self.log.renew(&key, &self.owner, now_ms).await {
                Ok(true) => renewed_ms = now_ms,
                Ok(false) => stop.begin(),
                // Others take it for dead by now.
                Err(_) if renewed_ms + SILENCE_MS <= now_ms => stop.begin(),
                Err(e) => tracing::debug!(error = %e, id = key.id, "the command's row was not renewed"),
            }
        };
        self.conclude(&key, outcome, stopping.has_begun()).await;
    }

    /// Writes what became of a command of ours.
    async fn conclude(&self, key: &LogKey, outcome: Result<String, String>, stopped: bool) {
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
            _ => tracing::warn!(id, state, outcome = text, "command ended, but its row says otherwise"),
        }
    }

    /// Changes a row, asking again while the log is away. `None`: it stayed away, or refuses.
    async fn change(&self, key: &LogKey, change: &log::Change<'_>) -> Option<bool> {
        for _ in 0..LOG_TRIES {
            match self.log.change(key, change).await {
                Ok(true) => return Some(true),
                // An earlier try of ours may have been carried out without an answer.
                Ok(false) => match self.log.get(key).await {
                    Ok(found) => {
                        return Some(
                            found.is_some_and(|e| e.state == change.to && e.outcome == change.outcome),
                        );
                    }
                    Err(e) => tracing::debug!(error = %e, "control log"),
                },
                Err(e @ LedgerError::Refused(_)) => {
                    tracing::error!(error = %e, id = key.id, "a command's outcome cannot be written");
                    return None;
                }
                Err(e) => tracing::debug!(error = %e, "control log"),
            }
            tokio::time::sleep(LOG_PAUSE).await;
        }
        None
    }
}

#[cfg(test)]
#[path = "control/tests.rs"]
mod tests;
