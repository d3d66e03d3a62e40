//! The panes of one partition in memory: hot panes with the keys they have seen, and a cache of cold panes. `hot_from`
//! separates the two and moves only between batches.

use super::filter::SeenFilter;
use super::pane::{Pane, PaneShape};
use common::contracts::event::floor_to;
use std::collections::BTreeMap;

/// Maximum number of cold panes kept between batches. They can be read back at any time.
pub const MAX_COLD_PANES: usize = 512;
/// Divisor of the memory bound for hot panes and filters. The quotient bounds the cold panes, in addition to that
/// memory.
const COLD_DIVISOR: usize = 2;

/// A hot pane with the keys it has seen.
#[derive(Debug)]
pub struct HotPane {
    /// Rows of the pane.
    pub pane: Pane,
    /// Keys of the events counted in the pane.
    pub seen: SeenFilter,
}

/// All panes of one partition in memory, by start in Unix milliseconds.
#[derive(Debug)]
pub struct Panes {
    /// The rows that every pane has.
    pub shape: PaneShape,
    pane_ms: i64,
    lateness_ms: i64,
    max_memory_bytes: usize,
    /// Boundary in Unix milliseconds: a pane that starts at or after it is hot.
    pub hot_from: i64,
    /// Hot panes that have events.
    pub hot: BTreeMap<i64, HotPane>,
    /// Cold panes that were read back or that have events in the current batch.
    pub cold: BTreeMap<i64, Pane>,
    /// Maximum number of cold panes kept between batches.
    pub max_cold: usize,
}

impl Panes {
    /// Creates an empty set of panes. `max_memory_bytes` bounds the bytes of hot panes and filters. The cold panes kept
    /// between batches take at most half as much in addition.
    pub fn new(
        shape: PaneShape,
        pane_ms: i64,
        lateness_ms: i64,
        max_memory_bytes: usize,
        hot_from: i64,
    ) -> Panes {
        let max_cold = MAX_COLD_PANES.min(max_memory_bytes / COLD_DIVISOR / Pane::empty(&shape).bytes());
        Panes {
            shape,
            pane_ms,
            lateness_ms,
            max_memory_bytes,
            hot_from,
            hot: BTreeMap::new(),
            cold: BTreeMap::new(),
            max_cold,
        }
    }

    /// Returns the start of the pane that contains `time_ms`.
    pub fn start_of(&self, time_ms: i64) -> i64 {
        floor_to(time_ms, self.pane_ms)
    }

    /// Returns the start of the pane after the one that contains `time_ms`.
    pub fn start_after(&self, time_ms: i64) -> i64 {
        self.start_of(time_ms).saturating_add(self.pane_ms)
    }

    /// Whether the pane that starts at `start` is hot.
    pub fn is_hot(&self, start: i64) -> bool {
        start >= self.hot_from
    }

    /// Whether the hot pane that starts at `start` may have seen a key before the current batch.
    pub fn may_have_seen(&self, start: i64, hash: u64) -> bool {
        self.hot.get(&start).is_some_and(|hot| hot.seen.may_contain(hash))
    }

    /// Whether the rows of a cold pane must be read before the batch can be applied.
    pub fn must_load(&self, start: i64) -> bool {
        !self.is_hot(start) && !self.cold.contains_key(&start)
    }

    /// Inserts a cold pane that was read back from the store.
    pub fn put_cold(&mut self, start: i64, pane: Pane) {
        self.cold.insert(start, pane);
    }

    /// Returns the hot pane that starts at `start`, and creates an empty one if there is none.
    pub fn hot_mut(&mut self, start: i64) -> (&PaneShape, &mut HotPane) {
        let shape = &self.shape;
        let empty = || HotPane { pane: Pane::empty(shape), seen: SeenFilter::default() };
        (shape, self.hot.entry(start).or_insert_with(empty))
    }

    /// Returns the cold pane that starts at `start`, and creates an empty one if it was not loaded.
    pub fn cold_mut(&mut self, start: i64) -> (&PaneShape, &mut Pane) {
        let shape = &self.shape;
        (shape, self.cold.entry(start).or_insert_with(|| Pane::empty(shape)))
    }

    /// Returns the hot or cold pane that starts at `start`, if it is in memory.
    pub fn pane(&self, start: i64) -> Option<&Pane> {
        if self.is_hot(start) { self.hot.get(&start).map(|h| &h.pane) } else { self.cold.get(&start) }
    }

    /// Approximate size of hot panes and filters in bytes.
    pub fn hot_bytes(&self) -> usize {
        self.hot.values().map(|h| h.pane.bytes() + h.seen.bytes()).sum()
    }

    /// Raises `hot_from` to the watermark `seen_to` minus the lateness. While memory exceeds its bound, raises it
    /// further, but past neither the pane that contains the watermark nor the newest hot pane, which may be ahead of it.
    /// Call it between batches only. Returns the starts of the panes that were dropped.
    pub fn advance(&mut self, seen_to: Option<i64>) -> Vec<i64> {
        if self.cold.len() > self.max_cold {
            self.cold.clear();
        }
        let Some(seen_to) = seen_to else { return Vec::new() };
        let newest_hot = self.hot.last_key_value().map_or(i64::MIN, |(start, _)| *start);
        let newest = self.start_of(seen_to).max(newest_hot);
        let mut boundary = self.hot_from.max(self.start_of(seen_to.saturating_sub(self.lateness_ms)));
        let mut bytes = self.hot_bytes();
        for (start, hot) in self.hot.range(..newest) {
            if *start < boundary || bytes > self.max_memory_bytes {
                bytes -= hot.pane.bytes() + hot.seen.bytes();
                boundary = boundary.max(start.saturating_add(self.pane_ms));
            }
        }
        self.hot_from = boundary.max(self.hot_from);
        let kept = self.hot.split_off(&self.hot_from);
        std::mem::replace(&mut self.hot, kept).into_keys().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use common::contracts::stream::Definition;

    fn panes(max_memory_bytes: usize) -> Panes {
        let text = include_str!("../../../../../streams/user_created.toml");
        let shape = PaneShape::new(&Definition::parse("user_created.toml", text).unwrap());
        Panes::new(shape, 60_000, 600_000, max_memory_bytes, i64::MIN)
    }

    #[test]
    fn panes_older_than_the_watermark_minus_the_lateness_become_cold() {
        let mut panes = panes(usize::MAX);
        for minute in 0..20 {
            panes.hot_mut(minute * 60_000);
        }
        let dropped = panes.advance(Some(19 * 60_000 + 1));
        assert_eq!(panes.hot_from, 9 * 60_000);
        assert_eq!(dropped, (0..9).map(|m| m * 60_000).collect::<Vec<_>>());
        assert!(panes.advance(Some(0)).is_empty(), "hot_from never decreases");
        assert_eq!(panes.hot_from, 9 * 60_000);
    }

    #[test]
    fn panes_ahead_of_the_watermark_are_within_the_memory_bound() {
        let mut panes = panes(0);
        for minute in 0..5 {
            panes.hot_mut(minute * 60_000).1.seen.insert(7);
        }
        panes.advance(Some(60_000));
        assert_eq!(panes.hot.keys().copied().collect::<Vec<_>>(), [4 * 60_000]);
        assert!(!panes.is_hot(60_000), "the pane of the present is cold");
    }

    #[test]
    fn over_the_memory_bound_the_oldest_panes_are_dropped_and_the_newest_stays() {
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
