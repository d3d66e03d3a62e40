//! Turns a record of the source into a Kafka record: an event with an id, a time, a key and a flat JSON object of the
//! declared columns. Values are copied as text, so that every digit of a number reaches the processor. Pure.
//!
//! The processor reads records that other programs wrote to Kafka in the same way ([`Extractor::plain_event`]).
//!
//! A record that cannot become an event neither is dropped nor fails its page. It is produced to Kafka unchanged, with
//! the reason, and the processor writes it to the dead letters.

use super::event::{MAX_EVENT_TIME_MS, MIN_EVENT_TIME_MS, derived_event_id, derived_event_time};
use super::run_ledger::Interval;
use super::scan::{self, NotJson};
use super::stream::{Definition, EventTime};
use super::time::{TimeError, TimeReading};
use serde_json::value::RawValue;
use std::borrow::Cow;

/// Maximum length of an id or key in bytes.
const MAX_ID_BYTES: usize = 1024;
/// Maximum size of a Kafka value in bytes. It is below `crate::runtime::kafka::MAX_MESSAGE_BYTES`, which includes key and
/// headers.
const MAX_VALUE_BYTES: usize = (4 << 20) - (64 << 10);
/// How many bytes of a larger record are kept.
const MAX_EXCERPT_BYTES: usize = 64 << 10;
/// Maximum length of a value quoted in a reason, in characters.
const MAX_SHOWN: usize = 64;

/// A record of a page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record<'a> {
    /// JSON text of the record.
    pub text: Cow<'a, [u8]>,
    /// JSON text of the value that the nearest wildcard above the record matched.
    pub parent: Option<&'a [u8]>,
    /// Name of the member that the last wildcard matched; absent in arrays.
    pub key: Option<Cow<'a, str>>,
}

impl<'a> Record<'a> {
    /// A record that nothing surrounds.
    pub fn plain(text: impl Into<Cow<'a, [u8]>>) -> Record<'a> {
        Record { text: text.into(), parent: None, key: None }
    }
}

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

/// A value of `source.for_each`: names and JSON texts.
pub type Each = Vec<(String, String)>;

/// Where the value of a pointer comes from.
#[derive(Debug)]
enum Origin {
    /// A slot of the pointers into the record.
    Record(usize),
    /// A slot of the pointers into the parent of the record.
    Parent(usize),
    /// A slot of the pointers into the page.
    Page(usize),
    /// A value of `source.for_each`.
    Each(String),
    /// The name under which the record was found.
    Key,
}

/// A pointer of the definition and where its value comes from.
#[derive(Debug)]
struct Located {
    pointer: String,
    origin: Origin,
}

/// Values that all records of a page share.
#[derive(Debug)]
pub struct Surroundings<'a> {
    interval: Interval,
    each: &'a Each,
    page: Vec<Option<&'a [u8]>>,
}

/// The values of one record.
struct Values<'a> {
    record: Vec<Option<&'a [u8]>>,
    parent: Vec<Option<&'a [u8]>>,
    key: Option<String>,
    around: &'a Surroundings<'a>,
}

impl Values<'_> {
    fn get(&self, located: &Located) -> Option<&[u8]> {
        match &located.origin {
            Origin::Record(slot) => self.record[*slot],
            Origin::Parent(slot) => self.parent.get(*slot).copied().flatten(),
            Origin::Page(slot) => self.around.page.get(*slot).copied().flatten(),
            Origin::Key => self.key.as_deref().map(str::as_bytes),
            Origin::Each(name) => {
                self.around.each.iter().find(|(known, _)| known == name).map(|(_, raw)| raw.as_bytes())
            }
        }
    }
}

/// Turns the records of one stream into events.
#[derive(Debug)]
pub struct Extractor {
    stream: String,
    id: Vec<Located>,
    key: Option<Located>,
    time: Option<(Located, TimeReading)>,
    columns: Vec<(String, Located)>,
    record: Pointers,
    parent: Pointers,
    page: Pointers,
}

impl Extractor {
    /// Creates the extractor of a stream definition.
    pub fn new(definition: &Definition) -> Extractor {
        let mapping = &definition.event;
        let (mut record, mut parent, mut page) =
            (Pointers::default(), Pointers::default(), Pointers::default());
        let mut locate = |pointer: &String| {
            let origin = match pointer.split_once(':') {
                Some(("page", inner)) => Origin::Page(page.add(inner)),
                Some(("parent", inner)) => Origin::Parent(parent.add(inner)),
                Some(("each", name)) => Origin::Each(name.to_owned()),
                Some(("key", "")) => Origin::Key,
                _ => Origin::Record(record.add(pointer)),
            };
            Located { pointer: pointer.clone(), origin }
        };
        Extractor {
            stream: definition.stream.name.clone(),
            id: mapping.id.iter().map(&mut locate).collect(),
            key: mapping.key.as_ref().map(&mut locate),
            time: match &mapping.time {
                EventTime::Interval => None,
                EventTime::Field { pointer, reading } => Some((locate(pointer), reading.clone())),
            },
            columns: definition.columns.iter().map(|c| (c.name.clone(), locate(&c.pointer))).collect(),
            record,
            parent,
            page,
        }
    }

    /// Resolves what the records of a page share. `body` is its JSON text, or empty.
    pub fn surroundings<'a>(
        &self,
        interval: Interval,
        each: &'a Each,
        body: &'a [u8],
    ) -> Result<Surroundings<'a>, NotJson> {
        let page = if self.page.is_empty() || body.is_empty() { vec![] } else { self.page.read(body)? };
        Ok(Surroundings { interval, each, page })
    }

    /// Converts a record. `index` is its position in the interval, counted over all pages from 0.
    pub fn outgoing(&self, around: &Surroundings<'_>, index: u64, record: &Record<'_>) -> Outgoing {
        let text = record.text.as_ref();
        self.event(around, index, record).map_or_else(
            |reason| {
                let kept = if text.len() > MAX_VALUE_BYTES { MAX_EXCERPT_BYTES } else { text.len() };
                Outgoing::Refused(Refused {
                    reason,
                    key: derived_event_id(&self.stream, around.interval.start_ms, index).to_string(),
                    value: text[..kept].to_vec(),
                })
            },
            Outgoing::Event,
        )
    }

    /// Converts a record that another program wrote to Kafka in plain mode, which has no page around it. A definition
    /// that accepts plain records takes id, time, key and columns from the record alone.
    pub fn plain_event(&self, text: &[u8]) -> Result<Event, String> {
        let (each, page) = (Each::new(), vec![]);
        let around = Surroundings { interval: Interval { start_ms: 0, end_ms: 0 }, each: &each, page };
        self.event(&around, 0, &Record::plain(text))
    }

    fn event(&self, around: &Surroundings<'_>, index: u64, record: &Record<'_>) -> Result<Event, String> {
        let mut text = record.text.as_ref();
        let clean;
        if let Err(e) = serde_json::from_slice::<&RawValue>(text) {
            clean = without_nan(text).ok_or_else(|| format!("the record is not valid JSON: {e}"))?;
            text = &clean;
        }
        let invalid = |e: NotJson| format!("the record is not valid JSON: {e}");
        let parent = match record.parent {
            Some(parent) if !self.parent.is_empty() => self.parent.read(parent).map_err(invalid)?,
            _ => vec![],
        };
        let key = record.key.as_ref().map(|key| serde_json::Value::from(key.as_ref()).to_string());
        let values = Values { record: self.record.read(text).map_err(invalid)?, parent, key, around };
        let id = self.id(&values)?;
        let id =
            id.unwrap_or_else(|| derived_event_id(&self.stream, around.interval.start_ms, index).to_string());
        let own_key = self.key.as_ref().filter(|key| values.get(key).is_some_and(|raw| raw != b"null"));
        let key = match own_key {
            Some(key) => identity("event.key", key, &values)?,
            None => id.clone(),
        };
        let time_ms = match &self.time {
            None => derived_event_time(&self.stream, around.interval, &id),
            Some((pointer, reading)) => time(pointer, reading, &values)?,
        };
        Ok(Event { id, time_ms, key, value: self.flat(&values)? })
    }

    /// The id of a record, or `None` if the definition names none. The parts of an id are joined with colons.
    fn id(&self, values: &Values<'_>) -> Result<Option<String>, String> {
        match self.id.as_slice() {
            [] => Ok(None),
            [pointer] => identity("event.id", pointer, values).map(Some),
            pointers => {
                let parts = pointers.iter().map(|pointer| {
                    // Without escaping, the parts `a:b` and `c` would form the same id as `a` and `b:c`.
                    identity("event.id", pointer, values)
                        .map(|part| part.replace('%', "%25").replace(':', "%3A"))
                });
                let id = parts.collect::<Result<Vec<_>, _>>()?.join(":");
                if id.len() > MAX_ID_BYTES {
                    return Err(format!(
                        "event.id: the id has {} bytes; it may have {MAX_ID_BYTES}",
                        id.len()
                    ));
                }
                Ok(Some(id))
            }
        }
    }

    /// The object `{column: value}` of the declared columns that are present, in the order of the definition.
    fn flat(&self, values: &Values<'_>) -> Result<Vec<u8>, String> {
        let mut object = Vec::with_capacity(32 * self.columns.len());
        object.push(b'{');
        for (name, pointer) in &self.columns {
            let Some(value) = values.get(pointer).filter(|raw| *raw != b"null") else { continue };
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

/// A set of pointers that are resolved in one pass over a value. Equal pointers share a slot.
#[derive(Debug, Default)]
struct Pointers {
    root: Node,
    slots: usize,
}

/// A node of the trie of pointer tokens.
#[derive(Debug, Default)]
struct Node {
    slot: Option<usize>,
    inner: Vec<(String, Node)>,
}

impl Pointers {
    /// Adds a pointer and returns its slot.
    fn add(&mut self, pointer: &str) -> usize {
        let node = scan::tokens(pointer).fold(&mut self.root, Node::child);
        *node.slot.get_or_insert_with(|| {
            self.slots += 1;
            self.slots - 1
        })
    }

    fn is_empty(&self) -> bool {
        self.slots == 0
    }

    /// The JSON text of the value of each slot.
    fn read<'a>(&self, value: &'a [u8]) -> Result<Vec<Option<&'a [u8]>>, NotJson> {
        let mut found = vec![None; self.slots];
        self.root.read(value, &mut found)?;
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
fn identity(key: &str, located: &Located, values: &Values<'_>) -> Result<String, String> {
    let pointer = &located.pointer;
    let raw = values.get(located).ok_or_else(|| format!("{key}: no value at `{pointer}`"))?;
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

/// Reads the event time, within the years 1970 to 9999.
fn time(located: &Located, reading: &TimeReading, values: &Values<'_>) -> Result<i64, String> {
    let pointer = &located.pointer;
    let raw = values.get(located).ok_or_else(|| format!("event.time: no value at `{pointer}`"))?;
    let text = match raw.first() {
        Some(b'"') => string(raw).map_err(|e| format!("event.time: {} at `{pointer}`: {e}", shown(raw)))?,
        _ => String::from_utf8_lossy(raw).into_owned(),
    };
    let ms = reading.read(&text).map_err(|e| {
        let way_out = match e {
            TimeError::NoZone => " (event.time_zone)",
            TimeError::Unreadable { .. } => " (event.time_unit, event.time_format)",
            TimeError::Skipped(_) | TimeError::OtherFormat(_) => "",
        };
        format!("event.time: {} at `{pointer}` {e}{way_out}", shown(raw))
    })?;
    if (MIN_EVENT_TIME_MS..=MAX_EVENT_TIME_MS).contains(&ms) {
        return Ok(ms);
    }
    Err(format!("event.time: {} at `{pointer}` is outside of the years 1970 to 9999", shown(raw)))
}

/// Describes the type of a JSON value by its first byte, for messages.
pub fn kind(first: Option<&u8>) -> &'static str {
    match first {
        None => "absent",
        Some(b'n') => "null",
        Some(b't' | b'f') => "a boolean",
        Some(b'"') => "a string",
        Some(b'[') => "an array",
        Some(b'{') => "an object",
        Some(_) => "a number",
    }
}

/// Replaces `NaN` and `Infinity`, which some programs write although JSON has no such values, with `null`. Returns
/// `None` if the record does not contain them.
pub fn without_nan(record: &[u8]) -> Option<Vec<u8>> {
    let mut clean = Vec::with_capacity(record.len());
    let (mut at, mut replaced) = (0, false);
    while at < record.len() {
        let rest = &record[at..];
        if rest[0] == b'"' {
            let length = scan::string_length(rest)?;
            clean.extend_from_slice(&rest[..length]);
            at += length;
            continue;
        }
        let token =
            ["-Infinity", "Infinity", "NaN"].into_iter().find(|token| rest.starts_with(token.as_bytes()));
        match token {
            Some(token) => {
                clean.extend_from_slice(b"null");
                at += token.len();
                replaced = true;
            }
            None => {
                clean.push(rest[0]);
                at += 1;
            }
        }
    }
    (replaced && serde_json::from_slice::<&RawValue>(&clean).is_ok()).then_some(clean)
}

fn string(quoted: &[u8]) -> Result<String, serde_json::Error> {
    serde_json::from_slice(quoted)
}

fn shown(raw: &[u8]) -> String {
    let text = String::from_utf8_lossy(&raw[..raw.len().min(4 * MAX_SHOWN)]);
    format!("`{}`", text.chars().take(MAX_SHOWN).collect::<String>())
}

#[cfg(test)]
mod tests;
