//! Recomputes one pane from its event rows and compares it with the stored pane. Pure.

use crate::count::windows::pane::{Measure, Pane, PaneShape};
use common::contracts::stream::MAX_GROUP_BY;

/// Maximum assumed difference between the clocks of brokers, processors and Cassandra nodes.
const CLOCK_SKEW_MS: i64 = 3_600_000;

/// The columns of an event row that panes depend on.
#[derive(Debug, Clone, PartialEq)]
pub struct EventRow {
    /// Offset of the event's record.
    pub offset: i64,
    /// Group index in each group-by column.
    pub groups: [u16; MAX_GROUP_BY],
    /// Value of each measure, NaN if absent.
    pub measures: Box<[f64]>,
}

impl EventRow {
    /// Approximate size in memory of a row with `measures` measures, including the separate allocation of its box.
    pub fn bytes(measures: usize) -> usize {
        size_of::<EventRow>() + 8 * measures + 16
    }
}

/// Keeps the rows with the lowest offsets out of more rows than fit into memory.
#[derive(Debug)]
pub struct Lowest {
    from: i64,
    capacity: usize,
    rows: Vec<EventRow>,
    /// Whether rows were dropped.
    truncated: bool,
}

impl Lowest {
    /// Keeps rows at or above offset `from`. Holds fewer than twice `capacity` rows.
    pub fn new(from: i64, capacity: usize) -> Lowest {
        Lowest { from, capacity: capacity.max(1), rows: Vec::new(), truncated: false }
    }

    /// Adds a row, and drops the rows with the highest offsets if there are too many.
    pub fn push(&mut self, row: EventRow) {
        if row.offset < self.from {
            return;
        }
        self.rows.push(row);
        if self.rows.len() >= 2 * self.capacity {
            self.rows.select_nth_unstable_by_key(self.capacity - 1, |row| row.offset);
            self.rows.truncate(self.capacity);
            self.truncated = true;
        }
    }

    /// Returns the rows in log order, and the offset from which the dropped rows must be read again, if there are any.
    pub fn into_rows(mut self) -> (Vec<EventRow>, Option<i64>) {
        self.rows.sort_unstable_by_key(|row| row.offset);
        if !self.truncated {
            return (self.rows, None);
        }
        // Once rows were dropped, only the lowest `capacity` rows are certain to have no gaps.
        self.rows.truncate(self.capacity);
        let rest = self.rows.last().map(|row| row.offset + 1);
        (self.rows, rest)
    }
}

/// Returns, for each row of a stored pane, the offset below which it must count all events. This is at least the next
/// offset of the progress row, for rows that are absent as well.
pub fn limits(shape: &PaneShape, stored: &Pane, next_offset: i64) -> Vec<i64> {
    (0..shape.names.len()).map(|index| stored.row(index).upto.max(next_offset)).collect()
}

/// Adds event rows to `pane`. Each pane row counts the event rows below its limit. `rows` must be in log order.
pub fn fold(shape: &PaneShape, pane: &mut Pane, limits: &[i64], rows: &[EventRow]) {
    for row in rows {
        for index in shape.rows_of(&row.groups).filter(|index| row.offset < limits[*index]) {
            pane.count(index, &row.measures);
        }
    }
}

/// Describes each row in which the stored pane differs from the pane recomputed from event rows.
pub fn differences(shape: &PaneShape, stored: &Pane, expected: &Pane) -> Vec<String> {
    let same = |a: &Measure, b: &Measure| {
        let same_bounds = a.count == 0 || (a.min == b.min && a.max == b.max);
        a.count == b.count && a.sum.to_bits() == b.sum.to_bits() && same_bounds
    };
    let mut differences = Vec::new();
    for (index, (dimension, value)) in shape.names.iter().enumerate() {
        let (count, measures) = (expected.row(index).count, expected.measures(index));
        let (stored_count, stored_measures) = (stored.row(index).count, stored.measures(index));
        if count != stored_count || !measures.iter().zip(stored_measures).all(|(a, b)| same(a, b)) {
            differences.push(format!(
                "{dimension}={value}: stored {stored_count} {stored_measures:?}, from event rows {count} {measures:?}"
            ));
        }
    }
    differences
}

/// When rows expire.
#[derive(Debug, Clone, Copy)]
pub struct Expiry {
    /// Age in milliseconds at which a row expires. 0 if rows do not expire.
    pub ttl_ms: i64,
    /// How far an event time may be ahead of the record's timestamp, in milliseconds.
    pub ahead_ms: i64,
}

impl Expiry {
    /// Whether rows of events at or after `from_ms` may have expired by `now_ms`. A row is written after its record got
    /// its timestamp, and the event time may be ahead of that timestamp.
    pub fn is_possible(&self, from_ms: i64, now_ms: i64) -> bool {
        let latest_ms = now_ms.saturating_add(self.ahead_ms + CLOCK_SKEW_MS);
        self.ttl_ms > 0 && from_ms.saturating_add(self.ttl_ms) <= latest_ms
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use common::contracts::stream::Definition;
    use proptest::prelude::*;

    fn shape() -> PaneShape {
        let text = include_str!("../../../../../streams/user_created.toml");
        PaneShape::new(&Definition::parse("users", text).unwrap())
    }

    fn row(offset: i64, age: f64) -> EventRow {
        EventRow { offset, groups: [0, 1, 2, 0], measures: [age].into() }
    }

    fn stored(shape: &PaneShape, rows: &[EventRow], upto: i64) -> Pane {
        let mut pane = Pane::empty(shape);
        rows.iter().for_each(|row| pane.add(shape, row.offset, &row.groups, &row.measures));
        pane.settle(upto);
        pane
    }

    #[test]
    fn a_pane_that_differs_from_its_event_rows_is_reported() {
        let shape = shape();
        let rows = [row(0, 30.0), row(5, 40.0), row(9, 50.0)];
        let check = |stored: &Pane, next_offset: i64, lines: usize, part: &str| {
            let mut expected = Pane::empty(&shape);
            fold(&shape, &mut expected, &limits(&shape, stored, next_offset), &rows);
            let found = differences(&shape, stored, &expected);
            assert!(found.len() == lines && found.iter().all(|line| line.contains(part)), "{found:?}");
        };
        check(&stored(&shape, &rows[..2], 6), 6, 0, "");
        check(&stored(&shape, &rows[..2], 6), 3, 0, "");
        check(&stored(&shape, &rows[..2], 6), 10, 4, "stored 2");
        check(&stored(&shape, &rows[..1], 6), 6, 4, "from event rows 2");
        check(&stored(&shape, &[rows[0].clone(), row(5, 41.0)], 6), 6, 4, "sum: 71.0");
        check(&Pane::empty(&shape), 6, 4, "stored 0");
    }

    #[test]
    fn rows_expire_one_ttl_after_they_were_written_and_never_without_a_ttl() {
        const HOUR: i64 = 3_600_000;
        let check = |from_ms, ttl_ms, expired| {
            let expiry = Expiry { ttl_ms, ahead_ms: HOUR };
            assert_eq!(expiry.is_possible(from_ms, 100 * HOUR), expired, "{from_ms} {ttl_ms}");
        };
        check(0, 0, false);
        check(0, 50 * HOUR, true);
        check(51 * HOUR, 50 * HOUR, true);
        check(52 * HOUR, 50 * HOUR, true);
        check(52 * HOUR + 1, 50 * HOUR, false);
        assert!(Expiry { ttl_ms: 50 * HOUR, ahead_ms: 30 * HOUR }.is_possible(81 * HOUR, 100 * HOUR));
    }

    proptest! {
        #[test]
        fn reading_a_large_pane_in_parts_returns_every_row_once_in_log_order(
            offsets in proptest::collection::btree_set(0i64..1000, 0..200), capacity in 1usize..50, seed: u64,
        ) {
            let mut shuffled: Vec<i64> = offsets.iter().copied().collect();
            shuffled.sort_by_key(|offset| offset.wrapping_mul(seed as i64 | 1));
            let (mut seen, mut from) = (Vec::new(), Some(i64::MIN));
            while let Some(lowest) = from {
                let mut part = Lowest::new(lowest, capacity);
                for offset in &shuffled {
                    part.push(row(*offset, 1.0));
                    prop_assert!(part.rows.len() < 2 * capacity);
                }
                let (rows, rest) = part.into_rows();
                seen.extend(rows.into_iter().map(|row| row.offset));
                from = rest;
            }
            prop_assert_eq!(seen, offsets.into_iter().collect::<Vec<_>>());
        }
    }
}
