//! Plans which fault is injected when. The seed and the arguments alone determine the plan. Pure; `fleet` injects the
//! faults.

use std::time::Duration;

use crate::cli::{FaultKind, SoakArgs};
use source_simulator::random::Random;

/// One in this many kills hits Kafka, and one hits Cassandra.
const KILLS_PER_SERVER_KILL: u64 = 22;

/// One in this many kills of a processor also deletes the state files in its checkpoint folder.
const KILLS_PER_WIPE: u64 = 4;

/// Duration of the shortest pause or outage.
const SHORTEST_PAUSE: Duration = Duration::from_secs(3);

/// Cassandra is restored from an older snapshot once in this many minutes.
const MINUTES_PER_RESTORE: u64 = 10;

/// The source has one outage in this many minutes.
const MINUTES_PER_OUTAGE: u64 = 5;

/// One transaction is sent in this many seconds.
const SECONDS_PER_TRANSACTION: u64 = 20;

/// A process of a soak.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    /// The Kafka broker.
    Kafka,
    /// The Cassandra node.
    Cassandra,
    /// The source simulator.
    Source,
    /// `metrics-dashboard`.
    Dashboard,
    /// `ingest-producer run`, which copies records from the source to Kafka.
    Ingest,
    /// `ingest-producer stress`, which generates the load.
    Load,
    /// `stream-processor run`, numbered from 0.
    Processor(u64),
}

impl Part {
    /// Returns whether the part is Kafka or Cassandra.
    pub(super) fn is_server(self) -> bool {
        matches!(self, Self::Kafka | Self::Cassandra)
    }

    /// Returns the name in the report, which is the same for all processors.
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

/// How a transaction ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TransactionEnd {
    /// It is committed.
    Committed,
    /// It is aborted.
    Aborted,
    /// Its producer disappears. The next producer with the same id causes Kafka to abort the transaction.
    Abandoned,
}

/// A fault to inject.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// SIGKILL.
    Kill(Part),
    /// SIGKILL with loss of the state files. All processors that share the checkpoint folder are killed.
    Wipe(Part),
    /// SIGSTOP, then SIGCONT after this duration.
    Pause(Part, Duration),
    /// SIGKILL of Cassandra, whose data folder is copied before the restart.
    Snapshot,
    /// SIGKILL of Cassandra, whose data folder is replaced by the latest snapshot before the restart.
    Restore,
    /// SIGKILL of the source, which is restarted after this duration.
    Outage(Duration),
    /// A transaction that stays open for this duration.
    Transaction(TransactionEnd, Duration),
}

impl Fault {
    /// Returns the name in the report.
    pub(super) fn name(self) -> String {
        match self {
            Self::Kill(part) => format!("{} killed", part.name()),
            Self::Wipe(_) => "processor killed, state files lost".to_owned(),
            Self::Pause(part, _) => format!("{} paused", part.name()),
            Self::Snapshot => "cassandra killed, snapshot taken".to_owned(),
            Self::Restore => "older cassandra snapshot restored".to_owned(),
            Self::Outage(_) => "source down".to_owned(),
            Self::Transaction(TransactionEnd::Committed, _) => "transaction committed".to_owned(),
            Self::Transaction(TransactionEnd::Aborted, _) => "transaction aborted".to_owned(),
            Self::Transaction(TransactionEnd::Abandoned, _) => "transaction abandoned".to_owned(),
        }
    }

    /// Returns the affected part, or `None` for a transaction.
    pub(super) fn part(self) -> Option<Part> {
        match self {
            Self::Kill(part) | Self::Wipe(part) | Self::Pause(part, _) => Some(part),
            Self::Snapshot | Self::Restore => Some(Part::Cassandra),
            Self::Outage(_) => Some(Part::Source),
            Self::Transaction(..) => None,
        }
    }

    /// Returns whether the only effect of the fault is to delay the fetching of intervals.
    pub(super) fn delays_intervals(self) -> bool {
        matches!(self.part(), Some(Part::Source | Part::Ingest))
    }
}

/// A fault and the time of its injection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Injection {
    /// Time since the start of the load. If the part is down at that time, the fault waits until it is up.
    pub(super) at: Duration,
    /// The fault to inject.
    pub(super) fault: Fault,
    /// Whether the fault waits until the pipeline has recovered from all others, and delays further faults until the
    /// pipeline has recovered from it.
    pub(super) alone: bool,
}

/// Returns the duration of the load in minutes: the requested one, or the time that the requested number of kills
/// takes.
pub(super) fn minutes(args: &SoakArgs) -> u64 {
    match args.kills {
        Some(kills) => kills.div_ceil(args.kills_per_minute.max(1)),
        None => args.minutes,
    }
}

/// Plans all faults of a run except added partitions, sorted by time. Kills and pauses are distributed uniformly at
/// random, so they may coincide or be far apart.
pub(super) fn plan(seed: u64, args: &SoakArgs) -> Vec<Injection> {
    let mut planner = Planner {
        random: Random::new("soak", &[seed]),
        length: Duration::from_secs(60 * minutes(args)),
        args,
        injections: Vec::new(),
    };
    for kind in &args.faults {
        match kind {
            FaultKind::Kills => planner.kills(),
            FaultKind::Pauses => planner.pauses(),
            FaultKind::Restores => planner.restores(),
            FaultKind::Outages => planner.outages(),
            FaultKind::Transactions => planner.transactions(),
            // Partitions cannot be removed from a topic, so this fault is injected at the end of the run.
            FaultKind::Partitions => {}
        }
    }
    planner.injections.sort_by_key(|injection| injection.at);
    planner.injections
}

struct Planner<'a> {
    random: Random,
    length: Duration,
    args: &'a SoakArgs,
    injections: Vec<Injection>,
}

impl Planner<'_> {
    fn minutes(&self) -> u64 {
        self.length.as_secs() / 60
    }

    /// Adds a fault at a random time between two points of the run, given as fractions of its length.
    fn add(&mut self, fault: Fault, (from, to): (f64, f64)) {
        let at = self.length.mul_f64(from + (to - from) * self.random.fraction());
        let alone = self.random.below(100) < self.args.percent_alone;
        self.injections.push(Injection { at, fault, alone });
    }

    fn processor(&mut self) -> Part {
        Part::Processor(self.random.below(self.args.processors))
    }

    /// Returns a random duration between the shortest and the longest pause, uniform on a logarithmic scale.
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

    /// Divides the run into equal parts, each with a snapshot followed by its restore.
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
                0 => TransactionEnd::Committed,
                1 => TransactionEnd::Aborted,
                _ => TransactionEnd::Abandoned,
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

    fn count(injections: &[Injection], is: impl Fn(Fault) -> bool) -> usize {
        injections.iter().filter(|injection| is(injection.fault)).count()
    }

    #[test]
    fn the_seed_determines_the_plan() {
        assert_eq!(plan(7, &args(3, 22)), plan(7, &args(3, 22)));
        assert_ne!(plan(7, &args(3, 22)), plan(8, &args(3, 22)));
    }

    #[test]
    fn kills_are_distributed_over_the_parts() {
        let check = |args: &SoakArgs, [processor, wiped, load, ingest, server]: [usize; 5]| {
            let injections = plan(1, args);
            let killed = |part| count(&injections, |fault| fault == Fault::Kill(part));
            assert_eq!(count(&injections, |f| matches!(f, Fault::Kill(Part::Processor(_)))), processor);
            assert_eq!(count(&injections, |f| matches!(f, Fault::Wipe(Part::Processor(0..=2)))), wiped);
            assert_eq!([Part::Load, Part::Ingest].map(killed), [load, ingest]);
            assert_eq!([Part::Kafka, Part::Cassandra].map(killed), [server, server]);
        };
        check(&args(3, 22), [30, 10, 10, 10, 3]);
        check(&args(1, 4), [1, 1, 0, 0, 1]);
        check(&args(1, 0), [0, 0, 0, 0, 0]);
        check(&SoakArgs { kills: Some(66), ..args(10, 22) }, [30, 10, 10, 10, 3]);
    }

    #[test]
    fn a_number_of_kills_determines_the_minutes() {
        let check = |kills, per_minute, expected| {
            assert_eq!(minutes(&SoakArgs { kills, ..args(10, per_minute) }), expected);
        };
        check(None, 22, 10);
        check(Some(1000), 36, 28);
        check(Some(1), 22, 1);
        check(Some(5), 0, 5);
    }

    #[test]
    fn all_faults_are_within_the_run_and_sorted_by_time() {
        let injections = plan(1, &args(30, 22));
        assert!(injections.windows(2).all(|two| two[0].at <= two[1].at));
        assert!(injections.iter().all(|injection| injection.at <= Duration::from_secs(60 * 30)));
    }

    #[test]
    fn pauses_stay_within_their_bounds_and_affect_every_kind_of_part() {
        let injections = plan(1, &SoakArgs { longest_pause: 60, pauses_per_minute: 2, ..args(30, 22) });
        let mut lengths = Vec::new();
        for injection in &injections {
            if let Fault::Pause(_, length) | Fault::Outage(length) = injection.fault {
                lengths.push(length);
            }
        }
        assert_eq!(lengths.len(), 66);
        let bounds = Duration::from_secs(3)..=Duration::from_secs(60);
        assert!(lengths.iter().all(|length| bounds.contains(length)), "{lengths:?}");
        assert!(lengths.iter().any(|length| *length > Duration::from_secs(30)), "{lengths:?}");
        for part in ["kafka", "cassandra", "processor", "producer"] {
            let name = format!("{part} paused");
            assert_eq!(count(&injections, |fault| fault.name() == name), 15, "{name}");
        }
    }

    #[test]
    fn each_restore_follows_a_snapshot() {
        for (minutes, restores) in [(3, 1), (10, 1), (30, 3)] {
            let injections = plan(1, &args(minutes, 22));
            let of: Vec<Fault> = injections.iter().map(|injection| injection.fault).collect();
            let order: Vec<&Fault> =
                of.iter().filter(|f| matches!(f, Fault::Snapshot | Fault::Restore)).collect();
            assert_eq!(order.len(), 2 * restores, "{minutes}");
            assert!(order.chunks(2).all(|pair| pair == [&Fault::Snapshot, &Fault::Restore]), "{order:?}");
        }
    }

    #[test]
    fn the_requested_percentage_of_faults_is_injected_alone() {
        let alone = |percent_alone| {
            let injections = plan(1, &SoakArgs { percent_alone, ..args(30, 22) });
            injections.iter().filter(|injection| injection.alone).count() * 100 / injections.len()
        };
        assert_eq!([0, 100].map(alone), [0, 100]);
        assert!((5..15).contains(&alone(10)), "{}", alone(10));
    }

    #[test]
    fn only_the_selected_kinds_of_faults_are_planned() {
        let only = |faults: Vec<FaultKind>| plan(1, &SoakArgs { faults, ..args(10, 22) });
        assert_eq!(only(vec![FaultKind::Partitions]), []);
        let outages = only(vec![FaultKind::Outages]);
        assert_eq!(count(&outages, |fault| matches!(fault, Fault::Outage(_))), outages.len());
        assert_eq!(outages.len(), 2);
    }
}
