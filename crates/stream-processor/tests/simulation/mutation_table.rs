//! Each repair taken out, each pair of steps swapped: how many seeds until the simulation notices.

use super::choices::Choices;
use super::mutations::Mutation;
use super::schedule::{Case, run};
use super::seeds::first_failing;

/// Seeds within which every mutation must be noticed.
const WITHIN: u64 = 2_000;

const NOTICED: [Mutation; 25] = [
    Mutation::Fence,
    Mutation::CopiesInOneBatch,
    Mutation::Freeze,
    Mutation::IdOnly,
    Mutation::ReplayMarks,
    Mutation::ReplayHot,
    Mutation::RawWatermark,
    Mutation::LookUpsAhead,
    Mutation::StampsByClock,
    Mutation::StaleState,
    Mutation::Horizon,
    Mutation::FutureBound,
    Mutation::Fingerprint,
    Mutation::FollowPosition,
    Mutation::NoteWritten,
    Mutation::ReopenAfterOutage,
    Mutation::StoreBehind,
    Mutation::RecordSkips,
    Mutation::FirstProgress,
    Mutation::RunningTotal,
    Mutation::CommitBeforeRows,
    Mutation::CommitBeforeDeadLetters,
    Mutation::CommitBeforePanes,
    Mutation::PublishBeforeCommit,
    Mutation::PanesBeforeRows,
];

/// Swaps of which only a reader on the way can see anything: what is written, or lost, is the same in the end.
const HARMLESS_AT_THE_END: [Mutation; 2] = [Mutation::PublishBeforeCommit, Mutation::PanesBeforeRows];

fn seeds_until(mutation: Mutation, end_only: bool, within: u64) -> Option<u64> {
    let case = Case { mutation: Some(mutation), end_only, ..Case::default() };
    first_failing(0..within, case).map(|seed| seed + 1)
}

#[test]
fn each_repair_taken_out_and_each_swap_of_steps_is_noticed() {
    let within = |seeds: Option<u64>| seeds.map_or_else(|| format!("not in {WITHIN}"), |n| n.to_string());
    println!("{:24} {:>8} {:>12}  what", "mutation", "watched", "end only");
    let mut missed = Vec::new();
    for mutation in NOTICED {
        let watched = seeds_until(mutation, false, WITHIN);
        let at_the_end = seeds_until(mutation, true, WITHIN);
        let case = Case { mutation: Some(mutation), ..Case::default() };
        let what =
            watched.and_then(|seeds| run(Choices::seeded(seeds - 1), case).violation).unwrap_or_default();
        println!("{:24} {:>8} {:>12}  {what}", format!("{mutation:?}"), within(watched), within(at_the_end));
        if watched.is_none() || at_the_end.is_none() != HARMLESS_AT_THE_END.contains(&mutation) {
            missed.push(mutation);
        }
    }
    assert!(missed.is_empty(), "{missed:?}");
}
