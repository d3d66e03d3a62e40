//! Tests of long outages of the source and of producers: unresolved intervals are counted until they are resolved.

use super::*;

/// The gauge of unresolved intervals, as (failed, missed).
fn unresolved(runner: &Runner) -> (f64, f64) {
    let families = runner.metrics.registry.gather();
    let family = families.iter().find(|family| family.name() == "ingest_unresolved_intervals").unwrap();
    let of = |state: &str| {
        let series = family.get_metric().iter().find(|series| series.get_label()[0].value() == state);
        series.unwrap().get_gauge().get_value()
    };
    (of("failed"), of("missed"))
}

/// A source that rejects every request until `rejecting` is cleared.
struct RejectingSource {
    rejecting: std::sync::atomic::AtomicBool,
    requests: AtomicU64,
}

#[async_trait]
impl FetchPage for RejectingSource {
    async fn fetch(&self, _: &PageRequest) -> Result<Page, AttemptError> {
        self.requests.fetch_add(1, Ordering::SeqCst);
        if self.rejecting.load(Ordering::SeqCst) {
            return Err(AttemptError::fatal("the source returned 404"));
        }
        Ok(page("{\"results\": []}"))
    }
}

/// Plans every five seconds for an hour.
async fn an_hour(world: &World, service: &mut Service) {
    for _ in 0..720 {
        world.pass(5000);
        service.tick().await.unwrap();
        service.wait_for_active().await;
    }
}

#[tokio::test]
async fn failed_intervals_are_counted_and_retried_until_they_succeed_or_are_given_up() {
    let world = World { catch_up_limit_ms: 2 * DAY, ..World::new(19, 0, 0) };
    let source = RejectingSource { rejecting: true.into(), requests: AtomicU64::new(0) };
    let source = Arc::new(source);
    let runner = Runner { source: source.clone(), ..Arc::into_inner(world.runner("a")).unwrap() };
    let runner = Arc::new(runner);
    let mut first = service(runner.clone());
    an_hour(&world, &mut first).await;
    let runs = world.ledger.all();
    let tried: usize = runs.iter().filter(|run| run.state == RunState::Failed).count();
    assert!(tried > 10 && unresolved(&runner) == (tried as f64, 0.0), "{tried} {:?}", unresolved(&runner));
    let requests = source.requests.load(Ordering::SeqCst);
    assert!(requests < 200, "an unavailable source must receive few requests, not {requests}");

    // The first interval is given up. After a restart, all other failed intervals are still counted.
    let span = crate::config::SpanArgs {
        from: runs[0].interval.start_ms,
        to: runs[1].interval.start_ms,
        state: None,
    };
    crate::runs::give_up(&*world.ledger, &span, world.now.load(Ordering::SeqCst)).await.unwrap();
    let mut second = service(runner.clone());
    second.tick().await.unwrap();
    second.wait_for_active().await;
    assert!(unresolved(&runner).0 >= tried as f64 - 1.0, "{tried} {:?}", unresolved(&runner));
    source.rejecting.store(false, Ordering::SeqCst);
    an_hour(&world, &mut second).await;
    let runs = world.ledger.all();
    assert_eq!(runs[0].state, RunState::GivenUp);
    assert!(runs[1..].iter().all(|run| run.state == RunState::Succeeded), "{runs:?}");
    assert_eq!(unresolved(&runner), (0.0, 0.0));
}

#[tokio::test]
async fn missed_intervals_are_counted_until_they_are_given_up() {
    let world = World { catch_up_limit_ms: 30 * MINUTE, ..World::new(21, 0, 0) };
    settle(&world).await;
    world.pass(2 * DAY);
    let runner = world.runner("d");
    let mut service = service(runner.clone());
    an_hour(&world, &mut service).await;
    let missed = 2 * 1440 - 30;
    assert_eq!(unresolved(&runner), (0.0, missed as f64));
    let from = world.ledger.all()[0].interval.start_ms;
    let span = crate::config::SpanArgs { from, to: from + 3 * DAY, state: Some(RunState::Failed) };
    let done = crate::runs::give_up(&*world.ledger, &span, 0).await.unwrap();
    assert_eq!(done.text, format!("{missed} runs given up"));
    service.tick().await.unwrap();
    assert_eq!(unresolved(&runner), (0.0, 0.0));
}
