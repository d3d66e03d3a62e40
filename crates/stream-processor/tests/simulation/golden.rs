//! Golden state files, one for each format. Every later version of the program must be able to read them.

use super::choices::Choices;
use super::disk::Disk;
use super::log::{BASE_MS, Log, Rec, definition, event};
use super::machine::{Volume, open_file};
use super::schedule::{Case, Sim};
use crate::count::partition::{LogPosition, Totals};
use crate::count::poison_gate::PoisonCounts;
use crate::count::windows::hot::Panes;
use crate::count::windows::pane::PaneShape;
use crate::io::state::FORMAT;
use std::io::Read as _;
use std::path::PathBuf;

/// An event on time, one in the newest pane, an undecodable record, a copy, and a late event. Pane 0 is cold
/// afterwards.
fn records() -> Vec<Rec> {
    vec![event(0, 1), event(20_000, 3), Rec::Poison, event(0, 1), event(12_000, 2)]
}

/// Processes that log and returns the state file.
fn write_state_file() -> Vec<u8> {
    let mut sim = Sim::new(records(), Choices::given(&[]), Case { on_disk: true, ..Case::default() });
    sim.world().batches = Some(vec![5]);
    sim.start(0);
    sim.finish();
    let machine = sim.machine(0);
    let Volume::Disk(disk) = &machine.volume else { unreachable!() };
    disk.bytes()
}

fn check(bytes: Vec<u8>, format: u32) {
    let file = open_file(&Disk::of(bytes)).unwrap();
    let head = file.head().unwrap();
    assert_eq!(head.format, format);
    crate::pipeline::start::survives(&head.layout, &definition(0).layout()).unwrap();
    let position = LogPosition {
        next_offset: 5,
        first_offset: 0,
        last_record: Log::new(records()).last_record_below(5),
        totals: Totals { events: 3, duplicates: 1, revised: 0, late: 1, dead_letters: 1, skipped: 0 },
        seen_to: Some(BASE_MS + 20_000),
        poison: PoisonCounts { consecutive: 0, window_records: 5, window_poison: 1 },
        count_from: 0,
    };
    assert_eq!((head.position, head.hot_from), (position, BASE_MS + 10_000));
    let mut panes = Panes::new(PaneShape::new(&definition(0)), 10_000, 5_000, usize::MAX, i64::MIN);
    file.restore(&mut panes).unwrap();
    let starts: Vec<i64> = panes.hot.keys().map(|start| start - BASE_MS).collect();
    assert_eq!(starts, [10_000, 20_000]);
    let hot = &panes.hot[&(BASE_MS + 20_000)];
    let row = hot.pane.row(0);
    assert_eq!((row.count, row.upto, hot.pane.measures(0)[0].sum, hot.seen.len()), (1, 5, 0.1, 1));
    assert!(
        panes.may_have_seen(BASE_MS + 20_000, common::contracts::event::seen_hash(BASE_MS + 20_000, b"e3"))
    );
}

fn golden(format: u32) -> Vec<u8> {
    let name = format!("tests/golden/state-format-{format}.redb.gz");
    let packed = std::fs::File::open(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(name)).unwrap();
    let mut bytes = Vec::new();
    flate2::read::GzDecoder::new(packed).read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn a_state_file_of_every_format_stays_readable() {
    for format in 1..=FORMAT {
        check(golden(format), format);
    }
}

/// A failure means that the format has changed. Increase `FORMAT`, keep reading the old files, and add a golden file
/// with `PIPELINE_NEW_GOLDEN_FILE`.
#[test]
fn a_new_state_file_has_the_same_contents_as_the_golden_ones() {
    let bytes = write_state_file();
    if let Some(path) = std::env::var_os("PIPELINE_NEW_GOLDEN_FILE") {
        std::fs::write(path, &bytes).unwrap();
    }
    check(bytes, FORMAT);
}
