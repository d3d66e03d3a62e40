//! The content mode of a record, and where the record carries the id, the time and the columns of its event.

use super::{MAX_ID_BYTES, Record, reason};
use crate::record::chunk::Reason;
use common::contracts::event::{self, MAX_EVENT_TIME_MS, MIN_EVENT_TIME_MS};
use common::contracts::extract::{Extractor, kind};
use common::contracts::stream::{ContentMode, Definition};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::value::RawValue;
use std::borrow::Cow;

/// Prefix of the headers that carry CloudEvents attributes in binary mode.
const ATTRIBUTE_PREFIX: &str = "ce_";
/// Prefix of the content types of structured mode. Types are compared in any case.
const STRUCTURED_PREFIX: &str = "application/cloudevents";
/// The content type of an envelope in JSON.
const ENVELOPE_TYPE: &str = "application/cloudevents+json";

/// What an event consists of.
#[derive(Debug)]
pub(super) struct Parts<'a> {
    /// Id: 1 to [`MAX_ID_BYTES`] bytes of UTF-8.
    pub(super) id: Cow<'a, [u8]>,
    /// Event time in Unix milliseconds, within the years 1970 to 9999.
    pub(super) time_ms: i64,
    /// JSON text of the object of the declared columns.
    pub(super) columns: Cow<'a, [u8]>,
}

/// The content modes that a stream accepts.
#[derive(Debug)]
pub(super) struct Modes {
    accept: Vec<ContentMode>,
    /// Reads plain records.
    extractor: Extractor,
}

/// A CloudEvent in the JSON event format.
#[derive(Deserialize)]
struct Envelope<'a> {
    #[serde(borrow)]
    specversion: Option<Cow<'a, str>>,
    #[serde(borrow)]
    id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    time: Option<Cow<'a, str>>,
    #[serde(borrow)]
    data: Option<&'a RawValue>,
    data_base64: Option<IgnoredAny>,
}

impl Modes {
    pub(super) fn new(definition: &Definition) -> Modes {
        Modes { accept: definition.event.accept.clone(), extractor: Extractor::new(definition) }
    }

    /// Takes a record with this value apart, if the stream accepts its mode.
    pub(super) fn parts<'a>(&self, record: &Record<'a>, value: &'a [u8]) -> Result<Parts<'a>, Reason> {
        let mode = self.mode_of(record);
        match mode {
            _ if !self.accept.contains(&mode) => Err(not_accepted(mode)),
            ContentMode::Binary => binary(record, value),
            ContentMode::Structured => structured(content_type(record), value),
            ContentMode::Plain => {
                let event = self.extractor.plain_event(value).map_err(|e| reason("InvalidPlainRecord", e))?;
                let id = Cow::Owned(event.id.into_bytes());
                Ok(Parts { id, time_ms: event.time_ms, columns: Cow::Owned(event.value) })
            }
        }
    }

    /// The mode of a record depends on its headers only. A record in structured mode may repeat its attributes as
    /// headers. If the stream does not accept structured mode, these headers make the record a binary one.
    fn mode_of(&self, record: &Record<'_>) -> ContentMode {
        let has_attributes = record.headers.iter().any(|(name, _)| name.starts_with(ATTRIBUTE_PREFIX));
        let may_be_structured = !has_attributes || self.accept.contains(&ContentMode::Structured);
        if may_be_structured && is_structured(content_type(record)) {
            return ContentMode::Structured;
        }
        if has_attributes { ContentMode::Binary } else { ContentMode::Plain }
    }
}

fn content_type<'a>(record: &Record<'a>) -> &'a [u8] {
    let mut headers = record.headers.iter();
    let found = headers.find(|(name, _)| name.eq_ignore_ascii_case(event::HEADER_CONTENT_TYPE));
    found.and_then(|(_, value)| *value).map_or(&[], <[u8]>::trim_ascii)
}

fn is_structured(content_type: &[u8]) -> bool {
    let prefix = content_type.get(..STRUCTURED_PREFIX.len());
    prefix.is_some_and(|prefix| prefix.eq_ignore_ascii_case(STRUCTURED_PREFIX.as_bytes()))
}

fn not_accepted(mode: ContentMode) -> Reason {
    let name = mode.name();
    let setting = format!("event.accept does not contain \"{name}\"");
    match mode {
        ContentMode::Plain => {
            let header = event::HEADER_ID;
            let message = format!("header {header} is missing: the record is in {name} mode, and {setting}");
            reason("MissingHeader", message)
        }
        _ => reason("ModeNotAccepted", format!("the record is in {name} mode, and {setting}")),
    }
}

fn binary<'a>(record: &Record<'a>, value: &'a [u8]) -> Result<Parts<'a>, Reason> {
    let header = |name: &str| {
        let missing = || reason("MissingHeader", format!("header {name} is missing"));
        record.header(name).ok_or_else(missing)
    };
    let id = valid_id(header(event::HEADER_ID)?, "header ce_id")?;
    let time_ms = event_time(header(event::HEADER_TIME)?, "header ce_time")?;
    Ok(Parts { id: Cow::Borrowed(id), time_ms, columns: Cow::Borrowed(value) })
}

fn structured<'a>(content_type: &[u8], value: &'a [u8]) -> Result<Parts<'a>, Reason> {
    let invalid = |message: String| reason("InvalidEnvelope", message);
    let media_type = content_type.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii();
    if !media_type.eq_ignore_ascii_case(ENVELOPE_TYPE.as_bytes()) {
        let media_type = String::from_utf8_lossy(media_type);
        return Err(invalid(format!(
            "content type {media_type} is not supported; send one event per record as {ENVELOPE_TYPE}"
        )));
    }
    let first = value.trim_ascii_start().first();
    if first != Some(&b'{') {
        return Err(invalid(format!("the envelope is {}; it must be an object", kind(first))));
    }
    let envelope: Envelope<'_> =
        serde_json::from_slice(value).map_err(|e| invalid(format!("the envelope cannot be read: {e}")))?;
    let missing = |name: &str| invalid(format!("member {name} of the envelope is missing"));
    let version = envelope.specversion.ok_or_else(|| missing("specversion"))?;
    if version != event::SPEC_VERSION {
        let expected = event::SPEC_VERSION;
        return Err(invalid(format!("member specversion is `{version}`; it must be `{expected}`")));
    }
    let id = envelope.id.ok_or_else(|| missing("id"))?;
    valid_id(id.as_bytes(), "member id")?;
    let time_ms = event_time(envelope.time.ok_or_else(|| missing("time"))?.as_bytes(), "member time")?;
    if envelope.data_base64.is_some() {
        return Err(invalid(
            "member data_base64 is not supported; send the columns as the object data".into(),
        ));
    }
    let columns = envelope.data.ok_or_else(|| missing("data"))?.get().as_bytes();
    if columns.first() != Some(&b'{') {
        let kind = kind(columns.first());
        return Err(invalid(format!("member data is {kind}; it must be an object of the declared columns")));
    }
    let id = Cow::Owned(id.into_owned().into_bytes());
    Ok(Parts { id, time_ms, columns: Cow::Borrowed(columns) })
}

/// Checks an id. `place` names where it is.
fn valid_id<'a>(id: &'a [u8], place: &str) -> Result<&'a [u8], Reason> {
    if id.is_empty() || id.len() > MAX_ID_BYTES || std::str::from_utf8(id).is_err() {
        let message = format!("{place} must be 1 to {MAX_ID_BYTES} bytes of UTF-8");
        return Err(reason("InvalidEventId", message));
    }
    Ok(id)
}

/// Parses RFC 3339 text into Unix milliseconds. Finer digits are truncated. `place` names where the text is.
fn event_time(text: &[u8], place: &str) -> Result<i64, Reason> {
    let invalid = || {
        let shown = String::from_utf8_lossy(&text[..text.len().min(64)]).into_owned();
        reason("InvalidEventTime", format!("{place}: `{shown}` is not an RFC 3339 time"))
    };
    let text = std::str::from_utf8(text).map_err(|_| invalid())?;
    let at = chrono::DateTime::parse_from_rfc3339(text).map_err(|_| invalid())?.timestamp_millis();
    if !(MIN_EVENT_TIME_MS..=MAX_EVENT_TIME_MS).contains(&at) {
        return Err(reason("InvalidEventTime", format!("event time {text} is outside 1970 to 9999")));
    }
    Ok(at)
}

#[cfg(test)]
mod tests {
    use super::super::Decoder;
    use super::*;
    use crate::record::chunk::Chunk;

    /// 2027-01-15T08:00:00Z.
    const NOW: i64 = 1_800_000_000_000;
    const CUSTOMER: &str = "7a0f0e8e-0f83-4dd3-90c2-2a4f3a4f2b1c";

    fn decode(accept: &str, headers: &[(&str, &str)], value: &str) -> Chunk {
        let file = include_str!("../../../../../streams/orders.toml");
        let file = file.replace("[event]", &format!("[event]\naccept = [{accept}]"));
        let decoder = Decoder::new(&Definition::parse("orders.toml", &file).unwrap(), 2);
        let headers: Vec<_> = headers.iter().map(|(name, value)| (*name, Some(value.as_bytes()))).collect();
        let value = Some(value.as_bytes());
        let mut chunk = decoder.chunk();
        let record = Record { offset: 7, timestamp_ms: NOW, key: None, value, headers: &headers };
        decoder.decode(&record, &mut chunk);
        chunk
    }

    fn flat() -> String {
        format!(r#"{{"customer_id":"{CUSTOMER}","status":"paid","amount":12.5,"items":3}}"#)
    }

    /// An order as the API of `streams/orders.toml` returns it.
    fn order(id: &str, placed_at: &str) -> String {
        format!(
            r#"{{"order":{{"id":{id},"placed_at":{placed_at},"status":"paid","total":{{"amount":12.5}},
                "lines":{{"count":3}}}},"customer":{{"id":"{CUSTOMER}"}}}}"#
        )
    }

    /// An envelope with the members `more` in addition to the required ones.
    fn envelope(more: &str) -> String {
        format!(r#"{{"specversion":"1.0","source":"/shop","type":"order.placed","id":"o-1"{more}}}"#)
    }

    const AT: &str = "2027-01-15T08:00:00.5Z";
    const ENVELOPE: (&str, &str) = ("content-type", "application/cloudevents+json");

    fn complete() -> String {
        envelope(&format!(r#","time":"{AT}","data":{}"#, flat()))
    }

    #[test]
    fn an_event_is_the_same_in_every_mode() {
        let all = r#""binary", "structured", "plain""#;
        let attributes = [("ce_id", "o-1"), ("ce_time", AT)];
        let binary = decode(all, &attributes, &flat());
        assert_eq!(binary.poison, []);
        let check = |headers: &[(&str, &str)], value: &str| {
            let chunk = decode(all, headers, value);
            assert_eq!(chunk.poison, [], "{value}");
            let (event, expected) = (&chunk.events[0], &binary.events[0]);
            assert_eq!((chunk.id(event), event.time_ms), (b"o-1".as_slice(), NOW + 500), "{value}");
            assert_eq!(
                (event.hash, event.shard, event.groups),
                (expected.hash, expected.shard, expected.groups)
            );
            assert!(chunk.columns_of(0).eq(binary.columns_of(0)), "{value}");
            let counted = |chunk: &Chunk| chunk.measures_of(0).to_vec();
            assert_eq!(counted(&chunk), counted(&binary));
        };
        check(&[ENVELOPE], &complete());
        check(&[("Content-Type", "Application/CloudEvents+JSON; charset=utf-8")], &complete());
        check(&[ENVELOPE, attributes[0], attributes[1]], &complete());
        check(&[], &order("\"o-1\"", &format!("\"{AT}\"")));
        check(
            &[("content-type", "application/json"), ("trace", "x")],
            &order("\"o-1\"", &(NOW + 500).to_string()),
        );
    }

    fn check(accept: &str, headers: &[(&str, &str)], value: &str, expected: &str) {
        let chunk = decode(accept, headers, value);
        assert!(chunk.events.is_empty() && chunk.arena.is_empty(), "{value}");
        let found = chunk.poison[0].reason.to_string();
        assert!(found.contains(expected), "`{expected}` is not in `{found}`");
        assert_eq!(chunk.poison[0].value.as_deref(), Some(value.as_bytes()), "a dead letter keeps its bytes");
    }

    #[test]
    fn a_mode_that_is_not_accepted_is_named_with_its_setting() {
        let binary = [("ce_id", "o-1"), ("ce_time", AT)];
        let setting = "ModeNotAccepted: the record is in structured mode, and event.accept does not contain \"structured\"";
        check("\"binary\", \"plain\"", &[ENVELOPE], &complete(), setting);
        let setting = "MissingHeader: header ce_id is missing: the record is in plain mode, and event.accept does not \
                       contain \"plain\"";
        check("\"binary\", \"structured\"", &[], &order("1", "1"), setting);
        check(
            "\"plain\"",
            &binary,
            &flat(),
            "ModeNotAccepted: the record is in binary mode, and event.accept",
        );
        check("\"plain\"", &[("ce_specversion", "1.0")], &flat(), "the record is in binary mode");
        let chunk = decode("\"binary\"", &[ENVELOPE, binary[0], binary[1]], &flat());
        assert_eq!(chunk.events.len(), 1, "with attributes as headers, the record is also a binary one");
    }

    #[test]
    fn an_envelope_that_cannot_be_read_is_undecodable_with_a_reason() {
        let check = |value: &str, expected: &str| check("\"structured\"", &[ENVELOPE], value, expected);
        let time = format!(r#","time":"{AT}""#);
        check(&envelope(&time), "InvalidEnvelope: member data of the envelope is missing");
        check(&envelope(&format!(r#"{time},"data":null"#)), "member data of the envelope is missing");
        check(&envelope(r#","data":{}"#), "member time of the envelope is missing");
        check(&envelope(&format!(r#"{time},"data":[1]"#)), "member data is an array; it must be an object");
        check(&envelope(&format!(r#"{time},"data_base64":"AA==""#)), "member data_base64 is not supported");
        check(
            &envelope(r#","time":"today","data":{}"#),
            "InvalidEventTime: member time: `today` is not an RFC 3339",
        );
        check(&envelope(&format!(r#"{time},"data":{{}}"#)), "MissingColumn: column `customer_id`");
        check(&complete().replace("o-1", ""), "InvalidEventId: member id must be 1 to 1024 bytes");
        check(&complete().replace("\"o-1\"", "7"), "the envelope cannot be read: invalid type: integer `7`");
        check(&complete().replace("\"1.0\"", "\"0.3\""), "member specversion is `0.3`; it must be `1.0`");
        check("{}", "member specversion of the envelope is missing");
        check("{", "the envelope cannot be read: EOF");
        check("[]", "the envelope is an array; it must be an object");
        check("", "the envelope is absent; it must be an object");
        let batch = [("content-type", "application/cloudevents-batch+json")];
        self::check("\"structured\"", &batch, "[]", "application/cloudevents-batch+json is not supported");
    }

    #[test]
    fn a_plain_record_without_an_event_is_undecodable_with_the_reason_of_the_producer() {
        let check = |value: &str, expected: &str| check("\"plain\"", &[], value, expected);
        check("{}", "InvalidPlainRecord: event.id: no value at `/order/id`");
        check(&order("1.5", "1"), "event.id: `1.5` at `/order/id` is a float");
        check(&order("1", "\"soon\""), "event.time: `\"soon\"` at `/order/placed_at` is not a time");
        check(&order("1", &(NOW + 7_200_000).to_string()), "EventTimeInFuture");
        check(&order("1", &NOW.to_string()).replace("12.5", "\"x\""), "InvalidColumn: column `amount`: `x`");
        check("garbage", "InvalidPlainRecord: the record is not valid JSON");
        check("", "InvalidPlainRecord: the record is not valid JSON");
    }
}
