//! What the stored data of a stream depends on: written by `init` into table `streams`, kept in every state file, and compared by
//! meaning. Decides which changes a stream with data survives.

use super::{CqlType, Definition, EventTime, GroupBy};
use serde::{Deserialize, Serialize};
use std::fmt::{self, Display};

/// Form of the stored text. It also reads the earlier ones, of which `tests/golden` holds examples: 1 did not note the shortest
/// TTL.
const FORM: u32 = 2;

/// A stream's layout. Its text is one line of JSON.
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
    columns: Vec<LaidOut>,
    event: Identity,
}

/// A declared column: name, type, pointer into the source's record, whether it is required.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct LaidOut(String, CqlType, String, bool);

/// What an event's identity and partition follow from: pointers to id, time and key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Identity(Option<String>, EventTime, Option<String>);

/// A stored layout cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// A later version wrote it.
    #[error("it has form {0}, this program knows {FORM}: run the newer program")]
    Newer(u64),
    /// It is not a layout.
    #[error("it cannot be read ({cause}): {text}")]
    Unreadable {
        /// As stored.
        text: String,
        /// What is wrong with it.
        cause: String,
    },
}

/// The differences between a stored layout and the next one. Each names its key and both sides.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// Those that stored data survives.
    pub allowed: Vec<String>,
    /// Those that it does not, each with a way on.
    pub refused: Vec<String>,
}

impl Changes {
    /// Whether both mean the same.
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

impl Layout {
    pub(super) fn of(d: &Definition) -> Layout {
        let column = |c: &super::Column| LaidOut(c.name.clone(), c.cql_type, c.pointer.clone(), c.required);
        Layout {
            form: FORM,
            stream: d.stream.name.clone(),
            bucket: d.store.bucket.name().to_owned(),
            shards: d.store.shards,
            ttl_seconds: d.store.ttl_seconds,
            shortest_ttl_seconds: d.store.least_ttl_seconds(),
            pane_ms: d.windows.pane_ms,
            lateness_ms: d.windows.lateness_ms,
            group_by: d.windows.group_by.clone(),
            measures: d.windows.measures.clone(),
            columns: d.columns.iter().map(column).collect(),
            event: Identity(d.event.id.clone(), d.event.time.clone(), d.event.key.clone()),
        }
    }

    /// Reads a stored layout of any form up to today's.
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
        if form == Some(1)
            && let Some(members) = value.as_object_mut()
        {
            let ttl = members.get("ttl_seconds").cloned().unwrap_or_default();
            members.insert("shortest_ttl_seconds".to_owned(), ttl);
            members.insert("form".to_owned(), FORM.into());
        }
        serde_json::from_value(value).map_err(unreadable)
    }

    /// Seconds that every row of the stream lives at least; 0: forever.
    pub fn shortest_ttl_seconds(&self) -> i64 {
        self.shortest_ttl_seconds
    }

    /// `next`, to be stored in place of this layout: rows that were written before the TTL was raised still expire sooner.
    pub fn replaced_by(&self, next: &Layout) -> Layout {
        Layout { shortest_ttl_seconds: self.shortest_ttl_seconds, ..next.clone() }
    }

    /// What `next` changes.
    pub fn changes_to(&self, next: &Layout) -> Changes {
        let mut changes = Changes::default();
        changes.fixed("stream.name", &self.stream, &next.stream);
        changes.fixed("store.bucket", &self.bucket, &next.bucket);
        changes.fixed("store.shards", &self.shards, &next.shards);
        changes.fixed("windows.pane", &self.pane_ms, &next.pane_ms);
        changes.fixed("windows.group_by", &self.group_by, &next.group_by);
        changes.fixed("windows.measures", &self.measures, &next.measures);
        changes.fixed("event.id", &self.event.0, &next.event.0);
        changes.fixed("event.time", &self.event.1, &next.event.1);
        changes.fixed("event.key", &self.event.2, &next.event.2);
        changes.ttl(self.ttl_seconds, next.ttl_seconds);
        if self.lateness_ms != next.lateness_ms {
            let (old, new) = (self.lateness_ms, next.lateness_ms);
            changes.allowed.push(format!("`windows.lateness`: from {old} ms to {new} ms"));
        }
        changes.columns(&self.columns, &next.columns);
        changes
    }
}

impl Changes {
    fn fixed<T: PartialEq + Serialize>(&mut self, key: &str, old: &T, new: &T) {
        if old != new {
            let json = |value: &T| serde_json::to_string(value).unwrap_or_default();
            self.refused.push(format!(
                "`{key}`: registered as {}, now {}; put it back",
                json(old),
                json(new)
            ));
        }
    }

    fn ttl(&mut self, old: i64, new: i64) {
        let for_ever = |ttl: i64| if ttl == 0 { i64::MAX } else { ttl };
        if for_ever(new) > for_ever(old) {
            self.allowed.push(format!("`store.ttl`: from {old} s to {new} s (0: forever)"));
        } else if new != old {
            self.refused.push(format!(
                "`store.ttl`: registered as {old} s, now {new} s (0: forever); it can be raised, not lowered: copies of events \
                 whose rows expire sooner would be counted twice"
            ));
        }
    }

    /// Rows are written by column name, so the order of columns does not matter.
    fn columns(&mut self, old: &[LaidOut], new: &[LaidOut]) {
        for LaidOut(name, cql_type, pointer, required) in old {
            let Some(LaidOut(_, now_type, now_pointer, now_required)) = new.iter().find(|c| c.0 == *name)
            else {
                self.refused
                    .push(format!("column `{name}`: registered, but no longer declared; put it back"));
                continue;
            };
            if cql_type != now_type {
                let (old, new) = (cql_type.name(), now_type.name());
                self.refused.push(format!(
                    "column `{name}`: registered as {old}, now {new}; put it back, and add a column of another name"
                ));
            }
            if required != now_required {
                self.refused.push(format!(
                    "column `{name}`: registered with required = {required}, now {now_required}; put it back: a replay would \
                     take other records for dead letters than were counted"
                ));
            }
            if pointer != now_pointer {
                self.allowed
                    .push(format!("column `{name}`: from the source's `{pointer}` to `{now_pointer}`"));
            }
        }
        for LaidOut(name, cql_type, _, required) in new.iter().filter(|c| old.iter().all(|o| o.0 != c.0)) {
            if *required {
                self.refused.push(format!(
                    "column `{name}`: new and required, but the events that Kafka holds already lack it; leave out `required`"
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

    const FILE: &str = include_str!("../../../../streams/user_created.toml");

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

    fn check_refused(edit: impl Fn(&mut Definition), key: &str, way_on: &str) {
        let refused = changes(edit).refused;
        assert!(
            refused.len() == 1 && refused[0].contains(key) && refused[0].contains(way_on),
            "{refused:#?}"
        );
    }

    fn appended(required: bool) -> impl Fn(&mut Definition) {
        move |d| {
            d.columns.push(super::super::Column {
                name: "phone".to_owned(),
                cql_type: CqlType::Text,
                pointer: "/phone".to_owned(),
                required,
            });
        }
    }

    #[test]
    fn what_stored_data_survives_is_allowed() {
        check_allowed(|_| {}, &[]);
        check_allowed(appended(false), &["column `phone`: new, text"]);
        check_allowed(|d| d.windows.lateness_ms = 1, &["`windows.lateness`: from 600000 ms to 1 ms"]);
        check_allowed(|d| d.store.ttl_seconds = 0, &["`store.ttl`: from 31536000 s to 0 s"]);
        check_allowed(|d| d.store.ttl_seconds += 1, &["to 31536001 s"]);
        check_allowed(|d| d.columns[0].pointer = "/x".to_owned(), &["to `/x`"]);
        check_allowed(|d| d.columns.reverse(), &[]);
        let elsewhere = |d: &mut Definition| {
            d.source.url = "https://example.org/".to_owned();
            d.stream.schedule = super::super::Schedule::Every(5_000);
            d.stream.retry.attempts = Some(3);
        };
        check_allowed(elsewhere, &[]);
    }

    #[test]
    fn what_stored_data_does_not_survive_is_refused_by_its_key_with_a_way_on() {
        check_refused(|d| d.stream.name = "other".to_owned(), "`stream.name`", "put it back");
        check_refused(|d| d.store.bucket = crate::event::Bucket::Day, "`store.bucket`", "put it back");
        check_refused(|d| d.store.shards += 1, "`store.shards`", "registered as 4, now 5");
        check_refused(|d| d.store.ttl_seconds -= 1, "`store.ttl`", "raised, not lowered");
        check_refused(|d| d.windows.pane_ms *= 2, "`windows.pane`", "put it back");
        check_refused(|d| d.windows.group_by.reverse(), "`windows.group_by`", "put it back");
        check_refused(|d| d.windows.measures.clear(), "`windows.measures`", "put it back");
        check_refused(|d| d.event.id = Some("/id".to_owned()), "`event.id`", "put it back");
        check_refused(|d| d.event.time = EventTime::Seconds("/t".to_owned()), "`event.time`", "put it back");
        check_refused(|d| d.event.key = Some("/k".to_owned()), "`event.key`", "put it back");
        check_refused(|d| drop(d.columns.pop()), "no longer declared", "put it back");
        check_refused(
            |d| d.columns[0].cql_type = CqlType::Int,
            "registered as text, now int",
            "another name",
        );
        check_refused(|d| d.columns[0].required ^= true, "required = ", "put it back");
        check_refused(appended(true), "column `phone`", "leave out `required`");
    }

    #[test]
    fn a_raised_ttl_leaves_the_shortest_one_on_record() {
        let old = layout(|_| {});
        let raised = old.replaced_by(&layout(|d| d.store.ttl_seconds = 0));
        assert_eq!((raised.ttl_seconds, raised.shortest_ttl_seconds()), (0, 31_536_000));
        assert_eq!(Layout::parse(&raised.to_string()), Ok(raised));
    }

    #[test]
    fn layouts_of_every_earlier_form_mean_what_they_meant() {
        let check = |form: u32, golden: &str, file: &str| {
            assert_eq!(golden.contains("\"form\":2"), form == 2, "{golden}");
            let now = Definition::parse("golden", file).unwrap().layout();
            assert_eq!(Layout::parse(golden.trim_end()), Ok(now));
        };
        let orders = include_str!("../../../../streams/orders.toml");
        let charges = include_str!("../../../../streams/stripe_charges.toml");
        check(1, include_str!("../../tests/golden/layout_1_user_created.json"), FILE);
        check(1, include_str!("../../tests/golden/layout_1_orders.json"), orders);
        check(1, include_str!("../../tests/golden/layout_1_stripe_charges.json"), charges);
        check(2, include_str!("../../tests/golden/layout_2_user_created.json"), FILE);
        check(2, include_str!("../../tests/golden/layout_2_orders.json"), orders);
        let written = layout(|_| {}).to_string();
        let golden = include_str!("../../tests/golden/layout_2_user_created.json");
        assert_eq!(
            written,
            golden.trim_end(),
            "give another form another number, and keep the old golden file"
        );
    }

    #[test]
    fn the_order_of_members_and_the_spelling_of_numbers_mean_nothing() {
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
    fn what_cannot_be_read_is_told_apart_from_what_a_newer_program_wrote() {
        let newer = Layout::parse(r#"{"form":3,"anything":1}"#).unwrap_err().to_string();
        assert!(newer.contains("form 3") && newer.contains("newer program"), "{newer}");
        for text in ["", "L", "{}", r#"{"form":"x"}"#] {
            let unreadable = Layout::parse(text).unwrap_err();
            assert!(matches!(unreadable, LayoutError::Unreadable { .. }), "{unreadable}");
        }
    }
}
