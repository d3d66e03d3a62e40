//! Test builds only (feature `failpoints`): the process kills itself, as `kill -9` would, at a step of the worker's loop.

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

/// Where, and at which time it is passed there, over all partitions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KillAt {
    step: &'static str,
    time: u32,
}

impl FromStr for KillAt {
    type Err = String;

    fn from_str(text: &str) -> Result<KillAt, String> {
        let (name, time) = text.split_once('=').ok_or("not of the form STEP=N")?;
        let step = STEPS.into_iter().find(|step| *step == name);
        let step = step.ok_or_else(|| format!("no step `{name}`; one of {}", STEPS.join(", ")))?;
        match time.parse() {
            Ok(time) if time > 0 => Ok(KillAt { step, time }),
            _ => Err(format!("`{time}` is no count; 1 or more")),
        }
    }
}

impl KillAt {
    /// From now on the step counts down to the kill.
    pub fn arm(&self) -> Result<(), String> {
        let left = AtomicU32::new(self.time);
        fail::cfg_callback(self.step, move || {
            if left.fetch_sub(1, Ordering::SeqCst) == 1 {
                // What failed to kill must not go on as if it had passed.
                let sent = kill_process(getpid(), Signal::KILL);
                tracing::error!(?sent, "this process should be dead");
                std::process::abort();
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_and_a_time_are_read_and_anything_else_is_named() {
        assert_eq!("before_rows=3".parse(), Ok(KillAt { step: "before_rows", time: 3 }));
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
