//! `local-stack soak`: every part struck at random under load on servers of its own, and at the end everything stored is
//! compared with Kafka's log. Here is the order of a run; the rooms: `plan` (which fault when), `schedule` (until its turn has come), `fleet` (the processes),
//! `transactions` (of another program), `recovery` (how long until the pipeline goes on), `watch` (a reader meanwhile) with
//! `page` (what the page says), `added` (the last fault), `oracle` (the comparison), `report`.

mod added;
mod fleet;
mod oracle;
mod page;
mod plan;
mod recovery;
mod report;
mod schedule;
mod transactions;
mod watch;

use std::fs;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use crate::cli::{FaultKind, SoakArgs};
use crate::config::Settings;
use crate::error::{Error, Result};
use crate::private::{self, Private};
use crate::process::{Process, last_lines};
use crate::servers::cassandra::connect;
use crate::services;
use crate::terminal::Terminal;
use fleet::Fleet;
use oracle::Truth;
use plan::{Part, Strike};
pub use report::Report;
use schedule::Schedule;
use watch::{Seen, Watch};

/// Keyspace and topic of a soak.
const NAME: &str = "soak";

/// The schedule of the shipped stream, and that of a soak: an interval comes often enough to be struck.
const SCHEDULE: &str = "every = \"1m\"";
const SOAK_SCHEDULE: &str = "every = \"5s\"";

/// Most differences, regressions or untrue figures told in words; all are counted.
const THINGS: usize = 20;

/// How often the processes are looked at.
const TICK: Duration = Duration::from_millis(50);

/// How often the progress is read while the processors drain.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// How long `init` may take.
const INIT_WITHIN: Duration = Duration::from_secs(120);

/// How much longer than planned a run may take: faults wait until their parts are up, and until others are recovered from.
const LONGEST: u32 = 3;
const STRIKES_WITHIN: Duration = Duration::from_secs(300);

/// How long the pipeline may take to recover while nothing strikes and the load goes on.
const RECOVERED_WITHIN: Duration = Duration::from_secs(180);

/// Processors whose progress stands still for so long do not drain any more.
const STUCK_AFTER: Duration = Duration::from_secs(120);

/// How long `verify` may take.
const VERIFY_WITHIN: Duration = Duration::from_secs(3600);

/// Soaks and prints; the folder with every log is kept where something is wrong.
pub async fn run(settings: &Settings, args: &SoakArgs, terminal: Terminal) -> Result<Report> {
    let mut own = Private::prepare(settings, private::folder(settings, "soak-")?, terminal).await?;
    own.settings.stream = with_short_intervals(&own.settings)?;
    let mut fleet = Fleet::new(&own.settings, &own.installed, args, terminal);
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

/// A copy of the stream definition, scheduled for a soak where it has the shipped schedule.
fn with_short_intervals(settings: &Settings) -> Result<std::path::PathBuf> {
    let text = fs::read_to_string(&settings.stream).map_err(Error::io(&settings.stream))?;
    let copy = settings.folders.config().join("stream.toml");
    fs::write(&copy, text.replace(SCHEDULE, SOAK_SCHEDULE)).map_err(Error::io(&copy))?;
    Ok(copy)
}

async fn whole(
    settings: &Settings,
    fleet: &mut Fleet,
    args: &SoakArgs,
    terminal: Terminal,
) -> Result<Report> {
    let seed = args.seed.unwrap_or_else(|| uuid::Uuid::new_v4().as_u64_pair().0 >> 32);
    let minutes = plan::minutes(args);
    fleet.start_servers().await?;
    finish(settings, services::init(settings)?, INIT_WITHIN).await?;
    let partitions = oracle::partitions(settings).await?;
    let watch = Watch::begin(settings, fleet.epoch()).await?;
    let strikes = plan::plan(seed, args);
    terminal.begins("soak", &format!("{minutes} minutes, {} faults, seed {seed}", strikes.len()));
    let length = Duration::from_secs(60 * minutes);
    let not_struck = under_fire(fleet, settings, strikes, length, partitions).await?;
    end_load(fleet).await?;
    let added = match args.faults.contains(&FaultKind::Partitions) {
        true => Some(added::add(settings, fleet, partitions, terminal).await?),
        false => None,
    };
    fleet.end(Part::Ingest).await;
    let drained = drain(fleet, settings, partitions, terminal).await?;
    fleet.end_processors().await;
    let seen = watch.end().await?;
    let (verified, verify) = verify(settings, terminal).await?;
    let since = Instant::now();
    let truth = oracle::compare(settings, partitions).await?;
    terminal.done("oracle", &format!("{} keys of Kafka's log compared", truth.events), since.elapsed());
    tell(&truth, &seen, fleet, terminal);
    Ok(Report {
        seed,
        minutes,
        processors: args.processors,
        own_checkpoints: args.own_checkpoints,
        events: truth.events,
        copies: truth.copies,
        kills: fleet.kills,
        faults: fleet.clock().lock().lines(),
        not_struck,
        failed_transactions: fleet.failed_transactions(),
        own_ends: fleet.own_ends,
        added,
        looks: seen.looks,
        blind_looks: seen.blind,
        figures: seen.figures,
        counts: seen.counts,
        lost: truth.lost,
        doubled: truth.doubled,
        regressed: seen.regressed,
        untrue: seen.untrue,
        drained,
        verified,
        verify,
    })
}

/// Runs a program of ours to its end, under the names of the soak.
async fn finish(settings: &Settings, mut spec: crate::process::Spec, within: Duration) -> Result<()> {
    spec.environment.extend(services::names(NAME));
    Process::spawn(&spec, &settings.folders)?.finished(within).await
}

/// Load, and every fault at its time or as soon as its part is up again; then load until the pipeline has recovered from all of
/// them. Gives the number of faults that did not find their part up in time.
async fn under_fire(
    fleet: &mut Fleet,
    settings: &Settings,
    strikes: Vec<Strike>,
    length: Duration,
    partitions: i32,
) -> Result<usize> {
    let stop = CancellationToken::new();
    let _stops = stop.clone().drop_guard();
    recovery::watch(settings, fleet.clock().clone(), partitions, stop).await?;
    fleet.begin_load();
    let since = Instant::now();
    let mut schedule = Schedule::new(strikes);
    while schedule.goes_on(length) && since.elapsed() < LONGEST * length + STRIKES_WITHIN {
        fleet.tend().await?;
        let recovered = fleet.clock().lock().all_recovered();
        if let Some(strike) = schedule.due(recovered, Instant::now(), |fault| fleet.can_strike(fault)) {
            fleet.strike(&strike).await?;
        }
        tokio::time::sleep(TICK).await;
    }
    let struck = Instant::now();
    while !fleet.clock().lock().all_recovered() && struck.elapsed() < RECOVERED_WITHIN {
        fleet.tend().await?;
        tokio::time::sleep(TICK).await;
    }
    Ok(schedule.left())
}

/// Ends the load once both servers answer.
async fn end_load(fleet: &mut Fleet) -> Result<()> {
    while !fleet.servers_answer() {
        fleet.tend().await?;
        tokio::time::sleep(TICK).await;
    }
    fleet.end(Part::Load).await;
    Ok(())
}

/// Waits until the processors have dealt with the whole log; tells whether they have.
async fn drain(fleet: &mut Fleet, settings: &Settings, partitions: i32, terminal: Terminal) -> Result<bool> {
    let since = Instant::now();
    let session = connect(settings).await?;
    let (mut highest, mut moved) = (-1, Instant::now());
    let drained = loop {
        fleet.tend().await?;
        match oracle::drained(&session, settings, partitions).await {
            Ok((true, _)) => break true,
            Ok((false, passed)) if passed > highest => (highest, moved) = (passed, Instant::now()),
            Ok((false, _)) => {}
            // A server that has just come back may be slow once.
            Err(error) => terminal.warning(&error.to_string()),
        }
        if moved.elapsed() > STUCK_AFTER {
            terminal.warning(&format!("the processors stand still at {highest}: {}", fleet.processors_say()));
            break false;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    };
    terminal.done("drain", if drained { "all of the log" } else { "given up" }, since.elapsed());
    Ok(drained)
}

/// Whether `stream-processor verify` finds no difference, and its closing line.
async fn verify(settings: &Settings, terminal: Terminal) -> Result<(bool, String)> {
    let since = Instant::now();
    let verified = finish(settings, services::verify(settings)?, VERIFY_WITHIN).await;
    let said = last_lines(&settings.folders.logs().join("verify.log"), THINGS);
    let compared = said.iter().rfind(|line| line.contains(" pane rows compared, "));
    let verify = compared.or(said.last()).cloned().unwrap_or_default();
    terminal.done("verify", &verify, since.elapsed());
    Ok((verified.is_ok(), verify))
}

fn tell(truth: &Truth, seen: &Seen, fleet: &Fleet, terminal: Terminal) {
    for line in truth.differences.iter().chain(&seen.examples) {
        terminal.warning(line);
    }
    for fault in fleet.clock().lock().waits_for() {
        terminal.warning(&format!("the pipeline did not go on after: {fault}"));
    }
}
