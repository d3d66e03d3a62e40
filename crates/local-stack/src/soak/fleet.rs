//! The processes of a soak: started, killed, started again. Which is killed when comes from `plan`.

use std::fs;
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;

use super::plan::{PARTS, Part, Strike};
use super::{NAME, THINGS};
use crate::config::{Settings, loopback};
use crate::error::{Error, Result};
use crate::install::Installed;
use crate::process::{Process, Spec, cause_in_log};
use crate::servers::{self, Probe};
use crate::services;
use crate::terminal::Terminal;

/// How long one life of the producer is when nothing kills it.
const LOAD_SECONDS: u64 = 20;

/// How long a server may need to answer again; after SIGKILL both check their logs first.
const SERVER_WITHIN: Duration = Duration::from_secs(180);

/// How often a server that starts is asked.
const ASK_EVERY: Duration = Duration::from_millis(250);

/// A service that ended by itself is not started again at once: it may do the same again.
const PAUSE: Duration = Duration::from_secs(1);

/// The processor's exit code for lost history, which a kill is not.
const REFUSED: i32 = 3;

/// One part with its present process.
#[derive(Debug)]
struct Slot {
    part: Part,
    process: Option<Process>,
    /// A server that was started and has not answered yet: since when, and who asks it.
    starting: Option<(Instant, JoinHandle<()>)>,
    lives: u64,
    kills: u64,
    not_before: Instant,
    /// Started again whenever it ends.
    wanted: bool,
}

/// All parts of a soak.
#[derive(Debug)]
pub(super) struct Fleet {
    settings: Settings,
    installed: Installed,
    terminal: Terminal,
    rate: u64,
    slots: [Slot; 4],
    /// Servers on their first start.
    started: Vec<Process>,
    /// How often the checkpoint files were removed.
    pub(super) wipes: u64,
    /// Why the processor ended without being killed, each time.
    pub(super) own_ends: Vec<String>,
}

impl Fleet {
    /// A fleet of which nothing runs yet.
    pub(super) fn new(settings: &Settings, installed: &Installed, rate: u64, terminal: Terminal) -> Self {
        let slot = |part| Slot {
            part,
            process: None,
            starting: None,
            lives: 0,
            kills: 0,
            not_before: Instant::now(),
            wanted: false,
        };
        Self {
            settings: settings.clone(),
            installed: installed.clone(),
            terminal,
            rate,
            slots: PARTS.map(slot),
            started: Vec::new(),
            wipes: 0,
            own_ends: Vec::new(),
        }
    }

    /// Starts the servers for the first time and waits for them; when this fails, [`Fleet::stop`] ends what runs.
    pub(super) async fn start_servers(&mut self) -> Result<()> {
        let (settings, started) = (&self.settings, &mut self.started);
        servers::start_pair(settings, &self.installed, self.terminal, started).await?;
        for (part, process) in [Part::Cassandra, Part::Kafka].into_iter().zip(self.started.drain(..)) {
            let slot = &mut self.slots[part.index()];
            slot.process = Some(process);
            slot.lives = 1;
            slot.wanted = true;
        }
        Ok(())
    }

    /// From the next [`Fleet::tend`] on, producer and processor run.
    pub(super) fn begin_load(&mut self) {
        for part in [Part::Producer, Part::Processor] {
            self.slots[part.index()].wanted = true;
        }
    }

    /// Starts what is not running and should, and notices what has ended or answers again.
    pub(super) async fn tend(&mut self) -> Result<()> {
        for index in 0..self.slots.len() {
            self.notice_end(index).await?;
            let slot = &self.slots[index];
            if slot.wanted && slot.process.is_none() && Instant::now() >= slot.not_before {
                self.start(index)?;
            }
            self.notice_answer(index)?;
        }
        Ok(())
    }

    async fn notice_end(&mut self, index: usize) -> Result<()> {
        let slot = &mut self.slots[index];
        let Some(process) = &mut slot.process else { return Ok(()) };
        let Some(status) = process.ended() else { return Ok(()) };
        let death = process.death(status).to_string().replace(" while starting", "");
        if slot.part.is_server() {
            return Err(Error::Refused(death));
        }
        // Reaped already: this only removes its record.
        process.kill().await;
        slot.process = None;
        // A producer ends when its time is over, or when it found no broker for too long.
        if slot.part == Part::Processor {
            slot.not_before = Instant::now() + PAUSE;
            if status.code() == Some(REFUSED) {
                return Err(Error::Refused(death));
            }
            self.terminal.warning(&death);
            if self.own_ends.len() < THINGS {
                self.own_ends.push(death);
            }
        }
        Ok(())
    }

    fn start(&mut self, index: usize) -> Result<()> {
        let part = self.slots[index].part;
        let mut spec = self.spec(part)?;
        let slot = &mut self.slots[index];
        slot.lives += 1;
        // Each life has a log of its own: they are the evidence.
        spec.name = format!("{}-{:04}", spec.name, slot.lives);
        slot.process = Some(Process::spawn(&spec, &self.settings.folders)?);
        let probe = match part {
            Part::Kafka => Probe::Kafka(loopback(self.settings.ports.kafka)),
            Part::Cassandra => Probe::Cassandra(loopback(self.settings.ports.cassandra)),
            Part::Processor | Part::Producer => return Ok(()),
        };
        slot.starting = Some((
            Instant::now(),
            tokio::spawn(async move {
                while !probe.answers().await {
                    tokio::time::sleep(ASK_EVERY).await;
                }
            }),
        ));
        Ok(())
    }

    fn spec(&self, part: Part) -> Result<Spec> {
        let mut spec = match part {
            Part::Processor => services::processor(&self.settings)?,
            Part::Producer => services::load(&self.settings, LOAD_SECONDS, self.rate)?,
            Part::Kafka => return servers::kafka::spec(&self.settings, &self.installed),
            Part::Cassandra => return servers::cassandra::spec(&self.settings, &self.installed),
        };
        spec.environment.extend(services::names(NAME));
        Ok(spec)
    }

    fn notice_answer(&mut self, index: usize) -> Result<()> {
        let slot = &mut self.slots[index];
        let Some((since, asking)) = &slot.starting else { return Ok(()) };
        if asking.is_finished() {
            self.terminal.done(slot.part.name(), "answers again", since.elapsed());
            slot.starting = None;
        } else if since.elapsed() > SERVER_WITHIN {
            asking.abort();
            let process = slot.process.as_ref();
            return Err(process.map_or_else(
                || Error::Refused(format!("{} does not run", slot.part.name())),
                |process| process.not_ready("its port after a kill", SERVER_WITHIN),
            ));
        }
        Ok(())
    }

    /// Whether the part can be killed now: it runs, and a server answers.
    pub(super) fn can_be_hit(&self, part: Part) -> bool {
        let slot = &self.slots[part.index()];
        slot.process.is_some() && slot.starting.is_none()
    }

    /// Whether both servers answer.
    pub(super) fn servers_answer(&self) -> bool {
        self.can_be_hit(Part::Kafka) && self.can_be_hit(Part::Cassandra)
    }

    /// Kills one part with SIGKILL; the next [`Fleet::tend`] starts it again.
    pub(super) async fn hit(&mut self, strike: &Strike) -> Result<()> {
        let slot = &mut self.slots[strike.part.index()];
        if let Some(mut process) = slot.process.take() {
            process.kill().await;
            slot.kills += 1;
            slot.not_before = Instant::now();
            if strike.part.is_server() {
                self.terminal.begins(strike.part.name(), "killed");
            }
            if strike.wipes {
                self.wipe()?;
            }
        }
        Ok(())
    }

    /// Removes the state files; the processor is dead meanwhile.
    fn wipe(&mut self) -> Result<()> {
        let folder = &self.settings.checkpoints;
        for entry in fs::read_dir(folder).map_err(Error::io(folder))? {
            let file = entry.map_err(Error::io(folder))?.path();
            if file.extension().is_some_and(|extension| extension == "redb") {
                fs::remove_file(&file).map_err(Error::io(&file))?;
            }
        }
        self.wipes += 1;
        Ok(())
    }

    /// Ends one of our own parts in peace.
    pub(super) async fn end(&mut self, part: Part) {
        let slot = &mut self.slots[part.index()];
        slot.wanted = false;
        if let Some(mut process) = slot.process.take() {
            process.stop().await;
        }
    }

    /// Kills so far, in the order of [`PARTS`].
    pub(super) fn kills(&self) -> [u64; 4] {
        [0, 1, 2, 3].map(|index: usize| self.slots[index].kills)
    }

    /// The line of the processor's log that says most.
    pub(super) fn processor_says(&self) -> String {
        let process = self.slots[Part::Processor.index()].process.as_ref();
        process.map_or_else(String::new, |process| cause_in_log(&process.record.log))
    }

    /// Stops everything, the servers last.
    pub(super) async fn stop(&mut self) {
        for slot in &mut self.slots {
            if let Some((_, asking)) = slot.starting.take() {
                asking.abort();
            }
        }
        for part in [Part::Producer, Part::Processor, Part::Cassandra, Part::Kafka] {
            self.end(part).await;
        }
        for mut process in self.started.drain(..) {
            process.stop().await;
        }
    }
}
