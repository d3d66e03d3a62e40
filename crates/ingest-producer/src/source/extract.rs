//! Turns a record of the source into a Kafka record: an event with an id, a time, a key and a flat JSON object of the
//! declared columns. Values are copied as text, so that every digit of a number reaches the processor. Pure.
//!
//! A record that cannot become an event neither is dropped nor fails its page. It is produced to Kafka unchanged, with
//! the reason, and the processor writes it to the dead letters.

use super::scan::{self, NotJson};
use common::contracts::event::{MAX_EVENT_TIME_MS, MIN_EVENT_TIME_MS, derived_event_id, derived_event_time};
use common::contracts::run_ledger::Interval;
use common::contracts::stream::{Definition, EventMapping, EventTime};
use serde_json::value::RawValue;

/// Maximum length of an id or key in bytes.
const MAX_ID_BYTES: usize = 1024;
/// Maximum size of a Kafka value in bytes. It is below `common::runtime::kafka::MAX_MESSAGE_BYTES`, which includes key and
/// headers.
const MAX_VALUE_BYTES: usize = (4 << 20) - (64 << 10);
/// How many bytes of a larger record are kept.
const MAX_EXCERPT_BYTES: usize = 64 << 10;
/// Maximum length of a value quoted in a reason, in characters.
const MAX_SHOWN: usize = 64;

/// An event to produce to Kafka, without the headers of its run.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// `ce_id`.
    pub id: String,
    /// Event time in Unix milliseconds.
    pub time_ms: i64,
    /// Kafka key.
    pub key: String,
    /// Kafka value.
    pub value: Vec<u8>,
}

/// A record that cannot become an event, to be produced to Kafka for the dead letters.
#[derive(Debug, Clone, PartialEq)]
pub struct Refused {
    /// Why it cannot become an event.
    pub reason: String,
    /// Kafka key: the id derived from the position of the record in its interval.
    pub key: String,
    /// Kafka value: the unchanged record, or its first 64 KiB if it is too large for Kafka.
    pub value: Vec<u8>,
}

/// A record to produce to Kafka.
#[derive(Debug, Clone, PartialEq)]
pub enum Outgoing {
    /// A record that is an event.
    Event(Event),
    /// A record that will be a dead letter.
    Refused(Refused),
}

impl Outgoing {
    /// Kafka key.
    pub fn key(&self) -> &str {
        match self {
            Outgoing::Event(event) => &event.key,
            Outgoing::Refused(refused) => &refused.key,
        }
    }

    /// Kafka value.
    pub fn value(&self) -> &[u8] {
        match self {
            Outgoing::Event(event) => &event.value,
            Outgoing::Refused(refused) => &refused.value,
        }
    }
}

/// The body of a page has no array of records.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum RecordsError {
    /// No value is at the pointer.
    #[error("source.records: the response of the source has no value at `{0}`")]
    Missing(String),
    /// The value at the pointer is not an array.
    #[error("source.records: `{pointer}` is {found} in the response of the source, not an array")]
    NotAnArray {
        /// The definition's pointer.
        pointer: String,
        /// Type of the value.
        found: &'static str,
    },
    /// The body is not valid JSON up to the value at the pointer.
    #[error(transparent)]
    NotJson(#[from] NotJson),
}

/// Iterates over the records of a page, each as JSON text.
pub fn records<'a>(
    body: &'a [u8],
    pointer: &str,
) -> Result<impl Iterator<Item = Result<&'a [u8], NotJson>> + use<'a>, RecordsError> {
    let at = scan::locate(body, pointer)?.ok_or_else(|| RecordsError::Missing(pointer.to_owned()))?;
    match body.get(at) {
        Some(b'[') => Ok(scan::elements(body, at).map(|element| element.map(|element| element.text))),
        other => Err(RecordsError::NotAnArray { pointer: pointer.to_owned(), found: kind(other) }),
    }
}

/// Describes the type of a JSON value by its first byte, for error messages.
pub(super) fn kind(first: Option<&u8>) -> &'static str {
    match first {
        None => "nothing",
        Some(b'n') => "null",
        Some(b't' | b'f') => "a boolean",
        Some(b'"') => "a string",
        Some(b'[') => "an array",
        Some(b'{') => "an object",
        Some(_) => "a number",
    }
}

/// Turns the records of one stream into events.
#[derive(Debug)]
pub struct Extractor {
    stream: String,
    mapping: EventMapping,
    columns: Vec<String>,
    pointers: Pointers,
}

impl Extractor {
    /// Creates the extractor of a stream definition.
    pub fn new(definition: &Definition) -> Extractor {
        let mapping = definition.event.clone();
        let time = match &mapping.time {
            EventTime::Interval => None,
            EventTime::Pointer(pointer) | EventTime::Seconds(pointer) => Some(pointer),
        };
        let own = [mapping.id.as_ref(), mapping.key.as_ref(), time].into_iter().flatten();
        let columns = definition.columns.iter().map(|column| &column.pointer);
        let pointers = Pointers::new(columns.chain(own).map(String::as_str));
        Extractor {
            stream: definition.stream.name.clone(),
            columns: definition.columns.iter().map(|column| column.name.clone()).collect(),
            pointers,
            mapping,
        }
    }

    /// Converts a record. `index` is its position in the interval, counted over all pages from 0.
    pub fn outgoing(&self, interval: Interval, index: u64, record: &[u8]) -> Outgoing {
        self.event(interval, index, record).map_or_else(
            |reason| {
                let kept = if record.len() > MAX_VALUE_BYTES { MAX_EXCERPT_BYTES } else { record.len() };
                Outgoing::Refused(Refused {
                    reason,
                    key: derived_event_id(&self.stream, interval.start_ms, index).to_string(),
                    value: record[..kept].to_vec(),
                })
            },
            Outgoing::Event,
        )
    }

    fn event(&self, interval: Interval, index: u64, record: &[u8]) -> Result<Event, String> {
        if let Err(e) = serde_json::from_slice::<&RawValue>(record) {
            return Err(format!("the record is not valid JSON: {e}"));
        }
        let found = self.pointers.read(record).map_err(|e| format!("the record is not valid JSON: {e}"))?;
        let at = |pointer: &str| self.pointers.slot(pointer).and_then(|slot| found[slot]);
        let id = match &self.mapping.id {
            Some(pointer) => identity("event.id", pointer, at(pointer))?,
            None => derived_event_id(&self.stream, interval.start_ms, index).to_string(),
        };
        let own_key =
            self.mapping.key.as_ref().filter(|pointer| at(pointer).is_some_and(|raw| raw != b"null"));
        let key = match own_key {
            Some(pointer) => identity("event.key", pointer, at(pointer))?,
            None => id.clone(),
        };
        let time_ms = match &self.mapping.time {
            EventTime::Interval => derived_event_time(&self.stream, interval, &id),
            EventTime::Pointer(pointer) => time(pointer, at(pointer), 1)?,
            EventTime::Seconds(pointer) => time(pointer, at(pointer), 1000)?,
        };
        Ok(Event { id, time_ms, key, value: self.flat(&found)? })
    }

    /// The object `{column: value}` of the declared columns that are present, in the order of the definition.
    fn flat(&self, found: &[Option<&[u8]>]) -> Result<Vec<u8>, String> {
        let mut object = Vec::with_capacity(32 * self.columns.len());
        object.push(b'{');
        for (name, slot) in self.columns.iter().zip(&self.pointers.slots) {
            let Some(value) = found[*slot].filter(|raw| *raw != b"null") else { continue };
            if object.len() > 1 {
                object.push(b',');
            }
            // Column names are identifiers and need no escaping.
            object.push(b'"');
            object.extend_from_slice(name.as_bytes());
            object.extend_from_slice(b"\":");
            if object.len() + value.len() >= MAX_VALUE_BYTES {
                return Err(format!(
                    "the columns of the record exceed the limit of {MAX_VALUE_BYTES} bytes for a Kafka value"
                ));
            }
            object.extend_from_slice(value);
        }
        object.push(b'}');
        Ok(object)
    }
}

/// A set of pointers that are resolved in one pass over a record.
#[derive(Debug)]
struct Pointers {
    root: Node,
    names: Vec<String>,
    /// The slot of each pointer, in the order of creation. Equal pointers share a slot.
    slots: Vec<usize>,
}

/// A node of the trie of pointer tokens.
#[derive(Debug, Default)]
struct Node {
    slot: Option<usize>,
    inner: Vec<(String, Node)>,
}

impl Pointers {
    fn new<'p>(pointers: impl Iterator<Item = &'p str>) -> Pointers {
        let mut set = Pointers { root: Node::default(), names: Vec::new(), slots: Vec::new() };
        for pointer in pointers {
            let node = scan::tokens(pointer).fold(&mut set.root, Node::child);
            let slot = *node.slot.get_or_insert_with(|| {
                set.names.push(pointer.to_owned());
                set.names.len() - 1
            });
            set.slots.push(slot);
        }
        set
    }

    fn slot(&self, pointer: &str) -> Option<usize> {
        self.names.iter().position(|name| name == pointer)
    }

    /// The JSON text of the value of each slot.
    fn read<'a>(&self, record: &'a [u8]) -> Result<Vec<Option<&'a [u8]>>, NotJson> {
        let mut found = vec![None; self.names.len()];
        self.root.read(record, &mut found)?;
        Ok(found)
    }
}

impl Node {
    fn child(&mut self, token: String) -> &mut Node {
        let at = self.inner.iter().position(|(known, _)| *known == token).unwrap_or_else(|| {
            self.inner.push((token, Node::default()));
            self.inner.len() - 1
        });
        &mut self.inner[at].1
    }

    fn read<'a>(&self, value: &'a [u8], found: &mut [Option<&'a [u8]>]) -> Result<(), NotJson> {
        if let Some(slot) = self.slot {
            found[slot] = Some(value);
        }
        match value.first() {
            _ if self.inner.is_empty() => {}
            Some(b'{') => {
                for member in scan::members(value, 0) {
                    let member = member?;
                    if let Some((_, node)) = self.inner.iter().find(|(token, _)| *token == member.name) {
                        node.read(member.text, found)?;
                    }
                }
            }
            Some(b'[') => {
                for (token, node) in &self.inner {
                    let element = scan::index(token).and_then(|index| scan::elements(value, 0).nth(index));
                    if let Some(element) = element.transpose()? {
                        node.read(element.text, found)?;
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// The text that identifies a record, or why the value cannot. Floats are rejected, because their digits depend on how
/// the source prints them.
fn identity(key: &str, pointer: &str, raw: Option<&[u8]>) -> Result<String, String> {
    let raw = raw.ok_or_else(|| format!("{key}: no value at `{pointer}`"))?;
    let text = match raw.first() {
        Some(b'"') => string(raw).map_err(|e| format!("{key}: {} at `{pointer}`: {e}", shown(raw)))?,
        Some(b'-' | b'0'..=b'9') if raw.iter().any(|b| matches!(b, b'.' | b'e' | b'E')) => {
            return Err(format!(
                "{key}: {} at `{pointer}` is a float; it must be a string or an integer",
                shown(raw)
            ));
        }
        Some(b'-' | b'0'..=b'9') => String::from_utf8_lossy(raw).into_owned(),
        other => {
            return Err(format!("{key}: `{pointer}` is {}; it must be a string or an integer", kind(other)));
        }
    };
    match text.len() {
        1..=MAX_ID_BYTES => Ok(text),
        bytes => Err(format!("{key}: `{pointer}` has {bytes} bytes; it must have from 1 to {MAX_ID_BYTES}")),
    }
}

/// Parses RFC 3339 text or a Unix time in units of `unit_ms`, within the years 1970 to 9999.
fn time(pointer: &str, raw: Option<&[u8]>, unit_ms: i64) -> Result<i64, String> {
    let raw = raw.ok_or_else(|| format!("event.time: no value at `{pointer}`"))?;
    let ms = match raw.first() {
        Some(b'"') => string(raw)
            .ok()
            .and_then(|text| Some(chrono::DateTime::parse_from_rfc3339(&text).ok()?.timestamp_millis())),
        _ => {
            std::str::from_utf8(raw).ok().and_then(|digits| digits.parse::<i64>().ok()?.checked_mul(unit_ms))
        }
    };
    ms.filter(|ms| (MIN_EVENT_TIME_MS..=MAX_EVENT_TIME_MS).contains(ms)).ok_or_else(|| {
        let unit = if unit_ms == 1 { "milliseconds" } else { "seconds" };
        format!(
            "event.time: {} at `{pointer}` must be an RFC 3339 time or Unix {unit} in the years 1970 to 9999",
            shown(raw)
        )
    })
}

fn string(quoted: &[u8]) -> Result<String, serde_json::Error> {
    serde_json::from_slice(quoted)
}

fn shown(raw: &[u8]) -> String {
    let text = String::from_utf8_lossy(&raw[..raw.len().min(4 * MAX_SHOWN)]);
    format!("`{}`", text.chars().take(MAX_SHOWN).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    const MINUTE: Interval = Interval { start_ms: 1_767_225_600_000, end_ms: 1_767_225_660_000 };

    fn users() -> Definition {
        Definition::parse("users", include_str!("../../../../streams/user_created.toml")).unwrap()
    }

    fn orders() -> Definition {
        Definition::parse("orders", include_str!("../../../../streams/orders.toml")).unwrap()
    }

    /// A person as randomuser.me returns it, reduced to the fields that are read.
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

    fn outgoing(definition: &Definition, index: u64, record: &str) -> Outgoing {
        Extractor::new(definition).outgoing(MINUTE, index, record.as_bytes())
    }

    fn event(definition: &Definition, index: u64, record: &Value) -> Event {
        match outgoing(definition, index, &record.to_string()) {
            Outgoing::Event(event) => event,
            Outgoing::Refused(refused) => panic!("{}", refused.reason),
        }
    }

    fn refused(definition: &Definition, record: &str) -> Refused {
        match outgoing(definition, 3, record) {
            Outgoing::Refused(refused) => refused,
            Outgoing::Event(event) => panic!("{event:?}"),
        }
    }

    fn shown(event: &Event) -> Value {
        let value: Value = serde_json::from_slice(&event.value).unwrap();
        json!({"id": event.id, "time_ms": event.time_ms, "key": event.key, "value": value})
    }

    #[test]
    fn a_person_becomes_this_event() {
        insta::assert_json_snapshot!(shown(&event(&users(), 0, &person())));
    }

    #[test]
    fn an_order_becomes_this_event() {
        insta::assert_json_snapshot!(shown(&event(&orders(), 0, &order())));
    }

    #[test]
    fn absent_and_null_columns_are_left_out() {
        let mut record = person();
        record["gender"] = Value::Null;
        record["location"] = json!({});
        let value: Value = serde_json::from_slice(&event(&users(), 0, &record).value).unwrap();
        let names: Vec<&String> = value.as_object().unwrap().keys().collect();
        assert!(!names.iter().any(|n| ["gender", "city", "country"].contains(&n.as_str())), "{names:?}");
    }

    /// An order with the given JSON text for id, time and amount.
    fn order_text(id: &str, placed_at: &str, amount: &str) -> String {
        format!(r#"{{"order": {{"id": {id}, "placed_at": {placed_at}, "total": {{"amount": {amount}}}}}}}"#)
    }

    const TIME: &str = r#""2026-01-01T00:00:13Z""#;

    #[test]
    fn numbers_are_copied_digit_by_digit() {
        for (id, amount) in
            [("738529527931269425", "0.30000000000000004"), ("12345678901234567890124", "1e400")]
        {
            let Outgoing::Event(event) = outgoing(&orders(), 0, &order_text(id, TIME, amount)) else {
                panic!("{id}")
            };
            assert_eq!((event.id.as_str(), event.key.as_str()), (id, id));
            assert_eq!(event.value, format!("{{\"amount\":{amount}}}").into_bytes());
        }
    }

    #[test]
    fn a_record_that_cannot_become_an_event_is_kept_unchanged_with_its_reason() {
        let check = |record: &str, expected: &str| {
            let found = refused(&orders(), record);
            assert!(found.reason.contains(expected), "`{expected}` is not in `{}`", found.reason);
            assert_eq!(
                (found.value, found.key),
                (record.into(), derived_event_id("orders", MINUTE.start_ms, 3).to_string())
            );
        };
        check(
            &order_text("null", TIME, "1"),
            "event.id: `/order/id` is null; it must be a string or an integer",
        );
        check(&order_text("1.0", TIME, "1"), "event.id: `1.0` at `/order/id` is a float");
        check(&order_text("1e3", TIME, "1"), "event.id: `1e3` at `/order/id` is a float");
        check(
            &order_text("\"\"", TIME, "1"),
            "event.id: `/order/id` has 0 bytes; it must have from 1 to 1024",
        );
        check(&order_text("\"\\ud83d\"", TIME, "1"), "event.id: `\"\\ud83d\"` at `/order/id`: ");
        check(
            &order_text("1", "\"yesterday\"", "1"),
            "event.time: `\"yesterday\"` at `/order/placed_at` must be an RFC 3339 time",
        );
        check(&order_text("1", "null", "1"), "event.time: `null` at");
        check(&order_text("1", TIME, "NaN"), "the record is not valid JSON: expected value at line 1");
        check(&order_text("1", TIME, "01"), "the record is not valid JSON: invalid number");
        check(r#"{"order": {}, "a": 1,}"#, "the record is not valid JSON: key must be a string");
        check("{}", "event.id: no value at `/order/id`");
        check("0", "event.id: no value at");
    }

    #[test]
    fn text_cut_within_a_character_affects_at_most_its_own_record() {
        let record = order_text("1", TIME, "\"\\ud83d\"");
        assert!(
            matches!(outgoing(&orders(), 0, &record), Outgoing::Event(_)),
            "the processor validates columns"
        );
        let latin = Extractor::new(&orders()).outgoing(MINUTE, 0, b"{\"order\": {\"id\": \"\xe9\"}}");
        let Outgoing::Refused(refused) = latin else { panic!("{latin:?}") };
        assert!(refused.reason.contains("invalid unicode code point"), "{}", refused.reason);
    }

    #[test]
    fn a_record_too_large_for_kafka_is_truncated() {
        let long = "x".repeat(MAX_VALUE_BYTES);
        let found = refused(&orders(), &order_text("1", TIME, &format!("\"{long}\"")));
        assert!(found.reason.contains("limit of 4128768 bytes"), "{}", found.reason);
        assert_eq!(found.value.len(), MAX_EXCERPT_BYTES);
        let mut other = order();
        other["not_declared"] = long.into();
        event(&orders(), 0, &other);
        const { assert!(MAX_VALUE_BYTES < common::runtime::kafka::MAX_MESSAGE_BYTES) }
    }

    #[test]
    fn times_are_parsed_in_the_unit_of_the_definition() {
        let mut definition = orders();
        definition.event.id = None;
        let mut at = |unit: fn(String) -> EventTime, value: Value| {
            definition.event.time = unit("/t".to_owned());
            match outgoing(&definition, 0, &json!({"t": value}).to_string()) {
                Outgoing::Event(event) => Some(event.time_ms),
                Outgoing::Refused(_) => None,
            }
        };
        assert_eq!(at(EventTime::Pointer, json!(1_767_225_600_123_i64)), Some(1_767_225_600_123));
        assert_eq!(at(EventTime::Seconds, json!(1_767_225_600)), Some(1_767_225_600_000));
        assert_eq!(at(EventTime::Seconds, json!("2026-01-01T00:00:00Z")), Some(1_767_225_600_000));
        assert_eq!(at(EventTime::Seconds, json!(i64::MAX)), None, "beyond the year 9999");
    }

    #[test]
    fn derived_ids_are_the_same_in_every_attempt() {
        let mut definition = users();
        definition.event.id = None;
        let id = |index| event(&definition, index, &person()).id;
        assert_eq!(id(4), id(4));
        assert_ne!(id(4), id(5));
    }

    #[test]
    fn the_records_of_a_page_are_found_or_the_error_names_the_pointer() {
        let pointer = "/results";
        let found = |body: &'static str| records(body.as_bytes(), pointer).map(Iterator::count);
        assert_eq!(found(r#"{"results": [1, 2]}"#), Ok(2));
        let error = |body| found(body).unwrap_err().to_string();
        let missing = "source.records: the response of the source has no value at `/results`";
        assert_eq!(error(r#"{"error": "x"}"#), missing);
        assert!(error(r#"{"results": {}}"#).contains("is an object"));
    }

    fn any_record() -> impl Strategy<Value = Value> {
        let id = prop_oneof!["[a-z]{1,8}".prop_map(Value::from), any::<u64>().prop_map(Value::from)];
        (id, any::<Option<f64>>()).prop_map(|(id, age)| json!({"login": {"uuid": id}, "dob": {"age": age}}))
    }

    proptest! {
        #[test]
        fn one_pass_resolves_every_pointer_as_a_separate_lookup_does(value in any_record(), more in ".{0,5}") {
            let record = json!([value, {more: {"": [1, value]}}]).to_string();
            let pointers = ["", "/0", "/0/login/uuid", "/1", "/0/login", "/2", "/1//1/login/uuid", "/0/dob/age"];
            let set = Pointers::new(pointers.into_iter());
            let found = set.read(record.as_bytes()).unwrap();
            for (pointer, slot) in pointers.iter().zip(&set.slots) {
                prop_assert_eq!(found[*slot], scan::find(record.as_bytes(), pointer).unwrap(), "{}", pointer);
            }
        }

        /// A refetch relies on this: if the response changes, the records in both responses keep their identity.
        #[test]
        fn identity_depends_on_the_record_alone(
            records in prop::collection::vec(any_record(), 1..20), removed in any::<prop::sample::Index>(),
        ) {
            let definition = users();
            let identities = |records: &[Value]| -> Vec<(String, i64)> {
                let events = records.iter().zip(0..).map(|(record, index)| event(&definition, index, record));
                events.map(|event| (event.id, event.time_ms)).collect()
            };
            let all = identities(&records);
            let (mut fewer, mut expected) = (records.clone(), all);
            fewer.remove(removed.index(records.len()));
            expected.remove(removed.index(records.len()));
            prop_assert_eq!(identities(&fewer), expected);
        }
    }
}
