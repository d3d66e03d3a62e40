//! One token that is cancelled by the first SIGTERM or SIGINT, and the exit code that tells which it was.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Handed to everything that loops. Cloning shares it.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    token: CancellationToken,
    code: Arc<AtomicU8>,
}

impl Shutdown {
    /// Listens for SIGTERM and SIGINT from now on. Must be called inside a tokio runtime.
    pub fn on_signals() -> std::io::Result<Shutdown> {
        let shutdown = Shutdown::default();
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let listener = shutdown.clone();
        tokio::spawn(async move {
            let (code, name) = tokio::select! {
                _ = terminate.recv() => (143, "SIGTERM"),
                _ = interrupt.recv() => (130, "SIGINT"),
            };
            tracing::info!(signal = name, "stopping");
            listener.code.store(code, Ordering::SeqCst);
            listener.token.cancel();
        });
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
}
