//! A source's record → an event: id, time, key and the flat JSON object of the declared columns. Pure.
//!
//! A record that lacks its id or time is not dropped: it becomes an event without that header, which the processor
//! keeps as a dead letter.

use common::event::{MAX_EVENT_TIME_MS, MIN_EVENT_TIME_MS, derived_event_id};
use common::run_ledger::Interval;
use common::stream::{Definition, EventTime};
use serde_json::Value;

/// Longest id or key taken from a record.
const MAX_ID_BYTES: usize = 1024;

/// An event as it goes to Kafka, but for the headers of its run.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// `ce_id`; `None`: the record lacks it.
    pub id: Option<String>,
    /// Event time in Unix milliseconds; `None`: not yet known, or the record lacks it.
    pub time_ms: Option<i64>,
    /// Kafka key.
    pub key: String,
    /// Kafka value.
    pub value: Vec<u8>,
}

/// A body without records.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum ExtractError {
    /// Nothing stands at the pointer.
    #[error("source.records: nothing stands at `{0}` in the source's answer")]
    Missing(String),
    /// Something else than an array does.
    #[error("source.records: `{pointer}` is {found} in the source's answer, not an array")]
    NoArray {
        /// The definition's pointer.
        pointer: String,
        /// JSON kind.
        found: &'static str,
    },
}

/// The records of a page.
pub fn records<'a>(definition: &Definition, body: &'a Value) -> Result<&'a [Value], ExtractError> {
    let pointer = &definition.source.records;
    match body.pointer(pointer) {
        Some(Value::Array(records)) => Ok(records),
        Some(other) => Err(ExtractError::NoArray { pointer: pointer.clone(), found: kind(other) }),
        None => Err(ExtractError::Missing(pointer.clone())),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// The event of record `index` (in the order of pages and records) of an interval. Where event time is spread over the
/// interval, it is left open: see [`spread`].
pub fn event(definition: &Definition, interval: Interval, index: u64, record: &Value) -> Event {
    let derived = || derived_event_id(&definition.stream.name, interval.start_ms, index).to_string();
    let id = match &definition.event.id {
        Some(pointer) => record.pointer(pointer).and_then(text),
        None => Some(derived()),
    };
    let own_key = definition.event.key.as_ref().and_then(|pointer| record.pointer(pointer).and_then(text));
    let key = own_key.or_else(|| id.clone()).unwrap_or_else(derived);
    let time_ms = match &definition.event.time {
        EventTime::Interval => None,
        EventTime::Pointer(pointer) => record.pointer(pointer).and_then(|value| time(value, 1)),
        EventTime::Seconds(pointer) => record.pointer(pointer).and_then(|value| time(value, 1000)),
    };
    Event { id, time_ms, key, value: flat(definition, record) }
}

/// Event time of record `index` of `count`: evenly over the interval in the records' order, in whole milliseconds.
pub fn spread(interval: Interval, index: u64, count: u64) -> i64 {
    let length = i128::from(interval.end_ms - interval.start_ms);
    let share = length * i128::from(index) / i128::from(count.max(1));
    interval.start_ms + i64::try_from(share).unwrap_or(0)
}

/// `{column: value}` of the declared columns that are present, in the definition's order.
fn flat(definition: &Definition, record: &Value) -> Vec<u8> {
    let mut object = Vec::with_capacity(32 * definition.columns.len());
    object.push(b'{');
    for column in &definition.columns {
        let Some(value) = record.pointer(&column.pointer).filter(|v| !v.is_null()) else { continue };
        if object.len() > 1 {
            object.push(b',');
        }
        // Column names are identifiers: nothing in them needs escaping.
        object.push(b'"');
        object.extend_from_slice(column.name.as_bytes());
        object.extend_from_slice(b"\":");
        object.extend_from_slice(value.to_string().as_bytes());
    }
    object.push(b'}');
    object
}

fn text(value: &Value) -> Option<String> {
    let text = match value {
        Value::String(text) => text.clone(),
        Value::Number(number) => number.to_string(),
        _ => return None,
    };
    (!text.is_empty() && text.len() <= MAX_ID_BYTES).then_some(text)
}

/// RFC 3339 text or Unix time in units of `unit_ms`, within the years 1970 to 9999.
fn time(value: &Value, unit_ms: i64) -> Option<i64> {
    let ms = match value {
        Value::String(text) => chrono::DateTime::parse_from_rfc3339(text).ok()?.timestamp_millis(),
        Value::Number(number) => number.as_i64()?.checked_mul(unit_ms)?,
        _ => return None,
    };
    (MIN_EVENT_TIME_MS..=MAX_EVENT_TIME_MS).contains(&ms).then_some(ms)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    const MINUTE: Interval = Interval { start_ms: 1_767_225_600_000, end_ms: 1_767_225_660_000 };

    fn users() -> Definition {
        Definition::parse("users", include_str!("../../../../streams/user_created.toml")).unwrap()
    }

    fn orders() -> Definition {
        Definition::parse("orders", include_str!("../../../../streams/orders.toml")).unwrap()
    }

    /// As randomuser.me answers, shortened to what is read.
    fn person() -> Value {
        json!({
            "gender": "female",
            "name": {"title": "Ms", "first": "Noëlle", "last": "O\"Brien"},
            "location": {"city": "Bern", "country": "Switzerland", "postcode": 3011, "state": "Bern"},
            "email": "noelle.obrien@example.com",
            "login": {"uuid": "0f2a6a6e-9a0e-4f0f-8a0c-0a6d1e6a7b11", "username": "happyduck123"},
            "dob": {"date": "1984-01-31T10:00:00.000Z", "age": 41},
            "registered": {"date": "2015-06-01T12:30:00.000Z", "age": 10},
            "cell": null,
            "nat": "CH",
        })
    }

    fn order() -> Value {
        json!({
            "order": {"id": "ord_1", "placed_at": "2026-01-01T00:00:13.500+01:00", "status": "paid",
                      "total": {"currency": "EUR", "amount": 12.5}, "lines": {"count": 3}},
            "customer": {"id": "7a0f0e8e-0f83-4dd3-90c2-2a4f3a4f2b1c"},
            "shipping": {"express": false, "city": "Graz"},
        })
    }

    fn shown(event: &Event) -> Value {
        let value: Value = serde_json::from_slice(&event.value).unwrap();
        json!({"id": event.id, "time_ms": event.time_ms, "key": event.key, "value": value})
    }

    #[test]
    fn a_person_becomes_this_event() {
        insta::assert_json_snapshot!(shown(&event(&users(), MINUTE, 0, &person())));
    }

    #[test]
    fn an_order_becomes_this_event() {
        insta::assert_json_snapshot!(shown(&event(&orders(), MINUTE, 0, &order())));
    }

    #[test]
    fn absent_and_null_columns_are_left_out() {
        let mut record = person();
        record["gender"] = Value::Null;
        record["location"] = json!({});
        let value: Value = serde_json::from_slice(&event(&users(), MINUTE, 0, &record).value).unwrap();
        let names: Vec<&String> = value.as_object().unwrap().keys().collect();
        assert!(!names.iter().any(|n| ["gender", "city", "country"].contains(&n.as_str())), "{names:?}");
    }

    #[test]
    fn a_record_without_id_or_time_is_kept_without_them() {
        let mut record = order();
        record["order"]["id"] = Value::Null;
        record["order"]["placed_at"] = json!("yesterday");
        let found = event(&orders(), MINUTE, 3, &record);
        assert_eq!((found.id, found.time_ms), (None, None));
        assert_eq!(found.key, derived_event_id("orders", MINUTE.start_ms, 3).to_string());
    }

    #[test]
    fn times_are_read_in_seconds_where_the_definition_says_so() {
        let mut definition = orders();
        let mut at = |unit: fn(String) -> EventTime, value: Value| {
            definition.event.time = unit("/t".to_owned());
            event(&definition, MINUTE, 0, &json!({"t": value})).time_ms
        };
        assert_eq!(at(EventTime::Pointer, json!(1_767_225_600_123_i64)), Some(1_767_225_600_123));
        assert_eq!(at(EventTime::Seconds, json!(1_767_225_600)), Some(1_767_225_600_000));
        assert_eq!(at(EventTime::Seconds, json!("2026-01-01T00:00:00Z")), Some(1_767_225_600_000));
        assert_eq!(at(EventTime::Seconds, json!(i64::MAX)), None, "beyond the year 9999");
    }

    #[test]
    fn ids_without_a_source_id_are_the_same_each_time() {
        let mut definition = users();
        definition.event.id = None;
        let id = |index| event(&definition, MINUTE, index, &person()).id;
        assert_eq!(id(4), id(4));
        assert_ne!(id(4), id(5));
    }

    #[test]
    fn records_are_found_or_their_absence_is_named() {
        let definition = users();
        assert_eq!(records(&definition, &json!({"results": [1, 2]})).unwrap().len(), 2);
        let missing = records(&definition, &json!({"error": "x"})).unwrap_err().to_string();
        assert_eq!(missing, "source.records: nothing stands at `/results` in the source's answer");
        let object = records(&definition, &json!({"results": {}})).unwrap_err().to_string();
        assert!(object.contains("is an object"), "{object}");
    }

    proptest! {
        #[test]
        fn spread_times_rise_within_the_interval(
            start in 0i64..2_000_000_000_000, length in 1i64..100_000_000, count in 1u64..5000
        ) {
            let interval = Interval { start_ms: start, end_ms: start + length };
            let times: Vec<i64> = (0..count).map(|i| spread(interval, i, count)).collect();
            prop_assert_eq!(times[0], start);
            prop_assert!(times.windows(2).all(|pair| pair[0] <= pair[1]));
            prop_assert!(times.iter().all(|t| (interval.start_ms..interval.end_ms).contains(t)));
        }
    }
}
