//! The keys that a pane has seen, as 64-bit hashes. Small sets are exact; larger ones become a Bloom filter of fixed
//! size. A miss is certain. A hit only means that the key must be looked up.

use fastbloom::BloomFilter;
use std::collections::HashSet;
use std::hash::{BuildHasherDefault, Hasher};

/// Maximum number of hashes in an exact set, which takes about 1 MiB.
const MAX_EXACT: usize = 65_536;
/// Bits of a pane's Bloom filter (2 MiB). With a million keys (17 bits per key), 1 in 3,000 new keys is looked up
/// needlessly.
const BLOOM_BITS: usize = 1 << 24;
/// Number of hash functions, optimal for two million keys.
const BLOOM_HASHES: u32 = 6;
/// Bytes per slot of the exact set, including its spare capacity.
const EXACT_BYTES: usize = 18;

/// A hasher for keys that are already hashes: it returns the key unchanged.
#[derive(Debug, Clone, Default)]
pub struct AlreadyHashed(u64);

impl Hasher for AlreadyHashed {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }
    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }
}

/// Builds [`AlreadyHashed`] hashers, for maps whose keys are hashes.
pub type BuildAlreadyHashed = BuildHasherDefault<AlreadyHashed>;

/// A set of seen keys without false negatives.
#[derive(Debug)]
pub enum SeenFilter {
    /// All hashes, without false positives.
    Exact(HashSet<u64, BuildAlreadyHashed>),
    /// A filter of fixed size with false positives, and the number of hashes inserted.
    Bloom(Box<BloomFilter>, usize),
}

impl Default for SeenFilter {
    fn default() -> SeenFilter {
        SeenFilter::Exact(HashSet::default())
    }
}

impl SeenFilter {
    /// Whether the key may have been seen.
    pub fn may_contain(&self, hash: u64) -> bool {
        match self {
            SeenFilter::Exact(set) => set.contains(&hash),
            SeenFilter::Bloom(filter, _) => filter.contains_hash(hash),
        }
    }

    /// Adds the hash of a key.
    pub fn insert(&mut self, hash: u64) {
        match self {
            SeenFilter::Exact(set) if set.len() < MAX_EXACT => {
                set.insert(hash);
            }
            SeenFilter::Exact(set) => {
                let mut filter = BloomFilter::with_num_bits(BLOOM_BITS).seed(&0).hashes(BLOOM_HASHES);
                for seen in set.iter().chain(std::iter::once(&hash)) {
                    filter.insert_hash(*seen);
                }
                *self = SeenFilter::Bloom(Box::new(filter), MAX_EXACT + 1);
            }
            SeenFilter::Bloom(filter, count) => {
                filter.insert_hash(hash);
                *count += 1;
            }
        }
    }

    /// Number of hashes inserted.
    pub fn len(&self) -> usize {
        match self {
            SeenFilter::Exact(set) => set.len(),
            SeenFilter::Bloom(_, count) => *count,
        }
    }

    /// Whether no hash was inserted.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Approximate size in memory in bytes.
    pub fn bytes(&self) -> usize {
        match self {
            SeenFilter::Exact(set) => set.capacity() * EXACT_BYTES,
            SeenFilter::Bloom(..) => BLOOM_BITS / 8,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(i: u64) -> u64 {
        common::contracts::event::seen_hash(0, &i.to_be_bytes())
    }

    #[test]
    fn inserted_keys_are_always_found_and_others_rarely() {
        let mut filter = SeenFilter::default();
        let inserted = 3 * MAX_EXACT as u64;
        for i in 0..inserted {
            filter.insert(key(i));
        }
        assert!(matches!(filter, SeenFilter::Bloom(..)));
        assert_eq!(filter.len() as u64, inserted);
        assert!((0..inserted).all(|i| filter.may_contain(key(i))));
        let false_hits = (inserted..2 * inserted).filter(|i| filter.may_contain(key(*i))).count();
        assert!(false_hits < 100, "{false_hits} false hits in {inserted}");
    }
}
