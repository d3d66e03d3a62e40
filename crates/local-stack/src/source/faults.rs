//! Which request is served how badly: the settings of `PUT /faults` and of the flags, and the choice for each request,
//! fixed by the seed and the request's number. Pure; doing it is `misbehave.rs`.

use super::random::Random;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::str::FromStr;

/// Ways to go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// 500.
    Error,
    /// 404, an answer that no retry changes.
    NotFound,
    /// 429 with `Retry-After`.
    Throttle,
    /// The right body, a few bytes at a time.
    Drip,
    /// Half of the body as a complete answer.
    Truncated,
    /// A body that is no JSON.
    Malformed,
    /// The connection ends in the middle of the body.
    Reset,
    /// Pages that never end.
    Endless,
    /// A body of `oversized_bytes`.
    Oversized,
    /// A small gzip body that unpacks to `oversized_bytes`.
    Bomb,
    /// 302 to `redirect_to`.
    Redirect,
    /// The right body, but the first three records of a page of people hold what no event can.
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

/// When a fault strikes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum When {
    /// The next requests, as many.
    Next(u32),
    /// Each request with this probability, from 0 to 1.
    Rate(f64),
}

/// How the first page of people of an interval differs from what was answered before.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// Not at all.
    #[default]
    AsBefore,
    /// Another person comes first.
    OneMore,
    /// The first person is gone.
    OneLess,
    /// The first person has another name.
    OneChanged,
}

/// What is wrong with the source now: the body of `PUT /faults`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Faults {
    /// Decides which requests a rate strikes.
    pub seed: String,
    /// `Retry-After` of a 429: seconds or an HTTP date.
    pub retry_after: String,
    /// Pause between the pieces of a dripping body, in milliseconds.
    pub drip_ms: u64,
    /// Bytes of a dripping body's pieces.
    pub drip_bytes: usize,
    /// Size of oversized and of unpacked bodies.
    pub oversized_bytes: usize,
    /// Target of redirects.
    pub redirect_to: String,
    /// How answers have changed.
    pub answer: Answer,
    /// What goes wrong; the first that strikes a request wins.
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

/// Largest body the simulator serves: 1 GiB.
const MAX_OVERSIZED: usize = 1 << 30;

impl Faults {
    /// Refuses values out of range, naming them.
    pub fn check(&self) -> Result<(), String> {
        for (fault, when) in &self.faults {
            if let When::Rate(rate) = when
                && !(0.0..=1.0).contains(rate)
            {
                return Err(format!("{fault:?}: rate {rate} is not between 0 and 1"));
            }
        }
        if self.oversized_bytes > MAX_OVERSIZED || self.drip_bytes == 0 {
            return Err(format!("oversized_bytes must be at most {MAX_OVERSIZED}, drip_bytes above 0"));
        }
        Ok(())
    }

    /// The fault of request `number`, counting down those that strike the next few.
    pub fn strike(&mut self, number: u64) -> Option<Fault> {
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

/// `--fault error=0.1` or `--fault error=x3` (the next three).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FaultFlag(pub Fault, pub When);

impl FromStr for FaultFlag {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names = || Fault::ALL.map(|(_, name)| name).join(", ");
        let form = || format!("`{text}`: write KIND=RATE or KIND=xN with KIND one of {}", names());
        let (name, value) = text.split_once('=').ok_or_else(form)?;
        let (fault, _) = *Fault::ALL.iter().find(|(_, n)| *n == name).ok_or_else(form)?;
        let when = match value.strip_prefix('x') {
            Some(count) => When::Next(count.parse().map_err(|_| form())?),
            None => {
                When::Rate(value.parse().ok().filter(|rate| (0.0..=1.0).contains(rate)).ok_or_else(form)?)
            }
        };
        Ok(FaultFlag(fault, when))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_requests_are_counted_down() {
        let mut faults = Faults { faults: [(Fault::Reset, When::Next(2))].into(), ..Faults::default() };
        let struck: Vec<_> = (0..4).map(|n| faults.strike(n)).collect();
        assert_eq!(struck, [Some(Fault::Reset), Some(Fault::Reset), None, None]);
    }

    #[test]
    fn a_rate_strikes_about_as_many_and_always_the_same() {
        let mut faults = Faults { faults: [(Fault::Error, When::Rate(0.25))].into(), ..Faults::default() };
        let struck: Vec<_> = (0..4000).map(|n| faults.strike(n).is_some()).collect();
        let count = struck.iter().filter(|s| **s).count();
        assert!((850..1150).contains(&count), "{count}");
        assert_eq!(struck, (0..4000).map(|n| faults.strike(n).is_some()).collect::<Vec<_>>());
    }

    #[test]
    fn flags_say_kind_and_rate_or_number() {
        assert_eq!("error=0.5".parse(), Ok(FaultFlag(Fault::Error, When::Rate(0.5))));
        assert_eq!("bomb=x1".parse(), Ok(FaultFlag(Fault::Bomb, When::Next(1))));
        for wrong in ["error", "errors=1", "error=2", "error=x-1"] {
            assert!(wrong.parse::<FaultFlag>().unwrap_err().contains("one of error, not_found"), "{wrong}");
        }
    }

    #[test]
    fn settings_are_read_and_unknown_ones_refused() {
        let text = r#"{"retry_after": "7", "faults": {"throttle": {"next": 3}, "error": {"rate": 0.1}}}"#;
        let faults: Faults = serde_json::from_str(text).unwrap();
        assert_eq!(faults.faults[&Fault::Throttle], When::Next(3));
        assert!(serde_json::from_str::<Faults>(r#"{"fault": {}}"#).is_err());
        let wrong = Faults { faults: [(Fault::Error, When::Rate(1.5))].into(), ..Faults::default() };
        assert!(wrong.check().is_err());
    }
}
