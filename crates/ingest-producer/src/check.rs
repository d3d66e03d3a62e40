//! `source check`: fetches a page of a source and shows the events that it would become. Nothing is produced.

use crate::CommandOutput;
use crate::config::CheckArgs;
use crate::schedule::Timeline;
use crate::source::client::{FetchPage, Page};
use crate::source::extract::{self, Event, Extractor, Outgoing};
use crate::source::paginate::Pages;
use crate::source::request::Requests;
use anyhow::Context;
use chrono::{DateTime, SecondsFormat};
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{ContentArrangement, Table};
use common::contracts::event;
use common::contracts::run_ledger::Interval;
use common::contracts::stream::{Definition, redacted};
use serde::Serialize;
use serde_json::value::RawValue;
use std::collections::BTreeMap;
use std::fmt::Write;

/// Warning about the consequences of a definition without `event.id`.
pub const NO_ID: &str = "event.id is not set, so records are identified by their position. If an interval is fetched \
                         again and the response has changed (one record more or less, or another order), records get \
                         other ids and are counted twice; point event.id to a field that identifies a record";

/// Fetches the first page of the last completed interval twice and shows its events.
pub async fn check(
    definition: &Definition,
    requests: &Requests,
    source: &dyn FetchPage,
    args: &CheckArgs,
    now_ms: i64,
) -> anyhow::Result<CommandOutput> {
    let timeline = Timeline::first(&definition.stream.schedule, None, 1, now_ms)?;
    let interval = timeline.containing(timeline.start_ms());
    let pages = Pages::new(&definition.source.pagination, definition.source.page_size, 1);
    let url = requests.url(interval, &pages.first())?;
    let shown_url = redacted(url.as_str());
    let page = source.fetch(&url).await.with_context(|| shown_url.clone())?;
    let found = PageSummary::of(definition, interval, &page, args.events as usize)?;
    let again = source.fetch(&url).await.with_context(|| format!("{shown_url}, second request"))?;
    let again = PageSummary::of(definition, interval, &again, 0)?;
    let shown: Vec<EventView<'_>> = found.shown.iter().map(EventView::of).collect();
    if args.json {
        return Ok(CommandOutput::text(serde_json::to_string_pretty(&shown)?));
    }
    let mut text = heading(&shown_url, interval, &page, found.records);
    let _ = writeln!(text, "{}", table(definition, &shown));
    for warning in warnings(definition, &found, &again) {
        let _ = writeln!(text, "warning: {warning}");
    }
    Ok(CommandOutput::text(text))
}

/// A summary of a page. Only the first few events are kept.
#[derive(Debug, Default)]
struct PageSummary {
    records: u64,
    refused: u64,
    first_refusal: String,
    /// Number of events that lack a required column, by column.
    lacking: BTreeMap<String, u64>,
    /// Hash of all ids and times, in order.
    identities: u64,
    /// Hash of all values, in order.
    values: u64,
    shown: Vec<Event>,
}

impl PageSummary {
    fn of(
        definition: &Definition,
        interval: Interval,
        page: &Page,
        events: usize,
    ) -> anyhow::Result<PageSummary> {
        let extractor = Extractor::new(definition);
        let mut found = PageSummary::default();
        for record in extract::records(&page.body, &definition.source.records)? {
            match extractor.outgoing(interval, found.records, record?) {
                Outgoing::Event(event) => found.add(definition, event, events),
                Outgoing::Refused(refused) => {
                    if found.refused == 0 {
                        found.first_refusal = refused.reason;
                    }
                    found.refused += 1;
                }
            }
            found.records += 1;
        }
        Ok(found)
    }

    fn add(&mut self, definition: &Definition, event: Event, events: usize) {
        let present = columns(&event);
        for column in
            definition.columns.iter().filter(|c| c.required && !present.contains_key(c.name.as_str()))
        {
            *self.lacking.entry(column.name.clone()).or_default() += 1;
        }
        let chained = |hash: u64, bytes: &[u8]| event::seen_hash(hash.cast_signed(), bytes);
        self.identities = chained(self.identities ^ event.time_ms.cast_unsigned(), event.id.as_bytes());
        self.values = chained(self.values, &event.value);
        if self.shown.len() < events {
            self.shown.push(event);
        }
    }
}

fn warnings(definition: &Definition, first: &PageSummary, second: &PageSummary) -> Vec<String> {
    let mut warnings = Vec::new();
    if definition.event.id.is_none() {
        warnings.push(NO_ID.to_owned());
    }
    if (first.records, first.identities) != (second.records, second.identities) {
        let other = "two requests returned different ids or times: a refetched interval is counted again";
        warnings.push(other.to_owned());
    } else if first.values != second.values {
        let other =
            "two requests returned different values for the same ids and times: the first values are kept";
        warnings.push(other.to_owned());
    }
    let records = first.records;
    if first.refused > 0 {
        let (refused, reason) = (first.refused, &first.first_refusal);
        warnings
            .push(format!("{refused} of {records} records would become dead letters; the first: {reason}"));
    }
    for (column, lacking) in &first.lacking {
        warnings.push(format!(
            "{lacking} of {records} records lack required column `{column}`: they would become dead letters"
        ));
    }
    if records == 0 {
        warnings.push("the page has no records".to_owned());
    }
    warnings
}

/// The columns of an event, each as JSON text.
fn columns(event: &Event) -> BTreeMap<&str, &RawValue> {
    serde_json::from_slice(&event.value).unwrap_or_default()
}

/// An event as it is shown.
#[derive(Debug, Serialize)]
struct EventView<'a> {
    columns: BTreeMap<&'a str, &'a RawValue>,
    id: &'a str,
    key: &'a str,
    time: String,
}

impl EventView<'_> {
    fn of(event: &Event) -> EventView<'_> {
        EventView { columns: columns(event), id: &event.id, key: &event.key, time: time(event.time_ms) }
    }
}

fn time(ms: i64) -> String {
    DateTime::from_timestamp_millis(ms).unwrap_or_default().to_rfc3339_opts(SecondsFormat::AutoSi, true)
}

fn heading(url: &str, interval: Interval, page: &Page, records: u64) -> String {
    let (start, end) = (time(interval.start_ms), time(interval.end_ms));
    format!("{url}\ninterval {start} to {end}: {records} records, {} bytes\n", page.bytes)
}

/// A table with one row per event. A missing column is shown as a dash.
fn table(definition: &Definition, events: &[EventView<'_>]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED).set_content_arrangement(ContentArrangement::Dynamic);
    let names = definition.columns.iter().map(|c| c.name.clone());
    table.set_header(["event_id".to_owned(), "event_time".to_owned()].into_iter().chain(names));
    for event in events {
        let cell = |name: &str| match event.columns.get(name) {
            None => "–".to_owned(),
            Some(raw) => serde_json::from_str::<String>(raw.get()).unwrap_or_else(|_| raw.get().to_owned()),
        };
        let identity = [event.id.to_owned(), event.time.clone()];
        table.add_row(identity.into_iter().chain(definition.columns.iter().map(|c| cell(&c.name))));
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::AttemptError;
    use async_trait::async_trait;
    use serde_json::json;
    use std::sync::atomic::{AtomicU64, Ordering};
    use url::Url;

    /// Returns the same page for each request, or another page each time.
    struct Fake {
        stable: bool,
        requests: AtomicU64,
    }

    #[async_trait]
    impl FetchPage for Fake {
        async fn fetch(&self, _: &Url) -> Result<Page, AttemptError> {
            let n = self.requests.fetch_add(1, Ordering::SeqCst);
            let id = format!("id-{}", if self.stable { 0 } else { n });
            let person = json!({"login": {"uuid": id}, "name": {"first": "Ada"}, "dob": {"age": 36}});
            let body = json!({"results": [person]}).to_string().into_bytes();
            Ok(Page { body, link: None, bytes: 80 })
        }
    }

    async fn checked(stable: bool, json: bool) -> String {
        let definition =
            Definition::parse("users", include_str!("../../../streams/user_created.toml")).unwrap();
        let requests = Requests::new(&definition, None).unwrap();
        let source = Fake { stable, requests: AtomicU64::new(0) };
        let args = CheckArgs { events: 5, json };
        check(&definition, &requests, &source, &args, 1_767_225_600_000).await.unwrap().text
    }

    #[tokio::test]
    async fn events_are_shown_as_they_would_be_produced() {
        insta::assert_snapshot!(checked(true, true).await);
        let text = checked(true, false).await;
        assert!(
            text.contains("id-0") && text.contains("Ada") && text.contains("1 records, 80 bytes"),
            "{text}"
        );
        assert!(text.contains("1 of 1 records lack required column `last_name`"), "{text}");
        assert!(!text.contains("two requests returned") && !text.contains("event.id is not set"), "{text}");
    }

    #[tokio::test]
    async fn a_source_with_unstable_ids_causes_a_warning() {
        assert!(checked(false, false).await.contains("warning: two requests returned"));
    }
}
