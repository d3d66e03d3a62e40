//! The choices of a schedule, either drawn from a seed or read from a list. They are recorded in both cases. 0 is
//! always the default without a fault, so that a failing list shrinks by deleting and zeroing choices.

/// A source of choices.
pub struct Choices {
    random: Option<u64>,
    given: Vec<u32>,
    next_given: usize,
    /// Every choice made.
    pub made: Vec<u32>,
}

impl Choices {
    /// Draws choices from a seed.
    pub fn seeded(seed: u64) -> Choices {
        Choices {
            random: Some(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15)),
            given: Vec::new(),
            next_given: 0,
            made: Vec::new(),
        }
    }

    /// Reads choices from a list. After its end, every choice is the default.
    pub fn given(given: &[u32]) -> Choices {
        Choices { random: None, given: given.to_vec(), next_given: 0, made: Vec::new() }
    }

    /// Chooses one of `0..n`. The choice is not 0 in `percent` percent of the cases.
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
                let value = self.given.get(self.next_given).copied().unwrap_or(0);
                self.next_given += 1;
                value % n.max(1)
            }
        };
        self.made.push(chosen);
        chosen
    }

    /// Chooses an index of a list with `len` elements. The first one is the default.
    pub fn index(&mut self, len: usize, percent: u64) -> usize {
        self.pick(len as u32, percent) as usize
    }
}

/// SplitMix64 by Steele, Lea and Flood: a small generator of sufficient quality for schedules.
pub fn splitmix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Returns the shortest list found that still fails in the same way. `run` returns the violation and the length of the
/// trace.
pub fn shrink(failing: Vec<u32>, run: impl Fn(&[u32]) -> Option<(String, usize)>) -> Vec<u32> {
    let Some((violation, mut length)) = run(&failing) else { return failing };
    let mut best = failing;
    let better = |candidate: &[u32], length: &mut usize| match run(candidate) {
        Some((found, found_length)) if found == violation && found_length <= *length => {
            *length = found_length;
            true
        }
        _ => false,
    };
    let mut improved = true;
    while improved {
        improved = false;
        for size in [16, 8, 4, 2, 1] {
            let mut index = best.len();
            while index >= size {
                index -= 1;
                let mut shorter = best.clone();
                shorter.drain((index + 1 - size)..=index);
                if better(&shorter, &mut length) {
                    best = shorter;
                    improved = true;
                    index = index.min(best.len());
                }
            }
        }
        for index in 0..best.len() {
            for value in [0, best[index] / 2, best[index].saturating_sub(1)] {
                let mut lower = best.clone();
                lower[index] = value;
                if value < best[index] && better(&lower, &mut length) {
                    best = lower;
                    improved = true;
                    break;
                }
            }
        }
    }
    best
}

#[test]
fn a_failing_list_shrinks_to_the_choices_that_make_it_fail() {
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
