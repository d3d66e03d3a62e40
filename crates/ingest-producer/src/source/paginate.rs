//! Finds the next page of an interval. Pure.

use super::extract::kind;
use super::scan::{self, NotJson};
use common::contracts::stream::Pagination;
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
    /// By the number of records before the page.
    Offset(u64),
    /// By the cursor from the previous page; `None` for the first page.
    Cursor(Option<String>),
}

/// What the next page is derived from.
#[derive(Debug, Clone, Copy)]
pub struct Fetched<'a> {
    /// Number of records in the page.
    pub records: u64,
    /// Text of the last record; absent if the page has no records.
    pub last: Option<&'a [u8]>,
    /// Text of the page.
    pub body: &'a [u8],
    /// The `Link` header, if present.
    pub link: Option<&'a str>,
}

/// What follows a page.
#[derive(Debug, PartialEq)]
pub enum Next {
    /// The page was the last one.
    End,
    /// The page at this position.
    At(Position),
    /// The page at this URL, which may be relative to the current page.
    Named(String),
}

/// The next page cannot be determined, or the pages do not end.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum PaginationError {
    /// The source named the same next page twice.
    #[error("endless pagination: after {0} pages, the source named a page that it had named before")]
    Loop(u32),
    /// More pages than allowed.
    #[error(
        "the interval has more than {0} pages; raise source.limits.pages, or shorten the schedule's intervals"
    )]
    TooMany(u32),
    /// The value at the pagination pointer does not name a page.
    #[error("pagination pointer {pointer}: {found} does not name a next page")]
    NotANextPage {
        /// The definition's pointer.
        pointer: String,
        /// Type of the value. The value itself may be a secret.
        found: &'static str,
    },
    /// The body is not valid JSON up to the value at the pointer.
    #[error(transparent)]
    NotJson(#[from] NotJson),
}

/// Counts the pages of one interval and finds the next page.
#[derive(Debug)]
pub struct Pages<'a> {
    pagination: &'a Pagination,
    page_size: u32,
    limit: u32,
    read: u32,
    records: u64,
    /// The positions named so far, at most `limit`.
    named: HashSet<Position>,
}

impl<'a> Pages<'a> {
    /// Starts an interval that may have at most `limit` pages.
    pub fn new(pagination: &'a Pagination, page_size: u32, limit: u32) -> Pages<'a> {
        Pages { pagination, page_size, limit, read: 0, records: 0, named: HashSet::new() }
    }

    /// Position of the first page.
    pub fn first(&self) -> Position {
        match self.pagination {
            Pagination::Page { first, .. } => Position::Page(u64::from(*first)),
            Pagination::Offset => Position::Offset(0),
            Pagination::Cursor { .. } | Pagination::LastRecord { .. } => Position::Cursor(None),
            Pagination::None | Pagination::LinkHeader | Pagination::NextUrl { .. } => Position::Start,
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
        let short = page.records < u64::from(self.page_size);
        let next = match self.pagination {
            Pagination::None => Next::End,
            Pagination::Page { pages: Some(pages), .. } if self.read >= *pages => Next::End,
            Pagination::Page { pages: None, .. } | Pagination::Offset if short => Next::End,
            Pagination::Page { first, .. } => {
                Next::At(Position::Page(u64::from(*first) + u64::from(self.read)))
            }
            Pagination::Offset => Next::At(Position::Offset(self.records)),
            Pagination::Cursor { pointer } => match self.named(page.body, pointer)? {
                Some(cursor) => Next::At(Position::Cursor(Some(cursor))),
                None => Next::End,
            },
            Pagination::LastRecord { pointer, more } => match (page.last, more) {
                (None, _) => Next::End,
                (Some(_), Some(more)) if !self.has_more(page.body, more)? => Next::End,
                (Some(last), _) => match self.named(last, pointer)? {
                    Some(cursor) => Next::At(Position::Cursor(Some(cursor))),
                    // Ending here would silently drop the pages that follow.
                    None => return Err(not_a_next_page(pointer, None)),
                },
            },
            Pagination::NextUrl { pointer } => self.named(page.body, pointer)?.map_or(Next::End, Next::Named),
            Pagination::LinkHeader => page.link.and_then(next_link).map_or(Next::End, Next::Named),
        };
        let place = match &next {
            Next::End => return Ok(Next::End),
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

    fn named(&self, body: &[u8], pointer: &str) -> Result<Option<String>, PaginationError> {
        let Some(raw) = scan::find(body, pointer)? else { return Ok(None) };
        match raw.first() {
            Some(b'n') => Ok(None),
            Some(b'"') => match serde_json::from_slice::<String>(raw) {
                Ok(text) if text.len() <= MAX_NEXT_BYTES => Ok(Some(text).filter(|text| !text.is_empty())),
                _ => Err(not_a_next_page(pointer, Some(raw))),
            },
            Some(b'-' | b'0'..=b'9') if raw.len() <= MAX_NEXT_BYTES => {
                Ok(Some(String::from_utf8_lossy(raw).into_owned()))
            }
            _ => Err(not_a_next_page(pointer, Some(raw))),
        }
    }

    fn has_more(&self, body: &[u8], pointer: &str) -> Result<bool, PaginationError> {
        match scan::find(body, pointer)? {
            Some(b"true") => Ok(true),
            Some(b"false") => Ok(false),
            other => Err(not_a_next_page(pointer, other)),
        }
    }
}

fn not_a_next_page(pointer: &str, found: Option<&[u8]>) -> PaginationError {
    PaginationError::NotANextPage {
        pointer: pointer.to_owned(),
        found: kind(found.and_then(|raw| raw.first())),
    }
}

/// The target of `rel="next"` in an RFC 8288 `Link` header.
fn next_link(header: &str) -> Option<String> {
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

    fn fetched(records: u64, body: &str) -> Fetched<'_> {
        Fetched { records, last: None, body: body.as_bytes(), link: None }
    }

    /// Visits pages with `sizes` records and returns their positions.
    fn walk(pagination: &Pagination, sizes: &[u64]) -> Result<Vec<Position>, PaginationError> {
        let mut pages = Pages::new(pagination, 10, 5);
        let mut places = vec![pages.first()];
        for size in sizes {
            match pages.after(fetched(*size, "null"))? {
                Next::At(position) => places.push(position),
                _ => break,
            }
        }
        Ok(places)
    }

    #[test]
    fn page_numbers_and_offsets_increase_until_a_short_page() {
        let pages = |n: &[u64]| Ok(n.iter().map(|n| Position::Page(*n)).collect());
        assert_eq!(walk(&Pagination::Page { first: 1, pages: None }, &[10, 10, 3]), pages(&[1, 2, 3]));
        assert_eq!(walk(&Pagination::Page { first: 0, pages: Some(2) }, &[10, 10, 10]), pages(&[0, 1]));
        assert_eq!(
            walk(&Pagination::Page { first: 1, pages: Some(2) }, &[3, 10]),
            pages(&[1, 2]),
            "the number of pages is fixed"
        );
        let offsets = Ok([0, 10, 20].map(Position::Offset).to_vec());
        assert_eq!(walk(&Pagination::Offset, &[10, 10, 0]), offsets);
        assert_eq!(walk(&Pagination::None, &[10, 10]), Ok(vec![Position::Start]));
    }

    #[test]
    fn exceeding_the_page_limit_is_an_error() {
        assert_eq!(walk(&Pagination::Offset, &[10; 9]), Err(PaginationError::TooMany(5)));
    }

    #[test]
    fn an_absent_null_or_empty_cursor_ends_the_pages() {
        let cursor = Pagination::Cursor { pointer: "/next".to_owned() };
        let after = |body: &str| Pages::new(&cursor, 10, 5).after(fetched(10, body));
        for body in ["{}", r#"{"next": null}"#, r#"{"next": ""}"#] {
            assert_eq!(after(body), Ok(Next::End));
        }
        let big = "123456789012345678901234567890";
        let number = Next::At(Position::Cursor(Some(big.to_owned())));
        assert_eq!(after(&format!("{{\"next\": {big}}}")), Ok(number));
        let error = after(r#"{"next": {"token": "s3cret"}}"#).unwrap_err();
        assert_eq!(error.to_string(), "pagination pointer /next: an object does not name a next page");
    }

    #[test]
    fn a_page_may_name_the_url_of_the_next_one() {
        let by_url = Pagination::NextUrl { pointer: "/paging/next".to_owned() };
        let mut pages = Pages::new(&by_url, 10, 5);
        assert_eq!(pages.first(), Position::Start);
        let mut after =
            |next: &str| pages.after(fetched(10, &format!("{{\"paging\": {{\"next\": {next}}}}}")));
        let next = "\"/v1/orders?after=17\"";
        assert_eq!(after(next), Ok(Next::Named("/v1/orders?after=17".to_owned())));
        assert_eq!(after("null"), Ok(Next::End));
        assert_eq!(after(next), Err(PaginationError::Loop(3)));
        assert!(matches!(after("true"), Err(PaginationError::NotANextPage { .. })));
    }

    #[test]
    fn the_last_record_names_the_next_page_until_no_more_follow() {
        let last = |more: Option<&str>| Pagination::LastRecord {
            pointer: "/id".to_owned(),
            more: more.map(str::to_owned),
        };
        let after = |pagination: &Pagination, last: Option<&str>, body: &str| {
            let last = last.map(str::as_bytes);
            Pages::new(pagination, 10, 5).after(Fetched { last, ..fetched(2, body) })
        };
        let at = |id: &str| Ok(Next::At(Position::Cursor(Some(id.to_owned()))));
        let more = last(Some("/has_more"));
        let charge = Some(r#"{"id": "ch_2"}"#);
        assert_eq!(after(&more, charge, r#"{"has_more": true}"#), at("ch_2"));
        assert_eq!(after(&more, charge, r#"{"has_more": false}"#), Ok(Next::End));
        assert_eq!(after(&more, None, r#"{"has_more": true}"#), Ok(Next::End));
        assert_eq!(after(&last(None), Some(r#"{"id": 7}"#), "{}"), at("7"));
        let nameless = Some(r#"{"id": null}"#);
        assert!(matches!(after(&more, charge, "{}"), Err(PaginationError::NotANextPage { .. })));
        assert!(matches!(after(&last(None), nameless, "{}"), Err(PaginationError::NotANextPage { .. })));
    }

    #[test]
    fn naming_a_page_twice_is_an_endless_pagination() {
        let cursor = Pagination::Cursor { pointer: "/next".to_owned() };
        let mut pages = Pages::new(&cursor, 10, 50);
        for name in ["a", "b"] {
            pages.after(fetched(10, &format!("{{\"next\": \"{name}\"}}"))).unwrap();
        }
        assert_eq!(pages.after(fetched(10, r#"{"next": "a"}"#)), Err(PaginationError::Loop(3)));
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
    }
}
