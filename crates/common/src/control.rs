//! Commands to the producer: what can be asked for, within which bounds, and what can become of it. Pure; carrying them out
//! is the producer's, sending them the dashboard's and the CLI's.
//!
//! A command is one JSON object in the control topic, for example
//! `{"id": "…uuid…", "stream": "user_created", "issued_by": "cli", "issued_at_ms": 0, "expires_at_ms": 60000,
//! "action": {"spike": {"rate": 3000, "seconds": 10}}}`. What became of it is a row of `control_log`.

use crate::event::{MAX_EVENT_TIME_MS, floor_to};
use crate::run_ledger::{Reprocess, RunState};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

/// Longest command in bytes.
pub const MAX_COMMAND_BYTES: usize = 16 << 10;
/// Longest time from issue to expiry: an hour.
pub const MAX_LIFETIME_MS: i64 = 3_600_000;
/// How far a sender's clock may be ahead of the producer's: a minute.
pub const MAX_AHEAD_MS: i64 = 60_000;
/// Most messages of one `produce`.
pub const MAX_MESSAGES: u64 = 5_000_000;
/// Highest rate of one `spike`, in messages per second.
pub const MAX_RATE: u64 = 100_000;
/// Longest `spike`: ten minutes.
pub const MAX_SPIKE_SECONDS: u64 = 600;
/// Most runs at once of one `backfill`.
pub const MAX_ACTIVE_RUNS: u32 = 16;
/// Longest span of one `backfill` or `clear`: 366 days.
pub const MAX_SPAN_MS: i64 = 366 * 86_400_000;
const DAY_MS: i64 = 86_400_000;

/// A command.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Command {
    /// A UUID, used once.
    pub id: String,
    /// Stream whose producer is meant.
    pub stream: String,
    /// Who asks, for people.
    pub issued_by: String,
    /// When it was issued, Unix milliseconds.
    pub issued_at_ms: i64,
    /// From when on it is not begun any more, Unix milliseconds.
    pub expires_at_ms: i64,
    /// What is asked for.
    pub action: Action,
}

/// What can be asked for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Action {
    /// Made-up events, as fast as possible.
    Produce {
        /// How many.
        messages: u64,
    },
    /// Made-up events at a rate. One load, a spike or a `produce`, goes on at a time.
    Spike {
        /// Messages per second.
        rate: u64,
        /// For how long.
        seconds: u64,
    },
    /// Stops a command that goes on.
    Cancel {
        /// Which; none: all of them.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        id: Option<String>,
    },
    /// Runs the intervals that begin in `[from_ms, to_ms)`.
    Backfill {
        /// Unix milliseconds.
        from_ms: i64,
        /// Unix milliseconds.
        to_ms: i64,
        /// Which runs that are over are run again.
        #[serde(default)]
        reprocess: Reprocess,
        /// Most runs at once.
        #[serde(default = "one")]
        max_active_runs: u32,
        /// Begin with the newest.
        #[serde(default)]
        newest_first: bool,
    },
    /// Makes runs of intervals that begin in `[from_ms, to_ms)` due again.
    Clear {
        /// Unix milliseconds.
        from_ms: i64,
        /// Unix milliseconds.
        to_ms: i64,
        /// Only runs in this state.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        state: Option<RunState>,
    },
    /// Nothing new of the schedule begins.
    Pause,
    /// It begins again.
    Resume,
}

fn one() -> u32 {
    1
}

impl Action {
    /// As stored in `control_log.command`.
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

    /// Its arguments as JSON; empty where it has none.
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
        return Err(format!("the span is longer than {} days; ask in parts", MAX_SPAN_MS / DAY_MS));
    }
    Ok(())
}

impl Command {
    /// A new command with an id of its own.
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

    /// Where its outcome stands.
    pub fn key(&self) -> LogKey {
        LogKey { issued_at_ms: self.issued_at_ms, id: self.id.clone() }
    }

    /// Whether it may be begun now; the error says why not, and what is allowed.
    pub fn check(&self, now_ms: i64) -> Result<(), String> {
        if self.issued_at_ms > now_ms + MAX_AHEAD_MS {
            let ahead = (self.issued_at_ms - now_ms) / 1000;
            return Err(format!("issued {ahead} s in the future: the sender's clock is wrong"));
        }
        let lifetime_ms = self.expires_at_ms.saturating_sub(self.issued_at_ms);
        if !(1..=MAX_LIFETIME_MS).contains(&lifetime_ms) {
            let most = MAX_LIFETIME_MS / 1000;
            return Err(format!("expires {lifetime_ms} ms after its issue; from 1 ms to {most} s"));
        }
        if self.expires_at_ms <= now_ms {
            return Err(format!("expired {} ms before it was read", now_ms - self.expires_at_ms));
        }
        self.action.check()
    }
}

/// A row of `control_log` within its stream.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct LogKey {
    /// Unix milliseconds.
    pub issued_at_ms: i64,
    /// The command's id; `offset-N` for a record without one.
    pub id: String,
}

impl LogKey {
    /// Start of the day, UTC, that the row is kept with.
    pub fn day_ms(&self) -> i64 {
        floor_to(self.issued_at_ms, DAY_MS)
    }
}

/// What became of a command. `running → done | failed | cancelled | interrupted`, or `refused` at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CommandState {
    /// A producer is at it.
    Running,
    /// It did what was asked for.
    Done,
    /// It was begun and did not succeed.
    Failed,
    /// Somebody stopped it.
    Cancelled,
    /// Its producer ended before it did; it is never begun again.
    Interrupted,
    /// It was never begun.
    Refused,
}

impl CommandState {
    /// All of them.
    pub const ALL: [CommandState; 6] = [
        CommandState::Running,
        CommandState::Done,
        CommandState::Failed,
        CommandState::Cancelled,
        CommandState::Interrupted,
        CommandState::Refused,
    ];

    /// As stored.
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

    /// Reads what [`CommandState::name`] wrote.
    pub fn from_name(name: &str) -> Option<CommandState> {
        CommandState::ALL.into_iter().find(|state| state.name() == name)
    }
}

/// A record of the control topic as read.
#[derive(Debug, Clone, PartialEq)]
pub struct Received {
    /// Where its outcome stands.
    pub key: LogKey,
    /// Its stream, where it can be read.
    pub stream: Option<String>,
    /// Name of the command, `(unreadable)` where there is none.
    pub name: String,
    /// Arguments as JSON, or the beginning of what cannot be read.
    pub arguments: String,
    /// The command, or why it is none.
    pub command: Result<Command, String>,
}

/// Most of an unreadable command that is kept, in characters.
const MAX_SHOWN: usize = 200;

/// Reads a record. One that is no command is named by its own id and time of issue where it has them, so that its sender
/// finds the refusal, else by its offset and time stamp: the same record has the same name each time it is read.
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
        Err(e) => return refused(None, format!("no JSON: {e}")),
    };
    let command = match serde_json::from_value::<Command>(value.clone()) {
        Ok(command) => command,
        Err(e) => return refused(Some(&value), format!("no command: {e}")),
    };
    if Uuid::parse_str(&command.id).is_err() {
        return refused(Some(&value), "`id` is no UUID".to_owned());
    }
    if !is_time(command.issued_at_ms) {
        return refused(Some(&value), format!("`issued_at_ms` {} is no time", command.issued_at_ms));
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
    fn every_command_is_read_as_it_was_sent() {
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
    fn what_is_no_command_is_refused_with_a_reason_and_a_name() {
        let id = "7a0f0e8e-0f83-4dd3-90c2-2a4f3a4f2b1c";
        let whole = |action: &str| {
            format!(
                r#"{{"id":"{id}","stream":"users","issued_by":"t","issued_at_ms":{NOW},"expires_at_ms":{NOW},"action":{action}}}"#
            )
        };
        let check = |text: &str, named: &str, words: &str| {
            let received = read_text(text);
            assert_eq!(received.key.id, named, "{text}");
            let reason = received.command.unwrap_err();
            assert!(reason.contains(words), "`{words}` is not in `{reason}`");
        };
        check("{", "offset-7", "no JSON");
        check("[]", "offset-7", "no command");
        check(&"x".repeat(MAX_COMMAND_BYTES + 1), "offset-7", "at most 16384");
        check(
            &whole(r#"{"explode":{}}"#),
            id,
            "unknown variant `explode`, expected one of `produce`, `spike`",
        );
        check(&whole(r#"{"spike":{"rate":1}}"#), id, "missing field `seconds`");
        check(&whole(r#"{"spike":{"rate":-1,"seconds":1}}"#), id, "invalid value");
        check(&whole("\"pause\"").replace(id, "one"), "offset-7", "`id` is no UUID");
        check(&whole("\"pause\"").replace("\"issued_by\"", "\"by\""), id, "unknown field `by`");
    }

    #[test]
    fn bounds_are_named_with_the_value() {
        let check = |action: Action, words: &str| {
            let reason = command(action).check(NOW).unwrap_err();
            assert!(reason.contains(words), "`{words}` is not in `{reason}`");
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
        let for_ever = Command { expires_at_ms: i64::MAX, ..command(Action::Pause) };
        assert!(for_ever.check(NOW).unwrap_err().contains("from 1 ms to 3600 s"));
        assert!(command(Action::Pause).check(NOW - MAX_AHEAD_MS - 1).unwrap_err().contains("in the future"));
    }

    proptest! {
        #[test]
        fn no_bytes_stop_the_reader(bytes in prop::collection::vec(any::<u8>(), 0..200), now in any::<i64>()) {
            let received = read(&bytes, 1, NOW);
            prop_assert!(received.arguments.len() <= 4 * MAX_SHOWN);
            if let Ok(command) = received.command {
                let _ = command.check(now.clamp(0, MAX_EVENT_TIME_MS));
            }
        }
    }
}
