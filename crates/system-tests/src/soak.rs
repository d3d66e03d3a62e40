//! `./run soak`: injects random faults into all parts under load, on private servers. At the end, everything
//! stored in Cassandra is compared with the log in Kafka. This module defines the order of a run; the submodules are:
//!
//! - `plan` decides which faults to inject and when, and `schedule` releases each fault at the right time.
//! - `fleet` starts, injects faults into, and restarts the processes.
//! - `transactions` writes to the topic in transactions, like another program.
//! - `recovery` measures how long the pipeline takes to recover from each fault.
//! - `watch` reads the tables during the run, and `page` reads the figures on the dashboard page.
//! - `added` injects the last fault: partitions added to the topic.
//! - `oracle` compares the tables with the log, and `report` presents the results.

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

use local_stack::config::Settings;
use local_stack::error::{Error, Result};
use local_stack::process::{Process, last_lines};
use local_stack::servers::cassandra::connect;
use local_stack::services;
use local_stack::terminal::Terminal;
use tokio_util::sync::CancellationToken;

use crate::cli::{FaultKind, SoakArgs};
use crate::private::{self, PrivateServers};
use fleet::Fleet;
use oracle::Comparison;
use plan::{Injection, Part};
pub use report::Report;
use schedule::FaultSchedule;
use watch::{Findings, Watch};

/// Keyspace and topic of a soak.
const NAME: &str = "soak";

/// Schedule of the shipped stream, which a soak replaces with [`SOAK_SCHEDULE`].
const SCHEDULE: &str = "every = \"1m\"";
/// Schedule of a soak. Its short intervals make it likely that faults occur while an interval is fetched.
const SOAK_SCHEDULE: &str = "every = \"5s\"";

/// Maximum number of differences, regressions or untrue figures that are described. All of them are counted.
const MAX_EXAMPLES: usize = 20;

/// Poll interval for the processes.
const TICK: Duration = Duration::from_millis(50);

/// Poll interval for the progress while the processors drain the log.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(500);

/// Time limit for `init`.
const INIT_TIMEOUT: Duration = Duration::from_secs(120);

/// A run may take [`MAX_OVERRUN`] times its planned length plus this time. Faults wait until their parts are up, and
/// some wait until the pipeline has recovered from earlier faults.
const INJECTIONS_TIMEOUT: Duration = Duration::from_secs(300);
const MAX_OVERRUN: u32 = 3;

/// Time limit for the pipeline to recover while the load continues and no further fault is injected.
const RECOVERED_TIMEOUT: Duration = Duration::from_secs(180);

/// Processors without progress for this long are considered stuck.
const STUCK_AFTER: Duration = Duration::from_secs(120);

/// Time limit for `verify`.
const VERIFY_TIMEOUT: Duration = Duration::from_secs(3600);

/// Runs a soak and prints its report. If it fails, the folder with all logs is kept.
pub async fn run(settings: &Settings, args: &SoakArgs, terminal: Terminal) -> Result<Report> {
    let mut own = PrivateServers::prepare(settings, private::folder(settings, "soak-")?, terminal).await?;
    own.settings.stream = with_short_intervals(&own.settings)?;
    let mut fleet = Fleet::new(&own.settings, &own.installed, args, terminal);
    let ending = CancellationToken::new();
    let report = tokio::select! {
        report = soak(&own.settings, &mut fleet, args, &ending, terminal) => report,
        error = interrupted_twice(&ending, terminal) => Err(error),
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

/// Ends the faults at the first interrupt, so that the report covers those injected until then. Returns at the second.
async fn interrupted_twice(ending: &CancellationToken, terminal: Terminal) -> Error {
    private::interrupted().await;
    terminal.warning("no further faults: comparing what was stored; interrupt again to end at once");
    ending.cancel();
    private::interrupted().await
}

/// Writes a copy of the stream definition with [`SOAK_SCHEDULE`] in place of the shipped schedule. Returns its path.
fn with_short_intervals(settings: &Settings) -> Result<std::path::PathBuf> {
    let text = fs::read_to_string(&settings.stream).map_err(Error::io(&settings.stream))?;
    let copy = settings.folders.config().join("stream.toml");
    fs::write(&copy, text.replace(SCHEDULE, SOAK_SCHEDULE)).map_err(Error::io(&copy))?;
    Ok(copy)
}

async fn soak(
    settings: &Settings,
    fleet: &mut Fleet,
    args: &SoakArgs,
    ending: &CancellationToken,
    terminal: Terminal,
) -> Result<Report> {
    let seed = args.seed.unwrap_or_else(|| uuid::Uuid::new_v4().as_u64_pair().0 >> 32);
    let minutes = plan::minutes(args);
    fleet.start_servers().await?;
    run_to_end(settings, services::init(settings)?, INIT_TIMEOUT).await?;
    let partitions = oracle::partitions(settings).await?;
    let watch = Watch::start(settings, fleet.epoch()).await?;
    let injections = plan::plan(seed, args);
    terminal.started("soak", &format!("{minutes} minutes, {} faults, seed {seed}", injections.len()));
    let stop = CancellationToken::new();
    recovery::watch(settings, fleet.clock().clone(), partitions, stop.clone()).await?;
    let length = Duration::from_secs(60 * minutes);
    let since = Instant::now();
    let not_injected = inject_faults(fleet, injections, length, ending).await;
    stop.cancel();
    let (not_injected, injected_for) = (not_injected?, since.elapsed());
    end_load(fleet).await?;
    let added = match args.faults.contains(&FaultKind::Partitions) {
        true => Some(added::add(settings, fleet, partitions, terminal).await?),
        false => None,
    };
    fleet.end(Part::Ingest).await;
    let drained = drain(fleet, settings, partitions, terminal).await?;
    fleet.end_processors().await;
    let findings = watch.stop().await?;
    let (verified, verify) = verify(settings, terminal).await?;
    let since = Instant::now();
    let comparison = oracle::compare(settings, partitions).await?;
    terminal.done("oracle", &format!("{} keys of Kafka's log compared", comparison.events), since.elapsed());
    print_findings(&comparison, &findings, fleet, terminal);
    Ok(Report {
        seed,
        minutes: injected_for.as_secs().div_ceil(60),
        processors: args.processors,
        own_checkpoints: args.own_checkpoints,
        events: comparison.events,
        copies: comparison.copies,
        kills: fleet.kills,
        faults: fleet.clock().lock().lines(),
        not_struck: not_injected,
        failed_transactions: fleet.failed_transactions(),
        own_ends: fleet.unexpected_exits,
        added,
        looks: findings.reads,
        blind_looks: findings.failed_reads,
        figures: findings.figures,
        counts: findings.counts,
        lost: comparison.lost,
        doubled: comparison.doubled,
        regressed: findings.regressed,
        untrue: findings.untrue,
        drained,
        verified,
        verify,
    })
}

/// Runs a program of this workspace with the names of the soak and waits until it exits.
async fn run_to_end(
    settings: &Settings,
    mut spec: local_stack::process::Spec,
    timeout: Duration,
) -> Result<()> {
    spec.environment.extend(services::names(NAME));
    Process::spawn(&spec, &settings.folders)?.finished(timeout).await
}

/// Starts the load and injects every fault at its time, or as soon as its part is up. Then continues the load until the
/// pipeline has recovered from all faults. Returns the number of faults that were not injected: in time, or before `ending` was
/// cancelled.
async fn inject_faults(
    fleet: &mut Fleet,
    injections: Vec<Injection>,
    length: Duration,
    ending: &CancellationToken,
) -> Result<usize> {
    fleet.start_load();
    let since = Instant::now();
    let mut schedule = FaultSchedule::new(injections);
    let is_over = || ending.is_cancelled() || since.elapsed() >= MAX_OVERRUN * length + INJECTIONS_TIMEOUT;
    while schedule.is_active(length) && !is_over() {
        fleet.poll().await?;
        let recovered = fleet.clock().lock().all_recovered();
        if let Some(injection) = schedule.due(recovered, Instant::now(), |fault| fleet.can_inject(fault)) {
            fleet.inject(&injection).await?;
        }
        tokio::time::sleep(TICK).await;
    }
    let load_only_since = Instant::now();
    while !fleet.clock().lock().all_recovered() && load_only_since.elapsed() < RECOVERED_TIMEOUT {
        fleet.poll().await?;
        tokio::time::sleep(TICK).await;
    }
    Ok(schedule.left())
}

/// Stops the load once both servers are up.
async fn end_load(fleet: &mut Fleet) -> Result<()> {
    while !fleet.servers_are_up() {
        fleet.poll().await?;
        tokio::time::sleep(TICK).await;
    }
    fleet.end(Part::Load).await;
    Ok(())
}

/// Waits until the processors have handled the whole log. Returns `false` if they are stuck.
async fn drain(fleet: &mut Fleet, settings: &Settings, partitions: i32, terminal: Terminal) -> Result<bool> {
    let since = Instant::now();
    let session = connect(settings).await?;
    let (mut highest, mut moved) = (-1, Instant::now());
    let drained = loop {
        fleet.poll().await?;
        match oracle::drained(&session, settings, partitions).await {
            Ok((true, _)) => break true,
            Ok((false, passed)) if passed > highest => (highest, moved) = (passed, Instant::now()),
            Ok((false, _)) => {}
            // A server that has just been restarted may be slow once.
            Err(error) => terminal.warning(&error.to_string()),
        }
        if moved.elapsed() > STUCK_AFTER {
            terminal.warning(&format!(
                "the processors made no progress after {highest} records: {}",
                fleet.processor_errors()
            ));
            break false;
        }
        tokio::time::sleep(PROGRESS_INTERVAL).await;
    };
    terminal.done("drain", if drained { "the whole log" } else { "given up" }, since.elapsed());
    Ok(drained)
}

/// Runs `stream-processor verify`. Returns whether it found no difference, and its closing line.
async fn verify(settings: &Settings, terminal: Terminal) -> Result<(bool, String)> {
    let since = Instant::now();
    let verified = run_to_end(settings, services::verify(settings)?, VERIFY_TIMEOUT).await;
    let lines = last_lines(&settings.folders.logs().join("verify.log"), MAX_EXAMPLES);
    let compared = lines.iter().rfind(|line| line.contains(" pane rows compared, "));
    let verify = compared.or(lines.last()).cloned().unwrap_or_default();
    terminal.done("verify", &verify, since.elapsed());
    Ok((verified.is_ok(), verify))
}

fn print_findings(comparison: &Comparison, findings: &Findings, fleet: &Fleet, terminal: Terminal) {
    for line in comparison.differences.iter().chain(&findings.examples) {
        terminal.warning(line);
    }
    for fault in fleet.clock().lock().unrecovered_faults() {
        terminal.warning(&format!("the pipeline did not recover after: {fault}"));
    }
}
