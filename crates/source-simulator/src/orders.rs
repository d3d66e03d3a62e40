//! Orders, in a format with nested objects, an opaque cursor, and the event time in a field. Time is divided into
//! slots. The number of a slot alone determines whether it has an order, so the orders of an interval never change and
//! adjacent intervals never overlap. Pure.

use super::random::Random;
use chrono::{DateTime, SecondsFormat};
use serde_json::{Value, json};

/// Length of a slot in milliseconds.
const SLOT_MS: i64 = 150;
/// Percentage of slots that have an order.
const FILLED_PERCENT: u64 = 85;
/// Maximum number of orders per page.
pub const MAX_LIMIT: u64 = 1000;
/// Maximum interval of one request in milliseconds: 31 days.
pub const MAX_SPAN_MS: i64 = 31 * 86_400_000;

/// One page of orders.
#[derive(Debug)]
pub struct Page {
    /// The orders, oldest first.
    pub items: Vec<Value>,
    /// Cursor of the next page; `None` for the last page.
    pub next: Option<String>,
}

/// An invalid request. The message is sent to the client.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum BadRequest {
    /// The cursor was not issued by this API.
    #[error("unknown cursor `{0}`")]
    Cursor(String),
    /// The interval is empty, reversed, too long, or starts before 1970.
    #[error("`from` must be in 1970 or later, before `to`, and at most 31 days before it")]
    Span,
}

/// Returns a page of at most `limit` orders placed in `[from_ms, to_ms)`, in Unix milliseconds. Without a cursor, it is
/// the first page.
pub fn page(from_ms: i64, to_ms: i64, limit: u64, cursor: Option<&str>) -> Result<Page, BadRequest> {
    if from_ms < 0 || to_ms <= from_ms || to_ms - from_ms > MAX_SPAN_MS {
        return Err(BadRequest::Span);
    }
    let mut slot = match cursor {
        Some(text) => read_cursor(text).ok_or_else(|| BadRequest::Cursor(text.to_owned()))?,
        None => from_ms / SLOT_MS,
    };
    let mut items = Vec::new();
    while slot * SLOT_MS < to_ms {
        if let Some((placed_ms, order)) = order(slot)
            && (from_ms..to_ms).contains(&placed_ms)
        {
            if items.len() as u64 == limit {
                return Ok(Page { items, next: Some(write_cursor(slot)) });
            }
            items.push(order);
        }
        slot += 1;
    }
    Ok(Page { items, next: None })
}

fn write_cursor(slot: i64) -> String {
    format!("c{slot:x}")
}

fn read_cursor(text: &str) -> Option<i64> {
    i64::from_str_radix(text.strip_prefix('c')?, 16)
        .ok()
        .filter(|slot| (0..=i64::MAX / SLOT_MS - 1).contains(slot))
}

/// Returns the order of a slot with its time in Unix milliseconds, or `None` if the slot has no order.
fn order(slot: i64) -> Option<(i64, Value)> {
    let random = &mut Random::new("orders", &[slot.unsigned_abs()]);
    if random.below(100) >= FILLED_PERCENT {
        return None;
    }
    let placed_ms = slot * SLOT_MS + random.below(SLOT_MS as u64) as i64;
    let lines = 1 + random.below(6);
    let amount = (random.fraction().powi(3) * 95_000.0).round() / 100.0 + 5.0;
    // Orders come from about 4,000 recurring customers.
    let customer = &mut Random::new("customer", &[random.below(4000)]);
    let value = json!({
        "order": {
            "id": format!("ord_{:012x}", slot),
            "placed_at": DateTime::from_timestamp_millis(placed_ms)
                .unwrap_or_default()
                .to_rfc3339_opts(SecondsFormat::Millis, true),
            "status": random.pick("placed|placed|paid|paid|paid|paid|cancelled|refunded"),
            "total": {"currency": random.pick("EUR|EUR|USD|GBP|CHF"), "amount": amount},
            "lines": {"count": lines},
        },
        "customer": {"id": customer.uuid().to_string(), "since": 2012 + customer.below(14)},
        "shipping": {
            "express": random.below(10) < 3,
            "city": random.pick("Berlin|Lyon|Madrid|Utrecht|Leeds|Zürich|Aarhus|Porto|Graz|Austin"),
        },
    });
    Some((placed_ms, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: i64 = 60_000;
    const START: i64 = 1_767_225_600_000;

    fn all(from: i64, to: i64, limit: u64) -> Vec<Value> {
        let mut items = Vec::new();
        let mut cursor = None;
        loop {
            let page = page(from, to, limit, cursor.as_deref()).unwrap();
            items.extend(page.items);
            match page.next {
                Some(next) => cursor = Some(next),
                None => return items,
            }
        }
    }

    #[test]
    fn pages_of_any_size_contain_the_same_orders() {
        let whole = all(START, START + 2 * MINUTE, 1000);
        assert!((600..760).contains(&whole.len()), "{}", whole.len());
        assert_eq!(whole, all(START, START + 2 * MINUTE, 7));
    }

    #[test]
    fn adjacent_intervals_neither_share_nor_miss_an_order() {
        let cut = START + 61_234;
        let halves = [all(START, cut, 100), all(cut, START + 2 * MINUTE, 100)].concat();
        assert_eq!(halves, all(START, START + 2 * MINUTE, 100));
    }

    #[test]
    fn invalid_requests_are_refused() {
        assert_eq!(page(5, 5, 1, None).unwrap_err(), BadRequest::Span);
        assert_eq!(page(0, MAX_SPAN_MS + 1, 1, None).unwrap_err(), BadRequest::Span);
        assert_eq!(page(0, 10, 1, Some("x1")).unwrap_err(), BadRequest::Cursor("x1".to_owned()));
    }

    #[test]
    fn the_first_orders_of_a_minute_match_the_snapshot() {
        insta::assert_json_snapshot!(page(START, START + MINUTE, 2, None).unwrap().items);
    }
}
