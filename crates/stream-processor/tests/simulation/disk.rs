//! A simulated disk. After a power loss it has everything that was synced and an arbitrary part of later writes: whole
//! writes or single sectors are lost, and a later write may survive although an earlier one is lost.

use super::choices::splitmix;
use redb::StorageBackend;
use std::io::{Error, ErrorKind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Unit of an atomic write in bytes.
const SECTOR: usize = 512;

#[derive(Debug, Clone)]
enum Change {
    Write(usize, Vec<u8>),
    Len(usize),
}

impl Change {
    fn apply(&self, to: &mut Vec<u8>) {
        match self {
            Change::Len(len) => to.resize(*len, 0),
            Change::Write(at, bytes) => {
                if to.len() < at + bytes.len() {
                    to.resize(at + bytes.len(), 0);
                }
                to[*at..at + bytes.len()].copy_from_slice(bytes);
            }
        }
    }

    /// Returns the part that survives a power loss.
    fn surviving_part(&self, random: &mut u64) -> Vec<Change> {
        let kept = splitmix(random) % 4;
        match self {
            _ if kept == 0 => Vec::new(),
            _ if kept == 1 => vec![self.clone()],
            Change::Len(_) => vec![self.clone()],
            Change::Write(at, bytes) => {
                let sectors = bytes.chunks(SECTOR).enumerate().filter(|_| splitmix(random).is_multiple_of(2));
                sectors.map(|(n, part)| Change::Write(at + n * SECTOR, part.to_vec())).collect()
            }
        }
    }
}

#[derive(Debug, Default)]
struct Contents {
    /// Contents visible to processes.
    shown: Vec<u8>,
    /// Contents guaranteed to survive a power loss.
    durable: Vec<u8>,
    /// Changes since the last sync.
    unsynced: Vec<Change>,
    syncs: u64,
    writes: u64,
    fail_at_sync: Option<u64>,
    fail_at_write: Option<u64>,
    /// Set once the process that has the file open is killed.
    user_killed: Arc<AtomicBool>,
}

/// A disk that outlives the processes that use it.
#[derive(Debug, Clone, Default)]
pub struct Disk(Arc<Mutex<Contents>>);

/// The file on the disk, opened by one process.
#[derive(Debug)]
pub struct Attached {
    disk: Disk,
    /// Set once the process is killed.
    gone: Arc<AtomicBool>,
}

impl Disk {
    /// Creates a disk with the given, synced contents.
    pub fn of(bytes: Vec<u8>) -> Disk {
        let contents = Contents { shown: bytes.clone(), durable: bytes, ..Contents::default() };
        Disk(Arc::new(Mutex::new(contents)))
    }

    fn lock(&self) -> MutexGuard<'_, Contents> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Creates another disk with the same contents, all of them synced.
    pub fn copy(&self) -> Disk {
        Disk::of(self.lock().shown.clone())
    }

    /// Returns the contents visible to processes.
    pub fn bytes(&self) -> Vec<u8> {
        self.lock().shown.clone()
    }

    /// Opens the file for a process. A process that had it open before loses access.
    pub fn attach(&self) -> Attached {
        self.kill();
        let gone = Arc::new(AtomicBool::new(false));
        let mut contents = self.lock();
        contents.user_killed = Arc::clone(&gone);
        drop(contents);
        Attached { disk: self.clone(), gone }
    }

    /// Kills the process that has the file open. Its later writes fail; its earlier writes stay.
    pub fn kill(&self) {
        self.lock().user_killed.store(true, Ordering::SeqCst);
    }

    /// Simulates a power loss, which kills the process and may lose unsynced changes.
    pub fn power_loss(&self, random: &mut u64) {
        self.kill();
        let mut contents = self.lock();
        let mut image = std::mem::take(&mut contents.durable);
        for change in std::mem::take(&mut contents.unsynced) {
            change.surviving_part(random).iter().for_each(|part| part.apply(&mut image));
        }
        contents.shown.clone_from(&image);
        contents.durable = image;
    }

    /// Makes the `n`-th sync or write from now on fail, and every later one.
    pub fn fail_at(&self, sync: Option<u64>, write: Option<u64>) {
        let mut contents = self.lock();
        contents.fail_at_sync = sync.map(|n| contents.syncs + n);
        contents.fail_at_write = write.map(|n| contents.writes + n);
    }

    /// Cancels the failures set by [`Disk::fail_at`].
    pub fn repair(&self) {
        let mut contents = self.lock();
        (contents.fail_at_sync, contents.fail_at_write) = (None, None);
    }

    /// Removes the file.
    pub fn clear(&self) {
        self.kill();
        let mut contents = self.lock();
        (contents.shown, contents.durable, contents.unsynced) = (Vec::new(), Vec::new(), Vec::new());
    }
}

impl Attached {
    fn use_disk(&self) -> Result<MutexGuard<'_, Contents>, Error> {
        if self.gone.load(Ordering::SeqCst) {
            return Err(Error::new(ErrorKind::NotConnected, "the process was killed"));
        }
        Ok(self.disk.lock())
    }

    fn change(&self, change: Change) -> Result<(), Error> {
        let mut contents = self.use_disk()?;
        contents.writes += 1;
        if contents.fail_at_write.is_some_and(|at| contents.writes >= at) {
            return Err(Error::new(ErrorKind::StorageFull, "no space left on device"));
        }
        change.apply(&mut contents.shown);
        contents.unsynced.push(change);
        Ok(())
    }
}

impl StorageBackend for Attached {
    fn len(&self) -> Result<u64, Error> {
        Ok(self.disk.lock().shown.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), Error> {
        let (contents, at) = (self.disk.lock(), offset as usize);
        let Some(bytes) = contents.shown.get(at..at + out.len()) else {
            return Err(Error::new(ErrorKind::UnexpectedEof, "read past the end"));
        };
        out.copy_from_slice(bytes);
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<(), Error> {
        self.change(Change::Len(len as usize))
    }

    fn sync_data(&self) -> Result<(), Error> {
        let mut contents = self.use_disk()?;
        contents.syncs += 1;
        if contents.fail_at_sync.is_some_and(|at| contents.syncs >= at) {
            return Err(Error::other("sync failed"));
        }
        for change in std::mem::take(&mut contents.unsynced) {
            change.apply(&mut contents.durable);
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), Error> {
        self.change(Change::Write(offset as usize, data.to_vec()))
    }
}
