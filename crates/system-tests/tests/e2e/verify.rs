//! `verify` finds differences in Cassandra within its memory limit, `verify --rebuild` repairs the panes, and a running
//! processor verifies the day before.

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::unix::process::ExitStatusExt;
use std::process::Output;

use chrono::{DateTime, SecondsFormat};
use scylla::value::CqlTimestamp;
use serde_json::Value;

use crate::harness::{LONG_TIMEOUT, Pipeline, TIMEOUT, now_ms, text, wait_until};

const EVENTS: i64 = 20_000;
const DAY: i64 = 86_400_000;
const ANY_TIME: Range<i64> = i64::MIN..i64::MAX;

#[tokio::test(flavor = "multi_thread")]
async fn verify_rebuilds_lost_panes_and_refuses_to_rebuild_after_lost_rows() {
    let pipeline = Pipeline::initialised("verify").await;
    pipeline.stress(EVENTS as u64).await;
    // The kill leaves the state file of one partition one batch ahead of its progress row.
    let mut killed = pipeline.processor_killed_at("before_publish=9");
    assert_eq!(killed.end().await.signal(), Some(9), "{}", killed.log_text());
    pipeline.cql(&format!("TRUNCATE {}.user_created_panes", pipeline.keyspace)).await;
    let found = pipeline.processor_command(&["verify"]).await;
    assert_eq!(found.status.code(), Some(1), "{found:?}");
    assert!(text(&found.stdout).contains("stored 0"), "{found:?}");
    let rebuilt = pipeline.processor_command(&["verify", "--rebuild"]).await;
    assert_eq!(rebuilt.status.code(), Some(0), "{rebuilt:?}");

    let mut processor = pipeline.processor("one");
    processor.ready().await;
    wait_until("the whole log is processed", LONG_TIMEOUT, || async {
        pipeline.progress().await.events >= EVENTS
    })
    .await;
    let refused = pipeline.processor_command(&["verify", "--rebuild"]).await;
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert!(text(&refused.stderr).contains("stop the processor first"), "{refused:?}");
    pipeline.assert_counted_once(EVENTS).await;
    pipeline.verify().await;
    processor.stop().await;

    pipeline.lose_a_row(ANY_TIME).await;
    let found = pipeline.processor_command(&["verify", "--kafka"]).await;
    assert_eq!(found.status.code(), Some(1), "{found:?}");
    assert!(text(&found.stdout).contains("is not in the table"), "{found:?}");
    let refused = pipeline.processor_command(&["verify", "--rebuild"]).await;
    assert_eq!(refused.status.code(), Some(3), "{refused:?}");
    assert!(text(&refused.stderr).contains("cannot be rebuilt from rows"), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_larger_than_the_memory_limit_is_verified_in_parts() {
    const EVENTS: i64 = 60_000;
    let pipeline = Pipeline::new("verify_parts").await;
    let init = pipeline.processor_command(&["init", "--partitions", "1"]).await;
    assert!(init.status.success(), "{init:?}");
    pipeline.stress_with(&["--messages", "60000", "--duplicates", "5"]).await;
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    wait_until("the whole log is processed", LONG_TIMEOUT, || async {
        pipeline.progress().await.next_offsets == EVENTS
    })
    .await;
    processor.stop().await;
    let outcome = pipeline.verify_as_json(&["--kafka", "--memory-mib", "1"], 0).await;
    assert_eq!(outcome["rows"], pipeline.progress().await.events, "{outcome}");
    assert_eq!((&outcome["records"], &outcome["differences"]), (&EVENTS.into(), &0.into()), "{outcome}");
    assert!(outcome["log_passes"].as_i64() > Some(1), "{outcome}");
    assert!(outcome["panes_in_parts"].as_i64() > Some(0), "{outcome}");

    // Verification in parts finds the same differences as verification in one pass.
    pipeline.lose_a_row(ANY_TIME).await;
    for memory in ["1", "256"] {
        let outcome = pipeline.verify_as_json(&["--kafka", "--memory-mib", memory], 1).await;
        let shown = outcome["shown"].to_string();
        assert!(shown.contains("=: stored ") && shown.contains("is not in the table"), "{outcome}");
        assert!(shown.contains("the progress row counts"), "{outcome}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_rows_are_a_difference_unless_their_ttl_may_have_expired() {
    const HOUR: i64 = 3_600_000;
    let pipeline = Pipeline::initialised("verify_expired").await;
    let pane = async |age_ms: i64| {
        let bucket = (now_ms() - age_ms).div_euclid(HOUR) * HOUR;
        let insert = format!(
            "INSERT INTO {}.user_created_panes (bucket, kafka_partition, pane_start, dimension, value, count, upto, age_count, \
             age_sum) VALUES ({bucket}, 2, {bucket}, '', '', 7, 9, 0, 0)",
            pipeline.keyspace
        );
        pipeline.cql(&insert).await;
        bucket
    };
    // The TTL of the stream is 365 days.
    pane(366 * DAY).await;
    let outcome = pipeline.verify_as_json(&[], 0).await;
    assert_eq!(outcome["not_compared"]["panes"], 1, "{outcome}");
    let lost = pane(300 * DAY).await;
    let outcome = pipeline.verify_as_json(&[], 1).await;
    assert_eq!(
        (&outcome["differences"], &outcome["not_compared"]["panes"]),
        (&1.into(), &1.into()),
        "{outcome}"
    );
    assert!(outcome["shown"][0].as_str().unwrap().contains("stored 7"), "{outcome}");

    let at =
        |ms: i64| DateTime::from_timestamp_millis(ms).unwrap().to_rfc3339_opts(SecondsFormat::Secs, true);
    let (from, to) = (at(lost), at(lost + 1000));
    let outcome = pipeline.verify_as_json(&["--from", &from, "--to", &to], 1).await;
    assert_eq!((&outcome["from"], &outcome["to"]), (&from.into(), &at(lost + 60_000).into()), "{outcome}");
    let outcome = pipeline.verify_as_json(&["--from", &to], 1).await;
    assert_eq!(outcome["differences"], 1, "the pane that contains `--from` must be compared: {outcome}");
    let outcome = pipeline.verify_as_json(&["--from", &at(lost + 60_000)], 0).await;
    assert_eq!(outcome["differences"], 0, "{outcome}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_processor_verifies_the_day_before_and_reports_a_lost_row() {
    const EVENTS: i64 = 3000;
    let pipeline = Pipeline::initialised("verify_daily").await;
    // Three days, so that the verified day has events even if the test runs at midnight.
    pipeline.stress_with(&["--messages", &EVENTS.to_string(), "--span", "72h"]).await;
    let mut processor = pipeline.processor_with("one", &[("PIPELINE_VERIFY_AT", "off".to_owned())]);
    processor.ready().await;
    wait_until("the whole log is processed", LONG_TIMEOUT, || async {
        pipeline.progress().await.events >= EVENTS
    })
    .await;
    assert_eq!(processor.metric("processor_verification_enabled").await, Some(0.0));
    processor.stop().await;

    let at = DateTime::from_timestamp_millis(now_ms() + 15_000).unwrap();
    let day = at.timestamp_millis().div_euclid(DAY) * DAY - DAY;
    let partition = pipeline.lose_a_row(day..day + DAY).await;
    let verify_at = [("PIPELINE_VERIFY_AT", at.format("%H:%M:%S").to_string())];
    let mut processor = pipeline.processor_with("one", &verify_at);
    processor.ready().await;
    wait_until("the day before is verified", LONG_TIMEOUT, || async {
        pipeline.verified(day).await.len() == 6
    })
    .await;
    let verified = pipeline.verified(day).await;
    let rows: i64 = pipeline.panes_of_rows().await.range(day..day + DAY).map(|(_, count)| count).sum();
    assert_eq!(verified.values().map(|(rows, _)| rows).sum::<i64>(), rows, "{verified:?}");
    for (verified_partition, (_, differences)) in &verified {
        assert_eq!(*differences > 0, *verified_partition == partition, "{verified:?}");
    }
    let gauge = async |name: &str| processor.metric(&format!("{name}{{partition=\"{partition}\"}}")).await;
    wait_until("the outcome is exported", TIMEOUT, || async {
        processor.metric("processor_unverified_partitions").await == Some(0.0)
    })
    .await;
    let (rows, differences) = verified[&partition];
    assert_eq!(gauge("processor_verified_rows").await, Some(rows as f64));
    assert_eq!(gauge("processor_verification_differences").await, Some(differences as f64));
    assert!(gauge("processor_last_verification_timestamp_seconds").await >= Some(at.timestamp() as f64));
    assert!(processor.log_text().contains("a stored pane differs from its event rows"));
    processor.stop().await;
}

impl Pipeline {
    /// Runs `verify --json`, which must exit with this code. Returns its report.
    async fn verify_as_json(&self, arguments: &[&str], code: i32) -> Value {
        let output = self.processor_command(&[&["verify", "--json"], arguments].concat()).await;
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"))
    }

    async fn processor_command(&self, arguments: &[&str]) -> Output {
        self.run("stream-processor", arguments, &[]).await
    }

    async fn cql(&self, statement: &str) {
        self.session.query_unpaged(statement, ()).await.unwrap();
    }

    /// Deletes one event row with an event time in `times`. Returns its Kafka partition.
    async fn lose_a_row(&self, times: Range<i64>) -> i32 {
        type Key = (CqlTimestamp, i32, CqlTimestamp, String);
        let table = format!("{}.user_created", self.keyspace);
        let select = format!("SELECT bucket, shard, event_time, event_id FROM {table}");
        let rows = self.session.query_unpaged(select, ()).await.unwrap().into_rows_result().unwrap();
        let mut keys = rows.rows::<Key>().unwrap().map(Result::unwrap);
        let key = keys.find(|(_, _, time, _)| times.contains(&time.0)).expect("a row to delete");
        let partition = key.1 / i32::try_from(self.definition.store.shards).unwrap();
        // The write time of a row is its event time, so a deletion with the current time is later.
        let delete =
            format!("DELETE FROM {table} WHERE bucket = ? AND shard = ? AND event_time = ? AND event_id = ?");
        self.session.query_unpaged(delete, key).await.unwrap();
        partition
    }

    /// Rows and differences of each partition that was verified for a day, from table `verifications`.
    async fn verified(&self, day_ms: i64) -> BTreeMap<i32, (i64, i64)> {
        let select = format!(
            "SELECT kafka_partition, rows, differences, first_differences FROM {}.verifications \
             WHERE stream = 'user_created' AND day = ?",
            self.keyspace
        );
        let rows = self.session.query_unpaged(select, (CqlTimestamp(day_ms),)).await.unwrap();
        let rows = rows.into_rows_result().unwrap();
        let rows = rows.rows::<(i32, i64, i64, String)>().unwrap().map(|row| {
            let (partition, rows, differences, first) = row.unwrap();
            assert_eq!(first.contains("stored"), differences > 0, "{first}");
            (partition, (rows, differences))
        });
        rows.collect()
    }
}
