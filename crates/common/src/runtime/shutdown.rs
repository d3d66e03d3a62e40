//! Graceful shutdown: the first SIGTERM or SIGINT cancels a token and determines the exit code. A process that does not
//! end within its grace period is terminated, even if its tasks hang.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Exit code of a process that began to stop without a signal and exceeded its grace period.
const HUNG: u8 = 1;

/// Tells tasks when to stop. Clones share the same state.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    token: CancellationToken,
    code: Arc<AtomicU8>,
    running: Arc<Mutex<Vec<&'static str>>>,
}

impl Shutdown {
    /// Starts to listen for SIGTERM and SIGINT. Once shutdown has begun, the process has `grace` to end. After that,
    /// the tasks that still run are logged and the process exits with the exit code of the signal. A dedicated thread
    /// does both, so blocked runtime threads cannot delay it.
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
            tracing::error!(still_running, seconds, "the grace period has expired, exiting now");
            std::process::exit(i32::from(received.map_or(HUNG, |(code, _)| code)));
        })?;
        Ok(shutdown)
    }

    /// Begins shutdown without a signal.
    pub fn begin(&self) {
        self.token.cancel();
    }

    /// Whether shutdown has begun.
    pub fn has_begun(&self) -> bool {
        self.token.is_cancelled()
    }

    /// Completes when shutdown begins.
    pub async fn begun(&self) {
        self.token.cancelled().await;
    }

    /// The underlying token, for callers that need a child token or a cancellation future.
    pub fn token(&self) -> &CancellationToken {
        &self.token
    }

    /// The exit code of the process: 143 after SIGTERM, 130 after SIGINT, otherwise 0.
    pub fn exit_code(&self) -> u8 {
        self.code.load(Ordering::SeqCst)
    }

    /// Registers a task that must finish before the process exits. It counts as running until the guard is dropped.
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

/// Guard of a running task. If the grace period expires, the log names the tasks whose guards still exist.
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
