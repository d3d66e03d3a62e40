//! Snapshots of the data folder of Cassandra, taken while it is down. The folder includes the commit log, which
//! Cassandra syncs before it acknowledges a write. A snapshot therefore contains every acknowledged write.

use std::fs;
use std::path::Path;

use local_stack::error::{Error, Result};

/// Copies the data folder, replacing any earlier snapshot.
pub(super) fn take(data: &Path, snapshot: &Path) -> Result<()> {
    // Copy to a temporary name first, because an incomplete copy must never be restored.
    let unfinished = snapshot.with_extension("new");
    remove(&unfinished)?;
    copy(data, &unfinished)?;
    remove(snapshot)?;
    fs::rename(&unfinished, snapshot).map_err(Error::io(snapshot))
}

/// Replaces the data folder with a copy of the snapshot.
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
    fn a_restore_brings_back_the_folder_as_of_the_snapshot() {
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
