//! Commands of the control topic: done once, refused with a reason, never lost with their producer.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::harness::{PATIENT, Pipeline, SOON, now_ms, text, wait_for, wait_until};
use crate::ingest::{rfc3339, short_intervals};

const STREAM: &str = "user_created";

/// A command as another program would send it.
fn command(id: u128, lifetime_ms: i64, action: &Value) -> String {
    let (id, now) = (uuid::Uuid::from_u128(id).to_string(), now_ms());
    json!({"id": id, "stream": STREAM, "issued_by": "e2e", "issued_at_ms": now, "expires_at_ms": now + lifetime_ms,
           "action": action})
    .to_string()
}

impl Pipeline {
    /// `control_log` by command id, with state and outcome, as the command line shows it.
    async fn commands(&self) -> BTreeMap<String, (String, String)> {
        let output = self.run("ingest-producer", &["control", "log", "--json", "--limit", "100"], &[]).await;
        assert!(output.status.success(), "{}", text(&output.stderr));
        let rows: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
        let word = |row: &Value, name: &str| row[name].as_str().unwrap().to_owned();
        rows.iter().map(|row| (word(row, "id"), (word(row, "state"), word(row, "outcome")))).collect()
    }

    /// Sends a command and waits for its outcome: exit code and what was printed.
    async fn control(&self, arguments: &[&str]) -> (Option<i32>, String) {
        let arguments = [&["control", "--wait"], arguments].concat();
        let output = self.run("ingest-producer", &arguments, &[]).await;
        (output.status.code(), format!("{}{}", text(&output.stdout), text(&output.stderr)))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_are_done_once_refused_with_a_reason_and_never_lost() {
    // An hourly schedule that catches up nothing: what arrives comes from commands.
    let edit = |text: String| {
        text.replace("every = \"1m\"", "every = \"1h\"")
            .replace("catch_up = 10", "catch_up = 0")
            .replace("lateness = \"10m\"", "lateness = \"3h\"")
    };
    let pipeline = Pipeline::with_stream("control", edit).await;
    pipeline.init().await;
    let topic = format!("{}.control", pipeline.topic);
    // Sent while no producer runs: the bad ones must hold up none of the good ones.
    let sent: Vec<(u128, &str, String)> = vec![
        (0, "no JSON", "\u{1} {".to_owned()),
        (1, "no command: unknown variant `explode`", command(1, 60_000, &json!({"explode": {}}))),
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
    let good = command(4, 60_000, &json!({"produce": {"messages": 1000}}));
    pipeline.send_to(&topic, good.clone()).await;
    pipeline.send_to(&topic, good).await;
    let mut producer = pipeline.producer();
    producer.ready().await;
    let produced = uuid::Uuid::from_u128(4).to_string();
    wait_until("the good command is done", SOON, || async {
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
    assert_eq!(pipeline.log_end(&pipeline.topic).await, 1000, "sent twice, done once");

    let (code, words) = pipeline.control(&["spike", "--rate", "500", "--seconds", "2"]).await;
    assert!(code == Some(0) && words.contains("done: 1000 messages"), "{words}");
    assert_eq!(pipeline.log_end(&pipeline.topic).await, 2000);
    pause_and_cancel(&pipeline, producer).await;
}

/// Pausing outlives the producer; a spike is cancelled, another is cut by a kill; nothing of it runs again.
async fn pause_and_cancel(pipeline: &Pipeline, producer: crate::harness::Service) {
    let (code, words) = pipeline.control(&["pause"]).await;
    assert_eq!(code, Some(0), "{words}");
    producer.kill().await;
    let mut producer = pipeline.producer();
    producer.ready().await;
    wait_until("a new life is paused too", SOON, || async {
        producer.metric("ingest_paused").await == Some(1.0)
    })
    .await;
    let (code, words) = pipeline.control(&["resume"]).await;
    assert_eq!(code, Some(0), "{words}");
    wait_until("it goes on", SOON, || async { producer.metric("ingest_paused").await == Some(0.0) }).await;

    let spike = ["control", "spike", "--rate", "200", "--seconds", "600"];
    assert!(pipeline.run("ingest-producer", &spike, &[]).await.status.success());
    let running = running(pipeline).await;
    let (code, words) = pipeline.control(&["spike", "--rate", "1", "--seconds", "1"]).await;
    assert!(code == Some(1) && words.contains("refused") && words.contains(&running), "{words}");
    let (code, words) = pipeline.control(&["cancel"]).await;
    assert!(code == Some(0) && words.contains("1 command cancelled"), "{words}");
    wait_until("the spike has ended", SOON, || async {
        pipeline.commands().await[&running].1.contains("messages")
    })
    .await;
    assert_eq!(pipeline.commands().await[&running].0, "cancelled");

    assert!(pipeline.run("ingest-producer", &spike, &[]).await.status.success());
    let cut = self::running(pipeline).await;
    let before = pipeline.log_end(&pipeline.topic).await;
    wait_until("some of it is sent", SOON, || async { pipeline.log_end(&pipeline.topic).await > before })
        .await;
    producer.kill().await;
    let left = pipeline.log_end(&pipeline.topic).await;
    let mut producer = pipeline.producer();
    producer.ready().await;
    wait_until("the spike is interrupted", PATIENT, || async {
        pipeline.commands().await[&cut].0 == "interrupted"
    })
    .await;
    let (code, words) = pipeline.control(&["pause"]).await;
    assert_eq!(code, Some(0), "later commands are not held up: {words}");
    assert_eq!(pipeline.log_end(&pipeline.topic).await, left, "the spike began again");
    producer.stop().await;
}

/// The id of the only command that goes on.
async fn running(pipeline: &Pipeline) -> String {
    wait_for("a command goes on", SOON, || async {
        let log = pipeline.commands().await;
        log.into_iter().find(|(_, (state, _))| state == "running").map(|(id, _)| id)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_producer_carries_out_a_backfill_and_runs_what_was_cleared() {
    let edit = |text| short_intervals(text, "2s").replace("catch_up = 2000", "catch_up = 5");
    let pipeline = Pipeline::with_stream("control_runs", edit).await;
    pipeline.init().await;
    let _source = pipeline.source().await;
    let mut producer = pipeline.producer();
    producer.ready().await;
    wait_until("the schedule runs", SOON, || async {
        pipeline.runs().await.values().filter(|run| run.state == "succeeded").count() >= 5
    })
    .await;
    let (first_ms, length_ms) = (*pipeline.runs().await.keys().next().unwrap(), pipeline.interval_ms());

    // Before the first interval of the schedule: only the backfill can have run them.
    let (from, to) = (rfc3339(first_ms - 5 * length_ms), rfc3339(first_ms));
    let (code, words) = pipeline.control(&["backfill", "--from", &from, "--to", &to]).await;
    assert!(code == Some(0) && words.contains("done: backfill: 5 succeeded, 0 failed"), "{words}");
    let runs = pipeline.runs().await;
    let backfilled: Vec<_> = runs.range(..first_ms).map(|(_, run)| run).collect();
    assert_eq!(backfilled.len(), 5, "{backfilled:?}");
    for run in backfilled {
        assert!(run.state == "succeeded" && run.run_type == "backfill" && run.acked == 10, "{run:?}");
    }

    let (from, to) = (rfc3339(first_ms), rfc3339(first_ms + 2 * length_ms));
    let (code, words) = pipeline.control(&["clear", "--from", &from, "--to", &to]).await;
    assert!(code == Some(0) && words.contains("done: 2 runs cleared"), "{words}");
    for start_ms in [first_ms, first_ms + length_ms] {
        wait_until("a cleared run succeeds again", SOON, || async {
            let attempts = pipeline.attempts().await;
            let outcomes: Vec<&str> = attempts[&start_ms].iter().map(|a| a.outcome.as_str()).collect();
            outcomes == ["succeeded", "cleared", "succeeded"]
                && pipeline.runs().await[&start_ms].state == "succeeded"
        })
        .await;
    }
    producer.stop().await;
}
