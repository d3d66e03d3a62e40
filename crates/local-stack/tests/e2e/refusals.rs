//! Bad input: each is refused or set aside with a word that names it.

use rdkafka::message::Message;

use crate::harness::{PATIENT, Pipeline, SOON, free_port, text, wait_until};
use crate::oracle::header;

#[tokio::test(flavor = "multi_thread")]
async fn garbage_is_dead_lettered_unchanged_and_everything_else_goes_on() {
    const GARBAGE: [(&[u8], &[u8]); 3] =
        [(b"a", b"\xff\xfe\x00 not json"), (b"b", b"{\"age\": \"no headers\"}"), (b"c", b"")];
    let pipeline = Pipeline::initialised("garbage").await;
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    pipeline.stress(1_000).await;
    pipeline.send_raw(GARBAGE.to_vec()).await;
    pipeline.stress(1_000).await;
    wait_until("everything is processed", PATIENT, || async {
        pipeline.progress().await.next_offsets == 2_003
    })
    .await;
    let progress = pipeline.progress().await;
    assert_eq!((progress.events, progress.dead_letters), (2_000, 3));
    pipeline.assert_counted_once(2_000).await;

    let dead = pipeline.records(&format!("{}.dlq", pipeline.topic)).await;
    let mut seen: Vec<_> =
        dead.iter().map(|record| (record.key().unwrap(), record.payload().unwrap_or(b""))).collect();
    seen.sort_unstable();
    assert_eq!(seen, GARBAGE);
    for record in &dead {
        assert_eq!(header(record, "__connect.errors.topic").as_ref(), Some(&pipeline.topic));
        for name in ["__connect.errors.partition", "__connect.errors.offset"] {
            assert!(header(record, name).is_some_and(|number| number.parse::<i64>().is_ok()), "{name}");
        }
        assert!(
            header(record, "__connect.errors.exception.message").is_some_and(|message| !message.is_empty())
        );
    }
    processor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_key_in_the_stream_file_is_refused_by_its_name() {
    let pipeline =
        Pipeline::with_stream("unknown_key", |text| text.replace("shards = 4", "shrads = 4")).await;
    for (program, arguments) in [
        ("stream-processor", &["init"][..]),
        ("stream-processor", &["run"]),
        ("ingest-producer", &["run"]),
        ("metrics-dashboard", &[]),
    ] {
        let output =
            pipeline.run(program, arguments, &[("PIPELINE_HTTP_LISTEN", "127.0.0.1:0".to_owned())]).await;
        let words = text(&output.stderr);
        assert!(!output.status.success() && words.contains("shrads"), "{program} {arguments:?}: {words}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreachable_kafka_is_named_at_start() {
    let pipeline = Pipeline::new("no_kafka").await;
    let nowhere = format!("127.0.0.1:{}", free_port());
    let mut processor = pipeline.processor_with("one", &[("PIPELINE_KAFKA_BROKERS", nowhere.clone())]);
    wait_until("the log names the brokers", SOON, || async { processor.words().contains(&nowhere) }).await;
    assert!(!processor.is_ready().await);
    // It waits for its servers with a deadline, or ends at once; both say why.
    let _ = processor.end().await;
    let words = processor.words();
    assert!(words.contains(&nowhere), "{words}");
}
