//! The actual content of the run ledger and the events topic, read without the producer's own code, and the records
//! that the source returns for an interval.

use std::collections::{BTreeMap, BTreeSet};

use rdkafka::message::OwnedMessage;
use scylla::value::CqlTimestamp;
use source_simulator::people;

use crate::harness::Pipeline;
use crate::oracle::header;

/// A row of `ingest_runs`.
#[derive(Clone, Debug, PartialEq)]
pub struct RunRow {
    pub start_ms: i64,
    pub end_ms: i64,
    pub state: String,
    pub run_type: String,
    pub records: i64,
    pub acked: i64,
    pub error: String,
    pub started_ms: i64,
    pub finished_ms: i64,
}

/// A row of `ingest_attempts`.
#[derive(Clone, Debug)]
pub struct Attempt {
    pub number: i32,
    pub outcome: String,
    pub cause: String,
    pub http_status: Option<i32>,
    pub started_ms: i64,
    pub milliseconds: i64,
}

impl Attempt {
    /// The latest time at which a producer can have worked on the attempt, in Unix milliseconds. The end of a lost
    /// attempt is unknown, so its lease counts: `lease_ms` after its start.
    pub fn ended_ms(&self, lease_ms: i64) -> i64 {
        self.started_ms + if self.outcome == "lost" { lease_ms } else { self.milliseconds }
    }
}

impl Pipeline {
    /// All runs by interval start in Unix milliseconds.
    pub async fn runs(&self) -> BTreeMap<i64, RunRow> {
        let query = format!(
            "SELECT interval_start, interval_end, state, run_type, records, acked, error, started_at, finished_at \
             FROM {}.ingest_runs",
            self.keyspace
        );
        let rows = self.session.query_unpaged(query, ()).await.unwrap().into_rows_result().unwrap();
        type Row = (
            CqlTimestamp,
            CqlTimestamp,
            String,
            String,
            Option<i64>,
            Option<i64>,
            Option<String>,
            Option<CqlTimestamp>,
            Option<CqlTimestamp>,
        );
        let runs = rows.rows::<Row>().unwrap().map(|row| {
            let (start, end, state, run_type, records, acked, error, started, finished) = row.unwrap();
            let run = RunRow {
                start_ms: start.0,
                end_ms: end.0,
                state,
                run_type,
                records: records.unwrap_or(0),
                acked: acked.unwrap_or(0),
                error: error.unwrap_or_default(),
                started_ms: started.map_or(0, |at| at.0),
                finished_ms: finished.map_or(0, |at| at.0),
            };
            (start.0, run)
        });
        runs.collect()
    }

    /// The attempts of each run, ordered by number, by interval start in Unix milliseconds.
    pub async fn attempts(&self) -> BTreeMap<i64, Vec<Attempt>> {
        let query = format!(
            "SELECT interval_start, attempt, outcome, cause, http_status, started_at, milliseconds FROM {}.ingest_attempts",
            self.keyspace
        );
        let rows = self.session.query_unpaged(query, ()).await.unwrap().into_rows_result().unwrap();
        type Row =
            (CqlTimestamp, i32, String, Option<String>, Option<i32>, Option<CqlTimestamp>, Option<i64>);
        let mut attempts: BTreeMap<i64, Vec<Attempt>> = BTreeMap::new();
        for row in rows.rows::<Row>().unwrap() {
            let (start, number, outcome, cause, http_status, started, milliseconds) = row.unwrap();
            attempts.entry(start.0).or_default().push(Attempt {
                number,
                outcome,
                cause: cause.unwrap_or_default(),
                http_status,
                started_ms: started.map_or(0, |at| at.0),
                milliseconds: milliseconds.unwrap_or(0),
            });
        }
        attempts.values_mut().for_each(|of_run| of_run.sort_by_key(|a| a.number));
        attempts
    }

    /// Number of records in the events topic for each event, which is an id and an event time in Unix milliseconds.
    pub async fn sent(&self) -> BTreeMap<(String, i64), usize> {
        let mut sent = BTreeMap::new();
        for record in self.all_records(&self.topic).await {
            *sent.entry(identity(&record)).or_default() += 1;
        }
        sent
    }

    /// Ids of the people that the default stream's source returns for an interval.
    pub fn people_of(&self, start_ms: i64) -> BTreeSet<String> {
        let (size, seed) =
            (u64::from(self.definition.source.page_size.unwrap()), format!("user_created-{start_ms}"));
        let people = (1..=2).flat_map(|page| (0..size).map(move |index| (page, index)));
        people
            .map(|(page, index)| {
                people::person(&seed, page, index)["login"]["uuid"].as_str().unwrap().to_owned()
            })
            .collect()
    }

    /// Asserts that the runs up to `until_ms` have no gap and no overlap, that each of them succeeded, and that each of
    /// their records is in Kafka once with a time within its interval. Returns the number of these runs.
    pub async fn assert_complete(&self, until_ms: i64) -> usize {
        let (runs, sent) = (self.runs().await, self.sent().await);
        let mut times: BTreeMap<&str, Vec<i64>> = BTreeMap::new();
        for (id, time_ms) in sent.keys() {
            times.entry(id).or_default().push(*time_ms);
        }
        let mut at = *runs.keys().next().expect("at least one run");
        let mut checked = 0;
        for run in runs.values().take_while(|run| run.end_ms <= until_ms) {
            assert_eq!(run.start_ms, at, "a gap or an overlap before {run:?}");
            assert!(run.state == "succeeded" && run.records == run.acked, "{run:?}");
            for id in self.people_of(run.start_ms) {
                let found = times.get(id.as_str()).unwrap_or_else(|| panic!("{id} is not in Kafka: {run:?}"));
                assert!(
                    found.len() == 1 && (run.start_ms..run.end_ms).contains(&found[0]),
                    "{id} at {found:?}: {run:?}"
                );
            }
            at = run.end_ms;
            checked += 1;
        }
        assert!(at + self.interval_ms() >= until_ms, "the ledger ends at {at}, before {until_ms}");
        checked
    }

    /// Interval length in milliseconds. Panics for a cron schedule.
    pub fn interval_ms(&self) -> i64 {
        match self.definition.stream.schedule {
            common::contracts::stream::Schedule::Every(ms) => ms,
            common::contracts::stream::Schedule::Cron { .. } => {
                panic!("the intervals of a cron schedule have no fixed length")
            }
        }
    }

    /// Whether the run of every interval that ended by `until_ms` has succeeded.
    pub async fn succeeded_up_to(&self, until_ms: i64) -> bool {
        let runs = self.runs().await;
        let settled = runs.values().take_while(|run| run.state == "succeeded").last();
        settled.is_some_and(|run| run.end_ms + self.interval_ms() > until_ms)
    }
}

/// The id and the event time in Unix milliseconds, which together identify an event.
fn identity(record: &OwnedMessage) -> (String, i64) {
    let time = header(record, "ce_time").expect("a ce_time header");
    let time = chrono::DateTime::parse_from_rfc3339(&time).unwrap().timestamp_millis();
    (header(record, "ce_id").expect("a ce_id header"), time)
}
