//! Reads the keys of one table of a stream file and collects all mistakes instead of stopping at the first.

use super::super::duration::{format_ms, parse_duration};
use super::super::{Flag, Place, Secret};
use chrono_tz::Tz;
use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use toml::{Table, Value};

/// A table of the file. It records the keys that were read, so that all other keys can be reported as unknown.
pub(super) struct Section<'a> {
    path: String,
    pub(super) table: Table,
    known: BTreeSet<&'static str>,
    pub(super) problems: &'a mut Vec<String>,
}

impl Section<'_> {
    fn key(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    pub(super) fn problem(&mut self, key: &str, text: impl std::fmt::Display) {
        let key = self.key(key);
        self.problems.push(format!("`{key}`: {text}"));
    }

    pub(super) fn take(&mut self, key: &'static str) -> Option<Value> {
        self.known.insert(key);
        self.table.remove(key)
    }

    /// Takes a value and converts it with `read`. Reports a problem if the value is not of the expected `kind`.
    pub(super) fn typed<T>(
        &mut self,
        key: &'static str,
        kind: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Option<T> {
        let value = self.take(key)?;
        let found = read(&value);
        if found.is_none() {
            self.problem(key, format!("must be {kind}, but is {} `{value}`", value.type_str()));
        }
        found
    }

    pub(super) fn text(&mut self, key: &'static str) -> Option<String> {
        self.typed(key, "a string", |v| v.as_str().map(str::to_owned))
    }

    pub(super) fn required_text(&mut self, key: &'static str) -> String {
        let present = self.table.contains_key(key);
        let value = self.text(key);
        if !present {
            self.problem(key, "is missing");
        }
        value.unwrap_or_default()
    }

    pub(super) fn boolean(&mut self, key: &'static str, default: bool) -> bool {
        self.typed(key, "true or false", Value::as_bool).unwrap_or(default)
    }

    pub(super) fn number(&mut self, key: &'static str) -> Option<f64> {
        self.typed(key, "a number", |v| v.as_float().or_else(|| v.as_integer().map(|i| i as f64)))
    }

    pub(super) fn integer(&mut self, key: &'static str, default: i64, range: RangeInclusive<i64>) -> i64 {
        let Some(value) = self.typed(key, "an integer", Value::as_integer) else { return default };
        if !range.contains(&value) {
            self.problem(key, format!("{value} is out of range; use {} to {}", range.start(), range.end()));
            return default;
        }
        value
    }

    pub(super) fn small(&mut self, key: &'static str, default: u32, range: RangeInclusive<u32>) -> u32 {
        let wide = i64::from(*range.start())..=i64::from(*range.end());
        u32::try_from(self.integer(key, i64::from(default), wide)).unwrap_or(default)
    }

    /// A duration such as `"90s"` or `"1h 30m"`, in milliseconds.
    pub(super) fn duration(
        &mut self,
        key: &'static str,
        default_ms: i64,
        range_ms: RangeInclusive<i64>,
    ) -> i64 {
        let Some(text) = self.text(key) else { return default_ms };
        match parse_duration(&text) {
            Err(e) => self.problem(key, e),
            Ok(ms) if !range_ms.contains(&ms) => {
                let (low, high) = (format_ms(*range_ms.start()), format_ms(*range_ms.end()));
                self.problem(key, format!("`{text}` is out of range; use {low} to {high}"));
            }
            Ok(ms) => return ms,
        }
        default_ms
    }

    pub(super) fn strings(&mut self, key: &'static str) -> Option<Vec<String>> {
        self.typed(key, "a list of strings", |v| {
            v.as_array()?.iter().map(|s| s.as_str().map(str::to_owned)).collect()
        })
    }

    /// A table of strings. Numbers and booleans count as their text.
    pub(super) fn texts(&mut self, key: &'static str) -> Vec<(String, String)> {
        let pairs = self.typed(key, "a table of strings", |v| {
            v.as_table()?
                .iter()
                .map(|(name, value)| Some((name.clone(), scalar(value)?)))
                .collect::<Option<_>>()
        });
        pairs.unwrap_or_default()
    }

    /// Like [`Section::texts`], with lists. A list repeats its name.
    pub(super) fn parameters(&mut self, key: &'static str) -> Vec<(String, String)> {
        let pairs = self.typed(key, "a table of strings, numbers, booleans and lists of them", |v| {
            let mut pairs = Vec::new();
            for (name, value) in v.as_table()? {
                let values = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
                for value in values {
                    pairs.push((name.clone(), scalar(value)?));
                }
            }
            Some(pairs)
        });
        pairs.unwrap_or_default()
    }

    /// An RFC 6901 JSON pointer.
    pub(super) fn pointer(&mut self, key: &'static str) -> Option<String> {
        let pointer = self.text(key)?;
        self.check_pointer(key, &pointer);
        Some(pointer)
    }

    /// Reports a problem if the text is not an RFC 6901 JSON pointer.
    pub(super) fn check_pointer(&mut self, key: &str, pointer: &str) {
        if !pointer.is_empty() && !pointer.starts_with('/') {
            let plain = pointer.replace('.', "/");
            self.problem(key, format!("`{pointer}` is not a JSON pointer; write `/{plain}`"));
        }
    }

    /// A pointer into a record, or one with a prefix into what surrounds it.
    pub(super) fn record_pointer(&mut self, key: &'static str) -> Option<String> {
        let pointer = self.text(key)?;
        self.check_record_pointer(key, &pointer);
        Some(pointer)
    }

    /// Reports a problem if the text is neither a JSON pointer nor a pointer with a known prefix.
    pub(super) fn check_record_pointer(&mut self, key: &str, pointer: &str) {
        match pointer.split_once(':') {
            Some(("page" | "parent", inner)) => self.check_pointer(key, inner),
            Some(("each", _)) => {}
            _ if pointer == "key:" => {}
            _ => self.check_pointer(key, pointer),
        }
    }

    /// A JSON pointer into the body, or `header:NAME`.
    pub(super) fn place(&mut self, key: &'static str) -> Option<Place> {
        let text = self.text(key)?;
        Some(self.read_place(key, &text))
    }

    pub(super) fn required_place(&mut self, key: &'static str) -> Place {
        if !self.table.contains_key(key) {
            self.problem(key, "is missing; set a JSON pointer such as `/data/next`, or header:NAME");
        }
        self.place(key).unwrap_or_else(|| Place::Pointer(String::new()))
    }

    fn read_place(&mut self, key: &'static str, text: &str) -> Place {
        if let Some(name) = text.strip_prefix("header:") {
            return Place::Header(name.to_ascii_lowercase());
        }
        self.check_pointer(key, text);
        Place::Pointer(text.to_owned())
    }

    /// A place whose value decides something. The prefix `!` negates it.
    pub(super) fn flag(&mut self, key: &'static str) -> Option<Flag> {
        let text = self.text(key)?;
        Some(self.read_flag(key, &text))
    }

    /// A flag or a list of flags.
    pub(super) fn flags(&mut self, key: &'static str) -> Vec<Flag> {
        let texts = if matches!(self.table.get(key), Some(Value::String(_))) {
            self.text(key).map(|text| vec![text])
        } else {
            self.strings(key)
        };
        texts.unwrap_or_default().iter().map(|text| self.read_flag(key, text)).collect()
    }

    fn read_flag(&mut self, key: &'static str, text: &str) -> Flag {
        let (negated, text) = text.strip_prefix('!').map_or((false, text), |text| (true, text));
        Flag { place: self.read_place(key, text), negated }
    }

    /// A list of HTTP statuses.
    pub(super) fn statuses(&mut self, key: &'static str) -> Vec<u16> {
        let found = self.typed(key, "a list of HTTP statuses from 200 to 599", |v| {
            let status = |v: &Value| u16::try_from(v.as_integer()?).ok().filter(|s| (200..600).contains(s));
            v.as_array()?.iter().map(status).collect::<Option<Vec<_>>>()
        });
        found.unwrap_or_default()
    }

    /// The name of a time zone, such as `Europe/Berlin`.
    pub(super) fn zone(&mut self, key: &'static str) -> Option<Tz> {
        let name = self.text(key)?;
        let zone = name.parse().ok();
        if zone.is_none() {
            self.problem(
                key,
                format!("`{name}` is not a time zone; write for example \"UTC\" or \"Europe/Berlin\""),
            );
        }
        zone
    }

    /// A secret, which is either in the file at `file_key` or in the environment variable at `env_key`.
    pub(super) fn secret(&mut self, file_key: &'static str, env_key: &'static str) -> Secret {
        match (self.text(file_key), self.text(env_key)) {
            (Some(file), None) => Secret::File(file),
            (None, Some(variable)) => Secret::Env(variable),
            (Some(file), Some(_)) => {
                self.problem(env_key, format!("set either `{file_key}` or `{env_key}`, not both"));
                Secret::File(file)
            }
            (None, None) => {
                self.problem(
                    file_key,
                    format!("is missing; set it to a file with the secret, or set `{env_key}`"),
                );
                Secret::File(String::new())
            }
        }
    }

    /// One of several named values, the first by default.
    pub(super) fn choice<T: Clone>(&mut self, key: &'static str, all: &[(&str, T)]) -> T {
        let Some(name) = self.text(key) else { return all[0].1.clone() };
        if let Some((_, value)) = all.iter().find(|(known, _)| *known == name) {
            return value.clone();
        }
        let names = all.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
        self.problem(key, format!("unknown value `{name}`; use one of {names}"));
        all[0].1.clone()
    }

    pub(super) fn required_pointer(&mut self, key: &'static str) -> String {
        if !self.table.contains_key(key) {
            self.problem(key, "is missing; set a JSON pointer such as `/data/next`");
        }
        self.pointer(key).unwrap_or_default()
    }

    /// Reads the table at `key`. An absent table counts as empty.
    pub(super) fn section<T>(&mut self, key: &'static str, read: impl FnOnce(&mut Section<'_>) -> T) -> T {
        let table = self.typed(key, "a table", |v| v.as_table().cloned()).unwrap_or_default();
        let path = self.key(key);
        read_section(path, table, self.problems, read)
    }

    /// Reads each table of the array at `key`.
    pub(super) fn sections<T>(&mut self, key: &'static str, read: impl Fn(&mut Section<'_>) -> T) -> Vec<T> {
        let tables = self.typed(key, "a list of tables", |v| {
            v.as_array()?.iter().map(|t| t.as_table().cloned()).collect::<Option<Vec<Table>>>()
        });
        let path = self.key(key);
        let tables = tables.unwrap_or_default().into_iter().enumerate();
        tables.map(|(i, t)| read_section(format!("{path}[{i}]"), t, self.problems, &read)).collect()
    }
}

/// The text of a string, number or boolean.
fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Integer(_) | Value::Float(_) | Value::Boolean(_) => Some(value.to_string()),
        _ => None,
    }
}

pub(super) fn read_section<T>(
    path: String,
    table: Table,
    problems: &mut Vec<String>,
    read: impl FnOnce(&mut Section<'_>) -> T,
) -> T {
    let mut section = Section { path, table, known: BTreeSet::new(), problems };
    let read = read(&mut section);
    let known = section.known.iter().copied().collect::<Vec<_>>().join(", ");
    for key in section.table.keys().cloned().collect::<Vec<_>>() {
        section.problem(&key, format!("unknown key; use one of {known}"));
    }
    read
}
