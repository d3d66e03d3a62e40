//! A deterministic random number generator: SplitMix64 (Steele, Lea, Flood 2014) seeded with FNV-1a. The numbers depend
//! only on the seed, not on library versions. Not suitable for secrets.

/// A sequence of pseudorandom numbers that is determined by its seed.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// Creates the sequence of a seed text and any number of counters.
    pub fn new(seed: &str, counters: &[u64]) -> Random {
        const PRIME: u64 = 0x0000_0100_0000_01b3;
        let mut state = 0xcbf2_9ce4_8422_2325_u64;
        for byte in seed.bytes() {
            state = (state ^ u64::from(byte)).wrapping_mul(PRIME);
        }
        let mut random = Random(state);
        for counter in counters {
            random = Random(random.next_u64() ^ counter.wrapping_mul(PRIME));
        }
        random
    }

    /// Returns the next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Returns a number below `bound`. A bound of 0 counts as 1.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next_u64() % bound.max(1)
    }

    /// Returns a number in `[0, 1)`.
    pub fn fraction(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Returns one item of a list separated by `|`.
    pub fn pick(&mut self, list: &'static str) -> &'static str {
        let count = list.split('|').count() as u64;
        list.split('|').nth(self.below(count) as usize).unwrap_or(list)
    }

    /// Replaces each `#` in the pattern with a digit and each `?` with a capital letter. The first digit is never 0.
    pub fn fill(&mut self, pattern: &str) -> String {
        let mut first = true;
        pattern
            .chars()
            .map(|c| match c {
                '#' => {
                    let low = u64::from(std::mem::take(&mut first));
                    char::from(b'0' + (low + self.below(10 - low)) as u8)
                }
                '?' => char::from(b'A' + self.below(26) as u8),
                other => other,
            })
            .collect()
    }

    /// Returns `count` lowercase hexadecimal digits.
    pub fn hex(&mut self, count: usize) -> String {
        let mut text = String::with_capacity(count + 16);
        while text.len() < count {
            text.push_str(&format!("{:016x}", self.next_u64()));
        }
        text.truncate(count);
        text
    }

    /// Returns a version 4 UUID.
    pub fn uuid(&mut self) -> uuid::Uuid {
        let bits = (u128::from(self.next_u64()) << 64) | u128::from(self.next_u64());
        uuid::Builder::from_random_bytes(bits.to_be_bytes()).into_uuid()
    }
}
