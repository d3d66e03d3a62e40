//! Ingestion from a failing source, through outages of the source and the producer, and with backfills beside it.

use std::collections::BTreeSet;
use std::process::Output;

use serde_json::{Value, json};
use source_simulator::orders;

use crate::harness::{LONG_TIMEOUT, Pipeline, TIMEOUT, now_ms, text, wait_until};

const MINUTE_MS: i64 = 60_000;
const HOUR_MS: i64 = 3_600_000;
const DAY_MS: i64 = 86_400_000;

/// Unix milliseconds as a time argument of the command line.
pub fn rfc3339(ms: i64) -> String {
    chrono::DateTime::from_timestamp_millis(ms).unwrap().to_rfc3339_opts(chrono::SecondsFormat::Secs, true)
}

/// Faults of the source, and the expected attempts of an interval that is fetched with them.
struct Case {
    faults: Value,
    /// Outcome of each attempt.
    outcomes: &'static [&'static str],
    /// Part of the first attempt's cause.
    cause: &'static str,
    /// HTTP status of the first attempt.
    status: Option<i32>,
}

/// A retry succeeds.
const RETRIED: &[&str] = &["failed", "succeeded"];
/// A permanent error ends the run at the first attempt.
const NOT_RETRIED: &[&str] = &["failed"];
/// All attempts fail.
const EXHAUSTED: &[&str] = &["failed", "failed", "failed"];

fn cases() -> Vec<Case> {
    let next = |kind: &str| json!({"faults": {kind: {"next": 1}}});
    let always = |kind: &str| json!({"faults": {kind: {"rate": 1.0}}});
    let case = |faults, outcomes, cause, status| Case { faults, outcomes, cause, status };
    let large = |kind: &str| json!({"oversized_bytes": 4 << 20, "faults": {kind: {"next": 1}}});
    let drip = json!({"drip_ms": 300, "drip_bytes": 4096, "faults": {"drip": {"next": 1}}});
    let throttle = json!({"retry_after": "2", "faults": {"throttle": {"next": 1}}});
    vec![
        case(next("error"), RETRIED, "returned 500", Some(500)),
        case(always("error"), EXHAUSTED, "returned 500", Some(500)),
        case(throttle, RETRIED, "returned 429", Some(429)),
        case(next("reset"), RETRIED, "cannot be read", Some(200)),
        case(drip, RETRIED, "no complete response within 2 s", Some(200)),
        case(next("truncated"), RETRIED, "is not valid JSON at byte", Some(200)),
        case(next("malformed"), RETRIED, "is not valid JSON at byte 0", Some(200)),
        case(large("oversized"), NOT_RETRIED, "larger than 1048576 bytes; raise", Some(200)),
        case(large("bomb"), NOT_RETRIED, "larger than 1048576 bytes after decompression", Some(200)),
        case(always("endless"), NOT_RETRIED, "endless pagination", None),
        case(next("redirect"), NOT_RETRIED, "redirects are not followed; http://169.254.169.254", Some(302)),
        case(next("not_found"), NOT_RETRIED, "returned 404", Some(404)),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn every_source_fault_ends_in_success_or_in_failure_with_a_cause() {
    let edit = |text: String| {
        let retry =
            "retry = { attempts = 3, backoff = \"100ms\", max_backoff = \"500ms\", deadline = \"60s\" }";
        let limits = "limits = { page_bytes = 1048576, request_timeout = \"2s\" }";
        text.replace("max_active_runs = 1", &format!("max_active_runs = 1\n{retry}"))
            .replace("page_size = 200", &format!("page_size = 200\n{limits}"))
    };
    let mut pipeline = Pipeline::with_file("faults", "orders", edit).await;
    pipeline.init().await;
    let _source = pipeline.source().await;
    let first_ms = (now_ms() - 2 * HOUR_MS).div_euclid(HOUR_MS) * HOUR_MS;
    let interval =
        |n: usize| (first_ms + n as i64 * 2 * MINUTE_MS, first_ms + (n as i64 + 1) * 2 * MINUTE_MS);
    let cases = cases();
    for (n, case) in cases.iter().enumerate() {
        pipeline.faults(&case.faults).await;
        let (from, to) = interval(n);
        let output = pipeline.backfill(from, to).await;
        let succeeds = case.outcomes.last() == Some(&"succeeded");
        assert_eq!(
            output.status.code(),
            Some(i32::from(!succeeds)),
            "{}: {}",
            case.faults,
            text(&output.stderr)
        );
    }
    pipeline.faults(&json!({})).await;
    let (runs, attempts, sent) = (pipeline.runs().await, pipeline.attempts().await, pipeline.sent().await);
    let ids: BTreeSet<&str> = sent.keys().map(|(id, _)| id.as_str()).collect();
    for (n, case) in cases.iter().enumerate() {
        let (from, to) = interval(n);
        let (run, of_run) = (&runs[&from], &attempts[&from]);
        let outcomes: Vec<&str> = of_run.iter().map(|a| a.outcome.as_str()).collect();
        assert_eq!(outcomes, case.outcomes, "{}: {of_run:?}", case.faults);
        assert!(of_run[0].cause.contains(case.cause), "{}: {of_run:?}", case.faults);
        assert_eq!(of_run[0].http_status, case.status, "{}: {of_run:?}", case.faults);
        if *outcomes.last().unwrap() == "failed" {
            assert!(run.state == "failed" && run.error.contains(case.cause), "{run:?}");
            continue;
        }
        assert!(run.state == "succeeded" && run.error.is_empty() && run.records == run.acked, "{run:?}");
        let expected = orders_of(from, to);
        assert_eq!(run.records, expected.len() as i64, "{}", case.faults);
        assert!(
            expected.iter().all(|id| ids.contains(id.as_str())),
            "{}: a record is not in Kafka",
            case.faults
        );
    }
    let throttled = &attempts[&interval(2).0];
    let pause_ms = throttled[1].started_ms - throttled[0].ended_ms(0);
    assert!(pause_ms >= 2000, "the next attempt started {pause_ms} ms later although Retry-After was 2 s");
    pipeline.assert_waits_for_retry_after_date(interval(cases.len())).await;
    pipeline.edit_stream(|text| text.replace("deadline = \"60s\"", "attempt_timeout = \"1s\""));
    pipeline.assert_slow_attempt_is_retried(interval(cases.len() + 1)).await;
}

impl Pipeline {
    /// Runs `ingest-producer backfill` for the intervals in this range of Unix milliseconds.
    pub async fn backfill(&self, from_ms: i64, to_ms: i64) -> Output {
        let arguments = ["backfill", "--from", &rfc3339(from_ms), "--to", &rfc3339(to_ms)];
        self.run("ingest-producer", &arguments, &[]).await
    }

    /// Asserts that the producer waits until the HTTP date in `Retry-After` before it retries.
    async fn assert_waits_for_retry_after_date(&self, (from, to): (i64, i64)) {
        let date_ms = now_ms().div_euclid(1000) * 1000 + 4000;
        let date = chrono::DateTime::from_timestamp_millis(date_ms).unwrap();
        let date = date.format("%a, %d %b %Y %H:%M:%S GMT").to_string();
        self.faults(&json!({"retry_after": date, "faults": {"throttle": {"next": 1}}})).await;
        let output = self.backfill(from, to).await;
        assert!(output.status.success(), "{}", text(&output.stderr));
        let attempts = &self.attempts().await[&from];
        assert!(attempts.len() == 2 && attempts[1].started_ms >= date_ms, "{date}: {attempts:?}");
    }

    /// Asserts that an attempt over its time limit fails and is retried.
    async fn assert_slow_attempt_is_retried(&self, (from, to): (i64, i64)) {
        self.faults(&json!({"drip_ms": 300, "drip_bytes": 4096, "faults": {"drip": {"next": 1}}})).await;
        let output = self.backfill(from, to).await;
        assert!(output.status.success(), "{}", text(&output.stderr));
        let attempts = &self.attempts().await[&from];
        let outcomes: Vec<&str> = attempts.iter().map(|a| a.outcome.as_str()).collect();
        assert_eq!(outcomes, RETRIED, "{attempts:?}");
        assert!(attempts[0].cause.starts_with("not done within 1 s: 0 pages"), "{attempts:?}");
    }
}

/// Ids of the orders that the source returns for an interval.
fn orders_of(from_ms: i64, to_ms: i64) -> Vec<String> {
    let (mut ids, mut cursor) = (Vec::new(), None);
    loop {
        let page = orders::page(from_ms, to_ms, 1000, cursor.as_deref()).unwrap();
        ids.extend(page.items.iter().map(|order| order["order"]["id"].as_str().unwrap().to_owned()));
        cursor = page.next;
        if cursor.is_none() {
            return ids;
        }
    }
}

/// The default stream with intervals of length `every`, ten records each, and a short backoff.
pub fn short_intervals(text: String, every: &str) -> String {
    text.replace("every = \"1m\"", &format!("every = \"{every}\""))
        .replace("catch_up = 10", "delay = \"0s\"\ncatch_up = 2000")
        .replace("backoff = \"1s\", max_backoff = \"1m\"", "backoff = \"200ms\", max_backoff = \"1s\"")
        .replace("page_size = 500", "page_size = 5")
        .replace("lateness = \"10m\"", "lateness = \"1h\"")
}

/// Length of each outage in intervals.
const OUTAGE_INTERVALS: i64 = 10;

#[tokio::test(flavor = "multi_thread")]
async fn outages_of_source_and_producer_leave_no_interval_missing_or_doubled() {
    let edit = |text| short_intervals(text, "2s").replace("catch_up = 2000", "catch_up = 5");
    // The first start catches up five intervals. Intervals after that are fetched even after a longer outage.
    let pipeline = Pipeline::with_stream("outage", edit).await;
    pipeline.init().await;
    let source = pipeline.source().await;
    let mut producer = pipeline.producer();
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    producer.ready().await;
    wait_until("intervals succeed", TIMEOUT, || async {
        pipeline.runs().await.values().filter(|run| run.state == "succeeded").count() >= 6
    })
    .await;
    source.kill().await;
    wait_until("ten intervals wait for the source", LONG_TIMEOUT, || async {
        pipeline.runs().await.values().filter(|run| run.state != "succeeded").count() as i64
            >= OUTAGE_INTERVALS
    })
    .await;
    producer.kill().await;
    let killed_ms = now_ms();
    wait_until("ten intervals have passed", TIMEOUT, || async {
        now_ms() > killed_ms + (OUTAGE_INTERVALS + 1) * pipeline.interval_ms()
    })
    .await;
    let _source = pipeline.source().await;
    let mut producer = pipeline.producer();
    producer.ready().await;
    let until_ms = now_ms();
    wait_until("all intervals are caught up", LONG_TIMEOUT, || async {
        pipeline.succeeded_up_to(until_ms).await
    })
    .await;
    producer.stop().await;
    let checked = pipeline.assert_complete(until_ms - pipeline.interval_ms()).await;
    assert!(checked as i64 > 2 * OUTAGE_INTERVALS + 5, "{checked}");
    let caught_up = pipeline.runs().await.values().filter(|run| run.run_type == "catch_up").count();
    assert!(caught_up as i64 >= OUTAGE_INTERVALS, "only {caught_up} runs are catch-up runs");
    wait_until("the whole log is processed", LONG_TIMEOUT, || async {
        pipeline.progress().await.next_offsets == pipeline.log_end(&pipeline.topic).await
    })
    .await;
    pipeline.assert_counted_once(pipeline.sent().await.len() as i64).await;
    processor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn failed_intervals_are_counted_and_retried_until_the_source_recovers() {
    const FAILED: &str = "ingest_unresolved_intervals{state=\"failed\"}";
    let edit = |text| {
        short_intervals(text, "2s")
            .replace("catch_up = 2000", "catch_up = 3")
            .replace("backoff = \"200ms\"", "attempts = 2, failed_backoff = \"2s\", backoff = \"200ms\"")
    };
    let pipeline = Pipeline::with_stream("unresolved", edit).await;
    pipeline.init().await;
    let _source = pipeline.source().await;
    pipeline.faults(&json!({"faults": {"error": {"rate": 1.0}}})).await;
    let mut producer = pipeline.producer();
    producer.ready().await;
    let failed = async || pipeline.runs().await.into_values().filter(|run| run.state == "failed").count();
    wait_until("intervals fail", LONG_TIMEOUT, || async { failed().await >= 3 }).await;
    wait_until("the failed intervals are counted", TIMEOUT, || async {
        producer.metric(FAILED).await >= Some(3.0)
    })
    .await;
    let first = pipeline.runs().await.into_values().next().unwrap();
    // A slow machine may have retried the failed run already.
    let reasons = ["(attempt 2 of 2)", " of 2, past the limit)"];
    let is_limit = reasons.iter().any(|reason| first.error.ends_with(reason));
    assert!(first.error.contains("returned 500") && is_limit, "{first:?}");

    // The count survives a restart.
    producer.kill().await;
    let mut producer = pipeline.producer();
    producer.ready().await;
    wait_until("the failed intervals are counted after the restart", TIMEOUT, || async {
        producer.metric(FAILED).await >= Some(3.0)
    })
    .await;
    pipeline.faults(&json!({})).await;
    let until_ms = now_ms();
    wait_until("all intervals have succeeded", LONG_TIMEOUT, || async {
        pipeline.succeeded_up_to(until_ms).await
    })
    .await;
    wait_until("no interval is counted as failed", TIMEOUT, || async {
        producer.metric(FAILED).await == Some(0.0)
    })
    .await;
    producer.stop().await;
    pipeline.assert_complete(until_ms - pipeline.interval_ms()).await;
}

/// Records of an interval of [`short_intervals`], in two pages of five.
pub const RECORDS: i64 = 10;

#[tokio::test(flavor = "multi_thread")]
async fn a_backfill_of_seven_days_runs_newest_first_without_blocking_live_ingestion() {
    let mut pipeline = Pipeline::with_stream("backfill", |text| {
        short_intervals(text, "15m").replace("catch_up = 2000", "catch_up = 1")
    })
    .await;
    pipeline.init().await;
    let _source = pipeline.source().await;
    let mut producer = pipeline.producer();
    producer.ready().await;
    wait_until("the first interval succeeds", TIMEOUT, || async {
        pipeline.runs().await.values().any(|run| run.state == "succeeded")
    })
    .await;
    producer.stop().await;
    let to_ms = *pipeline.runs().await.keys().next().unwrap();
    let from_ms = to_ms - 7 * DAY_MS;
    // Intervals before the first run keep the old schedule of 15 minutes. The new schedule applies to live ingestion.
    pipeline.edit_stream(|text| {
        text.replace("every = \"15m\"", "every = \"2s\"").replace("catch_up = 1", "catch_up = 2000")
    });
    let mut producer = pipeline.producer();
    let mut processor = pipeline.processor("one");
    producer.ready().await;
    processor.ready().await;

    let backfill = |more: &[&str], from_ms: i64| {
        let (from, to) = (rfc3339(from_ms), rfc3339(to_ms));
        let arguments: Vec<String> = ["backfill", "--from", &from, "--to", &to, "--newest-first"]
            .iter()
            .chain(more)
            .map(|argument| (*argument).to_owned())
            .collect();
        let pipeline = &pipeline;
        async move {
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            let output = pipeline.run("ingest-producer", &arguments, &[]).await;
            assert!(output.status.success(), "{}", text(&output.stderr));
            text(&output.stdout)
        }
    };
    let planned = backfill(&["--dry-run"], from_ms).await;
    let planned: Vec<String> =
        planned.lines().filter(|line| line.contains(" to ")).map(|line| line[..20].to_owned()).collect();
    assert_eq!(planned.len(), 7 * 24 * 4);
    assert!(
        pipeline.runs().await.values().all(|run| run.run_type != "backfill"),
        "a dry run must not start a run"
    );
    let started_ms = now_ms();
    let printed = backfill(&[], from_ms).await;
    assert!(printed.starts_with("backfill: 672 succeeded, 0 failed, 0 taken by others"), "{printed}");
    let runs = pipeline.runs().await;
    let mut done: Vec<_> = runs.values().filter(|run| run.run_type == "backfill").collect();
    // Of two runs that started in the same millisecond, the newer interval counts as the first.
    done.sort_by_key(|run| (run.started_ms, -run.start_ms));
    let done: Vec<String> = done.iter().map(|run| rfc3339(run.start_ms)).collect();
    assert_eq!(done, planned, "the runs must start in the order that the dry run printed");
    let live = runs
        .values()
        .filter(|run| run.run_type != "backfill" && run.state == "succeeded" && run.finished_ms > started_ms);
    assert!(live.count() >= 5, "live ingestion stopped during the backfill");
    producer.stop().await;
    assert_counted_once_when_fetched_again(
        &pipeline,
        backfill(&["--reprocess", "completed"], to_ms - 6 * HOUR_MS),
    )
    .await;
    processor.stop().await;
}

/// Asserts that the processor counts no event twice when `again` fetches 24 known intervals again.
async fn assert_counted_once_when_fetched_again(pipeline: &Pipeline, again: impl Future<Output = String>) {
    let processed = || async {
        wait_until("the whole log is processed", LONG_TIMEOUT, || async {
            pipeline.progress().await.next_offsets == pipeline.log_end(&pipeline.topic).await
        })
        .await;
        pipeline.progress().await
    };
    let before = processed().await;
    let printed = again.await;
    assert!(printed.starts_with("backfill: 24 succeeded"), "{printed}");
    let after = processed().await;
    assert_eq!(after.events, before.events);
    assert_eq!(after.duplicates, before.duplicates + 24 * RECORDS);
    pipeline.assert_counted_once(after.events).await;
}

/// Number of intervals of the backfill that is killed and stopped.
const BACKFILLED: i64 = 40;

#[tokio::test(flavor = "multi_thread")]
async fn a_backfill_completes_the_runs_that_a_killed_and_a_stopped_one_left() {
    let pipeline = Pipeline::with_stream("backfill_kills", |text| short_intervals(text, "15m")).await;
    pipeline.init().await;
    let _source = pipeline.source().await;
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    // Slow pages, so that the kill and the stop hit unfinished runs.
    let drip = json!({"drip_ms": 100, "drip_bytes": 1024, "faults": {"drip": {"rate": 1.0}}});
    pipeline.faults(&drip).await;
    let to_ms = (now_ms() - DAY_MS).div_euclid(pipeline.interval_ms()) * pipeline.interval_ms();
    let from_ms = to_ms - BACKFILLED * pipeline.interval_ms();
    let arguments = ["backfill", "--from", &rfc3339(from_ms), "--to", &rfc3339(to_ms)];
    let lease_ms = 3000;
    let lease = [("PIPELINE_LEASE_SECONDS", (lease_ms / 1000).to_string())];
    let wait_for_unfinished_runs = async |succeeded: usize| {
        wait_until("some runs have succeeded and others are running", LONG_TIMEOUT, || async {
            let runs = pipeline.runs().await;
            let in_state = |state: &str| runs.values().filter(|run| run.state == state).count();
            in_state("succeeded") >= succeeded && in_state("running") > 0
        })
        .await;
    };

    let first = pipeline.start_producer_command("backfill-killed", &arguments, &lease);
    wait_for_unfinished_runs(4).await;
    first.kill().await;
    let killed_ms = now_ms();
    assert!(pipeline.runs().await.values().any(|run| run.state == "running"), "the kill interrupted no run");
    wait_until("the leases of the killed backfill have expired", TIMEOUT, || async {
        now_ms() > killed_ms + lease_ms
    })
    .await;

    let second = pipeline.start_producer_command("backfill-stopped", &arguments, &lease);
    wait_for_unfinished_runs(12).await;
    assert_eq!(second.stop().await.code(), Some(143));
    let runs = pipeline.runs().await;
    assert!(runs.values().all(|run| run.state != "running"), "{runs:?}");
    assert!(runs.values().any(|run| run.state == "retrying"), "the stop interrupted no run: {runs:?}");

    pipeline.faults(&json!({})).await;
    let third = pipeline.backfill(from_ms, to_ms).await;
    let printed = text(&third.stdout);
    assert!(third.status.success(), "{printed}{}", text(&third.stderr));
    assert!(printed.contains("0 failed, 0 taken by others, 0 stopped"), "{printed}");
    assert_eq!(pipeline.assert_complete(to_ms).await as i64, BACKFILLED);
    let attempts = pipeline.attempts().await;
    for outcome in ["lost", "interrupted"] {
        assert!(
            attempts.values().flatten().any(|a| a.outcome == outcome),
            "no attempt is {outcome}: {attempts:?}"
        );
    }
    wait_until("the whole log is processed", LONG_TIMEOUT, || async {
        pipeline.progress().await.next_offsets == pipeline.log_end(&pipeline.topic).await
    })
    .await;
    pipeline.assert_counted_once(BACKFILLED * RECORDS).await;
    processor.stop().await;
}
