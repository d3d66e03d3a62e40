//! `local-stack soak`: every part killed at random under load on servers of its own, and at the end everything stored is
//! compared with Kafka's log. Here is the order of a run and its table; the rooms: `plan` (when what is killed), `fleet` (the
//! processes), `watch` (a reader meanwhile), `oracle` (the comparison).

mod fleet;
mod oracle;
mod plan;
mod watch;

use std::time::{Duration, Instant};

use serde::Serialize;

use crate::cli::SoakArgs;
use crate::config::Settings;
use crate::error::Result;
use crate::private::{self, Private};
use crate::process::{Process, last_lines};
use crate::servers::cassandra::connect;
use crate::servers::kafka::Reader;
use crate::services;
use crate::terminal::Terminal;
use fleet::Fleet;
use oracle::Truth;
use plan::{PARTS, Part, Strike};
use watch::{Seen, Watch};

/// Keyspace and topic of a soak.
const NAME: &str = "soak";

/// Most differences, regressions or ends told in words; all are counted.
const THINGS: usize = 20;

/// How often the processes are looked at.
const TICK: Duration = Duration::from_millis(50);

/// How often the progress is read while the processor drains.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// How long `init` may take.
const INIT_WITHIN: Duration = Duration::from_secs(120);

/// A processor whose progress stands still for so long does not drain any more.
const STUCK_AFTER: Duration = Duration::from_secs(120);

/// How long `verify` may take.
const VERIFY_WITHIN: Duration = Duration::from_secs(3600);

/// What a run found.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Decided when what was killed.
    pub seed: u64,
    /// Minutes under load and fire.
    pub minutes: u64,
    /// Events in Kafka's log, each counted once.
    pub events: u64,
    /// Records of the log that repeat an earlier one.
    pub copies: u64,
    /// Kills of processor, producer, Kafka, Cassandra.
    pub kills: [u64; 4],
    /// How often the checkpoint files were removed.
    pub wipes: u64,
    /// How often the processor ended without being killed.
    pub own_ends: usize,
    /// Complete looks of the reader.
    pub looks: u64,
    /// Looks that failed because Cassandra was down.
    pub blind_looks: u64,
    /// Events that rows, totals or panes lack.
    pub lost: u64,
    /// Events that rows, totals or panes have too often, or of a later copy.
    pub doubled: u64,
    /// Values that the reader saw going back.
    pub regressed: u64,
    /// Whether the processor dealt with the whole log once the load ended.
    pub drained: bool,
    /// Whether `stream-processor verify` found no difference.
    pub verified: bool,
    /// Its last line.
    pub verify: String,
}

impl Report {
    /// Whether every promise held, and the run could have noticed otherwise.
    pub fn passed(&self) -> bool {
        let nothing_wrong = self.lost + self.doubled + self.regressed == 0;
        nothing_wrong && self.drained && self.verified && self.events > 0 && self.looks > 0
    }

    /// The table in one line.
    pub fn summary(&self) -> String {
        format!(
            "{} events, {} copies, {} kills, {} wipes: lost {}, doubled {}, regressed {}, verify {} (seed {})",
            self.events,
            self.copies,
            self.kills.iter().sum::<u64>(),
            self.wipes,
            self.lost,
            self.doubled,
            self.regressed,
            if self.verified { "passed" } else { "FAILED" },
            self.seed
        )
    }

    fn print(&self, json: bool, terminal: Terminal) {
        if json {
            terminal.data(&serde_json::to_string(self).unwrap_or_default());
            return;
        }
        let row = |what: &str, found: String| [what.to_owned(), found];
        let mut rows = vec![
            row("minutes", format!("{} (seed {})", self.minutes, self.seed)),
            row("events", self.events.to_string()),
            row("copies sent", self.copies.to_string()),
        ];
        let kills = PARTS.iter().zip(self.kills);
        rows.extend(kills.map(|(part, kills)| row(&format!("kills of {}", part.name()), kills.to_string())));
        rows.extend([
            row("wipes of the checkpoints", self.wipes.to_string()),
            row("processor ended by itself", self.own_ends.to_string()),
            row("looks of the reader", format!("{}, {} more in vain", self.looks, self.blind_looks)),
            row("drained", if self.drained { "yes" } else { "NO" }.to_owned()),
            row("lost", self.lost.to_string()),
            row("doubled", self.doubled.to_string()),
            row("regressed", self.regressed.to_string()),
            row("verify", format!("{}: {}", if self.verified { "passed" } else { "FAILED" }, self.verify)),
        ]);
        terminal.data("");
        terminal.table(["what", "found"], &rows);
    }
}

/// Soaks and prints; the folder with every log is kept where something is wrong.
pub async fn run(settings: &Settings, args: &SoakArgs, terminal: Terminal) -> Result<Report> {
    let own = Private::prepare(settings, private::folder(settings, "soak-")?, terminal).await?;
    let mut fleet = Fleet::new(&own.settings, &own.installed, args.rate, terminal);
    let report = tokio::select! {
        report = whole(&own.settings, &mut fleet, args, terminal) => report,
        error = private::interrupted() => Err(error),
    };
    fleet.stop().await;
    if let Ok(report) = &report {
        report.print(args.json, terminal);
    }
    if !report.as_ref().is_ok_and(Report::passed) {
        own.keep(terminal);
    }
    report
}

async fn whole(
    settings: &Settings,
    fleet: &mut Fleet,
    args: &SoakArgs,
    terminal: Terminal,
) -> Result<Report> {
    let seed = args.seed.unwrap_or_else(|| uuid::Uuid::new_v4().as_u64_pair().0 >> 32);
    fleet.start_servers().await?;
    finish(settings, services::init(settings)?, INIT_WITHIN).await?;
    let watch = Watch::begin(settings).await?;
    let strikes = plan::plan(seed, args.minutes, args.kills_per_minute);
    terminal.begins("soak", &format!("{} minutes, {} kills, seed {seed}", args.minutes, strikes.len()));
    under_fire(fleet, strikes, Duration::from_secs(60 * args.minutes)).await?;
    let drained = drain(settings, fleet, terminal).await?;
    let seen = watch.end().await?;
    let since = Instant::now();
    let verified = finish(settings, services::verify(settings)?, VERIFY_WITHIN).await;
    let said = last_lines(&settings.folders.logs().join("verify.log"), THINGS);
    let compared = said.iter().rfind(|line| line.contains(" pane rows compared, "));
    let verify = compared.or(said.last()).cloned().unwrap_or_default();
    terminal.done("verify", &verify, since.elapsed());
    let since = Instant::now();
    let truth = oracle::compare(settings).await?;
    terminal.done("oracle", &format!("{} keys of Kafka's log compared", truth.events), since.elapsed());
    tell(&truth, &seen, terminal);
    Ok(Report {
        seed,
        minutes: args.minutes,
        events: truth.events,
        copies: truth.copies,
        kills: fleet.kills(),
        wipes: fleet.wipes,
        own_ends: fleet.own_ends.len(),
        looks: seen.looks,
        blind_looks: seen.blind,
        lost: truth.lost,
        doubled: truth.doubled,
        regressed: seen.regressed,
        drained,
        verified: verified.is_ok(),
        verify,
    })
}

/// Runs a program of ours to its end, under the names of the soak.
async fn finish(settings: &Settings, mut spec: crate::process::Spec, within: Duration) -> Result<()> {
    spec.environment.extend(services::names(NAME));
    Process::spawn(&spec, &settings.folders)?.finished(within).await
}

/// Load, and every kill at its time or as soon as its part is up again.
async fn under_fire(fleet: &mut Fleet, mut strikes: Vec<Strike>, length: Duration) -> Result<()> {
    fleet.begin_load();
    let since = Instant::now();
    while since.elapsed() < length {
        fleet.tend().await?;
        let now = since.elapsed();
        let due = strikes.iter().position(|strike| strike.at <= now && fleet.can_be_hit(strike.part));
        if let Some(due) = due {
            fleet.hit(&strikes.remove(due)).await?;
        }
        tokio::time::sleep(TICK).await;
    }
    Ok(())
}

/// Ends the load and waits until the processor has dealt with the whole log, then ends it; tells whether it has.
async fn drain(settings: &Settings, fleet: &mut Fleet, terminal: Terminal) -> Result<bool> {
    let since = Instant::now();
    while !fleet.servers_answer() {
        fleet.tend().await?;
        tokio::time::sleep(TICK).await;
    }
    fleet.end(Part::Producer).await;
    let (session, reader) = (connect(settings).await?, Reader::new(settings, NAME)?);
    let (mut highest, mut moved) = (-1, Instant::now());
    let drained = loop {
        fleet.tend().await?;
        match oracle::drained(&session, &reader).await {
            Ok((true, _)) => break true,
            Ok((false, passed)) if passed > highest => (highest, moved) = (passed, Instant::now()),
            Ok((false, _)) => {}
            // A server that has just come back may be slow once.
            Err(error) => terminal.warning(&error.to_string()),
        }
        if moved.elapsed() > STUCK_AFTER {
            terminal.warning(&format!("the processor stands still at {highest}: {}", fleet.processor_says()));
            break false;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    };
    terminal.done("drain", if drained { "all of the log" } else { "given up" }, since.elapsed());
    fleet.end(Part::Processor).await;
    Ok(drained)
}

fn tell(truth: &Truth, seen: &Seen, terminal: Terminal) {
    for line in truth.differences.iter().chain(&seen.examples) {
        terminal.warning(line);
    }
}
