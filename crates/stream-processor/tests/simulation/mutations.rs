//! Taking out one repair of the protocol at a time, and swapping its steps: the simulation must notice each. A mutation is made
//! at the seams (store, checkpoint, fetched chunks), where it has the effect of the missing repair; the two that cannot be made
//! there are lines of `partition.rs` that exist in tests only.

use std::cell::Cell;

/// What is taken out, or swapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutation {
    /// A pane row read back counts everything again: `upto` is ignored.
    Fence,
    /// Copies inside one batch are not recognised.
    CopiesInOneBatch,
    /// `hot_from` moves in the middle of a batch.
    Freeze,
    /// A seen key is the id alone, without the event time.
    IdOnly,
    /// A record whose row is there is not offered to its pane.
    ReplayMarks,
    /// `--replay` starts from zero and hot.
    ReplayHot,
    /// The progress row carries the watermark less the lateness, not the highest event time.
    RawWatermark,
    /// The look-ups of a batch are made before the last one is written.
    LookUpsAhead,
    /// Panes and progress are stamped with a clock.
    StampsByClock,
    /// A state behind the progress row is gone on with.
    StaleState,
    /// Events are taken however old they are for their record.
    Horizon,
    /// Events are taken however far they are ahead of their record.
    FutureBound,
    /// The record before the next offset is not compared.
    Fingerprint,
    /// The next offset stays behind transaction markers at the end of the log.
    FollowPosition,
    /// The note that everything is written does not come before the commit.
    NoteWritten,
    /// A partition is not opened again after an outage, in which a snapshot may have been restored.
    ReopenAfterOutage,
    /// A store that lost history is gone on with.
    StoreBehind,
    /// Skipped offsets are not recorded as such.
    RecordSkips,
    /// A new state does not show its progress row before its first batch.
    FirstProgress,
    /// `throughput` holds a batch's records, not the running total.
    RunningTotal,
    /// The commit comes before the rows.
    CommitBeforeRows,
    /// The commit comes before the dead letters.
    CommitBeforeDeadLetters,
    /// The commit comes before the panes.
    CommitBeforePanes,
    /// The progress row comes before the commit.
    PublishBeforeCommit,
    /// Panes come before rows.
    PanesBeforeRows,
}

thread_local! {
    static OUT: Cell<Option<Mutation>> = const { Cell::new(None) };
}

/// Whether this thread's simulation has taken `mutation` out.
pub fn is_out(mutation: Mutation) -> bool {
    OUT.get() == Some(mutation)
}

/// Takes out `mutation`, or puts everything back.
pub fn take_out(mutation: Option<Mutation>) {
    OUT.set(mutation);
}

/// The time stamp the decoder is told, where a bound it decides by is taken out: as if the event had just happened.
pub fn record_time(timestamp_ms: i64, event_ms: i64) -> i64 {
    match OUT.get() {
        Some(Mutation::Horizon) => timestamp_ms.min(event_ms.max(0) + 1000),
        Some(Mutation::FutureBound) => timestamp_ms.max(event_ms),
        _ => timestamp_ms,
    }
}

/// In `Partition::apply`: whether a first copy whose row is there already is not offered to its pane.
pub fn skips(found: Option<i64>, offset: i64) -> bool {
    is_out(Mutation::ReplayMarks) && found == Some(offset)
}

/// In `Partition::apply`, after each event: moves the border at once.
pub fn move_border(partition: &mut crate::partition::Partition) {
    if is_out(Mutation::Freeze)
        && let Some(seen_to) = partition.position.seen_to
    {
        let panes = &mut partition.panes;
        panes.hot_from = panes.hot_from.max(panes.start_of(seen_to - super::log::LATENESS_MS));
    }
}
