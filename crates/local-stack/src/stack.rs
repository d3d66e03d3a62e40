//! The whole system on one machine: the order in which its parts start and stop, and when each part is ready. The
//! command lines of the parts are defined in `servers` and `services`.

use std::time::{Duration, Instant};

use crate::config::{Settings, loopback};
use crate::error::Result;
use crate::install::Installed;
use crate::process::{Process, Spec};
use crate::servers::{self, Probe, wait_until_ready};
use crate::services;
use crate::supervise::{Change, Supervised};
use crate::terminal::Terminal;

/// Time limit for a service to become ready. It has to connect, and the processor may have to recover its state.
const SERVICE_TIMEOUT: Duration = Duration::from_secs(60);

/// Time limit for `init`, which waits for its servers.
const INIT_TIMEOUT: Duration = Duration::from_secs(120);

/// Which parts of the system to start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Kafka and Cassandra.
    Servers,
    /// All parts.
    All,
}

/// The running parts, in the order in which they were started.
#[derive(Debug)]
pub struct Stack {
    settings: Settings,
    terminal: Terminal,
    parts: Vec<Supervised>,
}

impl Stack {
    /// A stack without running parts.
    pub fn new(settings: Settings, terminal: Terminal) -> Self {
        Self { settings, terminal, parts: Vec::new() }
    }

    /// Starts the parts one after the other. If this fails, the parts started so far keep running; call
    /// [`Stack::stop`].
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
        let ready = wait_until_ready(&mut process, &probe, SERVICE_TIMEOUT).await;
        self.parts.push(Supervised::new(process));
        ready?;
        self.terminal.done(&spec.name, &address, since.elapsed());
        Ok(())
    }

    async fn init(&mut self) -> Result<()> {
        let since = Instant::now();
        let mut init = Process::spawn(&services::init(&self.settings)?, &self.settings.folders)?;
        init.finished(INIT_TIMEOUT).await?;
        self.terminal.done("init", "keyspace, tables and topics", since.elapsed());
        Ok(())
    }

    /// Restarts parts that have exited. Returns the changes since the last call, each with the name of its part.
    pub fn poll(&mut self) -> Vec<(String, Result<Change>)> {
        let changes = self.parts.iter_mut().map(|part| (part.name().to_owned(), part.poll().transpose()));
        changes.filter_map(|(name, change)| Some((name, change?))).collect()
    }

    /// Stops all parts, in reverse order of their start.
    pub async fn stop(&mut self) {
        while let Some(mut part) = self.parts.pop() {
            let since = Instant::now();
            let graceful = part.stop().await;
            let how = if graceful { "stopped" } else { "killed after the grace period" };
            self.terminal.done(part.name(), how, since.elapsed());
        }
    }

    /// Returns whether no part was started.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }
}
