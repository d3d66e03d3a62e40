//! `source check`: walks the pages of an interval as a run does, and shows the events that their records would become
//! and which records would become dead letters. Nothing is produced.

use crate::CommandOutput;
use crate::config::CheckArgs;
use crate::draft::PLAUSIBLE_MS;
use crate::schedule::Timeline;
use crate::source::client::{FetchPage, Page};
use crate::source::extract::{Each, Event, Extractor, Outgoing};
use crate::source::request::Requests;
use crate::source::walk::{Walk, Walker};
use anyhow::Context;
use chrono::{DateTime, SecondsFormat};
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{ContentArrangement, Table};
use common::contracts::run_ledger::Interval;
use common::contracts::stream::template::{Placeholder, Template};
use common::contracts::stream::{ContentMode, Definition, EventTime, OnMisfit, PageOrder, redacted};
use common::contracts::{event, value};
use serde::Serialize;
use serde_json::value::RawValue;
use std::collections::BTreeMap;
use std::fmt::Write;

/// Warning about the consequences of a definition without `event.id`.
pub const NO_ID: &str = "event.id is not set, so records are identified by their position. If an interval is fetched \
                         again and the response has changed (one record more or less, or another order), records get \
                         other ids and are counted twice; point event.id to a field that identifies a record";

/// Walks the first pages of the last completed interval and shows their events. Fetches the first page twice. The exit
/// code is 1 if a record would become a dead letter.
pub async fn check(
    definition: &Definition,
    requests: &Requests,
    source: &dyn FetchPage,
    args: &CheckArgs,
    now_ms: i64,
) -> anyhow::Result<CommandOutput> {
    let timeline = Timeline::first(&definition.stream.schedule, None, 1, now_ms)?;
    let interval = timeline.containing(timeline.start_ms());
    let walker = Walker { source, requests, definition, interval };
    let checker = Checker { definition, extractor: Extractor::new(definition), interval, now_ms };
    let mut report = Report::new(interval);
    let mut totals = Totals { most_shown: args.events as usize, ..Totals::default() };
    let values = walker.each().await.context("source.for_each")?;
    report.values = definition.source.for_each.as_ref().map(|_| values.len());
    'values: for each in &values {
        let mut walk = walker.pages(each)?;
        loop {
            if report.pages.len() == args.pages as usize && walk.request().is_some() {
                report.ended = None;
                break 'values;
            }
            let Some(url) = walk.request().map(|request| redacted(request.url.as_str())) else { break };
            let page = walk.fetch().await.with_context(|| url.clone())?;
            if let Some(page) = page {
                let before = totals.records;
                let last = checker.add(&walk, &page, &mut totals)?;
                let records = totals.records - before;
                report.pages.push(PageView { url: url.clone(), records, bytes: page.bytes });
                walk.advance(&page, records, last.as_deref())?;
            }
            report.ended = walk.ended().map(|reason| reason.words());
        }
    }
    let again = checker.first_page_again(&walker, &values).await?;
    report.records = totals.records;
    report.dead_letters = totals.dead_letters;
    report.problems = totals.problems(definition);
    report.warnings = warnings(definition, &totals, &again);
    let code = u8::from(!report.problems.is_empty());
    report.events = totals.shown.iter().map(EventView::of).collect();
    let text = if args.json { serde_json::to_string_pretty(&report)? } else { report.text(definition) };
    Ok(CommandOutput { text, code })
}

/// Checks records as the processor will.
struct Checker<'a> {
    definition: &'a Definition,
    extractor: Extractor,
    interval: Interval,
    now_ms: i64,
}

/// What was found in all pages. Only the first few events are kept.
#[derive(Debug, Default)]
struct Totals {
    records: u64,
    dead_letters: u64,
    refused: u64,
    first_refusal: String,
    /// Events that lack a required column, by column.
    lacking: BTreeMap<String, u64>,
    /// Values that do not fit their column, with the first reason, by column.
    misfits: BTreeMap<String, (u64, String)>,
    ahead: u64,
    implausible: u64,
    outside: u64,
    /// Pages without a list of records.
    without_list: u64,
    /// Hashes of all ids and times, and of all values, of the first page.
    first_page: Option<(u64, u64, u64)>,
    identities: u64,
    values: u64,
    shown: Vec<Event>,
    /// Most events to keep in `shown`.
    most_shown: usize,
}

impl Checker<'_> {
    /// Adds the records of a page. Returns the text of the last one.
    fn add(&self, walk: &Walk<'_>, page: &Page, totals: &mut Totals) -> anyhow::Result<Option<Vec<u8>>> {
        let mut last = None;
        let records = walk.records(page)?;
        totals.without_list += u64::from(records.is_none() && !page.text.is_empty());
        let around = self.extractor.surroundings(self.interval, walk.each(), page.json())?;
        for record in records.into_iter().flatten() {
            let record = record?;
            match self.extractor.outgoing(&around, totals.records, &record) {
                Outgoing::Event(event) => self.add_event(event, totals),
                Outgoing::Refused(refused) => {
                    if totals.refused == 0 {
                        totals.first_refusal = refused.reason;
                    }
                    totals.refused += 1;
                    totals.dead_letters += 1;
                }
            }
            totals.records += 1;
            last = Some(record.text.into_owned());
        }
        totals.first_page.get_or_insert((totals.records, totals.identities, totals.values));
        Ok(last)
    }

    fn add_event(&self, event: Event, totals: &mut Totals) {
        let present = columns(&event);
        let mut is_dead = false;
        for column in &self.definition.columns {
            let raw = present.get(column.name.as_str()).map_or("null", |raw| raw.get());
            match value::encode(raw, column, &mut Vec::new()) {
                Ok(false) if column.required => {
                    *totals.lacking.entry(column.name.clone()).or_default() += 1;
                    is_dead = true;
                }
                Ok(_) => {}
                Err(reason) => {
                    totals.misfits.entry(column.name.clone()).or_insert((0, reason)).0 += 1;
                    is_dead |= column.on_misfit == OnMisfit::DeadLetter;
                }
            }
        }
        if event.time_ms > self.now_ms.saturating_add(self.definition.event.ahead_ms) {
            totals.ahead += 1;
            is_dead = true;
        }
        totals.implausible += u64::from(!PLAUSIBLE_MS.contains(&event.time_ms));
        let Interval { start_ms, end_ms } = self.interval;
        totals.outside += u64::from(!(start_ms..end_ms).contains(&event.time_ms));
        totals.dead_letters += u64::from(is_dead);
        let chained = |hash: u64, bytes: &[u8]| event::seen_hash(hash.cast_signed(), bytes);
        totals.identities = chained(totals.identities ^ event.time_ms.cast_unsigned(), event.id.as_bytes());
        totals.values = chained(totals.values, &event.value);
        if totals.shown.len() < totals.most_shown {
            totals.shown.push(event);
        }
    }

    /// What a second request for the first page returns.
    async fn first_page_again(&self, walker: &Walker<'_>, values: &[Each]) -> anyhow::Result<Totals> {
        let mut totals = Totals::default();
        if let Some(each) = values.first() {
            let mut walk = walker.pages(each)?;
            if let Some(page) = walk.fetch().await.context("second request for the first page")? {
                self.add(&walk, &page, &mut totals)?;
            }
        }
        Ok(totals)
    }
}

impl Totals {
    /// Why records would become dead letters.
    fn problems(&self, definition: &Definition) -> Vec<String> {
        let mut problems = Vec::new();
        let records = self.records;
        if self.refused > 0 {
            let (refused, reason) = (self.refused, &self.first_refusal);
            problems.push(format!(
                "{refused} of {records} records would become dead letters; the first: {reason}"
            ));
        }
        for (column, lacking) in &self.lacking {
            problems.push(format!(
                "{lacking} of {records} records lack required column `{column}`: they would become dead letters"
            ));
        }
        for (column, (count, reason)) in self.misfits_of(definition, OnMisfit::DeadLetter) {
            problems.push(format!(
                "column `{column}`: {count} of {records} records would become dead letters; the first: {reason}"
            ));
        }
        if !definition.event.accepts(ContentMode::Binary) {
            let reason = "event.accept does not contain \"binary\", the mode of the producer";
            problems.push(format!("{reason}: all {records} records would become dead letters"));
        }
        if self.ahead > 0 {
            problems.push(format!(
                "{} of {records} event times are more than {} s ahead (event.ahead): the records would become dead letters",
                self.ahead,
                definition.event.ahead_ms / 1000
            ));
        }
        problems
    }

    fn misfits_of<'a>(
        &'a self,
        definition: &'a Definition,
        on_misfit: OnMisfit,
    ) -> impl Iterator<Item = (&'a String, &'a (u64, String))> {
        self.misfits.iter().filter(move |(name, _)| {
            definition.columns.iter().any(|column| column.name == **name && column.on_misfit == on_misfit)
        })
    }
}

fn warnings(definition: &Definition, totals: &Totals, again: &Totals) -> Vec<String> {
    let mut warnings = Vec::new();
    let records = totals.records;
    if definition.event.id.is_empty() {
        warnings.push(NO_ID.to_owned());
    }
    let (first_records, first_identities, first_values) = totals.first_page.unwrap_or_default();
    if (first_records, first_identities) != (again.records, again.identities) {
        let other = "two requests returned different ids or times: a refetched interval is counted again";
        warnings.push(other.to_owned());
    } else if first_values != again.values {
        let other =
            "two requests returned different values for the same ids and times: the first values are kept";
        warnings.push(other.to_owned());
    }
    for (column, (count, reason)) in totals.misfits_of(definition, OnMisfit::Null) {
        warnings.push(format!(
            "column `{column}`: {count} of {records} values would be null; the first: {reason}"
        ));
    }
    if totals.implausible > 0 {
        let count = totals.implausible;
        warnings.push(format!(
            "{count} of {records} event times are before 2000 or after 2100; is event.time_unit right?"
        ));
    }
    if totals.outside > 0 && matches!(definition.event.time, EventTime::Field { .. }) {
        let outside = totals.outside;
        warnings.push(format!(
            "{outside} of {records} event times are outside of the requested interval; does the request contain its \
             bounds, and is event.time the field that the source filters by?"
        ));
    }
    if totals.without_list > 0 {
        let (pages, pointer) = (totals.without_list, &definition.source.records);
        warnings.push(format!(
            "{pages} pages have no value at source.records = \"{pointer}\", which counts as no records"
        ));
    } else if records == 0 {
        warnings.push("the pages have no records".to_owned());
    }
    warnings.extend(page_size_warning(definition));
    warnings
}

/// A source that never learns the page size chooses its own.
fn page_size_warning(definition: &Definition) -> Option<String> {
    let source = &definition.source;
    let by_count = matches!(source.pagination.order, PageOrder::Page { .. } | PageOrder::Offset { .. });
    let templates = std::iter::once(&source.url).chain(source.query.iter().map(|(_, value)| value));
    let mut parsed = templates.filter_map(|text| Template::parse(text).ok());
    let is_sent = parsed.any(|template| template.placeholders().any(|p| *p == Placeholder::PageSize));
    let is_missing = by_count && !is_sent && source.body.is_none();
    is_missing.then(|| {
        "no request contains {page_size}: the source chooses the size of a page, often a small one".to_owned()
    })
}

/// The result, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Report<'a> {
    interval: IntervalView,
    /// Number of values of `source.for_each`; absent without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    values: Option<usize>,
    pages: Vec<PageView>,
    /// Why the pages ended; absent if more follow.
    ended: Option<&'static str>,
    records: u64,
    /// Records that would become dead letters.
    dead_letters: u64,
    problems: Vec<String>,
    warnings: Vec<String>,
    events: Vec<EventView<'a>>,
}

#[derive(Debug, Serialize)]
struct IntervalView {
    start: String,
    end: String,
}

#[derive(Debug, Serialize)]
struct PageView {
    url: String,
    records: u64,
    bytes: u64,
}

impl Report<'_> {
    fn new(interval: Interval) -> Self {
        Report {
            interval: IntervalView { start: time(interval.start_ms), end: time(interval.end_ms) },
            values: None,
            pages: vec![],
            ended: None,
            records: 0,
            dead_letters: 0,
            problems: vec![],
            warnings: vec![],
            events: vec![],
        }
    }

    fn text(&self, definition: &Definition) -> String {
        let mut text = format!("interval {} to {}\n", self.interval.start, self.interval.end);
        if let Some(values) = self.values {
            let _ = writeln!(text, "source.for_each has {values} values");
        }
        for (page, number) in self.pages.iter().zip(1..) {
            let PageView { url, records, bytes } = page;
            let _ = writeln!(text, "page {number}: {records} records, {bytes} bytes  {url}");
        }
        let _ = match self.ended {
            Some(reason) => writeln!(text, "the pages end here: {reason}"),
            None => writeln!(text, "more pages follow; read more with --pages"),
        };
        let _ = writeln!(text, "{}", table(definition, &self.events));
        for problem in &self.problems {
            let _ = writeln!(text, "problem: {problem}");
        }
        for warning in &self.warnings {
            let _ = writeln!(text, "warning: {warning}");
        }
        if self.problems.is_empty() {
            let _ = writeln!(text, "all {} records would become events", self.records);
        }
        text
    }
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
    use crate::source::auth::Loaded;
    use crate::source::paginate::Headers;
    use crate::source::request::PageRequest;
    use async_trait::async_trait;
    use common::contracts::stream::BodyFormat;
    use serde_json::{Value, json};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// Returns the same page for each request, or another page each time.
    struct Fake {
        stable: bool,
        person: Value,
        requests: AtomicU64,
    }

    #[async_trait]
    impl FetchPage for Fake {
        async fn fetch(&self, _: &PageRequest) -> Result<Page, AttemptError> {
            let n = self.requests.fetch_add(1, Ordering::SeqCst);
            let mut person = self.person.clone();
            person["login"] = json!({"uuid": format!("id-{}", if self.stable { 0 } else { n })});
            let text = json!({"results": [person]}).to_string().into_bytes();
            Ok(Page {
                text,
                format: BodyFormat::Json,
                headers: Headers::default(),
                bytes: 80,
                credentials: Arc::new(Loaded::nothing()),
            })
        }
    }

    fn person() -> Value {
        json!({"name": {"first": "Ada", "last": "Lovelace"}, "dob": {"age": 36}})
    }

    const USERS: &str = include_str!("../../../streams/user_created.toml");

    async fn checked(stable: bool, person: Value, json: bool) -> CommandOutput {
        checked_by(USERS, stable, person, json).await
    }

    async fn checked_by(file: &str, stable: bool, person: Value, json: bool) -> CommandOutput {
        let definition = Definition::parse("users", file).unwrap();
        let requests = Requests::new(&definition, None).unwrap();
        let source = Fake { stable, person, requests: AtomicU64::new(0) };
        let args = CheckArgs { pages: 3, events: 5, json };
        check(&definition, &requests, &source, &args, 1_767_225_600_000).await.unwrap()
    }

    #[tokio::test]
    async fn pages_and_events_are_shown_as_a_run_would_fetch_them() {
        insta::assert_snapshot!(checked(true, person(), true).await.text);
        let output = checked(true, person(), false).await;
        for part in
            ["page 2: 1 records, 80 bytes", "pagination.pages are read", "id-0", "Ada", "all 2 records"]
        {
            assert!(output.text.contains(part), "`{part}` is not in {}", output.text);
        }
        assert!(output.code == 0 && !output.text.contains("warning"), "{}", output.text);
    }

    #[tokio::test]
    async fn events_further_ahead_than_the_definition_says_fail_the_check() {
        let mut person = person();
        person["at"] = "2026-01-03T00:00:00Z".into();
        let checked = async |more: &str| {
            let file = USERS.replace("time = \"interval\"", &format!("time = \"/at\"\n{more}"));
            checked_by(&file, true, person.clone(), false).await
        };
        let output = checked("").await;
        let problem = "2 of 2 event times are more than 3600 s ahead (event.ahead): the records would become dead letters";
        assert!(output.code == 1 && output.text.contains(problem), "{}", output.text);
        let output = checked("ahead = \"7d\"").await;
        assert!(output.code == 0 && !output.text.contains("problem"), "{}", output.text);
        let output = checked("ahead = \"7d\"\naccept = [\"plain\"]").await;
        let problem =
            "event.accept does not contain \"binary\", the mode of the producer: all 2 records would become";
        assert!(output.code == 1 && output.text.contains(problem), "{}", output.text);
    }

    #[tokio::test]
    async fn records_that_would_become_dead_letters_fail_the_check() {
        let output = checked(true, json!({"name": {"first": "Ada"}, "dob": {"age": [36]}}), false).await;
        assert_eq!(output.code, 1);
        for part in [
            "problem: 2 of 2 records lack required column `last_name`",
            "problem: column `age`: 2 of 2 records would become dead letters; the first: a list is not a valid int",
        ] {
            assert!(output.text.contains(part), "`{part}` is not in {}", output.text);
        }
    }

    #[tokio::test]
    async fn a_source_with_unstable_ids_causes_a_warning() {
        assert!(checked(false, person(), false).await.text.contains("warning: two requests returned"));
    }
}
