//! The layout: the part of a stream definition that stored data depends on. `init` writes it to table `streams`, and
//! every state file contains it. Comparing two layouts decides which changes the stored data survives.

use super::{ContentMode, CqlType, Definition, EventTime, GroupBy, OnMisfit};
use crate::contracts::event::DEFAULT_AHEAD_MS;
use crate::contracts::time::TimeReading;
use serde::{Deserialize, Serialize};
use std::fmt::{self, Display};

/// Format version of the stored text. Earlier versions can be read too, and `tests/golden` contains examples of each.
/// Version 1 does not contain the shortest TTL. Versions before 3 do not contain how values are read, and versions
/// before 4 do not contain the content modes and how far events may be ahead of time.
const FORM: u32 = 4;

/// The layout of a stream. Its text form is one line of JSON.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Layout {
    form: u32,
    stream: String,
    bucket: String,
    shards: u32,
    ttl_seconds: i64,
    shortest_ttl_seconds: i64,
    pane_ms: i64,
    lateness_ms: i64,
    group_by: Vec<GroupBy>,
    measures: Vec<String>,
    columns: Vec<LayoutColumn>,
    event: Identity,
    #[serde(default = "binary_only")]
    accept: Vec<ContentMode>,
    #[serde(default = "default_ahead")]
    ahead_ms: i64,
}

/// The content modes of layouts that do not contain them.
fn binary_only() -> Vec<ContentMode> {
    vec![ContentMode::Binary]
}

/// `event.ahead` of layouts that do not contain it.
fn default_ahead() -> i64 {
    DEFAULT_AHEAD_MS
}

/// A declared column: name, type, pointer into the source record, whether it is required, how its values are read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct LayoutColumn(String, CqlType, String, bool, #[serde(default)] Reading);

/// How the values of a column are read.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Reading {
    #[serde(default, skip_serializing_if = "is_default")]
    time: TimeReading,
    #[serde(default, skip_serializing_if = "is_default")]
    on_misfit: OnMisfit,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// What determines the identity and the partition of an event: the JSON pointers to id, time and key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Identity(Option<String>, EventTime, Option<String>);

/// Why a stored layout cannot be parsed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// A newer program wrote it.
    #[error("it has form {0}, this program knows {FORM}: run the newer program")]
    Newer(u64),
    /// The text is not a layout.
    #[error("it cannot be read ({cause}): {text}")]
    Unreadable {
        /// The stored text.
        text: String,
        /// The error of the parser.
        cause: String,
    },
}

/// The differences between a stored layout and a new one. Each text names the key, the old value and the new value.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// Changes that the stored data survives.
    pub allowed: Vec<String>,
    /// Changes that the stored data does not survive, each with a remedy.
    pub refused: Vec<String>,
}

impl Changes {
    /// Whether the layouts are equivalent.
    pub fn is_empty(&self) -> bool {
        self.allowed.is_empty() && self.refused.is_empty()
    }
}

impl Display for Changes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<String> =
            self.refused.iter().chain(&self.allowed).map(|c| format!("  - {c}")).collect();
        f.write_str(&lines.join("\n"))
    }
}

impl Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&serde_json::to_string(self).map_err(|_| fmt::Error)?)
    }
}

impl Definition {
    /// The part of the definition that stored data depends on.
    pub fn layout(&self) -> Layout {
        let column = |c: &super::Column| {
            let reading = Reading { time: c.reading.clone(), on_misfit: c.on_misfit };
            LayoutColumn(c.name.clone(), c.cql_type, c.pointer.clone(), c.required, reading)
        };
        let id = (!self.event.id.is_empty()).then(|| self.event.id.join(" + "));
        Layout {
            form: FORM,
            stream: self.stream.name.clone(),
            bucket: self.store.bucket.name().to_owned(),
            shards: self.store.shards,
            ttl_seconds: self.store.ttl_seconds,
            shortest_ttl_seconds: self.store.least_ttl_seconds(),
            pane_ms: self.windows.pane_ms,
            lateness_ms: self.windows.lateness_ms,
            group_by: self.windows.group_by.clone(),
            measures: self.windows.measures.clone(),
            columns: self.columns.iter().map(column).collect(),
            event: Identity(id, self.event.time.clone(), self.event.key.clone()),
            accept: self.event.accept.clone(),
            ahead_ms: self.event.ahead_ms,
        }
    }
}

impl Layout {
    /// Parses a stored layout of the current format version or an earlier one.
    pub fn parse(text: &str) -> Result<Layout, LayoutError> {
        let unreadable = |cause: serde_json::Error| LayoutError::Unreadable {
            text: text.to_owned(),
            cause: cause.to_string(),
        };
        let mut value: serde_json::Value = serde_json::from_str(text).map_err(unreadable)?;
        let form = value.get("form").map_or(Some(1), serde_json::Value::as_u64);
        if let Some(newer) = form.filter(|form| *form > u64::from(FORM)) {
            return Err(LayoutError::Newer(newer));
        }
        if let Some(members) = value.as_object_mut() {
            if form == Some(1) {
                let ttl = members.get("ttl_seconds").cloned().unwrap_or_default();
                members.insert("shortest_ttl_seconds".to_owned(), ttl);
            }
            members.insert("form".to_owned(), FORM.into());
        }
        serde_json::from_value(value).map_err(unreadable)
    }

    /// The shortest TTL in seconds that the stream ever had. 0 if no row expires.
    pub fn shortest_ttl_seconds(&self) -> i64 {
        self.shortest_ttl_seconds
    }

    /// Returns `next` with the shortest TTL of this layout. Use it to replace a stored layout, because rows written
    /// before the TTL was raised keep their shorter TTL.
    pub fn replaced_by(&self, next: &Layout) -> Layout {
        Layout { shortest_ttl_seconds: self.shortest_ttl_seconds, ..next.clone() }
    }

    /// The differences between this layout and `next`.
    pub fn changes_to(&self, next: &Layout) -> Changes {
        let mut changes = Changes::default();
        changes.compare_fixed("stream.name", &self.stream, &next.stream);
        changes.compare_fixed("store.bucket", &self.bucket, &next.bucket);
        changes.compare_fixed("store.shards", &self.shards, &next.shards);
        changes.compare_fixed("windows.pane", &self.pane_ms, &next.pane_ms);
        changes.compare_fixed("windows.group_by", &self.group_by, &next.group_by);
        changes.compare_fixed("windows.measures", &self.measures, &next.measures);
        changes.compare_fixed("event.id", &self.event.0, &next.event.0);
        changes.compare_fixed("event.time", &self.event.1, &next.event.1);
        changes.compare_fixed("event.key", &self.event.2, &next.event.2);
        changes.compare_ttl(self.ttl_seconds, next.ttl_seconds);
        if self.lateness_ms != next.lateness_ms {
            let (old, new) = (self.lateness_ms, next.lateness_ms);
            changes.allowed.push(format!("`windows.lateness`: from {old} ms to {new} ms"));
        }
        changes.compare_accept(&self.accept, &next.accept);
        changes.compare_ahead(self.ahead_ms, next.ahead_ms);
        let reads_plain = self.accept.contains(&ContentMode::Plain);
        changes.compare_columns(&self.columns, &next.columns, reads_plain);
        changes
    }
}

impl Changes {
    /// Compares a value that must not change.
    fn compare_fixed<T: PartialEq + Serialize>(&mut self, key: &str, old: &T, new: &T) {
        if old != new {
            let json = |value: &T| serde_json::to_string(value).unwrap_or_default();
            self.refused.push(format!(
                "`{key}`: registered as {}, now {}; restore the registered value",
                json(old),
                json(new)
            ));
        }
    }

    /// Compares the TTL in seconds, which may only be raised.
    fn compare_ttl(&mut self, old: i64, new: i64) {
        let effective = |ttl: i64| if ttl == 0 { i64::MAX } else { ttl };
        if effective(new) > effective(old) {
            self.allowed.push(format!("`store.ttl`: from {old} s to {new} s (0: forever)"));
        } else if new != old {
            self.refused.push(format!(
                "`store.ttl`: registered as {old} s, now {new} s (0: forever); it can be raised, not lowered: a \
                 duplicate of an event whose row has expired would be counted again"
            ));
        }
    }

    /// Compares the content modes, which may only be added.
    fn compare_accept(&mut self, old: &[ContentMode], new: &[ContentMode]) {
        for mode in old.iter().filter(|mode| !new.contains(mode)) {
            self.refused.push(format!(
                "`event.accept`: registered with \"{}\", now without it; add it again: a replay would turn events \
                 into dead letters",
                mode.name()
            ));
        }
        for mode in new.iter().filter(|mode| !old.contains(mode)) {
            self.allowed.push(format!("`event.accept`: \"{}\" added", mode.name()));
        }
    }

    /// Compares how far events may be ahead of time, in milliseconds. It may only be raised.
    fn compare_ahead(&mut self, old: i64, new: i64) {
        if new > old {
            self.allowed.push(format!("`event.ahead`: from {old} ms to {new} ms"));
        } else if new < old {
            self.refused.push(format!(
                "`event.ahead`: registered as {old} ms, now {new} ms; it can be raised, not lowered: copies of events \
                 that are further ahead would be counted again after a state file is lost"
            ));
        }
    }

    /// Compares the declared columns. Their order does not matter, because rows are written by column name. If the
    /// processor reads plain records, their values depend on the pointers, which then must not change.
    fn compare_columns(&mut self, old: &[LayoutColumn], new: &[LayoutColumn], reads_plain: bool) {
        for LayoutColumn(name, cql_type, pointer, required, reading) in old {
            let Some(LayoutColumn(_, now_type, now_pointer, now_required, now_reading)) =
                new.iter().find(|c| c.0 == *name)
            else {
                self.refused
                    .push(format!("column `{name}`: registered, but no longer declared; declare it again"));
                continue;
            };
            if cql_type != now_type {
                let (old, new) = (cql_type.name(), now_type.name());
                self.refused.push(format!(
                    "column `{name}`: registered as {old}, now {new}; restore the registered type and add a column \
                     with another name"
                ));
            }
            if required != now_required {
                self.refused.push(format!(
                    "column `{name}`: registered with required = {required}, now {now_required}; restore the \
                     registered value: otherwise a replay would turn other records into dead letters than were counted"
                ));
            }
            if reading != now_reading {
                self.refused.push(format!(
                    "column `{name}`: `unit`, `format`, `zone` or `on_misfit` has changed; restore the registered \
                     value, or add a column with another name"
                ));
            }
            if pointer != now_pointer && reads_plain {
                self.refused.push(format!(
                    "column `{name}`: pointer from `{pointer}` to `{now_pointer}`; restore the registered pointer, or \
                     add a column with another name: a replay would read other values from plain records"
                ));
            } else if pointer != now_pointer {
                self.allowed.push(format!("column `{name}`: pointer from `{pointer}` to `{now_pointer}`"));
            }
        }
        for LayoutColumn(name, cql_type, _, required, _) in
            new.iter().filter(|c| old.iter().all(|o| o.0 != c.0))
        {
            if *required {
                self.refused.push(format!(
                    "column `{name}`: new and required, but events that are already in Kafka lack it; remove `required`"
                ));
            } else {
                self.allowed.push(format!("column `{name}`: new, {}", cql_type.name()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = include_str!("../../../../../streams/user_created.toml");

    fn layout(edit: impl Fn(&mut Definition)) -> Layout {
        let mut definition = Definition::parse("user_created.toml", FILE).unwrap();
        edit(&mut definition);
        definition.layout()
    }

    fn changes(edit: impl Fn(&mut Definition)) -> Changes {
        layout(|_| {}).changes_to(&layout(edit))
    }

    fn check_allowed(edit: impl Fn(&mut Definition), expected: &[&str]) {
        let changes = changes(edit);
        assert_eq!((&changes.refused[..], changes.allowed.len()), (&[][..], expected.len()), "{changes}");
        for (change, expected) in changes.allowed.iter().zip(expected) {
            assert!(change.contains(expected), "`{expected}` is not in `{change}`");
        }
    }

    fn check_refused(edit: impl Fn(&mut Definition), key: &str, remedy: &str) {
        let refused = changes(edit).refused;
        assert!(
            refused.len() == 1 && refused[0].contains(key) && refused[0].contains(remedy),
            "{refused:#?}"
        );
    }

    fn with_new_column(required: bool) -> impl Fn(&mut Definition) {
        move |d| {
            d.columns.push(super::super::Column {
                name: "phone".to_owned(),
                cql_type: CqlType::Text,
                pointer: "/phone".to_owned(),
                required,
                reading: TimeReading::default(),
                on_misfit: OnMisfit::DeadLetter,
            });
        }
    }

    #[test]
    fn changes_that_stored_data_survives_are_allowed() {
        check_allowed(|_| {}, &[]);
        check_allowed(with_new_column(false), &["column `phone`: new, text"]);
        check_allowed(|d| d.windows.lateness_ms = 1, &["`windows.lateness`: from 600000 ms to 1 ms"]);
        check_allowed(|d| d.event.ahead_ms = 7_200_000, &["`event.ahead`: from 3600000 ms to 7200000 ms"]);
        check_allowed(|d| d.store.ttl_seconds = 0, &["`store.ttl`: from 31536000 s to 0 s"]);
        check_allowed(|d| d.store.ttl_seconds += 1, &["to 31536001 s"]);
        check_allowed(|d| d.columns[0].pointer = "/x".to_owned(), &["to `/x`"]);
        check_allowed(|d| d.columns.reverse(), &[]);
        check_allowed(
            |d| d.event.accept.push(ContentMode::Structured),
            &["`event.accept`: \"structured\" added"],
        );
        let other_source = |d: &mut Definition| {
            d.source.url = "https://example.org/".to_owned();
            d.stream.schedule = super::super::Schedule::Every(5_000);
            d.stream.retry.attempts = Some(3);
        };
        check_allowed(other_source, &[]);
    }

    #[test]
    fn changes_that_stored_data_does_not_survive_are_refused_with_their_key_and_a_remedy() {
        check_refused(|d| d.stream.name = "other".to_owned(), "`stream.name`", "restore");
        check_refused(|d| d.store.bucket = crate::contracts::event::Bucket::Day, "`store.bucket`", "restore");
        check_refused(|d| d.store.shards += 1, "`store.shards`", "registered as 4, now 5");
        check_refused(|d| d.store.ttl_seconds -= 1, "`store.ttl`", "raised, not lowered");
        check_refused(|d| d.event.ahead_ms -= 1, "`event.ahead`", "raised, not lowered");
        check_refused(|d| d.windows.pane_ms *= 2, "`windows.pane`", "restore");
        check_refused(|d| d.windows.group_by.reverse(), "`windows.group_by`", "restore");
        check_refused(|d| d.windows.measures.clear(), "`windows.measures`", "restore");
        check_refused(|d| d.event.id = vec!["/id".to_owned()], "`event.id`", "restore");
        let time = || EventTime::Field { pointer: "/t".to_owned(), reading: TimeReading::seconds() };
        check_refused(|d| d.event.time = time(), "`event.time`", "restore");
        check_refused(|d| d.columns[0].on_misfit = OnMisfit::Null, "`on_misfit` has changed", "another name");
        check_refused(|d| d.event.key = Some("/k".to_owned()), "`event.key`", "restore");
        check_refused(|d| drop(d.columns.pop()), "no longer declared", "declare it again");
        check_refused(
            |d| d.columns[0].cql_type = CqlType::Int,
            "registered as text, now int",
            "another name",
        );
        check_refused(|d| d.columns[0].required ^= true, "required = ", "restore");
        check_refused(with_new_column(true), "column `phone`", "remove `required`");
    }

    #[test]
    fn a_mode_stays_accepted_and_plain_records_keep_their_pointers() {
        let plain = layout(|d| d.event.accept.push(ContentMode::Plain));
        let refused = |edit: fn(&mut Definition)| plain.changes_to(&layout(edit)).refused;
        let narrowed = refused(|_| {});
        assert!(narrowed.len() == 1 && narrowed[0].contains("registered with \"plain\""), "{narrowed:?}");
        let moved = refused(|d| {
            d.event.accept.push(ContentMode::Plain);
            d.columns[0].pointer = "/x".to_owned();
        });
        assert!(moved.len() == 1 && moved[0].contains("values from plain records"), "{moved:?}");
    }

    #[test]
    fn a_raised_ttl_keeps_the_shortest_one() {
        let old = layout(|_| {});
        let raised = old.replaced_by(&layout(|d| d.store.ttl_seconds = 0));
        assert_eq!((raised.ttl_seconds, raised.shortest_ttl_seconds()), (0, 31_536_000));
        assert_eq!(Layout::parse(&raised.to_string()), Ok(raised));
    }

    #[test]
    fn layouts_of_every_earlier_form_are_read_unchanged() {
        let check = |form: u32, golden: &str, file: &str| {
            assert!(form == 1 || golden.contains(&format!("\"form\":{form}")), "{golden}");
            let now = Definition::parse("golden", file).unwrap().layout();
            assert_eq!(Layout::parse(golden.trim_end()), Ok(now));
        };
        let orders = include_str!("../../../../../streams/orders.toml");
        let charges = include_str!("../../../../../streams/stripe_charges.toml");
        check(1, include_str!("../../../tests/golden/layout_1_user_created.json"), FILE);
        check(1, include_str!("../../../tests/golden/layout_1_orders.json"), orders);
        check(1, include_str!("../../../tests/golden/layout_1_stripe_charges.json"), charges);
        check(2, include_str!("../../../tests/golden/layout_2_user_created.json"), FILE);
        check(2, include_str!("../../../tests/golden/layout_2_orders.json"), orders);
        check(3, include_str!("../../../tests/golden/layout_3_user_created.json"), FILE);
        let written = layout(|_| {}).to_string();
        let golden = include_str!("../../../tests/golden/layout_4_user_created.json");
        assert_eq!(
            written,
            golden.trim_end(),
            "increment FORM when the text changes, and keep the old golden file"
        );
    }

    #[test]
    fn the_order_of_members_and_the_notation_of_numbers_do_not_matter() {
        let one = r#"{"stream":"s","bucket":"day","shards":1,"ttl_seconds":0,"pane_ms":60000,"lateness_ms":0,
            "group_by":[{"column":"a","groups":{"step":{"from":0.0,"step":10.0,"count":3}}}],"measures":["a"],
            "columns":[["a","int","/a",false]],"event":[null,"interval",null]}"#;
        let other = r#"{"event":[null,"interval",null],"columns":[["a","int","/a",false]],"measures":["a"],
            "group_by":[{"groups":{"step":{"count":3,"step":10,"from":0}},"column":"a"}],"lateness_ms":0,
            "pane_ms":60000,"ttl_seconds":0,"shards":1,"bucket":"day","stream":"s"}"#;
        let (one, other) = (Layout::parse(one).unwrap(), Layout::parse(other).unwrap());
        assert!(one.changes_to(&other).is_empty());
    }

    #[test]
    fn an_unreadable_layout_is_distinguished_from_one_of_a_newer_program() {
        let newer = Layout::parse(r#"{"form":5,"anything":1}"#).unwrap_err().to_string();
        assert!(newer.contains("form 5") && newer.contains("newer program"), "{newer}");
        for text in ["", "L", "{}", r#"{"form":"x"}"#] {
            let unreadable = Layout::parse(text).unwrap_err();
            assert!(matches!(unreadable, LayoutError::Unreadable { .. }), "{unreadable}");
        }
    }
}
