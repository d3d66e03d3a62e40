//! Hostile records. Each becomes an event or a dead letter, none causes a panic, and the partition processes all of
//! them.

use super::choices::splitmix;
use crate::count::partition::{LogPosition, Partition};
use crate::count::windows::hot::Panes;
use crate::count::windows::pane::PaneShape;
use crate::count::write_plan::{group_events, group_panes};
use crate::record::chunk::Chunk;
use crate::record::decode::{Decoder, MAX_VALUE_BYTES, Record};
use common::contracts::stream::Definition;
use std::collections::BTreeMap;

const NOW: i64 = 1_800_000_000_000;
/// Number of generated records.
const GENERATED: u64 = 20_000;

fn definitions() -> [Definition; 2] {
    [
        ("user_created.toml", include_str!("../../../../streams/user_created.toml")),
        ("orders.toml", include_str!("../../../../streams/orders.toml")),
    ]
    .map(|(file, text)| Definition::parse(file, text).unwrap())
}

/// One record of the corpus.
#[derive(Debug, Clone)]
struct Hostile {
    value: Option<Vec<u8>>,
    headers: Vec<(String, Option<Vec<u8>>)>,
    timestamp_ms: i64,
}

fn good_headers() -> Vec<(String, Option<Vec<u8>>)> {
    let text = |name: &str, value: &str| (name.to_owned(), Some(value.as_bytes().to_vec()));
    vec![text("ce_id", "id"), text("ce_time", "2027-01-15T08:00:00Z")]
}

fn with_value(value: impl Into<Vec<u8>>) -> Hostile {
    Hostile { value: Some(value.into()), headers: good_headers(), timestamp_ms: NOW }
}

const GOOD: &str = r#"{"first_name":"A","last_name":"B","customer_id":"6f1d2c5e-8a43-4b0e-9d57-3e1f70c2a9b4","status":"paid","amount":1}"#;

fn with_headers(headers: &[(&str, Option<&[u8]>)]) -> Hostile {
    let headers = headers.iter().map(|(name, value)| ((*name).to_owned(), value.map(<[u8]>::to_vec)));
    Hostile { headers: headers.collect(), ..with_value(GOOD) }
}

/// Values with deep nesting, huge numbers, lone surrogates, NUL, long texts, wrong types, or invalid JSON.
fn values() -> Vec<Hostile> {
    let mut all = Vec::new();
    for depth in [127, 128, 129, 10_000, 1_000_000] {
        for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
            let nested = open.repeat(depth) + "1" + &close.repeat(depth);
            all.push(with_value(nested.clone()));
            all.push(with_value(format!("{{\"age\":{nested}}}")));
            all.push(with_value(format!("{{\"x\":{}", open.repeat(depth))));
        }
    }
    let texts =
        ["\\u0000", "\\ud800", "\\udfff\\ud800", "\\uDBFF\\uDFFF", "\u{0}", "\u{feff}", "\u{202e}", "\\x"];
    let numbers = [
        "9223372036854775808",
        "-9223372036854775809",
        "18446744073709551616",
        "1e308",
        "-1e308",
        "1e309",
        "1e-400",
        "-0.0",
        "NaN",
        "Infinity",
        "01",
        "1.",
        "0x10",
        "1e9999999999",
    ];
    for column in
        ["age", "first_name", "registered_at", "amount", "items", "express", "customer_id", "status", "x"]
    {
        let texts = texts.iter().map(|text| format!("\"{text}\""));
        let others = ["true", "null", "[]", "{}", "\"\"", "\"2099-13-45\"", "\"-1\""].map(str::to_owned);
        let digits =
            ["9".repeat(400), format!("0.{}1", "0".repeat(5000)), format!("\"{}\"", "é".repeat(1 << 19))];
        for value in texts.chain(numbers.map(str::to_owned)).chain(others).chain(digits) {
            all.push(with_value(format!("{}, \"{column}\":{value}}}", &GOOD[..GOOD.len() - 1])));
        }
        all.push(with_value(format!("{{\"{column}\":1,\"{column}\":2,\"{column}\":\"three\"}}")));
    }
    all.push(with_value(vec![b' '; MAX_VALUE_BYTES + 1]));
    all.push(with_value(vec![b'"'; MAX_VALUE_BYTES]));
    all.push(with_value([&b"\xef\xbb\xbf"[..], GOOD.as_bytes()].concat()));
    all.extend([&b""[..], b"null", b"1", b"\xff\xfe", b"{", b"{}{}", b"\0"].map(with_value));
    all
}

/// Records with missing, empty, repeated or unknown headers, with impossible times, or without a value.
fn headers() -> Vec<Hostile> {
    let time =
        |text: &'static str| with_headers(&[("ce_id", Some(b"i")), ("ce_time", Some(text.as_bytes()))]);
    let id = |id: &[u8]| with_headers(&[("ce_id", Some(id)), ("ce_time", Some(b"2027-01-15T08:00:00Z"))]);
    let mut all = vec![
        Hostile { value: None, ..with_value("") },
        with_headers(&[]),
        with_headers(&[("ce_id", None), ("ce_time", None)]),
        with_headers(&[
            ("ce_id", Some(b"a")),
            ("ce_id", Some(b"b")),
            ("ce_time", Some(b"2027-01-15T08:00:00Z")),
        ]),
        id(b""),
        id(b"\0"),
        id(b"\xff"),
        id(&[b'x'; 1024]),
        id(&[b'x'; 1025]),
        id("\u{202e}\u{0}é".as_bytes()),
    ];
    let times = [
        "1969-12-31T23:59:59.999Z",
        "1970-01-01T00:00:00Z",
        "9999-12-31T23:59:59.999Z",
        "10000-01-01T00:00:00Z",
        "+262142-12-31T23:59:59Z",
        "-262143-01-01T00:00:00Z",
        "2099-01-01T00:00:00Z",
        "1990-01-01T00:00:00Z",
        "2027-01-15T08:00:60Z",
        "2027-01-15T08:00:00.123456789123Z",
        "2027-01-15T08:00:00+23:59",
        "2027-02-30T08:00:00Z",
        "2027-01-15 08:00:00Z",
        "1800000000000",
        "",
        "\u{0}",
    ];
    all.extend(times.map(time));
    for timestamp_ms in [i64::MIN, i64::MIN + 1, -1, 0, 1, i64::MAX - 1, i64::MAX] {
        all.push(Hostile { timestamp_ms, ..with_value(GOOD) });
    }
    let many = (0..5000).map(|n| (format!("h{n}"), Some(vec![0xff; 20]))).chain(good_headers());
    all.push(Hostile { headers: many.collect(), ..with_value(GOOD) });
    all
}

/// Valid records with bytes changed, removed, inserted and repeated.
fn generated() -> impl Iterator<Item = Hostile> {
    (0..GENERATED).map(|seed| {
        let mut random = seed;
        let mut value = GOOD.as_bytes().to_vec();
        let mut hostile = with_value("");
        for _ in 0..1 + splitmix(&mut random) % 4 {
            let at = splitmix(&mut random) as usize % value.len().max(1);
            match splitmix(&mut random) % 5 {
                0 => value.truncate(at),
                1 if at < value.len() => value[at] = splitmix(&mut random) as u8,
                2 => value.extend_from_within(at.min(value.len())..),
                3 => value
                    .splice(at..at, [b'[', b'{', b'"', b'\\', b'9', 0, 0xed][at % 7..].to_vec())
                    .exhaust(),
                _ => {
                    let header = splitmix(&mut random) as usize % 2;
                    let of = hostile.headers[header].1.get_or_insert_default();
                    let at = splitmix(&mut random) as usize % of.len().max(1);
                    of.insert(at.min(of.len()), splitmix(&mut random) as u8);
                }
            }
        }
        hostile.value = Some(value);
        hostile
    })
}

trait Exhaust: Iterator + Sized {
    /// Consumes the iterator, which completes the splice.
    fn exhaust(self) {
        self.for_each(drop);
    }
}

impl<I: Iterator> Exhaust for I {}

fn decode(decoder: &Decoder, offset: i64, hostile: &Hostile, chunk: &mut Chunk) {
    let headers: Vec<(&str, Option<&[u8]>)> =
        hostile.headers.iter().map(|(name, value)| (name.as_str(), value.as_deref())).collect();
    let record = Record {
        offset,
        timestamp_ms: hostile.timestamp_ms,
        key: None,
        value: hostile.value.as_deref(),
        headers: &headers,
    };
    decoder.decode(&record, chunk);
}

/// Decodes a corpus and applies it in batches. No record may be lost, and the totals must add up.
fn process(definition: &Definition, corpus: impl Iterator<Item = Hostile>) {
    let decoder = Decoder::new(definition, 0);
    let (shape, windows) = (PaneShape::new(definition), &definition.windows);
    let panes = Panes::new(shape, windows.pane_ms, windows.lateness_ms, 1 << 16, i64::MIN);
    let mut partition = Partition::new(LogPosition::default(), panes, definition.windows.lateness_ms);
    let mut chunk = decoder.chunk();
    let mut next = 0;
    for hostile in corpus {
        let before = chunk.len();
        decode(&decoder, next, &hostile, &mut chunk);
        next += 1;
        assert_eq!(chunk.len(), before + 1, "{:?}", hostile.headers);
        if let Some(poison) = chunk.poison.last().filter(|poison| poison.offset == next - 1) {
            assert_eq!((&poison.value, poison.headers.len()), (&hostile.value, hostile.headers.len()));
            assert!(poison.reason.message.len() < 2048, "{}", poison.reason.message.len());
        }
        if chunk.len() == 100 {
            let full = std::mem::replace(&mut chunk, decoder.chunk());
            apply_batch(definition, &mut partition, &full);
        }
    }
    if !chunk.is_empty() {
        apply_batch(definition, &mut partition, &chunk);
    }
    assert_eq!((partition.position.next_offset, partition.position.totals.records()), (next, next));
    assert!(partition.position.totals.events > 0 && partition.position.totals.dead_letters > 0);
}

fn apply_batch(definition: &Definition, partition: &mut Partition, chunk: &Chunk) {
    let applied = partition.apply(chunk, &BTreeMap::new()).unwrap();
    let rows: usize =
        group_events(chunk, &applied.rows, definition.store.bucket).iter().map(|g| g.events.len()).sum();
    assert_eq!(rows, applied.rows.len());
    let panes = group_panes(&applied.panes, definition.store.bucket, partition.panes.shape.row_bytes());
    for (start, row) in panes.iter().flat_map(|group| &group.rows) {
        assert!(partition.panes.pane(*start).is_some_and(|pane| pane.row(*row).count > 0));
    }
    partition.advance();
}

#[test]
fn hostile_values_are_events_or_dead_letters_and_the_partition_processes_all() {
    for definition in definitions() {
        process(&definition, values().into_iter().chain([with_value(GOOD)]));
    }
}

#[test]
fn hostile_headers_and_times_are_events_or_dead_letters_and_the_partition_processes_all() {
    for definition in definitions() {
        process(&definition, headers().into_iter());
    }
}

#[test]
fn corrupted_records_are_events_or_dead_letters_and_the_partition_processes_all() {
    for definition in definitions() {
        process(&definition, generated());
    }
}

#[test]
fn a_value_too_large_to_be_written_is_a_dead_letter_and_counts_in_the_bytes_of_the_chunk() {
    assert_eq!(MAX_VALUE_BYTES, common::runtime::kafka::MAX_MESSAGE_BYTES);
    let decoder = Decoder::new(&definitions()[0], 0);
    let mut chunk = decoder.chunk();
    let bomb = format!("{{\"first_name\":\"{}\"}}", "a".repeat(MAX_VALUE_BYTES));
    decode(&decoder, 0, &with_value(bomb), &mut chunk);
    assert_eq!(chunk.poison[0].reason.class, "TooLarge");
    assert!(chunk.bytes() > MAX_VALUE_BYTES);
}
