//! The choices of a schedule: drawn from a seed and written down, or read from a list. 0 is always the dull one, so that a
//! failing list shrinks by deleting and zeroing.

/// A source of choices.
pub struct Choices {
    random: Option<u64>,
    given: Vec<u32>,
    at: usize,
    /// Every choice made.
    pub made: Vec<u32>,
}

impl Choices {
    /// Drawn from a seed.
    pub fn seeded(seed: u64) -> Choices {
        Choices {
            random: Some(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15)),
            given: Vec::new(),
            at: 0,
            made: Vec::new(),
        }
    }

    /// Read from a list; dull where it ends.
    pub fn given(given: &[u32]) -> Choices {
        Choices { random: None, given: given.to_vec(), at: 0, made: Vec::new() }
    }

    /// One of `0..n`, not 0 in `percent` of the cases.
    pub fn pick(&mut self, n: u32, percent: u64) -> u32 {
        let chosen = match &mut self.random {
            Some(state) if n > 1 => {
                if splitmix(state) % 100 < percent {
                    1 + (splitmix(state) % u64::from(n - 1)) as u32
                } else {
                    0
                }
            }
            Some(_) => 0,
            None => {
                let value = self.given.get(self.at).copied().unwrap_or(0);
                self.at += 1;
                value % n.max(1)
            }
        };
        self.made.push(chosen);
        chosen
    }

    /// A place in a list of `len`; the first is the dull one.
    pub fn index(&mut self, len: usize, percent: u64) -> usize {
        self.pick(len as u32, percent) as usize
    }
}

/// The generator of Steele, Lea and Flood: small, and good enough here.
pub fn splitmix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The shortest list found that still fails the same way; `run` gives what failed and how long its story is.
pub fn shrink(failing: Vec<u32>, run: impl Fn(&[u32]) -> Option<(String, usize)>) -> Vec<u32> {
    let Some((what, mut length)) = run(&failing) else { return failing };
    let mut best = failing;
    let better = |candidate: &[u32], length: &mut usize| match run(candidate) {
        Some((found, found_length)) if found == what && found_length <= *length => {
            *length = found_length;
            true
        }
        _ => false,
    };
    let mut again = true;
    while again {
        again = false;
        for size in [16, 8, 4, 2, 1] {
            let mut at = best.len();
            while at >= size {
                at -= 1;
                let mut shorter = best.clone();
                shorter.drain((at + 1 - size)..=at);
                if better(&shorter, &mut length) {
                    best = shorter;
                    again = true;
                    at = at.min(best.len());
                }
            }
        }
        for at in 0..best.len() {
            for value in [0, best[at] / 2, best[at].saturating_sub(1)] {
                let mut lower = best.clone();
                lower[at] = value;
                if value < best[at] && better(&lower, &mut length) {
                    best = lower;
                    again = true;
                    break;
                }
            }
        }
    }
    best
}

#[test]
fn a_failing_list_shrinks_to_what_makes_it_fail() {
    let failing: Vec<u32> = Choices::seeded(3).draw(200);
    let fails = |list: &[u32]| {
        let hit = list.iter().filter(|v| **v >= 5).count() >= 2;
        hit.then(|| ("two large ones".to_owned(), list.len()))
    };
    assert_eq!(shrink(failing, fails), [5, 5]);
}

impl Choices {
    #[cfg(test)]
    fn draw(mut self, count: usize) -> Vec<u32> {
        (0..count).map(|_| self.pick(9, 50)).collect()
    }
}
