//! `runs list | show | clear | give-up`: commands that inspect and edit the run ledger.

use crate::CommandOutput;
use crate::config::{ListArgs, ShowArgs, SpanArgs};
use crate::ledger::{Attempt, Counts, Ledger, OUTCOME_CLEARED};
use crate::planner::Run;
use chrono::{DateTime, SecondsFormat};
use comfy_table::Table;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use common::contracts::run_ledger::RunState;
use serde_json::{Value, json};
use std::fmt::Write;

const DAY_MS: i64 = 86_400_000;

/// Lists runs, newest first.
pub async fn list(ledger: &dyn Ledger, args: &ListArgs, now_ms: i64) -> anyhow::Result<CommandOutput> {
    let to_ms = args.to.unwrap_or(now_ms);
    let found = ledger.runs(args.from.unwrap_or(to_ms - DAY_MS), to_ms).await?;
    let runs = found.iter().rev().filter(|run| args.state.is_none_or(|state| run.state == state));
    let runs: Vec<&Run> = runs.take(args.limit as usize).collect();
    if args.json {
        let rows: Vec<Value> = runs.iter().map(|run| as_json(run)).collect();
        return Ok(CommandOutput::text(serde_json::to_string_pretty(&rows)?));
    }
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    table.set_header(["interval", "state", "type", "attempt", "records", "acked", "owner", "error"]);
    for run in &runs {
        let (state, kind) = (run.state.to_string(), run.run_type.to_string());
        let (records, acked) = (run.records.to_string(), run.acked.to_string());
        let row = [&time(run.interval.start_ms), &state, &kind, &run.attempt.to_string(), &records, &acked];
        table.add_row(row.into_iter().chain([&run.owner, &run.error]));
    }
    let count = runs.len();
    Ok(CommandOutput::text(format!("{table}\n{count} runs")))
}

/// Shows one run with its attempts.
pub async fn show(ledger: &dyn Ledger, args: &ShowArgs) -> anyhow::Result<CommandOutput> {
    let Some(run) = ledger.run(args.start).await? else {
        anyhow::bail!("no run starts at {}; `runs list` shows the existing runs", time(args.start));
    };
    let attempts = ledger.attempts(args.start).await?;
    if args.json {
        let mut object = as_json(&run);
        object["attempts"] = attempts.iter().map(attempt_json).collect();
        return Ok(CommandOutput::text(serde_json::to_string_pretty(&object)?));
    }
    let mut text = String::new();
    if let Value::Object(fields) = as_json(&run) {
        for (name, value) in fields {
            let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            let _ = writeln!(text, "{name:<12} {value}");
        }
    }
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    table.set_header([
        "attempt", "outcome", "started", "ms", "http", "pages", "records", "bytes", "owner", "cause",
    ]);
    for a in &attempts {
        let status = a.http_status.map_or_else(String::new, |s| s.to_string());
        let Counts { pages, records, bytes, .. } = a.counts;
        let numbers =
            [a.milliseconds.to_string(), status, pages.to_string(), records.to_string(), bytes.to_string()];
        let row = [a.number.to_string(), a.outcome.clone(), time(a.started_ms)].into_iter().chain(numbers);
        table.add_row(row.chain([a.owner.clone(), a.cause.clone()]));
    }
    Ok(CommandOutput::text(format!("{text}{table}")))
}

/// Makes runs due again. Producers run those within the catch-up range; a backfill can run any.
pub async fn clear(ledger: &dyn Ledger, args: &SpanArgs, now_ms: i64) -> anyhow::Result<CommandOutput> {
    let cleared = overrule(ledger, args, RunState::Scheduled, now_ms).await?;
    ledger.touch(now_ms).await?;
    Ok(CommandOutput::text(format!("{cleared} runs cleared")))
}

/// Gives up runs that have not succeeded.
pub async fn give_up(ledger: &dyn Ledger, args: &SpanArgs, now_ms: i64) -> anyhow::Result<CommandOutput> {
    let given_up = overrule(ledger, args, RunState::GivenUp, now_ms).await?;
    ledger.touch(now_ms).await?;
    Ok(CommandOutput::text(format!("{given_up} runs given up")))
}

async fn overrule(
    ledger: &dyn Ledger,
    args: &SpanArgs,
    state: RunState,
    now_ms: i64,
) -> anyhow::Result<usize> {
    let (outcome, cause) = match state {
        RunState::GivenUp => ("given_up", "given up by hand"),
        _ => (OUTCOME_CLEARED, ""),
    };
    let is_kept = |run: &Run| {
        run.state == state
            || (state == RunState::GivenUp && run.state == RunState::Succeeded)
            || args.state.is_some_and(|only| only != run.state)
    };
    let mut changed = 0;
    for run in ledger.runs(args.from, args.to).await? {
        if is_kept(&run) {
            continue;
        }
        if !ledger.overrule(&run, state, cause, now_ms).await? {
            tracing::warn!(
                interval = run.interval.start_ms,
                "the run changed concurrently and was not modified; repeat the command"
            );
            continue;
        }
        let attempt = Attempt {
            interval: run.interval,
            number: run.attempt + 1,
            run_id: run.run_id,
            owner: "runs command".to_owned(),
            outcome: outcome.to_owned(),
            cause: cause.to_owned(),
            http_status: None,
            counts: Counts::default(),
            started_ms: now_ms,
            milliseconds: 0,
        };
        ledger.record(&attempt).await?;
        changed += 1;
    }
    Ok(changed)
}

/// RFC 3339 in UTC; empty for 0, which means never.
pub(crate) fn time(ms: i64) -> String {
    if ms == 0 {
        return String::new();
    }
    DateTime::from_timestamp_millis(ms).unwrap_or_default().to_rfc3339_opts(SecondsFormat::AutoSi, true)
}

fn as_json(run: &Run) -> Value {
    json!({
        "interval_start": time(run.interval.start_ms),
        "interval_end": time(run.interval.end_ms),
        "state": run.state,
        "run_type": run.run_type,
        "run_id": run.run_id,
        "attempt": run.attempt,
        "owner": run.owner,
        "lease_until": time(run.lease_until_ms),
        "pages": run.pages,
        "records": run.records,
        "acked": run.acked,
        "bytes": run.bytes,
        "error": run.error,
        "started_at": time(run.started_at_ms),
        "finished_at": time(run.finished_at_ms),
        "retry_at": time(run.retry_at_ms),
    })
}

fn attempt_json(a: &Attempt) -> Value {
    json!({
        "attempt": a.number,
        "outcome": a.outcome,
        "cause": a.cause,
        "http_status": a.http_status,
        "run_id": a.run_id,
        "owner": a.owner,
        "pages": a.counts.pages,
        "records": a.counts.records,
        "bytes": a.counts.bytes,
        "started_at": time(a.started_ms),
        "milliseconds": a.milliseconds,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::Note;
    use crate::ledger::memory::MemoryLedger;
    use common::contracts::run_ledger::{Interval, RunType};

    const T0: i64 = 1_767_225_600_000;

    async fn ledger_with(count: i64) -> MemoryLedger {
        let ledger = MemoryLedger::default();
        for n in 0..count {
            let interval = Interval { start_ms: T0 + n * 60_000, end_ms: T0 + (n + 1) * 60_000 };
            let (state, run_type) = (RunState::Failed, RunType::CatchUp);
            ledger.note(&Note { interval, state, run_type, cause: "missed".to_owned() }, T0).await.unwrap();
        }
        ledger
    }

    fn span(from: i64, to: i64) -> SpanArgs {
        SpanArgs { from: T0 + from * 60_000, to: T0 + to * 60_000, state: None }
    }

    #[tokio::test]
    async fn clearing_makes_runs_due_and_is_recorded_in_their_history() {
        let ledger = ledger_with(3).await;
        let done = clear(&ledger, &span(1, 3), T0 + 1).await.unwrap();
        assert_eq!(done.text, "2 runs cleared");
        let states: Vec<RunState> = ledger.all().iter().map(|run| run.state).collect();
        assert_eq!(states, [RunState::Failed, RunState::Scheduled, RunState::Scheduled]);
        assert_eq!(
            ledger.stream_state().await.unwrap().updated_at_ms,
            T0 + 1,
            "producers read old runs again"
        );
        assert_eq!(ledger.attempts(T0 + 60_000).await.unwrap()[0].outcome, OUTCOME_CLEARED);
        assert_eq!(give_up(&ledger, &span(1, 3), T0).await.unwrap().text, "2 runs given up");
        assert_eq!(give_up(&ledger, &span(1, 3), T0).await.unwrap().text, "0 runs given up");
        let states: Vec<RunState> = ledger.all().iter().map(|run| run.state).collect();
        assert_eq!(states, [RunState::Failed, RunState::GivenUp, RunState::GivenUp]);
    }

    #[tokio::test]
    async fn runs_are_listed_newest_first_and_filtered() {
        let ledger = ledger_with(3).await;
        clear(&ledger, &span(1, 2), T0).await.unwrap();
        let args = |state| ListArgs { state, from: Some(T0), to: Some(T0 + 600_000), limit: 10, json: true };
        let listed: Vec<Value> =
            serde_json::from_str(&list(&ledger, &args(Some(RunState::Failed)), T0).await.unwrap().text)
                .unwrap();
        let starts: Vec<&str> = listed.iter().map(|run| run["interval_start"].as_str().unwrap()).collect();
        assert_eq!(starts, ["2026-01-01T00:02:00Z", "2026-01-01T00:00:00Z"]);
        let table = list(&ledger, &ListArgs { json: false, ..args(None) }, T0).await.unwrap().text;
        assert!(table.ends_with("3 runs") && table.contains("scheduled"), "{table}");
    }

    #[tokio::test]
    async fn one_run_is_shown_with_its_attempts() {
        let ledger = ledger_with(1).await;
        clear(&ledger, &span(0, 1), T0).await.unwrap();
        let text = show(&ledger, &ShowArgs { start: T0, json: true }).await.unwrap().text;
        insta::assert_snapshot!(text);
        let error = show(&ledger, &ShowArgs { start: T0 + 1, json: false }).await.unwrap_err().to_string();
        assert!(error.starts_with("no run starts at 2026-01-01T00:00:00.001Z"), "{error}");
    }
}
