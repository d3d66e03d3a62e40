//! How an operator handles dead letters: a partition that pauses after too many of them, and dead letters that are
//! replayed.

use std::collections::BTreeMap;

use chrono::{DateTime, SecondsFormat};
use rdkafka::admin::AdminOptions;
use rdkafka::message::Message;
use serde_json::Value;

use crate::harness::{LONG_TIMEOUT, Pipeline, TIMEOUT, now_ms, text, wait_until};
use crate::oracle::header;

/// The partition that receives the undecodable records.
const POISONED: i32 = 2;

/// The furthest that an event time may be ahead of the broker's clock.
const MAX_AHEAD_MS: i64 = 3_600_000;

/// Added to [`MAX_AHEAD_MS`], so that the event time is still too far ahead when a slow machine sends the record.
const AHEAD_MARGIN_MS: i64 = 8_000;

#[tokio::test(flavor = "multi_thread")]
async fn too_many_undecodable_records_pause_only_their_partition_until_an_operator_accepts_them() {
    const LIMIT: i64 = 5;
    const POISON: i64 = LIMIT + 3;
    let pipeline = Pipeline::initialised("poison").await;
    let limit = [("PIPELINE_POISON_IN_A_ROW", LIMIT.to_string())];
    let mut processor = pipeline.processor_with("one", &limit);
    processor.ready().await;
    pipeline.stress(600).await;
    let first = pipeline.ends(&pipeline.topic).await[&POISONED];
    let values = (0..POISON).map(|number| format!("poison {number}")).collect();
    pipeline.send_to_partition(POISONED, &[], values).await;
    wait_until("the processor is not ready", TIMEOUT, || async { !processor.is_ready().await }).await;
    pipeline.stress(600).await;
    wait_until("the other partitions are processed", TIMEOUT, || async {
        pipeline.lag().await.keys().eq([&POISONED])
    })
    .await;

    let report = processor.json("/readyz").await.unwrap().to_string();
    let paused = format!("paused at offset {}", first + LIMIT);
    let remedy = format!("dlq accept --partition {POISONED} --up-to {}", first + LIMIT + 1);
    for part in [format!("partition {POISONED}"), paused, remedy] {
        assert!(report.contains(&part) && processor.log_text().contains(&part), "{part}: {report}");
    }
    for partition in 0..6 {
        let name = format!("processor_paused{{partition=\"{partition}\"}}");
        let expected = f64::from(u8::from(partition == POISONED));
        assert_eq!(processor.metric(&name).await, Some(expected), "{name}");
    }
    assert!(!processor.is_ready().await, "the processor is ready although a partition is paused");

    pipeline.dlq(["accept", "--partition", "2", "--up-to"], (first + POISON).to_string()).await;
    wait_until("the processor is ready again", TIMEOUT, || async { processor.is_ready().await }).await;
    wait_until("the whole log is processed", LONG_TIMEOUT, || async { pipeline.lag().await.is_empty() })
        .await;
    assert_eq!(processor.metric("processor_paused{partition=\"2\"}").await, Some(0.0));
    assert_eq!(pipeline.progress().await.dead_letters, POISON);
    pipeline.assert_counted_once(1_200).await;
    pipeline.verify().await;
    pipeline.assert_listed(first, POISON).await;
    processor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn readiness_reports_a_missing_dead_letter_topic_until_it_exists_again() {
    let pipeline = Pipeline::initialised("no_dlq").await;
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    let dlq = format!("{}.dlq", pipeline.topic);
    let deleted = pipeline.admin().delete_topics(&[&dlq], &AdminOptions::new()).await.unwrap();
    deleted.into_iter().for_each(|topic| assert!(topic.is_ok(), "{topic:?}"));
    pipeline.send_to_partition(POISONED, &[], vec!["poison".to_owned()]).await;
    wait_until("the processor is not ready", TIMEOUT, || async { !processor.is_ready().await }).await;
    let report = processor.json("/readyz").await.unwrap().to_string();
    assert!(report.contains(&format!("topic `{dlq}` does not accept dead letters")), "{report}");
    pipeline.stress(600).await;
    wait_until("the other partitions are processed", TIMEOUT, || async {
        pipeline.lag().await.keys().eq([&POISONED])
    })
    .await;
    pipeline.init().await;
    wait_until("the whole log is processed", LONG_TIMEOUT, || async { pipeline.lag().await.is_empty() })
        .await;
    wait_until("the processor is ready again", TIMEOUT, || async { processor.is_ready().await }).await;
    assert_eq!(pipeline.records(&dlq).await.len(), 1);
    assert_eq!(pipeline.progress().await.dead_letters, 1);
    let reopened = processor.metric("processor_partition_starts_total{how=\"resume\"}").await;
    assert_eq!(reopened, Some(0.0), "an idle partition was reopened: {}", processor.log_text());
    processor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replayed_dead_letter_without_a_key_returns_to_its_partition_and_counts_once() {
    const COPIES: usize = 8;
    let pipeline = Pipeline::initialised("keyless").await;
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    let time_ms = now_ms() + MAX_AHEAD_MS + AHEAD_MARGIN_MS;
    let time = DateTime::from_timestamp_millis(time_ms).unwrap().to_rfc3339_opts(SecondsFormat::Millis, true);
    // Several copies of one event. If the replay chose a partition, it would spread them over all partitions.
    for _ in 0..COPIES {
        let headers = [("ce_id", "ahead"), ("ce_time", time.as_str())];
        pipeline.send_keyless(4, &headers, r#"{"first_name":"Ada","last_name":"Ahead"}"#).await;
    }
    let dead_lettered = || async { pipeline.progress().await.dead_letters == COPIES as i64 };
    wait_until("all copies are dead letters", TIMEOUT, dead_lettered).await;
    wait_until("the event time is within the limit", TIMEOUT, || async { now_ms() + MAX_AHEAD_MS > time_ms })
        .await;
    let output = pipeline.run("stream-processor", &["dlq", "replay", "--all"], &[]).await;
    assert!(output.status.success(), "{}", text(&output.stderr));
    wait_until("the replayed records are processed", TIMEOUT, || async { pipeline.lag().await.is_empty() })
        .await;
    let progress = pipeline.progress().await;
    assert_eq!((progress.events, progress.duplicates), (1, COPIES as i64 - 1));
    assert_eq!(pipeline.rows().await, 1);
    processor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replayed_dead_letter_becomes_an_event_a_duplicate_or_a_dead_letter_again() {
    let pipeline = Pipeline::initialised("sent_again").await;
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    pipeline.stress(100).await;
    // An event time too far ahead, as from a producer with a wrong clock. It becomes valid a few seconds later.
    let time_ms = now_ms() + MAX_AHEAD_MS + AHEAD_MARGIN_MS;
    let time = DateTime::from_timestamp_millis(time_ms).unwrap().to_rfc3339_opts(SecondsFormat::Millis, true);
    let headers = [("ce_id", "ahead"), ("ce_time", time.as_str())];
    let value = r#"{"first_name":"Ada","last_name":"Ahead"}"#;
    pipeline.send_to_partition(1, &headers, vec![value.to_owned()]).await;
    pipeline.send_to_partition(0, &[], vec!["never an event".to_owned()]).await;
    wait_until("both records are dead letters", TIMEOUT, || async {
        pipeline.progress().await.dead_letters == 2
    })
    .await;

    let letters = pipeline.letters().await;
    let class_of = |letter: &Value| letter["class"].as_str().unwrap().to_owned();
    let ahead = letters.iter().find(|letter| class_of(letter) == "EventTimeInFuture").unwrap();
    let ahead = ahead["offset"].to_string();
    let shown = pipeline.dlq(["show", "--offset"], ahead.clone()).await;
    assert!(shown.contains(value) && shown.contains("ce_id: ahead"), "{shown}");

    wait_until("the event time is within the limit", TIMEOUT, || async { now_ms() > time_ms - MAX_AHEAD_MS })
        .await;
    let printed = pipeline.dlq(["replay"], "--all".to_owned()).await;
    assert!(printed.contains("2 dead letters sent again"), "{printed}");
    wait_until("one record is an event and one is a dead letter again", TIMEOUT, || async {
        let progress = pipeline.progress().await;
        (progress.events, progress.dead_letters, progress.duplicates) == (101, 3, 0)
    })
    .await;
    pipeline.assert_provenance(&ahead, &time).await;

    pipeline.dlq(["replay", "--offset"], ahead).await;
    wait_until("the second replay is a duplicate", TIMEOUT, || async {
        pipeline.progress().await.duplicates == 1
    })
    .await;
    pipeline.assert_counted_once(101).await;
    assert_eq!(pipeline.progress().await.dead_letters, 3);
    pipeline.verify().await;
    processor.stop().await;
}

impl Pipeline {
    /// The number of unprocessed records of each partition that has any.
    async fn lag(&self) -> BTreeMap<i32, i64> {
        let mut lag = self.ends(&self.topic).await;
        for (partition, next_offset) in self.next_offsets().await {
            *lag.get_mut(&partition).unwrap() -= next_offset;
        }
        lag.retain(|_, records| *records > 0);
        lag
    }

    /// Runs `stream-processor dlq`, which must succeed. Returns its stdout.
    async fn dlq<const N: usize>(&self, arguments: [&str; N], last: String) -> String {
        let arguments = [&["dlq"], &arguments[..], &[last.as_str()]].concat();
        let output = self.run("stream-processor", &arguments, &[]).await;
        assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    /// The dead letters that `dlq list --json` prints.
    async fn letters(&self) -> Vec<Value> {
        let printed = self.dlq(["list"], "--json".to_owned()).await;
        serde_json::from_str(&printed).unwrap_or_else(|_| panic!("{printed}"))
    }

    /// Asserts that `dlq list` and `dlq show` name the source and the error of the `poison` dead letters from offset
    /// `first` on.
    async fn assert_listed(&self, first: i64, poison: i64) {
        let table = self.dlq(["list", "--limit"], "100".to_owned()).await;
        let mut sources = Vec::new();
        for letter in self.letters().await {
            assert_eq!(letter["source_partition"], POISONED.to_string());
            assert_eq!(letter["class"], "MissingHeader");
            assert!(letter["message"].as_str().unwrap().contains("ce_id"), "{letter}");
            let offset: i64 = letter["source_offset"].as_str().unwrap().parse().unwrap();
            assert!(table.contains(&format!("{POISONED}/{offset}")), "{table}");
            let shown = self.dlq(["show", "--offset"], letter["offset"].to_string()).await;
            assert!(shown.ends_with(&format!("poison {}\n", offset - first)), "{shown}");
            sources.push(offset);
        }
        sources.sort_unstable();
        assert!(sources.into_iter().eq(first..first + poison), "{table}");
    }

    /// Asserts that the replayed records name the dead letter they come from. The event keeps its own headers and has
    /// lost its error headers. The other record is a dead letter again and has new error headers.
    async fn assert_provenance(&self, ahead: &str, time: &str) {
        let from = format!("{}.dlq/0/{ahead}", self.topic);
        let records = self.all_records(&self.topic).await;
        let sent = records.iter().find(|record| header(record, "replayed_from").as_ref() == Some(&from));
        let sent = sent.unwrap_or_else(|| panic!("no record was replayed from {from}"));
        assert_eq!(header(sent, "ce_id").as_deref(), Some("ahead"));
        assert_eq!(header(sent, "ce_time").as_deref(), Some(time));
        assert_eq!(header(sent, "__connect.errors.offset"), None);
        let dead = self.records(&format!("{}.dlq", self.topic)).await;
        let again = dead.last().unwrap();
        assert_eq!(again.payload(), Some(&b"never an event"[..]));
        assert!(header(again, "replayed_from").is_some_and(|from| from.contains(".dlq/0/")));
        assert!(header(again, "__connect.errors.exception.message").is_some());
    }
}
