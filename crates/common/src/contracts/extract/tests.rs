//! Tests of the extractor, on records of the shipped streams.

use super::*;
use proptest::prelude::*;
use serde_json::{Value, json};

const MINUTE: Interval = Interval { start_ms: 1_767_225_600_000, end_ms: 1_767_225_660_000 };

fn users() -> Definition {
    Definition::parse("users", include_str!("../../../../../streams/user_created.toml")).unwrap()
}

fn orders() -> Definition {
    Definition::parse("orders", include_str!("../../../../../streams/orders.toml")).unwrap()
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
    outgoing_bytes(definition, index, record.as_bytes())
}

fn outgoing_bytes(definition: &Definition, index: u64, record: &[u8]) -> Outgoing {
    let extractor = Extractor::new(definition);
    let each = Each::new();
    let around = extractor.surroundings(MINUTE, &each, b"{}").unwrap();
    extractor.outgoing(&around, index, &Record { text: record.into(), parent: None, key: None })
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
    for (id, amount) in [("738529527931269425", "0.30000000000000004"), ("12345678901234567890124", "1e400")]
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
    check(&order_text("null", TIME, "1"), "event.id: `/order/id` is null; it must be a string or an integer");
    check(&order_text("1.0", TIME, "1"), "event.id: `1.0` at `/order/id` is a float");
    check(&order_text("1e3", TIME, "1"), "event.id: `1e3` at `/order/id` is a float");
    check(&order_text("\"\"", TIME, "1"), "event.id: `/order/id` has 0 bytes; it must have from 1 to 1024");
    check(&order_text("\"\\ud83d\"", TIME, "1"), "event.id: `\"\\ud83d\"` at `/order/id`: ");
    check(
        &order_text("1", "\"yesterday\"", "1"),
        "event.time: `\"yesterday\"` at `/order/placed_at` is not a time: use RFC 3339, a Unix time in milliseconds",
    );
    check(&order_text("1", "null", "1"), "event.time: `null` at");
    check(&order_text("1", TIME, "01"), "the record is not valid JSON: invalid number");
    check(r#"{"order": {}, "a": 1,}"#, "the record is not valid JSON: key must be a string");
    check("{}", "event.id: no value at `/order/id`");
    check("0", "event.id: no value at");
}

#[test]
fn text_cut_within_a_character_affects_at_most_its_own_record() {
    let record = order_text("1", TIME, "\"\\ud83d\"");
    assert!(matches!(outgoing(&orders(), 0, &record), Outgoing::Event(_)), "the processor validates columns");
    let latin = outgoing_bytes(&orders(), 0, b"{\"order\": {\"id\": \"\xe9\"}}");
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
    const { assert!(MAX_VALUE_BYTES < crate::runtime::kafka::MAX_MESSAGE_BYTES) }
}

#[test]
fn times_are_read_as_the_definition_declares() {
    let mut definition = orders();
    definition.event.id = vec![];
    let mut at = |reading: TimeReading, value: Value| {
        definition.event.time = EventTime::Field { pointer: "/t".to_owned(), reading };
        match outgoing(&definition, 0, &json!({"t": value}).to_string()) {
            Outgoing::Event(event) => Ok(event.time_ms),
            Outgoing::Refused(refused) => Err(refused.reason),
        }
    };
    assert_eq!(at(TimeReading::default(), json!(1_767_225_600_123_i64)), Ok(1_767_225_600_123));
    assert_eq!(at(TimeReading::seconds(), json!(1_767_225_600)), Ok(1_767_225_600_000));
    assert_eq!(at(TimeReading::seconds(), json!("1767225600.000247")), Ok(1_767_225_600_000));
    let beyond = at(TimeReading::default(), json!(253_402_300_800_000_i64)).unwrap_err();
    assert!(beyond.contains("outside of the years 1970 to 9999"), "{beyond}");
    let local = at(TimeReading::default(), json!("2026-01-01T00:00:03")).unwrap_err();
    assert!(local.contains("has no time zone") && local.ends_with("(event.time_zone)"), "{local}");
}

#[test]
fn nan_is_null_and_does_not_affect_the_other_values() {
    let Outgoing::Event(event) = outgoing(&orders(), 0, &order_text("1", TIME, "NaN")) else { panic!() };
    assert_eq!(event.value, b"{}");
}

#[test]
fn values_are_taken_from_the_record_its_parents_its_page_and_for_each() {
    let mut definition = orders();
    definition.event.id = ["each:symbol", "key:", "/id"].map(str::to_owned).to_vec();
    definition.event.time = EventTime::Interval;
    for (column, pointer) in definition.columns.iter_mut().zip([
        "parent:/id",
        "page:/meta/at",
        "each:symbol",
        "key:",
        "/id",
        "page:/nothing",
    ]) {
        column.pointer = pointer.to_owned();
    }
    let extractor = Extractor::new(&definition);
    let each = vec![("symbol".to_owned(), "\"A:B\"".to_owned())];
    let around = extractor.surroundings(MINUTE, &each, br#"{"meta": {"at": 5}}"#).unwrap();
    let record =
        Record { text: br#"{"id": 7}"#.into(), parent: Some(br#"{"id": 1}"#), key: Some("k".into()) };
    let Outgoing::Event(event) = extractor.outgoing(&around, 0, &record) else { panic!() };
    assert_eq!(event.id, "A%3AB:k:7");
    let expected = r#"{"customer_id":1,"status":5,"currency":"A:B","amount":"k","items":7}"#;
    assert_eq!(String::from_utf8(event.value).unwrap(), expected);
}

#[test]
fn derived_ids_are_the_same_in_every_attempt() {
    let mut definition = users();
    definition.event.id = vec![];
    let id = |index| event(&definition, index, &person()).id;
    assert_eq!(id(4), id(4));
    assert_ne!(id(4), id(5));
}

#[test]
fn nan_becomes_null_outside_of_text() {
    let clean = |text: &str| without_nan(text.as_bytes()).map(|clean| String::from_utf8(clean).unwrap());
    let expected = r#"{"v":null,"w":[null,null],"t":"NaN \" Infinity"}"#;
    assert_eq!(
        clean(r#"{"v":NaN,"w":[-Infinity,Infinity],"t":"NaN \" Infinity"}"#).as_deref(),
        Some(expected)
    );
    assert_eq!(clean(r#"{"t":"NaN"}"#), None);
    assert_eq!(clean(r#"{"v":NaNx}"#), None);
    assert_eq!(clean("{\"v\":NaN"), None);
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
        let mut set = Pointers::default();
        let slots = pointers.map(|pointer| set.add(pointer));
        let found = set.read(record.as_bytes()).unwrap();
        for (pointer, slot) in pointers.iter().zip(slots) {
            prop_assert_eq!(found[slot], scan::find(record.as_bytes(), pointer).unwrap(), "{}", pointer);
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
