//! A reader beside the run: looks at the page, the progress and the panes every second and at all rows now and then. It counts what
//! goes back or away, and what the page says without the tables holding it. It knows nothing of the processor but the tables.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures::TryStreamExt;
use scylla::client::session::Session;
use scylla::value::CqlTimestamp;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::fleet::Epoch;
use super::{NAME, THINGS, page};
use crate::config::Settings;
use crate::error::{Error, Result};
use crate::servers::cassandra::{connect, failed};

/// How often is looked.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// How long the rows are not counted after a count, at least and as a multiple of its length: it takes Cassandra's time.
const REST: Duration = Duration::from_secs(10);
const REST_PER_COUNT: u32 = 9;

/// What the reader saw.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// Complete looks at all progress and pane rows.
    pub(super) looks: u64,
    /// Looks that failed: Cassandra was down.
    pub(super) blind: u64,
    /// Figures of the page.
    pub(super) figures: u64,
    /// How often all rows were counted.
    pub(super) counts: u64,
    /// Values that went back, and rows that went away.
    pub(super) regressed: u64,
    /// Figures of the page above what the tables held later.
    pub(super) untrue: u64,
    /// The first of them in words.
    pub(super) examples: Vec<String>,
}

/// A row that only ever grows.
#[derive(Clone, Debug, Hash, PartialEq, Eq)]
enum Row {
    /// Kafka partition.
    Progress(i32),
    /// Kafka partition, start, dimension, value.
    Pane(i32, i64, String, String),
}

/// A row with its values.
type Look = Vec<(Row, Vec<Option<i64>>)>;

/// The highest values seen of each row, and what the page said.
#[derive(Debug, Default)]
struct Marks {
    epoch: u64,
    highest: HashMap<Row, Vec<Option<i64>>>,
    /// Rows as the page said since they were last counted.
    said: Vec<i64>,
    seen: Seen,
}

impl Marks {
    /// Forgets what was seen before Cassandra went back to a snapshot.
    fn enter(&mut self, epoch: u64) {
        if epoch != self.epoch {
            self.epoch = epoch;
            self.highest.clear();
            self.said.clear();
        }
    }

    /// Takes a complete look: every row there is.
    fn take(&mut self, rows: Look, at: Duration) {
        self.seen.looks += 1;
        let mut present = HashSet::with_capacity(rows.len());
        for (row, values) in rows {
            if let Some(before) = self.highest.get(&row) {
                // An absent value is less than any.
                let back = before.iter().zip(&values).filter(|(before, now)| now < before).count();
                if back > 0 {
                    self.seen.regressed += back as u64;
                    self.note(format!("{row:?} was {before:?}, is {values:?}"), at);
                }
            }
            present.insert(row.clone());
            self.highest.insert(row, values);
        }
        let gone: Vec<Row> = self.highest.keys().filter(|row| !present.contains(*row)).cloned().collect();
        for row in gone {
            self.highest.remove(&row);
            self.seen.regressed += 1;
            self.note(format!("{row:?} is gone"), at);
        }
    }

    /// Takes what the page said before the tables were looked at, and the events in all panes then.
    fn page(&mut self, rows: i64, in_panes: i64, at: Duration) {
        self.seen.figures += 1;
        if rows > in_panes {
            self.seen.untrue += 1;
            self.note(format!("the page says {rows} rows, later the panes count {in_panes}"), at);
        } else {
            self.said.push(rows);
        }
    }

    /// Takes a count of all rows that began after everything that the page has said.
    fn counted(&mut self, rows: i64, at: Duration) {
        self.seen.counts += 1;
        for said in std::mem::take(&mut self.said) {
            if said > rows {
                self.seen.untrue += 1;
                self.note(format!("the page said {said} rows, later the table holds {rows}"), at);
            }
        }
    }

    fn note(&mut self, what: String, at: Duration) {
        if self.seen.examples.len() < THINGS {
            self.seen.examples.push(format!("after {:.1} s: {what}", at.as_secs_f64()));
        }
    }
}

/// Events as the panes of one dimension, that of all events, count them.
fn in_panes(rows: &Look) -> i64 {
    let counts = rows.iter().filter_map(|(row, values)| match row {
        Row::Pane(_, _, dimension, _) if dimension.is_empty() => values.first().copied().flatten(),
        Row::Pane(..) | Row::Progress(_) => None,
    });
    counts.sum()
}

/// The running reader.
#[derive(Debug)]
pub(super) struct Watch {
    stop: CancellationToken,
    task: JoinHandle<Seen>,
}

/// What the reader works with.
struct Reader {
    settings: Settings,
    session: Session,
    /// The event table.
    table: String,
    epoch: Epoch,
    begun: Instant,
    marks: Marks,
    /// When the rows are counted next.
    count_at: Instant,
}

impl Watch {
    /// Begins to look.
    pub(super) async fn begin(settings: &Settings, epoch: Epoch) -> Result<Self> {
        let mut reader = Reader {
            settings: settings.clone(),
            session: connect(settings).await?,
            table: crate::services::definition(settings)?.stream.name,
            epoch,
            begun: Instant::now(),
            marks: Marks::default(),
            count_at: Instant::now() + REST,
        };
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            let mut ticks = tokio::time::interval(LOOK_EVERY);
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                let last = stopped.is_cancelled();
                reader.look(last).await;
                if last {
                    return reader.marks.seen;
                }
                tokio::select! {
                    _ = ticks.tick() => {}
                    () = stopped.cancelled() => {}
                }
            }
        });
        Ok(Self { stop, task })
    }

    /// Looks once more and ends.
    pub(super) async fn end(self) -> Result<Seen> {
        self.stop.cancel();
        self.task.await.map_err(|error| Error::Refused(format!("the reader: {error}")))
    }
}

impl Reader {
    /// One look at everything; the rows are counted when it is time, and at the end.
    async fn look(&mut self, last: bool) {
        let epoch = self.epoch.load(Ordering::SeqCst);
        if !epoch.is_multiple_of(2) {
            return;
        }
        self.marks.enter(epoch);
        let said = page::rows_written(&self.settings).await;
        let rows = look(&self.session, &format!("{}_panes", self.table)).await;
        if self.epoch.load(Ordering::SeqCst) != epoch {
            return;
        }
        let at = self.begun.elapsed();
        match rows {
            Ok(rows) => {
                if let Some(said) = said {
                    self.marks.page(said, in_panes(&rows), at);
                }
                self.marks.take(rows, at);
            }
            Err(_) => self.marks.seen.blind += 1,
        }
        if last || Instant::now() >= self.count_at {
            let since = Instant::now();
            let counted = page::count_rows(&self.session, &self.table).await;
            if let Ok(rows) = counted
                && self.epoch.load(Ordering::SeqCst) == epoch
            {
                self.marks.counted(rows, self.begun.elapsed());
            }
            self.count_at = Instant::now() + REST.max(REST_PER_COUNT * since.elapsed());
        }
    }
}

async fn look(session: &Session, panes: &str) -> Result<Look> {
    type Progress = (i32, Option<i64>, Option<i64>, Option<i64>, Option<i64>, Option<i64>, Option<i64>);
    let mut seen = Vec::new();
    let query = format!(
        "SELECT kafka_partition, next_offset, events, duplicates, late, dead_letters, seen_to \
         FROM {NAME}.partition_progress"
    );
    let pages = session.query_iter(query, ()).await.map_err(failed)?;
    let mut rows = pages.rows_stream::<Progress>().map_err(failed)?;
    while let Some((partition, next, events, copies, late, dead, seen_to)) =
        rows.try_next().await.map_err(failed)?
    {
        seen.push((Row::Progress(partition), vec![next, events, copies, late, dead, seen_to]));
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
        seen.push((Row::Pane(partition, start.0, dimension, value), vec![count, upto]));
    }
    Ok(seen)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(looks: &[&[(i32, i64)]], regressed: u64) {
        let mut marks = Marks::default();
        for look in looks {
            let rows = look.iter().map(|(row, value)| (Row::Progress(*row), vec![Some(*value)])).collect();
            marks.take(rows, Duration::ZERO);
        }
        assert_eq!(marks.seen.regressed, regressed, "{looks:?}: {:?}", marks.seen.examples);
    }

    #[test]
    fn each_step_back_and_each_row_that_goes_away_counts_once() {
        check(&[&[(0, 1), (1, 5)], &[(0, 1), (1, 6)], &[(0, 2), (1, 6), (2, 0)]], 0);
        check(&[&[(0, 5)], &[(0, 4)], &[(0, 4)], &[(0, 5)]], 1);
        check(&[&[(0, 5), (1, 1)], &[(0, 5)], &[(0, 5)]], 1);
    }
    #[test]
    fn a_figure_of_the_page_is_untrue_when_panes_or_rows_are_fewer_later() {
        let check = |said: &[(i64, i64)], counts: &[i64], untrue| {
            let mut marks = Marks::default();
            for (rows, in_panes) in said {
                marks.page(*rows, *in_panes, Duration::ZERO);
            }
            for rows in counts {
                marks.counted(*rows, Duration::ZERO);
            }
            assert_eq!(marks.seen.untrue, untrue, "{said:?} {counts:?}: {:?}", marks.seen.examples);
        };
        check(&[(4, 4), (5, 6)], &[5, 4], 0);
        check(&[(4, 3)], &[4], 1);
        check(&[(4, 4), (5, 5), (6, 6)], &[4], 2);
        check(&[(7, 6)], &[6], 1);
    }

    #[test]
    fn what_was_seen_before_a_restore_says_nothing_about_what_comes_after() {
        let progress = |value| vec![(Row::Progress(0), vec![Some(value)])];
        let mut marks = Marks::default();
        marks.take(progress(9), Duration::ZERO);
        marks.page(9, 9, Duration::ZERO);
        marks.enter(2);
        marks.take(progress(4), Duration::ZERO);
        marks.counted(4, Duration::ZERO);
        assert_eq!((marks.seen.regressed, marks.seen.untrue), (0, 0), "{:?}", marks.seen.examples);
        marks.take(progress(3), Duration::ZERO);
        assert_eq!(marks.seen.regressed, 1);
    }

    #[test]
    fn events_are_counted_in_the_panes_of_all_events_alone() {
        let pane = |dimension: &str, count| {
            (Row::Pane(0, 0, dimension.to_owned(), String::new()), vec![Some(count), Some(100)])
        };
        let rows = vec![(Row::Progress(0), vec![Some(50)]), pane("", 3), pane("gender", 3), pane("", 4)];
        assert_eq!(in_panes(&rows), 7);
    }
}
