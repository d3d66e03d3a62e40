//! Two producers of one stream that are killed at random times. No interval may be missing or run twice at the same
//! time, and no record may be lost.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::harness::{LONG_TIMEOUT, Pipeline, Service, is_long_run, now_ms, wait_until};
use crate::ingest::short_intervals;

/// Duration of the test in seconds.
const SECONDS: u64 = 30;
const LONG_SECONDS: u64 = 240;
const LEASE_SECONDS: i64 = 3;

/// SplitMix64. The same seed gives the same sequence of kills.
struct Rng(u64);

impl Rng {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn random_kills_of_two_producers_cause_no_gap_no_concurrent_run_and_no_lost_record() {
    let seed = u64::try_from(now_ms()).unwrap();
    println!("seed {seed}");
    let mut rng = Rng(seed);
    let pipeline = Pipeline::with_stream("kills_ingest", |text| short_intervals(text, "1s")).await;
    pipeline.init().await;
    let _source = pipeline.source().await;
    // Slow pages, so that kills hit unfinished runs. Some requests also fail.
    let faults =
        json!({"drip_ms": 40, "drip_bytes": 1024, "faults": {"drip": {"rate": 0.6}, "error": {"rate": 0.1}}});
    pipeline.faults(&faults).await;
    let start =
        |name: &str| pipeline.producer_with(name, &[("PIPELINE_LEASE_SECONDS", LEASE_SECONDS.to_string())]);
    let mut producers: Vec<(&str, Service)> = vec![("a", start("a")), ("b", start("b"))];
    for (_, producer) in &mut producers {
        producer.ready().await;
    }
    let until = Instant::now() + Duration::from_secs(if is_long_run() { LONG_SECONDS } else { SECONDS });
    let mut kills = 0;
    while Instant::now() < until {
        // The sleep makes the time of the kill random. It does not wait for a condition.
        tokio::time::sleep(Duration::from_millis(300 + rng.below(1700))).await;
        let index = usize::try_from(rng.below(2)).unwrap();
        let (name, killed) = producers.remove(index);
        killed.kill().await;
        producers.push((name, start(name)));
        kills += 1;
    }
    pipeline.faults(&json!({})).await;
    let until_ms = now_ms();
    wait_until("all intervals have succeeded", LONG_TIMEOUT, || async {
        pipeline.succeeded_up_to(until_ms).await
    })
    .await;
    for (_, producer) in producers {
        producer.stop().await;
    }
    let checked = pipeline.assert_complete(until_ms - pipeline.interval_ms()).await;
    let attempts = pipeline.attempts().await;
    for (start_ms, of_run) in attempts.range(..until_ms - 2 * pipeline.interval_ms()) {
        assert_eq!(of_run.last().unwrap().outcome, "succeeded", "interval {start_ms}: {of_run:?}");
        for pair in of_run.windows(2) {
            // The producer may be killed after it writes the row of a succeeded attempt and before it writes the row of
            // the run. The run then starts again with the same ids when the lease has expired, as after a lost attempt.
            let lease_ms = LEASE_SECONDS * 1000;
            let ended_ms = match pair[0].outcome.as_str() {
                "succeeded" => pair[0].started_ms + lease_ms,
                _ => pair[0].ended_ms(lease_ms),
            };
            assert!(
                pair[1].started_ms >= ended_ms,
                "interval {start_ms}: two attempts at the same time: {pair:?}"
            );
        }
    }
    let lost = attempts.values().flatten().filter(|a| a.outcome == "lost").count();
    println!("{checked} intervals, {kills} kills, {lost} attempts lost");
    assert!(lost > 0, "no kill interrupted a run");
}
