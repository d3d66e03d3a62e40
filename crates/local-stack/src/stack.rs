//! The whole system on one machine: in which order its parts start and stop, and when each counts as ready.
//! How a part is started is in `servers` and `services`.

use std::time::{Duration, Instant};

use crate::config::{Settings, loopback};
use crate::error::Result;
use crate::install::Installed;
use crate::process::{Process, Spec};
use crate::servers::{self, Probe, wait_until_ready};
use crate::services;
use crate::supervise::{Change, Supervised};
use crate::terminal::Terminal;

/// How long a service may take until it is ready: it connects, and the processor may recover its state.
const SERVICE_WITHIN: Duration = Duration::from_secs(60);

/// How long `init` may take; it waits for its servers itself.
const INIT_WITHIN: Duration = Duration::from_secs(120);

/// How much of the system is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Kafka and Cassandra.
    Servers,
    /// Everything.
    All,
}

/// The parts that were started, in that order.
#[derive(Debug)]
pub struct Stack {
    settings: Settings,
    terminal: Terminal,
    parts: Vec<Supervised>,
}

impl Stack {
    /// A stack of which nothing runs yet.
    pub fn new(settings: Settings, terminal: Terminal) -> Self {
        Self { settings, terminal, parts: Vec::new() }
    }

    /// Starts the parts one after the other; on failure what was started still runs: call [`Stack::stop`].
    pub async fn start(&mut self, installed: &Installed, extent: Extent) -> Result<()> {
        let mut servers = Vec::new();
        let started = servers::start_pair(&self.settings, installed, self.terminal, &mut servers).await;
        self.parts.extend(servers.into_iter().map(Supervised::new));
        started?;
        if extent == Extent::Servers {
            return Ok(());
        }
        let source = loopback(self.settings.ports.source);
        self.start_part(services::source(&self.settings)?, Probe::Tcp(source)).await?;
        self.init().await?;
        for spec in [
            services::producer(&self.settings)?,
            services::processor(&self.settings)?,
            services::dashboard(&self.settings)?,
        ] {
            let probe = Probe::Http(format!("{}/readyz", spec.address));
            self.start_part(spec, probe).await?;
        }
        if let Some(binary) = &installed.prometheus {
            let spec = servers::prometheus::spec(&self.settings, binary)?;
            let probe = Probe::Http(format!("{}/-/ready", spec.address));
            self.start_part(spec, probe).await?;
        }
        Ok(())
    }

    async fn start_part(&mut self, spec: Spec, probe: Probe) -> Result<()> {
        let since = Instant::now();
        let address = spec.address.clone();
        let mut process = Process::spawn(&spec, &self.settings.folders)?;
        let ready = wait_until_ready(&mut process, &probe, SERVICE_WITHIN).await;
        self.parts.push(Supervised::new(process));
        ready?;
        self.terminal.done(&spec.name, &address, since.elapsed());
        Ok(())
    }

    async fn init(&mut self) -> Result<()> {
        let since = Instant::now();
        let mut init = Process::spawn(&services::init(&self.settings)?, &self.settings.folders)?;
        init.finished(INIT_WITHIN).await?;
        self.terminal.done("init", "keyspace, tables and topics", since.elapsed());
        Ok(())
    }

    /// Starts again what has ended; what happened to which part since the last call.
    pub fn tend(&mut self) -> Vec<(String, Result<Change>)> {
        let changes = self.parts.iter_mut().map(|part| (part.name().to_owned(), part.tend().transpose()));
        changes.filter_map(|(name, change)| Some((name, change?))).collect()
    }

    /// Stops everything in the reverse order of the start.
    pub async fn stop(&mut self) {
        while let Some(mut part) = self.parts.pop() {
            let since = Instant::now();
            let gently = part.stop().await;
            let how = if gently { "stopped" } else { "killed: it did not stop in time" };
            self.terminal.done(part.name(), how, since.elapsed());
        }
    }

    /// Whether nothing was started.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }
}
