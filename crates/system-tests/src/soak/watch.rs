//! A reader that runs during the soak. It reads the page, the progress and the panes every second, and counts all rows
//! from time to time. It counts values that decrease, rows that disappear, and figures of the page that exceed the
//! tables. It knows only the tables of the processor, not its code.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures::TryStreamExt;
use local_stack::config::Settings;
use local_stack::error::{Error, Result};
use local_stack::servers::cassandra::{connect, failed};
use scylla::client::session::Session;
use scylla::value::CqlTimestamp;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::fleet::Epoch;
use super::{MAX_EXAMPLES, NAME, page};

/// Interval between two reads.
const READ_INTERVAL: Duration = Duration::from_secs(1);

/// Minimum time between two counts of all rows.
const REST: Duration = Duration::from_secs(10);
/// Minimum time between two counts as a multiple of the duration of the last one, to limit the load on Cassandra.
const REST_PER_COUNT: u32 = 9;

/// Results of the reader.
#[derive(Debug, Default)]
pub(super) struct Findings {
    /// Number of complete reads of all progress and pane rows.
    pub(super) reads: u64,
    /// Number of reads that failed because Cassandra was down.
    pub(super) failed_reads: u64,
    /// Number of figures read from the page.
    pub(super) figures: u64,
    /// Number of times that all rows were counted.
    pub(super) counts: u64,
    /// Number of values that decreased and rows that disappeared.
    pub(super) regressed: u64,
    /// Number of figures of the page that were higher than what the tables contained later.
    pub(super) untrue: u64,
    /// Descriptions of the first regressions and untrue figures.
    pub(super) examples: Vec<String>,
}

/// Key of a row whose values never decrease.
#[derive(Clone, Debug, Hash, PartialEq, Eq)]
enum Row {
    /// Kafka partition of a progress row.
    Progress(i32),
    /// Kafka partition, pane start, dimension and value.
    Pane(i32, i64, String, String),
}

/// All rows of one read with their values.
type Snapshot = Vec<(Row, Vec<Option<i64>>)>;

/// The latest values of each row, and the figures of the page.
#[derive(Debug, Default)]
struct Observations {
    epoch: u64,
    latest: HashMap<Row, Vec<Option<i64>>>,
    /// Row counts that the page showed since the rows were last counted.
    page_figures: Vec<i64>,
    findings: Findings,
}

impl Observations {
    /// Discards the observations of an earlier epoch, that is, from before Cassandra was restored.
    fn enter_epoch(&mut self, epoch: u64) {
        if epoch != self.epoch {
            self.epoch = epoch;
            self.latest.clear();
            self.page_figures.clear();
        }
    }

    /// Compares a complete read with the previous one.
    fn observe_rows(&mut self, rows: Snapshot, at: Duration) {
        self.findings.reads += 1;
        let mut present = HashSet::with_capacity(rows.len());
        for (row, values) in rows {
            if let Some(before) = self.latest.get(&row) {
                // `None` is less than any value.
                let decreased = before.iter().zip(&values).filter(|(before, now)| now < before).count();
                if decreased > 0 {
                    self.findings.regressed += decreased as u64;
                    self.note(format!("{row:?} decreased from {before:?} to {values:?}"), at);
                }
            }
            present.insert(row.clone());
            self.latest.insert(row, values);
        }
        let gone: Vec<Row> = self.latest.keys().filter(|row| !present.contains(*row)).cloned().collect();
        for row in gone {
            self.latest.remove(&row);
            self.findings.regressed += 1;
            self.note(format!("{row:?} disappeared"), at);
        }
    }

    /// Compares a row count of the page with the events in all panes, which were read after it.
    fn observe_page(&mut self, rows: i64, in_panes: i64, at: Duration) {
        self.findings.figures += 1;
        if rows > in_panes {
            self.findings.untrue += 1;
            self.note(format!("the page showed {rows} rows, later the panes counted {in_panes}"), at);
        } else {
            self.page_figures.push(rows);
        }
    }

    /// Compares the earlier figures of the page with a count of all rows, which started after them.
    fn observe_count(&mut self, rows: i64, at: Duration) {
        self.findings.counts += 1;
        for shown in std::mem::take(&mut self.page_figures) {
            if shown > rows {
                self.findings.untrue += 1;
                self.note(format!("the page showed {shown} rows, later the table contained {rows}"), at);
            }
        }
    }

    fn note(&mut self, what: String, at: Duration) {
        if self.findings.examples.len() < MAX_EXAMPLES {
            self.findings.examples.push(format!("after {:.1} s: {what}", at.as_secs_f64()));
        }
    }
}

/// Returns the sum of all panes without a dimension, which count every event.
fn in_panes(rows: &Snapshot) -> i64 {
    let counts = rows.iter().filter_map(|(row, values)| match row {
        Row::Pane(_, _, dimension, _) if dimension.is_empty() => values.first().copied().flatten(),
        Row::Pane(..) | Row::Progress(_) => None,
    });
    counts.sum()
}

/// Handle of the running reader.
#[derive(Debug)]
pub(super) struct Watch {
    stop: CancellationToken,
    task: JoinHandle<Findings>,
}

/// State of the reader task.
struct TableReader {
    settings: Settings,
    session: Session,
    /// Name of the event table.
    table: String,
    epoch: Epoch,
    started: Instant,
    observations: Observations,
    /// Earliest time of the next count of all rows.
    count_at: Instant,
}

impl Watch {
    /// Starts the reader.
    pub(super) async fn start(settings: &Settings, epoch: Epoch) -> Result<Self> {
        let mut reader = TableReader {
            settings: settings.clone(),
            session: connect(settings).await?,
            table: local_stack::services::definition(settings)?.stream.name,
            epoch,
            started: Instant::now(),
            observations: Observations::default(),
            count_at: Instant::now() + REST,
        };
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            let mut ticks = tokio::time::interval(READ_INTERVAL);
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                let last = stopped.is_cancelled();
                reader.read(last).await;
                if last {
                    return reader.observations.findings;
                }
                tokio::select! {
                    _ = ticks.tick() => {}
                    () = stopped.cancelled() => {}
                }
            }
        });
        Ok(Self { stop, task })
    }

    /// Stops the reader after one more read and returns its results.
    pub(super) async fn stop(self) -> Result<Findings> {
        self.stop.cancel();
        self.task.await.map_err(|error| Error::Refused(format!("the reader failed: {error}")))
    }
}

impl TableReader {
    /// Reads the page and the tables once. Counts all rows if a count is due or this is the last read.
    async fn read(&mut self, last: bool) {
        let epoch = self.epoch.load(Ordering::SeqCst);
        if !epoch.is_multiple_of(2) {
            return;
        }
        self.observations.enter_epoch(epoch);
        let shown = page::rows_written(&self.settings).await;
        let rows = read_tables(&self.session, &format!("{}_panes", self.table)).await;
        if self.epoch.load(Ordering::SeqCst) != epoch {
            return;
        }
        let at = self.started.elapsed();
        match rows {
            Ok(rows) => {
                if let Some(shown) = shown {
                    self.observations.observe_page(shown, in_panes(&rows), at);
                }
                self.observations.observe_rows(rows, at);
            }
            Err(_) => self.observations.findings.failed_reads += 1,
        }
        if last || Instant::now() >= self.count_at {
            let since = Instant::now();
            let counted = page::count_rows(&self.session, &self.table).await;
            if let Ok(rows) = counted
                && self.epoch.load(Ordering::SeqCst) == epoch
            {
                self.observations.observe_count(rows, self.started.elapsed());
            }
            self.count_at = Instant::now() + REST.max(REST_PER_COUNT * since.elapsed());
        }
    }
}

async fn read_tables(session: &Session, panes: &str) -> Result<Snapshot> {
    type ProgressColumns =
        (i32, Option<i64>, Option<i64>, Option<i64>, Option<i64>, Option<i64>, Option<i64>);
    let mut found = Vec::new();
    let query = format!(
        "SELECT kafka_partition, next_offset, events, duplicates, late, dead_letters, seen_to \
         FROM {NAME}.partition_progress"
    );
    let pages = session.query_iter(query, ()).await.map_err(failed)?;
    let mut rows = pages.rows_stream::<ProgressColumns>().map_err(failed)?;
    while let Some((partition, next, events, copies, late, dead, seen_to)) =
        rows.try_next().await.map_err(failed)?
    {
        found.push((Row::Progress(partition), vec![next, events, copies, late, dead, seen_to]));
    }
    let query =
        format!("SELECT kafka_partition, pane_start, dimension, value, count, upto FROM {NAME}.{panes}");
    let pages = session.query_iter(query, ()).await.map_err(failed)?;
    let mut rows = pages
        .rows_stream::<(i32, CqlTimestamp, String, String, Option<i64>, Option<i64>)>()
        .map_err(failed)?;
    while let Some((partition, start, dimension, value, count, upto)) =
        rows.try_next().await.map_err(failed)?
    {
        found.push((Row::Pane(partition, start.0, dimension, value), vec![count, upto]));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(reads: &[&[(i32, i64)]], regressed: u64) {
        let mut observations = Observations::default();
        for read in reads {
            let rows = read.iter().map(|(row, value)| (Row::Progress(*row), vec![Some(*value)])).collect();
            observations.observe_rows(rows, Duration::ZERO);
        }
        assert_eq!(
            observations.findings.regressed, regressed,
            "{reads:?}: {:?}",
            observations.findings.examples
        );
    }

    #[test]
    fn each_decrease_and_each_disappeared_row_counts_once() {
        check(&[&[(0, 1), (1, 5)], &[(0, 1), (1, 6)], &[(0, 2), (1, 6), (2, 0)]], 0);
        check(&[&[(0, 5)], &[(0, 4)], &[(0, 4)], &[(0, 5)]], 1);
        check(&[&[(0, 5), (1, 1)], &[(0, 5)], &[(0, 5)]], 1);
    }

    #[test]
    fn a_figure_of_the_page_is_untrue_if_panes_or_rows_are_fewer_later() {
        let check = |shown: &[(i64, i64)], counts: &[i64], untrue| {
            let mut observations = Observations::default();
            for (rows, in_panes) in shown {
                observations.observe_page(*rows, *in_panes, Duration::ZERO);
            }
            for rows in counts {
                observations.observe_count(*rows, Duration::ZERO);
            }
            assert_eq!(
                observations.findings.untrue, untrue,
                "{shown:?} {counts:?}: {:?}",
                observations.findings.examples
            );
        };
        check(&[(4, 4), (5, 6)], &[5, 4], 0);
        check(&[(4, 3)], &[4], 1);
        check(&[(4, 4), (5, 5), (6, 6)], &[4], 2);
        check(&[(7, 6)], &[6], 1);
    }

    #[test]
    fn values_from_before_a_restore_are_not_compared_with_later_ones() {
        let progress = |value| vec![(Row::Progress(0), vec![Some(value)])];
        let mut observations = Observations::default();
        observations.observe_rows(progress(9), Duration::ZERO);
        observations.observe_page(9, 9, Duration::ZERO);
        observations.enter_epoch(2);
        observations.observe_rows(progress(4), Duration::ZERO);
        observations.observe_count(4, Duration::ZERO);
        assert_eq!(
            (observations.findings.regressed, observations.findings.untrue),
            (0, 0),
            "{:?}",
            observations.findings.examples
        );
        observations.observe_rows(progress(3), Duration::ZERO);
        assert_eq!(observations.findings.regressed, 1);
    }

    #[test]
    fn only_the_panes_without_a_dimension_are_summed() {
        let pane = |dimension: &str, count| {
            (Row::Pane(0, 0, dimension.to_owned(), String::new()), vec![Some(count), Some(100)])
        };
        let rows = vec![(Row::Progress(0), vec![Some(50)]), pane("", 3), pane("gender", 3), pane("", 4)];
        assert_eq!(in_panes(&rows), 7);
    }
}
