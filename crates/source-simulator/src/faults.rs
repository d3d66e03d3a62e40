//! Settings of the injected faults, from `PUT /faults` or the command line, and the choice of the fault for each
//! request. The seed and the number of the request determine the choice. Pure; `misbehave.rs` applies the faults.

use super::random::Random;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::str::FromStr;

/// Kinds of faults.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// Status 500.
    Error,
    /// Status 404, which no retry can fix.
    NotFound,
    /// Status 429 with `Retry-After`.
    Throttle,
    /// The correct body, sent a few bytes at a time.
    Drip,
    /// Half of the body, sent as a complete response.
    Truncated,
    /// A body that is not valid JSON.
    Malformed,
    /// A connection reset in the middle of the body.
    Reset,
    /// Pages that never end.
    Endless,
    /// A body of `oversized_bytes`.
    Oversized,
    /// A small gzip body that decompresses to `oversized_bytes`.
    Bomb,
    /// Status 302 with the location `redirect_to`.
    Redirect,
    /// The correct body, except that the first three records of a page of people contain values that no event can hold.
    BrokenRecords,
}

impl Fault {
    const ALL: [(Fault, &'static str); 12] = [
        (Fault::Error, "error"),
        (Fault::NotFound, "not_found"),
        (Fault::Throttle, "throttle"),
        (Fault::Drip, "drip"),
        (Fault::Truncated, "truncated"),
        (Fault::Malformed, "malformed"),
        (Fault::Reset, "reset"),
        (Fault::Endless, "endless"),
        (Fault::Oversized, "oversized"),
        (Fault::Bomb, "bomb"),
        (Fault::Redirect, "redirect"),
        (Fault::BrokenRecords, "broken_records"),
    ];
}

/// Which requests a fault affects.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum When {
    /// This number of next requests.
    Next(u32),
    /// Each request with this probability, from 0 to 1.
    Rate(f64),
}

/// How the first page of people in an interval differs from earlier responses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// Not at all.
    #[default]
    AsBefore,
    /// An additional person comes first.
    OneMore,
    /// The first person is missing.
    OneLess,
    /// The first person has a different name.
    OneChanged,
}

/// Current faults of the source, which are the body of `PUT /faults`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Faults {
    /// Seed that determines which requests a rate affects.
    pub seed: String,
    /// `Retry-After` header of status 429: seconds or an HTTP date.
    pub retry_after: String,
    /// Delay between the pieces of a dripping body, in milliseconds.
    pub drip_ms: u64,
    /// Size of the pieces of a dripping body in bytes.
    pub drip_bytes: usize,
    /// Size of oversized and of decompressed bodies in bytes.
    pub oversized_bytes: usize,
    /// Location of redirects.
    pub redirect_to: String,
    /// How responses have changed.
    pub answer: Answer,
    /// Faults to inject. If several affect a request, the first one applies.
    pub faults: BTreeMap<Fault, When>,
}

impl Default for Faults {
    fn default() -> Self {
        Faults {
            seed: "faults".to_owned(),
            retry_after: "1".to_owned(),
            drip_ms: 200,
            drip_bytes: 1024,
            oversized_bytes: 256 << 20,
            redirect_to: "http://169.254.169.254/latest/meta-data/".to_owned(),
            answer: Answer::default(),
            faults: BTreeMap::new(),
        }
    }
}

/// Maximum size of a body: 1 GiB.
const MAX_OVERSIZED: usize = 1 << 30;

impl Faults {
    /// Checks that all values are in range. The error describes the first one that is not.
    pub fn check(&self) -> Result<(), String> {
        for (fault, when) in &self.faults {
            if let When::Rate(rate) = when
                && !(0.0..=1.0).contains(rate)
            {
                return Err(format!("{fault:?}: rate must be between 0 and 1, but is {rate}"));
            }
        }
        if self.oversized_bytes > MAX_OVERSIZED || self.drip_bytes == 0 {
            return Err(format!(
                "oversized_bytes must be at most {MAX_OVERSIZED}, and drip_bytes must be above 0"
            ));
        }
        Ok(())
    }

    /// Returns the fault for request `number`, if any, and decrements the counter of a fault that affects the next
    /// requests.
    pub fn next_fault(&mut self, number: u64) -> Option<Fault> {
        for (fault, when) in &mut self.faults {
            match when {
                When::Next(0) => {}
                When::Next(left) => {
                    *left -= 1;
                    return Some(*fault);
                }
                When::Rate(rate) => {
                    if Random::new(&self.seed, &[number, *fault as u64]).fraction() < *rate {
                        return Some(*fault);
                    }
                }
            }
        }
        None
    }
}

/// Value of `--fault`, such as `error=0.1` or `error=x3` (the next three requests).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FaultFlag(pub Fault, pub When);

impl FromStr for FaultFlag {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names = || Fault::ALL.map(|(_, name)| name).join(", ");
        let usage =
            || format!("`{text}` is invalid: write KIND=RATE or KIND=xN, with KIND one of {}", names());
        let (name, value) = text.split_once('=').ok_or_else(usage)?;
        let (fault, _) = *Fault::ALL.iter().find(|(_, n)| *n == name).ok_or_else(usage)?;
        let when = match value.strip_prefix('x') {
            Some(count) => When::Next(count.parse().map_err(|_| usage())?),
            None => {
                When::Rate(value.parse().ok().filter(|rate| (0.0..=1.0).contains(rate)).ok_or_else(usage)?)
            }
        };
        Ok(FaultFlag(fault, when))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_for_the_next_requests_is_counted_down() {
        let mut faults = Faults { faults: [(Fault::Reset, When::Next(2))].into(), ..Faults::default() };
        let injected: Vec<_> = (0..4).map(|n| faults.next_fault(n)).collect();
        assert_eq!(injected, [Some(Fault::Reset), Some(Fault::Reset), None, None]);
    }

    #[test]
    fn a_rate_affects_the_expected_share_and_always_the_same_requests() {
        let mut faults = Faults { faults: [(Fault::Error, When::Rate(0.25))].into(), ..Faults::default() };
        let injected: Vec<_> = (0..4000).map(|n| faults.next_fault(n).is_some()).collect();
        let count = injected.iter().filter(|s| **s).count();
        assert!((850..1150).contains(&count), "{count}");
        assert_eq!(injected, (0..4000).map(|n| faults.next_fault(n).is_some()).collect::<Vec<_>>());
    }

    #[test]
    fn flags_are_parsed_with_a_rate_or_a_number() {
        assert_eq!("error=0.5".parse(), Ok(FaultFlag(Fault::Error, When::Rate(0.5))));
        assert_eq!("bomb=x1".parse(), Ok(FaultFlag(Fault::Bomb, When::Next(1))));
        for wrong in ["error", "errors=1", "error=2", "error=x-1"] {
            assert!(wrong.parse::<FaultFlag>().unwrap_err().contains("one of error, not_found"), "{wrong}");
        }
    }

    #[test]
    fn settings_are_parsed_and_invalid_ones_are_refused() {
        let text = r#"{"retry_after": "7", "faults": {"throttle": {"next": 3}, "error": {"rate": 0.1}}}"#;
        let faults: Faults = serde_json::from_str(text).unwrap();
        assert_eq!(faults.faults[&Fault::Throttle], When::Next(3));
        assert!(serde_json::from_str::<Faults>(r#"{"fault": {}}"#).is_err());
        let wrong = Faults { faults: [(Fault::Error, When::Rate(1.5))].into(), ..Faults::default() };
        assert!(wrong.check().is_err());
    }
}
