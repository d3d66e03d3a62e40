//! Runs many seeded schedules, none of which may violate a guarantee. `PIPELINE_SIMULATION_SEEDS` sets their number.

use super::choices::{Choices, shrink};
use super::schedule::{Case, run};
use std::sync::atomic::{AtomicU64, Ordering};

/// Number of schedules with checkpoints in memory.
const SEEDS: u64 = 50_000;
/// Number of schedules with real state files on simulated disks.
const DISK_SEEDS: u64 = 5_000;

fn seed_count(default: u64) -> u64 {
    let set = std::env::var("PIPELINE_SIMULATION_SEEDS");
    set.ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(default)
}

/// Returns the lowest of `seeds` that violates a guarantee.
pub fn first_failing(seeds: std::ops::Range<u64>, case: Case) -> Option<u64> {
    let (next, failing) = (AtomicU64::new(seeds.start), AtomicU64::new(u64::MAX));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end || seed > failing.load(Ordering::Relaxed) {
                        return;
                    }
                    if run(Choices::seeded(seed), case).violation.is_some() {
                        failing.fetch_min(seed, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    Some(failing.into_inner()).filter(|seed| *seed < u64::MAX)
}

/// Shrinks the schedule of a failing `seed`. Returns the trace of the shortest schedule that fails in the same way.
pub fn shortest_trace(seed: u64, case: Case) -> String {
    let failing = run(Choices::seeded(seed), case).made;
    let retry = |list: &[u32]| {
        let run = run(Choices::given(list), case);
        run.violation.map(|violation| (violation, run.trace_len))
    };
    let short = shrink(failing, retry);
    let shortest = run(Choices::given(&short), Case { trace: true, ..case });
    format!("seed {seed}, choices {short:?}\n  {}", shortest.trace.join("\n  "))
}

/// Runs the seeds. Panics with the shrunk trace of the first failing one.
pub fn check(seeds: u64, case: Case) {
    if let Some(seed) = first_failing(0..seeds, case) {
        panic!("{}", shortest_trace(seed, case));
    }
}

#[test]
fn no_schedule_of_faults_violates_a_guarantee_for_readers_or_at_the_end() {
    check(seed_count(SEEDS), Case::default());
}

#[test]
fn no_schedule_of_faults_violates_a_guarantee_with_real_state_files() {
    check(seed_count(DISK_SEEDS), Case { on_disk: true, ..Case::default() });
}

#[test]
fn a_seed_always_produces_the_same_trace() {
    for seed in 0..20 {
        let case = Case { trace: true, ..Case::default() };
        let (once, again) = (run(Choices::seeded(seed), case), run(Choices::seeded(seed), case));
        assert_eq!(once.trace, again.trace);
        assert_eq!(run(Choices::given(&once.made), case).trace, once.trace);
    }
}

#[test]
fn the_seeds_contain_enough_faults() {
    let runs: Vec<_> = (0..500).map(|seed| run(Choices::seeded(seed), Case::default())).collect();
    let with = |least: u32| runs.iter().filter(|run| run.faults >= least).count();
    assert!(with(1) > 300 && with(2) > 100, "{} and {} of 500", with(1), with(2));
}
