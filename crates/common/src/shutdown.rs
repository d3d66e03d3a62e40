//! One token that is cancelled by the first SIGTERM or SIGINT, the exit code that tells which it was, and a last resort: a process
//! that has not ended within its grace is ended, whatever hangs.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Exit code of a process that began to stop without a signal and did not end in time.
const HUNG: u8 = 1;

/// Handed to everything that loops. Cloning shares it.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    token: CancellationToken,
    code: Arc<AtomicU8>,
    running: Arc<Mutex<Vec<&'static str>>>,
}

impl Shutdown {
    /// Listens for SIGTERM and SIGINT from now on. Once stopping has begun, the process may take `grace` to end; after that,
    /// what still runs is logged, and the process ends with the signal's exit code. A dedicated thread does both: a
    /// runtime whose threads are all blocked cannot delay it.
    pub fn on_signals(grace: Duration) -> std::io::Result<Shutdown> {
        let shutdown = Shutdown::default();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        let (mut terminate, mut interrupt) = {
            let _entered = runtime.enter();
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?)
        };
        let listener = shutdown.clone();
        std::thread::Builder::new().name("shutdown".to_owned()).spawn(move || {
            let received = runtime.block_on(async {
                tokio::select! {
                    _ = terminate.recv() => Some((143, "SIGTERM")),
                    _ = interrupt.recv() => Some((130, "SIGINT")),
                    () = listener.begun() => None,
                }
            });
            if let Some((code, name)) = received {
                tracing::info!(signal = name, "stopping");
                listener.code.store(code, Ordering::SeqCst);
                listener.token.cancel();
            }
            std::thread::sleep(grace);
            let (still_running, seconds) = (listener.still_running(), grace.as_secs());
            tracing::error!(still_running, seconds, "not stopped in time: the process ends now");
            std::process::exit(i32::from(received.map_or(HUNG, |(code, _)| code)));
        })?;
        Ok(shutdown)
    }

    /// Asks everything to stop for a reason of the program's own.
    pub fn begin(&self) {
        self.token.cancel();
    }

    /// Whether stopping has begun.
    pub fn has_begun(&self) -> bool {
        self.token.is_cancelled()
    }

    /// Resolves when stopping begins.
    pub async fn begun(&self) {
        self.token.cancelled().await;
    }

    /// The token itself, for those who select on it or derive children.
    pub fn token(&self) -> &CancellationToken {
        &self.token
    }

    /// 143 after SIGTERM, 130 after SIGINT, 0 when the program stopped by itself.
    pub fn exit_code(&self) -> u8 {
        self.code.load(Ordering::SeqCst)
    }

    /// Names something that has to end before the process does. It counts as running until the guard is dropped.
    pub fn running(&self, what: &'static str) -> Running {
        self.with_running(|running| running.push(what));
        Running { shutdown: self.clone(), what }
    }

    fn still_running(&self) -> String {
        self.with_running(|running| running.join(", "))
    }

    fn with_running<T>(&self, act: impl FnOnce(&mut Vec<&'static str>) -> T) -> T {
        act(&mut self.running.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Something that runs, for the log line of a process that does not end in time.
#[derive(Debug)]
pub struct Running {
    shutdown: Shutdown,
    what: &'static str,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.shutdown.with_running(|running| {
            if let Some(index) = running.iter().position(|what| *what == self.what) {
                running.swap_remove(index);
            }
        });
    }
}
