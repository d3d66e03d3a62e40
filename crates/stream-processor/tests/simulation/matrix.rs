//! Injects every fault at every step, with hot and with cold panes, on real state files: a kill, a permanent write
//! failure, a wiped volume, a replay, a power loss, and a full disk. The partition is then restarted and must reach the
//! exact end state.

use super::choices::Choices;
use super::life::StartOptions;
use super::log::{Rec, event};
use super::machine::Volume;
use super::schedule::{Case, Sim};

/// The records of six batches: events on time, out of order and very late, copies within and across batches, one id at
/// two times, and undecodable records.
fn records() -> Vec<Rec> {
    let (a, b, c) = (event(0, 1), event(4_999, 2), event(10_000, 3));
    let (d, e) = (event(20_000, 4), event(14_999, 5));
    vec![
        a,
        b,
        a,
        c,
        Rec::Poison,
        d,
        e,
        event(1, 6),
        b,
        event(3_000, 1),
        Rec::Poison,
        event(29_999, 7),
        d,
        event(2, 6),
    ]
}

const SIZES: [i64; 6] = [3, 2, 3, 1, 3, 2];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Kill,
    Error,
    Wipe,
    Replay,
    PowerLoss,
}

fn sim(cold: bool) -> Sim {
    let case = Case { on_disk: true, trace: true, ..Case::default() };
    let mut sim = Sim::new(records(), Choices::given(&[]), case);
    if cold {
        sim.start_options = StartOptions { max_memory_bytes: 0, max_cold: 0, ..sim.start_options };
    }
    sim.world().batches = Some(SIZES.to_vec());
    sim
}

fn finish(mut sim: Sim, case: &str) {
    {
        let mut world = sim.world();
        // Records that were fetched but not processed are fetched again, in batches of a different size.
        world.batches = Some(vec![2; 20]);
        world.fail_at = None;
    }
    if sim.owner.is_none() {
        sim.start(0);
    }
    sim.finish();
    let world = sim.world();
    let trace = world.trace.iter().flatten().cloned().collect::<Vec<_>>().join("\n  ");
    assert!(world.violation.is_none(), "{case}\n  {trace}");
}

/// Returns the number of steps of a run without faults.
fn steps(cold: bool) -> u64 {
    let mut sim = sim(cold);
    sim.start(0);
    sim.run_until(|_| false);
    let steps = sim.world().steps;
    finish(sim, "no fault");
    steps
}

fn check_fault(cold: bool, step: u64, fault: Fault) {
    let mut sim = sim(cold);
    if fault == Fault::Error {
        sim.world().fail_at = Some(step);
    }
    sim.start(0);
    let stopped = sim.run_until(|world| fault != Fault::Error && world.steps >= step);
    if stopped && fault != Fault::Error {
        return finish(sim, "ended before the step");
    }
    if fault == Fault::Error {
        let ended = sim.owner.as_ref().and_then(|owner| owner.ended.as_ref());
        let failed = ended.is_some_and(Result::is_err);
        assert_eq!(failed, step > 0, "step {step}, cold {cold}: the error did not end the process");
    }
    sim.crash();
    if let (Fault::PowerLoss, Volume::Disk(disk)) = (fault, &sim.machine(0).volume) {
        disk.power_loss(&mut step.clone());
    }
    if fault == Fault::Wipe || fault == Fault::Replay {
        sim.wipe(0);
    }
    sim.start_options.replay = fault == Fault::Replay;
    finish(sim, &format!("{fault:?} at step {step}, cold {cold}"));
}

#[test]
fn the_end_state_is_exact_after_every_fault_at_every_step_in_hot_and_cold_panes() {
    let mut cases = 0;
    for cold in [false, true] {
        let steps = steps(cold);
        assert!(steps > 80, "{steps}");
        for step in 0..=steps {
            for fault in [Fault::Kill, Fault::Error, Fault::Wipe, Fault::Replay, Fault::PowerLoss] {
                check_fault(cold, step, fault);
                cases += 1;
            }
        }
    }
    println!("{cases} cases");
}

#[test]
fn a_full_disk_at_any_write_of_the_state_file_stops_the_worker_without_losing_records() {
    let mut cases = 0;
    for cold in [false, true] {
        for write in 1.. {
            let mut sim = sim(cold);
            let disk = match &sim.machine(0).volume {
                Volume::Disk(disk) => disk.clone(),
                Volume::Memory(_) => unreachable!(),
            };
            disk.fail_at(None, Some(write));
            sim.start(0);
            sim.run_until(|_| false);
            let ended = sim.owner.as_ref().and_then(|owner| owner.ended.as_ref());
            let error = ended.and_then(|ended| ended.as_ref().err()).map(ToString::to_string);
            sim.crash();
            disk.repair();
            cases += 1;
            finish(sim, &format!("disk full at write {write}, cold {cold}"));
            match error {
                Some(error) => assert!(error.starts_with("state file simulated"), "{error}"),
                None => break,
            }
        }
    }
    println!("{cases} cases");
    assert!(cases > 100);
}
