//! Reads the row count that the page shows, and counts the rows of the event table. A figure of the page is untrue if
//! the event table, counted later, has fewer rows.

use futures::TryStreamExt;
use local_stack::config::{Settings, loopback};
use local_stack::error::Result;
use local_stack::servers::cassandra::failed;
use local_stack::servers::http_client;
use scylla::client::session::Session;
use scylla::value::CqlTimestamp;
use serde_json::Value;

use super::NAME;
use super::oracle::cassandra_partitions;

/// Returns the number of written rows that the page shows, or `None` if the page does not answer or does not know it.
pub(super) async fn rows_written(settings: &Settings) -> Option<i64> {
    let url = format!("http://{}/api/v1/overview", loopback(settings.ports.dashboard));
    let answer = http_client().ok()?.get(url).send().await.ok()?;
    let overview: Value = serde_json::from_str(&answer.text().await.ok()?).ok()?;
    overview.get("rows_written")?.as_i64()
}

/// Counts the rows of the event table, with one query per Cassandra partition.
pub(super) async fn count_rows(session: &Session, table: &str) -> Result<i64> {
    let count = format!("SELECT COUNT(*) FROM {NAME}.{table} WHERE bucket = ? AND shard = ?");
    let mut rows = 0;
    for (bucket, shard) in cassandra_partitions(session, table).await? {
        let pages =
            session.query_iter(count.as_str(), (CqlTimestamp(bucket), shard)).await.map_err(failed)?;
        let mut counted = pages.rows_stream::<(i64,)>().map_err(failed)?;
        while let Some((of_partition,)) = counted.try_next().await.map_err(failed)? {
            rows += of_partition;
        }
    }
    Ok(rows)
}
