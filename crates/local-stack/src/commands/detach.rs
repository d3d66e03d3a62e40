//! `./run --detach`: starts a supervisor in the background, which starts all parts and keeps them running. This process
//! prints the output of the supervisor until all parts are ready, then exits.

use std::ffi::OsString;

use super::up::{Outcome, StopSignals};
use super::{SUPERVISOR, SUPERVISOR_TIMEOUT, copy_from};
use crate::cli::UpArgs;
use crate::config::Settings;
use crate::error::{Error, Result};
use crate::process::{POLL_INTERVAL, Process, Record, Spec};

/// Starts the supervisor and waits until all parts are ready. A signal that arrives before that stops the supervisor.
pub async fn detach(settings: &Settings, args: &UpArgs) -> Result<Outcome> {
    settings.folders.create()?;
    let record = settings.folders.run().join(format!("{SUPERVISOR}.json"));
    if Record::read(&record).is_some_and(|supervisor| supervisor.is_alive()) {
        return Err(Error::already_running());
    }
    let mut stop = StopSignals::new(false)?;
    let mut supervisor = Process::spawn(&spec(settings, args), &settings.folders)?;
    let log = supervisor.record.log.clone();
    let mut shown = 0;
    loop {
        let ended = supervisor.ended().is_some();
        let ready = Record::read(&record).is_some_and(|supervisor| !supervisor.address.is_empty());
        shown = copy_from(&log, shown)?;
        if ended {
            supervisor.remove_record();
            return Ok(Outcome::Failed);
        }
        if ready {
            return Ok(Outcome::Detached);
        }
        tokio::select! {
            number = stop.received() => {
                supervisor.stop().await;
                copy_from(&log, shown)?;
                return Ok(Outcome::Stopped(number));
            }
            () = tokio::time::sleep(POLL_INTERVAL) => {}
        }
    }
}

fn spec(settings: &Settings, args: &UpArgs) -> Spec {
    let mut arguments: Vec<OsString> = ["up", "--supervise"].map(OsString::from).into();
    if args.servers_only {
        arguments.push("--servers-only".into());
    }
    if let Some(base) = args.place.port_base {
        arguments.extend(["--port-base".into(), base.to_string().into()]);
    }
    if let Some(cache) = &args.place.cache {
        arguments.extend(["--cache".into(), cache.into()]);
    }
    Spec {
        name: SUPERVISOR.to_owned(),
        program: settings.binaries.join("local-stack"),
        arguments,
        environment: Vec::new(),
        folder: settings.checkout.clone(),
        address: String::new(),
        grace: SUPERVISOR_TIMEOUT,
    }
}
