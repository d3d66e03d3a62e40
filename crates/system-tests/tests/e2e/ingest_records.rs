//! Unusual answers of the source: answers that change between two fetches, broken records, and numbers with many
//! digits.

use std::collections::{BTreeMap, BTreeSet};

use rdkafka::message::Message;
use serde_json::json;

use crate::harness::{LONG_TIMEOUT, Pipeline, now_ms, text, wait_until};
use crate::ingest::{RECORDS, rfc3339, short_intervals};
use crate::oracle::{TotalProgress, header};

const HOUR_MS: i64 = 3_600_000;

impl Pipeline {
    /// An interval that is too old for the schedule to run it.
    fn past_interval(&self) -> (i64, i64) {
        let from_ms = (now_ms() - 6 * HOUR_MS).div_euclid(self.interval_ms()) * self.interval_ms();
        (from_ms, from_ms + self.interval_ms())
    }

    /// Fetches an interval, even if it was fetched before, and waits until the whole log is processed.
    async fn fetch_and_process(&self, (from_ms, to_ms): (i64, i64)) -> TotalProgress {
        let (from, to) = (rfc3339(from_ms), rfc3339(to_ms));
        let arguments = ["backfill", "--from", &from, "--to", &to, "--reprocess", "completed"];
        let output = self.run("ingest-producer", &arguments, &[]).await;
        assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
        wait_until("the whole log is processed", LONG_TIMEOUT, || async {
            self.progress().await.next_offsets == self.log_end(&self.topic).await
        })
        .await;
        self.progress().await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn refetching_an_interval_whose_answer_changed_counts_each_record_once() {
    let pipeline = Pipeline::with_stream("answers", |text| short_intervals(text, "15m")).await;
    pipeline.init().await;
    let _source = pipeline.source().await;
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    let interval = pipeline.past_interval();
    // Only the additional record is a new event. Id and time identify the others, including the one with changed
    // values.
    let answers = [
        ("as_before", RECORDS, RECORDS),
        ("one_more", RECORDS + 1, RECORDS + 1),
        ("one_less", RECORDS - 1, RECORDS + 1),
        ("one_changed", RECORDS, RECORDS + 1),
    ];
    let mut sent = 0;
    for (answer, records, events) in answers {
        pipeline.faults(&json!({"answer": answer})).await;
        let progress = pipeline.fetch_and_process(interval).await;
        assert_eq!(pipeline.runs().await[&interval.0].records, records, "{answer}");
        sent += records;
        assert_eq!((progress.events, progress.duplicates), (events, sent - events), "{answer}");
        assert_eq!(progress.revised, i64::from(answer == "one_changed"), "{answer}");
        pipeline.assert_counted_once(events).await;
    }
    let times = pipeline.sent().await;
    assert!(times.keys().all(|(_, time_ms)| (interval.0..interval.1).contains(time_ms)), "{times:?}");
    processor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_records_become_dead_letters_and_the_rest_of_their_page_becomes_events() {
    let pipeline = Pipeline::with_stream("broken", |text| short_intervals(text, "15m")).await;
    pipeline.init().await;
    let _source = pipeline.source().await;
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    pipeline.faults(&json!({"faults": {"broken_records": {"next": 1}}})).await;
    let interval = pipeline.past_interval();
    let progress = pipeline.fetch_and_process(interval).await;
    let run = &pipeline.runs().await[&interval.0];
    assert!(run.state == "succeeded" && run.records == RECORDS && run.acked == RECORDS, "{run:?}");
    assert_eq!((progress.events, progress.dead_letters), (RECORDS - 3, 3));
    pipeline.assert_counted_once(RECORDS - 3).await;
    let letters = pipeline.records(&format!("{}.dlq", pipeline.topic)).await;
    let reasons: BTreeMap<String, (String, String)> = letters
        .iter()
        .map(|letter| {
            let error = |name: &str| header(letter, &format!("__connect.errors.exception.{name}")).unwrap();
            let value = text(letter.payload().unwrap());
            (error("message"), (error("class.name"), value))
        })
        .collect();
    let mut expected = [
        ("the record is not valid JSON: expected value", "RefusedByProducer", "\"age\":unknown"),
        ("column `first_name`: ", "InvalidColumn", "\"first_name\":\"\\ud83d"),
        ("column `age`: `1e400` is not a valid int", "InvalidColumn", "\"age\":1e400"),
    ]
    .into_iter();
    assert!(
        reasons.len() == 3
            && expected.all(|(message, class, value)| {
                let found = reasons.iter().find(|(reason, _)| reason.starts_with(message));
                found.is_some_and(|(_, (name, bytes))| name == class && bytes.contains(value))
            }),
        "{reasons:?}"
    );
    // The same page without faults. The repaired records are new events, and the others count once.
    pipeline.faults(&json!({})).await;
    assert_eq!(pipeline.fetch_and_process(interval).await.events, RECORDS);
    pipeline.assert_counted_once(RECORDS).await;
    processor.stop().await;
}

/// Doubles whose shortest decimal forms have many digits.
fn doubles(count: u64) -> Vec<f64> {
    let mix = |n: u64| {
        let z = n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (z ^ (z >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9)
    };
    (1..=count).map(|n| (mix(n) >> 11) as f64 / (1u64 << 53) as f64 * 1e3f64.powi(n as i32 % 5)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn numbers_keep_their_digits_from_the_source_to_cassandra() {
    let pipeline = Pipeline::with_file("digits", "orders", |text| {
        let ended = text.replace("kind = \"cursor\", pointer = \"/data/paging/next\"", "kind = \"none\"");
        ended
            .replace("&cursor={cursor}", "")
            .replace("cron = \"*/2 * * * *\"", "every = \"15m\"")
            .replace("lateness = \"15m\"", "lateness = \"1h\"")
    })
    .await;
    pipeline.init().await;
    let (from_ms, to_ms) = pipeline.past_interval();
    let amounts = doubles(1000);
    // Larger than 2^64, and different only in the last digits.
    let id = |n: usize| format!("12345678901234567890{n:03}");
    let records = amounts.iter().enumerate().map(|(n, amount)| {
        format!(
            r#"{{"order": {{"id": {}, "placed_at": "{}", "status": "paid", "total": {{"currency": {n}.10, "amount": {amount:?}}}}},
                "customer": {{"id": "7a0f0e8e-0f83-4dd3-90c2-2a4f3a4f2b1c"}}}}"#,
            id(n),
            rfc3339(from_ms + 1000)
        )
    });
    let page = format!("{{\"data\": {{\"items\": [{}]}}}}", records.collect::<Vec<_>>().join(","));
    pipeline.source_serving(page).await;
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    pipeline.fetch_and_process((from_ms, to_ms)).await;
    pipeline.assert_counted_once(1000).await;
    let query = format!(
        "SELECT event_id, currency, amount FROM {}.{}",
        pipeline.keyspace, pipeline.definition.stream.name
    );
    let rows = pipeline.session.query_unpaged(query, ()).await.unwrap().into_rows_result().unwrap();
    let stored: BTreeSet<(String, String, u64)> = rows
        .rows::<(String, String, f64)>()
        .unwrap()
        .map(|row| row.map(|(id, text, amount)| (id, text, amount.to_bits())).unwrap())
        .collect();
    let expected = amounts.iter().enumerate().map(|(n, amount)| (id(n), format!("{n}.10"), amount.to_bits()));
    assert_eq!(stored, expected.collect());
    processor.stop().await;
}
