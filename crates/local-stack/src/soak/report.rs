//! What a soak found, as tables, as JSON, in one line.

use serde::Serialize;

use super::added::Added;
use super::recovery::{Line, Recoveries};
use crate::terminal::Terminal;

/// What a run found.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Decided which fault came when.
    pub seed: u64,
    /// Minutes under load and faults, as planned.
    pub minutes: u64,
    /// Stream processors.
    pub processors: u64,
    /// Whether each had a checkpoint folder of its own.
    pub own_checkpoints: bool,
    /// Events in Kafka's log, each counted once.
    pub events: u64,
    /// Records of the log that repeat an earlier one.
    pub copies: u64,
    /// SIGKILLs.
    pub kills: u64,
    /// The faults by kind, and how long the pipeline needed after each.
    pub faults: Vec<Line>,
    /// Faults that were planned and did not find their part up in time.
    pub not_struck: usize,
    /// Transactions that Kafka did not take or end as meant; what they left is compared like everything else.
    pub failed_transactions: u64,
    /// How often a service ended without being killed.
    pub own_ends: u64,
    /// The partitions added at the end, where that was asked for.
    pub added: Option<Added>,
    /// Complete looks of the reader.
    pub looks: u64,
    /// Looks that failed because Cassandra was down.
    pub blind_looks: u64,
    /// Figures of the page that were compared with the tables.
    pub figures: u64,
    /// How often all rows were counted for that.
    pub counts: u64,
    /// Events that rows, totals or panes lack.
    pub lost: u64,
    /// Events that rows, totals or panes have too often, or of a later copy.
    pub doubled: u64,
    /// Values that the reader saw going back.
    pub regressed: u64,
    /// Figures of the page above what the tables held later.
    pub untrue: u64,
    /// Whether the processors dealt with the whole log once the load ended.
    pub drained: bool,
    /// Whether `stream-processor verify` found no difference.
    pub verified: bool,
    /// Its last line.
    pub verify: String,
}

impl Report {
    /// Whether every promise held, and the run could have noticed otherwise.
    pub fn passed(&self) -> bool {
        let nothing_wrong = self.lost + self.doubled + self.regressed + self.untrue == 0;
        let went_on = self.drained && self.faults.iter().all(|line| line.unrecovered == 0);
        let noticed = self.added.as_ref().is_none_or(Added::passed);
        let looked = self.events > 0 && self.looks > 0 && self.figures > 0 && self.counts > 0;
        nothing_wrong && went_on && noticed && self.verified && looked
    }

    /// The table in one line.
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

    /// Prints everything.
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
        terminal.table(["what", "found"], &self.found());
    }

    fn found(&self) -> Vec<[String; 2]> {
        let row = |what: &str, found: String| [what.to_owned(), found];
        let yes = |yes: bool| if yes { "yes" } else { "NO" };
        let folders = if self.own_checkpoints { "one each" } else { "in common" };
        let mut rows = vec![
            row("minutes", format!("{} (seed {})", self.minutes, self.seed)),
            row("processors", format!("{}, checkpoint folder {folders}", self.processors)),
            row("events", self.events.to_string()),
            row("copies sent", self.copies.to_string()),
            row("kills", self.kills.to_string()),
            row("faults planned and not struck", self.not_struck.to_string()),
            row("transactions that failed", self.failed_transactions.to_string()),
            row("services ended by themselves", self.own_ends.to_string()),
        ];
        if let Some(added) = &self.added {
            let Added { partitions, events, noticed, refused } = added;
            rows.push(row("partitions added", format!("{partitions}, with {events} events")));
            rows.push(row(
                "processors noticed, producer refused",
                format!("{}, {}", yes(*noticed), yes(*refused)),
            ));
        }
        rows.extend([
            row("looks of the reader", format!("{}, {} more in vain", self.looks, self.blind_looks)),
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
        let added = Added { partitions: 6, events: 600, noticed: true, refused: true };
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
    fn a_run_passes_only_when_every_promise_held_and_was_looked_at() {
        assert!(good().passed());
        let check = |spoil: fn(&mut Report)| {
            let mut report = good();
            spoil(&mut report);
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
    fn a_kind_of_fault_is_one_line() {
        let line = good().faults.remove(0);
        assert_eq!(row(&line), ["kafka killed", "2", "2", "1.2 s", "3.0 s", "0", "", "", "0"]);
    }
}
