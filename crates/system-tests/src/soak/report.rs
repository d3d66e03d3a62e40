//! The results of a soak, shown as tables, as JSON, or in one line.

use local_stack::terminal::Terminal;
use serde::Serialize;

use super::added::AddedPartitions;
use super::recovery::{Line, Recoveries};

/// Results of a run.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Seed of the fault plan.
    pub seed: u64,
    /// Duration of the fault injection in minutes.
    pub minutes: u64,
    /// Number of stream processors.
    pub processors: u64,
    /// Whether each processor had its own checkpoint folder.
    pub own_checkpoints: bool,
    /// Number of distinct events in the log.
    pub events: u64,
    /// Number of records in the log that repeat an earlier event.
    pub copies: u64,
    /// Number of SIGKILLs.
    pub kills: u64,
    /// Faults by kind, with the recovery times of the pipeline.
    pub faults: Vec<Line>,
    /// Number of planned faults that were not injected, because their parts were not up in time.
    pub not_struck: usize,
    /// Number of transactions that failed or could not be ended as planned. Their records are compared like all others.
    pub failed_transactions: u64,
    /// Number of services that exited without being killed.
    pub own_ends: u64,
    /// Result of adding partitions; `None` if this fault was not selected.
    pub added: Option<AddedPartitions>,
    /// Number of complete reads by the reader.
    pub looks: u64,
    /// Number of reads that failed because Cassandra was down.
    pub blind_looks: u64,
    /// Number of figures of the page that were compared with the tables.
    pub figures: u64,
    /// Number of times that all rows were counted for this comparison.
    pub counts: u64,
    /// Number of events missing from rows, totals or panes.
    pub lost: u64,
    /// Number of surplus events in rows, totals or panes, including rows written from a later copy.
    pub doubled: u64,
    /// Number of values that decreased and rows that disappeared between two reads.
    pub regressed: u64,
    /// Number of figures of the page that were higher than what the tables contained later.
    pub untrue: u64,
    /// Whether the processors handled the whole log after the load had stopped.
    pub drained: bool,
    /// Whether `stream-processor verify` found no difference.
    pub verified: bool,
    /// Closing line of `stream-processor verify`.
    pub verify: String,
}

impl Report {
    /// Returns whether every guarantee held and was actually checked.
    pub fn passed(&self) -> bool {
        let nothing_wrong = self.lost + self.doubled + self.regressed + self.untrue == 0;
        let recovered = self.drained && self.faults.iter().all(|line| line.unrecovered == 0);
        let noticed = self.added.as_ref().is_none_or(AddedPartitions::passed);
        let checked = self.events > 0 && self.looks > 0 && self.figures > 0 && self.counts > 0;
        nothing_wrong && recovered && noticed && self.verified && checked
    }

    /// Returns the most important results in one line.
    pub fn summary(&self) -> String {
        let faults: usize = self.faults.iter().map(times).sum();
        format!(
            "{} events, {} copies, {} kills, {faults} faults: lost {}, doubled {}, regressed {}, untrue {}, verify {} (seed {})",
            self.events,
            self.copies,
            self.kills,
            self.lost,
            self.doubled,
            self.regressed,
            self.untrue,
            if self.verified { "passed" } else { "FAILED" },
            self.seed
        )
    }

    /// Prints all results.
    pub(super) fn print(&self, json: bool, terminal: Terminal) {
        if json {
            terminal.data(&serde_json::to_string(self).unwrap_or_default());
            return;
        }
        terminal.data("");
        let header =
            ["fault", "times", "alone", "median", "worst", "overlapped", "median", "worst", "unrecovered"];
        let rows: Vec<[String; 9]> = self.faults.iter().map(row).collect();
        terminal.table(header, &rows);
        terminal.data("");
        terminal.table(["result", "value"], &self.results());
    }

    fn results(&self) -> Vec<[String; 2]> {
        let row = |name: &str, value: String| [name.to_owned(), value];
        let yes = |yes: bool| if yes { "yes" } else { "NO" };
        let folders =
            if self.own_checkpoints { "separate checkpoint folders" } else { "shared checkpoint folder" };
        let mut rows = vec![
            row("minutes", format!("{} (seed {})", self.minutes, self.seed)),
            row("processors", format!("{}, {folders}", self.processors)),
            row("events", self.events.to_string()),
            row("copies sent", self.copies.to_string()),
            row("kills", self.kills.to_string()),
            row("planned faults not injected", self.not_struck.to_string()),
            row("failed transactions", self.failed_transactions.to_string()),
            row("unexpected exits of services", self.own_ends.to_string()),
        ];
        if let Some(added) = &self.added {
            let AddedPartitions { partitions, events, noticed, refused } = added;
            rows.push(row("partitions added", format!("{partitions}, with {events} events")));
            rows.push(row(
                "processors noticed, producer refused",
                format!("{}, {}", yes(*noticed), yes(*refused)),
            ));
        }
        rows.extend([
            row("reads of the tables", format!("{}, and {} failed", self.looks, self.blind_looks)),
            row("figures of the page", format!("{}, rows counted {} times", self.figures, self.counts)),
            row("drained", yes(self.drained).to_owned()),
            row("lost", self.lost.to_string()),
            row("doubled", self.doubled.to_string()),
            row("regressed", self.regressed.to_string()),
            row("untrue", self.untrue.to_string()),
            row("verify", format!("{}: {}", if self.verified { "passed" } else { "FAILED" }, self.verify)),
        ]);
        rows
    }
}

fn times(line: &Line) -> usize {
    line.alone.count + line.overlapped.count + line.unrecovered
}

fn row(line: &Line) -> [String; 9] {
    let seconds = |of: &Recoveries, seconds: f64| match of.count {
        0 => String::new(),
        _ => format!("{seconds:.1} s"),
    };
    let figures = |of: &Recoveries| {
        [of.count.to_string(), seconds(of, of.median_seconds), seconds(of, of.worst_seconds)]
    };
    let [alone, alone_median, alone_worst] = figures(&line.alone);
    let [overlapped, overlapped_median, overlapped_worst] = figures(&line.overlapped);
    [
        line.fault.clone(),
        times(line).to_string(),
        alone,
        alone_median,
        alone_worst,
        overlapped,
        overlapped_median,
        overlapped_worst,
        line.unrecovered.to_string(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Report {
        let line = Line {
            fault: "kafka killed".to_owned(),
            alone: Recoveries { count: 2, median_seconds: 1.25, worst_seconds: 3.0 },
            overlapped: Recoveries::default(),
            unrecovered: 0,
        };
        let added = AddedPartitions { partitions: 6, events: 600, noticed: true, refused: true };
        Report {
            events: 1,
            looks: 1,
            figures: 1,
            counts: 1,
            drained: true,
            verified: true,
            faults: vec![line],
            added: Some(added),
            ..Report::default()
        }
    }

    #[test]
    fn a_run_passes_only_if_every_guarantee_held_and_was_checked() {
        assert!(good().passed());
        let check = |change: fn(&mut Report)| {
            let mut report = good();
            change(&mut report);
            assert!(!report.passed(), "{report:?}");
        };
        check(|report| report.lost = 1);
        check(|report| report.doubled = 1);
        check(|report| report.regressed = 1);
        check(|report| report.untrue = 1);
        check(|report| report.drained = false);
        check(|report| report.verified = false);
        check(|report| report.events = 0);
        check(|report| report.looks = 0);
        check(|report| report.figures = 0);
        check(|report| report.counts = 0);
        check(|report| report.faults[0].unrecovered = 1);
        check(|report| report.added.as_mut().unwrap().noticed = false);
        check(|report| report.added.as_mut().unwrap().refused = false);
    }

    #[test]
    fn each_kind_of_fault_is_shown_on_one_line() {
        let line = good().faults.remove(0);
        assert_eq!(row(&line), ["kafka killed", "2", "2", "1.2 s", "3.0 s", "0", "", "", "0"]);
    }
}
