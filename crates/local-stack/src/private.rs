//! Servers of one's own for a measurement or a test: a folder, ports, what must be checked and fetched before they start.
//! What runs on them is the callers'.

use tempfile::TempDir;
use tokio::signal::unix::{SignalKind, signal};

use crate::checks;
use crate::config::Settings;
use crate::error::{Error, Result};
use crate::install::Installed;
use crate::terminal::Terminal;

/// Everything that servers of one's own need; its folder goes away with it.
#[derive(Debug)]
pub struct Private {
    /// The machine with private ports, everything written below the folder.
    pub settings: Settings,
    /// Fetched servers.
    pub installed: Installed,
    folder: TempDir,
}

impl Private {
    /// Checks the machine, makes the folders, fetches the servers; starts nothing.
    pub async fn prepare(settings: &Settings, folder: TempDir, terminal: Terminal) -> Result<Self> {
        let settings = settings.private(folder.path())?;
        settings.folders.create()?;
        std::fs::create_dir_all(&settings.checkpoints).map_err(Error::io(&settings.checkpoints))?;
        checks::java(&settings.java)?;
        checks::memory(settings.heaps)?;
        checks::disk(folder.path())?;
        let installed = Installed::fetch(&settings, terminal).await?;
        Ok(Self { settings, installed, folder })
    }

    /// Leaves the folder where it is, without the servers' data, and says so: something went wrong.
    pub fn keep(self, terminal: Terminal) {
        self.settings.folders.drop_data();
        let logs = self.folder.keep();
        terminal.warning(&format!("logs of the servers and services are kept in {}", logs.display()));
    }
}

/// A new folder below `.local`: the system's temporary folder may be memory.
pub fn folder(settings: &Settings, prefix: &str) -> Result<TempDir> {
    let parent = &settings.folders.root;
    std::fs::create_dir_all(parent).map_err(Error::io(parent))?;
    tempfile::Builder::new().prefix(prefix).tempdir_in(parent).map_err(Error::io(parent))
}

/// Waits for SIGINT or SIGTERM; gives the error that tells of it.
pub async fn interrupted() -> Error {
    match signal(SignalKind::terminate()) {
        Ok(mut terminated) => tokio::select! {
            _ = tokio::signal::ctrl_c() => {}
            _ = terminated.recv() => {}
        },
        Err(_) => {
            let _ = tokio::signal::ctrl_c().await;
        }
    }
    Error::Refused("interrupted".to_owned())
}
