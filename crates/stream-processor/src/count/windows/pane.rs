//! One pane: a row for all its events and one for each group. Each row has a count, the measures, and the offset up to
//! which it counts.

use common::contracts::stream::{ALL, Definition};

/// One measure of one pane row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measure {
    /// Number of events that have the column.
    pub count: i64,
    /// Sum of the values, added in log order. The order affects the floating-point result.
    pub sum: f64,
    /// Minimum value. Meaningless while `count` is 0.
    pub min: f64,
    /// Maximum value. Meaningless while `count` is 0.
    pub max: f64,
}

impl Measure {
    /// The measure of zero events.
    pub const EMPTY: Measure = Measure { count: 0, sum: 0.0, min: f64::INFINITY, max: f64::NEG_INFINITY };

    fn add(&mut self, value: f64) {
        if !value.is_nan() {
            self.count += 1;
            self.sum += value;
            self.min = self.min.min(value);
            self.max = self.max.max(value);
        }
    }
}

/// The rows of a pane. All panes of a stream have the same shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PaneShape {
    /// Dimension and value of each row, as stored.
    pub names: Vec<(String, String)>,
    /// Index of the first row of each group-by column.
    first_rows: Vec<usize>,
    /// Number of measures per row.
    pub measures: usize,
}

impl PaneShape {
    /// Derives the rows from a stream definition: one for all events, then one for each group of each column.
    pub fn new(definition: &Definition) -> PaneShape {
        let mut names = vec![(ALL.to_owned(), ALL.to_owned())];
        let mut first_rows = Vec::new();
        for group_by in &definition.windows.group_by {
            first_rows.push(names.len());
            names.extend((0..group_by.len()).map(|i| (group_by.column.clone(), group_by.label(i))));
        }
        PaneShape { names, first_rows, measures: definition.windows.measures.len() }
    }

    /// Approximate size in bytes of a row in a statement.
    pub fn row_bytes(&self) -> usize {
        const KEYS_AND_COUNTS: usize = 160;
        const MEASURE: usize = 4 * 12;
        KEYS_AND_COUNTS + MEASURE * self.measures
    }

    /// Returns the indexes of the rows that count an event with these groups.
    pub fn rows_of<'a>(&'a self, groups: &'a [u16]) -> impl Iterator<Item = usize> + use<'a> {
        let grouped = self.first_rows.iter().zip(groups).map(|(first, group)| first + usize::from(*group));
        std::iter::once(0).chain(grouped)
    }

    /// Returns the index of the row with this dimension and value.
    pub fn row_of(&self, dimension: &str, value: &str) -> Option<usize> {
        self.names.iter().position(|(d, v)| d == dimension && v == value)
    }
}

/// One row of a pane. Its values are totals of the log below `upto`, not increments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PaneRow {
    /// Number of events counted.
    pub count: i64,
    /// Next offset to count.
    pub upto: i64,
    /// Whether the current batch changed the row.
    touched: bool,
}

/// All rows of one pane.
#[derive(Debug, Clone, PartialEq)]
pub struct Pane {
    rows: Vec<PaneRow>,
    measures: Vec<Measure>,
    any_touched: bool,
}

impl Pane {
    /// Creates a pane that has counted no events.
    pub fn empty(shape: &PaneShape) -> Pane {
        let rows = vec![PaneRow::default(); shape.names.len()];
        Pane { measures: vec![Measure::EMPTY; rows.len() * shape.measures], rows, any_touched: false }
    }

    /// Sets a row that was read back from the store or the checkpoint.
    pub fn load(&mut self, row: usize, count: i64, upto: i64, measures: &[Measure]) {
        self.rows[row] = PaneRow { count, upto, touched: false };
        let width = measures.len();
        self.measures[row * width..(row + 1) * width].copy_from_slice(measures);
    }

    /// Adds a first copy to each of its rows that does not count its offset yet.
    pub fn add(&mut self, shape: &PaneShape, offset: i64, groups: &[u16], measures: &[f64]) {
        for index in shape.rows_of(groups) {
            if offset >= self.rows[index].upto {
                self.count(index, measures);
            }
        }
    }

    /// Counts an event in one row, regardless of the row's `upto`.
    pub fn count(&mut self, index: usize, measures: &[f64]) {
        let row = &mut self.rows[index];
        row.count += 1;
        row.touched = true;
        self.any_touched = true;
        for (measure, value) in self.measures[index * measures.len()..].iter_mut().zip(measures) {
            measure.add(*value);
        }
    }

    /// Whether the current batch changed any row.
    pub fn is_touched(&self) -> bool {
        self.any_touched
    }

    /// Ends a batch: sets `upto` of every changed row to `next_offset` and returns the indexes of these rows.
    pub fn settle(&mut self, next_offset: i64) -> Vec<usize> {
        if !std::mem::take(&mut self.any_touched) {
            return Vec::new();
        }
        let mut settled = Vec::new();
        for (index, row) in self.rows.iter_mut().enumerate() {
            if std::mem::take(&mut row.touched) {
                row.upto = next_offset;
                settled.push(index);
            }
        }
        settled
    }

    /// Returns the row at `index`.
    pub fn row(&self, index: usize) -> PaneRow {
        self.rows[index]
    }

    /// Returns the measures of the row at `index`.
    pub fn measures(&self, index: usize) -> &[Measure] {
        let width = self.measures.len() / self.rows.len();
        &self.measures[index * width..(index + 1) * width]
    }

    /// Approximate size in memory in bytes.
    pub fn bytes(&self) -> usize {
        self.rows.len() * size_of::<PaneRow>() + self.measures.len() * size_of::<Measure>()
    }

    /// Encodes the rows that have counted events for the checkpoint, in little-endian order.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (index, row) in self.rows.iter().enumerate().filter(|(_, r)| r.upto > 0) {
            bytes.extend_from_slice(&(index as u32).to_le_bytes());
            bytes.extend_from_slice(&row.count.to_le_bytes());
            bytes.extend_from_slice(&row.upto.to_le_bytes());
            for m in self.measures(index) {
                bytes.extend_from_slice(&m.count.to_le_bytes());
                for value in [m.sum, m.min, m.max] {
                    bytes.extend_from_slice(&value.to_le_bytes());
                }
            }
        }
        bytes
    }

    /// Decodes the output of [`Pane::encode`]. Returns `None` if the bytes do not match this shape.
    pub fn decode(shape: &PaneShape, bytes: &[u8]) -> Option<Pane> {
        let mut pane = Pane::empty(shape);
        let row_bytes = 20 + 32 * shape.measures;
        if !bytes.len().is_multiple_of(row_bytes) {
            return None;
        }
        for row in bytes.chunks_exact(row_bytes) {
            let word = |at: usize| row[at..at + 8].try_into().map(u64::from_le_bytes).unwrap_or_default();
            let index = u32::from_le_bytes(row[..4].try_into().ok()?) as usize;
            if index >= pane.rows.len() {
                return None;
            }
            let measures: Vec<Measure> = (0..shape.measures)
                .map(|m| 20 + 32 * m)
                .map(|at| Measure {
                    count: word(at) as i64,
                    sum: f64::from_bits(word(at + 8)),
                    min: f64::from_bits(word(at + 16)),
                    max: f64::from_bits(word(at + 24)),
                })
                .collect();
            pane.load(index, word(4) as i64, word(12) as i64, &measures);
        }
        Some(pane)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape() -> PaneShape {
        let text = include_str!("../../../../../streams/user_created.toml");
        PaneShape::new(&Definition::parse("user_created.toml", text).unwrap())
    }

    #[test]
    fn an_event_counts_in_the_row_for_all_events_and_in_its_group_of_each_column() {
        let shape = shape();
        let mut pane = Pane::empty(&shape);
        pane.add(&shape, 5, &[1, 4, 3, 0], &[33.0]);
        pane.add(&shape, 6, &[2, 4, 3, 0], &[f64::NAN]);
        let settled = pane.settle(7);
        let names: Vec<_> =
            settled.iter().map(|i| format!("{}={}", shape.names[*i].0, shape.names[*i].1)).collect();
        assert_eq!(names, ["=", "gender=male", "gender=(other)", "nationality=DE", "age=30"]);
        assert_eq!(pane.row(0), PaneRow { count: 2, upto: 7, touched: false });
        assert_eq!(pane.measures(0), [Measure { count: 1, sum: 33.0, min: 33.0, max: 33.0 }]);
        assert_eq!(pane.settle(9), Vec::<usize>::new(), "only rows changed in the batch are settled");
    }

    #[test]
    fn a_row_read_back_ignores_offsets_it_already_counts() {
        let shape = shape();
        let mut pane = Pane::empty(&shape);
        pane.load(0, 10, 8, &[Measure::EMPTY]);
        pane.add(&shape, 7, &[0, 0, 0, 0], &[1.0]);
        assert_eq!(pane.row(0).count, 10);
        pane.add(&shape, 8, &[0, 0, 0, 0], &[1.0]);
        assert_eq!(pane.row(0).count, 11);
    }

    #[test]
    fn an_encoded_pane_is_decoded_bit_for_bit() {
        let shape = shape();
        let mut pane = Pane::empty(&shape);
        for i in 0..50 {
            pane.add(&shape, i, &[(i % 3) as u16, (i % 22) as u16, (i % 11) as u16, 0], &[i as f64 * 0.1]);
        }
        pane.settle(50);
        assert_eq!(Pane::decode(&shape, &pane.encode()).unwrap(), pane);
        assert!(Pane::decode(&shape, &[1, 2, 3]).is_none());
    }
}
