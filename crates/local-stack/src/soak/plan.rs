//! Which part is killed when: decided by the seed alone before anything starts. Pure; killing is `fleet`'s.

use std::time::Duration;

use crate::source::random::Random;

/// Of so many kills one hits Kafka and one Cassandra.
const KILLS_PER_SERVER_KILL: u64 = 22;

/// One kill of the processor in so many also loses the checkpoint folder's files.
const KILLS_PER_WIPE: u64 = 4;

/// What can be killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// `stream-processor run`.
    Processor,
    /// `ingest-producer stress`.
    Producer,
    /// The broker.
    Kafka,
    /// The node.
    Cassandra,
}

/// Every part, in the order of [`Part::index`].
pub(super) const PARTS: [Part; 4] = [Part::Processor, Part::Producer, Part::Kafka, Part::Cassandra];

impl Part {
    /// Its place in [`PARTS`].
    pub(super) fn index(self) -> usize {
        self as usize
    }

    /// Whether it is a server and not ours.
    pub(super) fn is_server(self) -> bool {
        matches!(self, Self::Kafka | Self::Cassandra)
    }

    /// How the table names it.
    pub(super) fn name(self) -> &'static str {
        ["processor", "producer", "kafka", "cassandra"][self.index()]
    }
}

/// One kill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Strike {
    /// When, counted from the begin of the load. A part that is just down is hit once it is up again.
    pub(super) at: Duration,
    /// What.
    pub(super) part: Part,
    /// The checkpoint files go, too, before the processor starts again.
    pub(super) wipes: bool,
}

/// All kills of a run, in the order of time, spread evenly at random: sometimes two at once, sometimes none for long.
pub(super) fn plan(seed: u64, minutes: u64, kills_per_minute: u64) -> Vec<Strike> {
    let kills = minutes * kills_per_minute;
    let each_server = if kills < 4 { 0 } else { (kills / KILLS_PER_SERVER_KILL).max(1) };
    let producer = (kills - 2 * each_server) / 3;
    let processor = kills - 2 * each_server - producer;
    let counts = [processor, producer, each_server, each_server];
    let mut random = Random::new("soak", &[seed]);
    let mut strikes: Vec<Strike> = PARTS
        .iter()
        .zip(counts)
        .flat_map(|(part, count)| (0..count).map(|number| (*part, number)))
        .map(|(part, number)| Strike {
            at: Duration::from_secs_f64(random.fraction() * 60.0 * minutes as f64),
            part,
            wipes: part == Part::Processor && number % KILLS_PER_WIPE == 1,
        })
        .collect();
    strikes.sort_by_key(|strike| strike.at);
    strikes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seed_decides_everything() {
        assert_eq!(plan(7, 3, 22), plan(7, 3, 22));
        assert_ne!(plan(7, 3, 22), plan(8, 3, 22));
    }

    #[test]
    fn the_parts_get_their_shares() {
        let check = |minutes, kills, expected: [usize; 4], wipes: usize| {
            let strikes = plan(1, minutes, kills);
            let of = |part: Part| strikes.iter().filter(|strike| strike.part == part).count();
            assert_eq!(PARTS.map(of), expected);
            assert_eq!(strikes.iter().filter(|strike| strike.wipes).count(), wipes);
            assert!(strikes.windows(2).all(|two| two[0].at <= two[1].at));
            assert!(strikes.iter().all(|strike| strike.at < Duration::from_secs(60 * minutes)));
        };
        check(3, 22, [40, 20, 3, 3], 10);
        check(1, 4, [2, 0, 1, 1], 1);
        check(1, 0, [0, 0, 0, 0], 0);
    }
}
