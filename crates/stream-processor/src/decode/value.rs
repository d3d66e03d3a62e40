//! One flat JSON object → CQL bytes of the declared columns, in one pass and without a tree in between.

use super::{Decoder, reason};
use crate::chunk::{Chunk, Reason, UNSET};
use common::stream::CqlType;
use serde::de::{DeserializeSeed, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use std::fmt;
use uuid::Uuid;

/// Writes the members of the object that are declared columns into the cells from `first_cell` on.
pub(super) fn decode_object(
    json: &[u8],
    decoder: &Decoder,
    chunk: &mut Chunk,
    first_cell: usize,
) -> Result<(), Reason> {
    let mut parser = serde_json::Deserializer::from_slice(json);
    let read = ObjectSeed { decoder, chunk, first_cell }.deserialize(&mut parser).and_then(|()| parser.end());
    read.map_err(|e| reason(if e.is_data() { "InvalidColumn" } else { "InvalidJson" }, e.to_string()))
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
            let seed =
                CellSeed { name: &column.name, cql_type: column.cql_type, arena: &mut self.chunk.arena };
            self.chunk.cells[self.first_cell + index] = map.next_value_seed(seed)?;
        }
        Ok(())
    }
}

/// A member's name → the column's number.
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

/// A member's value → its CQL bytes at the end of the arena.
struct CellSeed<'a> {
    name: &'a str,
    cql_type: CqlType,
    arena: &'a mut Vec<u8>,
}

impl CellSeed<'_> {
    fn put<E>(self, bytes: &[u8]) -> Result<(u32, i32), E> {
        Ok(super::append(self.arena, bytes))
    }

    fn wrong<E: Error>(&self, found: impl fmt::Display) -> E {
        let shown: String = found.to_string().chars().take(64).collect();
        E::custom(format!("column `{}`: `{shown}` is no {}", self.name, self.cql_type.name()))
    }
}

impl<'de> DeserializeSeed<'de> for CellSeed<'_> {
    type Value = (u32, i32);
    fn deserialize<D: serde::Deserializer<'de>>(self, d: D) -> Result<Self::Value, D::Error> {
        d.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for CellSeed<'_> {
    type Value = (u32, i32);

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a {} for column `{}`", self.cql_type.name(), self.name)
    }

    fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
        Ok((0, UNSET))
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Self::Value, E> {
        match self.cql_type {
            CqlType::Boolean => self.put(&[u8::from(value)]),
            CqlType::Text => self.put(if value { b"true" } else { b"false" }),
            _ => Err(self.wrong(value)),
        }
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Self::Value, E> {
        match self.cql_type {
            CqlType::Int => match i32::try_from(value) {
                Ok(small) => self.put(&small.to_be_bytes()),
                Err(_) => Err(self.wrong(value)),
            },
            CqlType::Bigint | CqlType::Timestamp => self.put(&value.to_be_bytes()),
            CqlType::Double => self.put(&(value as f64).to_be_bytes()),
            CqlType::Text => self.put(value.to_string().as_bytes()),
            CqlType::Boolean | CqlType::Uuid => Err(self.wrong(value)),
        }
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Self::Value, E> {
        match i64::try_from(value) {
            Ok(value) => self.visit_i64(value),
            Err(_) if self.cql_type == CqlType::Double => self.put(&(value as f64).to_be_bytes()),
            Err(_) if self.cql_type == CqlType::Text => self.put(value.to_string().as_bytes()),
            Err(_) => Err(self.wrong(value)),
        }
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Self::Value, E> {
        match self.cql_type {
            CqlType::Double => self.put(&value.to_be_bytes()),
            CqlType::Text => self.put(value.to_string().as_bytes()),
            _ => Err(self.wrong(value)),
        }
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Self::Value, E> {
        match self.cql_type {
            CqlType::Text => self.put(value.as_bytes()),
            CqlType::Timestamp => match chrono::DateTime::parse_from_rfc3339(value) {
                Ok(at) => self.put(&at.timestamp_millis().to_be_bytes()),
                Err(_) => Err(self.wrong(value)),
            },
            CqlType::Uuid => match Uuid::parse_str(value) {
                Ok(uuid) => self.put(uuid.as_bytes()),
                Err(_) => Err(self.wrong(value)),
            },
            _ => Err(self.wrong(value)),
        }
    }

    fn visit_seq<A: SeqAccess<'de>>(self, _: A) -> Result<Self::Value, A::Error> {
        Err(self.wrong("a list"))
    }

    fn visit_map<A: MapAccess<'de>>(self, _: A) -> Result<Self::Value, A::Error> {
        Err(self.wrong("an object"))
    }
}
