//! Decodes one flat JSON object into the CQL bytes of the declared columns, in one pass and without an intermediate
//! tree. Each member is read as raw text, so numbers keep every digit and a double is the nearest one to the text.

use super::{Decoder, reason};
use crate::record::chunk::{Chunk, Reason, UNSET};
use common::contracts::stream::CqlType;
use serde::de::{DeserializeSeed, Error, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::fmt;
use uuid::Uuid;

/// Maximum number of characters of a value that a reason quotes.
const MAX_SHOWN: usize = 64;

/// Writes the members that are declared columns into the cells of an event, which start at `first_cell`.
pub(super) fn decode_object(
    json: &[u8],
    decoder: &Decoder,
    chunk: &mut Chunk,
    first_cell: usize,
) -> Result<(), Reason> {
    let mut parser = serde_json::Deserializer::from_slice(json);
    let decoded =
        ObjectSeed { decoder, chunk, first_cell }.deserialize(&mut parser).and_then(|()| parser.end());
    decoded.map_err(|e| reason(if e.is_data() { "InvalidColumn" } else { "InvalidJson" }, e.to_string()))
}

struct ObjectSeed<'a> {
    decoder: &'a Decoder,
    chunk: &'a mut Chunk,
    first_cell: usize,
}

impl<'de> DeserializeSeed<'de> for ObjectSeed<'_> {
    type Value = ();
    fn deserialize<D: serde::Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for ObjectSeed<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a flat JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(index) = map.next_key_seed(KeySeed(self.decoder))? {
            let Some(index) = index else {
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            let column = &self.decoder.columns[index];
            let raw = map.next_value::<&RawValue>()?.get();
            let cell = cell(raw, column.cql_type, &mut self.chunk.arena)
                .map_err(|what| A::Error::custom(format!("column `{}`: {what}", column.name)))?;
            self.chunk.cells[self.first_cell + index] = cell;
        }
        Ok(())
    }
}

/// Maps a member name to the index of its column. `None` if no such column is declared.
struct KeySeed<'a>(&'a Decoder);

impl<'de> DeserializeSeed<'de> for KeySeed<'_> {
    type Value = Option<usize>;
    fn deserialize<D: serde::Deserializer<'de>>(self, d: D) -> Result<Self::Value, D::Error> {
        d.deserialize_str(self)
    }
}

impl Visitor<'_> for KeySeed<'_> {
    type Value = Option<usize>;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a member name")
    }
    fn visit_str<E: Error>(self, name: &str) -> Result<Self::Value, E> {
        Ok(self.0.by_name.get(name.as_bytes()).map(|number| usize::from(*number)))
    }
}

/// Appends the CQL bytes of a member to the arena. Returns why the value is invalid for the column type otherwise.
fn cell(raw: &str, cql_type: CqlType, arena: &mut Vec<u8>) -> Result<(u32, i32), String> {
    let mut put = |bytes: &[u8]| Ok(super::append(arena, bytes));
    match (raw.as_bytes()[0], cql_type) {
        (b'n', _) => Ok((0, UNSET)),
        (b'"', CqlType::Text) => put(string(raw)?.as_bytes()),
        (b'"', CqlType::Timestamp) => match chrono::DateTime::parse_from_rfc3339(&string(raw)?) {
            Ok(at) => put(&at.timestamp_millis().to_be_bytes()),
            Err(_) => invalid(raw, cql_type),
        },
        (b'"', CqlType::Uuid) => match Uuid::parse_str(&string(raw)?) {
            Ok(uuid) => put(uuid.as_bytes()),
            Err(_) => invalid(raw, cql_type),
        },
        (b'{' | b'[' | b'"', _) => invalid(raw, cql_type),
        (b't' | b'f', CqlType::Boolean) => put(&[u8::from(raw == "true")]),
        (_, CqlType::Text) => put(raw.as_bytes()),
        (_, CqlType::Int) => match raw.parse::<i32>() {
            Ok(number) => put(&number.to_be_bytes()),
            Err(_) => invalid(raw, cql_type),
        },
        (_, CqlType::Bigint | CqlType::Timestamp) => match raw.parse::<i64>() {
            Ok(number) => put(&number.to_be_bytes()),
            Err(_) => invalid(raw, cql_type),
        },
        // A number outside the range of a double would become infinite.
        (_, CqlType::Double) => match raw.parse::<f64>() {
            Ok(number) if number.is_finite() => put(&number.to_be_bytes()),
            _ => invalid(raw, cql_type),
        },
        (_, CqlType::Boolean | CqlType::Uuid) => invalid(raw, cql_type),
    }
}

/// Returns the characters of a quoted string. A string without escapes is borrowed from the text.
fn string(quoted: &str) -> Result<Cow<'_, str>, String> {
    if quoted.contains('\\') {
        return serde_json::from_str(quoted).map(Cow::Owned).map_err(|e| e.to_string());
    }
    Ok(Cow::Borrowed(&quoted[1..quoted.len() - 1]))
}

fn invalid<T>(raw: &str, cql_type: CqlType) -> Result<T, String> {
    let shown = match raw.as_bytes()[0] {
        b'{' => "an object".to_owned(),
        b'[' => "a list".to_owned(),
        _ => format!("`{}`", raw.trim_matches('"').chars().take(MAX_SHOWN).collect::<String>()),
    };
    Err(format!("{shown} is not a valid {}", cql_type.name()))
}
