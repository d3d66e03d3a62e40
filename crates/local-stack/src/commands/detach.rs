//! `./run --detach`: a supervisor in the background starts everything and stays; this process shows what it says until all is
//! ready, then ends.

use std::ffi::OsString;

use super::up::{Outcome, StopSignals};
use super::{SUPERVISOR, SUPERVISOR_WITHIN, copy_from};
use crate::cli::UpArgs;
use crate::config::Settings;
use crate::error::{Error, Result};
use crate::process::{LOOK_AGAIN, Process, Record, Spec};

/// Starts the supervisor; it is told to stop when this process is before all is ready.
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
            supervisor.forget();
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
            () = tokio::time::sleep(LOOK_AGAIN) => {}
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
        grace: SUPERVISOR_WITHIN,
    }
}
