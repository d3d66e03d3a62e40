//! `verify --rebuild` rewrites panes from the event rows. It holds the lock on the state file, so that no processor can
//! run the partition meanwhile. A rebuild does not lower pane rows that count too much, so truncate the pane table
//! first.

use super::compare::{EventRow, fold};
use super::{Outcome, Scope, Span, Verifier, now_ms, rfc3339, start_progress};
use crate::count::partition::LogPosition;
use crate::count::windows::hot::Panes;
use crate::count::windows::pane::Pane;
use crate::count::write_plan::group_panes;
use crate::error::ProcessorError;
use crate::io::state::{self, StateFile};
use crate::io::store::Store;
use crate::pipeline::start::{StateFacts, survives};
use common::contracts::stream::layout::Layout;
use common::contracts::topics::TOPIC_RETENTION_MS;
use indicatif::ProgressBar;
use std::collections::BTreeMap;
use std::path::Path;

/// Number of panes written at once.
const PANES_AT_ONCE: usize = 64;

impl Verifier {
    /// Recomputes the panes of one partition from the event rows below its next offset, and writes them with that
    /// offset as stamp. Fails if a processor holds the state file, or if event rows are missing.
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
        for scope in self.scopes(std::iter::once(partition), None).await? {
            let position = resume_position(partition, scope.position, held.facts(), &definition.layout())?;
            start_progress(progress, partition, "rows", 2 * scope.spans.len() as u64);
            self.check_complete(&scope, &position, progress).await?;
            for span in &scope.spans {
                self.rebuild_span(span, position.next_offset, &mut outcome).await?;
                progress.inc(1);
            }
        }
        Ok(outcome)
    }

    async fn rebuild_span(
        &self,
        span: &Span,
        next_offset: i64,
        outcome: &mut Outcome,
    ) -> Result<(), ProcessorError> {
        let limits = vec![next_offset; self.shape.names.len()];
        let mut panes = self.no_panes();
        let mut events = self.reader.events(span).await?;
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
                self.read_pane(span, start, &limits).await?
            } else {
                let mut pane = Pane::empty(&self.shape);
                fold(&self.shape, &mut pane, &limits, &rows);
                pane
            };
            panes.put_cold(start, pane);
            if panes.cold.len() == PANES_AT_ONCE {
                self.write(span.partition, next_offset, &mut panes, outcome).await?;
                panes = self.no_panes();
            }
        }
        self.write(span.partition, next_offset, &mut panes, outcome).await
    }

    fn no_panes(&self) -> Panes {
        let pane_ms = self.sources.definition.windows.pane_ms;
        Panes::new(self.shape.clone(), pane_ms, 0, usize::MAX, i64::MAX)
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

    /// Refuses to rebuild if event rows of counted events are missing or may expire during the rebuild.
    async fn check_complete(
        &self,
        scope: &Scope,
        position: &LogPosition,
        progress: &ProgressBar,
    ) -> Result<(), ProcessorError> {
        let mut rows = 0;
        for span in &scope.spans {
            let mut events = self.reader.events(span).await?;
            while let Some(start) = events.next_start() {
                let count = |row: EventRow| rows += i64::from(row.offset < position.next_offset);
                events.take(start, count).await?;
            }
            progress.inc(1);
        }
        let (partition, events, next_offset) =
            (scope.partition, position.totals.events, position.next_offset);
        let refused = |why: String| {
            Err(ProcessorError::Refused(format!(
                "partition {partition}: panes cannot be rebuilt from rows: {why}; use `run --replay` \
                 to rebuild from the records that Kafka still has"
            )))
        };
        if rows < events {
            return refused(format!(
                "{events} events were counted below offset {next_offset}, but the table has only {rows}"
            ));
        }
        let until_ms = now_ms().saturating_add(TOPIC_RETENTION_MS);
        match scope.spans.first() {
            Some(oldest) if self.expiry().is_possible(oldest.bucket, until_ms) => refused(format!(
                "rows from {} onwards may expire during the rebuild (store.ttl)",
                rfc3339(oldest.bucket)
            )),
            _ => Ok(()),
        }
    }
}

/// Returns the position from which the processor will resume. The state file is ahead of the progress row if the
/// processor was killed between writing the two.
fn resume_position(
    partition: i32,
    progress: LogPosition,
    state: Option<StateFacts>,
    layout: &Layout,
) -> Result<LogPosition, ProcessorError> {
    if let Some(state) = &state
        && let Err(differences) = survives(&state.layout, layout)
    {
        return Err(ProcessorError::Refused(format!(
            "partition {partition}: the state file was created with another layout than that of the stream file:\n\
             {differences}\nuse the stream file it was created with"
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
    use crate::count::partition::Totals;
    use common::contracts::stream::Definition;

    #[test]
    fn a_rebuild_includes_the_position_of_the_state_file_and_refuses_another_layout() {
        let at = |next_offset: i64| LogPosition {
            next_offset,
            totals: Totals { events: next_offset, ..Totals::default() },
            ..LogPosition::default()
        };
        let text = include_str!("../../../../../streams/user_created.toml");
        let layout = Definition::parse("user_created.toml", text).unwrap().layout();
        let own = layout.to_string();
        let state = |next_offset: i64, layout: &str| {
            let (layout, cluster_id) = (layout.to_owned(), String::new());
            Some(StateFacts { position: at(next_offset), layout, cluster_id })
        };
        let check =
            |state, expected| assert_eq!(resume_position(0, at(100), state, &layout).unwrap(), at(expected));
        check(None, 100);
        check(state(200, &own), 200);
        check(state(50, &own), 100);
        let refused = resume_position(0, at(100), state(200, "b"), &layout).unwrap_err().to_string();
        assert!(refused.contains("another layout") && refused.contains("cannot be read"), "{refused}");
    }
}
