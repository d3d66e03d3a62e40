//! What the source gives: answers that change between two fetches, records that cannot be read, numbers with many digits.

use std::collections::{BTreeMap, BTreeSet};

use rdkafka::message::Message;
use serde_json::json;

use crate::harness::{PATIENT, Pipeline, now_ms, text, wait_until};
use crate::ingest::{RECORDS, rfc3339, short_intervals};
use crate::oracle::{Progress, header};

const HOUR_MS: i64 = 3_600_000;

impl Pipeline {
    /// A past interval that no schedule runs.
    fn past_interval(&self) -> (i64, i64) {
        let from_ms = (now_ms() - 6 * HOUR_MS).div_euclid(self.interval_ms()) * self.interval_ms();
        (from_ms, from_ms + self.interval_ms())
    }

    /// Fetches an interval, once more where it was fetched before, and waits until all of the log is processed.
    async fn fetched(&self, (from_ms, to_ms): (i64, i64)) -> Progress {
        let (from, to) = (rfc3339(from_ms), rfc3339(to_ms));
        let arguments = ["backfill", "--from", &from, "--to", &to, "--reprocess", "completed"];
        let output = self.run("ingest-producer", &arguments, &[]).await;
        assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
        wait_until("the log is processed", PATIENT, || async {
            self.progress().await.next_offsets == self.log_end(&self.topic).await
        })
        .await;
        self.progress().await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interval_that_is_fetched_again_with_another_answer_counts_each_record_once() {
    let pipeline = Pipeline::with_stream("answers", |text| short_intervals(text, "15m")).await;
    pipeline.init().await;
    let _source = pipeline.source().await;
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    let interval = pipeline.past_interval();
    // One record more is one event more; all others are known by id and time, also the one whose values have changed.
    let answers = [
        ("as_before", RECORDS, RECORDS),
        ("one_more", RECORDS + 1, RECORDS + 1),
        ("one_less", RECORDS - 1, RECORDS + 1),
        ("one_changed", RECORDS, RECORDS + 1),
    ];
    let mut sent = 0;
    for (answer, records, events) in answers {
        pipeline.faults(&json!({"answer": answer})).await;
        let progress = pipeline.fetched(interval).await;
        assert_eq!(pipeline.runs().await[&interval.0].records, records, "{answer}");
        sent += records;
        assert_eq!((progress.events, progress.duplicates), (events, sent - events), "{answer}");
        pipeline.assert_counted_once(events).await;
    }
    let times = pipeline.sent().await;
    assert!(times.keys().all(|(_, time_ms)| (interval.0..interval.1).contains(time_ms)), "{times:?}");
    processor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn records_that_cannot_be_read_become_dead_letters_and_the_others_of_their_page_events() {
    let pipeline = Pipeline::with_stream("broken", |text| short_intervals(text, "15m")).await;
    pipeline.init().await;
    let _source = pipeline.source().await;
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    pipeline.faults(&json!({"faults": {"broken_records": {"next": 1}}})).await;
    let interval = pipeline.past_interval();
    let progress = pipeline.fetched(interval).await;
    let run = &pipeline.runs().await[&interval.0];
    assert!(run.state == "succeeded" && run.records == RECORDS && run.acked == RECORDS, "{run:?}");
    assert_eq!((progress.events, progress.dead_letters), (RECORDS - 3, 3));
    pipeline.assert_counted_once(RECORDS - 3).await;
    let letters = pipeline.records(&format!("{}.dlq", pipeline.topic)).await;
    let reasons: BTreeMap<String, (String, String)> = letters
        .iter()
        .map(|letter| {
            let said = |name: &str| header(letter, &format!("__connect.errors.exception.{name}")).unwrap();
            let value = text(letter.payload().unwrap());
            (said("message"), (said("class.name"), value))
        })
        .collect();
    let mut expected = [
        ("the record is no JSON: expected value", "RefusedByProducer", "\"age\":NaN"),
        ("column `first_name`: ", "InvalidColumn", "\"first_name\":\"\\ud83d"),
        ("column `age`: `1e400` is no int", "InvalidColumn", "\"age\":1e400"),
    ]
    .into_iter();
    assert!(
        reasons.len() == 3
            && expected.all(|(message, class, value)| {
                let found = reasons.iter().find(|(said, _)| said.starts_with(message));
                found.is_some_and(|(_, (name, bytes))| name == class && bytes.contains(value))
            }),
        "{reasons:?}"
    );
    // The same page without faults: what was broken is there now, the rest counts once.
    pipeline.faults(&json!({})).await;
    assert_eq!(pipeline.fetched(interval).await.events, RECORDS);
    pipeline.assert_counted_once(RECORDS).await;
    processor.stop().await;
}

/// Doubles whose shortest forms have many digits.
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
    // Beyond 2^64, and different in the last digit only.
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
    pipeline.source_of(page).await;
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    pipeline.fetched((from_ms, to_ms)).await;
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
