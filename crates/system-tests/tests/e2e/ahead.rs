//! Events ahead of time: a stream that accepts events of the next seven days.

use chrono::{DateTime, SecondsFormat};

use crate::harness::{Pipeline, TIMEOUT, now_ms, text, wait_until};

const MINUTE_MS: i64 = 60_000;
const DAY_MS: i64 = 86_400_000;
/// Events of each kind.
const COUNT: i64 = 20;
const PARTITION: i32 = 4;
/// Exit code of a command that is refused.
const REFUSED: i32 = 3;

#[tokio::test(flavor = "multi_thread")]
async fn events_of_the_next_days_count_once_and_make_no_event_of_the_present_late() {
    let pipeline =
        Pipeline::with_stream("ahead", |text| text.replace("[event]", "[event]\nahead = \"7d\"")).await;
    pipeline.init().await;
    let now = now_ms();
    // Six days and some minutes ahead, half an hour ahead, and up to a few minutes ago.
    let future = |n: i64| (format!("future-{n}"), now + 6 * DAY_MS + n * MINUTE_MS);
    let soon = |n: i64| (format!("soon-{n}"), now + 30 * MINUTE_MS + n);
    let present = |n: i64| (format!("present-{n}"), now - n * 1000);

    let mut processor = pipeline.processor("one");
    processor.ready().await;
    for n in 0..COUNT {
        for (id, time_ms) in [future(n), soon(n), present(n)] {
            pipeline.send_event(&id, time_ms).await;
        }
    }
    pipeline.send_event("too far", now + 8 * DAY_MS).await;
    pipeline.wait_for(3 * COUNT, 0).await;
    assert_eq!(pipeline.late().await, 0, "events of the present are late");
    processor.stop().await;

    pipeline.lose_checkpoints();
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    let more = |n: i64| (format!("more-{n}"), now - n * 1000);
    for n in 0..COUNT {
        for (id, time_ms) in [future(n), soon(n), present(n), more(n), future(COUNT + n)] {
            pipeline.send_event(&id, time_ms).await;
        }
    }
    pipeline.wait_for(5 * COUNT, 3 * COUNT).await;
    assert_eq!(pipeline.late().await, 0, "events of the present are late after the state was lost");
    assert_eq!(pipeline.progress().await.dead_letters, 1);
    pipeline.assert_counted_once(5 * COUNT).await;
    pipeline.verify().await;
    processor.stop().await;

    pipeline.set_stream_text(&pipeline.stream_text().replace("7d", "6d"));
    let refused = pipeline.run("stream-processor", &["init"], &[]).await;
    let stderr = text(&refused.stderr);
    assert!(refused.status.code() == Some(REFUSED) && stderr.contains("raised, not lowered"), "{stderr}");
}

impl Pipeline {
    async fn send_event(&self, id: &str, time_ms: i64) {
        let time = DateTime::from_timestamp_millis(time_ms).unwrap();
        let time = time.to_rfc3339_opts(SecondsFormat::Millis, true);
        let value = r#"{"first_name":"Ada","last_name":"Ahead"}"#;
        self.send_keyless(PARTITION, &[("ce_id", id), ("ce_time", &time)], value).await;
    }

    /// Waits until this many events and duplicates are counted.
    async fn wait_for(&self, events: i64, duplicates: i64) {
        wait_until("all records are processed", TIMEOUT, || async {
            let progress = self.progress().await;
            (progress.events, progress.duplicates) == (events, duplicates)
        })
        .await;
    }

    /// Number of late events of all partitions.
    async fn late(&self) -> i64 {
        let query = format!("SELECT late FROM {}.partition_progress", self.keyspace);
        let rows = self.session.query_unpaged(query, ()).await.unwrap().into_rows_result().unwrap();
        rows.rows::<(Option<i64>,)>().unwrap().map(|row| row.unwrap().0.unwrap_or(0)).sum()
    }
}
