//! The tables as CQL, and the two statements that more than one part writes. Pure text: executing it is
//! `stream-processor init`'s. What each table promises stands in ARCHITECTURE.md, "Contracts in Cassandra".

use crate::stream::Definition;

/// Columns of the event table that are the pipeline's own; a stream definition may not declare them.
pub const RESERVED_COLUMNS: [&str; 6] =
    ["bucket", "shard", "event_time", "event_id", "kafka_offset", "run_id"];
/// How long Kafka keeps events: 7 days (`retention.ms` of the events topic).
pub const TOPIC_RETENTION_MS: i64 = 7 * 86_400_000;
/// How long dead letters are kept: 30 days.
pub const DEAD_LETTER_RETENTION_MS: i64 = 30 * 86_400_000;
/// How long commands are kept in the control topic: 1 day.
pub const CONTROL_RETENTION_MS: i64 = 86_400_000;
/// Longest time one log segment stays open: retention removes whole segments only.
pub const SEGMENT_MS: i64 = 86_400_000;
/// Most rows of one statement of the processor.
pub const MAX_BATCH_ROWS: usize = 200;
/// Most bytes of values in one statement; a mutation over half a commit-log segment (16 MiB) is refused for ever.
pub const MAX_BATCH_BYTES: usize = 512 << 10;
/// Seconds a row of `services` lives after its last heartbeat.
pub const SERVICE_TTL_SECONDS: i64 = 60;
/// Seconds a refusal is shown, unless the instance starts again.
pub const REFUSAL_TTL_SECONDS: i64 = 7 * 86_400;
/// `throughput` resolutions in seconds, the length of their slot (one Cassandra partition) in seconds, and their TTL.
pub const THROUGHPUT_RESOLUTIONS: [(i32, i64, i64); 2] = [(1, 3600, 2 * 86_400), (60, 86_400, 30 * 86_400)];

/// The tables that all streams of a keyspace share, as `(name, CREATE TABLE)`.
pub fn shared_tables(keyspace: &str) -> Vec<(String, String)> {
    [processing_tables(keyspace), presence_tables(keyspace), ingestion_tables(keyspace)].concat()
}

fn table(keyspace: &str, name: &str, columns: &str, options: &str) -> (String, String) {
    (name.to_owned(), format!("CREATE TABLE IF NOT EXISTS {keyspace}.{name} ({columns}){options}"))
}

/// What is known of streams and of their processing.
fn processing_tables(keyspace: &str) -> Vec<(String, String)> {
    let table = |name: &str, columns: &str, options: &str| table(keyspace, name, columns, options);
    let [_, (_, _, longest_throughput)] = THROUGHPUT_RESOLUTIONS;
    vec![
        table(
            "streams",
            "stream text PRIMARY KEY, layout text, cluster_id text, partitions int, partitioner text, created_at timestamp",
            "",
        ),
        table(
            "stream_state",
            "stream text PRIMARY KEY, paused boolean, schedules text, updated_at timestamp",
            "",
        ),
        table(
            "partition_progress",
            "stream text, kafka_partition int, next_offset bigint, events bigint, duplicates bigint, late bigint, \
             dead_letters bigint, skipped bigint, seen_to bigint, first_offset bigint, last_offset bigint, \
             fingerprint bigint, written_to bigint, updated_at timestamp, PRIMARY KEY ((stream), kafka_partition)",
            "",
        ),
        table(
            "skipped_ranges",
            "stream text, kafka_partition int, from_offset bigint, to_offset bigint, reason text, \
             skipped_by text, skipped_at timestamp, PRIMARY KEY ((stream), kafka_partition, from_offset)",
            "",
        ),
        table(
            "dead_letters_accepted",
            "stream text, kafka_partition int, up_to bigint, accepted_at timestamp, \
             PRIMARY KEY ((stream), kafka_partition)",
            "",
        ),
        table(
            "throughput",
            "stream text, resolution int, slot timestamp, at timestamp, kafka_partition int, total bigint, \
             PRIMARY KEY ((stream, resolution, slot), at, kafka_partition)",
            &format!(" WITH default_time_to_live = {longest_throughput}"),
        ),
        table(
            "batches",
            "stream text, hour timestamp, finished_at timestamp, kafka_partition int, first_offset bigint, \
             next_offset bigint, rows int, decode_ms double, lookup_ms double, write_ms double, commit_ms double, \
             PRIMARY KEY ((stream, hour), finished_at, kafka_partition)",
            " WITH default_time_to_live = 86400",
        ),
    ]
}

/// Who is alive, and who refused to run.
fn presence_tables(keyspace: &str) -> Vec<(String, String)> {
    let table = |name: &str, columns: &str, options: &str| table(keyspace, name, columns, options);
    vec![
        table(
            "services",
            "service text, instance text, version text, started_at timestamp, seen_at timestamp, ready boolean, \
             stream text, life text, partitions frozen<map<int, text>>, PRIMARY KEY ((service), instance)",
            &format!(" WITH default_time_to_live = {SERVICE_TTL_SECONDS} AND gc_grace_seconds = 600"),
        ),
        table(
            "refusals",
            "service text, instance text, reason text, at timestamp, PRIMARY KEY ((service), instance)",
            &format!(" WITH default_time_to_live = {REFUSAL_TTL_SECONDS}"),
        ),
    ]
}

/// The run ledger and the commands.
fn ingestion_tables(keyspace: &str) -> Vec<(String, String)> {
    let table = |name: &str, columns: &str, options: &str| table(keyspace, name, columns, options);
    vec![
        table(
            "ingest_runs",
            "stream text, day timestamp, interval_start timestamp, interval_end timestamp, state text, run_type text, \
             run_id text, attempt int, owner text, epoch bigint, lease_until timestamp, pages int, records bigint, \
             acked bigint, bytes bigint, error text, created_at timestamp, started_at timestamp, \
             finished_at timestamp, retry_at timestamp, PRIMARY KEY ((stream, day), interval_start)",
            "",
        ),
        table(
            "ingest_attempts",
            "stream text, day timestamp, interval_start timestamp, attempt int, run_id text, owner text, \
             outcome text, cause text, http_status int, pages int, records bigint, bytes bigint, \
             started_at timestamp, milliseconds bigint, PRIMARY KEY ((stream, day), interval_start, attempt)",
            "",
        ),
        table(
            "control_log",
            "stream text, day timestamp, issued_at timestamp, command_id text, command text, arguments text, \
             state text, outcome text, handled_by text, handled_at timestamp, \
             PRIMARY KEY ((stream, day), issued_at, command_id)",
            "",
        ),
    ]
}

/// The tables of one stream, as `(name, CREATE TABLE)`.
pub fn stream_tables(keyspace: &str, d: &Definition) -> Vec<(String, String)> {
    let name = &d.stream.name;
    let declared: String = d.columns.iter().map(|c| format!("{} {}, ", c.name, c.cql_type.name())).collect();
    let measures: String = d
        .windows
        .measures
        .iter()
        .map(|m| format!("{m}_count bigint, {m}_sum double, {m}_min double, {m}_max double, "))
        .collect();
    let ttl = d.store.ttl_seconds;
    // Without a TTL nothing expires as a whole; with one, a window a thirtieth of it keeps about thirty files.
    let compaction = if ttl == 0 {
        "{'class': 'UnifiedCompactionStrategy'}".to_owned()
    } else {
        let days = (ttl / 30 / 86_400).max(1);
        format!(
            "{{'class': 'TimeWindowCompactionStrategy', 'compaction_window_unit': 'DAYS', \
             'compaction_window_size': {days}}}"
        )
    };
    let panes = panes_table(d);
    vec![
        (
            name.clone(),
            format!(
                "CREATE TABLE IF NOT EXISTS {keyspace}.{name} (bucket timestamp, shard int, event_time timestamp, \
                 event_id text, {declared}kafka_offset bigint, run_id text, \
                 PRIMARY KEY ((bucket, shard), event_time, event_id)) \
                 WITH default_time_to_live = {ttl} AND compaction = {compaction}"
            ),
        ),
        (
            panes.clone(),
            format!(
                "CREATE TABLE IF NOT EXISTS {keyspace}.{panes} (bucket timestamp, kafka_partition int, \
                 pane_start timestamp, dimension text, value text, count bigint, {measures}upto bigint, \
                 PRIMARY KEY ((bucket, kafka_partition), pane_start, dimension, value)) \
                 WITH default_time_to_live = {ttl} AND compaction = {{'class': 'UnifiedCompactionStrategy'}}"
            ),
        ),
    ]
}

/// Name of a stream's pane table.
pub fn panes_table(d: &Definition) -> String {
    format!("{}_panes", d.stream.name)
}

/// Name of a topic's dead-letter topic.
pub fn dead_letter_topic(topic: &str) -> String {
    format!("{topic}.dlq")
}

/// The insert of one event row. Markers in order: bucket, shard, event_time, event_id, kafka_offset, run_id, the declared
/// columns in their order, time stamp (event time in µs).
pub fn insert_event(keyspace: &str, d: &Definition) -> String {
    let declared: String = d.columns.iter().map(|c| format!(", {}", c.name)).collect();
    let markers = ", ?".repeat(d.columns.len());
    format!(
        "INSERT INTO {keyspace}.{} (bucket, shard, event_time, event_id, kafka_offset, run_id{declared}) \
         VALUES (?, ?, ?, ?, ?, ?{markers}) USING TIMESTAMP ?",
        d.stream.name
    )
}

/// The insert of one pane row. Markers in order: bucket, kafka_partition, pane_start, dimension, value, count, upto, then
/// count, sum, min, max of each measure, then the time stamp (next offset).
pub fn insert_pane(keyspace: &str, d: &Definition) -> String {
    let measures: String =
        d.windows.measures.iter().map(|m| format!(", {m}_count, {m}_sum, {m}_min, {m}_max")).collect();
    let markers = ", ?".repeat(4 * d.windows.measures.len());
    format!(
        "INSERT INTO {keyspace}.{} (bucket, kafka_partition, pane_start, dimension, value, count, upto{measures}) \
         VALUES (?, ?, ?, ?, ?, ?, ?{markers}) USING TIMESTAMP ?",
        panes_table(d)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn definition() -> Definition {
        let text = include_str!("../../../streams/user_created.toml");
        Definition::parse("user_created.toml", text).unwrap()
    }

    #[test]
    fn the_tables_of_the_default_stream_are_these() {
        let d = definition();
        let mut text = String::new();
        for (_, cql) in shared_tables("pipeline").into_iter().chain(stream_tables("pipeline", &d)) {
            text.push_str(&cql);
            text.push_str(";\n");
        }
        insta::assert_snapshot!(text);
    }

    #[test]
    fn every_marker_of_an_insert_has_a_column() {
        let d = definition();
        for insert in [insert_event("k", &d), insert_pane("k", &d)] {
            let columns = insert.split('(').nth(1).unwrap().split(')').next().unwrap().split(',').count();
            assert_eq!(insert.matches('?').count(), columns + 1, "{insert}");
        }
    }
}
