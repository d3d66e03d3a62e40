//! Restarts parts that exit, with exponential backoff. A part that refuses to run is not restarted. Servers are
//! restarted too, because their data survives SIGKILL and every other part depends on them.

use std::time::{Duration, Instant};

use crate::error::Result;
use crate::process::{Down, Process};

/// Exit code of a service that refuses to run, for example because history was lost. A restart would not help.
const REFUSED: i32 = 3;

/// Delay before the first restart. It doubles with each further restart.
const INITIAL_BACKOFF: Duration = Duration::from_millis(100);

/// Upper limit of the delay.
const MAX_BACKOFF: Duration = Duration::from_secs(60);

/// A part that has run for this long counts as stable, which resets its delay to [`INITIAL_BACKOFF`].
const STABLE_AFTER: Duration = Duration::from_secs(10);

/// Delays before the restarts of one part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Backoff {
    next: Duration,
}

impl Backoff {
    fn new() -> Self {
        Self { next: INITIAL_BACKOFF }
    }

    /// Returns the delay before the next restart of a part that has just exited after running for `ran`.
    fn after(&mut self, ran: Duration) -> Duration {
        let pause = if ran >= STABLE_AFTER { INITIAL_BACKOFF } else { self.next };
        self.next = (pause * 2).min(MAX_BACKOFF);
        pause
    }
}

/// A change in the state of a part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// The part exited. It is restarted after this delay.
    Ended(Down, Duration),
    /// The part refuses to run and is not restarted.
    Refused(Down),
    /// The part was restarted. The number counts its restarts.
    Restarted(u64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Running { since: Instant },
    Waiting { until: Instant },
    Refused,
}

/// A supervised part.
#[derive(Debug)]
pub struct Supervised {
    process: Process,
    state: State,
    backoff: Backoff,
}

impl Supervised {
    /// Supervises a running process.
    pub fn new(process: Process) -> Self {
        Self { process, state: State::Running { since: Instant::now() }, backoff: Backoff::new() }
    }

    /// Returns the name of the part.
    pub fn name(&self) -> &str {
        &self.process.record.name
    }

    /// Detects an exit, or restarts the part once its backoff is over. Returns the change, if any.
    pub fn poll(&mut self) -> Result<Option<Change>> {
        match self.state {
            State::Running { since } => {
                let Some(status) = self.process.ended() else { return Ok(None) };
                if status.code() == Some(REFUSED) {
                    self.state = State::Refused;
                    return Ok(Some(Change::Refused(self.process.record_exit(status, true)?)));
                }
                let pause = self.backoff.after(since.elapsed());
                self.state = State::Waiting { until: Instant::now() + pause };
                Ok(Some(Change::Ended(self.process.record_exit(status, false)?, pause)))
            }
            State::Waiting { until } if Instant::now() >= until => {
                // If the start fails, the next delay applies before another attempt.
                self.state = State::Waiting { until: Instant::now() + self.backoff.after(Duration::ZERO) };
                self.process.respawn()?;
                self.state = State::Running { since: Instant::now() };
                Ok(Some(Change::Restarted(self.process.record.restarts)))
            }
            State::Waiting { .. } | State::Refused => Ok(None),
        }
    }

    /// Stops the part and removes its record. Returns `false` if it had to be killed.
    pub async fn stop(&mut self) -> bool {
        match self.state {
            State::Running { .. } => self.process.stop().await,
            State::Waiting { .. } | State::Refused => {
                self.process.remove_record();
                true
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Folders;
    use crate::process::{POLL_INTERVAL, Record, Spec};
    use rustix::process::Signal;
    use std::ffi::OsString;
    use tempfile::TempDir;

    fn part(script: &str) -> (Supervised, Folders, TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let folders = Folders { root: folder.path().to_owned() };
        folders.create().unwrap();
        let spec = Spec {
            name: "part".to_owned(),
            program: "/bin/sh".into(),
            arguments: ["-c", script].map(OsString::from).into(),
            environment: Vec::new(),
            folder: folder.path().to_owned(),
            address: String::new(),
            grace: Duration::from_secs(5),
        };
        (Supervised::new(Process::spawn(&spec, &folders).unwrap()), folders, folder)
    }

    async fn next_change(part: &mut Supervised) -> Change {
        loop {
            if let Some(change) = part.poll().unwrap() {
                return change;
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    #[test]
    fn backoff_doubles_up_to_a_minute_and_resets_after_a_stable_run() {
        let mut backoff = Backoff::new();
        let mut after = |ran: u64| backoff.after(Duration::from_secs(ran)).as_millis();
        let grown: Vec<u128> = (0..11).map(|_| after(1)).collect();
        assert_eq!(grown[..4], [100, 200, 400, 800]);
        assert_eq!(grown[9..], [51_200, 60_000]);
        assert_eq!((after(9), after(10), after(1)), (60_000, 100, 200));
    }

    #[tokio::test]
    async fn a_killed_part_is_restarted_and_its_record_is_updated() {
        let (mut part, folders, _folder) = part("echo started; exec sleep 600");
        let file = folders.run().join("part.json");
        for restarts in 1..=2 {
            let before = Record::read(&file).unwrap();
            before.signal(Signal::KILL);
            let killed = Down { ended: "signal 9".to_owned(), last_words: String::new(), refused: false };
            let Change::Ended(down, _) = next_change(&mut part).await else { panic!("the part was killed") };
            assert_eq!(down, killed);
            assert_eq!(Record::read(&file).unwrap().down, Some(killed));
            assert_eq!(next_change(&mut part).await, Change::Restarted(restarts));
            let after = Record::read(&file).unwrap();
            assert!(after.is_alive() && after.pid != before.pid && after.restarts == restarts, "{after:?}");
        }
        assert!(part.stop().await);
        assert_eq!(Record::read(&file), None);
    }

    #[tokio::test]
    async fn a_part_that_refuses_to_run_stays_down_and_keeps_its_last_words() {
        let (mut part, folders, _folder) = part("echo 'ERROR another layout'; exit 3");
        let down = Down {
            ended: "exit code 3".to_owned(),
            last_words: "ERROR another layout".to_owned(),
            refused: true,
        };
        assert_eq!(next_change(&mut part).await, Change::Refused(down.clone()));
        assert_eq!(part.poll().unwrap(), None);
        let file = folders.run().join("part.json");
        assert_eq!(Record::read(&file).unwrap().down, Some(down));
        assert!(part.stop().await);
        assert_eq!(Record::read(&file), None);
    }

    #[tokio::test]
    async fn a_part_that_exits_at_once_is_restarted_and_its_last_words_come_from_the_latest_run() {
        let (mut part, _folders, _folder) =
            part("test -e lived || { touch lived; echo 'ERROR first'; exit 1; }; echo then; exit 1");
        for (restarts, last_words) in [(1, "ERROR first"), (2, "then"), (3, "then")] {
            let Change::Ended(down, _) = next_change(&mut part).await else {
                panic!("the part exits each time")
            };
            assert_eq!((down.last_words.as_str(), down.refused), (last_words, false));
            assert_eq!(next_change(&mut part).await, Change::Restarted(restarts));
        }
        part.stop().await;
    }
}
