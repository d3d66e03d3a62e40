//! Decodes a Kafka record into an event, or into an undecodable record with a reason. Pure: the result depends on the
//! record alone, so a replay decodes it the same way.

mod value;

use crate::record::chunk::{Chunk, DecodedEvent, Poison, Reason, UNSET};
use common::contracts::event::{self, MAX_AHEAD_MS, MAX_EVENT_TIME_MS, MIN_EVENT_TIME_MS};
use common::contracts::stream::{Column, CqlType, Definition, Groups, MAX_GROUP_BY};
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

/// Decodes the records of one partition according to a stream definition.
#[derive(Debug)]
pub struct Decoder {
    partition: i32,
    pane_ms: i64,
    shards: u32,
    /// Maximum age of an event relative to its record's timestamp. `None` if rows never expire.
    horizon_ms: Option<i64>,
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
            horizon_ms: definition.store.horizon_ms(),
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
        let header = |name: &str| record.headers.iter().find(|(n, _)| *n == name).and_then(|(_, v)| *v);
        let value = record.value.ok_or_else(|| reason("Tombstone", "the record has no value"))?;
        if value.len() > MAX_VALUE_BYTES {
            let message = format!("the value has {} bytes, the maximum is {MAX_VALUE_BYTES}", value.len());
            return Err(reason("TooLarge", message));
        }
        if let Some(cause) = header(event::HEADER_REFUSED) {
            return Err(reason("RefusedByProducer", String::from_utf8_lossy(cause)));
        }
        let id = header(event::HEADER_ID).ok_or_else(|| missing(event::HEADER_ID))?;
        if id.is_empty() || id.len() > MAX_ID_BYTES || std::str::from_utf8(id).is_err() {
            let message = format!("header {} must be 1 to {MAX_ID_BYTES} bytes of UTF-8", event::HEADER_ID);
            return Err(reason("InvalidEventId", message));
        }
        let time_ms = event_time(header(event::HEADER_TIME).ok_or_else(|| missing(event::HEADER_TIME))?)?;
        self.check_time(time_ms, record.timestamp_ms)?;
        let first_cell = chunk.cells.len();
        chunk.cells.resize(first_cell + self.columns.len(), (0, UNSET));
        value::decode_object(value, self, chunk, first_cell)?;
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
        let id_at = append(&mut chunk.arena, id);
        let run_id = header(event::HEADER_RUN_ID)
            .filter(|r| r.len() <= MAX_ID_BYTES && std::str::from_utf8(r).is_ok());
        let run_id = run_id.map_or((0, UNSET), |r| append(&mut chunk.arena, r));
        chunk.events.push(DecodedEvent {
            offset: record.offset,
            time_ms,
            hash: event::seen_hash(time_ms, id),
            shard: event::shard(self.partition, self.shards, id),
            groups,
            produced_at_us: header(event::HEADER_PRODUCED_AT).and_then(parse_number).unwrap_or(0),
            id: (id_at.0, id.len() as u32),
            run_id,
        });
        Ok(())
    }

    fn check_time(&self, time_ms: i64, timestamp_ms: i64) -> Result<(), Reason> {
        if time_ms > timestamp_ms.saturating_add(MAX_AHEAD_MS) {
            let ahead = time_ms.saturating_sub(timestamp_ms) / 1000;
            return Err(reason(
                "EventTimeInFuture",
                format!("event time is {ahead} s ahead of the record's timestamp, the maximum is 1 h"),
            ));
        }
        if self.horizon_ms.is_some_and(|horizon| time_ms < timestamp_ms.saturating_sub(horizon)) {
            let message = "event time is too old: rows of that age may have expired (store.ttl)";
            return Err(reason("EventTimeBeyondHorizon", message));
        }
        Ok(())
    }
}

fn missing(header: &str) -> Reason {
    reason("MissingHeader", format!("header {header} is missing"))
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

/// Parses RFC 3339 text into Unix milliseconds. Finer digits are truncated.
fn event_time(text: &[u8]) -> Result<i64, Reason> {
    let invalid = || {
        let shown = String::from_utf8_lossy(&text[..text.len().min(64)]).into_owned();
        reason(
            "InvalidEventTime",
            format!("header {}: `{shown}` is not an RFC 3339 time", event::HEADER_TIME),
        )
    };
    let text = std::str::from_utf8(text).map_err(|_| invalid())?;
    let at = chrono::DateTime::parse_from_rfc3339(text).map_err(|_| invalid())?.timestamp_millis();
    if !(MIN_EVENT_TIME_MS..=MAX_EVENT_TIME_MS).contains(&at) {
        return Err(reason("InvalidEventTime", format!("event time {text} is outside 1970 to 9999")));
    }
    Ok(at)
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
mod tests;
