//! The test suite that every run ledger must pass. The unit tests run it on the memory ledger, and `./test e2e` runs
//! it on Cassandra (`tests/ledger.rs`). Paths start with the crate name, so that both can compile it.

use common::contracts::run_ledger::{Interval, RunState, RunType};
use ingest_producer::ledger::{
    Attempt, Claim, Counts, Ending, Lease, Ledger, LedgerError, Note, OUTCOME_FAILED, OUTCOME_LOST,
};
use ingest_producer::planner::Run;
use std::sync::Arc;

/// Start of the last minute of a month. The next interval is on another day and in another month.
const T0: i64 = 1_772_323_140_000;
const MINUTE: i64 = 60_000;
const LEASE_MS: i64 = 30_000;
/// Number of producers that race for one interval.
const RACERS: usize = 8;

/// Runs all tests. `make` creates an empty ledger for the stream with the given name.
pub async fn all(make: impl AsyncFn(&str) -> Arc<dyn Ledger>) {
    only_one_claim_gets_the_lease(&*make("claim").await).await;
    the_owner_of_a_lost_lease_changes_nothing(&*make("fence").await).await;
    a_run_retries_and_succeeds(&*make("retry").await).await;
    a_backfill_of_a_failed_run_starts_over(&*make("over").await).await;
    the_automatic_retry_of_a_failed_run_does_not_start_over(&*make("goes_on").await).await;
    unfinished_runs_are_found_without_the_succeeded_ones(&*make("unfinished").await).await;
    time_without_a_producer_does_not_count(&*make("idle").await).await;
    a_note_does_not_change_an_existing_row(&*make("note").await).await;
    the_first_record_of_an_attempt_is_kept(&*make("record").await).await;
    overruling_is_fenced_and_revokes_the_lease(&*make("overrule").await).await;
    schedules_change_by_compare_and_set_and_keep_the_pause(&*make("state").await).await;
    runs_are_found_across_days_and_months_in_order(&*make("span").await).await;
    one_of_several_racing_producers_wins(make("race").await).await;
}

fn interval(n: i64) -> Interval {
    Interval { start_ms: T0 + n * MINUTE, end_ms: T0 + (n + 1) * MINUTE }
}

fn lease(run_id: &str, now_ms: i64) -> Lease {
    Lease {
        run_id: run_id.to_owned(),
        owner: format!("owner of {run_id}"),
        now_ms,
        until_ms: now_ms + LEASE_MS,
    }
}

async fn claim(ledger: &dyn Ledger, seen: Option<&Run>, lease: &Lease) -> Option<Claim> {
    ledger.claim(interval(0), RunType::Scheduled, seen, lease).await.unwrap()
}

async fn row(ledger: &dyn Ledger) -> Run {
    ledger.run(T0).await.unwrap().expect("a row")
}

/// The row of a run after a claim.
fn running(claim: &Claim, lease: &Lease) -> Run {
    Run {
        interval: claim.interval,
        state: RunState::Running,
        run_type: claim.run_type,
        run_id: lease.run_id.clone(),
        attempt: claim.attempt,
        owner: lease.owner.clone(),
        epoch: claim.epoch,
        lease_until_ms: lease.until_ms,
        retry_at_ms: 0,
        started_at_ms: claim.first_started_ms,
        finished_at_ms: 0,
        pages: 0,
        records: 0,
        acked: 0,
        bytes: 0,
        error: String::new(),
    }
}

fn ending(state: RunState, error: &str, now_ms: i64) -> Ending {
    let counts = Counts { pages: 2, records: 30, acked: 29, bytes: 400 };
    Ending { state, counts, error: error.to_owned(), now_ms, retry_at_ms: now_ms + 5000 }
}

async fn only_one_claim_gets_the_lease(ledger: &dyn Ledger) {
    assert_eq!(ledger.run(T0).await.unwrap(), None);
    let first = lease("first", T0 + MINUTE);
    let won = claim(ledger, None, &first).await.expect("the lease is free");
    assert_eq!(
        (won.attempt, won.epoch, won.first_started_ms, won.started_ms),
        (1, 1, T0 + MINUTE, T0 + MINUTE)
    );
    assert_eq!(row(ledger).await, running(&won, &first));
    assert_eq!(claim(ledger, None, &lease("second", T0 + MINUTE)).await, None, "the run already has a row");
    assert_eq!(
        claim(ledger, None, &first).await,
        Some(won),
        "repeating a claim whose response was lost returns the same claim"
    );
}

async fn the_owner_of_a_lost_lease_changes_nothing(ledger: &dyn Ledger) {
    let now = T0 + MINUTE;
    let first = claim(ledger, None, &lease("first", now)).await.unwrap();
    assert!(ledger.renew(&first, now + 2 * LEASE_MS).await.unwrap());
    let seen = row(ledger).await;
    assert_eq!(seen.lease_until_ms, now + 2 * LEASE_MS);
    let second_lease = lease("second", now + 2 * LEASE_MS);
    let second = claim(ledger, Some(&seen), &second_lease).await.expect("the lease has expired");
    assert_eq!((second.attempt, second.epoch), (2, 2));
    assert_eq!(
        claim(ledger, Some(&seen), &lease("third", now + 2 * LEASE_MS)).await,
        None,
        "the row has changed since it was read"
    );
    assert!(!ledger.renew(&first, i64::MAX / 2).await.unwrap());
    assert!(!ledger.finish(&first, &ending(RunState::Failed, "too late", now)).await.unwrap());
    assert_eq!(row(ledger).await, running(&second, &second_lease));
}

async fn a_run_retries_and_succeeds(ledger: &dyn Ledger) {
    let now = T0 + MINUTE;
    let first_lease = lease("first", now);
    let first = claim(ledger, None, &first_lease).await.unwrap();
    assert!(ledger.finish(&first, &ending(RunState::Retrying, "500", now + 7)).await.unwrap());
    let retrying = Run {
        state: RunState::Retrying,
        error: "500".to_owned(),
        pages: 2,
        records: 30,
        acked: 29,
        bytes: 400,
        lease_until_ms: now + 7,
        retry_at_ms: now + 5007,
        ..running(&first, &first_lease)
    };
    assert_eq!(row(ledger).await, retrying);
    let second_lease = lease("second", now + 5007);
    let second = claim(ledger, Some(&retrying), &second_lease).await.unwrap();
    assert_eq!((second.attempt, second.first_started_ms), (2, now));
    assert!(ledger.finish(&second, &ending(RunState::Succeeded, "", now + 6000)).await.unwrap());
    let over = row(ledger).await;
    assert_eq!((over.state, over.error.as_str(), over.finished_at_ms), (RunState::Succeeded, "", now + 6000));
    assert_eq!((over.attempt, over.records, over.acked), (2, 30, 29));
}

async fn a_backfill_of_a_failed_run_starts_over(ledger: &dyn Ledger) {
    let now = T0 + MINUTE;
    let first = claim(ledger, None, &lease("first", now)).await.unwrap();
    ledger.finish(&first, &ending(RunState::Failed, "404", now)).await.unwrap();
    let over = row(ledger).await;
    let again = lease("again", now + 86_400_000);
    let reclaimed = ledger.claim(interval(0), RunType::Backfill, Some(&over), &again).await.unwrap().unwrap();
    assert_eq!(
        (reclaimed.attempt, reclaimed.first_started_ms),
        (3, again.now_ms),
        "number 2 is the record that the run was cleared"
    );
    let row = row(ledger).await;
    assert_eq!((row.run_type, row.state), (RunType::Backfill, RunState::Running));
}

async fn the_automatic_retry_of_a_failed_run_does_not_start_over(ledger: &dyn Ledger) {
    let now = T0 + MINUTE;
    let first = claim(ledger, None, &lease("first", now)).await.unwrap();
    ledger.finish(&first, &ending(RunState::Failed, "404", now)).await.unwrap();
    let failed = row(ledger).await;
    assert_eq!((failed.retry_at_ms, failed.finished_at_ms), (now + 5000, now));
    let again = lease("again", now + 6000);
    let reclaimed =
        ledger.claim(interval(0), RunType::CatchUp, Some(&failed), &again).await.unwrap().unwrap();
    assert_eq!(
        (reclaimed.attempt, reclaimed.first_started_ms),
        (2, now + 1000),
        "the start moves forward by the second that the retry was late"
    );
}

async fn unfinished_runs_are_found_without_the_succeeded_ones(ledger: &dyn Ledger) {
    let now = T0 + MINUTE;
    let states = [RunState::Succeeded, RunState::Retrying, RunState::Failed];
    for (n, state) in (0..).zip(states) {
        let lease = lease("first", now);
        let claim = ledger.claim(interval(n), RunType::Scheduled, None, &lease).await.unwrap().unwrap();
        ledger.finish(&claim, &ending(state, "", now)).await.unwrap();
    }
    let failed = ledger.run(T0 + 2 * MINUTE).await.unwrap().unwrap();
    assert!(ledger.overrule(&failed, RunState::GivenUp, "no data", now).await.unwrap());
    for n in 3..5 {
        let (state, run_type) = (RunState::Scheduled, RunType::CatchUp);
        let note = Note { interval: interval(n), state, run_type, cause: String::new() };
        ledger.note(&note, now).await.unwrap();
    }
    ledger.claim(interval(5), RunType::Scheduled, None, &lease("first", now)).await.unwrap().unwrap();
    let found = ledger.unfinished(T0, T0 + 6 * MINUTE).await.unwrap();
    let states: Vec<_> = found.iter().map(|run| ((run.interval.start_ms - T0) / MINUTE, run.state)).collect();
    let (retrying, given_up) = ((1, RunState::Retrying), (2, RunState::GivenUp));
    let waiting = [(3, RunState::Scheduled), (4, RunState::Scheduled), (5, RunState::Running)];
    assert_eq!(states, [&[retrying, given_up], &waiting[..]].concat());
    assert_eq!(ledger.unfinished(T0 + 4 * MINUTE, T0 + 5 * MINUTE).await.unwrap().len(), 1);
}

async fn time_without_a_producer_does_not_count(ledger: &dyn Ledger) {
    let now = T0 + MINUTE;
    let first = claim(ledger, None, &lease("first", now)).await.unwrap();
    ledger.finish(&first, &ending(RunState::Retrying, "500", now)).await.unwrap();
    let seen = row(ledger).await;
    let hours_later = seen.retry_at_ms + 7_200_000;
    let second = claim(ledger, Some(&seen), &lease("second", hours_later)).await.unwrap();
    assert_eq!(second.first_started_ms, now + 7_200_000, "two hours without a producer do not count");
    let seen = row(ledger).await;
    let third = claim(ledger, Some(&seen), &lease("third", seen.lease_until_ms + 1000)).await.unwrap();
    assert_eq!(third.first_started_ms, now + 7_201_000, "the time until the lease expired counts");
}

async fn a_note_does_not_change_an_existing_row(ledger: &dyn Ledger) {
    let note = |state, cause: &str| Note {
        interval: interval(0),
        state,
        run_type: RunType::CatchUp,
        cause: cause.to_owned(),
    };
    ledger.note(&note(RunState::Scheduled, ""), T0).await.unwrap();
    ledger.note(&note(RunState::Failed, "missed"), T0 + 1).await.unwrap();
    let noted = row(ledger).await;
    let expected = Run {
        interval: interval(0),
        state: RunState::Scheduled,
        run_type: RunType::CatchUp,
        run_id: String::new(),
        attempt: 0,
        owner: String::new(),
        epoch: 1,
        lease_until_ms: T0,
        retry_at_ms: 0,
        started_at_ms: 0,
        finished_at_ms: 0,
        pages: 0,
        records: 0,
        acked: 0,
        bytes: 0,
        error: String::new(),
    };
    assert_eq!(noted, expected);
    let reclaimed = claim(ledger, Some(&noted), &lease("first", T0 + 90_000)).await.unwrap();
    assert_eq!((reclaimed.attempt, reclaimed.epoch, reclaimed.first_started_ms), (1, 2, T0 + 90_000));
    ledger.note(&Note { interval: interval(1), ..note(RunState::Failed, "missed") }, T0 + 2).await.unwrap();
    let missed = ledger.run(T0 + MINUTE).await.unwrap().unwrap();
    assert_eq!(
        (missed.state, missed.error.as_str(), missed.finished_at_ms),
        (RunState::Failed, "missed", T0 + 2)
    );
}

async fn the_first_record_of_an_attempt_is_kept(ledger: &dyn Ledger) {
    let attempt = |number, outcome: &str| Attempt {
        interval: interval(0),
        number,
        run_id: format!("run {number}"),
        owner: "a".to_owned(),
        outcome: outcome.to_owned(),
        cause: "because".to_owned(),
        http_status: (number == 2).then_some(503),
        counts: Counts { pages: 1, records: 2, acked: 0, bytes: 4 },
        started_ms: T0 + i64::from(number),
        milliseconds: 17,
    };
    for (number, outcome) in [(2, OUTCOME_FAILED), (1, OUTCOME_FAILED), (2, OUTCOME_LOST)] {
        ledger.record(&attempt(number, outcome)).await.unwrap();
    }
    let found = ledger.attempts(T0).await.unwrap();
    let outcomes: Vec<_> = found.iter().map(|a| (a.number, a.outcome.as_str(), a.http_status)).collect();
    assert_eq!(outcomes, [(1, OUTCOME_FAILED, None), (2, OUTCOME_FAILED, Some(503))]);
    let (first, expected) = (&found[0], attempt(1, OUTCOME_FAILED));
    assert_eq!(
        (&first.run_id, &first.cause, first.counts),
        (&expected.run_id, &expected.cause, expected.counts)
    );
    assert_eq!((first.started_ms, first.milliseconds), (T0 + 1, 17));
    assert_eq!(ledger.attempts(T0 + MINUTE).await.unwrap(), []);
}

async fn overruling_is_fenced_and_revokes_the_lease(ledger: &dyn Ledger) {
    let now = T0 + MINUTE;
    let first = claim(ledger, None, &lease("first", now)).await.unwrap();
    let seen = row(ledger).await;
    assert!(ledger.overrule(&seen, RunState::Scheduled, "", now + 1).await.unwrap());
    assert!(!ledger.overrule(&seen, RunState::GivenUp, "too late", now + 2).await.unwrap());
    assert!(!ledger.finish(&first, &ending(RunState::Succeeded, "", now + 3)).await.unwrap());
    let cleared = row(ledger).await;
    assert_eq!((cleared.state, cleared.attempt, cleared.epoch), (RunState::Scheduled, 2, 2));
    assert!(ledger.overrule(&cleared, RunState::GivenUp, "by hand", now + 4).await.unwrap());
    let given_up = row(ledger).await;
    assert_eq!((given_up.error.as_str(), given_up.finished_at_ms), ("by hand", now + 4));
}

async fn schedules_change_by_compare_and_set_and_keep_the_pause(ledger: &dyn Ledger) {
    assert!(!ledger.set_paused(true).await.unwrap(), "no producer has planned the stream yet");
    assert!(ledger.set_schedules(None, "[1]", 5).await.unwrap());
    assert!(!ledger.set_schedules(None, "[2]", 6).await.unwrap(), "another producer was first");
    assert!(ledger.set_paused(true).await.unwrap());
    assert!(!ledger.set_schedules(Some("[0]"), "[2]", 7).await.unwrap(), "the stored schedules differ");
    assert!(ledger.set_schedules(Some("[1]"), "[3]", 8).await.unwrap());
    let state = ledger.stream_state().await.unwrap();
    assert_eq!((state.paused, state.schedules.as_deref(), state.updated_at_ms), (true, Some("[3]"), 8));
    ledger.touch(9).await.unwrap();
    assert!(ledger.set_paused(false).await.unwrap());
    let state = ledger.stream_state().await.unwrap();
    assert_eq!((state.paused, state.schedules.as_deref(), state.updated_at_ms), (false, Some("[3]"), 9));
}

async fn runs_are_found_across_days_and_months_in_order(ledger: &dyn Ledger) {
    for n in [1, -1, 0, 1441, -1440] {
        let (run_type, cause) = (RunType::CatchUp, String::new());
        let note = Note { interval: interval(n), state: RunState::Scheduled, run_type, cause };
        ledger.note(&note, T0).await.unwrap();
    }
    let found = async |from: i64, to: i64| -> Vec<i64> {
        let runs = ledger.runs(T0 + from * MINUTE, T0 + to * MINUTE).await.unwrap();
        runs.iter().map(|run| (run.interval.start_ms - T0) / MINUTE).collect()
    };
    assert_eq!(found(-1440, 1442).await, [-1440, -1, 0, 1, 1441]);
    assert_eq!(found(0, 1).await, [0], "`from` is inclusive, `to` is exclusive");
    assert_eq!(found(1, 1441).await, [1]);
    assert_eq!(found(5, 5).await, [] as [i64; 0]);
}

async fn one_of_several_racing_producers_wins(ledger: Arc<dyn Ledger>) {
    let mut seen = None;
    for round in 0..5 {
        let racing = (0..RACERS).map(|racer| {
            let (ledger, seen): (Arc<dyn Ledger>, Option<Run>) = (ledger.clone(), seen.clone());
            tokio::spawn(async move {
                let lease = lease(&format!("{round}/{racer}"), T0 + MINUTE + round);
                loop {
                    match ledger.claim(interval(0), RunType::Scheduled, seen.as_ref(), &lease).await {
                        Ok(claimed) => return claimed,
                        // With this contention the result is unknown, so the same claim is repeated.
                        Err(LedgerError::Unavailable(_)) => {}
                        Err(e) => panic!("{e}"),
                    }
                }
            })
        });
        let racing: Vec<_> = racing.collect();
        let mut winners = Vec::new();
        for racer in racing {
            winners.extend(racer.await.unwrap());
        }
        assert_eq!(winners.len(), 1, "{winners:?}");
        let row = row(&*ledger).await;
        assert_eq!((row.run_id.as_str(), row.epoch), (winners[0].run_id.as_str(), round + 1));
        seen = Some(row);
    }
}
