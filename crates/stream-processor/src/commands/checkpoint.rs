//! The checkpoint folder: `checkpoint show | check`, and the lock that keeps two processes from using the same instance
//! name.

use crate::config::CheckpointCommand;
use crate::count::windows::pane::PaneShape;
use crate::error::ProcessorError;
use crate::io::state::{Head, StateFile};
use crate::pipeline::start::survives;
use common::contracts::stream::Definition;
use std::fs::{File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Holds the lock on an instance name until it is dropped.
#[derive(Debug)]
pub struct NameLock {
    _file: File,
}

/// Creates the folder and locks the instance name in it. Two processes with the same name would fence each other in the
/// consumer group.
pub fn lock_instance(folder: &Path, instance: &str) -> Result<NameLock, ProcessorError> {
    let shown = folder.display();
    let fatal = |e: std::io::Error| {
        ProcessorError::Fatal(format!(
            "checkpoint folder {shown}: {e}; choose another one with --checkpoints"
        ))
    };
    std::fs::create_dir_all(folder).map_err(fatal)?;
    let safe: String = instance
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '_' })
        .collect();
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(folder.join(format!("instance-{safe}.lock")));
    let file = file.map_err(fatal)?;
    match file.try_lock() {
        Ok(()) => Ok(NameLock { _file: file }),
        Err(TryLockError::WouldBlock) => Err(ProcessorError::Fatal(format!(
            "instance name `{instance}` is taken by another processor that uses {shown}; \
             set PIPELINE_INSTANCE to another one"
        ))),
        Err(TryLockError::Error(e)) => Err(fatal(e)),
    }
}

/// Runs one `checkpoint` command. Only `check` reads the stream definition.
pub fn run(
    command: &CheckpointCommand,
    definition: impl Fn() -> Result<Definition, ProcessorError>,
) -> Result<(), ProcessorError> {
    match command {
        CheckpointCommand::Show { checkpoints, json: true } => {
            let heads = serde_json::to_string_pretty(&heads(checkpoints)?);
            print_line(&heads.map_err(|e| ProcessorError::Fatal(e.to_string()))?)
        }
        CheckpointCommand::Show { checkpoints, json: false } => print_line(&table(&heads(checkpoints)?)),
        CheckpointCommand::Check { checkpoints } => {
            let definition = definition()?;
            let (mut checked, mut broken) = (0, 0);
            for file in files(checkpoints)? {
                checked += 1;
                let found = check(&file, &definition);
                broken += u32::from(found.is_err());
                print_line(&found.unwrap_or_else(|e| e))?;
            }
            match broken {
                0 => print_line(&format!("{checked} state files, all usable")),
                n => Err(ProcessorError::Fatal(format!(
                    "{n} of {checked} state files cannot be used; \
                     remove them to recover their partitions from cassandra"
                ))),
            }
        }
    }
}

fn print_line(text: &str) -> Result<(), ProcessorError> {
    writeln!(std::io::stdout(), "{text}").map_err(|e| ProcessorError::Fatal(format!("stdout: {e}")))
}

fn open(file: &Path, command: &str) -> Result<StateFile, ProcessorError> {
    let holder = format!("{command}, pid {}", std::process::id());
    StateFile::open(file, &holder)
        .map_err(|e| ProcessorError::Retryable(format!("{e}; stop the processor first")))
}

/// Reads one whole state file and returns a line about it. The line is an error if the file cannot be used.
fn check(file: &Path, definition: &Definition) -> Result<String, String> {
    let shown = file.display();
    let mut state = open(file, "checkpoint check").map_err(|e| e.to_string())?;
    let Some(head) = state.head().cloned() else {
        return Ok(format!("{shown}: empty, its partition recovers from cassandra"));
    };
    if let Err(differences) = survives(&head.layout, &definition.layout()) {
        return Err(format!(
            "{shown}: created with another layout than that of the stream file:\n{differences}"
        ));
    }
    let (panes, keys) = state.check(&PaneShape::new(definition)).map_err(|e| e.to_string())?;
    let position = head.position;
    Ok(format!(
        "{shown}: partition {}, next offset {}, {} events, {panes} hot panes, {keys} seen keys",
        head.partition, position.next_offset, position.totals.events
    ))
}

fn files(folder: &Path) -> Result<Vec<PathBuf>, ProcessorError> {
    let fatal =
        |e: std::io::Error| ProcessorError::Fatal(format!("checkpoint folder {}: {e}", folder.display()));
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .map_err(fatal)?
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "redb"))
        .collect();
    files.sort();
    Ok(files)
}

fn heads(folder: &Path) -> Result<Vec<Head>, ProcessorError> {
    let mut heads = Vec::new();
    for file in files(folder)? {
        heads.extend(open(&file, "checkpoint show")?.head().cloned());
    }
    Ok(heads)
}

fn table(heads: &[Head]) -> String {
    let mut table = comfy_table::Table::new();
    table.set_header([
        "partition",
        "next offset",
        "events",
        "duplicates",
        "revised",
        "late",
        "dead letters",
        "hot from",
    ]);
    for head in heads {
        let totals = head.position.totals;
        let hot_from =
            chrono::DateTime::from_timestamp_millis(head.hot_from).map_or("-".into(), |t| t.to_rfc3339());
        table.add_row([
            head.partition.to_string(),
            head.position.next_offset.to_string(),
            totals.events.to_string(),
            totals.duplicates.to_string(),
            totals.revised.to_string(),
            totals.late.to_string(),
            totals.dead_letters.to_string(),
            hot_from,
        ]);
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::count::partition::LogPosition;

    fn definition() -> Definition {
        let text = include_str!("../../../../streams/user_created.toml");
        Definition::parse("user_created.toml", text).unwrap()
    }

    fn head(layout: String) -> Head {
        let position = LogPosition { next_offset: 7, ..LogPosition::default() };
        Head { format: 1, layout, cluster_id: "c".into(), partition: 3, hot_from: 0, position }
    }

    #[test]
    fn a_check_accepts_a_usable_file_and_rejects_another_layout_and_garbage() {
        let folder = tempfile::tempdir().unwrap();
        let check_all =
            || run(&CheckpointCommand::Check { checkpoints: folder.path().into() }, || Ok(definition()));
        let file = folder.path().join("users-3.redb");
        let mut state = StateFile::open(&file, "test").unwrap();
        state.reset(head(definition().layout().to_string())).unwrap();
        assert!(check(&file, &definition()).unwrap_err().contains("held by test"));
        drop(state);
        let line = check(&file, &definition()).unwrap();
        assert!(line.ends_with("partition 3, next offset 7, 0 events, 0 hot panes, 0 seen keys"), "{line}");
        check_all().unwrap();
        StateFile::open(&file, "test").unwrap().reset(head("another".into())).unwrap();
        assert!(check(&file, &definition()).unwrap_err().contains("cannot be read"));
        std::fs::write(folder.path().join("users-4.redb"), [1u8; 4096]).unwrap();
        let error = check_all().unwrap_err().to_string();
        assert!(error.contains("2 of 2 state files") && error.contains("recover"), "{error}");
    }

    #[test]
    fn an_instance_name_can_be_locked_once_and_again_after_its_release() {
        let folder = tempfile::tempdir().unwrap();
        let held = lock_instance(folder.path(), "a/b").unwrap();
        let error = lock_instance(folder.path(), "a/b").unwrap_err().to_string();
        assert!(error.contains("`a/b` is taken") && error.contains("PIPELINE_INSTANCE"), "{error}");
        lock_instance(folder.path(), "c").unwrap();
        drop(held);
        lock_instance(folder.path(), "a/b").unwrap();
    }
}
