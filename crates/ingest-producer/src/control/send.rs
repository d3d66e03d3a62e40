//! `control`: sends a command and optionally waits for its outcome, or lists recent commands.

use super::log::{ControlLog, Entry};
use crate::CommandOutput;
use crate::config::{ControlArgs, ControlCommand};
use anyhow::Context;
use comfy_table::Table;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use common::contracts::control::{Action, Command, CommandState};
use common::runtime::config::CommonArgs;
use common::runtime::kafka::producer_config;
use common::runtime::shutdown::Shutdown;
use rdkafka::producer::{FutureProducer, FutureRecord};
use std::time::Duration;

const DAY_MS: i64 = 86_400_000;
/// How long to wait for Kafka to acknowledge a command.
const SEND_DEADLINE: Duration = Duration::from_secs(10);
/// Poll interval while waiting for an outcome in the log.
const POLL_INTERVAL: Duration = Duration::from_millis(200);
/// How long after its expiry the row of a command may still appear.
const GRACE_MS: i64 = 5000;

/// The action to send, or `None` for `control log`, which sends nothing.
fn action(command: &ControlCommand) -> Option<Action> {
    Some(match command {
        ControlCommand::Produce { messages } => Action::Produce { messages: *messages },
        ControlCommand::Spike { rate, seconds } => Action::Spike { rate: *rate, seconds: *seconds },
        ControlCommand::Cancel { id } => Action::Cancel { id: id.clone() },
        ControlCommand::Backfill(args) => Action::Backfill {
            from_ms: args.from,
            to_ms: args.to,
            reprocess: args.reprocess,
            max_active_runs: args.max_active_runs,
            newest_first: args.newest_first,
        },
        ControlCommand::Clear(span) => {
            Action::Clear { from_ms: span.from, to_ms: span.to, state: span.state }
        }
        ControlCommand::Pause => Action::Pause,
        ControlCommand::Resume => Action::Resume,
        ControlCommand::Log { .. } => return None,
    })
}

/// Executes `control`.
pub async fn control(
    common: &CommonArgs,
    stream: &str,
    log: &dyn ControlLog,
    args: &ControlArgs,
    shutdown: &Shutdown,
) -> anyhow::Result<CommandOutput> {
    let now_ms = crate::now_ms();
    let Some(action) = action(&args.command) else { return show(log, args, now_ms).await };
    let issued_by = format!("cli@{}", common.instance_name());
    let lifetime_ms = i64::from(args.expires_seconds) * 1000;
    let command = Command::new(stream, &issued_by, now_ms, lifetime_ms, action);
    send(common, &command).await?;
    if !args.wait {
        return Ok(CommandOutput::text(format!(
            "{} {} sent; `control log` shows its outcome",
            command.action.name(),
            command.id
        )));
    }
    let Some(entry) = outcome(log, &command, shutdown).await? else {
        let ended = if shutdown.has_begun() {
            "stopped waiting"
        } else {
            "no producer accepted it before it expired"
        };
        anyhow::bail!(
            "{} {}: {ended}; is `ingest-producer run` running for stream `{stream}`?",
            command.action.name(),
            command.id
        );
    };
    let text = if args.json {
        serde_json::to_string_pretty(&entry.view())?
    } else {
        format!("{} {}: {}: {}", entry.command, entry.key.id, entry.state.name(), entry.outcome)
    };
    Ok(CommandOutput { text, code: u8::from(entry.state != CommandState::Done) })
}

async fn send(common: &CommonArgs, command: &Command) -> anyhow::Result<()> {
    let producer: FutureProducer = producer_config(&common.kafka_brokers, "ingest-producer-control")
        .set("message.timeout.ms", SEND_DEADLINE.as_millis().to_string())
        .create()
        .context("cannot create the kafka client")?;
    let value = serde_json::to_vec(command)?;
    let record = FutureRecord::to(&common.control_topic).key(&command.stream).payload(&value);
    let sent = producer.send(record, SEND_DEADLINE).await;
    sent.map_err(|(error, _)| error).with_context(|| {
        let (brokers, topic) = (&common.kafka_brokers, &common.control_topic);
        format!("sending to kafka at {brokers}, topic `{topic}` (created by `stream-processor init`)")
    })?;
    Ok(())
}

/// Waits for the final row of a command. Returns `None` if the command expired without a row, or on shutdown.
async fn outcome(
    log: &dyn ControlLog,
    command: &Command,
    shutdown: &Shutdown,
) -> anyhow::Result<Option<Entry>> {
    let key = command.key();
    loop {
        let found = log.get(&key).await?;
        match found {
            Some(entry) if entry.state != CommandState::Running => return Ok(Some(entry)),
            None if crate::now_ms() > command.expires_at_ms + GRACE_MS => return Ok(None),
            _ => {}
        }
        tokio::select! {
            () = shutdown.begun() => return Ok(None),
            () = tokio::time::sleep(POLL_INTERVAL) => {}
        }
    }
}

/// Lists the commands of today and yesterday, newest first.
async fn show(log: &dyn ControlLog, args: &ControlArgs, now_ms: i64) -> anyhow::Result<CommandOutput> {
    let limit = if let ControlCommand::Log { limit } = args.command { limit } else { 0 };
    let today_ms = common::contracts::event::floor_to(now_ms, DAY_MS);
    let mut entries = log.of_day(today_ms, limit).await?;
    entries.extend(log.of_day(today_ms - DAY_MS, limit).await?);
    entries.truncate(limit as usize);
    if args.json {
        let rows: Vec<_> = entries.iter().map(Entry::view).collect();
        return Ok(CommandOutput::text(serde_json::to_string_pretty(&rows)?));
    }
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    table.set_header(["issued", "id", "command", "arguments", "state", "outcome"]);
    for entry in &entries {
        let view = entry.view();
        let cells = [view.id, view.command, view.arguments, entry.state.name(), view.outcome];
        table.add_row(std::iter::once(view.issued_at.as_str()).chain(cells));
    }
    Ok(CommandOutput::text(format!("{table}\n{} commands", entries.len())))
}
