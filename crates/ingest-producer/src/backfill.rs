//! `backfill`: runs the intervals of a past time range in this process. It uses the same ledger and leases as the
//! service, so both may run at the same time. A stopped backfill can be started again at once, a killed one after its
//! leases expire.

use crate::CommandOutput;
use crate::config::BackfillArgs;
use crate::planner::Run;
use crate::run::{Ended, Runner};
use crate::schedule::Timeline;
use chrono::{DateTime, SecondsFormat};
use common::contracts::run_ledger::{Interval, Reprocess, RunState, RunType};
use common::contracts::stream::Definition;
use common::runtime::shutdown::Shutdown;
use futures::StreamExt;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::io::IsTerminal;
use std::sync::Arc;
use std::time::Duration;

/// Maximum intervals of one backfill, which keeps them in memory.
const MAX_INTERVALS: usize = 200_000;

/// The intervals to run, and how many are skipped.
#[derive(Debug, PartialEq)]
struct Selection {
    chosen: Vec<(Interval, Option<Run>)>,
    skipped: usize,
    /// How many of the skipped intervals are leased by another owner.
    held: usize,
}

impl Selection {
    /// The number of skipped intervals as text, with advice for those that are leased, perhaps by a killed producer.
    fn skipped(&self) -> String {
        match self.held {
            0 => format!("{} skipped", self.skipped),
            held => format!(
                "{} skipped, {held} of them leased; if a lease owner has died, repeat the backfill after lease expiry",
                self.skipped
            ),
        }
    }
}

/// Runs the selected intervals. With `only_list`, returns the list of intervals without running them.
pub async fn backfill(
    runner: &Arc<Runner>,
    args: &BackfillArgs,
    only_list: bool,
    shutdown: &Shutdown,
) -> anyhow::Result<CommandOutput> {
    let now_ms = (runner.clock)();
    check_span(&runner.definition, args, now_ms)?;
    let stored = runner.ledger.stream_state().await?.schedules;
    let settings = &runner.definition.stream;
    let timeline = match stored {
        Some(text) => Timeline::from_json(&text)?,
        None => Timeline::first(&settings.schedule, settings.start_ms, settings.catch_up, now_ms)?,
    };
    let intervals = timeline.ended(args.from, args.to.min(now_ms - settings.delay_ms), MAX_INTERVALS + 1);
    if intervals.len() > MAX_INTERVALS {
        anyhow::bail!(
            "the time range has more than {MAX_INTERVALS} intervals; split it into several backfills"
        );
    }
    let found = runner.ledger.runs(args.from, args.to).await?;
    let runs: BTreeMap<i64, Run> = found.into_iter().map(|run| (run.interval.start_ms, run)).collect();
    let selection = select(&intervals, &runs, args, now_ms);
    if only_list {
        return Ok(CommandOutput::text(dry_run(&selection)));
    }
    run_all(runner, selection, args, shutdown).await
}

/// Rejects a time range whose rows might expire, because the processor rejects such events.
fn check_span(definition: &Definition, args: &BackfillArgs, now_ms: i64) -> anyhow::Result<()> {
    if args.from >= args.to {
        anyhow::bail!("--from {} must be before --to {}", time(args.from), time(args.to));
    }
    let horizon_ms = definition.horizon_ms().map(|age_ms| now_ms - age_ms);
    if let Some(horizon_ms) = horizon_ms.filter(|horizon_ms| args.from < *horizon_ms) {
        anyhow::bail!(
            "--from {} is before the horizon {}: with store.ttl of {} days, older rows may expire before they are \
             counted; choose a later --from, or use a stream with a longer store.ttl",
            time(args.from),
            time(horizon_ms),
            definition.store.least_ttl_seconds() / 86_400
        );
    }
    Ok(())
}

/// Selects the intervals to run. This includes retrying runs that are not yet due, because no producer may be running
/// that would retry them. [`run_one`] waits until they are due.
fn select(intervals: &[Interval], runs: &BTreeMap<i64, Run>, args: &BackfillArgs, now_ms: i64) -> Selection {
    let is_selected = |run: &Run| match run.state {
        RunState::Scheduled | RunState::Retrying => true,
        RunState::Failed => args.reprocess != Reprocess::None,
        RunState::Succeeded | RunState::GivenUp => args.reprocess == Reprocess::Completed,
        // With an unexpired lease, another owner is running it. The lease of a killed producer expires.
        RunState::Running => !run.holds_a_lease(now_ms),
    };
    let (mut chosen, mut held) = (Vec::new(), 0);
    for interval in intervals {
        let run = runs.get(&interval.start_ms);
        if run.is_none_or(is_selected) {
            chosen.push((*interval, run.cloned()));
        } else if run.is_some_and(|run| run.holds_a_lease(now_ms)) {
            held += 1;
        }
    }
    let skipped = intervals.len() - chosen.len();
    if args.newest_first {
        chosen.reverse();
    }
    Selection { chosen, skipped, held }
}

fn dry_run(selection: &Selection) -> String {
    let mut text = String::new();
    for (interval, run) in &selection.chosen {
        let state = run.as_ref().map_or("no run yet", |run| run.state.name());
        let _ = writeln!(text, "{} to {}  {state}", time(interval.start_ms), time(interval.end_ms));
    }
    let _ = write!(text, "{} intervals would be run, {}", selection.chosen.len(), selection.skipped());
    text
}

async fn run_all(
    runner: &Arc<Runner>,
    selection: Selection,
    args: &BackfillArgs,
    shutdown: &Shutdown,
) -> anyhow::Result<CommandOutput> {
    let bar = progress_bar(selection.chosen.len() as u64);
    let skipped = selection.skipped();
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
    // Makes running producers recount their unresolved intervals.
    if let Err(e) = runner.ledger.touch((runner.clock)()).await {
        tracing::warn!(error = %e, "notifying running producers failed; they detect the backfill within ten minutes");
    }
    let text = format!(
        "backfill: {succeeded} succeeded, {failed} failed, {taken} taken by others, {stopped} stopped, {skipped}"
    );
    let code = if failed > 0 { 1 } else { shutdown.exit_code() };
    Ok(CommandOutput { text, code })
}

/// Runs one interval, including retries, until it succeeds or fails. Returns `None` if another owner holds it.
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

/// Waits until a retrying run is due, or until shutdown starts. The run's deadline limits the wait, since a run fails
/// after it.
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

    /// One run per minute: succeeded, failed, running with and without a valid lease, retrying twice, scheduled.
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
        assert_eq!(selection.skipped + selection.chosen.len(), 9);
        selection
    }

    fn chosen(reprocess: Reprocess, newest_first: bool) -> Vec<i64> {
        let selection = selection(reprocess, newest_first);
        selection.chosen.iter().map(|(interval, _)| (interval.start_ms - T0) / 60_000).collect()
    }

    #[test]
    fn finished_runs_are_selected_only_on_request() {
        assert_eq!(chosen(Reprocess::None, false), [3, 4, 5, 6, 7, 8]);
        assert_eq!(chosen(Reprocess::Failed, false), [1, 3, 4, 5, 6, 7, 8]);
        assert_eq!(chosen(Reprocess::Completed, true), [8, 7, 6, 5, 4, 3, 1, 0]);
    }

    #[test]
    fn a_leased_run_is_skipped_until_its_lease_expires() {
        let selection = selection(Reprocess::Completed, false);
        assert_eq!((selection.skipped, selection.held), (1, 1));
        let text = dry_run(&selection);
        assert!(text.contains("8 intervals would be run, 1 skipped, 1 of them leased"), "{text}");
    }

    #[tokio::test(start_paused = true)]
    async fn the_wait_for_a_retry_ends_when_it_is_due_or_on_shutdown() {
        let shutdown = Shutdown::default();
        let waited = async |run: &Run| {
            let started = tokio::time::Instant::now();
            wait_for_retry(Some(run), NOW, &shutdown).await;
            started.elapsed().as_millis()
        };
        let later = Run { retry_at_ms: NOW + 600_000, ..run(T0, RunState::Retrying) };
        assert_eq!(waited(&later).await, 600_000);
        assert_eq!(waited(&Run { retry_at_ms: NOW - 1, ..later.clone() }).await, 0);
        assert_eq!(waited(&Run { state: RunState::Running, ..later.clone() }).await, 0);
        shutdown.begin();
        assert_eq!(waited(&later).await, 0);
    }

    #[test]
    fn a_range_before_the_horizon_is_rejected() {
        let users = Definition::parse("users", include_str!("../../../streams/user_created.toml")).unwrap();
        let now_ms = T0 + 356 * 86_400_000;
        check_span(&users, &args(Reprocess::None, false), now_ms).unwrap();
        let error = check_span(&users, &args(Reprocess::None, false), now_ms + 1).unwrap_err().to_string();
        assert!(error.contains("before the horizon 2026-01-01T00:00:00.001Z"), "{error}");
    }
}
