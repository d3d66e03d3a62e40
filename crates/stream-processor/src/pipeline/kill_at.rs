//! For test builds only (feature `failpoints`): the process sends SIGKILL to itself at a step of the worker's loop.

use rustix::process::{Signal, getpid, kill_process};
use std::str::FromStr;
use std::sync::atomic::{AtomicU32, Ordering};

/// The fail points of `worker.rs`, in the order of its loop.
pub const STEPS: [&str; 8] = [
    "before_look_up",
    "before_apply",
    "before_rows",
    "before_panes",
    "before_note",
    "before_commit",
    "before_publish",
    "in_publish",
];

/// The step to kill the process at, and the number of the pass at which to do so, counted over all partitions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KillAt {
    step: &'static str,
    pass: u32,
}

impl FromStr for KillAt {
    type Err = String;

    fn from_str(text: &str) -> Result<KillAt, String> {
        let (name, pass) = text.split_once('=').ok_or("expected STEP=N")?;
        let step = STEPS.into_iter().find(|step| *step == name);
        let step =
            step.ok_or_else(|| format!("unknown step `{name}`; expected one of {}", STEPS.join(", ")))?;
        match pass.parse() {
            Ok(pass) if pass > 0 => Ok(KillAt { step, pass }),
            _ => Err(format!("invalid count `{pass}`; expected 1 or more")),
        }
    }
}

impl KillAt {
    /// Arms the fail point.
    pub fn arm(&self) -> Result<(), String> {
        let remaining = AtomicU32::new(self.pass);
        fail::cfg_callback(self.step, move || {
            if remaining.fetch_sub(1, Ordering::SeqCst) == 1 {
                // If the signal could not be sent, the process must not continue past the step.
                let sent = kill_process(getpid(), Signal::KILL);
                tracing::error!(?sent, "SIGKILL did not end this process");
                std::process::abort();
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_and_a_count_are_parsed_and_an_error_names_the_invalid_part() {
        assert_eq!("before_rows=3".parse(), Ok(KillAt { step: "before_rows", pass: 3 }));
        for (text, part) in [("before_rows", "STEP=N"), ("rows=1", "`rows`"), ("before_rows=0", "`0`")] {
            let error = text.parse::<KillAt>().unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn every_fail_point_of_the_worker_is_a_step() {
        let worker = include_str!("worker.rs");
        let points: Vec<&str> =
            worker.split("fail_point!(\"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
        assert_eq!(points.len(), STEPS.len());
        assert!(points.iter().all(|point| STEPS.contains(point)), "{points:?}");
    }
}
