//! The overview: the current figures of the pipeline, computed from the facts read from Kafka and Cassandra. An unknown
//! figure is `null`, never 0, and `reasons` contains the reason under the name of the figure. Pure.

use crate::lag::{self, Standing, Watermarks};
use crate::rates::Rates;
use crate::reason::{Origin, Reason};
use crate::services::Holder;
use chrono::{DateTime, SecondsFormat};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

/// A figure, or the reason why it is unknown.
pub type Figure<T> = Result<T, Reason>;

/// One row of table `partition_progress`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ProgressRow {
    /// Offset of the next record to be processed.
    pub next_offset: i64,
    /// Events, without duplicates.
    pub events: i64,
    /// Duplicates of events.
    pub duplicates: i64,
    /// Duplicates with other values than the first copy. `duplicates` includes them.
    pub revised: i64,
    /// Events that arrived after the allowed lateness. `events` includes them.
    pub late: i64,
    /// Records written to the dead-letter topic.
    pub dead_letters: i64,
}

impl ProgressRow {
    /// Processed records, whatever the outcome.
    pub fn processed(&self) -> i64 {
        self.events + self.duplicates + self.dead_letters
    }
}

/// Facts read from Cassandra.
#[derive(Debug, Clone, PartialEq)]
pub struct StoreFacts {
    /// Progress by Kafka partition. Nothing of a partition without an entry has been processed.
    pub progress: BTreeMap<i32, ProgressRow>,
    /// Events per second.
    pub rates: Rates,
}

/// Facts about one partition, read from Kafka.
#[derive(Debug, Clone, PartialEq)]
pub struct PartitionFacts {
    /// Range of offsets in the log.
    pub log: Figure<Watermarks>,
    /// Id of the broker that leads the partition. `None` if the partition is offline.
    pub leader: Option<i32>,
    /// Number of replicas.
    pub replicas: usize,
    /// Number of in-sync replicas.
    pub in_sync: usize,
    /// Offset of the first unprocessed record and its timestamp in Unix milliseconds. `None` if no record was read.
    pub record_time: Option<(i64, Figure<i64>)>,
}

/// Facts read from Kafka.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct KafkaFacts {
    /// The partitions of the events topic.
    pub partitions: BTreeMap<i32, PartitionFacts>,
}

/// Health of the replication of the events topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ReplicationVerdict {
    /// Every partition has several replicas, and all are in sync.
    Healthy,
    /// All replicas are in sync, but a partition has only one, so a lost disk loses events.
    SingleCopy,
    /// A replica is not in sync.
    UnderReplicated,
    /// A partition has no leader, so it can be neither written nor read.
    Offline,
}

/// Replication of the events topic. The worst partition determines each value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Replication {
    /// Lowest number of replicas of a partition.
    pub factor: usize,
    /// Lowest number of in-sync replicas of a partition.
    pub in_sync: usize,
    /// Health of the replication.
    pub verdict: ReplicationVerdict,
}

/// One partition in the overview.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PartitionOverview {
    /// Kafka partition.
    pub partition: i32,
    /// Offset of the first record that is still in Kafka.
    pub low_offset: Option<i64>,
    /// Offset of the next record to be produced.
    pub high_offset: Option<i64>,
    /// Offset of the next record to be processed.
    pub next_offset: Option<i64>,
    /// Events, without duplicates. Each has a row in Cassandra.
    pub events: Option<i64>,
    /// Duplicates of events.
    pub duplicates: Option<i64>,
    /// Duplicates with other values than the first copy.
    pub revised: Option<i64>,
    /// Late events.
    pub late: Option<i64>,
    /// Records written to the dead-letter topic.
    pub dead_letters: Option<i64>,
    /// Unprocessed records.
    pub lag_messages: Option<i64>,
    /// Age of the first unprocessed record.
    pub lag_seconds: Option<f64>,
    /// Relation of the position to the log.
    pub standing: Option<Standing>,
    /// The processor that holds the partition. Null with a reason if there is none.
    pub holder: Option<Holder>,
    /// The reasons of all figures that are null, by name.
    pub reasons: BTreeMap<&'static str, Reason>,
}

/// The response of `GET /api/v1/overview`, and the event that the feed sends every second.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Overview {
    /// Name of the stream.
    pub stream: String,
    /// Time of the overview, RFC 3339.
    pub as_of: String,
    /// Records ever written to the events topic.
    pub events_produced: Option<i64>,
    /// Processed records: events, duplicates and dead letters.
    pub events_processed: Option<i64>,
    /// Rows in Cassandra, one per event.
    pub rows_written: Option<i64>,
    /// Duplicates of events.
    pub duplicates: Option<i64>,
    /// Duplicates with other values than the first copy.
    pub revised: Option<i64>,
    /// Late events.
    pub late: Option<i64>,
    /// Records written to the dead-letter topic.
    pub dead_letters: Option<i64>,
    /// Unprocessed records of all partitions.
    pub lag_messages: Option<i64>,
    /// Age of the oldest unprocessed record.
    pub lag_seconds: Option<f64>,
    /// Events per second over the last hour.
    pub rate_average: Option<f64>,
    /// Events in the best second of the last hour.
    pub rate_peak: Option<f64>,
    /// Events per second over the last ten seconds.
    pub rate_now: Option<f64>,
    /// Replication of the events topic.
    pub replication: Option<Replication>,
    /// All Kafka partitions. Null if neither Kafka nor Cassandra responds.
    pub partitions: Option<Vec<PartitionOverview>>,
    /// The reasons of all figures that are null, by name.
    pub reasons: BTreeMap<&'static str, Reason>,
}

/// The facts known at one moment.
#[derive(Debug)]
pub struct Known {
    /// Facts from Cassandra.
    pub store: Figure<StoreFacts>,
    /// Facts from Kafka.
    pub kafka: Figure<KafkaFacts>,
    /// The processor that holds each partition, from Cassandra.
    pub holders: Figure<BTreeMap<i32, Holder>>,
}

/// Computes the overview of `stream`.
pub fn assemble(stream: &str, now_ms: i64, known: &Known) -> Overview {
    let Known { store, kafka, .. } = known;
    let mut reasons = BTreeMap::new();
    let partitions = partitions(now_ms, known);
    let sum = |of: fn(&ProgressRow) -> i64| total(store, of);
    let rate = |of: fn(&Rates) -> f64| store.as_ref().map(|s| of(&s.rates)).map_err(Clone::clone);
    let mut note = Notes(&mut reasons);
    Overview {
        stream: stream.to_owned(),
        as_of: DateTime::from_timestamp_millis(now_ms)
            .unwrap_or_default()
            .to_rfc3339_opts(SecondsFormat::Millis, true),
        events_produced: note.take("events_produced", produced(kafka)),
        events_processed: note.take("events_processed", sum(ProgressRow::processed)),
        rows_written: note.take("rows_written", sum(|p| p.events)),
        duplicates: note.take("duplicates", sum(|p| p.duplicates)),
        revised: note.take("revised", sum(|p| p.revised)),
        late: note.take("late", sum(|p| p.late)),
        dead_letters: note.take("dead_letters", sum(|p| p.dead_letters)),
        lag_messages: note.take(
            "lag_messages",
            all_lag(&partitions, "lag_messages", |p| p.lag_messages).map(|l| l.iter().sum()),
        ),
        lag_seconds: note.take(
            "lag_seconds",
            all_lag(&partitions, "lag_seconds", |p| p.lag_seconds).map(|l| l.into_iter().fold(0.0, f64::max)),
        ),
        rate_average: note.take("rate_average", rate(|r| r.average)),
        rate_peak: note.take("rate_peak", rate(|r| r.peak)),
        rate_now: note.take("rate_now", rate(|r| r.now)),
        replication: note.take("replication", replication(kafka)),
        partitions: note.take("partitions", partitions),
        reasons,
    }
}

/// Collects the reasons of unknown figures.
struct Notes<'a>(&'a mut BTreeMap<&'static str, Reason>);

impl Notes<'_> {
    fn take<T>(&mut self, name: &'static str, figure: Figure<T>) -> Option<T> {
        figure.map_err(|reason| self.0.insert(name, reason)).ok()
    }
}

fn total(store: &Figure<StoreFacts>, of: fn(&ProgressRow) -> i64) -> Figure<i64> {
    store.as_ref().map(|s| s.progress.values().map(of).sum()).map_err(Clone::clone)
}

fn produced(kafka: &Figure<KafkaFacts>) -> Figure<i64> {
    let facts = kafka.as_ref().map_err(Clone::clone)?;
    facts.partitions.values().map(|p| p.log.as_ref().map(|log| log.high).map_err(Clone::clone)).sum()
}

fn replication(kafka: &Figure<KafkaFacts>) -> Figure<Replication> {
    let facts = kafka.as_ref().map_err(Clone::clone)?;
    let of = |count: fn(&PartitionFacts) -> usize| facts.partitions.values().map(count).min().unwrap_or(0);
    let (factor, in_sync) = (of(|p| p.replicas), of(|p| p.in_sync));
    let verdict = if facts.partitions.values().any(|p| p.leader.is_none()) {
        ReplicationVerdict::Offline
    } else if facts.partitions.values().any(|p| p.in_sync < p.replicas) {
        ReplicationVerdict::UnderReplicated
    } else if factor <= 1 {
        ReplicationVerdict::SingleCopy
    } else {
        ReplicationVerdict::Healthy
    };
    Ok(Replication { factor, in_sync, verdict })
}

fn all_lag<T: Copy>(
    partitions: &Figure<Vec<PartitionOverview>>,
    name: &'static str,
    of: fn(&PartitionOverview) -> Option<T>,
) -> Figure<Vec<T>> {
    let unknown = |p: &PartitionOverview| {
        p.reasons.get(name).cloned().unwrap_or_else(|| Reason::new(Origin::Dashboard, "unknown"))
    };
    let one = |p: &PartitionOverview| of(p).ok_or_else(|| unknown(p));
    partitions.as_ref().map_err(Clone::clone)?.iter().map(one).collect()
}

fn partitions(now_ms: i64, known: &Known) -> Figure<Vec<PartitionOverview>> {
    let Known { store, kafka, .. } = known;
    let mut ids = BTreeSet::new();
    if let Ok(facts) = store {
        ids.extend(facts.progress.keys().copied());
    }
    if let Ok(facts) = kafka {
        ids.extend(facts.partitions.keys().copied());
    }
    if let (Err(_), Err(kafka)) = (store, kafka) {
        return Err(kafka.clone());
    }
    Ok(ids.into_iter().map(|id| partition(id, now_ms, known)).collect())
}

fn holder(id: i32, holders: &Figure<BTreeMap<i32, Holder>>) -> Figure<Holder> {
    let none = || Reason::new(Origin::Dashboard, format!("no processor holds partition {id}"));
    holders.as_ref().map_err(Clone::clone)?.get(&id).cloned().ok_or_else(none)
}

fn partition(id: i32, now_ms: i64, known: &Known) -> PartitionOverview {
    let Known { store, kafka, holders } = known;
    let progress =
        store.as_ref().map(|s| s.progress.get(&id).copied().unwrap_or_default()).map_err(Clone::clone);
    let facts = kafka.as_ref().map_err(Clone::clone).and_then(|k| {
        k.partitions.get(&id).ok_or_else(|| {
            Reason::new(
                Origin::Kafka,
                format!("the topic has no partition {id}, but cassandra has progress of it"),
            )
        })
    });
    let log = facts.clone().and_then(|p| p.log.clone());
    let both = log.clone().and_then(|log| progress.clone().map(|p| (log, p.next_offset)));
    let seconds =
        both.clone().and_then(|(log, next)| lag_seconds(now_ms, log, next, facts.as_ref().ok().copied()));
    let mut reasons = BTreeMap::new();
    let mut note = Notes(&mut reasons);
    let of = |field: fn(&ProgressRow) -> i64| progress.as_ref().map(field).map_err(Clone::clone);
    PartitionOverview {
        partition: id,
        low_offset: note.take("low_offset", log.clone().map(|l| l.low)),
        high_offset: note.take("high_offset", log.map(|l| l.high)),
        next_offset: note.take("next_offset", of(|p| p.next_offset)),
        events: note.take("events", of(|p| p.events)),
        duplicates: note.take("duplicates", of(|p| p.duplicates)),
        revised: note.take("revised", of(|p| p.revised)),
        late: note.take("late", of(|p| p.late)),
        dead_letters: note.take("dead_letters", of(|p| p.dead_letters)),
        lag_messages: note.take("lag_messages", both.clone().map(|(log, next)| lag::messages(log, next))),
        lag_seconds: note.take("lag_seconds", seconds),
        standing: note.take("standing", both.map(|(log, next)| lag::standing(log, next))),
        holder: note.take("holder", holder(id, holders)),
        reasons,
    }
}

/// The lag in seconds, 0 if all records are processed. The timestamp may belong to a record that was processed in the
/// meantime. The lag is then overstated by less than one refresh interval, which is better than an unknown lag.
fn lag_seconds(
    now_ms: i64,
    log: Watermarks,
    next_offset: i64,
    facts: Option<&PartitionFacts>,
) -> Figure<f64> {
    let Some(first) = lag::first_waiting(log, next_offset) else { return Ok(0.0) };
    match facts.and_then(|f| f.record_time.as_ref()) {
        Some((_, Ok(time))) => Ok(lag::seconds(now_ms, *time)),
        Some((_, Err(reason))) => Err(reason.clone()),
        None => {
            Err(Reason::new(Origin::Kafka, format!("the record at offset {first} has not been read yet")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kafka_partition(low: i64, high: i64) -> PartitionFacts {
        PartitionFacts {
            log: Ok(Watermarks { low, high }),
            leader: Some(1),
            replicas: 1,
            in_sync: 1,
            record_time: None,
        }
    }

    fn kafka() -> KafkaFacts {
        let behind = PartitionFacts { record_time: Some((40, Ok(7_500))), ..kafka_partition(0, 100) };
        KafkaFacts { partitions: [(0, behind), (1, kafka_partition(0, 50))].into() }
    }

    fn store() -> StoreFacts {
        let first =
            ProgressRow { next_offset: 40, events: 36, duplicates: 3, revised: 1, late: 2, dead_letters: 1 };
        let second = ProgressRow { next_offset: 50, events: 50, ..ProgressRow::default() };
        StoreFacts {
            progress: [(0, first), (1, second)].into(),
            rates: Rates { now: 5.0, average: 2.5, peak: 40.0 },
        }
    }

    fn down(source: Origin) -> Reason {
        Reason::new(source, "down")
    }

    fn overview(store: Figure<StoreFacts>, kafka: Figure<KafkaFacts>) -> Overview {
        let holder = |does: &str| Holder { instance: "one".into(), does: does.into() };
        let holders = Ok([(0, holder("running")), (1, holder("halted: damaged"))].into());
        let known = Known { store, kafka, holders };
        assemble("user_created", 10_000, &known)
    }

    #[test]
    fn a_partition_without_a_processor_has_a_reason() {
        let known = Known { store: Ok(store()), kafka: Ok(kafka()), holders: Ok(BTreeMap::new()) };
        let o = assemble("user_created", 10_000, &known);
        let partitions = o.partitions.unwrap();
        assert_eq!(partitions[1].holder, None);
        assert_eq!(partitions[1].reasons["holder"].message, "no processor holds partition 1");
        let known = Known { holders: Err(down(Origin::Cassandra)), ..known };
        let o = assemble("user_created", 10_000, &known);
        assert_eq!(o.partitions.unwrap()[1].reasons["holder"], down(Origin::Cassandra));
    }

    #[test]
    fn with_both_servers_up_every_figure_is_known() {
        insta::assert_json_snapshot!(overview(Ok(store()), Ok(kafka())));
    }

    #[test]
    fn without_kafka_the_figures_of_cassandra_are_known_but_the_lag_is_not() {
        let o = overview(Ok(store()), Err(down(Origin::Kafka)));
        assert_eq!(
            (o.events_produced, o.lag_messages, o.lag_seconds, o.replication),
            (None, None, None, None)
        );
        assert_eq!((o.events_processed, o.rows_written), (Some(90), Some(86)));
        for name in ["events_produced", "lag_messages", "lag_seconds", "replication"] {
            assert_eq!(o.reasons.get(name), Some(&down(Origin::Kafka)), "{name}");
        }
        assert_eq!(o.partitions.unwrap().len(), 2);
    }

    #[test]
    fn without_cassandra_the_processed_records_are_unknown() {
        let o = overview(Err(down(Origin::Cassandra)), Ok(kafka()));
        assert_eq!(o.events_produced, Some(150));
        assert_eq!(
            (o.events_processed, o.rows_written, o.rate_now, o.lag_messages),
            (None, None, None, None)
        );
        assert_eq!(o.reasons["lag_messages"], down(Origin::Cassandra));
    }

    #[test]
    fn without_both_servers_every_figure_has_a_reason() {
        let o = overview(Err(down(Origin::Cassandra)), Err(down(Origin::Kafka)));
        let json = serde_json::to_value(&o).unwrap();
        for (name, value) in json.as_object().unwrap() {
            let known = ["stream", "as_of", "reasons"].contains(&name.as_str());
            assert_eq!(value.is_null(), !known, "{name}");
            assert_eq!(o.reasons.contains_key(name.as_str()), !known, "{name}");
        }
    }

    #[test]
    fn nothing_of_a_partition_without_a_progress_row_is_processed() {
        let mut facts = store();
        facts.progress.remove(&1);
        let o = overview(Ok(facts), Ok(kafka()));
        assert_eq!(o.lag_messages, Some(110));
        assert_eq!(o.lag_seconds, None);
        assert!(o.reasons["lag_seconds"].message.contains("offset 0 has not been read"), "{:?}", o.reasons);
    }

    #[test]
    fn the_worst_partition_determines_the_replication() {
        let verdict = |change: fn(&mut PartitionFacts)| {
            let mut facts = kafka();
            for partition in facts.partitions.values_mut() {
                (partition.replicas, partition.in_sync) = (3, 3);
            }
            facts.partitions.entry(1).and_modify(change);
            overview(Ok(store()), Ok(facts)).replication.unwrap()
        };
        let healthy = Replication { factor: 3, in_sync: 3, verdict: ReplicationVerdict::Healthy };
        assert_eq!(verdict(|_| {}), healthy);
        let under = Replication { factor: 3, in_sync: 2, verdict: ReplicationVerdict::UnderReplicated };
        assert_eq!(verdict(|p| p.in_sync = 2), under);
        assert_eq!(verdict(|p| p.leader = None).verdict, ReplicationVerdict::Offline);
    }
}
