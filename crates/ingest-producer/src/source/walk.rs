//! Walks the pages of an interval, or of the listing that provides the values of `source.for_each`. Runs and `source
//! check` share it.

use super::client::{FetchPage, Page, shown_words, wait_ms};
use super::extract::Each;
use super::paginate::{EndReason, Next, Pages, PaginationError, is_set, shown_place};
use super::records::{Records, records};
use super::request::{PageRequest, Requests};
use crate::error::AttemptError;
use common::contracts::run_ledger::Interval;
use common::contracts::stream::{
    Definition, ForEach, Listing, Pagination, Place, RecordShape, SourceSettings,
};
use serde_json::Value;

/// The values of a request that does not belong to `source.for_each`.
static NO_VALUES: Each = Each::new();

/// Members that usually report an error. They are checked if a page has no list of records and the definition does not
/// set `error`.
const USUAL_ERROR_MEMBERS: [&str; 5] = ["/error", "/errors", "/fault", "/message", "/detail"];

/// What all requests of an interval share.
#[derive(Clone, Copy)]
pub struct Walker<'a> {
    /// The source of pages.
    pub source: &'a dyn FetchPage,
    /// Builds the requests.
    pub requests: &'a Requests,
    /// The stream definition.
    pub definition: &'a Definition,
    /// The interval.
    pub interval: Interval,
}

/// A sequence of pages.
pub struct Walk<'a> {
    walker: Walker<'a>,
    pages: Pages<'a>,
    state: State,
    records: &'a str,
    shape: RecordShape,
    /// Whether requests belong to the listing, and the value of `source.for_each` otherwise.
    each: Option<&'a Each>,
}

enum State {
    /// The next request.
    Next(PageRequest),
    /// The last page was fetched.
    Ended(EndReason),
}

impl<'a> Walker<'a> {
    fn settings(&self) -> &'a SourceSettings {
        &self.definition.source
    }

    /// The values for which the requests of the interval are repeated. One empty value without `source.for_each`.
    pub async fn each(&self) -> Result<Vec<Each>, AttemptError> {
        match &self.settings().for_each {
            None => Ok(vec![Each::new()]),
            Some(ForEach::Values { name, values }) => {
                Ok(values.iter().map(|value| vec![(name.clone(), value.to_string())]).collect())
            }
            Some(ForEach::Listing(listing)) => self.listed(listing).await,
        }
    }

    async fn listed(&self, listing: &'a Listing) -> Result<Vec<Each>, AttemptError> {
        let mut walk = self.start(&listing.pagination, &listing.records, RecordShape::Rows, None)?;
        let mut found = Vec::new();
        while let Some(page) = walk.fetch().await? {
            let mut count = 0;
            let mut last = None;
            for record in walk.records(&page)?.into_iter().flatten() {
                let record = record.map_err(|e| AttemptError::retryable(e.to_string()))?;
                let value: Value = serde_json::from_slice(&record.text)
                    .map_err(|e| AttemptError::retryable(format!("source.for_each: invalid record: {e}")))?;
                let field = |(name, pointer): &(String, String)| {
                    let field =
                        value.pointer(pointer).filter(|v| v.is_string() || v.is_number() || v.is_boolean());
                    field.map(|field| (name.clone(), field.to_string())).ok_or_else(|| {
                        AttemptError::retryable(format!(
                            "source.for_each: a record of the listing has no usable value at `{pointer}` for `{name}`"
                        ))
                    })
                };
                found.push(listing.fields.iter().map(field).collect::<Result<Each, _>>()?);
                if found.len() > listing.limit as usize {
                    return Err(AttemptError::fatal(format!(
                        "source.for_each: the listing has more than {} records; raise source.for_each.limit",
                        listing.limit
                    )));
                }
                count += 1;
                last = Some(record.text.into_owned());
            }
            walk.advance(&page, count, last.as_deref())?;
        }
        Ok(found)
    }

    /// Starts the pages of the interval for one value of `source.for_each`.
    pub fn pages(&self, each: &'a Each) -> Result<Walk<'a>, AttemptError> {
        let source = self.settings();
        self.start(&source.pagination, &source.records, source.shape, Some(each))
    }

    fn start(
        &self,
        pagination: &'a Pagination,
        records: &'a str,
        shape: RecordShape,
        each: Option<&'a Each>,
    ) -> Result<Walk<'a>, AttemptError> {
        let source = self.settings();
        let pages = Pages::new(pagination, source.page_size, source.limits.pages);
        let first = match each {
            Some(each) => self.requests.page(self.interval, &pages.first(), each),
            None => self.requests.listing(self.interval, &pages.first()),
        };
        let first = first.map_err(|e| AttemptError::fatal(e.to_string()))?;
        Ok(Walk { walker: *self, pages, state: State::Next(first), records, shape, each })
    }
}

impl<'a> Walk<'a> {
    /// Fetches the next page. `None` after the last one.
    pub async fn fetch(&mut self) -> Result<Option<Page>, AttemptError> {
        let State::Next(request) = &self.state else { return Ok(None) };
        let source = self.walker.settings();
        match self.walker.source.fetch(request).await {
            Ok(page) => {
                check_flags(source, &page)?;
                Ok(Some(page))
            }
            Err(e)
                if self.pages.read() > 0
                    && e.http_status.is_some_and(|s| source.statuses.end.contains(&s)) =>
            {
                self.state = State::Ended(EndReason::Status);
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }

    /// The records of a page. `None` if it has no list of records, which counts as an empty one.
    pub fn records<'p>(&self, page: &'p Page) -> Result<Option<Records<'p>>, AttemptError> {
        let found = records(page.body(), self.records, self.shape);
        let found = found.map_err(|e| AttemptError::retryable(e.to_string()))?;
        if found.is_none() && self.walker.settings().error.is_empty() {
            check_usual_members(self.walker.settings(), page)?;
        }
        Ok(found)
    }

    /// Continues after a page with this many records. `last` is the text of the last one.
    pub fn advance(&mut self, page: &Page, records: u64, last: Option<&[u8]>) -> Result<(), AttemptError> {
        let State::Next(current) = &self.state else { return Ok(()) };
        let Walker { requests, interval, .. } = self.walker;
        let next = self.pages.after(page.fetched(records, last)).map_err(|e| match e {
            // The records may have changed while the pages were read.
            PaginationError::Incomplete { .. } | PaginationError::NotJson(_) => {
                AttemptError::retryable(e.to_string())
            }
            _ => AttemptError::fatal(e.to_string()),
        })?;
        let request = match (next, self.each) {
            (Next::End(reason), _) => {
                self.state = State::Ended(reason);
                return Ok(());
            }
            (Next::Named(name), _) => requests.next(current, &name),
            (Next::At(position), Some(each)) => requests.page(interval, &position, each),
            (Next::At(position), None) => requests.listing(interval, &position),
        };
        self.state = State::Next(request.map_err(|e| AttemptError::fatal(e.to_string()))?);
        Ok(())
    }

    /// The value of `source.for_each` that the pages belong to; empty without one.
    pub fn each(&self) -> &'a Each {
        self.each.unwrap_or(&NO_VALUES)
    }

    /// The interval.
    pub fn interval(&self) -> Interval {
        self.walker.interval
    }

    /// Why the pages ended; `None` if more follow.
    pub fn ended(&self) -> Option<EndReason> {
        match self.state {
            State::Next(_) => None,
            State::Ended(reason) => Some(reason),
        }
    }

    /// The next request; `None` after the last page.
    pub fn request(&self) -> Option<&PageRequest> {
        match &self.state {
            State::Next(request) => Some(request),
            State::Ended(_) => None,
        }
    }
}

/// Fails if a sign of an error that the definition names is set.
fn check_flags(source: &SourceSettings, page: &Page) -> Result<(), AttemptError> {
    let fetched = page.fetched(0, None);
    for flag in &source.error {
        // A negated flag such as `!/ok` also means an error if its value is absent.
        let holds = fetched.holds(flag).map_err(|e| AttemptError::retryable(e.to_string()))?;
        if holds.unwrap_or(flag.negated) {
            let value = fetched.value(&flag.place).ok().flatten();
            let place = format!("{}{}", if flag.negated { "!" } else { "" }, shown_place(&flag.place));
            return Err(reported(source, page, &place, value.as_deref()));
        }
    }
    Ok(())
}

/// Fails if a page without a list of records has a member that usually reports an error.
fn check_usual_members(source: &SourceSettings, page: &Page) -> Result<(), AttemptError> {
    let fetched = page.fetched(0, None);
    for member in USUAL_ERROR_MEMBERS {
        let value = fetched.value(&Place::Pointer(member.to_owned()));
        if let Some(value) = value.ok().flatten().filter(|value| is_set(value)) {
            return Err(reported(source, page, member, Some(&value)));
        }
    }
    Ok(())
}

/// The error that a page reports, with the words of the source.
fn reported(source: &SourceSettings, page: &Page, place: &str, value: Option<&[u8]>) -> AttemptError {
    let words = match value {
        // Flags say that there is an error, but not which.
        None | Some(b"true" | b"false" | b"null") => page.json(),
        Some(value) => value,
    };
    let text = match serde_json::from_slice::<Value>(words) {
        Ok(Value::String(text)) => text,
        _ => String::from_utf8_lossy(words).into_owned(),
    };
    let words = shown_words(&page.credentials.redacted(&text));
    let mut error = AttemptError::retryable(format!("the source reports an error at {place}: {words}"));
    error.retry_after_ms =
        wait_ms(&page.headers, source.reset_header.as_deref(), chrono::Utc::now().timestamp_millis());
    error
}
