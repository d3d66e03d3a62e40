//! The checkpoint of one partition: a redb file on the checkpoint volume, with one two-phase transaction per batch.
//! redb's file lock prevents two owners. The file only saves look-ups: without it, the partition recovers from
//! Cassandra.

use crate::count::partition::{LogPosition, Partition};
use crate::count::windows::hot::Panes;
use crate::count::windows::pane::{Pane, PaneShape};
use crate::pipeline::start::StateFacts;
use redb::{
    Builder, Database, DatabaseError, ReadableDatabase, ReadableTable, StorageBackend, TableDefinition,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

/// Format that this program writes. It also reads format 1, which kept only the fingerprint of the record before the
/// next offset.
pub const FORMAT: u32 = 2;
/// Size of redb's page cache per partition. The default would be 1 GiB.
const CACHE_BYTES: usize = 4 << 20;
/// Length of redb's magic number, at the start of its files.
const MAGIC_BYTES: usize = 9;

const META: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("meta");
const PANES: TableDefinition<'static, i64, &[u8]> = TableDefinition::new("panes");
/// Maps (pane start, next offset of the batch) to hashes of keys, little endian.
const SEEN: TableDefinition<'static, (i64, i64), &[u8]> = TableDefinition::new("seen");
const HEAD: &str = "head";

/// Why a state file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Another process holds the file's lock.
    #[error("state file {file} is held by {holder}")]
    Held {
        /// Its path.
        file: String,
        /// Description of the holder, from the file that it wrote next to the state file.
        holder: String,
    },
    /// A newer version of the program wrote the file.
    #[error(
        "state file {file} has format {found}, but this program supports formats up to {FORMAT}: \
         run the newer version, or remove the file to recover from cassandra"
    )]
    NewerFormat {
        /// Its path.
        file: String,
        /// Its format.
        found: u32,
    },
    /// The disk is full. The file is intact.
    #[error("state file {file}: the disk is full; free space on it and restart; no records were skipped")]
    DiskFull {
        /// Its path.
        file: String,
    },
    /// The file is damaged, or the disk failed.
    #[error("state file {file}: {cause}")]
    Broken {
        /// Its path.
        file: String,
        /// Error reported by redb.
        cause: String,
    },
}

/// The header of a state file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// Format version. The file is refused if it is above [`FORMAT`].
    pub format: u32,
    /// Layout of the stream, in its stored form.
    pub layout: String,
    /// Id of the Kafka cluster.
    pub cluster_id: String,
    /// Kafka partition.
    pub partition: i32,
    /// Start of the earliest pane that can be hot, in Unix milliseconds.
    pub hot_from: i64,
    /// Committed position.
    pub position: LogPosition,
}

/// The changes of one batch.
#[derive(Debug)]
pub struct Commit<'a> {
    /// The partition after the batch.
    pub partition: &'a Partition,
    /// Starts of the panes whose rows changed.
    pub touched: &'a [i64],
    /// Hashes of the keys first seen in this batch, by start of their hot pane.
    pub seen: &'a BTreeMap<i64, Vec<u64>>,
    /// Starts of the panes that are no longer hot.
    pub dropped: &'a [i64],
}

/// Persistent storage of a partition's state: the state file, or a fake of it. After an error it must not be used
/// again.
pub trait Checkpoint: Send {
    /// The facts for the start decision; `None` if nothing was committed.
    fn facts(&self) -> Option<StateFacts>;

    /// Loads the stored hot panes and seen keys into `panes`.
    fn restore(&self, panes: &mut Panes) -> Result<(), StateError>;

    /// Discards the stored state and stores `head`.
    fn reset(&mut self, head: Head) -> Result<(), StateError>;

    /// Commits one batch atomically. The commit is durable when this returns.
    fn commit(&mut self, commit: &Commit<'_>) -> Result<(), StateError>;
}

impl Checkpoint for StateFile {
    fn facts(&self) -> Option<StateFacts> {
        StateFile::facts(self)
    }

    fn restore(&self, panes: &mut Panes) -> Result<(), StateError> {
        StateFile::restore(self, panes)
    }

    fn reset(&mut self, head: Head) -> Result<(), StateError> {
        StateFile::reset(self, head)
    }

    fn commit(&mut self, commit: &Commit<'_>) -> Result<(), StateError> {
        // The commit blocks on the disk, so the runtime moves its other tasks to another thread.
        tokio::task::block_in_place(|| StateFile::commit(self, commit))
    }
}

/// The open state file of one partition.
#[derive(Debug)]
pub struct StateFile {
    file: String,
    database: Database,
    head: Option<Head>,
}

/// Path of a partition's state file.
pub fn path_of(folder: &Path, stream: &str, partition: i32) -> PathBuf {
    folder.join(format!("{stream}-{partition}.redb"))
}

fn holder_file(path: &Path) -> PathBuf {
    path.with_extension("holder")
}

/// Whether a file's first bytes show that its creation was interrupted, by a kill or a full disk. redb writes the magic
/// number last, so such a file never held a commit.
pub(crate) fn never_finished(first_bytes: &[u8]) -> bool {
    first_bytes.iter().take(MAGIC_BYTES).all(|byte| *byte == 0)
}

/// Reads up to [`MAGIC_BYTES`] bytes. An unreadable file yields a non-zero byte, so that it does not count as
/// interrupted.
fn first_bytes(path: &Path) -> Vec<u8> {
    let mut first = Vec::new();
    let read = File::open(path).and_then(|file| file.take(MAGIC_BYTES as u64).read_to_end(&mut first));
    if read.is_ok() { first } else { vec![u8::MAX] }
}

/// Converts an error of redb, so that the caller can distinguish a full disk.
fn redb_error(file: &str, error: impl Into<redb::Error>) -> StateError {
    match error.into() {
        redb::Error::Io(e) if e.kind() == ErrorKind::StorageFull => {
            StateError::DiskFull { file: file.to_owned() }
        }
        e => StateError::Broken { file: file.to_owned(), cause: e.to_string() },
    }
}

impl StateFile {
    /// Opens or creates the file. Writes `holder` to a file next to it, for other processes that find the state file
    /// locked.
    pub fn open(path: &Path, holder: &str) -> Result<StateFile, StateError> {
        let file = path.display().to_string();
        let create = || Builder::new().set_cache_size(CACHE_BYTES).create(path);
        let opened = match create() {
            Err(DatabaseError::Storage(_)) if never_finished(&first_bytes(path)) => {
                // If the file cannot be removed, the second attempt reports the error.
                let _removed = std::fs::remove_file(path);
                create()
            }
            opened => opened,
        };
        let database = opened.map_err(|e| match e {
            DatabaseError::DatabaseAlreadyOpen => {
                let holder = std::fs::read_to_string(holder_file(path))
                    .unwrap_or_else(|_| "an unknown process".into());
                StateError::Held { file: file.clone(), holder }
            }
            e => redb_error(&file, e),
        })?;
        // Only information for operators, so a failure is ignored.
        let _written = std::fs::write(holder_file(path), holder);
        StateFile::with_database(file, database)
    }

    /// Opens a state file on a storage backend of the caller, such as a faulty one for tests.
    pub fn with_backend(name: &str, backend: impl StorageBackend) -> Result<StateFile, StateError> {
        let opened = Builder::new().set_cache_size(CACHE_BYTES).create_with_backend(backend);
        let database = opened.map_err(|e| redb_error(name, e))?;
        StateFile::with_database(name.to_owned(), database)
    }

    fn with_database(file: String, database: Database) -> Result<StateFile, StateError> {
        let mut state = StateFile { file, database, head: None };
        state.head = state.read_head()?;
        match &state.head {
            Some(head) if head.format > FORMAT => {
                Err(StateError::NewerFormat { file: state.file.clone(), found: head.format })
            }
            _ => Ok(state),
        }
    }

    fn broken(&self, cause: impl std::fmt::Display) -> StateError {
        StateError::Broken { file: self.file.clone(), cause: cause.to_string() }
    }

    fn read_head(&self) -> Result<Option<Head>, StateError> {
        let read = self.database.begin_read().map_err(|e| self.broken(e))?;
        let table = match read.open_table(META) {
            Ok(table) => table,
            Err(redb::TableError::TableDoesNotExist(_)) => return Ok(None),
            Err(e) => return Err(self.broken(e)),
        };
        let Some(bytes) = table.get(HEAD).map_err(|e| self.broken(e))? else { return Ok(None) };
        let head = serde_json::from_slice(bytes.value()).map_err(|e| self.broken(e))?;
        serde_json::from_value(upgrade_head(head)).map(Some).map_err(|e| self.broken(e))
    }

    /// The header; `None` if nothing was committed.
    pub fn head(&self) -> Option<&Head> {
        self.head.as_ref()
    }

    /// The facts for the start decision; `None` if nothing was committed.
    pub fn facts(&self) -> Option<StateFacts> {
        self.head.as_ref().map(|h| StateFacts {
            position: h.position,
            layout: h.layout.clone(),
            cluster_id: h.cluster_id.clone(),
        })
    }

    /// Loads the stored hot panes and seen keys into `panes`. Does nothing if nothing was committed.
    pub fn restore(&self, panes: &mut Panes) -> Result<(), StateError> {
        let Some(head) = &self.head else { return Ok(()) };
        panes.hot_from = head.hot_from;
        let read = self.database.begin_read().map_err(|e| self.broken(e))?;
        let stored = read.open_table(PANES).map_err(|e| self.broken(e))?;
        for entry in stored.iter().map_err(|e| self.broken(e))? {
            let (start, bytes) = entry.map_err(|e| self.broken(e))?;
            let pane = Pane::decode(&panes.shape, bytes.value())
                .ok_or_else(|| self.broken(format!("the pane at {} has another shape", start.value())))?;
            panes.hot_mut(start.value()).1.pane = pane;
        }
        let seen = read.open_table(SEEN).map_err(|e| self.broken(e))?;
        for entry in seen.iter().map_err(|e| self.broken(e))? {
            let (key, bytes) = entry.map_err(|e| self.broken(e))?;
            let (_, hot) = panes.hot_mut(key.value().0);
            for hash in bytes.value().chunks_exact(8) {
                hot.seen.insert(u64::from_le_bytes(hash.try_into().unwrap_or_default()));
            }
        }
        Ok(())
    }

    /// Verifies the checksums and reads everything. Returns the number of hot panes and of seen keys.
    pub fn check(&mut self, shape: &PaneShape) -> Result<(usize, usize), StateError> {
        let intact = self.database.check_integrity();
        if !intact.map_err(|e| self.broken(e))? {
            return Err(self.broken("checksums were wrong; the file was repaired to its last valid commit"));
        }
        let read = self.database.begin_read().map_err(|e| self.broken(e))?;
        let (mut panes, mut keys) = (0, 0);
        let stored = read.open_table(PANES).map_err(|e| self.broken(e))?;
        for entry in stored.iter().map_err(|e| self.broken(e))? {
            let (start, bytes) = entry.map_err(|e| self.broken(e))?;
            if Pane::decode(shape, bytes.value()).is_none() {
                return Err(self.broken(format!("the pane at {} has another shape", start.value())));
            }
            panes += 1;
        }
        let seen = read.open_table(SEEN).map_err(|e| self.broken(e))?;
        for entry in seen.iter().map_err(|e| self.broken(e))? {
            keys += entry.map_err(|e| self.broken(e))?.1.value().len() / 8;
        }
        Ok((panes, keys))
    }

    /// Discards the stored state and stores `head`.
    pub fn reset(&mut self, head: Head) -> Result<(), StateError> {
        let write = self.begin()?;
        let done = (|| {
            write.delete_table(PANES)?;
            write.delete_table(SEEN)?;
            write.open_table(PANES)?;
            write.open_table(SEEN)?;
            put_head(&write, &head)
        })();
        done.map_err(|e| redb_error(&self.file, e))?;
        write.commit().map_err(|e| redb_error(&self.file, e))?;
        self.head = Some(head);
        Ok(())
    }

    /// Commits one batch in one transaction, synced to the disk. After an error the file must be reopened.
    pub fn commit(&mut self, commit: &Commit<'_>) -> Result<(), StateError> {
        let Some(head) = &self.head else { return Err(self.broken("commit before reset")) };
        let panes = &commit.partition.panes;
        let (hot_from, position) = (panes.hot_from, commit.partition.position);
        let head = Head { format: FORMAT, hot_from, position, ..head.clone() };
        let write = self.begin()?;
        write_batch(&write, &head, commit).map_err(|e| redb_error(&self.file, e))?;
        write.commit().map_err(|e| redb_error(&self.file, e))?;
        self.head = Some(head);
        Ok(())
    }

    fn begin(&self) -> Result<redb::WriteTransaction, StateError> {
        let mut write = self.database.begin_write().map_err(|e| redb_error(&self.file, e))?;
        write.set_two_phase_commit(true);
        Ok(write)
    }
}

/// Converts a header of format 1 to the current format.
fn upgrade_head(mut head: serde_json::Value) -> serde_json::Value {
    if head["format"] == 1
        && let Some(position) = head["position"].as_object_mut()
        && let (Some(fingerprint), Some(next_offset)) =
            (position.remove("fingerprint").and_then(|f| f.as_i64()), position["next_offset"].as_i64())
    {
        let last_record = serde_json::json!({"offset": next_offset - 1, "fingerprint": fingerprint});
        position.insert("last_record".to_owned(), last_record);
    }
    head
}

fn put_head(write: &redb::WriteTransaction, head: &Head) -> Result<(), redb::Error> {
    let bytes = serde_json::to_vec(head).map_err(|e| redb::Error::Corrupted(e.to_string()))?;
    write.open_table(META)?.insert(HEAD, bytes.as_slice())?;
    Ok(())
}

fn write_batch(write: &redb::WriteTransaction, head: &Head, commit: &Commit<'_>) -> Result<(), redb::Error> {
    put_head(write, head)?;
    let mut panes = write.open_table(PANES)?;
    for start in commit.touched {
        if let Some(hot) = commit.partition.panes.hot.get(start) {
            panes.insert(start, hot.pane.encode().as_slice())?;
        }
    }
    let mut seen = write.open_table(SEEN)?;
    for (start, hashes) in commit.seen.iter().filter(|(start, _)| **start >= head.hot_from) {
        let mut bytes = Vec::with_capacity(8 * hashes.len());
        hashes.iter().for_each(|h| bytes.extend_from_slice(&h.to_le_bytes()));
        seen.insert((*start, head.position.next_offset), bytes.as_slice())?;
    }
    for start in commit.dropped {
        panes.remove(start)?;
        seen.retain_in((*start, i64::MIN)..=(*start, i64::MAX), |_, _| false)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{Commit, FORMAT, Head, StateError, StateFile};
    use crate::count::partition::{LogPosition, Partition};
    use crate::count::windows::hot::Panes;
    use crate::count::windows::pane::PaneShape;
    use common::contracts::stream::Definition;
    use std::collections::BTreeMap;

    fn panes() -> Panes {
        let text = include_str!("../../../../streams/user_created.toml");
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
            let dropped =
                Commit { partition: &partition, touched: &[], seen: &BTreeMap::new(), dropped: &[0] };
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
        assert!(
            matches!(&error, StateError::Held { holder, .. } if holder == "instance a, pid 7"),
            "{error}"
        );
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
}
