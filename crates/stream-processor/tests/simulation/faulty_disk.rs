//! The state file on a disk that loses, tears and reorders unsynced writes, with a power loss at every sync. Afterwards
//! the file contains exactly the last commit or the next one, or it is refused. The commits are those of real batches.

use super::choices::{Choices, splitmix};
use super::disk::Disk;
use super::log::{Log, definition, random};
use super::machine::open_file;
use crate::count::partition::{LogPosition, Partition, StoredCopy};
use crate::count::windows::hot::Panes;
use crate::count::windows::pane::PaneShape;
use crate::io::state::{Commit, FORMAT, Head, StateError, StateFile};
use crate::record::decode::Decoder;
use common::contracts::stream::Definition;
use std::collections::BTreeMap;

/// Number of logs. For each log, a power loss happens at every sync in turn.
const LOGS: u64 = 24;

/// The contents of a state file, for comparison.
#[derive(Debug, Clone, PartialEq)]
struct Contents {
    head: Option<Head>,
    panes: BTreeMap<i64, Vec<u8>>,
    seen: BTreeMap<i64, usize>,
}

fn fresh_panes(definition: &Definition, max_memory_bytes: usize) -> Panes {
    let (shape, windows) = (PaneShape::new(definition), &definition.windows);
    Panes::new(shape, windows.pane_ms, windows.lateness_ms, max_memory_bytes, i64::MIN)
}

fn read_contents(file: &StateFile, definition: &Definition) -> Result<Contents, StateError> {
    let mut panes = fresh_panes(definition, usize::MAX);
    file.restore(&mut panes)?;
    let encoded = panes.hot.iter().map(|(start, hot)| (*start, hot.pane.encode()));
    let seen = panes.hot.iter().map(|(start, hot)| (*start, hot.seen.len()));
    Ok(Contents { head: file.head().cloned(), panes: encoded.collect(), seen: seen.collect() })
}

fn head(definition: &Definition) -> Head {
    Head {
        format: FORMAT,
        layout: definition.layout().to_string(),
        cluster_id: "simulated".into(),
        partition: 0,
        hot_from: i64::MIN,
        position: LogPosition::default(),
    }
}

/// The batches of one log, committed one after the other until the disk fails.
struct Writer {
    definition: Definition,
    log: Log,
    sizes: Vec<i64>,
    max_memory_bytes: usize,
}

impl Writer {
    fn of_seed(seed: u64) -> Writer {
        let mut choices = Choices::seeded(seed);
        let mut records = random(&mut choices);
        for _ in 0..3 {
            records.extend(random(&mut choices));
        }
        let sizes = (0..records.len()).map(|_| 1 + i64::from(choices.pick(5, 60))).collect();
        let max_memory_bytes = [usize::MAX, 700][choices.index(2, 50)];
        Writer { definition: definition(0), log: Log::new(records), sizes, max_memory_bytes }
    }

    /// Commits until the disk fails or the log ends. Appends the contents after each commit to `states`, including
    /// those of a commit that fails.
    fn write(&self, file: &mut StateFile, states: &mut Vec<Contents>) -> Result<(), StateError> {
        let decoder = Decoder::new(&self.definition, 0);
        let mut partition = Partition::new(
            LogPosition::default(),
            fresh_panes(&self.definition, self.max_memory_bytes),
            5_000,
        );
        let mut expected = Contents { head: None, panes: BTreeMap::new(), seen: BTreeMap::new() };
        states.push(expected.clone());
        expected.head = Some(head(&self.definition));
        states.push(expected);
        file.reset(head(&self.definition))?;
        let mut next = 0;
        for size in &self.sizes {
            let end = (next + size).min(self.log.high());
            if next == end {
                break;
            }
            let chunk = self.log.chunk(&decoder, next..end);
            let lookups = partition.questions(&chunk).keys;
            let stored = lookups.iter().filter_map(|index| {
                let offset = self.stored(&chunk, *index, next)?;
                Some((*index, StoredCopy { offset, differs: false }))
            });
            let applied = partition.apply(&chunk, &stored.collect()).unwrap();
            let dropped = partition.advance();
            let touched: Vec<i64> = applied.panes.keys().copied().collect();
            let contents = Contents {
                head: Some(Head {
                    hot_from: partition.panes.hot_from,
                    position: partition.position,
                    ..head(&self.definition)
                }),
                panes: partition.panes.hot.iter().map(|(at, hot)| (*at, hot.pane.encode())).collect(),
                seen: partition.panes.hot.iter().map(|(at, hot)| (*at, hot.seen.len())).collect(),
            };
            states.push(contents);
            let (partition, seen) = (&partition, &applied.seen);
            file.commit(&Commit { partition, touched: &touched, seen, dropped: &dropped })?;
            next = end;
        }
        Ok(())
    }

    fn stored(&self, chunk: &crate::record::chunk::Chunk, index: u32, next: i64) -> Option<i64> {
        let event = &chunk.events[index as usize];
        let id = String::from_utf8_lossy(chunk.id(event)).into_owned();
        self.log.below(next).rows.get(&(event.time_ms, id)).map(|(offset, _)| *offset)
    }
}

/// Checks the file after a crash. It must have one of the last two states, or be refused. Returns `false` if it is
/// refused.
fn check_after(disk: &Disk, states: &[Contents], definition: &Definition, case: &str) -> bool {
    match open_file(disk).and_then(|file| read_contents(&file, definition)) {
        Ok(found) => {
            let last_two = &states[states.len().saturating_sub(2)..];
            assert!(last_two.contains(&found), "{case}: {found:?}\n is not one of {last_two:?}");
            true
        }
        Err(error) => {
            println!("{case}: refused: {error}");
            false
        }
    }
}

#[test]
fn after_a_power_loss_at_any_sync_the_file_has_the_last_or_the_next_commit_or_is_refused() {
    let (mut cases, mut refused) = (0, 0);
    for seed in 0..LOGS {
        let writer = Writer::of_seed(seed);
        for sync in 1.. {
            let case = format!("seed {seed}, sync {sync}");
            let disk = Disk::default();
            disk.fail_at(Some(sync), None);
            let mut states = Vec::new();
            let written = open_file(&disk).and_then(|mut file| writer.write(&mut file, &mut states));
            let mut random = seed << 32 | sync;
            disk.power_loss(&mut random);
            disk.repair();
            if states.is_empty() {
                states.push(Contents { head: None, panes: BTreeMap::new(), seen: BTreeMap::new() });
            }
            cases += 1;
            refused += u32::from(!check_after(&disk, &states, &writer.definition, &case));
            if written.is_ok() {
                break;
            }
        }
    }
    println!("{cases} power losses, {refused} refused");
    assert!(
        cases > 500 && refused == 0,
        "{refused} of {cases} files were refused, which is allowed but has never happened"
    );
}

#[test]
fn a_file_that_survived_a_power_loss_accepts_commits_and_survives_further_ones() {
    for seed in 0..LOGS {
        let writer = Writer::of_seed(1000 + seed);
        let disk = Disk::default();
        let mut random = seed;
        for round in 0..6 {
            disk.fail_at(Some(3 + splitmix(&mut random) % 20), None);
            let mut states = Vec::new();
            let opened = open_file(&disk)
                .and_then(|file| read_contents(&file, &writer.definition).map(|contents| (file, contents)));
            let Ok((mut file, before)) = opened else { break };
            let _failed = writer.write(&mut file, &mut states);
            states[0] = before;
            disk.power_loss(&mut random);
            disk.repair();
            check_after(&disk, &states, &writer.definition, &format!("seed {seed}, round {round}"));
        }
    }
}

#[test]
fn a_full_disk_fails_the_commit_and_keeps_the_last_one() {
    for seed in 0..6 {
        let writer = Writer::of_seed(2000 + seed);
        for write in (1..).step_by(3) {
            let disk = Disk::default();
            disk.fail_at(None, Some(write));
            let mut states = Vec::new();
            let written = open_file(&disk).and_then(|mut file| writer.write(&mut file, &mut states));
            disk.kill();
            disk.repair();
            if states.is_empty() {
                states.push(Contents { head: None, panes: BTreeMap::new(), seen: BTreeMap::new() });
            }
            let case = format!("seed {seed}, write {write}");
            assert!(check_after(&disk, &states, &writer.definition, &case), "{case}: refused");
            if written.is_ok() {
                break;
            }
        }
    }
}
