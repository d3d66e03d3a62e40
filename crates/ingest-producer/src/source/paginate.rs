//! Finds the next page of an interval. Pure.

use super::records::kind;
use super::scan::{self, NotJson};
use common::contracts::stream::{Flag, OffsetStep, PageOrder, Pagination, Place};
use std::collections::HashSet;

/// Maximum length of a cursor or URL of the next page, in bytes.
const MAX_NEXT_BYTES: usize = 8 << 10;

/// A position in the sequence of pages.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Position {
    /// The only page, or the first page if each page names the next one.
    Start,
    /// By page number.
    Page(u64),
    /// By offset.
    Offset(u64),
    /// By the cursor from the previous page; `None` for the first page.
    Cursor(Option<String>),
}

/// Response headers. Names are in lower case.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Headers(pub Vec<(String, String)>);

impl Headers {
    /// All values of a header, separated by commas as in RFC 9110. `None` if it is absent.
    pub fn get(&self, name: &str) -> Option<String> {
        let values: Vec<&str> =
            self.0.iter().filter(|(known, _)| known == name).map(|(_, value)| value.as_str()).collect();
        (!values.is_empty()).then(|| values.join(", "))
    }
}

/// What the next page is derived from.
#[derive(Debug, Clone, Copy)]
pub struct Fetched<'a> {
    /// Number of records in the page.
    pub records: u64,
    /// Text of the last record; absent if the page has no records.
    pub last: Option<&'a [u8]>,
    /// JSON text of the page; empty if the page has none.
    pub body: &'a [u8],
    /// The response headers.
    pub headers: &'a Headers,
}

impl Fetched<'_> {
    /// The JSON text of a value of the page. A header is read as a JSON string, or as a boolean if it is one.
    pub fn value(&self, place: &Place) -> Result<Option<Vec<u8>>, NotJson> {
        match place {
            Place::Pointer(_) if self.body.is_empty() => Ok(None),
            Place::Pointer(pointer) => Ok(scan::find(self.body, pointer)?.map(<[u8]>::to_vec)),
            Place::Header(name) => Ok(self.headers.get(name).map(|value| {
                let value = value.trim();
                let is_plain = matches!(value, "true" | "false");
                if is_plain { value.into() } else { serde_json::Value::from(value).to_string().into_bytes() }
            })),
        }
    }

    /// Whether a flag holds. `None` if its value is absent.
    pub fn holds(&self, flag: &Flag) -> Result<Option<bool>, NotJson> {
        Ok(self.value(&flag.place)?.map(|raw| is_set(&raw) != flag.negated))
    }
}

/// Whether a JSON value is neither `null`, `false`, `0` nor empty.
pub fn is_set(raw: &[u8]) -> bool {
    let compact: Vec<u8> = raw.iter().copied().filter(|b| !b.is_ascii_whitespace()).collect();
    !matches!(
        compact.as_slice(),
        b"null" | b"false" | b"0" | b"\"\"" | b"[]" | b"{}" | b"\"false\"" | b"\"0\""
    )
}

/// A place as a definition writes it.
pub fn shown_place(place: &Place) -> String {
    match place {
        Place::Pointer(pointer) => pointer.clone(),
        Place::Header(name) => format!("header:{name}"),
    }
}

/// What follows a page.
#[derive(Debug, PartialEq)]
pub enum Next {
    /// The page was the last one.
    End(EndReason),
    /// The page at this position.
    At(Position),
    /// The page at this URL, which may be relative to the current page.
    Named(String),
}

/// Why a page was the last one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndReason {
    /// The definition has no pagination.
    OnePage,
    /// `pagination.pages` are read.
    PageCount,
    /// `pagination.more` says so.
    NoMore,
    /// `pagination.total` or `pagination.total_pages` is reached.
    Total,
    /// The page has no records.
    EmptyPage,
    /// The page has fewer records than `page_size`.
    ShortPage,
    /// The page does not name a next page.
    NoNext,
    /// The status of the next page is listed in `end_on`.
    Status,
}

impl EndReason {
    /// The reason in words, for `source check`.
    pub fn words(self) -> &'static str {
        match self {
            EndReason::OnePage => "the definition has no pagination, so an interval is one page",
            EndReason::PageCount => "pagination.pages are read",
            EndReason::NoMore => "pagination.more says that no more pages follow",
            EndReason::Total => "the total that the source states is reached",
            EndReason::EmptyPage => "the last page has no records",
            EndReason::ShortPage => "the last page has fewer records than page_size",
            EndReason::NoNext => "the last page does not name a next page",
            EndReason::Status => "the source answered the next page with a status listed in end_on",
        }
    }
}

/// The next page cannot be determined, or the pages do not end.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum PaginationError {
    /// The source named the same next page twice.
    #[error(
        "endless pagination: after {0} pages, the source named a page that it had named before; if a value of the \
         page marks the end, set pagination.more"
    )]
    Loop(u32),
    /// More pages than allowed.
    #[error(
        "the interval has more than {0} pages; raise source.limits.pages, or shorten the schedule's intervals"
    )]
    TooMany(u32),
    /// The pages ended before the stated total.
    #[error("the pages ended after {read} of {total} records that the source states at {place}")]
    Incomplete {
        /// Records read.
        read: u64,
        /// Records of the interval.
        total: u64,
        /// Where the source states the total.
        place: String,
    },
    /// The value at a pagination pointer is not what it has to be.
    #[error("pagination: {place} is {found}, which {expected}")]
    Unusable {
        /// The place in the definition.
        place: String,
        /// Type of the value. The value itself may be a secret.
        found: &'static str,
        /// What it does not do.
        expected: &'static str,
    },
    /// The body is not valid JSON up to the value at the pointer.
    #[error(transparent)]
    NotJson(#[from] NotJson),
}

/// Counts the pages of one sequence and finds the next page.
#[derive(Debug)]
pub struct Pages<'a> {
    pagination: &'a Pagination,
    page_size: Option<u32>,
    limit: u32,
    read: u32,
    records: u64,
    /// The positions named so far, at most `limit`.
    named: HashSet<Position>,
}

impl<'a> Pages<'a> {
    /// Starts a sequence that may have at most `limit` pages.
    pub fn new(pagination: &'a Pagination, page_size: Option<u32>, limit: u32) -> Pages<'a> {
        Pages { pagination, page_size, limit, read: 0, records: 0, named: HashSet::new() }
    }

    /// Position of the first page.
    pub fn first(&self) -> Position {
        match self.pagination.order {
            PageOrder::Page { first, .. } => Position::Page(first),
            PageOrder::Offset { first, .. } => Position::Offset(first),
            PageOrder::Cursor { .. } | PageOrder::LastRecord { .. } => Position::Cursor(None),
            PageOrder::None | PageOrder::LinkHeader | PageOrder::NextUrl { .. } => Position::Start,
        }
    }

    /// Pages read so far.
    pub fn read(&self) -> u32 {
        self.read
    }

    /// Counts a page and determines what follows it.
    pub fn after(&mut self, page: Fetched<'_>) -> Result<Next, PaginationError> {
        self.read += 1;
        self.records += page.records;
        let next = match self.stop(&page)? {
            Some(reason) => return Ok(Next::End(reason)),
            None => self.next(&page)?,
        };
        let place = match &next {
            Next::End(_) => {
                self.check_complete(&page)?;
                return Ok(next);
            }
            Next::At(position) => position.clone(),
            Next::Named(name) => Position::Cursor(Some(name.clone())),
        };
        if !self.named.insert(place) {
            return Err(PaginationError::Loop(self.read));
        }
        if self.read >= self.limit {
            return Err(PaginationError::TooMany(self.limit));
        }
        Ok(next)
    }

    /// Whether the definition or a mark of the source ends the pages here.
    fn stop(&self, page: &Fetched<'_>) -> Result<Option<EndReason>, PaginationError> {
        let pagination = self.pagination;
        if pagination.order == PageOrder::None {
            return Ok(Some(EndReason::OnePage));
        }
        if pagination.pages.is_some_and(|pages| self.read >= pages) {
            return Ok(Some(EndReason::PageCount));
        }
        if page.body.is_empty() && page.records == 0 {
            return Ok(Some(EndReason::EmptyPage));
        }
        if let Some(more) = &pagination.more {
            match page.holds(more)? {
                Some(false) => return Ok(Some(EndReason::NoMore)),
                Some(true) => {}
                None => return Err(unusable(&more.place, None, "does not say whether more pages follow")),
            }
        }
        let pages = pagination.total_pages.as_ref().map(|place| count(page, place)).transpose()?.flatten();
        let records = pagination.total.as_ref().map(|place| count(page, place)).transpose()?.flatten();
        let reached = pages.is_some_and(|pages| u64::from(self.read) >= pages)
            || records.is_some_and(|records| self.records >= records);
        Ok(reached.then_some(EndReason::Total))
    }

    fn next(&self, page: &Fetched<'_>) -> Result<Next, PaginationError> {
        let by_count = matches!(self.pagination.order, PageOrder::Page { .. } | PageOrder::Offset { .. });
        let more_follow = self.pagination.more.is_some();
        if by_count && page.records == 0 && !more_follow {
            return Ok(Next::End(EndReason::EmptyPage));
        }
        let short = self.page_size.is_some_and(|size| page.records < u64::from(size));
        if by_count && short && self.pagination.short_page_ends && !more_follow {
            return Ok(Next::End(EndReason::ShortPage));
        }
        let read = u64::from(self.read);
        let named = match &self.pagination.order {
            PageOrder::None => return Ok(Next::End(EndReason::OnePage)),
            PageOrder::Page { first, step } => return Ok(Next::At(Position::Page(first + step * read))),
            PageOrder::Offset { first, step } => {
                let passed = match step {
                    OffsetStep::Records => self.records,
                    OffsetStep::PageSize => read * u64::from(self.page_size.unwrap_or(0)),
                };
                return Ok(Next::At(Position::Offset(first + passed)));
            }
            PageOrder::LastRecord { pointer } => {
                let Some(last) = page.last else { return Ok(Next::End(EndReason::EmptyPage)) };
                let place = Place::Pointer(pointer.clone());
                // Ending here would silently drop the pages that follow.
                let cursor = named(scan::find(last, pointer)?, &place)?
                    .ok_or_else(|| unusable(&place, None, "does not name a next page"))?;
                return Ok(Next::At(Position::Cursor(Some(cursor))));
            }
            PageOrder::Cursor { next, .. } => named(page.value(next)?.as_deref(), next)?
                .map(|cursor| Next::At(Position::Cursor(Some(cursor)))),
            PageOrder::NextUrl { next } => named(page.value(next)?.as_deref(), next)?.map(Next::Named),
            PageOrder::LinkHeader => {
                page.headers.get("link").and_then(|link| next_link(&link)).map(Next::Named)
            }
        };
        match (named, &self.pagination.more) {
            (Some(next), _) => Ok(next),
            (None, None) => Ok(Next::End(EndReason::NoNext)),
            (None, Some(more)) => {
                Err(unusable(&more.place, None, "says that more pages follow, but the page names none"))
            }
        }
    }

    /// An end before the stated total would silently drop records.
    fn check_complete(&self, page: &Fetched<'_>) -> Result<(), PaginationError> {
        let Some(place) = &self.pagination.total else { return Ok(()) };
        match count(page, place)? {
            Some(total) if self.records < total => {
                Err(PaginationError::Incomplete { read: self.records, total, place: shown_place(place) })
            }
            _ => Ok(()),
        }
    }
}

/// The cursor or URL in a JSON value. `None` if it is absent, null or empty.
fn named(raw: Option<&[u8]>, place: &Place) -> Result<Option<String>, PaginationError> {
    let Some(raw) = raw else { return Ok(None) };
    match raw.first() {
        Some(b'n') => Ok(None),
        Some(b'"') => match serde_json::from_slice::<String>(raw) {
            Ok(text) if text.len() <= MAX_NEXT_BYTES => Ok(Some(text).filter(|text| !text.is_empty())),
            _ => Err(unusable(place, Some(raw), "does not name a next page")),
        },
        Some(b'-' | b'0'..=b'9') if raw.len() <= MAX_NEXT_BYTES => {
            Ok(Some(String::from_utf8_lossy(raw).into_owned()))
        }
        _ => Err(unusable(place, Some(raw), "does not name a next page")),
    }
}

/// A count in a page, as a number or as text. `None` if it is absent or null.
fn count(page: &Fetched<'_>, place: &Place) -> Result<Option<u64>, PaginationError> {
    let Some(raw) = page.value(place)?.filter(|raw| raw != b"null") else { return Ok(None) };
    let text = std::str::from_utf8(&raw).unwrap_or_default().trim_matches('"').trim();
    text.parse().map(Some).map_err(|_| unusable(place, Some(&raw), "is not a count"))
}

fn unusable(place: &Place, found: Option<&[u8]>, expected: &'static str) -> PaginationError {
    let found = kind(found.and_then(|raw| raw.first()));
    PaginationError::Unusable { place: shown_place(place), found, expected }
}

/// The target of `rel="next"` in an RFC 8288 `Link` header.
pub fn next_link(header: &str) -> Option<String> {
    let mut rest = header;
    while let Some((_, after)) = rest.split_once('<') {
        let (target, tail) = after.split_once('>')?;
        // Parameters extend to the next `<`, because a quoted value may contain a comma.
        let parameters = tail.split('<').next().unwrap_or_default();
        let is_next = parameters.split(';').any(|parameter| {
            let (name, value) = parameter.split_once('=').unwrap_or_default();
            let relations = value.trim().trim_end_matches(',').trim().trim_matches('"');
            name.trim().eq_ignore_ascii_case("rel")
                && relations.split_ascii_whitespace().any(|relation| relation.eq_ignore_ascii_case("next"))
        });
        if is_next {
            return Some(target.to_owned());
        }
        rest = tail;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    static NO_HEADERS: Headers = Headers(vec![]);

    fn fetched(records: u64, body: &str) -> Fetched<'_> {
        Fetched { records, last: None, body: body.as_bytes(), headers: &NO_HEADERS }
    }

    fn by(order: PageOrder) -> Pagination {
        Pagination { order, pages: None, more: None, total: None, total_pages: None, short_page_ends: false }
    }

    fn pages_from(first: u64) -> Pagination {
        by(PageOrder::Page { first, step: 1 })
    }

    fn offsets() -> Pagination {
        by(PageOrder::Offset { first: 0, step: OffsetStep::Records })
    }

    fn pointer(text: &str) -> Place {
        Place::Pointer(text.to_owned())
    }

    fn flag(place: Place) -> Option<Flag> {
        Some(Flag { place, negated: false })
    }

    /// Visits pages with `sizes` records and these bodies. Returns their positions and why they ended.
    fn walk(
        pagination: &Pagination,
        pages: &[(u64, &str)],
    ) -> Result<(Vec<Position>, Option<EndReason>), PaginationError> {
        let mut walked = Pages::new(pagination, Some(10), 5);
        let mut places = vec![walked.first()];
        for (size, body) in pages {
            match walked.after(fetched(*size, body))? {
                Next::At(position) => places.push(position),
                Next::Named(name) => places.push(Position::Cursor(Some(name))),
                Next::End(reason) => return Ok((places, Some(reason))),
            }
        }
        Ok((places, None))
    }

    fn sizes(
        pagination: &Pagination,
        sizes: &[u64],
    ) -> Result<(Vec<Position>, Option<EndReason>), PaginationError> {
        walk(pagination, &sizes.iter().map(|size| (*size, "null")).collect::<Vec<_>>())
    }

    fn page_numbers(
        numbers: &[u64],
        end: EndReason,
    ) -> Result<(Vec<Position>, Option<EndReason>), PaginationError> {
        Ok((numbers.iter().map(|n| Position::Page(*n)).collect(), Some(end)))
    }

    #[test]
    fn page_numbers_and_offsets_increase_until_a_page_without_records() {
        assert_eq!(sizes(&pages_from(1), &[10, 3, 10, 0]), page_numbers(&[1, 2, 3, 4], EndReason::EmptyPage));
        let by_tens = by(PageOrder::Page { first: 0, step: 10 });
        assert_eq!(sizes(&by_tens, &[10, 0]), page_numbers(&[0, 10], EndReason::EmptyPage));
        let short = Pagination { short_page_ends: true, ..pages_from(1) };
        assert_eq!(sizes(&short, &[10, 3]), page_numbers(&[1, 2], EndReason::ShortPage));
        let two = Pagination { pages: Some(2), ..pages_from(0) };
        assert_eq!(sizes(&two, &[3, 10]), page_numbers(&[0, 1], EndReason::PageCount));
        let (places, _) = sizes(&offsets(), &[10, 3, 0]).unwrap();
        assert_eq!(places, [0, 10, 13].map(Position::Offset));
        let fixed = by(PageOrder::Offset { first: 1, step: OffsetStep::PageSize });
        assert_eq!(sizes(&fixed, &[10, 3, 0]).unwrap().0, [1, 11, 21].map(Position::Offset));
        assert_eq!(sizes(&by(PageOrder::None), &[10]), Ok((vec![Position::Start], Some(EndReason::OnePage))));
    }

    #[test]
    fn marks_of_the_source_end_the_pages() {
        let more = Pagination { more: flag(pointer("/more")), ..pages_from(1) };
        let filtered = [(0, r#"{"more": true}"#), (4, r#"{"more": false}"#)];
        assert_eq!(walk(&more, &filtered), page_numbers(&[1, 2], EndReason::NoMore));
        assert!(matches!(walk(&more, &[(4, "{}")]), Err(PaginationError::Unusable { .. })));
        let done = Some(Flag { place: pointer("/done"), negated: true });
        let done = Pagination { more: done, ..pages_from(1) };
        let pages = [(4, r#"{"done": false}"#), (4, r#"{"done": true}"#)];
        assert_eq!(walk(&done, &pages), page_numbers(&[1, 2], EndReason::NoMore));
        let total = Pagination { total: Some(pointer("/n")), ..offsets() };
        let pages = [(10, r#"{"n": 13}"#), (3, r#"{"n": "13"}"#)];
        assert_eq!(walk(&total, &pages).unwrap().1, Some(EndReason::Total));
        let headers = Headers(vec![("x-pages".to_owned(), "1".to_owned())]);
        let total_pages =
            Pagination { total_pages: Some(Place::Header("x-pages".to_owned())), ..pages_from(1) };
        let next =
            Pages::new(&total_pages, None, 5).after(Fetched { headers: &headers, ..fetched(10, "[]") });
        assert_eq!(next, Ok(Next::End(EndReason::Total)));
    }

    #[test]
    fn an_end_before_the_stated_total_is_an_error() {
        let total = Pagination { total: Some(pointer("/n")), ..offsets() };
        let incomplete = PaginationError::Incomplete { read: 10, total: 13, place: "/n".to_owned() };
        assert_eq!(walk(&total, &[(10, r#"{"n": 13}"#), (0, r#"{"n": 13}"#)]), Err(incomplete));
        let fewer = walk(&total, &[(10, r#"{"n": 13}"#), (0, r#"{"n": 10}"#)]);
        assert_eq!(fewer.unwrap().1, Some(EndReason::Total), "the number of records has changed meanwhile");
    }

    #[test]
    fn exceeding_the_page_limit_is_an_error() {
        assert_eq!(sizes(&offsets(), &[10; 9]), Err(PaginationError::TooMany(5)));
    }

    #[test]
    fn an_absent_null_or_empty_cursor_ends_the_pages() {
        let cursor = by(PageOrder::Cursor { next: pointer("/next"), encoded: false });
        let after = |body: &str| Pages::new(&cursor, None, 5).after(fetched(10, body));
        for body in ["{}", r#"{"next": null}"#, r#"{"next": ""}"#] {
            assert_eq!(after(body), Ok(Next::End(EndReason::NoNext)));
        }
        let big = "123456789012345678901234567890";
        let number = Next::At(Position::Cursor(Some(big.to_owned())));
        assert_eq!(after(&format!("{{\"next\": {big}}}")), Ok(number));
        let error = after(r#"{"next": {"token": "s3cret"}}"#).unwrap_err();
        assert_eq!(error.to_string(), "pagination: /next is an object, which does not name a next page");
        let more = Pagination { more: flag(pointer("/more")), ..cursor };
        assert!(matches!(walk(&more, &[(1, r#"{"more": true}"#)]), Err(PaginationError::Unusable { .. })));
    }

    #[test]
    fn a_cursor_may_come_from_a_header() {
        let cursor = by(PageOrder::Cursor { next: Place::Header("x-next".to_owned()), encoded: false });
        let headers = Headers(vec![("x-next".to_owned(), "00040".to_owned())]);
        let next = Pages::new(&cursor, None, 5).after(Fetched { headers: &headers, ..fetched(10, "[]") });
        assert_eq!(next, Ok(Next::At(Position::Cursor(Some("00040".to_owned())))));
    }

    #[test]
    fn a_page_may_name_the_url_of_the_next_one() {
        let by_url = by(PageOrder::NextUrl { next: pointer("/paging/next") });
        let mut pages = Pages::new(&by_url, None, 5);
        assert_eq!(pages.first(), Position::Start);
        let mut after =
            |next: &str| pages.after(fetched(10, &format!("{{\"paging\": {{\"next\": {next}}}}}")));
        let next = "\"/v1/orders?after=17\"";
        assert_eq!(after(next), Ok(Next::Named("/v1/orders?after=17".to_owned())));
        assert_eq!(after("null"), Ok(Next::End(EndReason::NoNext)));
        assert_eq!(after(next), Err(PaginationError::Loop(3)));
        assert!(matches!(after("true"), Err(PaginationError::Unusable { .. })));
    }

    #[test]
    fn a_page_that_names_itself_ends_where_a_mark_says_so() {
        let end = Some(Flag { place: pointer("/end"), negated: true });
        let export = Pagination { more: end, ..by(PageOrder::NextUrl { next: pointer("/next") }) };
        let pages = [(100, r#"{"end": false, "next": "/b"}"#), (31, r#"{"end": true, "next": "/b"}"#)];
        assert_eq!(walk(&export, &pages).unwrap().1, Some(EndReason::NoMore));
    }

    #[test]
    fn the_last_record_names_the_next_page_until_no_more_follow() {
        let last = |more: Option<&str>| Pagination {
            more: more.and_then(|more| flag(pointer(more))),
            ..by(PageOrder::LastRecord { pointer: "/id".to_owned() })
        };
        let after = |pagination: &Pagination, last: Option<&str>, body: &str| {
            let last = last.map(str::as_bytes);
            Pages::new(pagination, None, 5).after(Fetched { last, ..fetched(2, body) })
        };
        let at = |id: &str| Ok(Next::At(Position::Cursor(Some(id.to_owned()))));
        let more = last(Some("/has_more"));
        let charge = Some(r#"{"id": "ch_2"}"#);
        assert_eq!(after(&more, charge, r#"{"has_more": true}"#), at("ch_2"));
        assert_eq!(after(&more, charge, r#"{"has_more": false}"#), Ok(Next::End(EndReason::NoMore)));
        assert_eq!(after(&last(None), None, "{}"), Ok(Next::End(EndReason::EmptyPage)));
        assert_eq!(after(&last(None), Some(r#"{"id": 7}"#), "{}"), at("7"));
        let nameless = Some(r#"{"id": null}"#);
        assert!(matches!(after(&more, charge, "{}"), Err(PaginationError::Unusable { .. })));
        assert!(matches!(after(&last(None), nameless, "{}"), Err(PaginationError::Unusable { .. })));
    }

    #[test]
    fn link_headers_are_parsed_by_rfc_8288() {
        let next = |header| next_link(header);
        let github = r#"<https://h/?page=1>; rel="prev", <https://h/?page=3>; rel="next", <https://h/?page=9>; rel="last""#;
        assert_eq!(next(github).as_deref(), Some("https://h/?page=3"));
        assert_eq!(next(r#"</x?a=1,2>; title="a, b"; REL="last next""#).as_deref(), Some("/x?a=1,2"));
        assert_eq!(next("</y>; rel=next").as_deref(), Some("/y"));
        assert_eq!(next(r#"<https://h/>; rel="prev""#), None);
        assert_eq!(next("nonsense"), None);
        let lines = [("link", "</1>; rel=\"self\""), ("link", "</2>; rel=\"next\"")];
        let headers = Headers(lines.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect());
        assert_eq!(headers.get("link").and_then(|link| next_link(&link)).as_deref(), Some("/2"));
    }

    /// How a simulated source marks the end of its pages.
    #[derive(Debug, Clone, Copy)]
    enum Mark {
        EmptyPage,
        More,
        Done,
        Total,
        TotalPages,
    }

    fn marked(mark: Mark, order: PageOrder) -> Pagination {
        let mut pagination = by(order);
        match mark {
            Mark::EmptyPage => {}
            Mark::More => pagination.more = flag(pointer("/more")),
            Mark::Done => pagination.more = Some(Flag { place: pointer("/done"), negated: true }),
            Mark::Total => pagination.total = Some(pointer("/total")),
            Mark::TotalPages => pagination.total_pages = Some(pointer("/pages")),
        }
        pagination
    }

    proptest! {
        /// Any split of a list of records into pages, of any kind and with any mark of the end, gives each record once.
        #[test]
        fn every_record_is_read_exactly_once(
            split in prop::collection::vec(1u64..7, 1..6),
            kind in 0u8..5,
            mark in prop::sample::select(vec![Mark::EmptyPage, Mark::More, Mark::Done, Mark::Total, Mark::TotalPages]),
        ) {
            let order = match kind {
                0 => PageOrder::Page { first: 3, step: 2 },
                1 => PageOrder::Offset { first: 0, step: OffsetStep::Records },
                2 => PageOrder::Cursor { next: pointer("/next"), encoded: false },
                3 => PageOrder::NextUrl { next: pointer("/next") },
                _ => PageOrder::LastRecord { pointer: String::new() },
            };
            let pagination = marked(mark, order);
            let starts: Vec<u64> = split.iter().scan(0, |at, size| { *at += size; Some(*at - size) }).collect();
            let total: u64 = split.iter().sum();
            let mut pages = Pages::new(&pagination, None, 20);
            let mut position = pages.first();
            let mut seen = Vec::new();
            loop {
                let index = match &position {
                    Position::Page(number) => usize::try_from((number - 3) / 2).unwrap(),
                    Position::Offset(at) => starts.iter().position(|start| start == at).unwrap_or(split.len()),
                    Position::Start | Position::Cursor(None) => 0,
                    Position::Cursor(Some(cursor)) => {
                        let at: u64 = cursor.parse().unwrap();
                        starts.iter().position(|start| *start == at).unwrap_or(split.len())
                    }
                };
                let size = split.get(index).copied().unwrap_or(0);
                let start = starts.get(index).copied().unwrap_or(total);
                seen.extend(start..start + size);
                let is_last = index + 1 >= split.len();
                let next = if is_last { "null".to_owned() } else { format!("\"{}\"", start + size) };
                let body = format!(
                    r#"{{"next": {next}, "more": {}, "done": {is_last}, "total": {total}, "pages": {}}}"#,
                    !is_last, split.len(),
                );
                let last = (start + size).to_string();
                let last = (size > 0).then_some(last.as_bytes());
                match pages.after(Fetched { records: size, last, body: body.as_bytes(), headers: &NO_HEADERS }).unwrap() {
                    Next::End(_) => break,
                    Next::At(at) => position = at,
                    Next::Named(name) => position = Position::Cursor(Some(name)),
                }
            }
            prop_assert_eq!(seen, (0..total).collect::<Vec<_>>());
        }
    }
}
