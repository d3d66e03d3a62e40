//! One pane: a count and the measures of all its events and of each group, each row with the offset up to which it counts.

use common::stream::{ALL, Definition};

/// One measure of one pane row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measure {
    /// Events that have the column.
    pub count: i64,
    /// Their sum, folded in the order of the log.
    pub sum: f64,
    /// Their least value; meaningless while `count` is 0.
    pub min: f64,
    /// Their greatest value; meaningless while `count` is 0.
    pub max: f64,
}

impl Measure {
    /// Of no event.
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

/// Which rows a pane has; the same for every pane of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PaneShape {
    /// `(dimension, value)` of each row, as stored.
    pub names: Vec<(String, String)>,
    /// First row of each group-by column.
    first_rows: Vec<usize>,
    /// Measures per row.
    pub measures: usize,
}

impl PaneShape {
    /// The rows of a definition's panes: all events, then the groups of each column.
    pub fn new(definition: &Definition) -> PaneShape {
        let mut names = vec![(ALL.to_owned(), ALL.to_owned())];
        let mut first_rows = Vec::new();
        for group_by in &definition.windows.group_by {
            first_rows.push(names.len());
            names.extend((0..group_by.len()).map(|i| (group_by.column.clone(), group_by.label(i))));
        }
        PaneShape { names, first_rows, measures: definition.windows.measures.len() }
    }

    /// Bytes a row takes in a statement, about.
    pub fn row_bytes(&self) -> usize {
        const KEYS_AND_COUNTS: usize = 160;
        const MEASURE: usize = 4 * 12;
        KEYS_AND_COUNTS + MEASURE * self.measures
    }

    /// Numbers of the rows in which an event of these groups counts.
    pub fn rows_of<'a>(&'a self, groups: &'a [u16]) -> impl Iterator<Item = usize> + use<'a> {
        let grouped = self.first_rows.iter().zip(groups).map(|(first, group)| first + usize::from(*group));
        std::iter::once(0).chain(grouped)
    }

    /// Number of the row with these names.
    pub fn row_of(&self, dimension: &str, value: &str) -> Option<usize> {
        self.names.iter().position(|(d, v)| d == dimension && v == value)
    }
}

/// One row of a pane. Absolute values: what the log below `upto` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PaneRow {
    /// Events counted.
    pub count: i64,
    /// Next offset to count.
    pub upto: i64,
    /// Counted in the current batch.
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
    /// A pane that has counted nothing.
    pub fn empty(shape: &PaneShape) -> Pane {
        let rows = vec![PaneRow::default(); shape.names.len()];
        Pane { measures: vec![Measure::EMPTY; rows.len() * shape.measures], rows, any_touched: false }
    }

    /// Puts in a row read back from the store or from the checkpoint.
    pub fn load(&mut self, row: usize, count: i64, upto: i64, measures: &[Measure]) {
        self.rows[row] = PaneRow { count, upto, touched: false };
        let width = measures.len();
        self.measures[row * width..(row + 1) * width].copy_from_slice(measures);
    }

    /// Adds a first copy to its rows, each where the offset is not counted there yet.
    pub fn add(&mut self, shape: &PaneShape, offset: i64, groups: &[u16], measures: &[f64]) {
        for index in shape.rows_of(groups) {
            if offset >= self.rows[index].upto {
                self.count(index, measures);
            }
        }
    }

    /// Counts an event in one row.
    pub fn count(&mut self, index: usize, measures: &[f64]) {
        let row = &mut self.rows[index];
        row.count += 1;
        row.touched = true;
        self.any_touched = true;
        for (measure, value) in self.measures[index * measures.len()..].iter_mut().zip(measures) {
            measure.add(*value);
        }
    }

    /// Whether the current batch counted anything here.
    pub fn is_touched(&self) -> bool {
        self.any_touched
    }

    /// Ends a batch at `next_offset`: every row counted in it is exact up to there. Returns those rows' numbers.
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

    /// One row.
    pub fn row(&self, index: usize) -> PaneRow {
        self.rows[index]
    }

    /// One row's measures.
    pub fn measures(&self, index: usize) -> &[Measure] {
        let width = self.measures.len() / self.rows.len();
        &self.measures[index * width..(index + 1) * width]
    }

    /// Bytes it takes, about.
    pub fn bytes(&self) -> usize {
        self.rows.len() * size_of::<PaneRow>() + self.measures.len() * size_of::<Measure>()
    }

    /// For the checkpoint: the rows that count anything, little endian.
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

    /// What [`Pane::encode`] wrote; `None` where the bytes are not of this shape.
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
        let text = include_str!("../../../../streams/user_created.toml");
        PaneShape::new(&Definition::parse("user_created.toml", text).unwrap())
    }

    #[test]
    fn an_event_counts_in_all_and_in_its_group_of_each_column() {
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
        assert_eq!(pane.settle(9), Vec::<usize>::new(), "only rows of the batch are settled");
    }

    #[test]
    fn a_row_read_back_refuses_what_it_already_counts() {
        let shape = shape();
        let mut pane = Pane::empty(&shape);
        pane.load(0, 10, 8, &[Measure::EMPTY]);
        pane.add(&shape, 7, &[0, 0, 0, 0], &[1.0]);
        assert_eq!(pane.row(0).count, 10);
        pane.add(&shape, 8, &[0, 0, 0, 0], &[1.0]);
        assert_eq!(pane.row(0).count, 11);
    }

    #[test]
    fn the_checkpoint_form_is_read_back_bit_for_bit() {
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
