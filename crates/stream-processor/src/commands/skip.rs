//! `skip` records a range of unreadable offsets that the processor must skip. The processor applies it when it opens
//! the partition again, and counts the offsets as skipped, never as events.

use crate::config::SkipArgs;
use crate::error::ProcessorError;
use crate::io::log_reader::LogReader;
use common::contracts::stream::Definition;
use common::readers::registry::registered;
use common::runtime::cassandra::connect;
use common::runtime::config::CommonArgs;
use common::runtime::shutdown::Shutdown;
use scylla::value::CqlTimestamp;
use std::io::Write;
use std::time::Duration;

/// Maximum duration of one request to Cassandra.
const DEADLINE: Duration = Duration::from_secs(20);

fn failed(cause: &dyn std::fmt::Display) -> ProcessorError {
    ProcessorError::Retryable(format!("cassandra: {cause}"))
}

/// The facts about the stream and the partition that bound a range.
#[derive(Debug, Clone, Copy)]
struct Known {
    /// Number of partitions of the stream.
    partitions: i32,
    /// Next offset of the progress row. All offsets below it were processed.
    next_offset: i64,
    /// End offset of the log.
    end: i64,
}

/// Records the range of `args`. Fails if part of it was already processed or is not in the log.
pub async fn skip(
    common: &CommonArgs,
    definition: &Definition,
    args: &SkipArgs,
    shutdown: &Shutdown,
) -> Result<(), ProcessorError> {
    let (stream, keyspace) = (&definition.stream.name, &common.keyspace);
    let session = connect(common, DEADLINE, shutdown).await?;
    let partitions = registered(&session, keyspace, stream).await.map_err(|e| failed(&e))?.partitions;
    let select = format!(
        "SELECT next_offset FROM {keyspace}.partition_progress WHERE stream = ? AND kafka_partition = ?"
    );
    let found = session.query_unpaged(select, (stream, args.partition)).await.map_err(|e| failed(&e))?;
    let found = found.into_rows_result().map_err(|e| failed(&e))?;
    let row = found.maybe_first_row::<(Option<i64>,)>().map_err(|e| failed(&e))?;
    let next_offset = row.and_then(|(next_offset,)| next_offset).unwrap_or(0);
    let topic = common.topic_of(definition);
    let end = tokio::task::block_in_place(|| {
        LogReader::open(&common.kafka_brokers, &topic, args.partition, None).map(|reader| reader.end)
    })?;
    check(args, Known { partitions, next_offset, end }).map_err(ProcessorError::Fatal)?;
    let insert = format!(
        "INSERT INTO {keyspace}.skipped_ranges \
         (stream, kafka_partition, from_offset, to_offset, reason, skipped_by, skipped_at) \
         VALUES (?, ?, ?, ?, ?, ?, ?)"
    );
    let now = CqlTimestamp(chrono::Utc::now().timestamp_millis());
    let values = (stream, args.partition, args.from, args.to, &args.reason, common.instance_name(), now);
    session.query_unpaged(insert, values).await.map_err(|e| failed(&e))?;
    writeln!(
        std::io::stdout(),
        "partition {}: offsets {} to {} will be skipped when the processor opens the partition again, \
         which takes up to a minute if it is halted there",
        args.partition,
        args.from,
        args.to - 1
    )
    .map_err(|e| ProcessorError::Fatal(format!("stdout: {e}")))
}

/// Checks a range. It must not include processed offsets, because their counts are final.
fn check(args: &SkipArgs, known: Known) -> Result<(), String> {
    let SkipArgs { partition, from, to, .. } = args;
    let Known { partitions, next_offset, end } = known;
    if !(0..partitions).contains(partition) {
        return Err(format!("partition {partition} does not exist; use 0 to {}", partitions - 1));
    }
    if from >= to {
        return Err(format!("--from {from} must be below --to {to}"));
    }
    if *from < next_offset {
        return Err(format!("--from {from}: everything below offset {next_offset} is processed already"));
    }
    if *to > end {
        return Err(format!("--to {to}: the log ends at offset {end}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_existing_unprocessed_offsets_can_be_skipped() {
        let known = Known { partitions: 6, next_offset: 100, end: 200 };
        let range =
            |partition, from, to| check(&SkipArgs { partition, from, to, reason: String::new() }, known);
        let check = |outcome: Result<(), String>, part: &str| {
            let error = outcome.unwrap_err();
            assert!(error.contains(part), "{error}");
        };
        assert_eq!(range(0, 100, 200), Ok(()));
        check(range(6, 100, 200), "partition 6 does not exist; use 0 to 5");
        check(range(0, 150, 150), "must be below");
        check(range(0, 99, 120), "below offset 100 is processed already");
        check(range(0, 100, 201), "the log ends at offset 200");
    }
}
