//! The processes of a soak: starts them, injects faults, and restarts them. `plan` decides when to inject which fault,
//! and `recovery` measures how long the pipeline takes to recover.

mod slot;
mod snapshot;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use local_stack::config::{Settings, loopback};
use local_stack::error::{Error, Result};
use local_stack::install::Installed;
use local_stack::process::{POLL_INTERVAL, Process, Spec};
use local_stack::servers::{self, Probe};
use local_stack::services;
use local_stack::terminal::Terminal;

use super::NAME;
use super::plan::{Fault, Injection, Part, TransactionEnd};
use super::recovery::{FaultId, SharedClock};
use super::transactions::Transactions;
use crate::cli::SoakArgs;
use slot::{Slot, State};

/// Duration in seconds of one run of the load generator, unless it is killed. It is then started again.
const LOAD_SECONDS: u64 = 20;

/// Delay before the restart of a service that exited on its own, because it might exit again.
const PAUSE: Duration = Duration::from_secs(1);

/// Exit code of a service that refuses to run. Apart from added partitions, no fault justifies a refusal.
const REFUSED: i32 = 3;

/// Incremented when a restore of Cassandra starts and again when it is complete, so it is odd during a restore. Values
/// read in different epochs must not be compared.
pub(super) type Epoch = Arc<AtomicU64>;

/// All processes of a soak.
pub(super) struct Fleet {
    settings: Settings,
    installed: Installed,
    terminal: Terminal,
    args: SoakArgs,
    slots: BTreeMap<Part, Slot>,
    clock: SharedClock,
    epoch: Epoch,
    transactions: Transactions,
    /// Servers that are starting for the first time.
    started: Vec<Process>,
    /// Number of kills so far, including those for snapshots and restores.
    pub(super) kills: u64,
    /// Number of services that exited without being killed.
    pub(super) unexpected_exits: u64,
}

impl Fleet {
    /// Creates a fleet without running processes.
    pub(super) fn new(
        settings: &Settings,
        installed: &Installed,
        args: &SoakArgs,
        terminal: Terminal,
    ) -> Self {
        let services = [Part::Source, Part::Dashboard, Part::Ingest, Part::Load];
        let processors = (0..args.processors).map(Part::Processor);
        let parts = [Part::Kafka, Part::Cassandra].into_iter().chain(services).chain(processors);
        let clock = SharedClock::new();
        Self {
            settings: settings.clone(),
            installed: installed.clone(),
            terminal,
            args: args.clone(),
            slots: parts.map(|part| (part, Slot::new())).collect(),
            transactions: Transactions::new(settings, clock.clone()),
            clock,
            epoch: Epoch::default(),
            started: Vec::new(),
            kills: 0,
            unexpected_exits: 0,
        }
    }

    /// Returns the clock that measures recovery times.
    pub(super) fn clock(&self) -> &SharedClock {
        &self.clock
    }

    /// Returns the shared epoch, which changes when Cassandra is restored from a snapshot.
    pub(super) fn epoch(&self) -> Epoch {
        self.epoch.clone()
    }

    /// Returns the number of transactions that failed or could not be ended as planned.
    pub(super) fn failed_transactions(&self) -> u64 {
        self.transactions.failed()
    }

    /// Starts the servers for the first time and waits until they are ready. If this fails, call [`Fleet::stop`].
    pub(super) async fn start_servers(&mut self) -> Result<()> {
        let (settings, started) = (&self.settings, &mut self.started);
        servers::start_pair(settings, &self.installed, self.terminal, started).await?;
        for (part, process) in [Part::Cassandra, Part::Kafka].into_iter().zip(std::mem::take(started)) {
            self.slot(part).adopt(process);
        }
        Ok(())
    }

    /// Enables all services; the next [`Fleet::poll`] starts them.
    pub(super) fn start_load(&mut self) {
        for slot in self.slots.values_mut() {
            slot.enabled = true;
        }
    }

    /// Starts enabled parts that are down, resumes paused processes whose time is over, and detects exits and ready
    /// servers.
    pub(super) async fn poll(&mut self) -> Result<()> {
        for part in self.slots.keys().copied().collect::<Vec<_>>() {
            self.detect_exit(part).await?;
            self.resume_paused(part);
            let slot = self.slot(part);
            if slot.enabled && slot.can_start() {
                slot.prepared().await?;
                self.start(part)?;
            }
            self.detect_ready(part)?;
        }
        self.transactions.poll(self.terminal).await;
        Ok(())
    }

    async fn detect_exit(&mut self, part: Part) -> Result<()> {
        let clock = self.clock.clone();
        let slot = self.slot(part);
        let Some((status, exit_error)) = slot.ended() else { return Ok(()) };
        if part.is_server() {
            return Err(Error::Refused(exit_error));
        }
        slot.kill().await;
        slot.end_faults(&clock);
        if part == Part::Load {
            // The load has run for its full duration, or could not reach a broker for too long.
            return Ok(());
        }
        slot.down_for(PAUSE);
        if status.code() == Some(REFUSED) {
            return Err(Error::Refused(exit_error));
        }
        self.terminal.warning(&exit_error);
        self.unexpected_exits += 1;
        Ok(())
    }

    fn resume_paused(&mut self, part: Part) {
        let (terminal, clock) = (self.terminal, self.clock.clone());
        let slot = self.slot(part);
        let State::Paused { since, until } = slot.state else { return };
        if Instant::now() >= until {
            slot.resume();
            terminal.done(part.name(), "was paused", since.elapsed());
            slot.end_faults(&clock);
        }
    }

    fn start(&mut self, part: Part) -> Result<()> {
        let spec = self.spec(part)?;
        let probe = match part {
            Part::Kafka => Some(Probe::Kafka(loopback(self.settings.ports.kafka))),
            Part::Cassandra => Some(Probe::Cassandra(loopback(self.settings.ports.cassandra))),
            Part::Source => Some(Probe::Tcp(loopback(self.settings.ports.source))),
            Part::Dashboard | Part::Ingest | Part::Load | Part::Processor(_) => None,
        };
        let folders = self.settings.folders.clone();
        self.slot(part).start(spec, probe, &folders)
    }

    fn spec(&self, part: Part) -> Result<Spec> {
        let settings = &self.settings;
        let mut spec = match part {
            Part::Kafka => return servers::kafka::spec(settings, &self.installed),
            Part::Cassandra => return servers::cassandra::spec(settings, &self.installed),
            Part::Source => services::source(settings)?,
            Part::Dashboard => services::dashboard(settings)?,
            Part::Ingest => services::producer(settings)?,
            Part::Load => services::load(settings, LOAD_SECONDS, self.args.rate)?,
            Part::Processor(number) => services::processor(&self.processor_settings(number)?)?,
        };
        spec.environment.extend(services::names(NAME));
        if let Part::Processor(number) = part {
            spec.name = format!("{}-{number}", spec.name);
            spec.environment.push(("PIPELINE_INSTANCE".to_owned(), format!("{NAME}-{number}")));
        }
        Ok(spec)
    }

    /// Returns the settings of one processor, with its own port and possibly its own checkpoint folder.
    fn processor_settings(&self, number: u64) -> Result<Settings> {
        let mut settings = self.settings.clone();
        settings.checkpoints = self.checkpoints(number);
        fs::create_dir_all(&settings.checkpoints).map_err(Error::io(&settings.checkpoints))?;
        settings.ports.processor = self.processor_port(number);
        Ok(settings)
    }

    fn checkpoints(&self, number: u64) -> PathBuf {
        match self.args.own_checkpoints {
            true => self.settings.checkpoints.join(number.to_string()),
            false => self.settings.checkpoints.clone(),
        }
    }

    /// The first processor uses the usual port. The others use the ports from that of Prometheus on, which does not run
    /// here.
    fn processor_port(&self, number: u64) -> u16 {
        match number {
            0 => self.settings.ports.processor,
            _ => self.settings.ports.prometheus + number as u16 - 1,
        }
    }

    /// Returns the HTTP addresses of all processors.
    pub(super) fn processors(&self) -> Vec<String> {
        (0..self.args.processors).map(|n| format!("http://{}", loopback(self.processor_port(n)))).collect()
    }

    fn detect_ready(&mut self, part: Part) -> Result<()> {
        let (terminal, clock) = (self.terminal, self.clock.clone());
        let slot = self.slot(part);
        let Some(took) = slot.ready_after()? else { return Ok(()) };
        terminal.done(part.name(), "is ready again", took);
        slot.end_faults(&clock);
        if part == Part::Cassandra && !self.epoch.load(Ordering::SeqCst).is_multiple_of(2) {
            self.epoch.fetch_add(1, Ordering::SeqCst);
        }
        Ok(())
    }

    /// Returns whether the fault can be injected now: its part must be up, and a restore needs a snapshot.
    pub(super) fn can_inject(&self, fault: Fault) -> bool {
        let runs = fault.part().is_none_or(|part| self.slots.get(&part).is_some_and(Slot::is_up));
        match fault {
            Fault::Restore => runs && self.snapshot().is_dir(),
            Fault::Transaction(..) => {
                !self.transactions.is_open() && self.can_inject(Fault::Kill(Part::Kafka))
            }
            Fault::Kill(_) | Fault::Wipe(_) | Fault::Pause(..) | Fault::Snapshot | Fault::Outage(_) => runs,
        }
    }

    /// Returns whether both servers are up.
    pub(super) fn servers_are_up(&self) -> bool {
        [Part::Kafka, Part::Cassandra].iter().all(|part| self.can_inject(Fault::Kill(*part)))
    }

    /// Injects a fault. The next calls of [`Fleet::poll`] restore the parts.
    pub(super) async fn inject(&mut self, injection: &Injection) -> Result<()> {
        let fault = injection.fault;
        let id = self.clock.lock().start(fault);
        match fault {
            Fault::Kill(part) => self.kill(part, id).await,
            Fault::Wipe(part) => self.wipe(part, id).await?,
            Fault::Pause(part, length) => self.slot(part).pause(length, id),
            Fault::Snapshot => {
                self.kill(Part::Cassandra, id).await;
                let (data, snapshot) = (self.data(), self.snapshot());
                self.slot(Part::Cassandra).prepare(move || snapshot::take(&data, &snapshot));
            }
            Fault::Restore => {
                self.epoch.fetch_add(1, Ordering::SeqCst);
                self.kill(Part::Cassandra, id).await;
                let (data, snapshot) = (self.data(), self.snapshot());
                self.slot(Part::Cassandra).prepare(move || snapshot::restore(&snapshot, &data));
            }
            Fault::Outage(length) => {
                let slot = self.slot(Part::Source);
                slot.kill().await;
                slot.down_for(length);
                slot.faults.push(id);
            }
            Fault::Transaction(ending, open) => self.transactions.begin(id, ending, open),
        }
        let what = match fault {
            Fault::Transaction(TransactionEnd::Committed | TransactionEnd::Aborted, _) => return Ok(()),
            Fault::Kill(part) if !part.is_server() => return Ok(()),
            Fault::Pause(_, length) | Fault::Outage(length) => format!(" for {:.0} s", length.as_secs_f64()),
            _ => String::new(),
        };
        self.terminal.started("fault", &format!("{}{what}", fault.name()));
        Ok(())
    }

    /// Kills one part with SIGKILL. The fault of a service ends at once, that of a server when it is ready again.
    async fn kill(&mut self, part: Part, id: FaultId) {
        self.kills += 1;
        let clock = self.clock.clone();
        let slot = self.slot(part);
        slot.kill().await;
        slot.faults.push(id);
        if !part.is_server() {
            slot.end_faults(&clock);
        }
    }

    /// Kills every processor that shares the checkpoint folder of this one, and deletes the state files in it.
    async fn wipe(&mut self, part: Part, id: FaultId) -> Result<()> {
        let Part::Processor(number) = part else { return Ok(()) };
        let folder = self.checkpoints(number);
        let sharing = (0..self.args.processors).filter(|other| self.checkpoints(*other) == folder);
        let clock = self.clock.clone();
        for other in sharing.map(Part::Processor).collect::<Vec<_>>() {
            let slot = self.slot(other);
            slot.kill().await;
            slot.end_faults(&clock);
            self.kills += 1;
        }
        for entry in fs::read_dir(&folder).map_err(Error::io(&folder))? {
            let file = entry.map_err(Error::io(&folder))?.path();
            if file.extension().is_some_and(|extension| extension == "redb") {
                fs::remove_file(&file).map_err(Error::io(&file))?;
            }
        }
        self.clock.end(id);
        Ok(())
    }

    /// Stops a service, starts it again, and returns whether it refused to run.
    pub(super) async fn refuses(&mut self, part: Part, timeout: Duration) -> Result<bool> {
        self.end(part).await;
        self.start(part)?;
        let deadline = Instant::now() + timeout;
        while Instant::now() < deadline {
            if let Some((status, _)) = self.slot(part).ended() {
                self.end(part).await;
                return Ok(status.code() == Some(REFUSED));
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        Ok(false)
    }

    /// Stops one part gracefully. It is not started again.
    pub(super) async fn end(&mut self, part: Part) {
        self.slot(part).stop().await;
    }

    /// Stops every processor gracefully.
    pub(super) async fn end_processors(&mut self) {
        for number in 0..self.args.processors {
            self.end(Part::Processor(number)).await;
        }
    }

    /// Returns the most relevant line from the log of each processor.
    pub(super) fn processor_errors(&self) -> String {
        let processors = (0..self.args.processors).filter_map(|n| self.slots.get(&Part::Processor(n)));
        processors.map(Slot::last_error).collect::<Vec<_>>().join("; ")
    }

    /// Stops all parts, the servers last.
    pub(super) async fn stop(&mut self) {
        // Parts are ordered by their dependencies, so stop them in reverse order.
        for slot in self.slots.values_mut().rev() {
            slot.stop().await;
        }
        for mut process in self.started.drain(..) {
            process.stop().await;
        }
    }

    fn data(&self) -> PathBuf {
        self.settings.folders.data().join("cassandra")
    }

    fn snapshot(&self) -> PathBuf {
        self.settings.folders.data().join("cassandra-snapshot")
    }

    fn slot(&mut self, part: Part) -> &mut Slot {
        self.slots.entry(part).or_insert_with(Slot::new)
    }
}
