//! Mutations of the protocol: each disables one safeguard or swaps two steps, and the simulation must detect each. Most
//! are implemented in the fakes (store, checkpoint, fetched chunks), where they have the effect of the missing
//! safeguard. The two that cannot be implemented there are lines in `partition.rs` that are compiled only in tests.

use crate::record::chunk::DecodedEvent;
use std::cell::Cell;

/// The safeguard that is disabled, or the steps that are swapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutation {
    /// The `upto` of a pane row that was read back is ignored, so it counts everything again.
    Fence,
    /// Copies in one batch are not detected.
    CopiesInOneBatch,
    /// `hot_from` moves in the middle of a batch.
    Freeze,
    /// The key of an event is the id without the event time.
    IdOnly,
    /// A record whose row already exists is not added to its pane.
    ReplayMarks,
    /// `--replay` starts from zero with hot panes.
    ReplayHot,
    /// The progress row has the watermark minus the lateness instead of the watermark.
    RawWatermark,
    /// The lookups of a batch run before the previous batch is written.
    LookUpsAhead,
    /// Writes of panes and progress use the clock as their stamp.
    StampsByClock,
    /// The processor resumes from a state that is behind the progress row.
    StaleState,
    /// Events are accepted however old they are relative to their record.
    Horizon,
    /// Events are accepted however far they are ahead of their record.
    FutureBound,
    /// A recovered partition takes panes above the watermark for empty, although events may be ahead of it.
    AheadRecovery,
    /// Events ahead of time advance the watermark to their own time.
    AheadWatermark,
    /// The fingerprint of the record before the next offset is not compared.
    Fingerprint,
    /// The next offset does not advance past transaction markers at the end of the log.
    FollowPosition,
    /// `written_to` is not stored before the commit.
    NoteWritten,
    /// A partition is not reopened after an outage, during which a snapshot may have been restored.
    ReopenAfterOutage,
    /// The processor continues with a store that lost history.
    StoreBehind,
    /// The values of a copy are not compared with those of the stored row.
    ComparedValues,
    /// Skipped offsets are not counted as skipped.
    RecordSkips,
    /// A new state does not publish its progress row before its first batch.
    FirstProgress,
    /// `throughput` has the number of records of a batch instead of the running total.
    RunningTotal,
    /// The commit happens before the rows are written.
    CommitBeforeRows,
    /// The commit happens before the dead letters are sent.
    CommitBeforeDeadLetters,
    /// The commit happens before the panes are written.
    CommitBeforePanes,
    /// The progress row is written before the commit.
    PublishBeforeCommit,
    /// Panes are written before rows.
    PanesBeforeRows,
}

thread_local! {
    static ACTIVE: Cell<Option<Mutation>> = const { Cell::new(None) };
}

/// Whether `mutation` is active in the simulation of this thread.
pub fn is_active(mutation: Mutation) -> bool {
    ACTIVE.get() == Some(mutation)
}

/// Activates `mutation` for this thread. `None` deactivates all.
pub fn activate(mutation: Option<Mutation>) {
    ACTIVE.set(mutation);
}

/// Returns the timestamp to decode a record with. The mutations `Horizon` and `FutureBound` move it close to the event
/// time.
pub fn record_time(timestamp_ms: i64, event_ms: i64) -> i64 {
    match ACTIVE.get() {
        Some(Mutation::Horizon) => timestamp_ms.min(event_ms.max(0) + 1000),
        Some(Mutation::FutureBound) => timestamp_ms.max(event_ms),
        _ => timestamp_ms,
    }
}

/// Lets an event advance the watermark to its own time under the mutation `AheadWatermark`.
pub fn advance_to_event_time(event: &mut DecodedEvent) {
    if is_active(Mutation::AheadWatermark) {
        event.watermark_ms = event.time_ms;
    }
}

/// Called by `Partition::apply`: whether a first copy is not added to its pane, because its row already exists.
pub fn omits_from_pane(found: Option<i64>, offset: i64) -> bool {
    is_active(Mutation::ReplayMarks) && found == Some(offset)
}

/// Called by `Partition::apply` after each event: moves `hot_from` in the middle of a batch.
pub fn move_hot_from(partition: &mut crate::count::partition::Partition) {
    if is_active(Mutation::Freeze)
        && let Some(seen_to) = partition.position.seen_to
    {
        let panes = &mut partition.panes;
        panes.hot_from = panes.hot_from.max(panes.start_of(seen_to - super::log::LATENESS_MS));
    }
}
