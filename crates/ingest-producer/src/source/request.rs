//! Builds the URL of a request from the template in the definition, the interval and the position of the page. Pure.

use super::paginate::Position;
use chrono::{DateTime, SecondsFormat};
use common::contracts::run_ledger::Interval;
use common::contracts::stream::{Definition, redacted};
use url::Url;

/// A URL that cannot be built. Messages contain URLs only as [`redacted`], because they end up in the ledger and in
/// logs.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// The URL is invalid.
    #[error("source.url: `{url}` is not a valid URL: {cause}")]
    Url {
        /// The URL, with its placeholders filled.
        url: String,
        /// The parser's error.
        cause: String,
    },
    /// A page names a next page on another server.
    #[error(
        "the next page {next} is on another server than {origin}; it is not fetched, to protect credentials"
    )]
    OtherOrigin {
        /// URL of the next page.
        next: String,
        /// Origin of the current page.
        origin: String,
    },
    /// The replacement origin is invalid.
    #[error("PIPELINE_SOURCE_ORIGIN: `{0}` must be http(s)://host:port without user, path and query")]
    Origin(String),
}

/// Builds the URLs of one stream.
#[derive(Debug, Clone)]
pub struct Requests {
    template: String,
    stream: String,
    page_size: u32,
    origin: Option<Url>,
}

impl Requests {
    /// Creates the builder for a definition. `origin` replaces scheme, host and port of its URL.
    pub fn new(definition: &Definition, origin: Option<&str>) -> Result<Requests, RequestError> {
        let origin = origin.map(|text| {
            let url = Url::parse(text).ok().filter(|u| matches!(u.scheme(), "http" | "https"));
            url.filter(|u| u.path() == "/" && u.query().is_none())
                .filter(|u| u.username().is_empty() && u.password().is_none())
                .ok_or_else(|| RequestError::Origin(redacted(text)))
        });
        Ok(Requests {
            template: definition.source.url.clone(),
            stream: definition.stream.name.clone(),
            page_size: definition.source.page_size,
            origin: origin.transpose()?,
        })
    }

    /// The URL of the page at `position`.
    pub fn url(&self, interval: Interval, position: &Position) -> Result<Url, RequestError> {
        let text = self.fill(interval, position);
        let parsed = Url::parse(&text);
        let url = parsed.map_err(|e| RequestError::Url { url: redacted(&text), cause: e.to_string() })?;
        Ok(self.replace_origin(url))
    }

    /// The URL of the next page as the current page names it, relative or absolute. It must be on the same server.
    pub fn next(&self, current: &Url, next: &str) -> Result<Url, RequestError> {
        let found = current
            .join(next)
            .map_err(|e| RequestError::Url { url: redacted(next), cause: e.to_string() })?;
        let url = self.replace_origin(found);
        if url.origin() == current.origin() {
            return Ok(url);
        }
        Err(RequestError::OtherOrigin {
            next: redacted(url.as_str()),
            origin: current.origin().ascii_serialization(),
        })
    }

    /// The name of the source in events: the URL up to its first placeholder, without the query.
    pub fn name(&self) -> String {
        redacted(self.template.split(['?', '{']).next().unwrap_or_default())
    }

    fn replace_origin(&self, url: Url) -> Url {
        let Some(origin) = &self.origin else { return url };
        let mut moved = origin.clone();
        moved.set_path(url.path());
        moved.set_query(url.query());
        moved
    }

    fn fill(&self, interval: Interval, position: &Position) -> String {
        let (page, offset, cursor) = match position {
            Position::Page(page) => (Some(page.to_string()), None, None),
            Position::Offset(offset) => (None, Some(offset.to_string()), None),
            Position::Cursor(cursor) => (None, None, cursor.clone()),
            Position::Start => (None, None, None),
        };
        let value = |name: &str| match name {
            "interval.start" => rfc3339(interval.start_ms),
            "interval.end" => rfc3339(interval.end_ms),
            "interval.start_unix" => interval.start_ms.div_euclid(1000).to_string(),
            "interval.end_unix" => interval.end_ms.div_euclid(1000).to_string(),
            "interval.seed" => format!("{}-{}", self.stream, interval.start_ms),
            "page" => page.clone().unwrap_or_default(),
            "page_size" => self.page_size.to_string(),
            "offset" => offset.clone().unwrap_or_default(),
            "cursor" => cursor.clone().unwrap_or_default(),
            // Unreachable: the definition's validation rejects unknown placeholders.
            other => format!("{{{other}}}"),
        };
        // The first page has no cursor. Many servers reject an empty one, so the parameter is omitted.
        let template = if matches!(position, Position::Cursor(None)) {
            without_parameter(&self.template, "{cursor}")
        } else {
            self.template.clone()
        };
        let mut filled = String::with_capacity(template.len() + 64);
        let mut rest = template.as_str();
        while let Some((before, after)) = rest.split_once('{') {
            let (name, tail) = after.split_once('}').unwrap_or((after, ""));
            filled.push_str(before);
            encode(&value(name), &mut filled);
            rest = tail;
        }
        filled + rest
    }
}

/// Removes the query parameter whose value is exactly `placeholder` from a template.
fn without_parameter(template: &str, placeholder: &str) -> String {
    let Some((path, query)) = template.split_once('?') else { return template.to_owned() };
    let kept: Vec<&str> = query
        .split('&')
        .filter(|pair| pair.split_once('=').is_none_or(|(_, value)| value != placeholder))
        .collect();
    if kept.is_empty() { path.to_owned() } else { format!("{path}?{}", kept.join("&")) }
}

/// RFC 3339 in UTC, with milliseconds unless they are 0.
fn rfc3339(ms: i64) -> String {
    let form = if ms % 1000 == 0 { SecondsFormat::Secs } else { SecondsFormat::Millis };
    DateTime::from_timestamp_millis(ms).unwrap_or_default().to_rfc3339_opts(form, true)
}

/// Percent-encodes everything except the unreserved characters of RFC 3986 and `:`, which is common in times.
fn encode(value: &str, into: &mut String) {
    for byte in value.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~:".contains(&byte) {
            into.push(char::from(byte));
        } else {
            into.push_str(&format!("%{byte:02X}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn requests(url: &str, origin: Option<&str>) -> Result<Requests, RequestError> {
        let text = include_str!("../../../../streams/user_created.toml");
        let mut definition = Definition::parse("test", text).unwrap();
        definition.source.url = url.to_owned();
        Requests::new(&definition, origin)
    }

    const INTERVAL: Interval = Interval { start_ms: 1_767_225_600_000, end_ms: 1_767_225_660_500 };

    fn check(template: &str, position: &Position, expected: &str) {
        assert_eq!(requests(template, None).unwrap().url(INTERVAL, position).unwrap().as_str(), expected);
    }

    #[test]
    fn placeholders_are_filled_and_encoded() {
        let page = "http://h/api?n={page_size}&seed={interval.seed}&page={page}";
        check(page, &Position::Page(2), "http://h/api?n=500&seed=user_created-1767225600000&page=2");
        let span = "http://h/{interval.start}?to={interval.end}&o={offset}";
        check(span, &Position::Offset(7), "http://h/2026-01-01T00:00:00Z?to=2026-01-01T00:01:00.500Z&o=7");
        let seconds = "http://h/?created[gte]={interval.start_unix}&created[lt]={interval.end_unix}";
        check(seconds, &Position::Start, "http://h/?created[gte]=1767225600&created[lt]=1767225660");
        let cursor = Position::Cursor(Some("a b&c=ü".to_owned()));
        check("http://h/?c={cursor}&x=1", &cursor, "http://h/?c=a%20b%26c%3D%C3%BC&x=1");
    }

    #[test]
    fn the_first_page_has_no_cursor_parameter() {
        check("http://h/?x=1&c={cursor}", &Position::Cursor(None), "http://h/?x=1");
        check("http://h/?c={cursor}", &Position::Cursor(None), "http://h/");
    }

    #[test]
    fn a_replacement_origin_receives_every_request() {
        let requests =
            requests("https://api.example.org/v1?p={page}", Some("http://127.0.0.1:8090")).unwrap();
        let first = requests.url(INTERVAL, &Position::Page(1)).unwrap();
        assert_eq!(first.as_str(), "http://127.0.0.1:8090/v1?p=1");
        let next = requests.next(&first, "https://api.example.org/v1?p=2").unwrap();
        assert_eq!(next.as_str(), "http://127.0.0.1:8090/v1?p=2");
        assert_eq!(requests.name(), "https://api.example.org/v1");
    }

    #[test]
    fn an_invalid_origin_is_rejected() {
        for wrong in ["127.0.0.1:8090", "ftp://h", "http://h/path", "http://a:b@h", "nothing"] {
            assert!(matches!(requests("http://h/", Some(wrong)), Err(RequestError::Origin(_))), "{wrong}");
        }
    }

    #[test]
    fn the_next_page_may_be_relative_but_not_on_another_server() {
        let requests = requests("https://h/v1/items", None).unwrap();
        let first = requests.url(INTERVAL, &Position::Start).unwrap();
        assert_eq!(requests.next(&first, "/v1/items?p=2").unwrap().as_str(), "https://h/v1/items?p=2");
        assert_eq!(requests.next(&first, "?p=2").unwrap().as_str(), "https://h/v1/items?p=2");
        for elsewhere in ["http://h/v1", "https://evil/v1", "//evil/", "file:///etc/passwd"] {
            let error = requests.next(&first, elsewhere).expect_err(elsewhere).to_string();
            assert!(error.contains("another server than https://h"), "{error}");
        }
        for secret in ["https://evil/?key=s3cret", "http://[s3cret?key=s3cret"] {
            let error = requests.next(&first, secret).expect_err(secret).to_string();
            assert!(!error.contains("=s3cret"), "{error}");
        }
    }
}
