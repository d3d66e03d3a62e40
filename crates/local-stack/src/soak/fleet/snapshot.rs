//! Copies of a killed Cassandra's data folder. Its commit log is part of the folder and synced before a write is acknowledged, so
//! a copy holds everything that was acknowledged.

use std::fs;
use std::path::Path;

use crate::error::{Error, Result};

/// Copies the data folder in place of an earlier snapshot.
pub(super) fn take(data: &Path, snapshot: &Path) -> Result<()> {
    // An unfinished copy must never be restored.
    let unfinished = snapshot.with_extension("new");
    remove(&unfinished)?;
    copy(data, &unfinished)?;
    remove(snapshot)?;
    fs::rename(&unfinished, snapshot).map_err(Error::io(snapshot))
}

/// Puts a snapshot in place of the data folder, and keeps it.
pub(super) fn restore(snapshot: &Path, data: &Path) -> Result<()> {
    remove(data)?;
    copy(snapshot, data)
}

fn remove(folder: &Path) -> Result<()> {
    if folder.exists() { fs::remove_dir_all(folder).map_err(Error::io(folder)) } else { Ok(()) }
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).map_err(Error::io(to))?;
    for entry in fs::read_dir(from).map_err(Error::io(from))? {
        let path = entry.map_err(Error::io(from))?.path();
        let Some(name) = path.file_name() else { continue };
        let copied = to.join(name);
        if path.is_dir() {
            copy(&path, &copied)?;
        } else {
            fs::copy(&path, &copied).map_err(Error::io(&path))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restored_folder_is_what_it_was_when_the_snapshot_was_taken() {
        let root = tempfile::tempdir().unwrap();
        let (data, snapshot) = (root.path().join("data"), root.path().join("snapshot"));
        let write = |file: &str, text: &str| {
            let file = data.join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        };
        write("gone", "older than the snapshot");
        take(&data, &snapshot).unwrap();
        fs::remove_file(data.join("gone")).unwrap();
        write("commitlog/1", "old");
        take(&data, &snapshot).unwrap();
        write("commitlog/1", "new");
        write("commitlog/2", "new");
        for _ in 0..2 {
            restore(&snapshot, &data).unwrap();
            assert_eq!(fs::read_to_string(data.join("commitlog/1")).unwrap(), "old");
            assert!(!data.join("commitlog/2").exists() && !data.join("gone").exists());
            write("commitlog/2", "new");
        }
    }
}
