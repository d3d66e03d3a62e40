//! `verify`: recomputes panes and totals from the event rows and prints where they differ from what is stored. Works beside
//! a running processor: a pane row is compared with the rows below its own `upto`. `--rebuild` writes what the rows say,
//! with the partition's state file held, so that no processor runs it meanwhile; pane rows that say too much keep what they say, so
//! the pane table is truncated first.

mod log;

use crate::config::VerifyArgs;
use crate::decode::GroupIndex;
use crate::error::ProcessorError;
use crate::partition::Position;
use crate::start::StateFacts;
use crate::state::{self, StateFile};
use crate::store::Store;
use crate::store::cassandra::CassandraStore;
use crate::windows::hot::Panes;
use crate::windows::pane::{Measure, Pane, PaneShape};
use crate::write_plan::group_panes;
use common::event::floor_to;
use common::schema::{TOPIC_RETENTION_MS, panes_table};
use common::stream::{CqlType, Definition};
use futures::TryStreamExt;
use scylla::client::session::Session;
use scylla::value::{CqlTimestamp, CqlValue, Row};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::sync::Arc;

/// Differences printed one by one; the rest is only counted.
const SHOWN_MOST: usize = 50;

/// What `verify` works on.
pub struct Verifier {
    /// Session.
    pub session: Arc<Session>,
    /// Keyspace.
    pub keyspace: String,
    /// Definition.
    pub definition: Definition,
    /// Kafka, for the log.
    pub brokers: String,
    /// Events topic.
    pub topic: String,
    /// Store, for progress rows and for writing rebuilt panes.
    pub store: CassandraStore,
    /// Kafka partitions of the topic.
    pub partitions: i32,
}

/// One event row, as far as panes need it.
struct EventRow {
    offset: i64,
    time_ms: i64,
    groups: Vec<u16>,
    measures: Vec<f64>,
}

/// What was compared.
#[derive(Debug, Default)]
struct Outcome {
    rows: u64,
    pane_rows: u64,
    records: u64,
    differences: Vec<String>,
}

fn failed(cause: impl std::fmt::Display) -> ProcessorError {
    ProcessorError::Retryable(format!("cassandra: {cause}"))
}

impl Verifier {
    /// Compares every partition, or rebuilds; fails where something differs.
    pub async fn run(&self, args: &VerifyArgs) -> Result<(), ProcessorError> {
        let mut outcome = Outcome::default();
        for partition in (0..self.partitions).filter(|p| args.partition.is_none_or(|only| only == *p)) {
            if args.rebuild {
                self.rebuild(args, partition, &mut outcome).await?;
            } else {
                self.compare(partition, &mut outcome).await?;
                if args.kafka {
                    self.compare_log(partition, &mut outcome).await?;
                }
            }
        }
        let mut out = std::io::stdout();
        for line in outcome.differences.iter().take(SHOWN_MOST) {
            writeln!(out, "{line}").map_err(failed)?;
        }
        let (rows, panes, count) = (outcome.rows, outcome.pane_rows, outcome.differences.len());
        let verb = if args.rebuild { "rebuilt" } else { "compared" };
        let records =
            if args.kafka { format!(", {} records of the log", outcome.records) } else { String::new() };
        writeln!(out, "{rows} rows, {panes} pane rows{records} {verb}, {count} differences")
            .map_err(failed)?;
        if count > 0 {
            return Err(ProcessorError::Fatal(format!("{count} differences")));
        }
        Ok(())
    }

    /// Where a partition stands and the buckets that have rows, in this order: the rows below its next offset are all in them.
    async fn standing(&self, partition: i32) -> Result<(Position, BTreeSet<i64>), ProcessorError> {
        let progress = self.store.progress(partition).await?;
        let position = progress.map(|progress| progress.position).unwrap_or_default();
        let d = &self.definition;
        let cql = format!("SELECT DISTINCT bucket, shard FROM {}.{}", self.keyspace, d.stream.name);
        let pages = self.session.query_iter(cql, ()).await.map_err(failed)?;
        let mut rows = pages.rows_stream::<(CqlTimestamp, i32)>().map_err(failed)?;
        let mut buckets = BTreeSet::new();
        while let Some((bucket, shard)) = rows.try_next().await.map_err(failed)? {
            if shard / d.store.shards as i32 == partition {
                buckets.insert(bucket.0);
            }
        }
        Ok((position, buckets))
    }

    /// The event rows of one bucket, in the order of the log.
    async fn rows(&self, partition: i32, bucket: i64) -> Result<Vec<EventRow>, ProcessorError> {
        let d = &self.definition;
        let groups: Vec<(GroupIndex, CqlType)> = d
            .windows
            .group_by
            .iter()
            .map(|g| (GroupIndex::new(&g.groups), self.cql_type(&g.column)))
            .collect();
        let columns: String = d
            .windows
            .group_by
            .iter()
            .map(|g| &g.column)
            .chain(&d.windows.measures)
            .map(|c| format!(", {c}"))
            .collect();
        let cql = format!(
            "SELECT kafka_offset, event_time{columns} FROM {}.{} WHERE bucket = ? AND shard = ?",
            self.keyspace, d.stream.name
        );
        let mut events = Vec::new();
        let shards = d.store.shards as i32;
        for shard in partition * shards..(partition + 1) * shards {
            let pages =
                self.session.query_iter(cql.as_str(), (CqlTimestamp(bucket), shard)).await.map_err(failed)?;
            let mut rows = pages.rows_stream::<Row>().map_err(failed)?;
            while let Some(row) = rows.try_next().await.map_err(failed)? {
                events
                    .push(event_row(&row, &groups).ok_or_else(|| failed("an event row of another layout"))?);
            }
        }
        events.sort_unstable_by_key(|e| e.offset);
        Ok(events)
    }

    fn cql_type(&self, column: &str) -> CqlType {
        self.definition.columns.iter().find(|c| c.name == column).map_or(CqlType::Text, |c| c.cql_type)
    }

    fn pane_start(&self, time_ms: i64) -> i64 {
        floor_to(time_ms, self.definition.windows.pane_ms)
    }

    /// Compares stored panes and totals with the rows. The panes are read first, so that a running processor only adds rows
    /// above their `upto`.
    async fn compare(&self, partition: i32, outcome: &mut Outcome) -> Result<(), ProcessorError> {
        let (before, buckets) = self.standing(partition).await?;
        let shape = PaneShape::new(&self.definition);
        let mut counted = 0;
        for bucket in &buckets {
            let starts = self.pane_starts(partition, *bucket).await?;
            let stored = self.store.load_panes(partition, &starts).await?;
            let rows = self.rows(partition, *bucket).await?;
            outcome.rows += rows.len() as u64;
            counted += rows.iter().filter(|r| r.offset < before.next_offset).count() as i64;
            let empty = Pane::empty(&shape);
            let all: BTreeSet<i64> =
                starts.into_iter().chain(rows.iter().map(|r| self.pane_start(r.time_ms))).collect();
            for start in all {
                let stored = stored.get(&start).unwrap_or(&empty);
                let of_pane: Vec<&EventRow> =
                    rows.iter().filter(|r| self.pane_start(r.time_ms) == start).collect();
                let found = compare_pane(&shape, stored, &of_pane, before.next_offset);
                outcome.pane_rows += shape.names.len() as u64;
                outcome
                    .differences
                    .extend(found.into_iter().map(|f| format!("partition {partition}, pane {start}: {f}")));
            }
        }
        self.compare_total(partition, counted, &before, outcome);
        Ok(())
    }

    fn compare_total(&self, partition: i32, counted: i64, progress: &Position, outcome: &mut Outcome) {
        if counted != progress.totals.events {
            outcome.differences.push(format!(
                "partition {partition}: the progress row counts {} events below offset {}, the table holds {counted}",
                progress.totals.events, progress.next_offset
            ));
        }
    }

    async fn pane_starts(&self, partition: i32, bucket: i64) -> Result<BTreeSet<i64>, ProcessorError> {
        let cql = format!(
            "SELECT pane_start FROM {}.{} WHERE bucket = ? AND kafka_partition = ?",
            self.keyspace,
            panes_table(&self.definition)
        );
        let pages = self.session.query_iter(cql, (CqlTimestamp(bucket), partition)).await.map_err(failed)?;
        let rows = pages.rows_stream::<(CqlTimestamp,)>().map_err(failed)?;
        rows.map_ok(|(start,)| start.0).try_collect().await.map_err(failed)
    }

    /// Writes what the rows below the next offset say, stamped with it.
    async fn rebuild(
        &self,
        args: &VerifyArgs,
        partition: i32,
        outcome: &mut Outcome,
    ) -> Result<(), ProcessorError> {
        let d = &self.definition;
        let path = state::path_of(&args.checkpoints, &d.stream.name, partition);
        let held = StateFile::open(&path, &format!("verify --rebuild, pid {}", std::process::id()));
        let held = held.map_err(|e| ProcessorError::Fatal(format!("{e}; stop the processor first")))?;
        let (progress, buckets) = self.standing(partition).await?;
        let position = ahead(partition, progress, held.facts(), &d.layout())?;
        self.check_complete(partition, &position, &buckets).await?;
        let shape = PaneShape::new(d);
        for bucket in buckets {
            let mut panes = Panes::new(shape.clone(), (d.windows.pane_ms, 0), usize::MAX, i64::MAX);
            let rows = self.rows(partition, bucket).await?;
            for row in rows.iter().filter(|r| r.offset < position.next_offset) {
                let (shape, pane) = panes.cold_mut(self.pane_start(row.time_ms));
                pane.add(shape, row.offset, &row.groups, &row.measures);
                outcome.rows += 1;
            }
            let settled: BTreeMap<i64, Vec<usize>> = panes
                .cold
                .iter_mut()
                .map(|(start, pane)| (*start, pane.settle(position.next_offset)))
                .collect();
            outcome.pane_rows += settled.values().map(|rows| rows.len() as u64).sum::<u64>();
            let groups = group_panes(&settled, d.store.bucket, shape.row_bytes());
            self.store.write_panes(partition, position.next_offset, &groups, &panes).await?;
        }
        Ok(())
    }

    /// Refuses where rows of counted events are gone.
    async fn check_complete(
        &self,
        partition: i32,
        position: &Position,
        buckets: &BTreeSet<i64>,
    ) -> Result<(), ProcessorError> {
        let ttl_ms = self.definition.store.ttl_seconds * 1000;
        let expired_before = chrono::Utc::now().timestamp_millis() - ttl_ms + TOPIC_RETENTION_MS;
        let oldest = buckets.first().filter(|bucket| ttl_ms > 0 && **bucket < expired_before);
        let mut rows = 0;
        for bucket in buckets {
            let of_bucket = self.rows(partition, *bucket).await?;
            rows += of_bucket.iter().filter(|row| row.offset < position.next_offset).count() as i64;
        }
        let events = position.totals.events;
        if oldest.is_none() && rows >= events {
            return Ok(());
        }
        let next_offset = position.next_offset;
        Err(ProcessorError::Refused(format!(
            "partition {partition}: {events} events were counted below offset {next_offset}, the table holds {rows} of their rows, \
             and any may have expired (store.ttl): panes cannot be rebuilt from rows; `run --replay` rebuilds what Kafka still has"
        )))
    }
}

/// The position the processor will go on from: a state file is ahead of the progress row after a kill between both.
fn ahead(
    partition: i32,
    progress: Position,
    state: Option<StateFacts>,
    layout: &str,
) -> Result<Position, ProcessorError> {
    match state {
        Some(state) if state.layout != layout => Err(ProcessorError::Refused(format!(
            "partition {partition}: the state file is of the layout {}, the stream definition of {layout}: use the definition it \
             was made for",
            state.layout
        ))),
        Some(state) if state.position.next_offset > progress.next_offset => Ok(state.position),
        _ => Ok(progress),
    }
}

fn event_row(row: &Row, groups: &[(GroupIndex, CqlType)]) -> Option<EventRow> {
    let column = |i: usize| row.columns.get(i).and_then(Option::as_ref);
    let grouped = groups
        .iter()
        .enumerate()
        .map(|(i, (index, cql_type))| index.group(*cql_type, column(2 + i).and_then(cell_bytes).as_deref()));
    let measures =
        (2 + groups.len()..row.columns.len()).map(|i| column(i).and_then(as_number).unwrap_or(f64::NAN));
    Some(EventRow {
        offset: column(0)?.as_bigint()?,
        time_ms: column(1)?.as_cql_timestamp()?.0,
        groups: grouped.collect(),
        measures: measures.collect(),
    })
}

fn cell_bytes(value: &CqlValue) -> Option<Vec<u8>> {
    match value {
        CqlValue::Text(text) => Some(text.clone().into_bytes()),
        CqlValue::Boolean(value) => Some(vec![u8::from(*value)]),
        CqlValue::Int(value) => Some(value.to_be_bytes().to_vec()),
        CqlValue::BigInt(value) => Some(value.to_be_bytes().to_vec()),
        CqlValue::Double(value) => Some(value.to_be_bytes().to_vec()),
        _ => None,
    }
}

fn as_number(value: &CqlValue) -> Option<f64> {
    match value {
        CqlValue::Int(value) => Some(f64::from(*value)),
        CqlValue::BigInt(value) => Some(*value as f64),
        CqlValue::Double(value) => Some(*value),
        _ => None,
    }
}

/// Where the stored rows of one pane differ from the event rows, each compared below its own `upto`.
fn compare_pane(shape: &PaneShape, stored: &Pane, rows: &[&EventRow], next_offset: i64) -> Vec<String> {
    let mut differences = Vec::new();
    for (index, (dimension, value)) in shape.names.iter().enumerate() {
        let row = stored.row(index);
        // A row that is absent must have nothing to count below what the progress row says.
        let upto = if row.upto == 0 { next_offset } else { row.upto.max(next_offset) };
        let mut expected = Pane::empty(shape);
        rows.iter()
            .filter(|r| r.offset < upto)
            .for_each(|r| expected.add(shape, r.offset, &r.groups, &r.measures));
        let (count, measures) = (expected.row(index).count, expected.measures(index));
        let same = |a: &Measure, b: &Measure| {
            a.count == b.count
                && a.sum.to_bits() == b.sum.to_bits()
                && (a.count == 0 || (a.min == b.min && a.max == b.max))
        };
        let equal = measures.iter().zip(stored.measures(index)).all(|(a, b)| same(a, b));
        if count != row.count || !equal {
            differences.push(format!(
                "{dimension}={value}: stored {} {:?}, the rows say {count} {measures:?}",
                row.count,
                stored.measures(index)
            ));
        }
    }
    differences
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::partition::Totals;

    fn definition() -> Definition {
        Definition::parse("users", include_str!("../../../streams/user_created.toml")).unwrap()
    }

    fn row(offset: i64, age: f64) -> EventRow {
        EventRow { offset, time_ms: 0, groups: vec![0, 1, 2], measures: vec![age] }
    }

    #[test]
    fn a_pane_that_counts_other_than_its_rows_is_named() {
        let shape = PaneShape::new(&definition());
        let rows = [row(0, 30.0), row(5, 40.0), row(9, 50.0)];
        let rows: Vec<&EventRow> = rows.iter().collect();
        let stored = |taken: &[&EventRow], upto: i64| {
            let mut pane = Pane::empty(&shape);
            taken.iter().for_each(|row| pane.add(&shape, row.offset, &row.groups, &row.measures));
            pane.settle(upto);
            pane
        };
        assert_eq!(compare_pane(&shape, &stored(&rows[..2], 6), &rows, 6), Vec::<String>::new());
        let short = compare_pane(&shape, &stored(&rows[..1], 6), &rows, 6);
        assert!(short.len() == 4 && short[0].contains("stored 1") && short[0].contains("say 2"), "{short:?}");
        let other = EventRow { measures: vec![41.0], ..row(5, 0.0) };
        let wrong = compare_pane(&shape, &stored(&[rows[0], &other], 6), &rows, 6);
        assert!(wrong.len() == 4 && wrong[0].contains("71.0"), "{wrong:?}");
        assert_eq!(compare_pane(&shape, &Pane::empty(&shape), &rows, 6).len(), 4);
    }

    #[test]
    fn a_rebuild_goes_as_far_as_the_state_file_and_refuses_one_of_another_layout() {
        let at = |next_offset: i64| Position {
            next_offset,
            totals: Totals { events: next_offset, ..Totals::default() },
            ..Position::default()
        };
        let state = |next_offset: i64, layout: &str| {
            let (layout, cluster_id) = (layout.to_owned(), String::new());
            Some(StateFacts { position: at(next_offset), layout, cluster_id })
        };
        let check = |state, expected| assert_eq!(ahead(0, at(100), state, "a").unwrap(), at(expected));
        check(None, 100);
        check(state(200, "a"), 200);
        check(state(50, "a"), 100);
        let refused = ahead(0, at(100), state(200, "b"), "a").unwrap_err().to_string();
        assert!(refused.contains("layout b") && refused.contains("of a"), "{refused}");
    }
}
