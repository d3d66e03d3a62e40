//! Executes the actions of commands with the same code as the command line: `stress`, `backfill`, `runs clear`, and
//! the pause flag of the ledger.

use crate::config::{BackfillArgs, SpanArgs, StressArgs};
use crate::run::Runner;
use crate::{backfill, runs, stress};
use async_trait::async_trait;
use common::contracts::control::Action;
use common::runtime::shutdown::Shutdown;
use std::sync::Arc;
use tokio::sync::Notify;

/// Executes the actions of commands. Tests use a fake.
#[async_trait]
pub trait Work: Send + Sync {
    /// Executes an action until it is done or `stop` starts. Returns a description of the result, or of the error.
    async fn carry_out(&self, action: &Action, stop: &Shutdown) -> Result<String, String>;
}

/// The implementation of the producer.
pub struct Worker {
    /// Runs backfills, and holds the definition and the ledger.
    pub runner: Arc<Runner>,
    /// Kafka bootstrap servers for loads.
    pub brokers: String,
    /// Topic for loads.
    pub topic: String,
    /// Notified after each command, because it may have changed the ledger.
    pub executed: Arc<Notify>,
}

#[async_trait]
impl Work for Worker {
    async fn carry_out(&self, action: &Action, stop: &Shutdown) -> Result<String, String> {
        let outcome = self.execute(action, stop).await;
        self.executed.notify_one();
        outcome
    }
}

impl Worker {
    async fn execute(&self, action: &Action, stop: &Shutdown) -> Result<String, String> {
        match action {
            Action::Produce { messages } => self.load(Some(*messages), 0, None, stop).await,
            Action::Spike { rate, seconds } => self.load(None, *rate, Some(*seconds), stop).await,
            Action::Backfill { from_ms, to_ms, reprocess, max_active_runs, newest_first } => {
                let args = BackfillArgs {
                    from: *from_ms,
                    to: *to_ms,
                    reprocess: *reprocess,
                    max_active_runs: *max_active_runs,
                    newest_first: *newest_first,
                };
                let done = backfill::backfill(&self.runner, &args, false, stop).await;
                let done = done.map_err(|e| format!("{e:#}"))?;
                if done.code == 0 { Ok(done.text) } else { Err(done.text) }
            }
            Action::Clear { from_ms, to_ms, state } => {
                let span = SpanArgs { from: *from_ms, to: *to_ms, state: *state };
                let done = runs::clear(&*self.runner.ledger, &span, (self.runner.clock)()).await;
                done.map(|done| done.text).map_err(|e| format!("{e:#}"))
            }
            Action::Pause => self.pause(true).await,
            Action::Resume => self.pause(false).await,
            Action::Cancel { .. } => Err("cancel is handled by the control listener".to_owned()),
        }
    }

    async fn load(
        &self,
        messages: Option<u64>,
        rate: u64,
        seconds: Option<u64>,
        stop: &Shutdown,
    ) -> Result<String, String> {
        self.runner.topic.check().await.map_err(|e| e.cause)?;
        let args = StressArgs {
            messages,
            rate,
            seconds,
            payload_bytes: None,
            duplicates: 0,
            span: None,
            senders: 1,
            json: true,
        };
        let (brokers, topic) = (self.brokers.clone(), self.topic.clone());
        let (definition, stop) = (self.runner.definition.clone(), stop.clone());
        let running =
            tokio::task::spawn_blocking(move || stress::run(&brokers, &topic, &definition, &args, &stop));
        let report = running.await.map_err(|e| e.to_string())?.map_err(|e| format!("{e:#}"))?;
        if report.failures > 0 { Err(report.to_string()) } else { Ok(report.to_string()) }
    }

    async fn pause(&self, paused: bool) -> Result<String, String> {
        let done = if paused { "paused" } else { "resumed" };
        match self.runner.ledger.set_paused(paused).await {
            Ok(true) => Ok(done.to_owned()),
            Ok(false) => Err("the stream has no schedule yet; start `ingest-producer run`".to_owned()),
            Err(e) => Err(e.to_string()),
        }
    }
}
