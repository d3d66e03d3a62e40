//! Which fault comes when: decided by the seed alone before anything starts. Pure; `fleet` carries it out.

use std::time::Duration;

use crate::cli::{FaultKind, SoakArgs};
use crate::source::random::Random;

/// Of so many kills one hits Kafka and one Cassandra.
const KILLS_PER_SERVER_KILL: u64 = 22;

/// Of so many kills of a processor one also loses the state files of its checkpoint folder.
const KILLS_PER_WIPE: u64 = 4;

/// The shortest pause or outage.
const SHORTEST_PAUSE: Duration = Duration::from_secs(3);

/// Minutes in which Cassandra goes back to an older snapshot once.
const MINUTES_PER_RESTORE: u64 = 10;

/// Minutes in which the source goes away once.
const MINUTES_PER_OUTAGE: u64 = 5;

/// Seconds in which one transaction is sent.
const SECONDS_PER_TRANSACTION: u64 = 20;

/// A process of a soak.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    /// The broker.
    Kafka,
    /// The node.
    Cassandra,
    /// `local-stack source`.
    Source,
    /// `metrics-dashboard`.
    Dashboard,
    /// `ingest-producer run`: from the source to Kafka.
    Ingest,
    /// `ingest-producer stress`: the load.
    Load,
    /// `stream-processor run`, numbered from 0.
    Processor(u64),
}

impl Part {
    /// Whether the part is Kafka or Cassandra.
    pub(super) fn is_server(self) -> bool {
        matches!(self, Self::Kafka | Self::Cassandra)
    }

    /// Its name in the report: the same for all processors.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Kafka => "kafka",
            Self::Cassandra => "cassandra",
            Self::Source => "source",
            Self::Dashboard => "dashboard",
            Self::Ingest => "producer",
            Self::Load => "load",
            Self::Processor(_) => "processor",
        }
    }
}

/// What becomes of a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// It is committed.
    Committed,
    /// It is aborted.
    Aborted,
    /// Its producer disappears; the next one of the same id ends the transaction after a while.
    Abandoned,
}

/// What is done to the system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// SIGKILL.
    Kill(Part),
    /// SIGKILL, and the state files are gone: of this processor, or of all that share its folder and are killed with it.
    Wipe(Part),
    /// SIGSTOP, and SIGCONT after this time.
    Pause(Part, Duration),
    /// SIGKILL of Cassandra; its data folder is copied before it starts again.
    Snapshot,
    /// SIGKILL of Cassandra; the latest copy takes the place of its data folder before it starts again.
    Restore,
    /// SIGKILL of the source, which starts again after this time.
    Outage(Duration),
    /// A transaction, open for this time.
    Transaction(Ending, Duration),
}

impl Fault {
    /// Its line in the report.
    pub(super) fn name(self) -> String {
        match self {
            Self::Kill(part) => format!("{} killed", part.name()),
            Self::Wipe(_) => "processor killed, state files lost".to_owned(),
            Self::Pause(part, _) => format!("{} stands still", part.name()),
            Self::Snapshot => "cassandra killed, snapshot taken".to_owned(),
            Self::Restore => "older cassandra snapshot restored".to_owned(),
            Self::Outage(_) => "source away".to_owned(),
            Self::Transaction(Ending::Committed, _) => "transaction committed".to_owned(),
            Self::Transaction(Ending::Aborted, _) => "transaction aborted".to_owned(),
            Self::Transaction(Ending::Abandoned, _) => "transaction abandoned".to_owned(),
        }
    }

    /// The part it strikes; none for a transaction.
    pub(super) fn part(self) -> Option<Part> {
        match self {
            Self::Kill(part) | Self::Wipe(part) | Self::Pause(part, _) => Some(part),
            Self::Snapshot | Self::Restore => Some(Part::Cassandra),
            Self::Outage(_) => Some(Part::Source),
            Self::Transaction(..) => None,
        }
    }

    /// Whether it keeps intervals of the source from being fetched, and nothing else.
    pub(super) fn delays_intervals(self) -> bool {
        matches!(self.part(), Some(Part::Source | Part::Ingest))
    }
}

/// One fault at its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Strike {
    /// When, counted from the begin of the load. A part that is just down is hit once it is up again.
    pub(super) at: Duration,
    /// What.
    pub(super) fault: Fault,
    /// It strikes a system that has recovered from everything, and nothing else strikes until that has recovered again.
    pub(super) alone: bool,
}

/// Minutes under load: as asked, or as many as the asked number of kills needs.
pub(super) fn minutes(args: &SoakArgs) -> u64 {
    match args.kills {
        Some(kills) => kills.div_ceil(args.kills_per_minute.max(1)),
        None => args.minutes,
    }
}

/// Everything that happens in a run except added partitions, in the order of time. Kills and pauses are spread evenly at
/// random: sometimes two at once, sometimes none for long.
pub(super) fn plan(seed: u64, args: &SoakArgs) -> Vec<Strike> {
    let mut planner = Planner {
        random: Random::new("soak", &[seed]),
        length: Duration::from_secs(60 * minutes(args)),
        args,
        strikes: Vec::new(),
    };
    for kind in &args.faults {
        match kind {
            FaultKind::Kills => planner.kills(),
            FaultKind::Pauses => planner.pauses(),
            FaultKind::Restores => planner.restores(),
            FaultKind::Outages => planner.outages(),
            FaultKind::Transactions => planner.transactions(),
            // Nothing but a topic with the old number of partitions leads back from it: it ends the run.
            FaultKind::Partitions => {}
        }
    }
    planner.strikes.sort_by_key(|strike| strike.at);
    planner.strikes
}

struct Planner<'a> {
    random: Random,
    length: Duration,
    args: &'a SoakArgs,
    strikes: Vec<Strike>,
}

impl Planner<'_> {
    fn minutes(&self) -> u64 {
        self.length.as_secs() / 60
    }

    /// Adds a fault at a random moment within a part of the run, given as fractions of its length.
    fn add(&mut self, fault: Fault, (from, to): (f64, f64)) {
        let at = self.length.mul_f64(from + (to - from) * self.random.fraction());
        let alone = self.random.below(100) < self.args.percent_alone;
        self.strikes.push(Strike { at, fault, alone });
    }

    fn processor(&mut self) -> Part {
        Part::Processor(self.random.below(self.args.processors))
    }

    /// Between the shortest and the longest pause, short ones more often: each doubling is equally likely.
    fn pause(&mut self) -> Duration {
        let longest = Duration::from_secs(self.args.longest_pause).max(SHORTEST_PAUSE);
        let times = longest.as_secs_f64() / SHORTEST_PAUSE.as_secs_f64();
        SHORTEST_PAUSE.mul_f64(times.powf(self.random.fraction()))
    }

    fn kills(&mut self) {
        let kills = self.args.kills.unwrap_or(self.args.minutes * self.args.kills_per_minute);
        let each_server = if kills < 4 { 0 } else { (kills / KILLS_PER_SERVER_KILL).max(1) };
        let producers = (kills - 2 * each_server) / 3;
        let processors = kills - 2 * each_server - producers;
        for number in 0..processors {
            let part = self.processor();
            let wipes = number % KILLS_PER_WIPE == 1;
            self.add(if wipes { Fault::Wipe(part) } else { Fault::Kill(part) }, (0.0, 1.0));
        }
        for number in 0..producers {
            let part = if number % 2 == 0 { Part::Load } else { Part::Ingest };
            self.add(Fault::Kill(part), (0.0, 1.0));
        }
        for _ in 0..each_server {
            self.add(Fault::Kill(Part::Kafka), (0.0, 1.0));
            self.add(Fault::Kill(Part::Cassandra), (0.0, 1.0));
        }
    }

    fn pauses(&mut self) {
        for number in 0..self.minutes() * self.args.pauses_per_minute {
            let part = match number % 4 {
                0 => Part::Kafka,
                1 => Part::Cassandra,
                2 => self.processor(),
                _ => Part::Ingest,
            };
            let length = self.pause();
            self.add(Fault::Pause(part, length), (0.0, 1.0));
        }
    }

    /// In each share of the run first a snapshot, then its restore.
    fn restores(&mut self) {
        let restores = (self.minutes() / MINUTES_PER_RESTORE).max(1);
        for number in 0..restores {
            let within = |fraction: f64| (number as f64 + fraction) / restores as f64;
            self.add(Fault::Snapshot, (within(0.1), within(0.3)));
            self.add(Fault::Restore, (within(0.5), within(0.8)));
        }
    }

    fn outages(&mut self) {
        for _ in 0..(self.minutes() / MINUTES_PER_OUTAGE).max(1) {
            let length = self.pause();
            self.add(Fault::Outage(length), (0.0, 1.0));
        }
    }

    fn transactions(&mut self) {
        for number in 0..self.length.as_secs() / SECONDS_PER_TRANSACTION {
            let ending = match number % 3 {
                0 => Ending::Committed,
                1 => Ending::Aborted,
                _ => Ending::Abandoned,
            };
            let open = SHORTEST_PAUSE.mul_f64(self.random.fraction());
            self.add(Fault::Transaction(ending, open), (0.0, 1.0));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(minutes: u64, kills_per_minute: u64) -> SoakArgs {
        SoakArgs { minutes, kills_per_minute, processors: 3, ..SoakArgs::default() }
    }

    fn count(strikes: &[Strike], is: impl Fn(Fault) -> bool) -> usize {
        strikes.iter().filter(|strike| is(strike.fault)).count()
    }

    #[test]
    fn the_seed_decides_everything() {
        assert_eq!(plan(7, &args(3, 22)), plan(7, &args(3, 22)));
        assert_ne!(plan(7, &args(3, 22)), plan(8, &args(3, 22)));
    }

    #[test]
    fn the_parts_get_their_shares_of_the_kills() {
        let check = |args: &SoakArgs, [processor, wiped, load, ingest, server]: [usize; 5]| {
            let strikes = plan(1, args);
            let killed = |part| count(&strikes, |fault| fault == Fault::Kill(part));
            assert_eq!(count(&strikes, |f| matches!(f, Fault::Kill(Part::Processor(_)))), processor);
            assert_eq!(count(&strikes, |f| matches!(f, Fault::Wipe(Part::Processor(0..=2)))), wiped);
            assert_eq!([Part::Load, Part::Ingest].map(killed), [load, ingest]);
            assert_eq!([Part::Kafka, Part::Cassandra].map(killed), [server, server]);
        };
        check(&args(3, 22), [30, 10, 10, 10, 3]);
        check(&args(1, 4), [1, 1, 0, 0, 1]);
        check(&args(1, 0), [0, 0, 0, 0, 0]);
        check(&SoakArgs { kills: Some(66), ..args(10, 22) }, [30, 10, 10, 10, 3]);
    }

    #[test]
    fn a_number_of_kills_takes_the_minutes_it_needs() {
        let check = |kills, per_minute, expected| {
            assert_eq!(minutes(&SoakArgs { kills, ..args(10, per_minute) }), expected);
        };
        check(None, 22, 10);
        check(Some(1000), 36, 28);
        check(Some(1), 22, 1);
        check(Some(5), 0, 5);
    }

    #[test]
    fn everything_happens_within_the_run_in_the_order_of_time() {
        let strikes = plan(1, &args(30, 22));
        assert!(strikes.windows(2).all(|two| two[0].at <= two[1].at));
        assert!(strikes.iter().all(|strike| strike.at <= Duration::from_secs(60 * 30)));
    }

    #[test]
    fn pauses_keep_their_bounds_and_reach_every_kind_of_part() {
        let strikes = plan(1, &SoakArgs { longest_pause: 60, pauses_per_minute: 2, ..args(30, 22) });
        let mut lengths = Vec::new();
        for strike in &strikes {
            if let Fault::Pause(_, length) | Fault::Outage(length) = strike.fault {
                lengths.push(length);
            }
        }
        assert_eq!(lengths.len(), 66);
        let bounds = Duration::from_secs(3)..=Duration::from_secs(60);
        assert!(lengths.iter().all(|length| bounds.contains(length)), "{lengths:?}");
        assert!(lengths.iter().any(|length| *length > Duration::from_secs(30)), "{lengths:?}");
        for part in ["kafka", "cassandra", "processor", "producer"] {
            let name = format!("{part} stands still");
            assert_eq!(count(&strikes, |fault| fault.name() == name), 15, "{name}");
        }
    }

    #[test]
    fn each_restore_has_a_snapshot_before_it() {
        for (minutes, restores) in [(3, 1), (10, 1), (30, 3)] {
            let strikes = plan(1, &args(minutes, 22));
            let of: Vec<Fault> = strikes.iter().map(|strike| strike.fault).collect();
            let order: Vec<&Fault> =
                of.iter().filter(|f| matches!(f, Fault::Snapshot | Fault::Restore)).collect();
            assert_eq!(order.len(), 2 * restores, "{minutes}");
            assert!(order.chunks(2).all(|pair| pair == [&Fault::Snapshot, &Fault::Restore]), "{order:?}");
        }
    }

    #[test]
    fn the_asked_share_of_the_faults_strikes_alone() {
        let alone = |percent_alone| {
            let strikes = plan(1, &SoakArgs { percent_alone, ..args(30, 22) });
            strikes.iter().filter(|strike| strike.alone).count() * 100 / strikes.len()
        };
        assert_eq!([0, 100].map(alone), [0, 100]);
        assert!((5..15).contains(&alone(10)), "{}", alone(10));
    }

    #[test]
    fn only_the_faults_that_were_asked_for_are_planned() {
        let only = |faults: Vec<FaultKind>| plan(1, &SoakArgs { faults, ..args(10, 22) });
        assert_eq!(only(vec![FaultKind::Partitions]), []);
        let outages = only(vec![FaultKind::Outages]);
        assert_eq!(count(&outages, |fault| matches!(fault, Fault::Outage(_))), outages.len());
        assert_eq!(outages.len(), 2);
    }
}
