//! Records in the formats of well-known public APIs: commits and issues of GitHub, charges of Stripe, questions of Stack
//! Exchange, earthquakes of the USGS, and tickets of Zendesk. Time is divided into slots. The number of a slot alone determines whether it has a record, so the records
//! of an interval never change. Pure.

use super::random::Random;
use chrono::{DateTime, SecondsFormat};
use serde_json::{Value, json};

/// Percentage of slots that have a record.
const FILLED_PERCENT: u64 = 85;
/// Maximum interval of one request in seconds: 31 days.
pub const MAX_SPAN_S: i64 = 31 * 86_400;
/// Maximum number of records per page, the same in all APIs.
pub const MAX_PAGE: usize = 100;

/// Generates the records of one API.
#[derive(Debug, Clone, Copy)]
pub struct Api {
    /// Seed of the records.
    name: &'static str,
    /// Length of a slot in seconds.
    slot_s: i64,
    /// Generates the record of a slot, given its number and the time of the record in Unix seconds.
    record: fn(i64, i64, &mut Random) -> Value,
}

/// Commits, about one every 2 s.
pub const COMMITS: Api = Api { name: "commits", slot_s: 2, record: commit };
/// Charges, about one per second.
pub const CHARGES: Api = Api { name: "charges", slot_s: 1, record: charge };
/// Questions, about one every 4 s.
pub const QUESTIONS: Api = Api { name: "questions", slot_s: 4, record: question };
/// Earthquakes, about one every 3 s.
pub const EARTHQUAKES: Api = Api { name: "earthquakes", slot_s: 3, record: earthquake };
/// Issues, about one every 4 s.
pub const ISSUES: Api = Api { name: "issues", slot_s: 4, record: issue };
/// Tickets, about one every 4 s.
pub const TICKETS: Api = Api { name: "tickets", slot_s: 4, record: ticket };

/// The requested time span is invalid.
#[derive(Debug, PartialEq, thiserror::Error)]
#[error(
    "the span must start in 1970 or later, must not end before it starts, and must be at most 31 days long"
)]
pub struct BadSpan;

impl Api {
    /// Returns all records in `[from_s, to_s)`, in Unix seconds, oldest first.
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

/// Returns the records of a page, and whether more pages follow. Pages are numbered from 1.
pub fn page(records: &[Value], page: usize, size: usize) -> (&[Value], bool) {
    let from = page.saturating_sub(1).saturating_mul(size).min(records.len());
    let to = from.saturating_add(size).min(records.len());
    (&records[from..to], to < records.len())
}

fn commit(slot: i64, at_s: i64, random: &mut Random) -> Value {
    let name = random.pick("Ada Byron|Grace Hopper|Barbara Liskov|Tony Hoare|Niklaus Wirth|Edsger Dijkstra");
    let login = random.pick("bors|matthiaskrgr|compiler-errors|ada|grace|");
    let date = rfc3339(at_s);
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
        // Null if no account has this email address, as in the real API.
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

/// A row of the CSV format: the values of [`EARTHQUAKE_COLUMNS`].
fn earthquake(slot: i64, at_s: i64, random: &mut Random) -> Value {
    let tenths =
        |random: &mut Random, from: i64, count: u64| (from + random.below(count) as i64) as f64 / 10.0;
    json!([
        rfc3339(at_s),
        tenths(random, -600, 1200),
        tenths(random, -1800, 3600),
        tenths(random, 0, 700),
        // Some earthquakes have no magnitude yet.
        if random.below(20) == 0 { Value::Null } else { tenths(random, 0, 60).into() },
        random.pick("ml|ml|md|mb|mww"),
        format!("us{:08x}", slot),
        format!(
            "{} km NE of {}",
            1 + random.below(90),
            random.pick("Ridgecrest, CA|Volcano, Hawaii|Tofino, Canada")
        ),
        random.pick("earthquake|earthquake|earthquake|quarry blast"),
        random.pick("automatic|reviewed"),
    ])
}

/// Names of the values of an earthquake.
pub const EARTHQUAKE_COLUMNS: &str = "time,latitude,longitude,depth,mag,magType,id,place,type,status";

fn issue(slot: i64, at_s: i64, random: &mut Random) -> Value {
    let login = random.pick("ada|grace|tony|barbara|edsger|");
    json!({
        "id": format!("I_kwDO{slot:010}"),
        "number": 10_000 + slot % 100_000,
        "title": format!("{} does not {}", random.pick("rustc|cargo|rustdoc"), random.pick("compile|link|terminate")),
        "createdAt": rfc3339(at_s),
        "state": random.pick("OPEN|CLOSED|CLOSED"),
        // Null if the account was deleted.
        "author": if login.is_empty() { Value::Null } else { json!({"login": login}) },
        "comments": {"totalCount": random.below(30)},
    })
}

fn ticket(slot: i64, at_s: i64, random: &mut Random) -> Value {
    let channel = random.pick("email|web|chat|api");
    json!({
        "id": 1_000_000 + slot,
        "created_at": rfc3339(at_s),
        "subject": format!("My {} is late", random.pick("parcel|refund|invoice")),
        "status": random.pick("new|open|pending|solved|closed"),
        "priority": match random.pick("low|normal|high|urgent|") { "" => Value::Null, priority => priority.into() },
        "requester_id": 500 + random.below(9000),
        "tags": [channel, "vip"],
        "via": {"channel": channel},
        "result_type": "ticket",
    })
}

fn rfc3339(at_s: i64) -> String {
    DateTime::from_timestamp(at_s, 0).unwrap_or_default().to_rfc3339_opts(SecondsFormat::Secs, true)
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: i64 = 1_767_225_600;

    #[test]
    fn adjacent_intervals_neither_share_nor_miss_a_record() {
        for api in [COMMITS, CHARGES, QUESTIONS, EARTHQUAKES, ISSUES, TICKETS] {
            let whole = api.records(START, START + 600).unwrap();
            let cut = START + 301;
            let halves = [api.records(START, cut).unwrap(), api.records(cut, START + 600).unwrap()].concat();
            assert_eq!(whole, halves, "{}", api.name);
            assert!(whole.len() > 100, "{} must fill several pages: {}", api.name, whole.len());
        }
    }

    #[test]
    fn all_pages_together_contain_every_record() {
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
    fn invalid_spans_are_refused() {
        assert_eq!(CHARGES.records(-1, 5), Err(BadSpan));
        assert_eq!(CHARGES.records(5, 4), Err(BadSpan));
        assert_eq!(CHARGES.records(0, MAX_SPAN_S + 1), Err(BadSpan));
    }
}
