//! The fields of records, and for each a column name and a type that all of its values fit.

use super::PLAUSIBLE_MS;
use super::records::escaped;
use crate::source::scan;
use chrono_tz::Tz;
use common::contracts::stream::{Column, CqlType, OnMisfit, is_reserved_column};
use common::contracts::time::{TimeError, TimeReading, TimeUnit};
use common::contracts::value;
use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};

/// Objects within a record whose members become columns; deeper ones become `json`.
const MAX_NESTING: usize = 3;
/// Most columns of a draft. A definition may have 128.
pub(super) const MAX_COLUMNS: usize = 100;
/// Longest column name.
const MAX_NAME: usize = 48;
/// Largest whole number that suggests the type `int`. Ids and counters outgrow it.
const MAX_INT: f64 = 1e6;
/// Words in the names of fields that contain times.
const TIME_WORDS: &str = " at closed created date datetime day end epoch expires generated modified occurred on opened \
     published since start t time timestamp ts updated when ";
/// Words in the names of fields whose digits are not a quantity.
const CODE_WORDS: &str = " code fax id mobile number phone postal postcode version zip zipcode ";

/// A field of the records: one column.
#[derive(Debug, Clone)]
pub(super) struct Field<'a> {
    /// Column name.
    pub name: String,
    /// Pointer into a record.
    pub pointer: String,
    /// JSON text of its value in each record. `None` if it is absent or null.
    pub values: Vec<Option<&'a str>>,
    /// Type of the column.
    pub cql_type: CqlType,
    /// How values of a timestamp column are read.
    pub reading: TimeReading,
}

impl Field<'_> {
    /// Number of records with a value.
    pub fn present(&self) -> usize {
        self.values.iter().flatten().count()
    }

    /// Whether every record has a value.
    pub fn is_complete(&self) -> bool {
        self.present() == self.values.len()
    }

    /// The words of the last part of the pointer, or of the part before it for a position.
    pub fn words(&self) -> Vec<String> {
        let last = self.pointer.rsplit('/').next().unwrap_or_default();
        snake(last).split('_').map(str::to_owned).collect()
    }

    /// Whether a word of the name is in a list of words.
    pub fn has_word(&self, list: &str) -> bool {
        self.words().iter().any(|word| is_in(word, list))
    }

    /// Depth of the field in the record; 1 at the top.
    pub fn depth(&self) -> usize {
        self.pointer.matches('/').count()
    }
}

/// Whether a list that is separated and enclosed by spaces contains a word.
pub(super) fn is_in(word: &str, list: &str) -> bool {
    !word.is_empty() && list.split(' ').any(|listed| listed == word)
}

/// The fields of all records, in the order of their first occurrence.
pub(super) fn fields(records: &[String]) -> Vec<Field<'_>> {
    let mut found = Vec::new();
    flatten("", &records.iter().map(|text| present(text)).collect::<Vec<_>>(), &mut found);
    let mut taken = BTreeSet::new();
    for field in &mut found {
        field.name = unique(column_name(&field.pointer), &mut taken);
        (field.cql_type, field.reading) = type_of(field);
    }
    found
}

/// The characters of a string, or the text of any other value.
pub(super) fn characters(raw: &str) -> Cow<'_, str> {
    serde_json::from_str(raw).map_or(Cow::Borrowed(raw), Cow::Owned)
}

/// The text of a value that is neither null nor empty.
fn present(text: &str) -> Option<&str> {
    Some(text.trim()).filter(|text| !text.is_empty() && *text != "null")
}

/// Adds the fields at and below a pointer, given its value in each record.
fn flatten<'a>(pointer: &str, values: &[Option<&'a str>], found: &mut Vec<Field<'a>>) {
    let depth = pointer.matches('/').count();
    let opens = |open: char| values.iter().flatten().all(|text| text.starts_with(open));
    let is_nested = values.iter().any(Option::is_some) && (opens('{') || (depth == 0 && opens('[')));
    let mut members: Vec<(String, Vec<Option<&'a str>>)> = Vec::new();
    if is_nested && depth < MAX_NESTING {
        let mut known = HashMap::new();
        for (record, text) in values.iter().enumerate() {
            let Some(text) = text else { continue };
            let items = scan::items(text.as_bytes(), 0).map_while(Result::ok).enumerate();
            for (position, item) in items {
                let token = if text.starts_with('[') { position.to_string() } else { escaped(&item.name) };
                let slot = *known.entry(token.clone()).or_insert(members.len());
                if slot == members.len() {
                    members.push((token, vec![None; values.len()]));
                }
                members[slot].1[record] = std::str::from_utf8(item.text).ok().and_then(present);
            }
        }
    }
    if members.is_empty() {
        found.push(Field {
            name: String::new(),
            pointer: pointer.to_owned(),
            values: values.to_vec(),
            cql_type: CqlType::Text,
            reading: TimeReading::default(),
        });
    }
    for (token, values) in members {
        flatten(&format!("{pointer}/{token}"), &values, found);
    }
}

/// The words of a name in lower case, joined by `_`.
pub(super) fn snake(name: &str) -> String {
    let mut words = String::new();
    let mut previous = '_';
    for c in name.chars() {
        if c.is_ascii_uppercase() && (previous.is_ascii_lowercase() || previous.is_ascii_digit()) {
            words.push('_');
        }
        let plain = if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '_' };
        if plain != '_' || !words.ends_with('_') {
            words.push(plain);
        }
        previous = c;
    }
    words.trim_matches('_').to_owned()
}

/// A valid name that consists of the tokens of a pointer.
pub(super) fn column_name(pointer: &str) -> String {
    let mut name = snake(&pointer.replace('/', "_"));
    if !name.starts_with(|c: char| c.is_ascii_lowercase()) {
        name = if name.is_empty() { "value".to_owned() } else { format!("field_{name}") };
    }
    if is_reserved_column(&name) {
        name.push_str("_value");
    }
    name.truncate(MAX_NAME);
    name
}

/// Appends a number to a name that is taken.
fn unique(name: String, taken: &mut BTreeSet<String>) -> String {
    let numbered = (2..).map(|n| {
        let end = format!("_{n}");
        format!("{}{end}", &name[..name.len().min(MAX_NAME - end.len())])
    });
    let free = std::iter::once(name.clone()).chain(numbered).find(|name| !taken.contains(name));
    let free = free.unwrap_or(name);
    taken.insert(free.clone());
    free
}

/// The narrowest type that all values of a field fit.
pub(super) fn type_of(field: &Field<'_>) -> (CqlType, TimeReading) {
    let plain = |cql_type| (cql_type, TimeReading::default());
    let values: Vec<&str> = field.values.iter().flatten().copied().collect();
    let starts = |set: &str| values.iter().all(|text| text.starts_with(|c| set.contains(c)));
    if values.is_empty() {
        return plain(CqlType::Text);
    }
    if values.iter().any(|text| text.starts_with(['{', '['])) {
        return plain(CqlType::Json);
    }
    let fits = |cql_type| values.iter().all(|text| fits(text, cql_type, &TimeReading::default()));
    let texts: Vec<Cow<'_, str>> =
        values.iter().filter(|raw| raw.starts_with('"')).map(|raw| characters(raw)).collect();
    let has_leading_zero = texts
        .iter()
        .any(|text| text.len() > 1 && text.starts_with('0') && text.bytes().all(|b| b.is_ascii_digit()));
    let is_blank = texts.len() == values.len() && texts.iter().all(|text| text.is_empty());
    let is_code = field.has_word(CODE_WORDS) && texts.iter().any(|text| text.parse::<f64>().is_ok());
    if is_blank || is_code || has_leading_zero {
        return plain(CqlType::Text);
    }
    if let Some(reading) = time_reading(field, &values) {
        return (CqlType::Timestamp, reading);
    }
    if fits(CqlType::Boolean) {
        return plain(CqlType::Boolean);
    }
    let has_fraction = values.iter().any(|text| text.contains(['.', 'e', 'E']));
    if starts("\"-0123456789") && !has_fraction && fits(CqlType::Varint) {
        let number = |text: &&str| text.trim_matches('"').parse::<f64>().unwrap_or_default().abs();
        let is_small = values.iter().all(|text| number(text) <= MAX_INT) && !field.has_word(CODE_WORDS);
        let narrow = if is_small { CqlType::Int } else { CqlType::Bigint };
        return plain(if fits(narrow) { narrow } else { CqlType::Varint });
    }
    for cql_type in [CqlType::Double, CqlType::Decimal, CqlType::Uuid, CqlType::Text] {
        if fits(cql_type) {
            return plain(cql_type);
        }
    }
    plain(CqlType::Json)
}

/// Whether the processor would accept a value in a column of this type.
fn fits(raw: &str, cql_type: CqlType, reading: &TimeReading) -> bool {
    let column = Column {
        name: String::new(),
        cql_type,
        pointer: String::new(),
        required: false,
        reading: reading.clone(),
        on_misfit: OnMisfit::DeadLetter,
    };
    value::encode(raw, &column, &mut Vec::new()).is_ok()
}

/// How all values of a field are read as times, if they are times. Numbers need a name that suggests one.
fn time_reading(field: &Field<'_>, values: &[&str]) -> Option<TimeReading> {
    let texts: Vec<Cow<'_, str>> =
        values.iter().map(|raw| characters(raw)).filter(|text| !text.is_empty()).collect();
    let is_number = |text: &str| text.parse::<f64>().is_ok();
    if texts.iter().any(|text| is_number(text)) {
        let units = TimeUnit::ALL.iter().map(|(_, unit)| *unit);
        let mut units = units.filter(|unit| *unit != TimeUnit::Seconds || field.has_word(TIME_WORDS));
        let unit = units.find(|unit| {
            let reading = TimeReading { unit: *unit, ..TimeReading::default() };
            let is_time = |text: &str| reading.read(text).is_ok_and(|ms| PLAUSIBLE_MS.contains(&ms));
            texts.iter().all(|text| is_number(text) && is_time(text))
        })?;
        let has_digits =
            |digits: usize| texts.iter().all(|text| text.split('.').next().map(str::len) == Some(digits));
        // Without a name that suggests a time, the usual digits of this century have to do.
        let digits =
            [(TimeUnit::Milliseconds, 13), (TimeUnit::Microseconds, 16), (TimeUnit::Nanoseconds, 19)];
        let is_plain = digits.iter().any(|(known, count)| *known == unit && has_digits(*count));
        return (field.has_word(TIME_WORDS) || (is_plain && !field.has_word(CODE_WORDS)))
            .then(|| TimeReading { unit, ..TimeReading::default() });
    }
    let mut reading = TimeReading::default();
    for text in &texts {
        if reading.read(text) == Err(TimeError::NoZone) {
            reading.zone = Some(Tz::UTC);
        }
        reading.read(text).ok()?;
    }
    Some(reading)
}
