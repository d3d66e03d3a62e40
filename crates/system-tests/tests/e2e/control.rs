//! Commands of the control topic. They run once, are refused with a reason, and survive a crash of the producer.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::harness::{LONG_TIMEOUT, Pipeline, TIMEOUT, now_ms, text, wait_for, wait_until};
use crate::ingest::{rfc3339, short_intervals};

const STREAM: &str = "user_created";

/// A command in the JSON form of the control topic.
fn command(id: u128, lifetime_ms: i64, action: &Value) -> String {
    let (id, now) = (uuid::Uuid::from_u128(id).to_string(), now_ms());
    json!({"id": id, "stream": STREAM, "issued_by": "e2e", "issued_at_ms": now, "expires_at_ms": now + lifetime_ms,
           "action": action})
    .to_string()
}

impl Pipeline {
    /// State and outcome of each command by command id, from `ingest-producer control log`.
    async fn commands(&self) -> BTreeMap<String, (String, String)> {
        let output = self.run("ingest-producer", &["control", "log", "--json", "--limit", "100"], &[]).await;
        assert!(output.status.success(), "{}", text(&output.stderr));
        let rows: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
        let field = |row: &Value, name: &str| row[name].as_str().unwrap().to_owned();
        rows.iter().map(|row| (field(row, "id"), (field(row, "state"), field(row, "outcome")))).collect()
    }

    /// Sends a command and waits for its outcome. Returns the exit code and the output.
    async fn control(&self, arguments: &[&str]) -> (Option<i32>, String) {
        let arguments = [&["control", "--wait"], arguments].concat();
        let output = self.run("ingest-producer", &arguments, &[]).await;
        (output.status.code(), format!("{}{}", text(&output.stdout), text(&output.stderr)))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_run_once_or_are_refused_with_a_reason() {
    // The hourly schedule without catch-up fetches nothing during the test. All records come from commands.
    let edit = |text: String| {
        text.replace("every = \"1m\"", "every = \"1h\"")
            .replace("catch_up = 10", "catch_up = 0")
            .replace("lateness = \"10m\"", "lateness = \"3h\"")
    };
    let pipeline = Pipeline::with_stream("control", edit).await;
    pipeline.init().await;
    let topic = format!("{}.control", pipeline.topic);
    // No producer runs yet. The invalid commands must not block the valid ones.
    let sent: Vec<(u128, &str, String)> = vec![
        (0, "not valid JSON", "\u{1} {".to_owned()),
        (1, "not a valid command: unknown variant `explode`", command(1, 60_000, &json!({"explode": {}}))),
        (2, "expired", command(2, 1, &json!("pause"))),
        (
            3,
            "`rate` 100001 is out of bounds",
            command(3, 60_000, &json!({"spike": {"rate": 100_001, "seconds": 1}})),
        ),
    ];
    for (_, _, value) in &sent {
        pipeline.send_to(&topic, value.clone()).await;
    }
    let valid = command(4, 60_000, &json!({"produce": {"messages": 1000}}));
    pipeline.send_to(&topic, valid.clone()).await;
    pipeline.send_to(&topic, valid).await;
    let mut producer = pipeline.producer();
    producer.ready().await;
    let produced = uuid::Uuid::from_u128(4).to_string();
    wait_until("the valid command is done", TIMEOUT, || async {
        pipeline.commands().await.get(&produced).is_some_and(|(state, _)| state == "done")
    })
    .await;
    let log = pipeline.commands().await;
    for (id, reason, _) in &sent {
        let id = if *id == 0 { "offset-0".to_owned() } else { uuid::Uuid::from_u128(*id).to_string() };
        let (state, outcome) = &log[&id];
        assert!(state == "refused" && outcome.contains(reason), "{id}: {state}: {outcome}");
    }
    assert_eq!(log.len(), 5, "{log:?}");
    assert_eq!(pipeline.log_end(&pipeline.topic).await, 1000, "a command that was sent twice runs once");

    let (code, printed) = pipeline.control(&["spike", "--rate", "500", "--seconds", "2"]).await;
    assert!(code == Some(0) && printed.contains("done: 1000 messages"), "{printed}");
    assert_eq!(pipeline.log_end(&pipeline.topic).await, 2000);
    pause_and_cancel(&pipeline, producer).await;
}

/// A pause survives a restart of the producer. One spike is cancelled and another is interrupted by a kill. Neither
/// starts again.
async fn pause_and_cancel(pipeline: &Pipeline, producer: crate::harness::Service) {
    let (code, printed) = pipeline.control(&["pause"]).await;
    assert_eq!(code, Some(0), "{printed}");
    producer.kill().await;
    let mut producer = pipeline.producer();
    producer.ready().await;
    wait_until("the restarted producer is paused too", TIMEOUT, || async {
        producer.metric("ingest_paused").await == Some(1.0)
    })
    .await;
    let (code, printed) = pipeline.control(&["resume"]).await;
    assert_eq!(code, Some(0), "{printed}");
    wait_until("the producer is resumed", TIMEOUT, || async {
        producer.metric("ingest_paused").await == Some(0.0)
    })
    .await;

    let spike = ["control", "spike", "--rate", "200", "--seconds", "600"];
    assert!(pipeline.run("ingest-producer", &spike, &[]).await.status.success());
    let running = running(pipeline).await;
    let (code, printed) = pipeline.control(&["spike", "--rate", "1", "--seconds", "1"]).await;
    assert!(code == Some(1) && printed.contains("refused") && printed.contains(&running), "{printed}");
    let (code, printed) = pipeline.control(&["cancel"]).await;
    assert!(code == Some(0) && printed.contains("1 command cancelled"), "{printed}");
    wait_until("the spike has ended", TIMEOUT, || async {
        pipeline.commands().await[&running].1.contains("messages")
    })
    .await;
    assert_eq!(pipeline.commands().await[&running].0, "cancelled");

    assert!(pipeline.run("ingest-producer", &spike, &[]).await.status.success());
    let interrupted = self::running(pipeline).await;
    let before = pipeline.log_end(&pipeline.topic).await;
    wait_until("part of the spike is sent", TIMEOUT, || async {
        pipeline.log_end(&pipeline.topic).await > before
    })
    .await;
    producer.kill().await;
    let at_kill = pipeline.log_end(&pipeline.topic).await;
    let mut producer = pipeline.producer();
    producer.ready().await;
    wait_until("the spike is interrupted", LONG_TIMEOUT, || async {
        pipeline.commands().await[&interrupted].0 == "interrupted"
    })
    .await;
    let (code, printed) = pipeline.control(&["pause"]).await;
    assert_eq!(code, Some(0), "the interrupted spike blocks later commands: {printed}");
    assert_eq!(pipeline.log_end(&pipeline.topic).await, at_kill, "the spike started again");
    producer.stop().await;
}

/// The id of the only running command.
async fn running(pipeline: &Pipeline) -> String {
    wait_for("a command runs", TIMEOUT, || async {
        let log = pipeline.commands().await;
        log.into_iter().find(|(_, (state, _))| state == "running").map(|(id, _)| id)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_producer_executes_backfill_and_clear_commands() {
    let edit = |text| short_intervals(text, "2s").replace("catch_up = 2000", "catch_up = 5");
    let pipeline = Pipeline::with_stream("control_runs", edit).await;
    pipeline.init().await;
    let _source = pipeline.source().await;
    let mut producer = pipeline.producer();
    producer.ready().await;
    wait_until("the schedule runs", TIMEOUT, || async {
        pipeline.runs().await.values().filter(|run| run.state == "succeeded").count() >= 5
    })
    .await;
    let (first_ms, length_ms) = (*pipeline.runs().await.keys().next().unwrap(), pipeline.interval_ms());

    // These intervals are older than the first one of the schedule. Only the backfill can run them.
    let (from, to) = (rfc3339(first_ms - 5 * length_ms), rfc3339(first_ms));
    let (code, printed) = pipeline.control(&["backfill", "--from", &from, "--to", &to]).await;
    assert!(code == Some(0) && printed.contains("done: backfill: 5 succeeded, 0 failed"), "{printed}");
    let runs = pipeline.runs().await;
    let backfilled: Vec<_> = runs.range(..first_ms).map(|(_, run)| run).collect();
    assert_eq!(backfilled.len(), 5, "{backfilled:?}");
    for run in backfilled {
        assert!(run.state == "succeeded" && run.run_type == "backfill" && run.acked == 10, "{run:?}");
    }

    let (from, to) = (rfc3339(first_ms), rfc3339(first_ms + 2 * length_ms));
    let (code, printed) = pipeline.control(&["clear", "--from", &from, "--to", &to]).await;
    assert!(code == Some(0) && printed.contains("done: 2 runs cleared"), "{printed}");
    for start_ms in [first_ms, first_ms + length_ms] {
        wait_until("a cleared run succeeds again", TIMEOUT, || async {
            let attempts = pipeline.attempts().await;
            let outcomes: Vec<&str> = attempts[&start_ms].iter().map(|a| a.outcome.as_str()).collect();
            outcomes == ["succeeded", "cleared", "succeeded"]
                && pipeline.runs().await[&start_ms].state == "succeeded"
        })
        .await;
    }
    producer.stop().await;
}
