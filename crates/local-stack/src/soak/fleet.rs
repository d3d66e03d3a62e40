//! The processes of a soak: started, struck, started again. Which fault comes when is decided by `plan`, how long the pipeline
//! needs after it is measured by `recovery`.

mod slot;
mod snapshot;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::NAME;
use super::plan::{Ending, Fault, Part, Strike};
use super::recovery::{FaultId, SharedClock};
use super::transactions::Transactions;
use crate::cli::SoakArgs;
use crate::config::{Settings, loopback};
use crate::error::{Error, Result};
use crate::install::Installed;
use crate::process::{LOOK_AGAIN, Process, Spec};
use crate::servers::{self, Probe};
use crate::services;
use crate::terminal::Terminal;
use slot::{Slot, State};

/// How long one life of the load is when nothing kills it.
const LOAD_SECONDS: u64 = 20;

/// A service that ended by itself is not started again at once: it may do the same again.
const PAUSE: Duration = Duration::from_secs(1);

/// The exit code of a service that refuses to run, which no fault but added partitions explains.
const REFUSED: i32 = 3;

/// Counts up when Cassandra begins to go back to a snapshot, and again once it has: odd meanwhile. What was read
/// before says nothing about what is read after.
pub(super) type Epoch = Arc<AtomicU64>;

/// All parts of a soak.
pub(super) struct Fleet {
    settings: Settings,
    installed: Installed,
    terminal: Terminal,
    args: SoakArgs,
    slots: BTreeMap<Part, Slot>,
    clock: SharedClock,
    epoch: Epoch,
    transactions: Transactions,
    /// Servers on their first start.
    started: Vec<Process>,
    /// Kills so far, with those for a snapshot or a restore.
    pub(super) kills: u64,
    /// How often a service ended without being killed.
    pub(super) own_ends: u64,
}

impl Fleet {
    /// A fleet of which nothing runs yet.
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
            own_ends: 0,
        }
    }

    /// The measurement of recoveries.
    pub(super) fn clock(&self) -> &SharedClock {
        &self.clock
    }

    /// Tells when Cassandra goes back to a snapshot.
    pub(super) fn epoch(&self) -> Epoch {
        self.epoch.clone()
    }

    /// Transactions that Kafka did not take or end as they were meant to.
    pub(super) fn failed_transactions(&self) -> u64 {
        self.transactions.failed()
    }

    /// Starts the servers for the first time and waits for them; when this fails, [`Fleet::stop`] ends what runs.
    pub(super) async fn start_servers(&mut self) -> Result<()> {
        let (settings, started) = (&self.settings, &mut self.started);
        servers::start_pair(settings, &self.installed, self.terminal, started).await?;
        for (part, process) in [Part::Cassandra, Part::Kafka].into_iter().zip(std::mem::take(started)) {
            self.slot(part).runs(process);
        }
        Ok(())
    }

    /// From the next [`Fleet::tend`] on, every service runs.
    pub(super) fn begin_load(&mut self) {
        for slot in self.slots.values_mut() {
            slot.wanted = true;
        }
    }

    /// Starts what is not running and should, lets paused processes run again, and notices what has ended or answers again.
    pub(super) async fn tend(&mut self) -> Result<()> {
        for part in self.slots.keys().copied().collect::<Vec<_>>() {
            self.notice_end(part).await?;
            self.continue_paused(part);
            let slot = self.slot(part);
            if slot.wanted && slot.is_due() {
                slot.prepared().await?;
                self.start(part)?;
            }
            self.notice_answer(part)?;
        }
        self.transactions.tend(self.terminal).await;
        Ok(())
    }

    async fn notice_end(&mut self, part: Part) -> Result<()> {
        let clock = self.clock.clone();
        let slot = self.slot(part);
        let Some((status, death)) = slot.ended() else { return Ok(()) };
        if part.is_server() {
            return Err(Error::Refused(death));
        }
        slot.kill().await;
        slot.faults_end(&clock);
        if part == Part::Load {
            // Its time is over, or it found no broker for too long.
            return Ok(());
        }
        slot.down_for(PAUSE);
        if status.code() == Some(REFUSED) {
            return Err(Error::Refused(death));
        }
        self.terminal.warning(&death);
        self.own_ends += 1;
        Ok(())
    }

    fn continue_paused(&mut self, part: Part) {
        let (terminal, clock) = (self.terminal, self.clock.clone());
        let slot = self.slot(part);
        let State::Paused { since, until } = slot.state else { return };
        if Instant::now() >= until {
            slot.go_on();
            terminal.done(part.name(), "stood still", since.elapsed());
            slot.faults_end(&clock);
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
            Part::Processor(number) => services::processor(&self.of_processor(number)?)?,
        };
        spec.environment.extend(services::names(NAME));
        if let Part::Processor(number) = part {
            spec.name = format!("{}-{number}", spec.name);
            spec.environment.push(("PIPELINE_INSTANCE".to_owned(), format!("{NAME}-{number}")));
        }
        Ok(spec)
    }

    /// The settings with a port, and perhaps a checkpoint folder, of this processor's own.
    fn of_processor(&self, number: u64) -> Result<Settings> {
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

    /// The first one has the usual port, the others those from Prometheus's on, which does not run here.
    fn processor_port(&self, number: u64) -> u16 {
        match number {
            0 => self.settings.ports.processor,
            _ => self.settings.ports.prometheus + number as u16 - 1,
        }
    }

    /// Where the processors answer.
    pub(super) fn processors(&self) -> Vec<String> {
        (0..self.args.processors).map(|n| format!("http://{}", loopback(self.processor_port(n)))).collect()
    }

    fn notice_answer(&mut self, part: Part) -> Result<()> {
        let (terminal, clock) = (self.terminal, self.clock.clone());
        let slot = self.slot(part);
        let Some(took) = slot.answers()? else { return Ok(()) };
        terminal.done(part.name(), "answers again", took);
        slot.faults_end(&clock);
        if part == Part::Cassandra && !self.epoch.load(Ordering::SeqCst).is_multiple_of(2) {
            self.epoch.fetch_add(1, Ordering::SeqCst);
        }
        Ok(())
    }

    /// Whether the fault can strike now: its part runs, a server answers, and there is a snapshot to restore.
    pub(super) fn can_strike(&self, fault: Fault) -> bool {
        let runs = fault.part().is_none_or(|part| self.slots.get(&part).is_some_and(Slot::can_be_hit));
        match fault {
            Fault::Restore => runs && self.snapshot().is_dir(),
            Fault::Transaction(..) => {
                !self.transactions.is_open() && self.can_strike(Fault::Kill(Part::Kafka))
            }
            Fault::Kill(_) | Fault::Wipe(_) | Fault::Pause(..) | Fault::Snapshot | Fault::Outage(_) => runs,
        }
    }

    /// Whether both servers answer.
    pub(super) fn servers_answer(&self) -> bool {
        [Part::Kafka, Part::Cassandra].iter().all(|part| self.can_strike(Fault::Kill(*part)))
    }

    /// Strikes; the next [`Fleet::tend`] begins to put right what was done.
    pub(super) async fn strike(&mut self, strike: &Strike) -> Result<()> {
        let fault = strike.fault;
        let id = self.clock.lock().begin(fault);
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
            Fault::Transaction(Ending::Committed | Ending::Aborted, _) => return Ok(()),
            Fault::Kill(part) if !part.is_server() => return Ok(()),
            Fault::Pause(_, length) | Fault::Outage(length) => format!(" for {:.0} s", length.as_secs_f64()),
            _ => String::new(),
        };
        self.terminal.begins("fault", &format!("{}{what}", fault.name()));
        Ok(())
    }

    /// Kills one part with SIGKILL. A server is on its way until it answers again; a service from now on.
    async fn kill(&mut self, part: Part, id: FaultId) {
        self.kills += 1;
        let clock = self.clock.clone();
        let slot = self.slot(part);
        slot.kill().await;
        slot.faults.push(id);
        if !part.is_server() {
            slot.faults_end(&clock);
        }
    }

    /// Kills every processor that uses the folder of this one, and removes its state files.
    async fn wipe(&mut self, part: Part, id: FaultId) -> Result<()> {
        let Part::Processor(number) = part else { return Ok(()) };
        let folder = self.checkpoints(number);
        let sharing = (0..self.args.processors).filter(|other| self.checkpoints(*other) == folder);
        let clock = self.clock.clone();
        for other in sharing.map(Part::Processor).collect::<Vec<_>>() {
            let slot = self.slot(other);
            slot.kill().await;
            slot.faults_end(&clock);
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

    /// Starts another process of a service and returns whether it refused to run.
    pub(super) async fn refuses(&mut self, part: Part, within: Duration) -> Result<bool> {
        self.end(part).await;
        self.start(part)?;
        let deadline = Instant::now() + within;
        while Instant::now() < deadline {
            if let Some((status, _)) = self.slot(part).ended() {
                self.end(part).await;
                return Ok(status.code() == Some(REFUSED));
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        Ok(false)
    }

    /// Ends one of our own parts in peace.
    pub(super) async fn end(&mut self, part: Part) {
        self.slot(part).stop().await;
    }

    /// Ends every processor in peace.
    pub(super) async fn end_processors(&mut self) {
        for number in 0..self.args.processors {
            self.end(Part::Processor(number)).await;
        }
    }

    /// The lines of the processors' logs that say most.
    pub(super) fn processors_say(&self) -> String {
        let processors = (0..self.args.processors).filter_map(|n| self.slots.get(&Part::Processor(n)));
        processors.map(Slot::says).collect::<Vec<_>>().join("; ")
    }

    /// Stops everything, the servers last.
    pub(super) async fn stop(&mut self) {
        // The parts are in the order in which they need each other.
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
