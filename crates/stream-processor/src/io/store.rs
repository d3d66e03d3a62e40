//! The database interface of the worker, as a trait, so that the worker also runs on fakes. All writes are idempotent:
//! they write absolute values with stamps derived from the log.

pub mod cassandra;
pub mod in_flight;
mod outages;
mod progress;
pub mod requests;
mod rows;
mod statements;

use crate::count::partition::{LogPosition, StoredCopy};
use crate::count::windows::hot::Panes;
use crate::count::windows::pane::Pane;
use crate::count::write_plan::{EventGroup, PaneGroup};
use crate::error::ProcessorError;
use crate::pipeline::start::ProgressFacts;
use crate::record::chunk::Chunk;
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::ops::Range;

/// Duration of each step of a batch, for the `batches` table and the metrics.
#[derive(Debug, Clone, Copy, Default)]
pub struct StepTimes {
    /// Decoding, in seconds.
    pub decode: f64,
    /// Look-ups and pane loads, in seconds.
    pub lookup: f64,
    /// Applying the chunk to panes and totals, in seconds.
    pub apply: f64,
    /// Writing rows, dead letters and panes, in seconds.
    pub write: f64,
    /// Committing the checkpoint, in seconds.
    pub commit: f64,
}

/// One finished batch.
#[derive(Debug, Clone, Copy)]
pub struct BatchRecord {
    /// First offset of the batch.
    pub first_offset: i64,
    /// Number of event rows written.
    pub rows: usize,
    /// Duration of each step.
    pub times: StepTimes,
}

/// What a worker assumes about Cassandra since it opened its partition. Writes are refused once it is no longer true.
#[derive(Debug, Clone, Copy)]
pub struct Assumed {
    /// Least `written_to` that the progress row must have; `None` if it had none.
    pub noted: Option<i64>,
    /// Number of past outages when the partition was read.
    pub outages: u64,
}

/// Cassandra, or a fake of it. A call is retried until Cassandra acknowledges it, rejects it permanently, or the call
/// is aborted by shutdown.
pub trait Store: Send + Sync {
    /// Returns the row of each event in `groups` by the index of the event. Events without a row are absent.
    fn look_up(
        &self,
        chunk: &Chunk,
        groups: &[EventGroup],
    ) -> impl Future<Output = Result<BTreeMap<u32, StoredCopy>, ProcessorError>> + Send;

    /// Loads the panes of one Kafka partition with these starts. A pane that is not stored is returned empty.
    fn load_panes(
        &self,
        partition: i32,
        starts: &BTreeSet<i64>,
    ) -> impl Future<Output = Result<BTreeMap<i64, Pane>, ProcessorError>> + Send;

    /// Writes event rows. The stamp of a row is its event time.
    fn write_rows(
        &self,
        chunk: &Chunk,
        groups: &[EventGroup],
    ) -> impl Future<Output = Result<(), ProcessorError>> + Send;

    /// Writes the pane rows in `groups` with `next_offset` as stamp. Their values come from `panes`.
    fn write_panes(
        &self,
        partition: i32,
        next_offset: i64,
        groups: &[PaneGroup],
        panes: &Panes,
    ) -> impl Future<Output = Result<(), ProcessorError>> + Send;

    /// Reads a partition's progress row.
    fn progress(
        &self,
        partition: i32,
    ) -> impl Future<Output = Result<Option<ProgressFacts>, ProcessorError>> + Send;

    /// Number of outages of Cassandra that have ended. A snapshot can be restored only during an outage.
    fn outages(&self) -> u64;

    /// Fails with [`ProcessorError::Reopen`] if `assumed` is no longer true. Then an older snapshot may have been
    /// restored, and everything read before the call must be discarded.
    fn confirm(
        &self,
        partition: i32,
        assumed: Assumed,
    ) -> impl Future<Output = Result<(), ProcessorError>> + Send;

    /// Sets `written_to` in the progress row: everything below it is written. Fails like [`Store::confirm`].
    fn note_written(
        &self,
        partition: i32,
        written_to: i64,
        assumed: Assumed,
    ) -> impl Future<Output = Result<(), ProcessorError>> + Send;

    /// Reads the offset ranges of a partition to skip, as requested by operators.
    fn skips(&self, partition: i32) -> impl Future<Output = Result<Vec<Range<i64>>, ProcessorError>> + Send;

    /// Reads the offset below which an operator accepted undecodable records above the limits; 0 if none.
    fn accepted_up_to(&self, partition: i32) -> impl Future<Output = Result<i64, ProcessorError>> + Send;

    /// Publishes a committed position: the progress row and, with `batch`, the running totals and the step times. Fails
    /// like [`Store::confirm`].
    fn publish(
        &self,
        partition: i32,
        position: &LogPosition,
        assumed: Assumed,
        batch: Option<&BatchRecord>,
    ) -> impl Future<Output = Result<(), ProcessorError>> + Send;
}

/// Destination of undecodable records.
pub trait DeadLetters: Send + Sync {
    /// Sends every undecodable record of `chunk`. All are acknowledged when this returns.
    fn send(&self, partition: i32, chunk: &Chunk) -> impl Future<Output = Result<(), ProcessorError>> + Send;
}
