//! Which fields identify a record, say when it happened, and are worth counting.

use super::PLAUSIBLE_MS;
use super::columns::{Field, characters, is_in};
use common::contracts::event::DEFAULT_AHEAD_MS;
use common::contracts::stream::CqlType;
use std::collections::{BTreeMap, HashSet};

/// Longest value of an id, and of a group.
const MAX_ID: usize = 200;
const MAX_GROUP: usize = 32;
/// Most groups of a column, and the fewest records of a group on average.
const MAX_GROUPS: usize = 12;
const RECORDS_PER_GROUP: usize = 3;
/// Most columns that are measured, or grouped by.
const MAX_MEASURES: usize = 3;
const MAX_GROUP_BY: usize = 2;
/// Fields of which pairs are tried as an id.
const MAX_PAIRED: usize = 12;
/// Words of fields that say when a record came into being, the best ones first.
const BIRTH_WORDS: [&str; 9] =
    ["created", "creation", "occurred", "published", "placed", "timestamp", "time", "date", "ts"];
/// Words of fields that change later, lie ahead, or belong to something else than the record.
const OTHER_TIME_WORDS: &str = " birth birthday closed deleted dob due end ended expires expiry last modified \
     registered updated until pushed ";
/// Words of numeric fields whose sum means nothing.
const NO_MEASURE_WORDS: &str = " code day hour id index lat latitude lng lon longitude month number page port position \
     postcode version year zip ";

/// The fields that can identify a record, the best first, and other unique fields.
pub(super) struct Ids {
    /// Pointers of the id; empty if nothing identifies a record.
    pub chosen: Vec<String>,
    /// Why it was chosen.
    pub why: &'static str,
    /// Pointers of other unique fields.
    pub others: Vec<String>,
}

/// Guesses the id. `time` is the event time.
pub(super) fn ids(fields: &[Field<'_>], time: Option<&str>, is_keyed: bool) -> Ids {
    let unique: Vec<&Field<'_>> = fields.iter().filter(|f| can_identify(f) && is_unique(&[f])).collect();
    let mut named: Vec<&&Field<'_>> = unique.iter().filter(|f| name_rank(f).is_some()).collect();
    named.sort_by_key(|f| (name_rank(f), f.depth()));
    let is_one = fields.first().is_some_and(|f| f.values.len() == 1);
    let by_time = fields.iter().find(|f| Some(f.pointer.as_str()) == time && is_unique(&[f]));
    let (chosen, why) = if is_keyed {
        (vec!["key:".to_owned()], "The name of the member identifies the record.")
    } else if let Some(field) = named.first() {
        (vec![field.pointer.clone()], "Its value is unique in this page, and its name says that it is an id.")
    } else if let Some(field) = by_time {
        (vec![field.pointer.clone()], "No two records of this page have the same time.")
    } else if let Some(pair) = pair(fields, time).filter(|_| !is_one) {
        (pair, "No single field is unique in this page, but these two together are.")
    } else if let Some(field) = unique.iter().find(|f| !is_one && f.cql_type == CqlType::Text) {
        (vec![field.pointer.clone()], "Its value is unique in this page. Check that it always is.")
    } else {
        (vec![], "")
    };
    let others = unique.iter().map(|f| f.pointer.clone()).filter(|p| !chosen.contains(p)).take(MAX_PAIRED);
    Ids { others: others.collect(), chosen, why }
}

fn can_identify(field: &Field<'_>) -> bool {
    use CqlType::{Bigint, Int, Text, Timestamp, Uuid, Varint};
    let is_id_type = matches!(field.cql_type, Text | Uuid | Int | Bigint | Varint | Timestamp);
    let is_time = field.cql_type == CqlType::Timestamp && name_rank(field).is_none();
    let is_short = |text: &&str| text.len() <= MAX_ID && *text != "\"\"";
    is_id_type && !is_time && field.is_complete() && field.values.iter().flatten().all(is_short)
}

/// How much the name suggests an id; 0 is the most.
fn name_rank(field: &Field<'_>) -> Option<usize> {
    let words = field.words();
    match words.last().map(String::as_str) {
        Some("id") if words.len() == 1 => Some(0),
        Some("uuid" | "guid" | "sha" | "oid") => Some(1),
        Some("id" | "hash" | "key" | "uid") => Some(2),
        Some("url" | "uri" | "href" | "slug" | "number" | "link") => Some(3),
        _ => None,
    }
}

/// Whether no two records have the same values in these fields.
fn is_unique(fields: &[&Field<'_>]) -> bool {
    let mut seen = HashSet::new();
    let records = fields.first().map_or(0, |f| f.values.len());
    (0..records).all(|record| seen.insert(fields.iter().map(|f| f.values[record]).collect::<Vec<_>>()))
}

/// The first pair of fields that identifies a record, preferably with its time or a field that is named like an id.
fn pair(fields: &[Field<'_>], time: Option<&str>) -> Option<Vec<String>> {
    let is_time = |f: &Field<'_>| Some(f.pointer.as_str()) == time;
    let mut usable: Vec<&Field<'_>> = fields.iter().filter(|f| can_identify(f) || is_time(f)).collect();
    usable.sort_by_key(|f| (!is_time(f), name_rank(f).unwrap_or(usize::MAX)));
    usable.truncate(MAX_PAIRED);
    let pairs = usable.iter().enumerate().flat_map(|(i, a)| usable[i + 1..].iter().map(move |b| [*a, *b]));
    let mut found =
        pairs.filter(|pair| (is_time(pair[0]) || name_rank(pair[0]).is_some()) && is_unique(pair));
    found.next().map(|pair| pair.iter().map(|f| f.pointer.clone()).collect())
}

/// The fields that can be the event time, the best first.
pub(super) fn times<'a, 'f>(fields: &'f [Field<'a>], now_ms: i64) -> Vec<&'f Field<'a>> {
    let mut found: Vec<&Field<'_>> = fields.iter().filter(|f| can_be_time(f, now_ms)).collect();
    found.sort_by_key(|f| {
        let words = f.words();
        let birth = BIRTH_WORDS.iter().position(|birth| words.iter().any(|word| word == birth));
        (is_other_time(f), birth.unwrap_or(BIRTH_WORDS.len()), f.depth())
    });
    found
}

/// Whether a time may change later, or is not the time of the record.
pub(super) fn is_other_time(field: &Field<'_>) -> bool {
    let all = format!("{} ", field.pointer.replace(['/', '_'], " "));
    all.split(' ').any(|word| is_in(&word.to_lowercase(), OTHER_TIME_WORDS))
        || field.has_word(OTHER_TIME_WORDS)
}

/// Whether the processor would accept every value as an event time.
pub(super) fn can_be_time(field: &Field<'_>, now_ms: i64) -> bool {
    let latest = PLAUSIBLE_MS.end.min(now_ms.saturating_add(DEFAULT_AHEAD_MS));
    let is_time = |text: &&str| {
        let read = field.reading.read(&characters(text));
        read.is_ok_and(|ms| (PLAUSIBLE_MS.start..latest).contains(&ms))
    };
    let is_named = !field.pointer.is_empty();
    is_named
        && field.cql_type == CqlType::Timestamp
        && field.is_complete()
        && field.values.iter().flatten().all(is_time)
}

/// Names of columns worth measuring.
pub(super) fn measures(fields: &[&Field<'_>]) -> Vec<String> {
    let measured = fields.iter().filter(|f| f.cql_type.is_numeric() && !f.has_word(NO_MEASURE_WORDS));
    measured.take(MAX_MEASURES).map(|f| f.name.clone()).collect()
}

/// Names of columns with few distinct short texts, and these texts, the most frequent first.
pub(super) fn groups(fields: &[&Field<'_>]) -> Vec<(String, Vec<String>)> {
    let texts = fields.iter().filter(|f| f.cql_type == CqlType::Text);
    let grouped = texts.filter_map(|field| {
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        for raw in field.values.iter().flatten() {
            let text = serde_json::from_str::<String>(raw).ok().filter(|t| t.len() <= MAX_GROUP)?;
            *counts.entry(text).or_default() += 1;
        }
        counts.remove("");
        let is_grouped =
            (2..=MAX_GROUPS).contains(&counts.len()) && counts.len() * RECORDS_PER_GROUP <= field.present();
        let mut values: Vec<(String, usize)> = counts.into_iter().collect();
        values.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        is_grouped.then(|| (field.name.clone(), values.into_iter().map(|(text, _)| text).collect()))
    });
    grouped.take(MAX_GROUP_BY).collect()
}
