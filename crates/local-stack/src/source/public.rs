//! The shapes of three well-known public APIs: GitHub's commits, Stripe's charges, Stack Exchange's questions. Time is cut
//! into slots; a slot has a record or not by its number alone, so every interval answers the same forever. Pure.

use super::random::Random;
use chrono::{DateTime, SecondsFormat};
use serde_json::{Value, json};

/// Slots with a record, in percent.
const FILLED_PERCENT: u64 = 85;
/// Longest interval of one request: 31 days.
pub const MAX_SPAN_S: i64 = 31 * 86_400;
/// Most records of one page, as all three APIs have it.
pub const MAX_PAGE: usize = 100;

/// The records of one API: a name for the seed, the length of a slot in seconds, and what a slot's record looks like.
#[derive(Debug, Clone, Copy)]
pub struct Api {
    name: &'static str,
    slot_s: i64,
    record: fn(i64, i64, &mut Random) -> Value,
}

/// Commits, about one each 2 s.
pub const COMMITS: Api = Api { name: "commits", slot_s: 2, record: commit };
/// Charges, about one a second.
pub const CHARGES: Api = Api { name: "charges", slot_s: 1, record: charge };
/// Questions, about one each 4 s.
pub const QUESTIONS: Api = Api { name: "questions", slot_s: 4, record: question };

/// A span that is not answered.
#[derive(Debug, PartialEq, thiserror::Error)]
#[error("the span must begin after 1970, not end before it begins, and be at most 31 days long")]
pub struct BadSpan;

impl Api {
    /// All records of the seconds `[from_s, to_s)`, oldest first.
    pub fn records(&self, from_s: i64, to_s: i64) -> Result<Vec<Value>, BadSpan> {
        if from_s < 0 || to_s < from_s || to_s - from_s > MAX_SPAN_S {
            return Err(BadSpan);
        }
        let slots = from_s / self.slot_s..=to_s / self.slot_s;
        let records = slots.filter_map(|slot| {
            let random = &mut Random::new(self.name, &[slot.unsigned_abs()]);
            let filled = random.below(100) < FILLED_PERCENT;
            let at_s = slot * self.slot_s + random.below(self.slot_s.unsigned_abs()) as i64;
            (filled && (from_s..to_s).contains(&at_s)).then(|| (self.record)(slot, at_s, random))
        });
        Ok(records.collect())
    }
}

/// The records of page `page`, from 1, and whether there are more.
pub fn page(records: &[Value], page: usize, size: usize) -> (&[Value], bool) {
    let from = page.saturating_sub(1).saturating_mul(size).min(records.len());
    let to = from.saturating_add(size).min(records.len());
    (&records[from..to], to < records.len())
}

fn commit(slot: i64, at_s: i64, random: &mut Random) -> Value {
    let name = random.pick("Ada Byron|Grace Hopper|Barbara Liskov|Tony Hoare|Niklaus Wirth|Edsger Dijkstra");
    let login = random.pick("bors|matthiaskrgr|compiler-errors|ada|grace|");
    let date =
        DateTime::from_timestamp(at_s, 0).unwrap_or_default().to_rfc3339_opts(SecondsFormat::Secs, true);
    let person = json!({"name": name, "email": "dev@example.com", "date": date});
    let area = random.pick("parser|borrow checker|docs|tests|codegen|lints");
    let mut sha = Random::new("sha", &[slot.unsigned_abs()]);
    json!({
        "sha": sha.hex(40),
        "commit": {
            "author": person,
            "committer": person,
            "message": format!("Mend the {area}\n\nIt was broken since {}.", random.below(100)),
            "comment_count": random.below(4),
            "verification": {"verified": random.below(2) == 0, "reason": "valid"},
        },
        // Null where no account has the address, as in the real API.
        "author": if login.is_empty() { Value::Null } else { json!({"login": login, "id": random.below(100_000)}) },
        "parents": [{"sha": sha.hex(40)}],
    })
}

fn charge(slot: i64, at_s: i64, random: &mut Random) -> Value {
    let paid = random.below(10) > 0;
    json!({
        "id": format!("ch_{:024x}", slot),
        "object": "charge",
        "amount": 100 + random.below(50_000),
        "currency": random.pick("usd|usd|usd|eur|eur|gbp|chf|jpy"),
        "created": at_s,
        "customer": if random.below(5) == 0 { Value::Null } else { format!("cus_{:05}", random.below(4000)).into() },
        "paid": paid,
        "status": if paid { "succeeded" } else { random.pick("failed|pending") },
        "billing_details": {"address": {"country": random.pick("US|US|DE|FR|GB|CH|JP")}},
        "payment_method_details": {"type": "card", "card": {"brand": random.pick("visa|visa|mastercard|amex")}},
        "livemode": false,
    })
}

fn question(slot: i64, at_s: i64, random: &mut Random) -> Value {
    let tag = random.pick("python|javascript|java|rust|sql|c++|haskell|bash");
    let views = random.below(5000);
    json!({
        "question_id": 70_000_000 + slot,
        "creation_date": at_s,
        "title": format!("How do I {} in {tag}?", random.pick("sort a list|read a file|parse JSON|wait for a thread")),
        "tags": [tag, random.pick("performance|strings|arrays|testing")],
        "owner": {"display_name": random.pick("ada|grace|tony|barbara|edsger"), "reputation": 1 + random.below(90_000)},
        "is_answered": random.below(3) > 0,
        "score": random.below(40) as i64 - 5,
        "view_count": views,
        "link": format!("https://stackoverflow.example/questions/{}", 70_000_000 + slot),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: i64 = 1_767_225_600;

    #[test]
    fn neighbouring_intervals_share_no_record_and_miss_none() {
        for api in [COMMITS, CHARGES, QUESTIONS] {
            let whole = api.records(START, START + 600).unwrap();
            let cut = START + 301;
            let halves = [api.records(START, cut).unwrap(), api.records(cut, START + 600).unwrap()].concat();
            assert_eq!(whole, halves, "{}", api.name);
            assert!(whole.len() > 100, "{} has pages: {}", api.name, whole.len());
        }
    }

    #[test]
    fn pages_together_are_the_whole() {
        let whole = CHARGES.records(START, START + 300).unwrap();
        let mut joined = Vec::new();
        for number in 1.. {
            let (records, more) = page(&whole, number, 7);
            joined.extend_from_slice(records);
            if !more {
                break;
            }
        }
        assert_eq!(joined, whole);
        assert_eq!(page(&whole, usize::MAX, 100), (&[] as &[Value], false));
    }

    #[test]
    fn nonsense_is_refused() {
        assert_eq!(CHARGES.records(-1, 5), Err(BadSpan));
        assert_eq!(CHARGES.records(5, 4), Err(BadSpan));
        assert_eq!(CHARGES.records(0, MAX_SPAN_S + 1), Err(BadSpan));
    }
}
