//! Encodes and decodes the progress row.

use crate::count::partition::{LogPosition, Totals};
use crate::pipeline::start::ProgressFacts;
use crate::record::chunk::LastRecord;
use scylla::value::{CqlTimestamp, MaybeUnset};
use scylla::{DeserializeRow, SerializeRow};

/// The values of a progress row to write.
#[derive(SerializeRow)]
pub(super) struct ProgressRow<'a> {
    pub(super) stream: &'a str,
    pub(super) kafka_partition: i32,
    pub(super) next_offset: i64,
    pub(super) events: i64,
    pub(super) duplicates: i64,
    pub(super) revised: i64,
    pub(super) late: i64,
    pub(super) dead_letters: i64,
    pub(super) skipped: i64,
    pub(super) seen_to: MaybeUnset<i64>,
    pub(super) first_offset: i64,
    pub(super) last_offset: MaybeUnset<i64>,
    pub(super) fingerprint: MaybeUnset<i64>,
    pub(super) written_to: i64,
    pub(super) updated_at: CqlTimestamp,
    #[scylla(rename = "[timestamp]")]
    pub(super) stamp: i64,
}

/// A progress row as read. Columns that an earlier version did not write are `None`.
#[derive(DeserializeRow)]
pub(super) struct StoredProgress {
    pub(super) next_offset: Option<i64>,
    pub(super) events: Option<i64>,
    pub(super) duplicates: Option<i64>,
    pub(super) revised: Option<i64>,
    pub(super) late: Option<i64>,
    pub(super) dead_letters: Option<i64>,
    pub(super) skipped: Option<i64>,
    pub(super) seen_to: Option<i64>,
    pub(super) first_offset: Option<i64>,
    pub(super) last_offset: Option<i64>,
    pub(super) fingerprint: Option<i64>,
    pub(super) written_to: Option<i64>,
}

impl ProgressRow<'_> {
    /// The row that publishes `position` at `now_ms`, in Unix milliseconds.
    pub(super) fn new<'a>(
        stream: &'a str,
        partition: i32,
        position: &LogPosition,
        now_ms: i64,
    ) -> ProgressRow<'a> {
        let (totals, last_record) = (position.totals, position.last_record);
        ProgressRow {
            stream,
            kafka_partition: partition,
            next_offset: position.next_offset,
            events: totals.events,
            duplicates: totals.duplicates,
            revised: totals.revised,
            late: totals.late,
            dead_letters: totals.dead_letters,
            skipped: totals.skipped,
            seen_to: MaybeUnset::from_option(position.seen_to),
            first_offset: position.first_offset,
            last_offset: MaybeUnset::from_option(last_record.map(|record| record.offset)),
            fingerprint: MaybeUnset::from_option(last_record.map(|record| record.fingerprint)),
            written_to: position.next_offset,
            updated_at: CqlTimestamp(now_ms),
            stamp: position.next_offset,
        }
    }
}

impl StoredProgress {
    /// `None` if the row has only `written_to`, because nothing was published yet.
    pub(super) fn progress(self) -> Option<ProgressFacts> {
        let next_offset = self.next_offset?;
        let last_record = self.fingerprint.map(|fingerprint| LastRecord {
            offset: self.last_offset.unwrap_or(next_offset - 1),
            fingerprint,
        });
        let totals = Totals {
            events: self.events?,
            duplicates: self.duplicates?,
            revised: self.revised.unwrap_or(0),
            late: self.late?,
            dead_letters: self.dead_letters?,
            skipped: self.skipped.unwrap_or(0),
        };
        let first_offset = self.first_offset.unwrap_or(0);
        let position = LogPosition {
            next_offset,
            first_offset,
            last_record,
            totals,
            seen_to: self.seen_to,
            ..LogPosition::default()
        };
        Some(ProgressFacts { position, written_to: self.written_to })
    }
}

/// The progress row has a lower `written_to` than was acknowledged before.
#[derive(Debug, thiserror::Error)]
#[error(
    "partition {partition}: cassandra acknowledged everything below offset {noted}, but now its progress row has {}: \
     an older snapshot was restored",
    .stored.map_or_else(|| "no written_to".to_owned(), |stored| format!("written_to = {stored}"))
)]
pub(super) struct LostHistory {
    pub(super) partition: i32,
    pub(super) noted: i64,
    pub(super) stored: Option<i64>,
}
