//! How the pages of an answer seem to follow one another.

use super::columns::is_in;
use super::file::quoted;
use super::records::{Leaf, plain};
use super::request::{Request, Role};
use crate::source::paginate::{Headers, next_link};

/// Names of values in an answer, in lower case without separators.
const NEXT: &str =
    " next nexthref nextlink nextpage nextpageurl nexturl odatanextlink atodatanextlink href url ";
const CURSORS: &str = " after continuationtoken continue cursor cursornext endcursor next nextcursor nextpage \
     nextpagecursor nextpagetoken nexttoken pagetoken scrollid bookmark ";
const MORE: &str = " hasmore hasmoreitems hasmorepages hasnext hasnextpage more moreavailable ";
const NO_MORE: &str = " done endofstream finished islast islastpage last lastpage ";
const PAGES: &str = " lastpage nbpages numpages pagecount pages pagestotal totalpages ";
const TOTAL: &str = " nbhits numfound recordstotal total totalcount totalelements totalhits totalitems totalrecords \
     totalresults totalsize ";
/// Headers with a cursor, a number of pages and a number of records.
const CURSOR_HEADERS: [&str; 4] =
    ["x-ms-continuationtoken", "x-continuation-token", "x-next-cursor", "x-next-page-token"];
const PAGES_HEADERS: [&str; 2] = ["x-wp-totalpages", "x-total-pages"];
const TOTAL_HEADERS: [&str; 3] = ["x-total-count", "x-wp-total", "x-total"];

/// The guessed pagination.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Paging {
    /// `source.pagination`; empty for none.
    pub toml: String,
    /// Placeholder of the position in the request; empty if the page names the next one.
    pub position: &'static str,
    /// A parameter that the request lacks.
    pub added: Option<String>,
    /// Why it was guessed, or what to do if nothing was.
    pub why: String,
}

/// What is known about an answer.
pub(super) struct Around<'a> {
    pub request: &'a Request,
    pub headers: &'a Headers,
    pub leaves: &'a [Leaf<'a>],
    /// Number of records in the page.
    pub records: usize,
    /// The id, if it is one value of the record.
    pub id: Option<&'a str>,
}

impl Leaf<'_> {
    fn name(&self) -> String {
        plain(self.pointer.rsplit('/').next().unwrap_or_default())
    }

    fn is_text(&self) -> bool {
        self.raw.starts_with('"') && self.raw.len() > 2
    }

    fn is_url(&self) -> bool {
        let text = self.raw.trim_start_matches('"');
        self.raw.starts_with('"') && ["http:", "https:", "/", "?"].iter().any(|start| text.starts_with(start))
    }

    fn is_boolean(&self) -> bool {
        matches!(self.raw, "true" | "false")
    }

    fn number(&self) -> Option<usize> {
        self.raw.trim_matches('"').parse().ok()
    }
}

impl<'a> Around<'a> {
    fn leaf(&self, list: &str, accept: impl Fn(&Leaf<'_>) -> bool) -> Option<&'a Leaf<'a>> {
        self.leaves.iter().find(|leaf| is_in(&leaf.name(), list) && accept(leaf))
    }

    fn header(&self, names: &[&'static str]) -> Option<&'static str> {
        names.iter().copied().find(|name| self.headers.get(name).is_some())
    }

    /// The mark that says whether more pages follow, as a key of `pagination`.
    fn more(&self) -> Option<String> {
        let mark = |list, negation: &str| {
            let leaf = self.leaf(list, |leaf| leaf.is_boolean())?;
            Some(format!(", more = {}", quoted(&format!("{negation}{}", leaf.pointer))))
        };
        mark(MORE, "").or_else(|| mark(NO_MORE, "!"))
    }

    /// The mark of the end for pages that are counted. A number of records is the last choice: some sources count
    /// records that they do not return, and then the attempt fails.
    fn end(&self) -> String {
        let total_pages = || {
            let leaf = self.leaf(PAGES, |leaf| leaf.number().is_some()).map(|leaf| leaf.pointer.to_owned());
            leaf.or_else(|| self.header(&PAGES_HEADERS).map(|name| format!("header:{name}")))
        };
        let total = || {
            let leaf = self.leaf(TOTAL, |leaf| leaf.number().is_some_and(|total| total >= self.records));
            let leaf = leaf.map(|leaf| leaf.pointer.to_owned());
            leaf.or_else(|| self.header(&TOTAL_HEADERS).map(|name| format!("header:{name}")))
        };
        let counted = || {
            let pages = total_pages().map(|place| format!(", total_pages = {}", quoted(&place)));
            pages.or_else(|| total().map(|place| format!(", total = {}", quoted(&place))))
        };
        self.more().or_else(counted).unwrap_or_default()
    }

    /// Guesses the pagination from what the page, its headers and the request say.
    pub fn paging(&self) -> Paging {
        self.named().or_else(|| self.cursor()).or_else(|| self.counted()).or_else(|| self.last_record()).unwrap_or_else(
            || Paging {
                why: "Nothing in this answer names a next page, so an interval is one page. If there are more, see \
                      \"Pages\" in docs/sources.md: give the URL with its page parameter, or set the kind here."
                    .to_owned(),
                ..Paging::default()
            },
        )
    }

    /// A page that names the URL of the next one.
    fn named(&self) -> Option<Paging> {
        if self.headers.get("link").is_some_and(|link| next_link(&link).is_some()) {
            let why = "The header `Link` names the next page.".to_owned();
            return Some(Paging { toml: "{ kind = \"link_header\" }".to_owned(), why, ..Paging::default() });
        }
        let is_next = |leaf: &Leaf<'_>| leaf.is_url() && plain(leaf.pointer).contains("next");
        let next = self.leaf(NEXT, is_next)?;
        let (pointer, more) = (next.pointer, self.more().unwrap_or_default());
        Some(Paging {
            toml: format!("{{ kind = \"next_url\", pointer = {}{more} }}", quoted(pointer)),
            why: format!("The page names the URL of the next one at `{pointer}`."),
            ..Paging::default()
        })
    }

    /// A page with a cursor. The request needs a parameter for it.
    fn cursor(&self) -> Option<Paging> {
        let sent = self.request.find(|role| *role == Role::Cursor);
        let is_cursor = |leaf: &Leaf<'_>| leaf.is_text() || (leaf.raw == "null" && sent.is_some());
        let leaf = self.leaf(CURSORS, |leaf| is_cursor(leaf) && !leaf.is_url());
        let place = leaf.map(|leaf| leaf.pointer.to_owned());
        let place = place.or_else(|| self.header(&CURSOR_HEADERS).map(|name| format!("header:{name}")))?;
        let more = self.more().unwrap_or_default();
        // Base64 in a URL often ends with an encoded `=`.
        let is_encoded = leaf.is_some_and(|leaf| leaf.raw.to_ascii_lowercase().contains("%3d"));
        let encoded = if is_encoded { ", encoded = true" } else { "" };
        let mut why = format!("The cursor of the next page is at `{place}`.");
        let added = sent.is_none().then(|| parameter_of(&place));
        if let Some(added) = &added {
            why =
                format!("{why} The parameter `{added}` is a guess: look up which one the API reads it from.");
        }
        let toml = format!("{{ kind = \"cursor\", pointer = {}{encoded}{more} }}", quoted(&place));
        Some(Paging { toml, position: "{cursor}", added, why })
    }

    /// Pages that are counted, by number or by offset.
    fn counted(&self) -> Option<Paging> {
        let stated = self.leaves.iter().find(|l| matches!(l.name().as_str(), "page" | "currentpage"));
        let number = |role: &Role| match role {
            Role::Page(number) => Some(*number),
            _ => None,
        };
        let offset = |role: &Role| match role {
            Role::Offset(number) => Some(*number),
            _ => None,
        };
        let end = self.end();
        let past = "It ends at an empty page unless a mark says otherwise; if the API refuses pages past the end, add \
                    `end_on = [400]`.";
        if let Some(first) = self.request.number(number) {
            let toml = format!("{{ kind = \"page\", first = {first}{end} }}");
            let why = format!("The URL has a page number. {past}");
            return Some(Paging { toml, position: "{page}", added: None, why });
        }
        if let Some(first) = self.request.number(offset) {
            let toml = format!("{{ kind = \"offset\", first = {first}{end} }}");
            let why = format!("The URL has an offset. {past}");
            return Some(Paging { toml, position: "{offset}", added: None, why });
        }
        let (stated, first) = stated.and_then(|leaf| Some((leaf, leaf.number()?.min(1))))?;
        self.leaf(PAGES, |leaf| leaf.number().is_some())
            .or_else(|| self.leaf(MORE, |leaf| leaf.is_boolean()))?;
        Some(Paging {
            toml: format!("{{ kind = \"page\", first = {first}{end} }}"),
            position: "{page}",
            added: Some("page".to_owned()),
            why: format!(
                "The page states its number at `{}`. The parameter `page` is a guess.",
                stated.pointer
            ),
        })
    }

    /// A list that continues after the id of its last record, as in Stripe's API.
    fn last_record(&self) -> Option<Paging> {
        let id = self.id?;
        let more = self.leaf(MORE, |leaf| leaf.is_boolean())?.pointer;
        let sent = self.request.find(|role| *role == Role::Cursor);
        let is_list = self.leaves.iter().any(|leaf| leaf.pointer == "/object" && leaf.raw == "\"list\"");
        if sent.is_none() && !is_list {
            return None;
        }
        Some(Paging {
            toml: format!("{{ kind = \"cursor\", last_record = {}, more = {} }}", quoted(id), quoted(more)),
            position: "{cursor}",
            added: sent.is_none().then(|| "starting_after".to_owned()),
            why: format!(
                "`{more}` says whether more records follow, and no cursor is named: the id of the last one is it."
            ),
        })
    }
}

/// The parameter that usually carries the cursor at a place.
fn parameter_of(place: &str) -> String {
    let name = place.rsplit(['/', ':']).next().unwrap_or_default();
    match plain(name).as_str() {
        "nextpagetoken" => if name.contains('_') { "page_token" } else { "pageToken" }.to_owned(),
        "endcursor" => "after".to_owned(),
        "continue" => "continue".to_owned(),
        "xmscontinuationtoken" | "continuationtoken" => "continuationToken".to_owned(),
        _ => "cursor".to_owned(),
    }
}
