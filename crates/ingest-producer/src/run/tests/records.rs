//! Tests of the records of unusual pages, and of how much of a page is in memory.

use super::*;
use crate::run::batch::{BATCH_BYTES, BATCH_RECORDS};

/// Returns the same page for every request.
struct FixedSource(Page);

#[async_trait]
impl FetchPage for FixedSource {
    async fn fetch(&self, _: &PageRequest) -> Result<Page, AttemptError> {
        Ok(self.0.clone())
    }
}

impl World {
    /// Runs one attempt for the last minute with a source that returns `body`.
    async fn attempt_at(&self, body: String) -> (Ended, Run) {
        self.attempt_with(page(&body)).await
    }

    async fn attempt_with(&self, page: Page) -> (Ended, Run) {
        let runner = Arc::into_inner(self.runner("a")).unwrap();
        let mut runner = Runner { source: Arc::new(FixedSource(page)), ..runner };
        runner.definition.source.pagination.order = common::contracts::stream::PageOrder::None;
        let runner = Arc::new(runner);
        let interval = Interval { start_ms: T0 - MINUTE, end_ms: T0 };
        let claim = runner.claim(interval, RunType::Scheduled, None).await.unwrap().unwrap();
        let ended = runner.attempt(claim, CancellationToken::new()).await;
        (ended, self.ledger.run(interval.start_ms).await.unwrap().unwrap())
    }
}

/// A person with the given JSON text for the age.
fn person(id: &str, age: &str) -> String {
    format!(
        r#"{{"login": {{"uuid": "{id}"}}, "name": {{"first": "A", "last": "B"}}, "dob": {{"age": {age}}}}}"#
    )
}

#[tokio::test]
async fn an_invalid_record_does_not_affect_the_rest_of_its_page() {
    let world = World::new(13, 0, 0);
    let people = [person("a", "01"), person("b", "1"), person("c", "2").replace("\"c\"", "1.5")];
    let body = format!("{{\"results\": [{}]}}", people.join(", "));
    let (ended, run) = world.attempt_at(body).await;
    assert_eq!((ended, run.records, run.acked), (Ended::Succeeded, 3, 3));
    let delivered: Vec<String> =
        world.kafka.delivered.lock().unwrap().keys().map(|(id, _)| id.clone()).collect();
    assert_eq!(delivered, ["b"]);
    let refused = world.kafka.refused.lock().unwrap();
    assert!(refused[0].contains("not valid JSON") && refused[1].contains("is a float"), "{refused:?}");
}

#[tokio::test]
async fn an_interval_that_is_not_over_on_the_clock_of_the_source_is_fetched_later() {
    let date = |ms: i64| chrono::DateTime::from_timestamp_millis(ms).unwrap().to_rfc2822();
    let page_of = |headers: &[(&str, String)]| Page {
        headers: Headers(headers.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect()),
        ..page("{\"results\": []}")
    };
    let world = World::new(17, 0, 0);
    let (ended, run) = world.attempt_with(page_of(&[("date", date(T0 - 31_000))])).await;
    assert_eq!((ended, run.retry_at_ms), (Ended::Retrying, T0 + 30_001), "{run:?}");
    assert!(run.error.starts_with("the interval ends in 30001 ms by the clock of the source"), "{run:?}");
    for headers in
        [vec![("date", date(T0 - 1000)), ("age", "1".to_owned())], vec![("date", "soon".to_owned())]]
    {
        let (ended, run) = World::new(17, 0, 0).attempt_with(page_of(&headers)).await;
        assert_eq!(ended, Ended::Succeeded, "{run:?}");
    }
}

#[tokio::test]
async fn a_stream_that_looks_back_fetches_each_interval_again_and_records_each_attempt() {
    let world = World { lookback: 2, ..World::new(21, 0, 0) };
    let mut service = world.service("a");
    for _ in 0..20 {
        service.tick().await.unwrap();
        service.wait_for_active().await;
        world.pass(30_000);
    }
    let attempts = world.ledger.attempts(T0 + MINUTE).await.unwrap();
    let ended: Vec<(i64, &str)> =
        attempts.iter().map(|a| ((a.started_ms - T0) / MINUTE, a.outcome.as_str())).collect();
    let refetch = |minute| [(minute, OUTCOME_CLEARED), (minute, OUTCOME_SUCCEEDED)];
    assert_eq!(ended, [&[(2, OUTCOME_SUCCEEDED)][..], &refetch(3), &refetch(4)].concat());
    let run = world.ledger.run(T0 + MINUTE).await.unwrap().unwrap();
    assert_eq!((run.state, run.run_type), (RunState::Succeeded, RunType::Lookback));
    world.check(21);
}

#[tokio::test]
async fn a_page_is_published_in_batches_while_it_is_read() {
    let world = World::new(15, 0, 0);
    let people: Vec<String> = (0..3 * BATCH_RECORDS).map(|n| person(&format!("id-{n:05}"), "1")).collect();
    // The records before the double comma are published before the error is found.
    let body = format!("{{\"results\": [{},, {}]}}", people[..2 * BATCH_RECORDS].join(","), people[0]);
    let (ended, run) = world.attempt_at(body).await;
    assert_eq!((ended, run.records, run.acked), (Ended::Retrying, 1000, 1000), "{run:?}");
    assert!(
        run.error.contains("not valid JSON at byte") && run.error.contains("expected a value"),
        "{run:?}"
    );
    assert_eq!(world.kafka.largest_batch.load(Ordering::SeqCst), BATCH_RECORDS as u64);
    let large = format!("\"{}\"", "x".repeat(BATCH_BYTES / 10));
    let body = format!("{{\"results\": [{}]}}", vec![large; 100].join(","));
    world.kafka.largest_batch.store(0, Ordering::SeqCst);
    let other = World { kafka: world.kafka.clone(), ..World::new(15, 0, 0) };
    assert_eq!(other.attempt_at(body).await.0, Ended::Succeeded);
    assert_eq!(other.kafka.largest_batch.load(Ordering::SeqCst), 10, "the size in bytes limits a batch too");
}

#[tokio::test]
async fn nothing_is_produced_to_a_topic_that_does_not_match_its_registration() {
    let world = World::new(23, 0, 0);
    world.topic.0.store(true, Ordering::SeqCst);
    let (ended, run) = world.attempt_at(format!("{{\"results\": [{}]}}", person("a", "1"))).await;
    assert_eq!((ended, run.pages, run.acked), (Ended::Failed, 0, 0));
    assert!(run.error.starts_with("12 partitions, but registered with 6"), "{run:?}");
    assert!(world.kafka.delivered.lock().unwrap().is_empty());
}
