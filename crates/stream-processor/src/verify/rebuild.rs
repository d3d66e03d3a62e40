//! `verify --rebuild`: rewrites panes from the event rows, with the partition's state file held, so that no processor runs
//! it meanwhile. Pane rows that say too much keep what they say, so the pane table is truncated first.

use super::compare::{EventRow, fold};
use super::{Outcome, Standing, Stretch, Verifier, begin, now_ms, spelled};
use crate::error::ProcessorError;
use crate::partition::Position;
use crate::start::{StateFacts, survives};
use crate::state::{self, StateFile};
use crate::store::Store;
use crate::windows::hot::Panes;
use crate::windows::pane::Pane;
use crate::write_plan::group_panes;
use common::schema::TOPIC_RETENTION_MS;
use common::stream::layout::Layout;
use indicatif::ProgressBar;
use std::collections::BTreeMap;
use std::path::Path;

/// Panes written together.
const PANES_AT_ONCE: usize = 64;

impl Verifier {
    /// Writes what the event rows below the next offset of one partition say, stamped with it.
    pub async fn rebuild(
        &self,
        partition: i32,
        checkpoints: &Path,
        progress: &ProgressBar,
    ) -> Result<Outcome, ProcessorError> {
        let definition = &self.sources.definition;
        let path = state::path_of(checkpoints, &definition.stream.name, partition);
        let held = StateFile::open(&path, &format!("verify --rebuild, pid {}", std::process::id()));
        let held = held.map_err(|e| ProcessorError::Fatal(format!("{e}; stop the processor first")))?;
        let mut outcome = Outcome::default();
        for standing in self.standings(std::iter::once(partition), None).await? {
            let position = ahead(partition, standing.position, held.facts(), &definition.layout())?;
            begin(progress, partition, "rows", 2 * standing.stretches.len() as u64);
            self.check_complete(&standing, &position, progress).await?;
            for stretch in &standing.stretches {
                self.rebuild_stretch(stretch, position.next_offset, &mut outcome).await?;
                progress.inc(1);
            }
        }
        Ok(outcome)
    }

    async fn rebuild_stretch(
        &self,
        stretch: &Stretch,
        next_offset: i64,
        outcome: &mut Outcome,
    ) -> Result<(), ProcessorError> {
        let limits = vec![next_offset; self.shape.names.len()];
        let mut panes = self.no_panes();
        let mut events = self.reader.events(stretch).await?;
        while let Some(start) = events.next_start() {
            let mut lowest = self.lowest(i64::MIN);
            let take = |row: EventRow| {
                outcome.rows += u64::from(row.offset < next_offset);
                lowest.push(row);
            };
            events.take(start, take).await?;
            let (rows, rest) = lowest.into_rows();
            outcome.panes_in_parts += u64::from(rest.is_some());
            let pane = if rest.is_some() {
                self.read_pane(stretch, start, &limits).await?
            } else {
                let mut pane = Pane::empty(&self.shape);
                fold(&self.shape, &mut pane, &limits, &rows);
                pane
            };
            panes.put_cold(start, pane);
            if panes.cold.len() == PANES_AT_ONCE {
                self.write(stretch.partition, next_offset, &mut panes, outcome).await?;
                panes = self.no_panes();
            }
        }
        self.write(stretch.partition, next_offset, &mut panes, outcome).await
    }

    fn no_panes(&self) -> Panes {
        let pane_ms = self.sources.definition.windows.pane_ms;
        Panes::new(self.shape.clone(), (pane_ms, 0), usize::MAX, i64::MAX)
    }

    async fn write(
        &self,
        partition: i32,
        next_offset: i64,
        panes: &mut Panes,
        outcome: &mut Outcome,
    ) -> Result<(), ProcessorError> {
        let settled: BTreeMap<i64, Vec<usize>> =
            panes.cold.iter_mut().map(|(start, pane)| (*start, pane.settle(next_offset))).collect();
        outcome.pane_rows += settled.values().map(|rows| rows.len() as u64).sum::<u64>();
        let bucket = self.sources.definition.store.bucket;
        let groups = group_panes(&settled, bucket, self.shape.row_bytes());
        self.sources.store.write_panes(partition, next_offset, &groups, panes).await
    }

    /// Refuses where event rows of counted events are gone.
    async fn check_complete(
        &self,
        standing: &Standing,
        position: &Position,
        progress: &ProgressBar,
    ) -> Result<(), ProcessorError> {
        let mut rows = 0;
        for stretch in &standing.stretches {
            let mut events = self.reader.events(stretch).await?;
            while let Some(start) = events.next_start() {
                let count = |row: EventRow| rows += i64::from(row.offset < position.next_offset);
                events.take(start, count).await?;
            }
            progress.inc(1);
        }
        let (partition, events, next_offset) =
            (standing.partition, position.totals.events, position.next_offset);
        let refused = |why: String| {
            Err(ProcessorError::Refused(format!(
                "partition {partition}: panes cannot be rebuilt from rows: {why}; `run --replay` rebuilds what Kafka still has"
            )))
        };
        if rows < events {
            return refused(format!(
                "{events} events were counted below offset {next_offset}, the table holds {rows} of them"
            ));
        }
        let expiring = now_ms().saturating_sub(self.ttl_ms()).saturating_add(TOPIC_RETENTION_MS);
        match standing.stretches.first() {
            Some(oldest) if self.ttl_ms() > 0 && oldest.bucket < expiring => {
                refused(format!("rows from {} on may expire meanwhile (store.ttl)", spelled(oldest.bucket)))
            }
            _ => Ok(()),
        }
    }
}

/// The position the processor will go on from: a state file is ahead of the progress row after a kill between both.
fn ahead(
    partition: i32,
    progress: Position,
    state: Option<StateFacts>,
    layout: &Layout,
) -> Result<Position, ProcessorError> {
    if let Some(state) = &state
        && let Err(differences) = survives(&state.layout, layout)
    {
        return Err(ProcessorError::Refused(format!(
            "partition {partition}: the state file was made for another layout than the stream file has:\n{differences}\nuse the \
             stream file it was made for"
        )));
    }
    match state {
        Some(state) if state.position.next_offset > progress.next_offset => Ok(state.position),
        _ => Ok(progress),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::partition::Totals;
    use common::stream::Definition;

    #[test]
    fn a_rebuild_goes_as_far_as_the_state_file_and_refuses_one_of_another_layout() {
        let at = |next_offset: i64| Position {
            next_offset,
            totals: Totals { events: next_offset, ..Totals::default() },
            ..Position::default()
        };
        let text = include_str!("../../../../streams/user_created.toml");
        let layout = Definition::parse("user_created.toml", text).unwrap().layout();
        let own = layout.to_string();
        let state = |next_offset: i64, layout: &str| {
            let (layout, cluster_id) = (layout.to_owned(), String::new());
            Some(StateFacts { position: at(next_offset), layout, cluster_id })
        };
        let check = |state, expected| assert_eq!(ahead(0, at(100), state, &layout).unwrap(), at(expected));
        check(None, 100);
        check(state(200, &own), 200);
        check(state(50, &own), 100);
        let refused = ahead(0, at(100), state(200, "b"), &layout).unwrap_err().to_string();
        assert!(refused.contains("another layout") && refused.contains("cannot be read"), "{refused}");
    }
}
