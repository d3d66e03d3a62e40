//! Tests of the state file on a real disk: commit and restore, locking, and files that cannot be used.

use super::{Commit, FORMAT, Head, StateError, StateFile};
use crate::count::partition::{LogPosition, Partition};
use crate::count::windows::hot::Panes;
use crate::count::windows::pane::PaneShape;
use common::contracts::stream::Definition;
use std::collections::BTreeMap;

fn panes() -> Panes {
    let text = include_str!("../../../../../streams/user_created.toml");
    let shape = PaneShape::new(&Definition::parse("user_created.toml", text).unwrap());
    Panes::new(shape, 60_000, 600_000, usize::MAX, i64::MIN)
}

fn head(format: u32) -> Head {
    Head {
        format,
        layout: "L".into(),
        cluster_id: "C".into(),
        partition: 0,
        hot_from: i64::MIN,
        position: LogPosition::default(),
    }
}

#[test]
fn committed_batches_are_restored_completely_after_reopening() {
    let folder = tempfile::tempdir().unwrap();
    let path = super::path_of(folder.path(), "s", 0);
    let mut partition = Partition::new(LogPosition::default(), panes(), 600_000);
    {
        let mut state = StateFile::open(&path, "me").unwrap();
        state.reset(head(FORMAT)).unwrap();
        for (next, pane) in [(1, 0), (2, 60_000)] {
            let (shape, hot) = partition.panes.hot_mut(pane);
            hot.pane.add(shape, next - 1, &[0, 1, 2, 0], &[30.0]);
            hot.pane.settle(next);
            hot.seen.insert(next as u64);
            partition.position.next_offset = next;
            let seen = BTreeMap::from([(pane, vec![next as u64])]);
            state
                .commit(&Commit { partition: &partition, touched: &[pane], seen: &seen, dropped: &[] })
                .unwrap();
        }
        let dropped = Commit { partition: &partition, touched: &[], seen: &BTreeMap::new(), dropped: &[0] };
        state.commit(&dropped).unwrap();
    }
    let state = StateFile::open(&path, "me again").unwrap();
    assert_eq!(state.head().unwrap().position, partition.position);
    let mut restored = panes();
    state.restore(&mut restored).unwrap();
    assert_eq!(restored.hot.keys().copied().collect::<Vec<_>>(), [60_000]);
    assert_eq!(restored.hot[&60_000].pane, partition.panes.hot[&60_000].pane);
    assert!(restored.may_have_seen(60_000, 2) && !restored.may_have_seen(60_000, 3));
}

#[test]
fn a_file_cannot_be_opened_twice_and_the_error_names_its_holder() {
    let folder = tempfile::tempdir().unwrap();
    let path = super::path_of(folder.path(), "s", 0);
    let _held = StateFile::open(&path, "instance a, pid 7").unwrap();
    let error = StateFile::open(&path, "b").unwrap_err();
    assert!(matches!(&error, StateError::Held { holder, .. } if holder == "instance a, pid 7"), "{error}");
}

#[test]
fn a_file_whose_creation_was_interrupted_is_replaced_and_any_other_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let path = super::path_of(folder.path(), "s", 0);
    std::fs::write(&path, vec![0; 8192]).unwrap();
    StateFile::open(&path, "me").unwrap().reset(head(FORMAT)).unwrap();
    assert!(StateFile::open(&path, "me").unwrap().head().is_some());
    std::fs::write(&path, "somebody's notes").unwrap();
    let error = StateFile::open(&path, "me").unwrap_err().to_string();
    assert!(error.contains("magic number"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"somebody's notes");
}

#[test]
fn a_newer_format_is_refused_with_both_versions() {
    let folder = tempfile::tempdir().unwrap();
    let path = super::path_of(folder.path(), "s", 0);
    StateFile::open(&path, "me").unwrap().reset(head(FORMAT + 1)).unwrap();
    let error = StateFile::open(&path, "me").unwrap_err().to_string();
    assert!(error.contains("has format 3, but this program supports formats up to 2"), "{error}");
}
