//! The records of a page that are published together.

use crate::source::extract::Outgoing;

/// Limits of a batch, in records and in bytes of their values. A page is handed to the Kafka client batch by batch.
pub(super) const BATCH_RECORDS: usize = 500;
pub(super) const BATCH_BYTES: usize = 1 << 20;

/// Records that are handed to the Kafka client together.
#[derive(Default)]
pub(super) struct Batch {
    /// The records, in the order of the page.
    pub(super) outgoing: Vec<Outgoing>,
    bytes: usize,
}

impl Batch {
    pub(super) fn add(&mut self, record: Outgoing) {
        self.bytes += record.value().len();
        self.outgoing.push(record);
    }

    pub(super) fn is_full(&self) -> bool {
        self.outgoing.len() >= BATCH_RECORDS || self.bytes >= BATCH_BYTES
    }
}
