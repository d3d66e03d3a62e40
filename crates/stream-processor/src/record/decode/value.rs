//! Decodes one flat JSON object into the CQL bytes of the declared columns, in one pass and without an intermediate
//! tree. Each member is read as raw text, so numbers keep every digit and a double is the nearest one to the text.

use super::{Decoder, reason};
use crate::record::chunk::{Chunk, Reason, UNSET};
use common::contracts::stream::OnMisfit;
use common::contracts::value;
use serde::de::{DeserializeSeed, Error, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;
use std::fmt;
use std::sync::Arc;

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
            let start = self.chunk.arena.len();
            let is_present = match value::encode(raw, column, &mut self.chunk.arena) {
                Err(_) if column.on_misfit == OnMisfit::Null => {
                    self.chunk.misfits.push(Arc::clone(&self.decoder.names[index]));
                    false
                }
                encoded => {
                    encoded.map_err(|what| A::Error::custom(format!("column `{}`: {what}", column.name)))?
                }
            };
            let length = (self.chunk.arena.len() - start) as i32;
            let cell = if is_present { (start as u32, length) } else { (0, UNSET) };
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
