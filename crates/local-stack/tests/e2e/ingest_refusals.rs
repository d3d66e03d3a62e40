//! What the producer must not do: produce into a topic that is not the registered one, or tell a secret.

use std::fs;

use rdkafka::admin::{AdminClient, AdminOptions, NewPartitions};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::ClientConfig;
use serde_json::json;

use crate::harness::{PATIENT, Pipeline, SOON, text, wait_until};
use crate::ingest::short_intervals;

/// The exit code of a refusal.
const REFUSED: i32 = 3;

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_produced_once_partitions_were_added_and_the_cause_names_both_sides() {
    let edit = |text| short_intervals(text, "2s").replace("catch_up = 2000", "catch_up = 3");
    let pipeline = Pipeline::with_stream("partitions", edit).await;
    pipeline.init().await;
    let _source = pipeline.source().await;
    let mut producer = pipeline.producer();
    producer.ready().await;
    let in_state = async |state: &str| {
        pipeline.runs().await.into_values().filter(|run| run.state == state).collect::<Vec<_>>()
    };
    wait_until("runs succeed", SOON, || async { in_state("succeeded").await.len() >= 4 }).await;

    let admin: AdminClient<DefaultClientContext> =
        ClientConfig::new().set("bootstrap.servers", &pipeline.kafka).create().unwrap();
    let more = [NewPartitions::new(&pipeline.topic, 12)];
    let added = admin.create_partitions(&more, &AdminOptions::new()).await.unwrap();
    assert!(added.iter().all(Result::is_ok), "{added:?}");
    wait_until("a run fails", PATIENT, || async { !in_state("failed").await.is_empty() }).await;
    let end = pipeline.log_end(&pipeline.topic).await;
    wait_until("more intervals fail", PATIENT, || async { in_state("failed").await.len() >= 3 }).await;
    let way_out = "give the stream a new name, or delete the topic, create it again with 6 partitions";
    for run in in_state("failed").await {
        let words = ["has 12 partitions", "registered with 6", way_out];
        assert!(words.iter().all(|words| run.error.contains(words)), "{run:?}");
    }

    let spike = ["control", "--wait", "spike", "--rate", "100", "--seconds", "1"];
    let spike = pipeline.run("ingest-producer", &spike, &[]).await;
    let words = text(&spike.stdout);
    assert!(spike.status.code() == Some(1) && words.contains("has 12 partitions"), "{words}");
    producer.kill().await;
    let listen = [("PIPELINE_HTTP_LISTEN", "127.0.0.1:0".to_owned())];
    for arguments in [&["run"][..], &["stress", "--messages", "100"]] {
        let output = pipeline.run("ingest-producer", arguments, &listen).await;
        let words = text(&output.stderr);
        assert!(words.contains(way_out) && !words.contains("PIPELINE_PARTITIONS"), "{arguments:?}: {words}");
        assert_eq!(output.status.code(), Some(REFUSED), "{arguments:?}: {words}");
    }
    assert_eq!(pipeline.log_end(&pipeline.topic).await, end, "something was produced all the same");
    let ends = pipeline.ends(&pipeline.topic).await;
    assert!(ends.len() == 12 && ends.range(6..).all(|(_, end)| *end == 0), "{ends:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_in_the_query_stands_in_no_log_no_ledger_and_no_output() {
    const KEY: &str = "s3cret-key";
    let url = "/api/?results={page_size}";
    let edit = |text: String| short_intervals(text, "2s").replace("catch_up = 2000", "catch_up = 3");
    let literal = edit(fs::read_to_string(crate::harness::shipped("user_created")).unwrap())
        .replace(url, &format!("/api/?api_key={KEY}&results={{page_size}}"));
    let mut pipeline = Pipeline::with_stream("secret", edit).await;
    pipeline.init().await;
    let shipped = pipeline.stream_text();
    pipeline.set_stream_text(&literal);
    let refused = pipeline.run("ingest-producer", &["source", "check"], &[]).await;
    let words = text(&refused.stderr);
    assert!(!refused.status.success() && words.contains("query = \"api_key\", key_file = "), "{words}");
    assert!(!words.contains(KEY), "{words}");

    let file = pipeline.folder.join("key");
    fs::write(&file, KEY).unwrap();
    pipeline.set_stream_text(&shipped);
    pipeline.edit_stream(|text| {
        let auth = format!(
            "auth = {{ kind = \"api_key\", query = \"api_key\", key_file = \"{}\" }}",
            file.display()
        );
        text.replace("allow_private = true", &format!("allow_private = true\n{auth}"))
    });
    let source = pipeline.source().await;
    let checked = pipeline.run("ingest-producer", &["source", "check"], &[]).await;
    let mut said = text(&checked.stdout) + &text(&checked.stderr);
    assert!(checked.status.success() && said.contains("results=…"), "{said}");
    let debug = [("PIPELINE_LOG", "debug".to_owned())];
    let mut producer = pipeline.producer_with("one", &debug);
    producer.ready().await;
    let any = async |state: &str| pipeline.runs().await.values().any(|run| run.state == state);
    wait_until("an interval succeeds", SOON, || async { any("succeeded").await }).await;
    pipeline
        .faults(
            &json!({"redirect_to": format!("http://h/?api_key={KEY}"), "faults": {"redirect": {"next": 1}}}),
        )
        .await;
    wait_until("an interval fails for good", PATIENT, || async { any("failed").await }).await;
    source.kill().await;
    wait_until("an interval waits for the source", PATIENT, || async { any("retrying").await }).await;
    said += &producer.words();
    said += &format!("{:?}{:?}", pipeline.runs().await, pipeline.attempts().await);
    said += &text(&pipeline.run("ingest-producer", &["runs", "list", "--json"], &[]).await.stdout);
    assert!(said.contains("redirects are not followed; http://h/?api_key=…"), "the redirect was not noted");
    assert!(said.contains("the source cannot be read"), "the outage was not noted");
    assert!(!said.contains(KEY), "{said}");
    producer.stop().await;
}
