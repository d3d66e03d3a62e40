//! Parts that are started again when they end: after growing pauses, and not at all when they refuse to run. Servers too: their
//! data survive SIGKILL, and nothing else can go on without them.

use std::time::{Duration, Instant};

use crate::error::Result;
use crate::process::{Down, Process};

/// Exit code of a service that refuses to run, such as on lost history: it would refuse again.
const REFUSED: i32 = 3;

/// Pause before the first new start; it doubles with each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// Longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// A part that ran this long had started well: the next pause is the first one again.
const STEADY_AFTER: Duration = Duration::from_secs(10);

/// The pauses before new starts of one part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pauses {
    next: Duration,
}

impl Pauses {
    fn new() -> Self {
        Self { next: FIRST_PAUSE }
    }

    /// The pause before a part that ran for so long is started again.
    fn after(&mut self, ran: Duration) -> Duration {
        let pause = if ran >= STEADY_AFTER { FIRST_PAUSE } else { self.next };
        self.next = (pause * 2).min(LONGEST_PAUSE);
        pause
    }
}

/// What a look at a part found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// It ended and is started again after a pause.
    Ended(Down, Duration),
    /// It refuses to run and stays down.
    Refused(Down),
    /// It was started again, for the so-manieth time.
    Restarted(u64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Running { since: Instant },
    Waiting { until: Instant },
    Refused,
}

/// A part under supervision.
#[derive(Debug)]
pub struct Supervised {
    process: Process,
    state: State,
    pauses: Pauses,
}

impl Supervised {
    /// A part that runs.
    pub fn new(process: Process) -> Self {
        Self { process, state: State::Running { since: Instant::now() }, pauses: Pauses::new() }
    }

    /// Name of the part.
    pub fn name(&self) -> &str {
        &self.process.record.name
    }

    /// Notices an end, or starts the part again when its pause is over.
    pub fn tend(&mut self) -> Result<Option<Change>> {
        match self.state {
            State::Running { since } => {
                let Some(status) = self.process.ended() else { return Ok(None) };
                if status.code() == Some(REFUSED) {
                    self.state = State::Refused;
                    return Ok(Some(Change::Refused(self.process.went_down(status, true)?)));
                }
                let pause = self.pauses.after(since.elapsed());
                self.state = State::Waiting { until: Instant::now() + pause };
                Ok(Some(Change::Ended(self.process.went_down(status, false)?, pause)))
            }
            State::Waiting { until } if Instant::now() >= until => {
                // Should it fail to start, it is tried again after the next pause.
                self.state = State::Waiting { until: Instant::now() + self.pauses.after(Duration::ZERO) };
                self.process.spawn_again()?;
                self.state = State::Running { since: Instant::now() };
                Ok(Some(Change::Restarted(self.process.record.restarts)))
            }
            State::Waiting { .. } | State::Refused => Ok(None),
        }
    }

    /// Stops the part and forgets it; tells whether it ended by itself.
    pub async fn stop(&mut self) -> bool {
        match self.state {
            State::Running { .. } => self.process.stop().await,
            State::Waiting { .. } | State::Refused => {
                self.process.forget();
                true
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Folders;
    use crate::process::{LOOK_AGAIN, Record, Spec};
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
            if let Some(change) = part.tend().unwrap() {
                return change;
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    #[test]
    fn pauses_double_to_a_minute_and_start_over_after_a_steady_run() {
        let mut pauses = Pauses::new();
        let mut after = |ran: u64| pauses.after(Duration::from_secs(ran)).as_millis();
        let grown: Vec<u128> = (0..11).map(|_| after(1)).collect();
        assert_eq!(grown[..4], [100, 200, 400, 800]);
        assert_eq!(grown[9..], [51_200, 60_000]);
        assert_eq!((after(9), after(10), after(1)), (60_000, 100, 200));
    }

    #[tokio::test]
    async fn a_killed_part_is_started_again_and_its_record_says_so() {
        let (mut part, folders, _folder) = part("echo begun; exec sleep 600");
        let file = folders.run().join("part.json");
        for restarts in 1..=2 {
            let before = Record::read(&file).unwrap();
            before.signal(Signal::KILL);
            let killed = Down { ended: "signal 9".to_owned(), words: String::new(), refused: false };
            let Change::Ended(down, _) = next_change(&mut part).await else { panic!("it was killed") };
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
    async fn a_part_that_refuses_stays_down_with_its_last_words() {
        let (mut part, folders, _folder) = part("echo 'ERROR another layout'; exit 3");
        let down =
            Down { ended: "exit code 3".to_owned(), words: "ERROR another layout".to_owned(), refused: true };
        assert_eq!(next_change(&mut part).await, Change::Refused(down.clone()));
        assert_eq!(part.tend().unwrap(), None);
        let file = folders.run().join("part.json");
        assert_eq!(Record::read(&file).unwrap().down, Some(down));
        assert!(part.stop().await);
        assert_eq!(Record::read(&file), None);
    }

    #[tokio::test]
    async fn a_part_that_fails_at_once_is_tried_again_and_its_last_words_are_those_of_its_last_life() {
        let (mut part, _folders, _folder) =
            part("test -e lived || { touch lived; echo 'ERROR first'; exit 1; }; echo then; exit 1");
        for (restarts, words) in [(1, "ERROR first"), (2, "then"), (3, "then")] {
            let Change::Ended(down, _) = next_change(&mut part).await else { panic!("it fails each time") };
            assert_eq!((down.words.as_str(), down.refused), (words, false));
            assert_eq!(next_change(&mut part).await, Change::Restarted(restarts));
        }
        part.stop().await;
    }
}
