//! Private servers for a measurement or a test: their folder, their ports, and the checks and downloads before they
//! start. The callers start the servers and run their work on them.

use local_stack::checks;
use local_stack::config::Settings;
use local_stack::error::{Error, Result};
use local_stack::install::Installed;
use local_stack::terminal::Terminal;
use tempfile::TempDir;
use tokio::signal::unix::{SignalKind, signal};

/// Settings and binaries for private servers. Dropping this deletes the folder.
#[derive(Debug)]
pub struct PrivateServers {
    /// Settings with free ports. Everything is written below the private folder.
    pub settings: Settings,
    /// Downloaded servers.
    pub installed: Installed,
    folder: TempDir,
}

impl PrivateServers {
    /// Creates the folders, checks the machine and downloads the servers. Starts nothing.
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

    /// Keeps the folder for troubleshooting, except for the data of the servers, and prints where it is.
    pub fn keep(self, terminal: Terminal) {
        self.settings.folders.drop_data();
        let logs = self.folder.keep();
        terminal.warning(&format!("the logs of the servers and services are kept in {}", logs.display()));
    }
}

/// Creates a folder below `.local`, because the temporary folder of the system may be in memory.
pub fn folder(settings: &Settings, prefix: &str) -> Result<TempDir> {
    let parent = &settings.folders.root;
    std::fs::create_dir_all(parent).map_err(Error::io(parent))?;
    tempfile::Builder::new().prefix(prefix).tempdir_in(parent).map_err(Error::io(parent))
}

/// Waits for SIGINT or SIGTERM, then returns the error to report.
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
