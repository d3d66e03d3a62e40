//! A reader beside the run: looks at progress and panes every second and counts what goes back or away. It knows nothing of
//! the processor but the tables.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use futures::TryStreamExt;
use scylla::client::session::Session;
use scylla::value::CqlTimestamp;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::{NAME, THINGS};
use crate::config::Settings;
use crate::error::{Error, Result};
use crate::servers::cassandra::{connect, failed};

/// How often is looked.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What the reader saw.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// Complete looks at all rows.
    pub(super) looks: u64,
    /// Looks that failed: Cassandra was down.
    pub(super) blind: u64,
    /// Values that went back, and rows that went away.
    pub(super) regressed: u64,
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

/// The highest values seen of each row.
#[derive(Debug, Default)]
struct Marks {
    highest: HashMap<Row, Vec<Option<i64>>>,
    seen: Seen,
}

impl Marks {
    /// Takes a complete look: every row there is.
    fn take(&mut self, rows: Vec<(Row, Vec<Option<i64>>)>, at: Duration) {
        self.seen.looks += 1;
        let mut present = HashSet::with_capacity(rows.len());
        for (row, values) in rows {
            if let Some(before) = self.highest.get(&row) {
                // An absent value is less than any.
                let back = before.iter().zip(&values).filter(|(before, now)| now < before).count();
                if back > 0 {
                    let what = format!("{row:?} was {before:?}, is {values:?}");
                    self.note(back, what, at);
                }
            }
            present.insert(row.clone());
            self.highest.insert(row, values);
        }
        let gone: Vec<Row> = self.highest.keys().filter(|row| !present.contains(*row)).cloned().collect();
        for row in gone {
            self.highest.remove(&row);
            self.note(1, format!("{row:?} is gone"), at);
        }
    }

    fn note(&mut self, values: usize, what: String, at: Duration) {
        self.seen.regressed += values as u64;
        if self.seen.examples.len() < THINGS {
            self.seen.examples.push(format!("after {:.1} s: {what}", at.as_secs_f64()));
        }
    }
}

/// The running reader.
#[derive(Debug)]
pub(super) struct Watch {
    stop: CancellationToken,
    task: JoinHandle<Seen>,
}

impl Watch {
    /// Begins to look.
    pub(super) async fn begin(settings: &Settings) -> Result<Self> {
        let session = connect(settings).await?;
        let panes = format!("{}_panes", crate::services::definition(settings)?.stream.name);
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            let (since, mut marks) = (Instant::now(), Marks::default());
            let mut ticks = tokio::time::interval(LOOK_EVERY);
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                let last = stopped.is_cancelled();
                match look(&session, &panes).await {
                    Ok(rows) => marks.take(rows, since.elapsed()),
                    Err(_) => marks.seen.blind += 1,
                }
                if last {
                    return marks.seen;
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

async fn look(session: &Session, panes: &str) -> Result<Vec<(Row, Vec<Option<i64>>)>> {
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
}
