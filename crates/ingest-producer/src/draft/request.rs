//! The parameters of the given URL: which ones hold a secret, a bound of the interval or a position of the page.

use super::columns::snake;
use super::records::plain;
use chrono::NaiveDate;
use common::contracts::stream::looks_secret;
use common::contracts::time::{TimeError, TimeReading, TimeUnit};
use url::form_urlencoded;

/// Names of parameters, in lower case without separators.
const PAGE: &str = " currentpage p page pageindex pageno pagenumber pg ";
const SIZE: &str =
    " count first hitsperpage itemsperpage limit maxresults num pagesize perpage results rows size take top ";
const OFFSET: &str = " from offset skip start startat startindex ";
const CURSOR: &str = " after afterid continuationtoken continue cursor endingbefore marker nextcursor nexttoken pagetoken \
     scrollid sinceid startcursor startingafter startkey token pagecursor pageafter bookmark ";
/// First and last words of the names of parameters that bound the interval.
const START_WORDS: [&str; 10] =
    ["since", "from", "start", "begin", "after", "gte", "gt", "min", "date", "day"];
const END_WORDS: [&str; 7] = ["until", "to", "end", "before", "lte", "lt", "max"];

/// What a parameter is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Role {
    Page(u32),
    Size(u32),
    Offset(u32),
    Cursor,
    /// A bound of the interval, as its placeholder.
    Bound(String),
    Other,
}

/// A parameter of the URL.
#[derive(Debug, Clone)]
pub(super) struct Parameter {
    /// Its name and value as the URL has them.
    pub text: String,
    pub role: Role,
}

/// The given URL.
#[derive(Debug, Clone, Default)]
pub(super) struct Request {
    /// The URL without its query.
    base: String,
    pub parameters: Vec<Parameter>,
    /// Names of parameters with secrets, which the URL no longer has.
    pub secrets: Vec<String>,
}

impl Request {
    pub fn read(url: &str) -> Request {
        let url = url.split('#').next().unwrap_or_default();
        let (base, query) = url.split_once('?').unwrap_or((url, ""));
        let mut request = Request { base: base.to_owned(), ..Request::default() };
        let mut values = Vec::new();
        for text in query.split('&').filter(|text| !text.is_empty()) {
            let pair = form_urlencoded::parse(text.as_bytes()).next();
            let (name, value) = pair.map(|(n, v)| (n.into_owned(), v.into_owned())).unwrap_or_default();
            if looks_secret(&name) && !is_cursor(&name) {
                request.secrets.push(name);
                continue;
            }
            let role = role(&name, &value);
            if matches!(role, Role::Bound(_)) {
                values.push(value);
            }
            request.parameters.push(Parameter { text: text.to_owned(), role });
        }
        // A range that starts and ends with the same value is not empty only if it includes its end.
        if values.len() == 2 && values[0] == values[1] {
            for parameter in &mut request.parameters {
                if let Role::Bound(placeholder) = &mut parameter.role {
                    *placeholder = placeholder.replace("interval.end", "interval.last");
                }
            }
        }
        request
    }

    /// The parameter whose role `matches` accepts.
    pub fn find(&self, matches: impl Fn(&Role) -> bool) -> Option<&Parameter> {
        self.parameters.iter().find(|parameter| matches(&parameter.role))
    }

    /// The first value of the first parameter with a number.
    pub fn number(&self, of: impl Fn(&Role) -> Option<u32>) -> Option<u32> {
        self.parameters.iter().find_map(|parameter| of(&parameter.role))
    }

    /// Placeholders of the bounds of the interval.
    pub fn bounds(&self) -> Vec<&str> {
        let bound = |parameter| match parameter {
            &Parameter { role: Role::Bound(ref placeholder), .. } => Some(placeholder.as_str()),
            _ => None,
        };
        self.parameters.iter().filter_map(bound).collect()
    }

    /// The URL template. Positions of pages other than `position` keep their value.
    pub fn template(&self, position: &str) -> String {
        let mut url = self.base.clone();
        for Parameter { text, role } in &self.parameters {
            // A cursor of an earlier page is of no use.
            if *role == Role::Cursor && position != "{cursor}" {
                continue;
            }
            url.push(if url.contains('?') { '&' } else { '?' });
            let placeholder = match role {
                Role::Bound(placeholder) => placeholder,
                Role::Size(_) => "{page_size}",
                Role::Page(_) if position == "{page}" => position,
                Role::Offset(_) if position == "{offset}" => position,
                Role::Cursor if position == "{cursor}" => position,
                _ => {
                    url.push_str(text);
                    continue;
                }
            };
            url.push_str(text.split('=').next().unwrap_or_default());
            url.push('=');
            url.push_str(placeholder);
        }
        url
    }
}

fn is_cursor(name: &str) -> bool {
    listed(name, CURSOR) && plain(name) != "token"
}

fn listed(name: &str, list: &str) -> bool {
    super::columns::is_in(&plain(name), list)
}

fn role(name: &str, value: &str) -> Role {
    let name_words = snake(name);
    let words: Vec<&str> = name_words.split('_').collect();
    let is_bound = |known: &[&str]| {
        words.first().is_some_and(|word| known.contains(word))
            || words.last().is_some_and(|word| known.contains(word))
            || known.iter().any(|word| plain(name).starts_with(word) && plain(name).ends_with("date"))
            || known.iter().any(|word| plain(name).starts_with(word) && plain(name).ends_with("time"))
    };
    if let Some(form) = time_form(value) {
        let is_end = is_bound(&END_WORDS);
        if is_end || is_bound(&START_WORDS) {
            return Role::Bound(format!("{{interval.{}{form}}}", if is_end { "end" } else { "start" }));
        }
    }
    match value.parse::<u32>() {
        Ok(number) if listed(name, PAGE) => Role::Page(number),
        Ok(number @ 1..=100_000) if listed(name, SIZE) => Role::Size(number),
        Ok(number) if listed(name, OFFSET) => Role::Offset(number),
        _ if listed(name, CURSOR) => Role::Cursor,
        _ => Role::Other,
    }
}

/// How a placeholder writes a time as the value does: nothing for RFC 3339, `_unix`, `_unix_ms` or a format.
fn time_form(value: &str) -> Option<&'static str> {
    if value.bytes().all(|b| b.is_ascii_digit()) {
        return match value.len() {
            8 if NaiveDate::parse_from_str(value, "%Y%m%d").is_ok() => Some(":%Y%m%d"),
            10 => Some("_unix"),
            13 => Some("_unix_ms"),
            _ => None,
        };
    }
    let reading = TimeReading { unit: TimeUnit::Seconds, ..TimeReading::default() };
    match reading.read(value) {
        _ if NaiveDate::parse_from_str(value, "%Y-%m-%d").is_ok() => Some(":%Y-%m-%d"),
        // Other forms, such as RFC 2822, cannot be distinguished from a name.
        Ok(_) if value.contains('T') => Some(""),
        Err(TimeError::NoZone) if value.len() == "2026-01-01T00:00".len() => Some(":%Y-%m-%dT%H:%M"),
        Err(TimeError::NoZone) if value.contains('T') => Some(":%Y-%m-%dT%H:%M:%S"),
        Err(TimeError::NoZone) => Some(":%Y-%m-%d %H:%M:%S"),
        _ => None,
    }
}
