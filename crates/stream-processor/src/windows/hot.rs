//! What a worker keeps of its partition's panes in memory: hot panes with the keys they have seen, and a cache of cold
//! ones. `hot_from` is one number, and moves only between batches.

use super::filter::SeenFilter;
use super::pane::{Pane, PaneShape};
use common::event::floor_to;
use std::collections::BTreeMap;

/// Cold panes kept between batches at most; they can be read back at any time.
pub const COLD_PANES_MOST: usize = 512;
/// Part of the memory for hot panes and filters that cold panes may take beside it.
const COLD_SHARE: usize = 2;

/// A pane in memory with the keys it has seen.
#[derive(Debug)]
pub struct HotPane {
    /// Its rows.
    pub pane: Pane,
    /// Its keys.
    pub seen: SeenFilter,
}

/// All panes in memory, by their start in Unix milliseconds.
#[derive(Debug)]
pub struct Panes {
    /// Rows of every pane.
    pub shape: PaneShape,
    pane_ms: i64,
    lateness_ms: i64,
    memory_most: usize,
    /// A pane at or after this start is hot.
    pub hot_from: i64,
    /// Hot panes that have events.
    pub hot: BTreeMap<i64, HotPane>,
    /// Cold panes read back, or counted in this batch.
    pub cold: BTreeMap<i64, Pane>,
    /// How many of them are kept between batches.
    pub cold_most: usize,
}

impl Panes {
    /// No pane yet. `memory_most` bounds the bytes of hot panes and filters; cold panes kept between batches take half of it
    /// at most.
    pub fn new(
        shape: PaneShape,
        (pane_ms, lateness_ms): (i64, i64),
        memory_most: usize,
        hot_from: i64,
    ) -> Panes {
        let cold_most = COLD_PANES_MOST.min(memory_most / COLD_SHARE / Pane::empty(&shape).bytes());
        Panes {
            shape,
            pane_ms,
            lateness_ms,
            memory_most,
            hot_from,
            hot: BTreeMap::new(),
            cold: BTreeMap::new(),
            cold_most,
        }
    }

    /// Start of the pane that holds `time_ms`.
    pub fn start_of(&self, time_ms: i64) -> i64 {
        floor_to(time_ms, self.pane_ms)
    }

    /// Start of the pane after the one that holds `time_ms`.
    pub fn start_after(&self, time_ms: i64) -> i64 {
        self.start_of(time_ms).saturating_add(self.pane_ms)
    }

    /// Whether the pane that starts at `start` is hot.
    pub fn is_hot(&self, start: i64) -> bool {
        start >= self.hot_from
    }

    /// Whether a hot event's key may have been seen before this batch.
    pub fn may_have_seen(&self, start: i64, hash: u64) -> bool {
        self.hot.get(&start).is_some_and(|hot| hot.seen.may_contain(hash))
    }

    /// Whether the rows of a cold pane must be read before the batch can be applied.
    pub fn must_load(&self, start: i64) -> bool {
        !self.is_hot(start) && !self.cold.contains_key(&start)
    }

    /// Puts a cold pane in, as read back.
    pub fn put_cold(&mut self, start: i64, pane: Pane) {
        self.cold.insert(start, pane);
    }

    /// The hot pane that starts at `start`; a new one is empty.
    pub fn hot_mut(&mut self, start: i64) -> (&PaneShape, &mut HotPane) {
        let shape = &self.shape;
        let fresh = || HotPane { pane: Pane::empty(shape), seen: SeenFilter::default() };
        (shape, self.hot.entry(start).or_insert_with(fresh))
    }

    /// The cold pane that starts at `start`; loaded before, or empty.
    pub fn cold_mut(&mut self, start: i64) -> (&PaneShape, &mut Pane) {
        let shape = &self.shape;
        (shape, self.cold.entry(start).or_insert_with(|| Pane::empty(shape)))
    }

    /// The pane that starts at `start`, hot or cold.
    pub fn pane(&self, start: i64) -> Option<&Pane> {
        if self.is_hot(start) { self.hot.get(&start).map(|h| &h.pane) } else { self.cold.get(&start) }
    }

    /// Bytes that hot panes and filters take, about.
    pub fn hot_bytes(&self) -> usize {
        self.hot.values().map(|h| h.pane.bytes() + h.seen.bytes()).sum()
    }

    /// Between batches: raises `hot_from` with the watermark less the lateness, or further while memory is over its bound,
    /// never past the pane of the highest event time `seen_to`. Returns the starts of the panes that were dropped.
    pub fn advance(&mut self, seen_to: Option<i64>) -> Vec<i64> {
        if self.cold.len() > self.cold_most {
            self.cold.clear();
        }
        let Some(seen_to) = seen_to else { return Vec::new() };
        let newest = self.start_of(seen_to);
        let mut border = self.hot_from.max(self.start_of(seen_to.saturating_sub(self.lateness_ms)));
        let mut bytes = self.hot_bytes();
        for (start, hot) in self.hot.range(..newest) {
            if *start < border || bytes > self.memory_most {
                bytes -= hot.pane.bytes() + hot.seen.bytes();
                border = border.max(start.saturating_add(self.pane_ms));
            }
        }
        self.hot_from = border.max(self.hot_from);
        let kept = self.hot.split_off(&self.hot_from);
        std::mem::replace(&mut self.hot, kept).into_keys().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use common::stream::Definition;

    fn panes(memory_most: usize) -> Panes {
        let text = include_str!("../../../../streams/user_created.toml");
        let shape = PaneShape::new(&Definition::parse("user_created.toml", text).unwrap());
        Panes::new(shape, (60_000, 600_000), memory_most, i64::MIN)
    }

    #[test]
    fn panes_below_the_watermark_less_the_lateness_turn_cold() {
        let mut panes = panes(usize::MAX);
        for minute in 0..20 {
            panes.hot_mut(minute * 60_000);
        }
        let dropped = panes.advance(Some(19 * 60_000 + 1));
        assert_eq!(panes.hot_from, 9 * 60_000);
        assert_eq!(dropped, (0..9).map(|m| m * 60_000).collect::<Vec<_>>());
        assert!(panes.advance(Some(0)).is_empty(), "the border never falls");
        assert_eq!(panes.hot_from, 9 * 60_000);
    }

    #[test]
    fn over_the_memory_bound_the_oldest_go_first_and_the_newest_stays() {
        let mut panes = panes(0);
        for minute in 0..5 {
            panes.hot_mut(minute * 60_000).1.seen.insert(7);
        }
        panes.advance(Some(4 * 60_000));
        assert_eq!(panes.hot.keys().copied().collect::<Vec<_>>(), [4 * 60_000]);
        assert_eq!(panes.hot_from, 4 * 60_000);
        assert!(!panes.is_hot(3 * 60_000));
    }
}
