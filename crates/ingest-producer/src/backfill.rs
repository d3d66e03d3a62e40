//! `backfill`: runs the intervals of a span of the past in this process, through the same ledger and leases as the service,
//! so that both may go on at once. A backfill that was stopped is simply started again; one that was killed, once its leases
//! have run out.

use crate::Done;
use crate::config::BackfillArgs;
use crate::planner::Run;
use crate::run::{Ended, Runner};
use crate::schedule::Timeline;
use chrono::{DateTime, SecondsFormat};
use common::run_ledger::{Interval, Reprocess, RunState, RunType};
use common::schema::TOPIC_RETENTION_MS;
use common::shutdown::Shutdown;
use common::stream::Definition;
use futures::StreamExt;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::io::IsTerminal;
use std::sync::Arc;
use std::time::Duration;

/// Most intervals of one backfill: it holds them in memory.
const MAX_INTERVALS: usize = 200_000;
/// Rows of dead letters' copies must outlive the log by this much; see the definition's `store.ttl`.
const TTL_MARGIN_MS: i64 = 2 * 86_400_000;

/// What to do, and how many intervals it leaves out.
#[derive(Debug, PartialEq)]
struct Selection {
    chosen: Vec<(Interval, Option<Run>)>,
    left_out: usize,
    /// Of those left out: how many somebody holds a lease of.
    held: usize,
}

impl Selection {
    /// How many are left out, and what to do about those that may be a killed producer's.
    fn left_out(&self) -> String {
        match self.held {
            0 => format!("{} left out", self.left_out),
            held => format!(
                "{} left out, {held} of them under a lease: should its owner be gone, backfill again once it has run out",
                self.left_out
            ),
        }
    }
}

/// Runs what is asked for, or only says what it would run.
pub async fn backfill(
    runner: &Arc<Runner>,
    args: &BackfillArgs,
    only_say: bool,
    shutdown: &Shutdown,
) -> anyhow::Result<Done> {
    let now_ms = (runner.clock)();
    check_span(&runner.definition, args, now_ms)?;
    let stored = runner.ledger.stream_state().await?.schedules;
    let settings = &runner.definition.stream;
    let timeline = match stored {
        Some(text) => Timeline::from_json(&text)?,
        None => Timeline::first(&settings.schedule, settings.start_ms, settings.catch_up, now_ms)?,
    };
    let intervals = timeline.ended(args.from, args.to.min(now_ms), MAX_INTERVALS + 1);
    if intervals.len() > MAX_INTERVALS {
        anyhow::bail!("the span holds more than {MAX_INTERVALS} intervals; backfill it in parts");
    }
    let found = runner.ledger.runs(args.from, args.to).await?;
    let runs: BTreeMap<i64, Run> = found.into_iter().map(|run| (run.interval.start_ms, run)).collect();
    let selection = select(&intervals, &runs, args, now_ms);
    if only_say {
        return Ok(Done::text(dry_run(&selection)));
    }
    run_all(runner, selection, args, shutdown).await
}

/// Refuses a span whose rows would expire, or whose events the processor would refuse for their age.
fn check_span(definition: &Definition, args: &BackfillArgs, now_ms: i64) -> anyhow::Result<()> {
    if args.from >= args.to {
        anyhow::bail!("--from {} must be before --to {}", time(args.from), time(args.to));
    }
    let ttl_ms = definition.store.least_ttl_seconds().saturating_mul(1000);
    let horizon_ms = now_ms - (ttl_ms - TOPIC_RETENTION_MS - TTL_MARGIN_MS);
    if ttl_ms > 0 && args.from < horizon_ms {
        anyhow::bail!(
            "--from {} lies beyond the horizon {}: with store.ttl of {} days, older rows expire before they are sure to be \
             counted; begin later, or use a stream with a longer ttl",
            time(args.from),
            time(horizon_ms),
            definition.store.least_ttl_seconds() / 86_400
        );
    }
    Ok(())
}

/// A run that retries is chosen before its time too: [`run_one`] waits for it, and nobody else may be there to.
fn select(intervals: &[Interval], runs: &BTreeMap<i64, Run>, args: &BackfillArgs, now_ms: i64) -> Selection {
    let wanted = |run: &Run| match run.state {
        RunState::Scheduled | RunState::Retrying => true,
        RunState::Failed => args.reprocess != Reprocess::None,
        RunState::Succeeded | RunState::GivenUp => args.reprocess == Reprocess::Completed,
        // While its lease holds somebody is at it; a killed producer's runs out.
        RunState::Running => !run.holds_a_lease(now_ms),
    };
    let (mut chosen, mut held) = (Vec::new(), 0);
    for interval in intervals {
        let run = runs.get(&interval.start_ms);
        if run.is_none_or(wanted) {
            chosen.push((*interval, run.cloned()));
        } else if run.is_some_and(|run| run.holds_a_lease(now_ms)) {
            held += 1;
        }
    }
    let left_out = intervals.len() - chosen.len();
    if args.newest_first {
        chosen.reverse();
    }
    Selection { chosen, left_out, held }
}

fn dry_run(selection: &Selection) -> String {
    let mut text = String::new();
    for (interval, run) in &selection.chosen {
        let state = run.as_ref().map_or("no run yet", |run| run.state.name());
        let _ = writeln!(text, "{} to {}  {state}", time(interval.start_ms), time(interval.end_ms));
    }
    let _ = write!(text, "{} intervals would be run, {}", selection.chosen.len(), selection.left_out());
    text
}

async fn run_all(
    runner: &Arc<Runner>,
    selection: Selection,
    args: &BackfillArgs,
    shutdown: &Shutdown,
) -> anyhow::Result<Done> {
    let bar = progress_bar(selection.chosen.len() as u64);
    let left_out = selection.left_out();
    let work = selection.chosen.into_iter().map(|(interval, run)| run_one(runner, interval, run, shutdown));
    let mut running = futures::stream::iter(work).buffer_unordered(args.max_active_runs as usize);
    let (mut succeeded, mut failed, mut taken, mut stopped) = (0, 0, 0, 0);
    while let Some(ended) = running.next().await {
        match ended? {
            Some(Ended::Succeeded) => succeeded += 1,
            Some(Ended::Failed) => failed += 1,
            Some(Ended::Interrupted) => stopped += 1,
            None | Some(Ended::Lost | Ended::Retrying) => taken += 1,
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    // Producers count again what is unresolved.
    if let Err(e) = runner.ledger.touch((runner.clock)()).await {
        tracing::warn!(error = %e, "running producers notice the backfill within ten minutes only");
    }
    let text = format!(
        "backfill: {succeeded} succeeded, {failed} failed, {taken} taken by others, {stopped} stopped, {left_out}"
    );
    let code = if failed > 0 { 1 } else { shutdown.exit_code() };
    Ok(Done { text, code })
}

/// One interval to its end, retries included, each at its time; `None`: somebody else has it.
async fn run_one(
    runner: &Arc<Runner>,
    interval: Interval,
    mut seen: Option<Run>,
    shutdown: &Shutdown,
) -> anyhow::Result<Option<Ended>> {
    loop {
        wait_for_retry(seen.as_ref(), (runner.clock)(), shutdown).await;
        if shutdown.has_begun() {
            return Ok(Some(Ended::Interrupted));
        }
        let Some(claim) = runner.claim(interval, RunType::Backfill, seen.as_ref()).await? else {
            return Ok(None);
        };
        let ended = runner.clone().attempt(claim, shutdown.token().clone()).await;
        if ended != Ended::Retrying {
            return Ok(Some(ended));
        }
        seen = runner.ledger.run(interval.start_ms).await?;
    }
}

/// Until a run that retries is due, or shutdown begins. The run's deadline bounds it: beyond, a run has failed.
async fn wait_for_retry(seen: Option<&Run>, now_ms: i64, shutdown: &Shutdown) {
    let retrying = seen.filter(|run| run.state == RunState::Retrying);
    let wait_ms = retrying.map_or(0, |run| run.retry_at_ms - now_ms);
    tokio::select! {
        () = tokio::time::sleep(Duration::from_millis(wait_ms.max(0).unsigned_abs())) => {}
        () = shutdown.begun() => {}
    }
}

fn time(ms: i64) -> String {
    DateTime::from_timestamp_millis(ms).unwrap_or_default().to_rfc3339_opts(SecondsFormat::AutoSi, true)
}

fn progress_bar(count: u64) -> ProgressBar {
    let bar = ProgressBar::new(count);
    bar.set_draw_target(if std::io::stderr().is_terminal() {
        ProgressDrawTarget::stderr_with_hz(10)
    } else {
        ProgressDrawTarget::hidden()
    });
    match ProgressStyle::with_template("{bar:40} {pos}/{len} intervals, {per_sec}, {eta} left") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::planner::tests::run;

    const T0: i64 = 1_767_225_600_000;

    fn args(reprocess: Reprocess, newest_first: bool) -> BackfillArgs {
        BackfillArgs { from: T0, to: T0 + 360_000, reprocess, max_active_runs: 1, newest_first }
    }

    const NOW: i64 = T0 + 3_600_000;

    /// Minute by minute: over well, over badly, running, retrying, scheduled; then two without a row.
    fn rows() -> BTreeMap<i64, Run> {
        let at = |n: i64, state| run(T0 + n * 60_000, state);
        let rows = [
            at(0, RunState::Succeeded),
            at(1, RunState::Failed),
            Run { lease_until_ms: NOW + 1, ..at(2, RunState::Running) },
            Run { lease_until_ms: NOW, ..at(3, RunState::Running) },
            Run { retry_at_ms: NOW, ..at(4, RunState::Retrying) },
            Run { retry_at_ms: NOW + 60_000, ..at(5, RunState::Retrying) },
            at(6, RunState::Scheduled),
        ];
        rows.into_iter().map(|run| (run.interval.start_ms, run)).collect()
    }

    fn selection(reprocess: Reprocess, newest_first: bool) -> Selection {
        let intervals: Vec<Interval> =
            (0..9).map(|n| Interval { start_ms: T0 + n * 60_000, end_ms: T0 + (n + 1) * 60_000 }).collect();
        let selection = select(&intervals, &rows(), &args(reprocess, newest_first), NOW);
        assert_eq!(selection.left_out + selection.chosen.len(), 9);
        selection
    }

    fn chosen(reprocess: Reprocess, newest_first: bool) -> Vec<i64> {
        let selection = selection(reprocess, newest_first);
        selection.chosen.iter().map(|(interval, _)| (interval.start_ms - T0) / 60_000).collect()
    }

    #[test]
    fn what_is_over_is_run_again_only_when_asked_for() {
        assert_eq!(chosen(Reprocess::None, false), [3, 4, 5, 6, 7, 8]);
        assert_eq!(chosen(Reprocess::Failed, false), [1, 3, 4, 5, 6, 7, 8]);
        assert_eq!(chosen(Reprocess::Completed, true), [8, 7, 6, 5, 4, 3, 1, 0]);
    }

    #[test]
    fn a_run_is_left_to_others_only_while_its_lease_holds() {
        let selection = selection(Reprocess::Completed, false);
        assert_eq!((selection.left_out, selection.held), (1, 1));
        let words = dry_run(&selection);
        assert!(words.contains("8 intervals would be run, 1 left out, 1 of them under a lease"), "{words}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_retry_is_waited_for_until_its_time_but_not_beyond_a_stop() {
        let shutdown = Shutdown::default();
        let waited = async |run: &Run| {
            let begun = tokio::time::Instant::now();
            wait_for_retry(Some(run), NOW, &shutdown).await;
            begun.elapsed().as_millis()
        };
        let later = Run { retry_at_ms: NOW + 600_000, ..run(T0, RunState::Retrying) };
        assert_eq!(waited(&later).await, 600_000);
        assert_eq!(waited(&Run { retry_at_ms: NOW - 1, ..later.clone() }).await, 0);
        assert_eq!(waited(&Run { state: RunState::Running, ..later.clone() }).await, 0);
        shutdown.begin();
        assert_eq!(waited(&later).await, 0);
    }

    #[test]
    fn a_span_beyond_the_horizon_is_refused_before_anything_is_fetched() {
        let users = Definition::parse("users", include_str!("../../../streams/user_created.toml")).unwrap();
        let now_ms = T0 + 356 * 86_400_000;
        check_span(&users, &args(Reprocess::None, false), now_ms).unwrap();
        let error = check_span(&users, &args(Reprocess::None, false), now_ms + 1).unwrap_err().to_string();
        assert!(error.contains("beyond the horizon 2026-01-01T00:00:00.001Z"), "{error}");
    }
}
