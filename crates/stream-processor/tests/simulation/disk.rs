//! A disk that keeps what was synced, and of everything written since, after a power loss, any part: whole writes lost,
//! sectors of a write lost, later ones kept while earlier ones are not.

use super::choices::splitmix;
use redb::StorageBackend;
use std::io::{Error, ErrorKind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What a disk writes whole.
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

    /// What a power loss leaves of it.
    fn remains(&self, random: &mut u64) -> Vec<Change> {
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
    /// What the operating system shows.
    shown: Vec<u8>,
    /// What survives a power loss for certain.
    durable: Vec<u8>,
    /// Written since the last sync.
    unsynced: Vec<Change>,
    syncs: u64,
    writes: u64,
    fail_at_sync: Option<u64>,
    fail_at_write: Option<u64>,
    user: Arc<AtomicBool>,
}

/// A disk that outlives the processes that use it.
#[derive(Debug, Clone, Default)]
pub struct Disk(Arc<Mutex<Contents>>);

/// One process's open file on it.
#[derive(Debug)]
pub struct Attached {
    disk: Disk,
    gone: Arc<AtomicBool>,
}

impl Disk {
    /// With these contents.
    pub fn of(bytes: Vec<u8>) -> Disk {
        let contents = Contents { shown: bytes.clone(), durable: bytes, ..Contents::default() };
        Disk(Arc::new(Mutex::new(contents)))
    }

    fn lock(&self) -> MutexGuard<'_, Contents> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Another disk with the same contents.
    pub fn copy(&self) -> Disk {
        Disk::of(self.lock().shown.clone())
    }

    /// What it shows.
    pub fn bytes(&self) -> Vec<u8> {
        self.lock().shown.clone()
    }

    /// Opens it for a process; whoever had it open before is cut off.
    pub fn attach(&self) -> Attached {
        self.kill();
        let gone = Arc::new(AtomicBool::new(false));
        let mut contents = self.lock();
        contents.user = Arc::clone(&gone);
        drop(contents);
        Attached { disk: self.clone(), gone }
    }

    /// The process is killed: nothing it still tries reaches the disk, what it wrote stays.
    pub fn kill(&self) {
        self.lock().user.store(true, Ordering::SeqCst);
    }

    /// The power fails: only what was synced is certain.
    pub fn power_loss(&self, random: &mut u64) {
        self.kill();
        let mut contents = self.lock();
        let mut image = std::mem::take(&mut contents.durable);
        for change in std::mem::take(&mut contents.unsynced) {
            change.remains(random).iter().for_each(|part| part.apply(&mut image));
        }
        contents.shown.clone_from(&image);
        contents.durable = image;
    }

    /// The `n`-th sync or write from now on fails, and everything after it.
    pub fn fail_at(&self, sync: Option<u64>, write: Option<u64>) {
        let mut contents = self.lock();
        contents.fail_at_sync = sync.map(|n| contents.syncs + n);
        contents.fail_at_write = write.map(|n| contents.writes + n);
    }

    /// Nothing fails any more.
    pub fn mend(&self) {
        let mut contents = self.lock();
        (contents.fail_at_sync, contents.fail_at_write) = (None, None);
    }

    /// The file is removed.
    pub fn clear(&self) {
        self.kill();
        let mut contents = self.lock();
        (contents.shown, contents.durable, contents.unsynced) = (Vec::new(), Vec::new(), Vec::new());
    }
}

impl Attached {
    fn use_disk(&self) -> Result<MutexGuard<'_, Contents>, Error> {
        if self.gone.load(Ordering::SeqCst) {
            return Err(Error::new(ErrorKind::NotConnected, "the process is gone"));
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
            return Err(Error::new(ErrorKind::UnexpectedEof, "past the end"));
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
            return Err(Error::other("the power fails"));
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
