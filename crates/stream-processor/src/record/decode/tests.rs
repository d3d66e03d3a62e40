//! Tables of valid and invalid records, and properties: arbitrary bytes neither make the decoder panic nor lose a
//! record.

use super::{Decoder, Record};
use crate::record::chunk::Chunk;
use common::contracts::stream::Definition;
use proptest::prelude::*;

const NOW: i64 = 1_800_000_000_000;

fn decoder() -> Decoder {
    let text = include_str!("../../../../../streams/user_created.toml");
    Decoder::new(&Definition::parse("user_created.toml", text).unwrap(), 2)
}

fn headers<'a>(id: &'a str, time: &'a str) -> Vec<(&'a str, Option<&'a [u8]>)> {
    vec![("ce_id", Some(id.as_bytes())), ("ce_time", Some(time.as_bytes())), ("run_id", Some(b"r1"))]
}

fn decode(id: &str, time: &str, value: Option<&[u8]>) -> Chunk {
    let decoder = decoder();
    let mut chunk = decoder.chunk();
    let record = Record { offset: 7, timestamp_ms: NOW, key: None, value, headers: &headers(id, time) };
    decoder.decode(&record, &mut chunk);
    chunk
}

const TIME: &str = "2027-01-15T08:00:00.123Z";
const GOOD: &str = r#"{"first_name":"Ada","last_name":"L","age":42,"postcode":1234,"nationality":"DE","x":[1],"gender":null}"#;

#[test]
fn a_valid_record_becomes_cells_groups_and_measures() {
    let chunk = decode("id-1", TIME, Some(GOOD.as_bytes()));
    assert!(chunk.poison.is_empty(), "{:?}", chunk.poison);
    let event = &chunk.events[0];
    assert_eq!((event.offset, event.time_ms, chunk.id(event)), (7, 1_800_000_000_123, b"id-1".as_slice()));
    assert_eq!(chunk.run_id(event), Some(b"r1".as_slice()));
    let cells: Vec<_> = chunk.columns_of(0).collect();
    assert_eq!(cells[0], Some(b"Ada".as_slice()));
    assert_eq!(cells[2], None, "null is unset");
    assert_eq!(cells[7], Some(b"1234".as_slice()), "a number in a text column keeps its text");
    assert_eq!(cells[9], Some(42i32.to_be_bytes().as_slice()));
    assert_eq!(event.groups, [2, 4, 4, 0], "(other) for the absent gender, DE, ages 40 to 49");
    assert_eq!(chunk.measures_of(0), [42.0]);
    assert!((8..12).contains(&event.shard));
}

fn check(value: &str, class: &str, part: &str) {
    let chunk = decode("id-1", TIME, Some(value.as_bytes()));
    assert!(chunk.events.is_empty() && chunk.cells.is_empty() && chunk.arena.is_empty(), "{value}");
    let reason = &chunk.poison[0].reason;
    assert_eq!(reason.class, class, "{reason}");
    assert!(reason.message.contains(part), "{reason}");
}

#[test]
fn an_invalid_value_is_undecodable_and_the_reason_names_its_column() {
    check("garbage", "InvalidJson", "line 1");
    check("[1]", "InvalidColumn", "a flat JSON object");
    check(r#"{"first_name":"A"}"#, "MissingColumn", "`last_name`");
    check(
        r#"{"first_name":"A","last_name":"B","age":"x"}"#,
        "InvalidColumn",
        "column `age`: `x` is not a valid int",
    );
    check(r#"{"first_name":"A","last_name":"B","age":3000000000}"#, "InvalidColumn", "column `age`");
    check(
        r#"{"first_name":"A","last_name":{"a":1}}"#,
        "InvalidColumn",
        "column `last_name`: an object is not a valid text",
    );
    check(
        r#"{"first_name":"A","last_name":"\ud800"}"#,
        "InvalidColumn",
        "column `last_name`: unexpected end of hex escape",
    );
    check(r#"{"first_name":"A","last_name":"B"} x"#, "InvalidJson", "trailing");
    check(&format!("{{\"x\":{}1", "[".repeat(100_000)), "InvalidJson", "EOF");
    check(
        r#"{"first_name":"A","last_name":"B","age":1e999}"#,
        "InvalidColumn",
        "column `age`: `1e999` is not a valid int",
    );
}

#[test]
fn id_and_time_are_taken_from_the_headers_and_validated() {
    let class = |id: &str, time: &str| decode(id, time, Some(GOOD.as_bytes())).poison[0].reason.class;
    assert_eq!(class("", TIME), "InvalidEventId");
    assert_eq!(class("a", "yesterday"), "InvalidEventTime");
    assert_eq!(class("a", "1969-12-31T23:59:59Z"), "InvalidEventTime");
    assert_eq!(class("a", "2099-01-01T00:00:00Z"), "EventTimeInFuture");
    assert_eq!(class("a", "2025-01-01T00:00:00Z"), "EventTimeBeyondHorizon");
    assert_eq!(decode("a", TIME, None).poison[0].reason.class, "Tombstone");
    let decoder = decoder();
    let mut chunk = decoder.chunk();
    let value = Some(GOOD.as_bytes());
    decoder.decode(&Record { offset: 0, timestamp_ms: NOW, key: None, value, headers: &[] }, &mut chunk);
    assert_eq!(chunk.poison[0].reason.message, "header ce_id is missing");
}

#[test]
fn a_record_refused_by_the_producer_keeps_its_reason_even_if_it_could_be_decoded() {
    let decoder = decoder();
    let mut chunk = decoder.chunk();
    let refused = ("ingest_refused", Some(b"event.id: no value at `/id`".as_slice()));
    let headers = [headers("a", TIME), vec![refused]].concat();
    let value = Some(GOOD.as_bytes());
    decoder.decode(&Record { offset: 0, timestamp_ms: NOW, key: None, value, headers: &headers }, &mut chunk);
    let reason = &chunk.poison[0].reason;
    assert_eq!(reason.to_string(), "RefusedByProducer: event.id: no value at `/id`");
}

/// Returns the cell of a column of type `cql_type` for the JSON value `raw`. `None` if the record is undecodable.
fn cell(cql_type: &str, raw: &str) -> Option<Vec<u8>> {
    let text = include_str!("../../../../../streams/user_created.toml");
    let text = text
        .replace("name = \"email\"\ntype = \"text\"", &format!("name = \"email\"\ntype = \"{cql_type}\""));
    let decoder = Decoder::new(&Definition::parse("user_created.toml", &text).unwrap(), 2);
    let value = format!("{{\"first_name\":\"A\",\"last_name\":\"B\",\"email\":{raw}}}");
    let mut chunk = decoder.chunk();
    let (headers, value) = (headers("i", TIME), Some(value.as_bytes()));
    decoder.decode(&Record { offset: 7, timestamp_ms: NOW, key: None, value, headers: &headers }, &mut chunk);
    chunk.poison.is_empty().then(|| chunk.columns_of(0).nth(3).unwrap().unwrap().to_vec())
}

#[test]
fn numbers_keep_all_their_digits() {
    let text = |raw: &str| cell("text", raw).map(|bytes| String::from_utf8(bytes).unwrap());
    for raw in ["12345678901234567890124", "18446744073709551616", "0.10", "-1e400", "2.50e-3"] {
        assert_eq!(text(raw).as_deref(), Some(raw));
    }
    let bigint = |raw: &str| cell("bigint", raw).map(|bytes| i64::from_be_bytes(bytes.try_into().unwrap()));
    assert_eq!(bigint("9223372036854775807"), Some(i64::MAX));
    assert_eq!(bigint("-9223372036854775808"), Some(i64::MIN));
    assert_eq!(bigint("1e3"), Some(1000));
    for raw in ["9223372036854775808", "1.5"] {
        assert_eq!(bigint(raw), None, "{raw}");
    }
    assert_eq!(cell("double", "1e400"), None);
}

proptest! {
    #[test]
    fn a_double_is_the_nearest_one_to_the_json_text(bits in any::<u64>(), digits in 0usize..20) {
        let number = f64::from_bits(bits);
        prop_assume!(number.is_finite());
        for raw in [format!("{number:?}"), format!("{number:e}"), format!("{number:.digits$e}")] {
            let read = cell("double", &raw).map(|bytes| f64::from_be_bytes(bytes.try_into().unwrap()));
            prop_assert_eq!(read.map(f64::to_bits), raw.parse().ok().filter(|f: &f64| f.is_finite()).map(f64::to_bits), "{}", raw);
        }
    }
}

proptest! {
    #[test]
    fn arbitrary_bytes_are_an_event_or_undecodable_and_never_panic(
        value in proptest::collection::vec(any::<u8>(), 0..200), id in ".{0,8}", time in "[0-9TZ:. -]{0,30}",
    ) {
        prop_assert_eq!(decode(&id, &time, Some(&value)).len(), 1);
    }

    #[test]
    fn arbitrary_json_in_declared_columns_is_an_event_or_undecodable(
        name in "(age|first_name|registered_at|x)", text in "[-0-9.eE\"a-z\\[\\]{}:,]{0,20}",
    ) {
        let value = format!("{{\"first_name\":\"A\",\"last_name\":\"B\",\"{name}\":{text}}}");
        prop_assert_eq!(decode("i", TIME, Some(value.as_bytes())).len(), 1);
    }
}

#[test]
fn a_value_that_does_not_fit_is_null_and_counted_if_the_definition_says_so() {
    let text = include_str!("../../../../../streams/user_created.toml");
    let text = text
        .replace("name = \"age\"\ntype = \"int\"", "name = \"age\"\ntype = \"int\"\non_misfit = \"null\"");
    let decoder = Decoder::new(&Definition::parse("user_created.toml", &text).unwrap(), 2);
    let mut chunk = decoder.chunk();
    let decode = |value: &str, chunk: &mut Chunk| {
        let (headers, value) = (headers("i", TIME), Some(value.as_bytes()));
        decoder.decode(&Record { offset: 7, timestamp_ms: NOW, key: None, value, headers: &headers }, chunk);
    };
    decode(r#"{"first_name":"A","last_name":"B","age":"unknown"}"#, &mut chunk);
    assert_eq!((chunk.events.len(), chunk.misfits.len(), &*chunk.misfits[0]), (1, 1, "age"));
    decode(r#"{"age":"unknown","first_name":["A"]}"#, &mut chunk);
    assert_eq!(
        (chunk.poison.len(), chunk.misfits.len()),
        (1, 1),
        "the misfits of a dead letter do not count"
    );
}
