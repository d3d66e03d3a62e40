//! The prepared statements of the processor.

use super::requests::StoreContext;
use crate::error::ProcessorError;
use common::contracts::schema::{self, MAX_BATCH_ROWS};
use common::contracts::stream::Definition;
use common::runtime::cassandra::StatementError;
use scylla::statement::batch::{Batch, BatchStatement, BatchType};
use scylla::statement::prepared::PreparedStatement;
use std::sync::OnceLock;
use std::time::Instant;

/// The statements of one stream.
pub(super) struct Statements {
    pub(super) rows: Batches,
    pub(super) panes: Batches,
    pub(super) look_up: PreparedStatement,
    pub(super) load_panes: PreparedStatement,
    pub(super) progress: PreparedStatement,
    pub(super) accepted: PreparedStatement,
    pub(super) skips: PreparedStatement,
    pub(super) put_progress: PreparedStatement,
    pub(super) note_written: PreparedStatement,
    pub(super) put_throughput: PreparedStatement,
    pub(super) put_batch: PreparedStatement,
}

/// One prepared insert as unlogged batches. The batch of each size is created on first use.
pub(super) struct Batches {
    insert: PreparedStatement,
    sizes: Vec<OnceLock<Batch>>,
}

impl Batches {
    fn new(insert: PreparedStatement) -> Batches {
        Batches { insert, sizes: (0..=MAX_BATCH_ROWS).map(|_| OnceLock::new()).collect() }
    }

    /// The batch with `size` copies of the insert, up to [`MAX_BATCH_ROWS`].
    pub(super) fn of_size(&self, size: usize) -> &Batch {
        self.sizes[size].get_or_init(|| {
            let statement = BatchStatement::PreparedStatement(self.insert.clone());
            let mut batch = Batch::new_with_statements(BatchType::Unlogged, vec![statement; size]);
            batch.set_is_idempotent(true);
            batch
        })
    }
}

impl Statements {
    /// Prepares all statements. Waits for Cassandra until the context's deadline.
    pub(super) async fn prepare(
        keyspace: &str,
        definition: &Definition,
        context: &StoreContext,
    ) -> Result<Statements, ProcessorError> {
        let (stream, panes_table) = (&definition.stream.name, schema::panes_table(definition));
        let columns: String = definition.columns.iter().map(|column| format!(", {}", column.name)).collect();
        let measures: String = definition
            .windows
            .measures
            .iter()
            .map(|m| format!(", {m}_count, {m}_sum, {m}_min, {m}_max"))
            .collect();
        let deadline = Instant::now() + context.start_deadline;
        let prepare = async |cql: String| {
            let prepared = common::runtime::cassandra::prepare(&context.session, &cql, deadline).await;
            prepared.map_err(|e| match e {
                StatementError::NotSetUp(_) => ProcessorError::Fatal(e.to_string()),
                StatementError::Unavailable(_) => ProcessorError::Retryable(e.to_string()),
            })
        };
        Ok(Statements {
            rows: Batches::new(prepare(schema::insert_event(keyspace, definition)).await?),
            panes: Batches::new(prepare(schema::insert_pane(keyspace, definition)).await?),
            look_up: prepare(format!(
                "SELECT event_time, event_id, kafka_offset{columns} FROM {keyspace}.{stream} \
                 WHERE bucket = ? AND shard = ? AND (event_time, event_id) IN ?"
            )).await?,
            load_panes: prepare(format!(
                "SELECT pane_start, dimension, value, count, upto{measures} FROM {keyspace}.{panes_table} \
                 WHERE bucket = ? AND kafka_partition = ? AND pane_start IN ?"
            )).await?,
            progress: prepare(format!(
                "SELECT next_offset, events, duplicates, revised, late, dead_letters, skipped, seen_to, first_offset, \
                 last_offset, fingerprint, written_to FROM {keyspace}.partition_progress WHERE stream = ? AND kafka_partition = ?"
            )).await?,
            accepted: prepare(format!(
                "SELECT up_to FROM {keyspace}.dead_letters_accepted WHERE stream = ? AND kafka_partition = ?"
            )).await?,
            skips: prepare(format!(
                "SELECT from_offset, to_offset FROM {keyspace}.skipped_ranges WHERE stream = ? AND kafka_partition = ?"
            )).await?,
            put_progress: prepare(format!(
                "INSERT INTO {keyspace}.partition_progress (stream, kafka_partition, next_offset, events, duplicates, revised, \
                 late, dead_letters, skipped, seen_to, first_offset, last_offset, fingerprint, written_to, updated_at) \
                 VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) USING TIMESTAMP ?"
            )).await?,
            note_written: prepare(format!(
                "INSERT INTO {keyspace}.partition_progress (stream, kafka_partition, written_to) VALUES (?, ?, ?) \
                 USING TIMESTAMP ?"
            )).await?,
            put_throughput: prepare(format!(
                "INSERT INTO {keyspace}.throughput (stream, resolution, slot, at, kafka_partition, total) \
                 VALUES (?, ?, ?, ?, ?, ?) USING TIMESTAMP ? AND TTL ?"
            )).await?,
            put_batch: prepare(format!(
                "INSERT INTO {keyspace}.batches (stream, hour, finished_at, kafka_partition, first_offset, next_offset, rows, \
                 decode_ms, lookup_ms, write_ms, commit_ms) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
            )).await?,
        })
    }
}
