//! `stream-processor verify`: selects the partitions, shows progress, and prints the outcome.

use super::{Outcome, Verifier, rfc3339};
use crate::config::VerifyArgs;
use crate::error::ProcessorError;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::fmt::Write as _;
use std::io::{IsTerminal, Write};

/// Compares or rebuilds the partitions selected by `args` and prints the outcome. `partitions` is the stream's number
/// of partitions. Fails if there are differences.
pub async fn run(verifier: &Verifier, args: &VerifyArgs, partitions: i32) -> Result<(), ProcessorError> {
    let partitions = (0..partitions).filter(|p| args.partition.is_none_or(|only| only == *p));
    let progress = progress_bar();
    let mut outcome = Outcome::default();
    if args.rebuild {
        for partition in partitions {
            outcome.add(verifier.rebuild(partition, &args.checkpoints, &progress).await?);
        }
    } else {
        for scope in verifier.scopes(partitions, args.span()).await? {
            let compared = verifier.compare(&scope, &progress).await?;
            let rows = compared.rows;
            outcome.add(compared);
            if args.kafka {
                outcome.add(verifier.compare_log(&scope, rows, &progress).await?);
            }
        }
    }
    progress.finish_and_clear();
    let text = if args.json { format!("{:#}", as_json(&outcome)) } else { as_text(&outcome, args) };
    writeln!(std::io::stdout(), "{text}").map_err(|e| ProcessorError::Fatal(format!("stdout: {e}")))?;
    match outcome.differences.count {
        0 => Ok(()),
        count => Err(ProcessorError::Fatal(format!("found {count} differences"))),
    }
}

fn progress_bar() -> ProgressBar {
    let bar = ProgressBar::with_draw_target(
        Some(0),
        if std::io::stderr().is_terminal() {
            ProgressDrawTarget::stderr_with_hz(4)
        } else {
            ProgressDrawTarget::hidden()
        },
    );
    match ProgressStyle::with_template("{msg} {bar:40} {pos}/{len}, {eta} left") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

fn as_text(outcome: &Outcome, args: &VerifyArgs) -> String {
    let mut text: String = outcome.differences.shown.iter().map(|line| format!("{line}\n")).collect();
    let skipped = [
        (outcome.expired_panes, "panes"),
        (outcome.expired_totals, "totals"),
        (outcome.expired_records, "records of the log"),
    ];
    for (count, what) in skipped.into_iter().filter(|(count, _)| *count > 0) {
        let _ = writeln!(text, "{count} {what} not compared: event rows may have expired (store.ttl)");
    }
    let records =
        if args.kafka { format!(", {} records of the log", outcome.records) } else { String::new() };
    let verb = if args.rebuild { "rebuilt" } else { "compared" };
    let (rows, panes, differences) = (outcome.rows, outcome.pane_rows, outcome.differences.count);
    let _ = write!(text, "{rows} rows, {panes} pane rows{records} {verb}, {differences} differences");
    text
}

fn as_json(outcome: &Outcome) -> serde_json::Value {
    serde_json::json!({
        "rows": outcome.rows,
        "pane_rows": outcome.pane_rows,
        "from": outcome.covered.map(|(from, _)| rfc3339(from)),
        "to": outcome.covered.map(|(_, to)| rfc3339(to)),
        "panes_in_parts": outcome.panes_in_parts,
        "records": outcome.records,
        "log_passes": outcome.log_passes,
        "not_compared": {
            "panes": outcome.expired_panes,
            "totals": outcome.expired_totals,
            "records": outcome.expired_records,
        },
        "differences": outcome.differences.count,
        "shown": outcome.differences.shown,
    })
}

#[cfg(test)]
mod tests {
    use super::super::Differences;
    use super::*;

    fn outcome() -> Outcome {
        let mut differences = Differences::default();
        differences.note(|| "partition 0: something".to_owned());
        Outcome {
            rows: 7,
            pane_rows: 40,
            covered: Some((0, 60_000)),
            expired_panes: 2,
            records: 9,
            log_passes: 1,
            differences,
            ..Outcome::default()
        }
    }

    #[test]
    fn the_outcome_reads_as_text_and_as_json() {
        let args = VerifyArgs { kafka: true, ..VerifyArgs::default() };
        insta::assert_snapshot!(as_text(&outcome(), &args));
        insta::assert_json_snapshot!(as_json(&outcome()));
    }

    #[test]
    fn outcomes_add_up_and_keep_the_first_differences() {
        let mut sum = outcome();
        for _ in 0..99 {
            sum.add(Outcome { covered: Some((60_000, 120_000)), ..outcome() });
        }
        assert_eq!((sum.rows, sum.covered), (700, Some((0, 120_000))));
        assert_eq!((sum.differences.count, sum.differences.shown.len()), (100, super::super::MAX_SHOWN));
    }
}
