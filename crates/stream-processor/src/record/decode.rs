//! Decodes a Kafka record into an event, or into an undecodable record with a reason. Pure: the result depends on the
//! record alone, so a replay decodes it the same way.

mod mode;
mod value;

use crate::record::chunk::{Chunk, DecodedEvent, Poison, Reason, UNSET};
use common::contracts::event;
use common::contracts::stream::{Column, CqlType, Definition, EventMapping, Groups, MAX_GROUP_BY};
use mode::{Modes, Parts};
use std::collections::HashMap;
use std::sync::Arc;

/// Maximum value size, equal to `common::runtime::kafka::MAX_MESSAGE_BYTES`. A compressed record may exceed it, but its row
/// could never be written.
pub const MAX_VALUE_BYTES: usize = 4 << 20;
/// Maximum size of an event id. The id is part of a clustering key, so its size is limited.
pub const MAX_ID_BYTES: usize = 1024;

/// A record as fetched from Kafka.
#[derive(Debug, Clone, Copy)]
pub struct Record<'a> {
    /// Offset in the partition's log.
    pub offset: i64,
    /// The broker's timestamp in Unix milliseconds.
    pub timestamp_ms: i64,
    /// Key bytes, if the record has a key.
    pub key: Option<&'a [u8]>,
    /// Value bytes. `None` for a tombstone.
    pub value: Option<&'a [u8]>,
    /// Headers in the record's order. If a name occurs more than once, the first one is used.
    pub headers: &'a [(&'a str, Option<&'a [u8]>)],
}

impl<'a> Record<'a> {
    fn header(&self, name: &str) -> Option<&'a [u8]> {
        self.headers.iter().find(|(n, _)| *n == name).and_then(|(_, v)| *v)
    }
}

/// Decodes the records of one partition according to a stream definition.
#[derive(Debug)]
pub struct Decoder {
    partition: i32,
    pane_ms: i64,
    shards: u32,
    /// Maximum age of an event relative to its record's timestamp. `None` if rows never expire.
    horizon_ms: Option<i64>,
    mapping: EventMapping,
    modes: Modes,
    columns: Vec<Column>,
    /// Names of the columns, for [`Chunk::misfits`].
    names: Vec<Arc<str>>,
    by_name: Names,
    groups: Vec<(usize, GroupIndex)>,
    measures: Vec<usize>,
}

/// Maps the values of one group-by column to group indexes.
#[derive(Debug)]
pub struct GroupIndex(Index);

#[derive(Debug)]
enum Index {
    Values(Names, u16),
    Step { from: f64, step: f64, count: u16 },
}

/// Names from the stream definition and their indexes. A lookup happens for every member of every record. The keys
/// never come from a record, so a fast hash without protection against collision attacks is safe.
type Names = HashMap<Vec<u8>, u16, foldhash::fast::FixedState>;

fn index_by_name<'a>(names: impl IntoIterator<Item = &'a String>) -> Names {
    names.into_iter().map(|name| name.clone().into_bytes()).zip(0..).collect()
}

fn reason(class: &'static str, message: impl Into<String>) -> Reason {
    Reason { class, message: message.into() }
}

impl Decoder {
    /// Creates a decoder for the records of `partition`.
    pub fn new(definition: &Definition, partition: i32) -> Decoder {
        let index_of = |name: &str| definition.column_index(name).unwrap_or(usize::MAX);
        let groups =
            definition.windows.group_by.iter().map(|g| (index_of(&g.column), GroupIndex::new(&g.groups)));
        Decoder {
            partition,
            pane_ms: definition.windows.pane_ms,
            shards: definition.store.shards,
            horizon_ms: definition.horizon_ms(),
            mapping: definition.event.clone(),
            modes: Modes::new(definition),
            by_name: index_by_name(definition.columns.iter().map(|c| &c.name)),
            groups: groups.collect(),
            measures: definition.windows.measures.iter().map(|m| index_of(m)).collect(),
            names: definition.columns.iter().map(|c| Arc::from(c.name.as_str())).collect(),
            columns: definition.columns.clone(),
        }
    }

    /// Length of the stream's panes in milliseconds.
    pub fn pane_ms(&self) -> i64 {
        self.pane_ms
    }

    /// Returns an empty chunk with this decoder's number of columns and measures.
    pub fn chunk(&self) -> Chunk {
        Chunk::new(self.columns.len(), self.measures.len())
    }

    /// Appends a record to `chunk`, either as an event or as an undecodable record.
    pub fn decode(&self, record: &Record<'_>, chunk: &mut Chunk) {
        chunk.next_offset = record.offset + 1;
        let (arena, cells, measures) = (chunk.arena.len(), chunk.cells.len(), chunk.measures.len());
        let misfits = chunk.misfits.len();
        if let Err(reason) = self.event(record, chunk) {
            chunk.arena.truncate(arena);
            chunk.cells.truncate(cells);
            chunk.measures.truncate(measures);
            chunk.misfits.truncate(misfits);
            let headers = record.headers.iter().map(|(k, v)| ((*k).to_owned(), v.map(<[u8]>::to_vec)));
            let bytes_of_headers = record.headers.iter().map(|(k, v)| k.len() + v.map_or(0, <[u8]>::len));
            let bytes = record.key.map_or(0, <[u8]>::len) + record.value.map_or(0, <[u8]>::len);
            chunk.poison_bytes += bytes + bytes_of_headers.sum::<usize>();
            chunk.poison.push(Poison {
                offset: record.offset,
                timestamp_ms: record.timestamp_ms,
                key: record.key.map(<[u8]>::to_vec),
                value: record.value.map(<[u8]>::to_vec),
                headers: headers.collect(),
                reason,
            });
        }
    }

    fn event(&self, record: &Record<'_>, chunk: &mut Chunk) -> Result<(), Reason> {
        let value = record.value.ok_or_else(|| reason("Tombstone", "the record has no value"))?;
        if value.len() > MAX_VALUE_BYTES {
            let message = format!("the value has {} bytes, the maximum is {MAX_VALUE_BYTES}", value.len());
            return Err(reason("TooLarge", message));
        }
        if let Some(cause) = record.header(event::HEADER_REFUSED) {
            return Err(reason("RefusedByProducer", String::from_utf8_lossy(cause)));
        }
        let Parts { id, time_ms, columns } = self.modes.parts(record, value)?;
        self.check_time(time_ms, record.timestamp_ms)?;
        let first_cell = chunk.cells.len();
        chunk.cells.resize(first_cell + self.columns.len(), (0, UNSET));
        value::decode_object(&columns, self, chunk, first_cell)?;
        for (index, column) in self.columns.iter().enumerate() {
            if column.required && chunk.cells[first_cell + index].1 == UNSET {
                return Err(reason(
                    "MissingColumn",
                    format!("column `{}` is required, but it is absent or null", column.name),
                ));
            }
        }
        let cell = |index: usize| cell(chunk, first_cell + index);
        let mut groups = [0u16; MAX_GROUP_BY];
        for (slot, (column, index)) in groups.iter_mut().zip(&self.groups) {
            *slot = index.group(self.columns[*column].cql_type, cell(*column));
        }
        let measured: Vec<f64> = self
            .measures
            .iter()
            .map(|c| cell(*c).and_then(|bytes| number(self.columns[*c].cql_type, bytes)).unwrap_or(f64::NAN))
            .collect();
        chunk.measures.extend_from_slice(&measured);
        let id_at = append(&mut chunk.arena, &id);
        let run_id = record
            .header(event::HEADER_RUN_ID)
            .filter(|r| r.len() <= MAX_ID_BYTES && std::str::from_utf8(r).is_ok());
        let run_id = run_id.map_or((0, UNSET), |r| append(&mut chunk.arena, r));
        chunk.events.push(DecodedEvent {
            offset: record.offset,
            time_ms,
            watermark_ms: self.mapping.watermark_of(time_ms, record.timestamp_ms),
            hash: event::seen_hash(time_ms, &id),
            shard: event::shard(self.partition, self.shards, &id),
            groups,
            produced_at_us: record.header(event::HEADER_PRODUCED_AT).and_then(parse_number).unwrap_or(0),
            id: (id_at.0, id.len() as u32),
            run_id,
        });
        Ok(())
    }

    fn check_time(&self, time_ms: i64, timestamp_ms: i64) -> Result<(), Reason> {
        if time_ms > timestamp_ms.saturating_add(self.mapping.ahead_ms) {
            let (ahead, most) = (time_ms.saturating_sub(timestamp_ms) / 1000, self.mapping.ahead_ms / 1000);
            return Err(reason(
                "EventTimeInFuture",
                format!(
                    "event time is {ahead} s ahead of the record's timestamp, the maximum is {most} s (event.ahead)"
                ),
            ));
        }
        if self.horizon_ms.is_some_and(|horizon| time_ms < timestamp_ms.saturating_sub(horizon)) {
            let message = "event time is too old: rows of that age may have expired (store.ttl)";
            return Err(reason("EventTimeBeyondHorizon", message));
        }
        Ok(())
    }
}

fn append(arena: &mut Vec<u8>, bytes: &[u8]) -> (u32, i32) {
    let start = arena.len() as u32;
    arena.extend_from_slice(bytes);
    (start, bytes.len() as i32)
}

fn cell(chunk: &Chunk, at: usize) -> Option<&[u8]> {
    let (start, len) = chunk.cells[at];
    (len >= 0).then(|| &chunk.arena[start as usize..start as usize + len.unsigned_abs() as usize])
}

fn parse_number(text: &[u8]) -> Option<i64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Reads a CQL cell as a number, for measures and step groups. `None` if its type is not numeric.
pub(crate) fn number(cql_type: CqlType, cell: &[u8]) -> Option<f64> {
    match cql_type {
        CqlType::Int => Some(f64::from(i32::from_be_bytes(cell.try_into().ok()?))),
        CqlType::Bigint => Some(i64::from_be_bytes(cell.try_into().ok()?) as f64),
        CqlType::Double => Some(f64::from_be_bytes(cell.try_into().ok()?)),
        _ => None,
    }
}

impl GroupIndex {
    /// Creates the index for the groups of one column.
    pub fn new(groups: &Groups) -> GroupIndex {
        GroupIndex(match groups {
            Groups::Values(values) => Index::Values(index_by_name(values), values.len() as u16),
            Groups::Step { from, step, count } => Index::Step { from: *from, step: *step, count: *count },
        })
    }

    /// Returns the group of a cell's CQL bytes. An absent or unlisted value belongs to the last group.
    pub fn group(&self, cql_type: CqlType, cell: Option<&[u8]>) -> u16 {
        match &self.0 {
            Index::Values(values, other) => {
                let Some(cell) = cell else { return *other };
                let found = match cql_type {
                    CqlType::Boolean => values.get(if cell == [1] { b"true".as_slice() } else { b"false" }),
                    CqlType::Int | CqlType::Bigint => {
                        number(cql_type, cell).and_then(|n| values.get(format!("{n}").as_bytes()))
                    }
                    _ => values.get(cell),
                };
                found.copied().unwrap_or(*other)
            }
            Index::Step { from, step, count } => {
                let Some(value) = cell.and_then(|c| number(cql_type, c)) else { return *count };
                let index = ((value - from) / step).floor();
                if index >= 0.0 && index < f64::from(*count) { index as u16 } else { *count }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Decoder, Record};
    use crate::record::chunk::Chunk;
    use common::contracts::stream::Definition;
    use proptest::prelude::*;

    const NOW: i64 = 1_800_000_000_000;

    fn decoder() -> Decoder {
        let text = include_str!("../../../../streams/user_created.toml");
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
        assert_eq!(
            (event.offset, event.time_ms, chunk.id(event)),
            (7, 1_800_000_000_123, b"id-1".as_slice())
        );
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
        for headers in [&[("ce_time", None)][..], &[]] {
            decoder.decode(&Record { offset: 0, timestamp_ms: NOW, key: None, value, headers }, &mut chunk);
        }
        let reasons: Vec<_> = chunk.poison.iter().map(|poison| poison.reason.message.as_str()).collect();
        let plain = "header ce_id is missing: the record is in plain mode, and event.accept does not contain \"plain\"";
        assert_eq!(reasons, ["header ce_id is missing", plain]);
    }

    #[test]
    fn an_event_may_be_as_far_ahead_as_the_definition_says() {
        let text = include_str!("../../../../streams/user_created.toml");
        let decode = |ahead: &str, time_ms: i64| {
            let text = text.replace("[event]", &format!("[event]\nahead = \"{ahead}\""));
            let decoder = Decoder::new(&Definition::parse("user_created.toml", &text).unwrap(), 2);
            let time = chrono::DateTime::from_timestamp_millis(time_ms).unwrap().to_rfc3339();
            let (headers, value) = (headers("i", &time), Some(GOOD.as_bytes()));
            let mut chunk = decoder.chunk();
            let record = Record { offset: 7, timestamp_ms: NOW, key: None, value, headers: &headers };
            decoder.decode(&record, &mut chunk);
            match chunk.events.first() {
                Some(event) => Ok((event.time_ms - NOW, event.watermark_ms - NOW)),
                None => Err(chunk.poison[0].reason.to_string()),
            }
        };
        const HOUR: i64 = 3_600_000;
        assert_eq!(decode("1h", NOW + HOUR), Ok((HOUR, HOUR)));
        assert_eq!(decode("7d", NOW + 168 * HOUR), Ok((168 * HOUR, 0)));
        assert_eq!(decode("7d", NOW - HOUR), Ok((-HOUR, -HOUR)));
        let limit = "EventTimeInFuture: event time is 604801 s ahead of the record's timestamp, the maximum is 604800 s \
                     (event.ahead)";
        assert_eq!(decode("7d", NOW + 168 * HOUR + 1000), Err(limit.to_owned()));
    }

    #[test]
    fn a_record_refused_by_the_producer_keeps_its_reason_even_if_it_could_be_decoded() {
        let decoder = decoder();
        let mut chunk = decoder.chunk();
        let refused = ("ingest_refused", Some(b"event.id: no value at `/id`".as_slice()));
        let headers = [headers("a", TIME), vec![refused]].concat();
        let value = Some(GOOD.as_bytes());
        decoder.decode(
            &Record { offset: 0, timestamp_ms: NOW, key: None, value, headers: &headers },
            &mut chunk,
        );
        let reason = &chunk.poison[0].reason;
        assert_eq!(reason.to_string(), "RefusedByProducer: event.id: no value at `/id`");
    }

    /// Returns the cell of a column of type `cql_type` for the JSON value `raw`. `None` if the record is undecodable.
    fn cell(cql_type: &str, raw: &str) -> Option<Vec<u8>> {
        let text = include_str!("../../../../streams/user_created.toml");
        let text = text.replace(
            "name = \"email\"\ntype = \"text\"",
            &format!("name = \"email\"\ntype = \"{cql_type}\""),
        );
        let decoder = Decoder::new(&Definition::parse("user_created.toml", &text).unwrap(), 2);
        let value = format!("{{\"first_name\":\"A\",\"last_name\":\"B\",\"email\":{raw}}}");
        let mut chunk = decoder.chunk();
        let (headers, value) = (headers("i", TIME), Some(value.as_bytes()));
        decoder.decode(
            &Record { offset: 7, timestamp_ms: NOW, key: None, value, headers: &headers },
            &mut chunk,
        );
        chunk.poison.is_empty().then(|| chunk.columns_of(0).nth(3).unwrap().unwrap().to_vec())
    }

    #[test]
    fn numbers_keep_all_their_digits() {
        let text = |raw: &str| cell("text", raw).map(|bytes| String::from_utf8(bytes).unwrap());
        for raw in ["12345678901234567890124", "18446744073709551616", "0.10", "-1e400", "2.50e-3"] {
            assert_eq!(text(raw).as_deref(), Some(raw));
        }
        let bigint =
            |raw: &str| cell("bigint", raw).map(|bytes| i64::from_be_bytes(bytes.try_into().unwrap()));
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
        let text = include_str!("../../../../streams/user_created.toml");
        let text = text.replace(
            "name = \"age\"\ntype = \"int\"",
            "name = \"age\"\ntype = \"int\"\non_misfit = \"null\"",
        );
        let decoder = Decoder::new(&Definition::parse("user_created.toml", &text).unwrap(), 2);
        let mut chunk = decoder.chunk();
        let decode = |value: &str, chunk: &mut Chunk| {
            let (headers, value) = (headers("i", TIME), Some(value.as_bytes()));
            decoder
                .decode(&Record { offset: 7, timestamp_ms: NOW, key: None, value, headers: &headers }, chunk);
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
}
