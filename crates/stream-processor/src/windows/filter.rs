//! The keys a pane has seen, as 64-bit hashes: exact while few, a Bloom filter of bounded size beyond. A miss is certain;
//! a hit is only a reason to look the key up.

use fastbloom::BloomFilter;
use std::collections::HashSet;
use std::hash::{BuildHasherDefault, Hasher};

/// Up to here the hashes are kept as they are: about 1 MiB.
const EXACT_MOST: usize = 65_536;
/// Bits of a pane's Bloom filter: 2 MiB. At a million keys (17 bits a key) one miss in 3,000 is looked up needlessly.
const BLOOM_BITS: usize = 1 << 24;
/// Hash functions: the best number for two million keys.
const BLOOM_HASHES: u32 = 6;
/// Bytes a kept hash takes in the set, with its spare room.
const EXACT_BYTES: usize = 18;

/// The keys are hashes already.
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

/// For maps whose keys are hashes.
pub type BuildAlreadyHashed = BuildHasherDefault<AlreadyHashed>;

/// Has no false negatives.
#[derive(Debug)]
pub enum SeenFilter {
    /// Every hash.
    Exact(HashSet<u64, BuildAlreadyHashed>),
    /// Bounded, with false positives; and how many hashes went in.
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

    /// Notes a key.
    pub fn insert(&mut self, hash: u64) {
        match self {
            SeenFilter::Exact(set) if set.len() < EXACT_MOST => {
                set.insert(hash);
            }
            SeenFilter::Exact(set) => {
                let mut filter = BloomFilter::with_num_bits(BLOOM_BITS).seed(&0).hashes(BLOOM_HASHES);
                for seen in set.iter().chain(std::iter::once(&hash)) {
                    filter.insert_hash(*seen);
                }
                *self = SeenFilter::Bloom(Box::new(filter), EXACT_MOST + 1);
            }
            SeenFilter::Bloom(filter, count) => {
                filter.insert_hash(hash);
                *count += 1;
            }
        }
    }

    /// Keys noted.
    pub fn len(&self) -> usize {
        match self {
            SeenFilter::Exact(set) => set.len(),
            SeenFilter::Bloom(_, count) => *count,
        }
    }

    /// Whether none was noted.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes it takes, about.
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
        common::event::seen_hash(0, &i.to_be_bytes())
    }

    #[test]
    fn what_was_noted_is_always_found_and_what_was_not_rarely() {
        let mut filter = SeenFilter::default();
        let noted = 3 * EXACT_MOST as u64;
        for i in 0..noted {
            filter.insert(key(i));
        }
        assert!(matches!(filter, SeenFilter::Bloom(..)));
        assert_eq!(filter.len() as u64, noted);
        assert!((0..noted).all(|i| filter.may_contain(key(i))));
        let wrong = (noted..2 * noted).filter(|i| filter.may_contain(key(*i))).count();
        assert!(wrong < 100, "{wrong} false hits in {noted}");
    }
}
