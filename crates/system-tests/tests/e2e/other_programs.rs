//! Records that other programs write to the topic of a stream: CloudEvents in binary and structured mode, and plain JSON.

use serde_json::{Value, json};

use crate::harness::{Pipeline, TIMEOUT, now_ms, text, wait_until};

const CUSTOMER: &str = "7a0f0e8e-0f83-4dd3-90c2-2a4f3a4f2b1c";
const ENVELOPE: (&str, &str) = ("content-type", "application/cloudevents+json; charset=UTF-8");
/// Exit code of a command that is refused.
const REFUSED: i32 = 3;

/// An order as the source returns it.
fn plain(id: &str, time: &str) -> String {
    let order = json!({
        "order": {"id": id, "placed_at": time, "status": "paid", "total": {"amount": 12.5}, "lines": {"count": 3}},
        "customer": {"id": CUSTOMER},
    });
    order.to_string()
}

/// The declared columns of the same order.
fn columns() -> Value {
    json!({"customer_id": CUSTOMER, "status": "paid", "amount": 12.5, "items": 3})
}

/// The same order as a CloudEvent.
fn envelope(id: &str, time: &str) -> String {
    let event = json!({
        "specversion": "1.0", "source": "/shop", "type": "order.placed", "id": id, "time": time, "data": columns(),
    });
    event.to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_of_another_program_counts_once_in_whichever_accepted_mode_it_arrives() {
    const ORDERS: i64 = 10;
    let mut pipeline = Pipeline::with_file("others", "orders", |text| text).await;
    pipeline.init().await;
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    let time = chrono::DateTime::from_timestamp_millis(now_ms()).unwrap().to_rfc3339();
    pipeline.send_keyless(2, &[ENVELOPE], &envelope("early-1", &time)).await;
    pipeline.send_keyless(2, &[], &plain("early-2", &time)).await;
    let dead_letters = || async { pipeline.progress().await.dead_letters == 2 };
    wait_until("records in other modes are dead letters", TIMEOUT, dead_letters).await;
    let listed = pipeline.run("stream-processor", &["dlq", "list"], &[]).await;
    for mode in ["structured", "plain"] {
        let reason = format!("event.accept does not contain \"{mode}\"");
        assert!(text(&listed.stdout).replace(['\n', '│'], " ").contains(&reason), "{}", text(&listed.stdout));
    }

    let narrow = pipeline.stream_text();
    let accept = "[event]\naccept = [\"binary\", \"structured\", \"plain\"]";
    pipeline.edit_stream(|text| text.replace("[event]", accept));
    pipeline.init().await;
    processor.end().await;
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    for number in 0..ORDERS {
        let id = format!("order-{number}");
        let attributes = [("ce_id", id.as_str()), ("ce_time", time.as_str())];
        pipeline.send_keyless(3, &[], &plain(&id, &time)).await;
        pipeline.send_keyless(3, &attributes, &columns().to_string()).await;
        pipeline.send_keyless(3, &[ENVELOPE], &envelope(&id, &time)).await;
    }
    let replayed = pipeline.run("stream-processor", &["dlq", "replay", "--all"], &[]).await;
    assert!(replayed.status.success(), "{}", text(&replayed.stderr));
    wait_until("all records are processed", TIMEOUT, || async {
        let progress = pipeline.progress().await;
        (progress.events, progress.duplicates, progress.dead_letters) == (ORDERS + 2, 2 * ORDERS, 2)
    })
    .await;
    pipeline.assert_counted_once(ORDERS + 2).await;
    pipeline.assert_all_orders_are_equal().await;
    // With `--kafka`, the two former dead letters would be differences.
    let verified = pipeline.run("stream-processor", &["verify"], &[]).await;
    assert!(verified.status.success(), "{}", text(&verified.stdout));
    processor.stop().await;

    pipeline.set_stream_text(&narrow);
    let refused = pipeline.run("stream-processor", &["init"], &[]).await;
    assert_eq!(refused.status.code(), Some(REFUSED), "{}", text(&refused.stderr));
    let stderr = text(&refused.stderr);
    assert!(stderr.contains("event.accept") && stderr.contains("now without it; add it again"), "{stderr}");
}

impl Pipeline {
    /// Asserts that every row has the columns of [`columns`].
    async fn assert_all_orders_are_equal(&self) {
        let query = format!(
            "SELECT JSON customer_id, status, amount, items FROM {}.{}",
            self.keyspace, self.definition.stream.name
        );
        let rows = self.session.query_unpaged(query, ()).await.unwrap().into_rows_result().unwrap();
        for row in rows.rows::<(String,)>().unwrap() {
            let row: Value = serde_json::from_str(&row.unwrap().0).unwrap();
            assert_eq!(row, columns());
        }
    }
}
