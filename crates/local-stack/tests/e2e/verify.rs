//! `verify` finds what is wrong in Cassandra, and `--rebuild` mends what can be mended.

use std::os::unix::process::ExitStatusExt;
use std::process::Output;

use crate::harness::{PATIENT, Pipeline, text, wait_until};

const EVENTS: i64 = 20_000;

#[tokio::test(flavor = "multi_thread")]
async fn lost_panes_are_found_and_rebuilt_and_lost_rows_are_found_and_refused() {
    let pipeline = Pipeline::initialised("verify").await;
    pipeline.stress(EVENTS as u64).await;
    // The state file of one partition is a batch ahead of its progress row.
    let mut killed = pipeline.processor_killed_at("before_publish=9");
    assert_eq!(killed.end().await.signal(), Some(9), "{}", killed.words());
    pipeline.cql(&format!("TRUNCATE {}.user_created_panes", pipeline.keyspace)).await;
    let found = pipeline.ask(&["verify"]).await;
    assert_eq!(found.status.code(), Some(1), "{found:?}");
    assert!(text(&found.stdout).contains("stored 0"), "{found:?}");
    let rebuilt = pipeline.ask(&["verify", "--rebuild"]).await;
    assert_eq!(rebuilt.status.code(), Some(0), "{rebuilt:?}");

    let mut processor = pipeline.processor("one");
    processor.ready().await;
    wait_until("all is processed", PATIENT, || async { pipeline.progress().await.events >= EVENTS }).await;
    let beside = pipeline.ask(&["verify", "--rebuild"]).await;
    assert_eq!(beside.status.code(), Some(1), "{beside:?}");
    assert!(text(&beside.stderr).contains("stop the processor first"), "{beside:?}");
    pipeline.assert_counted_once(EVENTS).await;
    pipeline.verify().await;
    processor.stop().await;

    pipeline.lose_a_row().await;
    let found = pipeline.ask(&["verify", "--kafka"]).await;
    assert_eq!(found.status.code(), Some(1), "{found:?}");
    assert!(text(&found.stdout).contains("is not in the table"), "{found:?}");
    let refused = pipeline.ask(&["verify", "--rebuild"]).await;
    assert_eq!(refused.status.code(), Some(3), "{refused:?}");
    assert!(text(&refused.stderr).contains("cannot be rebuilt from rows"), "{refused:?}");
}

impl Pipeline {
    async fn ask(&self, arguments: &[&str]) -> Output {
        self.run("stream-processor", arguments, &[]).await
    }

    async fn cql(&self, statement: &str) {
        self.session.query_unpaged(statement, ()).await.unwrap();
    }

    async fn lose_a_row(&self) {
        type Key = (scylla::value::CqlTimestamp, i32, scylla::value::CqlTimestamp, String);
        let table = format!("{}.user_created", self.keyspace);
        let select = format!("SELECT bucket, shard, event_time, event_id FROM {table} LIMIT 1");
        let rows = self.session.query_unpaged(select, ()).await.unwrap().into_rows_result().unwrap();
        let key = rows.single_row::<Key>().unwrap();
        // Rows are stamped with event times: the present is later.
        let delete =
            format!("DELETE FROM {table} WHERE bucket = ? AND shard = ? AND event_time = ? AND event_id = ?");
        self.session.query_unpaged(delete, key).await.unwrap();
    }
}
