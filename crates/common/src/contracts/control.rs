//! Commands to the producer: their actions, their limits and their states. Pure. The dashboard and the CLI send
//! commands, and the producer executes them.
//!
//! A command is one JSON object in the control topic, for example
//! `{"id": "…uuid…", "stream": "user_created", "issued_by": "cli", "issued_at_ms": 0, "expires_at_ms": 60000,
//! "action": {"spike": {"rate": 3000, "seconds": 10}}}`. Its outcome is a row of table `control_log`.

use crate::contracts::event::{DAY_MS, MAX_EVENT_TIME_MS, floor_to};
use crate::contracts::run_ledger::{Reprocess, RunState};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

/// Longest command in bytes.
pub const MAX_COMMAND_BYTES: usize = 16 << 10;
/// Longest time from issue to expiry: one hour.
pub const MAX_LIFETIME_MS: i64 = 3_600_000;
/// How far the clock of a sender may be ahead of the clock of the producer: one minute.
pub const MAX_AHEAD_MS: i64 = 60_000;
/// Most messages of one `produce`.
pub const MAX_MESSAGES: u64 = 5_000_000;
/// Highest rate of one `spike`, in messages per second.
pub const MAX_RATE: u64 = 100_000;
/// Longest `spike`: ten minutes.
pub const MAX_SPIKE_SECONDS: u64 = 600;
/// Most concurrent runs of one `backfill`.
pub const MAX_ACTIVE_RUNS: u32 = 16;
/// Longest span of one `backfill` or `clear`: 366 days.
pub const MAX_SPAN_MS: i64 = 366 * DAY_MS;

/// A command to the producer of a stream.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Command {
    /// Unique id, a UUID.
    pub id: String,
    /// Name of the stream.
    pub stream: String,
    /// Sender of the command. Informational.
    pub issued_by: String,
    /// Time of issue in Unix milliseconds, on the clock of the sender.
    pub issued_at_ms: i64,
    /// The producer does not start the command at or after this time, in Unix milliseconds.
    pub expires_at_ms: i64,
    /// The requested action.
    pub action: Action,
}

/// An action that a command can request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Action {
    /// Produces synthetic events as fast as possible. At most one `produce` or `spike` runs at a time.
    Produce {
        /// Number of events.
        messages: u64,
    },
    /// Produces synthetic events at a fixed rate. At most one `produce` or `spike` runs at a time.
    Spike {
        /// Messages per second.
        rate: u64,
        /// Duration in seconds.
        seconds: u64,
    },
    /// Stops running commands.
    Cancel {
        /// Id of the command to stop. `None` stops all.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        id: Option<String>,
    },
    /// Runs the intervals that start in `[from_ms, to_ms)`.
    Backfill {
        /// Unix milliseconds.
        from_ms: i64,
        /// Unix milliseconds.
        to_ms: i64,
        /// Which finished runs are repeated.
        #[serde(default)]
        reprocess: Reprocess,
        /// Most concurrent runs.
        #[serde(default = "one")]
        max_active_runs: u32,
        /// Whether to start with the newest interval.
        #[serde(default)]
        newest_first: bool,
    },
    /// Makes the runs of the intervals that start in `[from_ms, to_ms)` due again.
    Clear {
        /// Unix milliseconds.
        from_ms: i64,
        /// Unix milliseconds.
        to_ms: i64,
        /// Only runs in this state.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        state: Option<RunState>,
    },
    /// Stops starting scheduled runs.
    Pause,
    /// Starts scheduled runs again after `pause`.
    Resume,
}

fn one() -> u32 {
    1
}

impl Action {
    /// The name stored in `control_log.command`.
    pub fn name(&self) -> &'static str {
        match self {
            Action::Produce { .. } => "produce",
            Action::Spike { .. } => "spike",
            Action::Cancel { .. } => "cancel",
            Action::Backfill { .. } => "backfill",
            Action::Clear { .. } => "clear",
            Action::Pause => "pause",
            Action::Resume => "resume",
        }
    }

    /// The arguments as JSON. Empty for an action without arguments.
    pub fn arguments(&self) -> String {
        match serde_json::to_value(self) {
            Ok(Value::Object(object)) => object.values().next().map(Value::to_string).unwrap_or_default(),
            _ => String::new(),
        }
    }

    fn check(&self) -> Result<(), String> {
        match self {
            Action::Produce { messages } => within("messages", *messages, 1, MAX_MESSAGES),
            Action::Spike { rate, seconds } => {
                within("rate", *rate, 1, MAX_RATE)?;
                within("seconds", *seconds, 1, MAX_SPIKE_SECONDS)
            }
            Action::Backfill { from_ms, to_ms, max_active_runs, .. } => {
                within("max_active_runs", u64::from(*max_active_runs), 1, u64::from(MAX_ACTIVE_RUNS))?;
                check_span(*from_ms, *to_ms)
            }
            Action::Clear { from_ms, to_ms, .. } => check_span(*from_ms, *to_ms),
            Action::Cancel { .. } | Action::Pause | Action::Resume => Ok(()),
        }
    }
}

fn within(name: &str, value: u64, least: u64, most: u64) -> Result<(), String> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    Err(format!("`{name}` {value} is out of bounds; from {least} to {most}"))
}

fn check_span(from_ms: i64, to_ms: i64) -> Result<(), String> {
    if !(0..to_ms).contains(&from_ms) || to_ms > MAX_EVENT_TIME_MS {
        return Err(format!("`from_ms` {from_ms} must be before `to_ms` {to_ms}, both after 1970"));
    }
    if to_ms - from_ms > MAX_SPAN_MS {
        return Err(format!(
            "the span is longer than {} days; split it into several commands",
            MAX_SPAN_MS / DAY_MS
        ));
    }
    Ok(())
}

impl Command {
    /// Creates a command with a new id that expires `lifetime_ms` after `now_ms`.
    pub fn new(stream: &str, issued_by: &str, now_ms: i64, lifetime_ms: i64, action: Action) -> Command {
        Command {
            id: Uuid::new_v4().to_string(),
            stream: stream.to_owned(),
            issued_by: issued_by.to_owned(),
            issued_at_ms: now_ms,
            expires_at_ms: now_ms.saturating_add(lifetime_ms),
            action,
        }
    }

    /// The key of the row that holds the outcome.
    pub fn key(&self) -> LogKey {
        LogKey { issued_at_ms: self.issued_at_ms, id: self.id.clone() }
    }

    /// Checks whether the command may start now. The error names the problem and the allowed values.
    pub fn check(&self, now_ms: i64) -> Result<(), String> {
        if self.issued_at_ms > now_ms + MAX_AHEAD_MS {
            let ahead = (self.issued_at_ms - now_ms) / 1000;
            return Err(format!("issued {ahead} s in the future: check the clock of the sender"));
        }
        let lifetime_ms = self.expires_at_ms.saturating_sub(self.issued_at_ms);
        if !(1..=MAX_LIFETIME_MS).contains(&lifetime_ms) {
            let most = MAX_LIFETIME_MS / 1000;
            return Err(format!("expires {lifetime_ms} ms after its issue; must be from 1 ms to {most} s"));
        }
        if self.expires_at_ms <= now_ms {
            return Err(format!("expired {} ms before it was read", now_ms - self.expires_at_ms));
        }
        self.action.check()
    }
}

/// Key of a row of `control_log` within its stream.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct LogKey {
    /// Unix milliseconds.
    pub issued_at_ms: i64,
    /// Id of the command, or `offset-N` for a record without a valid id.
    pub id: String,
}

impl LogKey {
    /// Start of the UTC day in Unix milliseconds, which is part of the partition key of the row.
    pub fn day_ms(&self) -> i64 {
        floor_to(self.issued_at_ms, DAY_MS)
    }
}

/// State of a command: `running → done | failed | cancelled | interrupted`. A command that never starts is `refused`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CommandState {
    /// A producer is executing it.
    Running,
    /// It succeeded.
    Done,
    /// It started but did not succeed.
    Failed,
    /// A `cancel` command stopped it.
    Cancelled,
    /// The producer stopped while it was running. It is never restarted.
    Interrupted,
    /// It was rejected before it started.
    Refused,
}

impl CommandState {
    /// All variants.
    pub const ALL: [CommandState; 6] = [
        CommandState::Running,
        CommandState::Done,
        CommandState::Failed,
        CommandState::Cancelled,
        CommandState::Interrupted,
        CommandState::Refused,
    ];

    /// The name stored in `control_log.state`.
    pub fn name(self) -> &'static str {
        match self {
            CommandState::Running => "running",
            CommandState::Done => "done",
            CommandState::Failed => "failed",
            CommandState::Cancelled => "cancelled",
            CommandState::Interrupted => "interrupted",
            CommandState::Refused => "refused",
        }
    }

    /// Parses a name written by [`CommandState::name`].
    pub fn from_name(name: &str) -> Option<CommandState> {
        CommandState::ALL.into_iter().find(|state| state.name() == name)
    }
}

/// A record read from the control topic.
#[derive(Debug, Clone, PartialEq)]
pub struct Received {
    /// The key of the row that holds the outcome.
    pub key: LogKey,
    /// Name of the stream. `None` if it cannot be parsed.
    pub stream: Option<String>,
    /// Name of the command, or `(unreadable)`.
    pub name: String,
    /// Arguments as JSON. For an unreadable record, the start of its text.
    pub arguments: String,
    /// The command, or why the record is not a valid one.
    pub command: Result<Command, String>,
}

/// Characters that are kept of an unreadable record.
const MAX_SHOWN: usize = 200;

/// Parses a record. The key of an invalid command is its id and its time of issue if it has both, so that the sender
/// finds the refusal. Otherwise the key is the offset and the timestamp of the record. Either way, the same record
/// always has the same key.
pub fn read(bytes: &[u8], offset: i64, timestamp_ms: i64) -> Received {
    let refused = |value: Option<&Value>, reason: String| {
        let text = |name: &str| value.and_then(|v| v.get(name)?.as_str().map(str::to_owned));
        let issued_at_ms = value.and_then(|v| v.get("issued_at_ms")?.as_i64()).filter(|at| is_time(*at));
        let key = match (text("id").filter(|id| Uuid::parse_str(id).is_ok()), issued_at_ms) {
            (Some(id), Some(issued_at_ms)) => LogKey { issued_at_ms, id },
            _ => LogKey { issued_at_ms: timestamp_ms, id: format!("offset-{offset}") },
        };
        let shown: String = String::from_utf8_lossy(bytes).chars().take(MAX_SHOWN).collect();
        let name = "(unreadable)".to_owned();
        Received { key, stream: text("stream"), name, arguments: shown, command: Err(reason) }
    };
    if bytes.len() > MAX_COMMAND_BYTES {
        return refused(None, format!("{} bytes; a command has at most {MAX_COMMAND_BYTES}", bytes.len()));
    }
    let value: Value = match serde_json::from_slice(bytes) {
        Ok(value) => value,
        Err(e) => return refused(None, format!("not valid JSON: {e}")),
    };
    let command = match serde_json::from_value::<Command>(value.clone()) {
        Ok(command) => command,
        Err(e) => return refused(Some(&value), format!("not a valid command: {e}")),
    };
    if Uuid::parse_str(&command.id).is_err() {
        return refused(Some(&value), "`id` is not a UUID".to_owned());
    }
    if !is_time(command.issued_at_ms) {
        return refused(Some(&value), format!("`issued_at_ms` {} is not a valid time", command.issued_at_ms));
    }
    Received {
        key: command.key(),
        stream: Some(command.stream.clone()),
        name: command.action.name().to_owned(),
        arguments: command.action.arguments(),
        command: Ok(command),
    }
}

fn is_time(ms: i64) -> bool {
    (0..=MAX_EVENT_TIME_MS).contains(&ms)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NOW: i64 = 1_767_225_600_000;

    fn command(action: Action) -> Command {
        Command::new("users", "test", NOW, 60_000, action)
    }

    fn read_text(text: &str) -> Received {
        read(text.as_bytes(), 7, NOW)
    }

    fn actions() -> Vec<Action> {
        vec![
            Action::Produce { messages: 5 },
            Action::Spike { rate: 3000, seconds: 10 },
            Action::Cancel { id: None },
            Action::Cancel { id: Some(Uuid::nil().to_string()) },
            Action::Backfill {
                from_ms: 0,
                to_ms: 60_000,
                reprocess: Reprocess::Failed,
                max_active_runs: 2,
                newest_first: true,
            },
            Action::Clear { from_ms: 0, to_ms: 60_000, state: Some(RunState::Failed) },
            Action::Pause,
            Action::Resume,
        ]
    }

    #[test]
    fn every_command_survives_a_round_trip() {
        for action in actions() {
            let sent = command(action);
            let text = serde_json::to_string(&sent).unwrap();
            let received = read_text(&text);
            assert_eq!(received.command.as_ref(), Ok(&sent), "{text}");
            assert_eq!((received.key, received.name.as_str()), (sent.key(), sent.action.name()));
            sent.check(NOW + 1).unwrap();
        }
        assert_eq!(Action::Spike { rate: 1, seconds: 2 }.arguments(), r#"{"rate":1,"seconds":2}"#);
        assert_eq!(Action::Pause.arguments(), "");
    }

    #[test]
    fn an_invalid_command_is_refused_with_a_reason_and_a_key() {
        let id = "7a0f0e8e-0f83-4dd3-90c2-2a4f3a4f2b1c";
        let whole = |action: &str| {
            format!(
                r#"{{"id":"{id}","stream":"users","issued_by":"t","issued_at_ms":{NOW},"expires_at_ms":{NOW},"action":{action}}}"#
            )
        };
        let check = |text: &str, key_id: &str, expected: &str| {
            let received = read_text(text);
            assert_eq!(received.key.id, key_id, "{text}");
            let reason = received.command.unwrap_err();
            assert!(reason.contains(expected), "`{expected}` is not in `{reason}`");
        };
        check("{", "offset-7", "not valid JSON");
        check("[]", "offset-7", "not a valid command");
        check(&"x".repeat(MAX_COMMAND_BYTES + 1), "offset-7", "at most 16384");
        check(
            &whole(r#"{"explode":{}}"#),
            id,
            "unknown variant `explode`, expected one of `produce`, `spike`",
        );
        check(&whole(r#"{"spike":{"rate":1}}"#), id, "missing field `seconds`");
        check(&whole(r#"{"spike":{"rate":-1,"seconds":1}}"#), id, "invalid value");
        check(&whole("\"pause\"").replace(id, "one"), "offset-7", "`id` is not a UUID");
        check(&whole("\"pause\"").replace("\"issued_by\"", "\"by\""), id, "unknown field `by`");
    }

    #[test]
    fn an_error_names_the_value_and_its_bounds() {
        let check = |action: Action, expected: &str| {
            let reason = command(action).check(NOW).unwrap_err();
            assert!(reason.contains(expected), "`{expected}` is not in `{reason}`");
        };
        check(
            Action::Spike { rate: 100_001, seconds: 1 },
            "`rate` 100001 is out of bounds; from 1 to 100000",
        );
        check(Action::Spike { rate: 1, seconds: 0 }, "`seconds` 0 is out of bounds; from 1 to 600");
        check(Action::Produce { messages: u64::MAX }, "from 1 to 5000000");
        check(Action::Clear { from_ms: 5, to_ms: 5, state: None }, "must be before");
        check(Action::Clear { from_ms: 0, to_ms: MAX_SPAN_MS + 1, state: None }, "longer than 366 days");
        let expired = command(Action::Pause);
        assert_eq!(expired.check(NOW + 60_000).unwrap_err(), "expired 0 ms before it was read");
        let without_end = Command { expires_at_ms: i64::MAX, ..command(Action::Pause) };
        assert!(without_end.check(NOW).unwrap_err().contains("from 1 ms to 3600 s"));
        assert!(command(Action::Pause).check(NOW - MAX_AHEAD_MS - 1).unwrap_err().contains("in the future"));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), now in any::<i64>()) {
            let received = read(&bytes, 1, NOW);
            prop_assert!(received.arguments.len() <= 4 * MAX_SHOWN);
            if let Ok(command) = received.command {
                let _ = command.check(now.clamp(0, MAX_EVENT_TIME_MS));
            }
        }
    }
}
