//! What the producer must never do: send to a topic with unregistered partitions, or reveal a secret.

use std::fs;

use rdkafka::admin::{AdminClient, AdminOptions, NewPartitions};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::ClientConfig;
use serde_json::json;

use crate::harness::{LONG_TIMEOUT, Pipeline, TIMEOUT, text, wait_until};
use crate::ingest::short_intervals;

/// Exit code of a service that refuses to run.
const REFUSED: i32 = 3;

#[tokio::test(flavor = "multi_thread")]
async fn the_producer_sends_nothing_to_a_topic_with_added_partitions_and_names_both_counts() {
    let edit = |text| short_intervals(text, "2s").replace("catch_up = 2000", "catch_up = 3");
    let pipeline = Pipeline::with_stream("partitions", edit).await;
    pipeline.init().await;
    let _source = pipeline.source().await;
    let mut producer = pipeline.producer();
    producer.ready().await;
    let in_state = async |state: &str| {
        pipeline.runs().await.into_values().filter(|run| run.state == state).collect::<Vec<_>>()
    };
    wait_until("runs succeed", TIMEOUT, || async { in_state("succeeded").await.len() >= 4 }).await;

    let admin: AdminClient<DefaultClientContext> =
        ClientConfig::new().set("bootstrap.servers", &pipeline.kafka).create().unwrap();
    let more = [NewPartitions::new(&pipeline.topic, 12)];
    let added = admin.create_partitions(&more, &AdminOptions::new()).await.unwrap();
    assert!(added.iter().all(Result::is_ok), "{added:?}");
    wait_until("a run fails", LONG_TIMEOUT, || async { !in_state("failed").await.is_empty() }).await;
    let end = pipeline.log_end(&pipeline.topic).await;
    wait_until("more intervals fail", LONG_TIMEOUT, || async { in_state("failed").await.len() >= 3 }).await;
    let remedy = "give the stream a new name, or delete the topic, create it again with 6 partitions";
    for run in in_state("failed").await {
        let expected = ["has 12 partitions", "registered with 6", remedy];
        assert!(expected.iter().all(|part| run.error.contains(part)), "{run:?}");
    }

    let spike = ["control", "--wait", "spike", "--rate", "100", "--seconds", "1"];
    let spike = pipeline.run("ingest-producer", &spike, &[]).await;
    let printed = text(&spike.stdout);
    assert!(spike.status.code() == Some(1) && printed.contains("has 12 partitions"), "{printed}");
    producer.kill().await;
    let listen = [("PIPELINE_HTTP_LISTEN", "127.0.0.1:0".to_owned())];
    for arguments in [&["run"][..], &["stress", "--messages", "100"]] {
        let output = pipeline.run("ingest-producer", arguments, &listen).await;
        let printed = text(&output.stderr);
        assert!(
            printed.contains(remedy) && !printed.contains("PIPELINE_PARTITIONS"),
            "{arguments:?}: {printed}"
        );
        assert_eq!(output.status.code(), Some(REFUSED), "{arguments:?}: {printed}");
    }
    assert_eq!(pipeline.log_end(&pipeline.topic).await, end, "the producer sent records");
    let ends = pipeline.ends(&pipeline.topic).await;
    assert!(ends.len() == 12 && ends.range(6..).all(|(_, end)| *end == 0), "{ends:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_key_in_the_query_never_appears_in_logs_ledger_or_output() {
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
    let printed = text(&refused.stderr);
    assert!(!refused.status.success() && printed.contains("query = \"api_key\", key_file = "), "{printed}");
    assert!(!printed.contains(KEY), "{printed}");

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
    let mut all_output = text(&checked.stdout) + &text(&checked.stderr);
    assert!(checked.status.success() && all_output.contains("results=…"), "{all_output}");
    let debug = [("PIPELINE_LOG", "debug".to_owned())];
    let mut producer = pipeline.producer_with("one", &debug);
    producer.ready().await;
    let any = async |state: &str| pipeline.runs().await.values().any(|run| run.state == state);
    wait_until("an interval succeeds", TIMEOUT, || async { any("succeeded").await }).await;
    pipeline
        .faults(
            &json!({"redirect_to": format!("http://h/?api_key={KEY}"), "faults": {"redirect": {"next": 1}}}),
        )
        .await;
    wait_until("an interval fails for good", LONG_TIMEOUT, || async { any("failed").await }).await;
    source.kill().await;
    wait_until("an interval waits for the source", LONG_TIMEOUT, || async { any("retrying").await }).await;
    all_output += &producer.log_text();
    all_output += &format!("{:?}{:?}", pipeline.runs().await, pipeline.attempts().await);
    all_output += &text(&pipeline.run("ingest-producer", &["runs", "list", "--json"], &[]).await.stdout);
    assert!(
        all_output.contains("redirects are not followed; http://h/?api_key=…"),
        "the redirect is not reported"
    );
    assert!(all_output.contains("the source cannot be read"), "the outage is not reported");
    assert!(!all_output.contains(KEY), "{all_output}");
    producer.stop().await;
}
