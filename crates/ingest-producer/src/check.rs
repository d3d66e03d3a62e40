//! `source check`: what a source gives, and which events it would become. Produces nothing.

use crate::Done;
use crate::config::CheckArgs;
use crate::schedule::Timeline;
use crate::source::client::{FetchPage, Page};
use crate::source::extract::{self, Event};
use crate::source::paginate::Pages;
use crate::source::request::Requests;
use anyhow::Context;
use chrono::{DateTime, SecondsFormat};
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{ContentArrangement, Table};
use common::run_ledger::Interval;
use common::stream::{Definition, EventTime};
use serde_json::{Map, Value, json};
use std::fmt::Write;
use url::Url;

/// Fetches the first page of the last ended interval, twice, and shows its events.
pub async fn check(
    definition: &Definition,
    requests: &Requests,
    source: &dyn FetchPage,
    args: &CheckArgs,
    now_ms: i64,
) -> anyhow::Result<Done> {
    let timeline = Timeline::first(&definition.stream.schedule, None, 1, now_ms)?;
    let interval = timeline.containing(timeline.start_ms());
    let pages = Pages::new(&definition.source.pagination, definition.source.page_size, 1);
    let url = requests.url(interval, &pages.first())?;
    let page = source.fetch(&url).await.with_context(|| format!("{url}"))?;
    let events = events(definition, interval, &page)?;
    let again = source.fetch(&url).await.with_context(|| format!("{url}, asked again"))?;
    let warnings = warnings(definition, &events, &self::events(definition, interval, &again)?);
    let shown: Vec<&Event> = events.iter().take(args.events as usize).collect();
    if args.json {
        return Ok(Done::text(serde_json::to_string_pretty(
            &shown.iter().map(|e| as_json(e)).collect::<Vec<_>>(),
        )?));
    }
    let mut text = heading(&url, interval, &page, events.len());
    let _ = writeln!(text, "{}", table(definition, &shown));
    for warning in warnings {
        let _ = writeln!(text, "warning: {warning}");
    }
    Ok(Done::text(text))
}

fn events(definition: &Definition, interval: Interval, page: &Page) -> anyhow::Result<Vec<Event>> {
    let records = extract::records(definition, &page.body)?;
    let count = records.len() as u64;
    let events = records.iter().zip(0..).map(|(record, index)| {
        let mut event = extract::event(definition, interval, index, record);
        if definition.event.time == EventTime::Interval {
            event.time_ms = Some(extract::spread(interval, index, count));
        }
        event
    });
    Ok(events.collect())
}

fn warnings(definition: &Definition, first: &[Event], second: &[Event]) -> Vec<String> {
    let mut warnings = Vec::new();
    let keys = |events: &[Event]| events.iter().map(|e| (e.id.clone(), e.time_ms)).collect::<Vec<_>>();
    if keys(first) != keys(second) {
        let stable = "asked twice, the source gave other ids or times: an interval that is fetched again would count twice";
        warnings.push(stable.to_owned());
    } else if definition.event.id.is_none()
        && first.iter().map(|e| &e.value).ne(second.iter().map(|e| &e.value))
    {
        let order =
            "asked twice, the source gave other records; without event.id their ids follow their order only";
        warnings.push(order.to_owned());
    }
    let mut count = |what: &str, lacking: usize| {
        if lacking > 0 {
            warnings.push(format!(
                "{lacking} of {} records lack {what}: they would become dead letters",
                first.len()
            ));
        }
    };
    count("an id at event.id", first.iter().filter(|e| e.id.is_none()).count());
    count("a time at event.time", first.iter().filter(|e| e.time_ms.is_none()).count());
    for column in definition.columns.iter().filter(|c| c.required) {
        let lacking = first.iter().filter(|e| !columns(e).contains_key(&column.name)).count();
        count(&format!("required column `{}`", column.name), lacking);
    }
    if first.is_empty() {
        warnings.push("the page has no records".to_owned());
    }
    warnings
}

fn columns(event: &Event) -> Map<String, Value> {
    serde_json::from_slice(&event.value).unwrap_or_default()
}

fn time(ms: i64) -> String {
    DateTime::from_timestamp_millis(ms).unwrap_or_default().to_rfc3339_opts(SecondsFormat::AutoSi, true)
}

fn as_json(event: &Event) -> Value {
    json!({"id": event.id, "time": event.time_ms.map(time), "key": event.key, "columns": columns(event)})
}

fn heading(url: &Url, interval: Interval, page: &Page, records: usize) -> String {
    let (start, end) = (time(interval.start_ms), time(interval.end_ms));
    format!("{url}\ninterval {start} to {end}: {records} records, {} bytes\n", page.bytes)
}

/// One row an event; columns that no event has are named by their absence.
fn table(definition: &Definition, events: &[&Event]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED).set_content_arrangement(ContentArrangement::Dynamic);
    let names = definition.columns.iter().map(|c| c.name.clone());
    table.set_header(["event_id".to_owned(), "event_time".to_owned()].into_iter().chain(names));
    for event in events {
        let values = columns(event);
        let cell = |name: &String| match values.get(name) {
            None => "–".to_owned(),
            Some(Value::String(text)) => text.clone(),
            Some(other) => other.to_string(),
        };
        let id = event.id.clone().unwrap_or_else(|| "(none)".to_owned());
        let at = event.time_ms.map_or_else(|| "(none)".to_owned(), time);
        table.add_row([id, at].into_iter().chain(definition.columns.iter().map(|c| cell(&c.name))));
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::AttemptError;
    use async_trait::async_trait;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// Gives the same page each time, or another one.
    struct Fake {
        stable: bool,
        asked: AtomicU64,
    }

    #[async_trait]
    impl FetchPage for Fake {
        async fn fetch(&self, _: &Url) -> Result<Page, AttemptError> {
            let n = self.asked.fetch_add(1, Ordering::SeqCst);
            let id = format!("id-{}", if self.stable { 0 } else { n });
            let person = json!({"login": {"uuid": id}, "name": {"first": "Ada"}, "dob": {"age": 36}});
            Ok(Page { body: json!({"results": [person]}), link: None, bytes: 80 })
        }
    }

    async fn checked(stable: bool, json: bool) -> String {
        let definition =
            Definition::parse("users", include_str!("../../../streams/user_created.toml")).unwrap();
        let requests = Requests::new(&definition, None).unwrap();
        let source = Fake { stable, asked: AtomicU64::new(0) };
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
        assert!(!text.contains("count twice"), "{text}");
    }

    #[tokio::test]
    async fn a_source_that_does_not_repeat_itself_is_warned_of() {
        assert!(checked(false, false).await.contains("warning: asked twice"));
    }
}
