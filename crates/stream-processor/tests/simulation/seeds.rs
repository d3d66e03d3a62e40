//! Many seeds: none may break a promise. `PIPELINE_SIMULATION_SEEDS` runs more of them.

use super::choices::{Choices, shrink};
use super::schedule::{Case, run};
use std::sync::atomic::{AtomicU64, Ordering};

/// Schedules with the checkpoint in memory.
const SEEDS: u64 = 50_000;
/// Schedules with real state files on simulated disks.
const DISK_SEEDS: u64 = 5_000;

fn wanted(default: u64) -> u64 {
    let set = std::env::var("PIPELINE_SIMULATION_SEEDS");
    set.ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(default)
}

/// The lowest seed of `seeds` that breaks a promise.
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

/// The story of the shortest schedule found that fails as `seed` does.
pub fn shortest_story(seed: u64, case: Case) -> String {
    let failing = run(Choices::seeded(seed), case).made;
    let retry = |list: &[u32]| {
        let run = run(Choices::given(list), case);
        run.violation.map(|what| (what, run.moments))
    };
    let short = shrink(failing, retry);
    let told = run(Choices::given(&short), Case { story: true, ..case });
    format!("seed {seed}, choices {short:?}\n  {}", told.story.join("\n  "))
}

/// Runs the seeds; the first that fails is shrunk and told.
pub fn check(seeds: u64, case: Case) {
    if let Some(seed) = first_failing(0..seeds, case) {
        panic!("{}", shortest_story(seed, case));
    }
}

#[test]
fn no_schedule_of_faults_breaks_a_promise_to_readers_or_at_the_end() {
    check(wanted(SEEDS), Case::default());
}

#[test]
fn no_schedule_of_faults_breaks_a_promise_on_real_state_files() {
    check(wanted(DISK_SEEDS), Case { on_disk: true, ..Case::default() });
}

#[test]
fn a_seed_is_told_again_word_for_word() {
    for seed in 0..20 {
        let case = Case { story: true, ..Case::default() };
        let (once, again) = (run(Choices::seeded(seed), case), run(Choices::seeded(seed), case));
        assert_eq!(once.story, again.story);
        assert_eq!(run(Choices::given(&once.made), case).story, once.story);
    }
}

#[test]
fn the_seeds_hold_faults_enough() {
    let runs: Vec<_> = (0..500).map(|seed| run(Choices::seeded(seed), Case::default())).collect();
    let with = |least: u32| runs.iter().filter(|run| run.faults >= least).count();
    assert!(with(1) > 300 && with(2) > 100, "{} and {} of 500", with(1), with(2));
}
