//! What the worker needs of the database, as a trait, so that the loop runs on fakes too. Everything written is idempotent:
//! absolute values under stamps that come from the log.

pub mod cassandra;
pub mod in_flight;
mod outages;
mod progress;
pub mod requests;
mod rows;
mod statements;

use crate::chunk::Chunk;
use crate::error::ProcessorError;
use crate::partition::Position;
use crate::start::Progress;
use crate::windows::hot::Panes;
use crate::windows::pane::Pane;
use crate::write_plan::{EventGroup, PaneGroup};
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::ops::Range;

/// How long each step of a batch took, for the `batches` table and the metrics.
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
    /// First offset.
    pub first_offset: i64,
    /// Rows written.
    pub rows: usize,
    /// Time per step.
    pub times: StepTimes,
}

/// What a worker takes for granted of Cassandra since it opened its partition.
#[derive(Debug, Clone, Copy)]
pub struct Assumed {
    /// The progress row notes that everything below is written; `None`: it does not.
    pub noted: Option<i64>,
    /// How many outages were over before anything of the partition was read.
    pub outages: u64,
}

/// Cassandra, or a fake of it. Every call is retried until Cassandra acknowledges it, refuses it for good, or shutdown begins.
pub trait Store: Send + Sync {
    /// The stored offset of each event named in `groups`, as `(event number, offset)`; absent: no row.
    fn look_up(
        &self,
        chunk: &Chunk,
        groups: &[EventGroup],
    ) -> impl Future<Output = Result<Vec<(u32, i64)>, ProcessorError>> + Send;

    /// The panes with these starts of one Kafka partition, as stored; every asked one is in the answer, empty where absent.
    fn load_panes(
        &self,
        partition: i32,
        starts: &BTreeSet<i64>,
    ) -> impl Future<Output = Result<BTreeMap<i64, Pane>, ProcessorError>> + Send;

    /// Writes event rows, each with its event time as stamp.
    fn write_rows(
        &self,
        chunk: &Chunk,
        groups: &[EventGroup],
    ) -> impl Future<Output = Result<(), ProcessorError>> + Send;

    /// Writes pane rows with `next_offset` as stamp; their values are in `panes`.
    fn write_panes(
        &self,
        partition: i32,
        next_offset: i64,
        groups: &[PaneGroup],
        panes: &Panes,
    ) -> impl Future<Output = Result<(), ProcessorError>> + Send;

    /// A partition's progress row.
    fn progress(
        &self,
        partition: i32,
    ) -> impl Future<Output = Result<Option<Progress>, ProcessorError>> + Send;

    /// How many outages of Cassandra are over. A snapshot is restored only during one.
    fn outages(&self) -> u64;

    /// Fails with [`ProcessorError::Reopen`] if something is no longer as `assumed`: an older snapshot may have been restored, and
    /// what was read before the call is worthless.
    fn confirm(
        &self,
        partition: i32,
        assumed: Assumed,
    ) -> impl Future<Output = Result<(), ProcessorError>> + Send;

    /// Notes in the progress row that everything below `written_to` is written, if everything is still as `assumed`.
    fn note_written(
        &self,
        partition: i32,
        written_to: i64,
        assumed: Assumed,
    ) -> impl Future<Output = Result<(), ProcessorError>> + Send;

    /// The ranges of offsets that an operator wants skipped in a partition.
    fn skips(&self, partition: i32) -> impl Future<Output = Result<Vec<Range<i64>>, ProcessorError>> + Send;

    /// Up to which offset an operator accepted poison beyond the limits; 0: not at all.
    fn accepted_up_to(&self, partition: i32) -> impl Future<Output = Result<i64, ProcessorError>> + Send;

    /// Publishes a committed position: progress row, running totals, and how long the batch took. Only if everything
    /// is still as `assumed`.
    fn publish(
        &self,
        partition: i32,
        position: &Position,
        assumed: Assumed,
        batch: Option<&BatchRecord>,
    ) -> impl Future<Output = Result<(), ProcessorError>> + Send;
}

/// Where poison goes. Acknowledged when the call returns.
pub trait DeadLetters: Send + Sync {
    /// Sends every poison record of `chunk`.
    fn send(&self, partition: i32, chunk: &Chunk) -> impl Future<Output = Result<(), ProcessorError>> + Send;
}
