//! Where the records of an answer are: its format, the pointer to the records, and the values that surround them.

use super::DraftError;
use crate::source::body::format_of;
use crate::source::paginate::is_set;
use crate::source::records::{Body, records};
use crate::source::scan::{self, Member};
use common::contracts::extract::without_nan;
use common::contracts::stream::{BodyFormat, RecordShape};

/// Records that are looked at. More do not improve the guesses.
const MAX_RECORDS: usize = 5000;
/// Objects that may surround the records.
const MAX_DEPTH: usize = 5;
/// Lines that decide whether a text is CSV.
const CSV_LINES: usize = 5;
/// Characters of an answer without records that an error shows.
const MAX_SHOWN: usize = 80;
/// Members that report an error.
const ERROR_MEMBERS: [&str; 3] = ["/error", "/errors", "/fault"];
/// Names that usually lead to the records, in lower case without separators.
const USUAL_NAMES: [&str; 17] = [
    "data", "docs", "edges", "entries", "events", "features", "hits", "items", "list", "nodes", "objects",
    "records", "results", "rows", "value", "values", "issues",
];

/// What the value at the pointer of the records is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Objects,
    Values,
    Columns,
    Keyed,
    Single,
    Lines,
}

impl Place {
    /// How the draft describes it.
    pub fn words(self) -> &'static str {
        match self {
            Place::Objects => "a list of objects",
            Place::Values => "a list of lists or values",
            Place::Columns => "an object of lists",
            Place::Keyed => "an object whose keys identify the records",
            Place::Single => "one object, the only record",
            Place::Lines => "lines",
        }
    }
}

/// Where the records are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    /// `source.records`.
    pub pointer: String,
    /// `source.shape`.
    pub shape: RecordShape,
    pub place: Place,
    /// Number of records.
    pub count: usize,
    /// Other places that may have been meant.
    pub others: Vec<String>,
}

/// A value around the records.
#[derive(Debug, Clone, Copy)]
pub(super) struct Leaf<'a> {
    /// Its pointer in the page.
    pub pointer: &'a str,
    /// Its JSON text.
    pub raw: &'a str,
}

/// A format and the keys that declare it, if the media type does not name it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Format {
    pub body: BodyFormat,
    pub declared: bool,
}

/// The format of an answer, by its media type or else by its text.
pub(super) fn format(media_type: &str, text: &[u8]) -> Result<Format, DraftError> {
    let named = format_of(&media_type.to_ascii_lowercase());
    let Err(not_json) = scan::check(text) else {
        return Ok(Format { body: named, declared: false });
    };
    let sniffed = match (named, delimiter(text)) {
        (BodyFormat::Ndjson, _) => return Ok(Format { body: named, declared: false }),
        (BodyFormat::Csv { delimiter }, found) => {
            let body = BodyFormat::Csv { delimiter: found.unwrap_or(delimiter) };
            return Ok(Format { declared: body != named, body });
        }
        _ if is_ndjson(text) => Some(BodyFormat::Ndjson),
        (_, delimiter) => delimiter.map(|delimiter| BodyFormat::Csv { delimiter }),
    };
    sniffed.map(|body| Format { body, declared: true }).ok_or_else(|| DraftError::NotRecords {
        problem: not_json.to_string(),
        shown: shown(&String::from_utf8_lossy(text)),
    })
}

/// The first characters of a text, without control characters.
fn shown(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_SHOWN).collect()
}

fn is_ndjson(text: &[u8]) -> bool {
    let mut lines = text.split(|b| *b == b'\n').map(<[u8]>::trim_ascii).filter(|line| !line.is_empty());
    lines.all(|line| line.first() == Some(&b'{') && scan::check(line).is_ok())
}

/// The delimiter with which the first lines have the same number of fields, at least two.
fn delimiter(text: &[u8]) -> Option<u8> {
    if text.trim_ascii().first().is_none_or(|b| matches!(b, b'<' | b'{' | b'[')) {
        return None;
    }
    [b',', b';', b'\t', b'|'].into_iter().find(|delimiter| {
        let rows = csv::ReaderBuilder::new().delimiter(*delimiter).from_reader(text).into_records();
        let lengths: Vec<usize> =
            rows.take(CSV_LINES).map(|row| row.as_ref().map_or(0, csv::StringRecord::len)).collect();
        lengths.first().is_some_and(|first| *first > 1 && lengths.iter().all(|length| length == first))
    })
}

/// Finds the records of a JSON answer.
pub(super) fn find(text: &[u8]) -> Found {
    let mut found = Vec::new();
    collect(text, "", 0, &mut found);
    // The first of several equal places wins, so places are compared in reverse.
    let rank = |f: &&Found| (f.count > 0, f.place != Place::Values, is_usual(&f.pointer), f.count);
    let best = found.iter().rev().max_by_key(rank).cloned();
    let best = best.unwrap_or(Found {
        pointer: String::new(),
        shape: RecordShape::Rows,
        place: Place::Single,
        count: 1,
        others: vec![],
    });
    let others = found.iter().filter(|f| f.pointer != best.pointer && f.count > 0);
    let others = others.map(|f| format!("\"{}\" ({}, {})", f.pointer, f.place.words(), f.count)).collect();
    Found { others, ..best }
}

/// Whether the name of a place is usual for records.
fn is_usual(pointer: &str) -> bool {
    let name = plain(pointer.trim_end_matches("/*").rsplit('/').next().unwrap_or_default());
    USUAL_NAMES.contains(&name.as_str())
}

/// Adds every place below `text` that may contain the records.
fn collect(text: &[u8], pointer: &str, depth: usize, found: &mut Vec<Found>) {
    let at = |pointer: String, shape, place, count| Found { pointer, shape, place, count, others: vec![] };
    match text.first() {
        Some(b'[') => {
            let elements: Vec<_> = scan::elements(text, 0).map_while(Result::ok).collect();
            let objects = elements.iter().filter(|e| e.text.first() == Some(&b'{')).count();
            let place = if 2 * objects >= elements.len() { Place::Objects } else { Place::Values };
            // An empty list of another name may be a value of the only record.
            if !elements.is_empty() || pointer.is_empty() || is_usual(pointer) {
                found.push(at(pointer.to_owned(), RecordShape::Rows, place, elements.len()));
            }
        }
        Some(b'{') if depth < MAX_DEPTH => {
            let members: Vec<Member<'_>> = scan::members(text, 0).map_while(Result::ok).collect();
            if let Some(count) = columnar(&members) {
                found.push(at(pointer.to_owned(), RecordShape::Columnar, Place::Columns, count));
            } else if is_keyed(&members) {
                found.push(at(format!("{pointer}/*"), RecordShape::Rows, Place::Keyed, members.len()));
            } else {
                for member in &members {
                    collect(member.text, &format!("{pointer}/{}", escaped(&member.name)), depth + 1, found);
                }
            }
        }
        _ => {}
    }
}

/// The common length of the lists of an object that has at least two, all of single values.
fn columnar(members: &[Member<'_>]) -> Option<usize> {
    let lists = members.iter().filter(|m| m.text.first() == Some(&b'['));
    let lengths = lists.map(|m| {
        let mut count = 0;
        for element in scan::elements(m.text, 0) {
            let element = element.ok()?;
            count += 1;
            if matches!(element.text.first(), Some(b'{' | b'[')) {
                return None;
            }
        }
        Some(count)
    });
    let lengths: Option<Vec<usize>> = lengths.collect();
    let lengths = lengths.filter(|lengths| lengths.len() > 1)?;
    let first = lengths[0];
    (first > 1 && lengths.iter().all(|length| *length == first)).then_some(first)
}

/// Whether all members are objects that share most of their names with the first.
fn is_keyed(members: &[Member<'_>]) -> bool {
    let names = |member: &Member<'_>| -> Vec<String> {
        let inner = scan::members(member.text, 0).map_while(Result::ok);
        inner.map(|m| m.name.into_owned()).collect()
    };
    if members.len() < 2 || members.iter().any(|m| m.text.first() != Some(&b'{')) {
        return false;
    }
    let first = names(&members[0]);
    members[1..].iter().all(|member| {
        let shared = names(member).iter().filter(|name| first.contains(name)).count();
        shared > 0 && 2 * shared >= first.len()
    })
}

/// The texts of the records.
pub(super) fn texts(body: Body<'_>, found: &Found) -> Result<Vec<String>, DraftError> {
    let unusable = |problem: String| DraftError::NotRecords { problem, shown: String::new() };
    let records = records(body, &found.pointer, found.shape).map_err(|e| unusable(e.to_string()))?;
    let mut texts = Vec::new();
    for record in records.into_iter().flatten().take(MAX_RECORDS) {
        let record = record.map_err(|e| unusable(e.to_string()))?;
        let text = record.text.as_ref();
        texts.extend(String::from_utf8(without_nan(text).unwrap_or_else(|| text.to_vec())).ok());
    }
    if texts.is_empty() { Err(DraftError::Empty) } else { Ok(texts) }
}

/// The error that the only record of an answer reports.
pub(super) fn reported(text: &[u8], found: &Found) -> Option<DraftError> {
    if !found.pointer.is_empty() || text.first() != Some(&b'{') {
        return None;
    }
    let member = |name: &&str| scan::find(text, name).ok().flatten().filter(|raw| is_set(raw));
    let raw = ERROR_MEMBERS.iter().find_map(member)?;
    Some(DraftError::Reported { words: shown(&String::from_utf8_lossy(raw)) })
}

/// The pointers and texts of all values outside of the records.
pub(super) fn leaves(text: &[u8], found: &Found) -> Vec<(String, String)> {
    let mut leaves = Vec::new();
    let list = found.pointer.trim_end_matches("/*");
    if !list.is_empty() {
        surroundings(text, "", list, &mut leaves);
    }
    leaves
}

fn surroundings(text: &[u8], pointer: &str, skipped: &str, leaves: &mut Vec<(String, String)>) {
    for member in scan::members(text, 0).map_while(Result::ok) {
        let inner = format!("{pointer}/{}", escaped(&member.name));
        match member.text.first() {
            _ if inner == skipped => {}
            Some(b'[') => {}
            Some(b'{') => surroundings(member.text, &inner, skipped, leaves),
            _ => leaves.push((inner, String::from_utf8_lossy(member.text).into_owned())),
        }
    }
}

/// A member name as a token of a pointer.
pub(super) fn escaped(name: &str) -> String {
    name.replace('~', "~0").replace('/', "~1")
}

/// A name in lower case without separators.
pub(super) fn plain(name: &str) -> String {
    name.chars().filter(char::is_ascii_alphanumeric).collect::<String>().to_ascii_lowercase()
}
