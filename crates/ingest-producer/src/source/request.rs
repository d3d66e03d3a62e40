//! Builds the requests of an interval from the templates in the definition, the interval, the position of the page and
//! the value of `source.for_each`. Pure.

use super::extract::Each;
use super::paginate::Position;
use chrono::{DateTime, SecondsFormat, TimeZone};
use chrono_tz::Tz;
use common::contracts::run_ledger::Interval;
use common::contracts::stream::template::{Bound, BoundFormat, Part, Placeholder, Template};
use common::contracts::stream::{Auth, Definition, ForEach, PageOrder, redacted};
use serde_json::Value;
use url::Url;

/// Value of `{page_size}` if the definition does not set one.
const DEFAULT_PAGE_SIZE: u32 = 1000;

/// A request that cannot be built. Messages contain URLs only as [`redacted`], because they end up in the ledger and in
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
    /// A template is invalid. The definition's validation rejects such templates.
    #[error("source: {0}")]
    Template(String),
    /// The replacement origin is invalid.
    #[error("PIPELINE_SOURCE_ORIGIN: `{0}` must be http(s)://host:port without user, path and query")]
    Origin(String),
}

/// A request for one page.
#[derive(Debug, Clone, PartialEq)]
pub struct PageRequest {
    /// Whether the request is a POST.
    pub post: bool,
    /// URL without credentials.
    pub url: Url,
    /// JSON body.
    pub body: Option<String>,
}

/// Builds the requests of one stream.
#[derive(Debug, Clone)]
pub struct Requests {
    pages: Endpoint,
    /// Builds the requests for the values of `source.for_each`; absent without a listing.
    listing: Option<Endpoint>,
    stream: String,
    page_size: u32,
    zone: Tz,
    origin: Option<Url>,
    name: String,
}

/// The templates of one kind of request.
#[derive(Debug, Clone)]
struct Endpoint {
    post: bool,
    url: Template,
    /// The URL for the first page of a cursor, without the parameter that consists of the cursor.
    first_url: Template,
    query: Vec<(String, Template)>,
    body: Option<Value>,
    /// Whether cursors are percent-encoded already.
    encoded: bool,
}

/// What fills the placeholders of a request.
struct Filling<'a> {
    requests: &'a Requests,
    interval: Interval,
    position: &'a Position,
    each: &'a Each,
}

impl Endpoint {
    fn new(url: &str, query: &[(String, String)], order: &PageOrder) -> Result<Endpoint, RequestError> {
        let parse = |text: &str| Template::parse(text).map_err(RequestError::Template);
        let query = query.iter().map(|(name, value)| Ok((name.clone(), parse(value)?)));
        Ok(Endpoint {
            post: false,
            url: parse(url)?,
            first_url: parse(&without_parameter(url, "{cursor}"))?,
            query: query.collect::<Result<_, RequestError>>()?,
            body: None,
            encoded: matches!(order, PageOrder::Cursor { encoded: true, .. }),
        })
    }
}

impl Requests {
    /// Creates the builder for a definition. `origin` replaces scheme, host and port of its URLs.
    pub fn new(definition: &Definition, origin: Option<&str>) -> Result<Requests, RequestError> {
        let source = &definition.source;
        let origin = origin.map(|text| {
            let url = Url::parse(text).ok().filter(|u| matches!(u.scheme(), "http" | "https"));
            url.filter(|u| u.path() == "/" && u.query().is_none())
                .filter(|u| u.username().is_empty() && u.password().is_none())
                .ok_or_else(|| RequestError::Origin(redacted(text)))
        });
        let pages = Endpoint::new(&source.url, &source.query, &source.pagination.order)?;
        let listing = match &source.for_each {
            Some(ForEach::Listing(listing)) => {
                Some(Endpoint::new(&listing.url, &listing.query, &listing.pagination.order)?)
            }
            _ => None,
        };
        Ok(Requests {
            pages: Endpoint { post: source.method == "POST", body: source.body.clone(), ..pages },
            listing,
            stream: definition.stream.name.clone(),
            page_size: source.page_size.unwrap_or(DEFAULT_PAGE_SIZE),
            zone: source.zone,
            origin: origin.transpose()?,
            name: redacted(source.url.split(['?', '{']).next().unwrap_or_default()),
        })
    }

    /// The request for the page at `position`.
    pub fn page(
        &self,
        interval: Interval,
        position: &Position,
        each: &Each,
    ) -> Result<PageRequest, RequestError> {
        self.build(&self.pages, &Filling { requests: self, interval, position, each })
    }

    /// The request for the page of the listing at `position`.
    pub fn listing(&self, interval: Interval, position: &Position) -> Result<PageRequest, RequestError> {
        let listing = self.listing.as_ref().unwrap_or(&self.pages);
        self.build(listing, &Filling { requests: self, interval, position, each: &Each::new() })
    }

    /// The request for the next page as the current page names it, by a relative or absolute URL. It must be on the same
    /// server. A server behind a proxy that ends TLS may name it with `http:`; like a browser that knows the server, the
    /// request stays with `https:`.
    pub fn next(&self, current: &PageRequest, next: &str) -> Result<PageRequest, RequestError> {
        let found = current
            .url
            .join(next)
            .map_err(|e| RequestError::Url { url: redacted(next), cause: e.to_string() })?;
        let mut url = self.replace_origin(found);
        if url.scheme() == "http"
            && current.url.scheme() == "https"
            && url.port().is_none_or(|port| port == 443)
        {
            // Cannot fail for these schemes.
            let _ = url.set_scheme("https");
            let _ = url.set_port(current.url.port());
        }
        if url.origin() == current.url.origin() {
            return Ok(PageRequest { url, ..current.clone() });
        }
        Err(RequestError::OtherOrigin {
            next: redacted(url.as_str()),
            origin: current.url.origin().ascii_serialization(),
        })
    }

    /// The name of the source in events: the URL up to its first placeholder, without the query.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Replaces the origin of the URL that access tokens are requested from.
    pub fn replace_token_origin(&self, auth: &mut Auth) {
        if let Auth::Token(request) = auth
            && let Ok(url) = Url::parse(&request.url)
        {
            request.url = self.replace_origin(url).into();
        }
    }

    fn replace_origin(&self, url: Url) -> Url {
        let Some(origin) = &self.origin else { return url };
        let mut moved = origin.clone();
        moved.set_path(url.path());
        moved.set_query(url.query());
        moved
    }

    fn build(&self, endpoint: &Endpoint, filling: &Filling<'_>) -> Result<PageRequest, RequestError> {
        let is_first = matches!(filling.position, Position::Cursor(None));
        let template = if is_first { &endpoint.first_url } else { &endpoint.url };
        let mut text = filling.encoded(template, endpoint.encoded, false);
        for (name, template) in &endpoint.query {
            // Many servers reject an empty cursor, so the first page has none.
            if is_first && template.single() == Some(&Placeholder::Cursor) {
                continue;
            }
            text.push(if text.contains('?') { '&' } else { '?' });
            encode(name, b"[]", &mut text);
            text.push('=');
            text.push_str(&filling.encoded(template, endpoint.encoded, true));
        }
        let parsed = Url::parse(&text);
        let url = parsed.map_err(|e| RequestError::Url { url: redacted(&text), cause: e.to_string() })?;
        let body = endpoint.body.as_ref().map(|body| filling.json(body)).transpose()?;
        Ok(PageRequest {
            post: endpoint.post,
            url: self.replace_origin(url),
            body: body.map(|b| b.to_string()),
        })
    }
}

impl Filling<'_> {
    /// The value of a placeholder as JSON: numbers as numbers, and `null` for the cursor of the first page.
    fn value(&self, placeholder: &Placeholder) -> Value {
        match (placeholder, self.position) {
            (Placeholder::Interval(bound, format), _) => self.bound(*bound, format),
            (Placeholder::Seed, _) => format!("{}-{}", self.requests.stream, self.interval.start_ms).into(),
            (Placeholder::PageSize, _) => self.requests.page_size.into(),
            (Placeholder::Page, Position::Page(number)) | (Placeholder::Offset, Position::Offset(number)) => {
                (*number).into()
            }
            (Placeholder::Cursor, Position::Cursor(Some(cursor))) => cursor.as_str().into(),
            (Placeholder::Each(name), _) => {
                let raw = self.each.iter().find(|(known, _)| known == name).map(|(_, raw)| raw.as_str());
                raw.and_then(|raw| serde_json::from_str(raw).ok()).unwrap_or_default()
            }
            (Placeholder::Page | Placeholder::Offset | Placeholder::Cursor, _) => Value::Null,
        }
    }

    fn bound(&self, bound: Bound, format: &BoundFormat) -> Value {
        let ms = match bound {
            Bound::Start => self.interval.start_ms,
            Bound::End => self.interval.end_ms,
            Bound::Last => self.interval.end_ms - 1,
        };
        match format {
            BoundFormat::Rfc3339 => rfc3339(ms).into(),
            BoundFormat::Unix => ms.div_euclid(1000).into(),
            BoundFormat::UnixMillis => ms.into(),
            BoundFormat::Strftime(format) => {
                let at = self.requests.zone.timestamp_millis_opt(ms).single();
                at.map(|at| at.format(format).to_string()).unwrap_or_default().into()
            }
        }
    }

    /// A template as part of a URL. The text of a query parameter is encoded too, that of a URL is copied.
    fn encoded(&self, template: &Template, cursor_is_encoded: bool, is_parameter: bool) -> String {
        let mut filled = String::with_capacity(64);
        for part in &template.parts {
            match part {
                Part::Text(text) if is_parameter => encode(text, b",", &mut filled),
                Part::Text(text) => filled.push_str(text),
                Part::Placeholder(Placeholder::Cursor) if cursor_is_encoded => {
                    filled.push_str(&text_of(&self.value(&Placeholder::Cursor)));
                }
                Part::Placeholder(placeholder) => {
                    encode(&text_of(&self.value(placeholder)), b"", &mut filled)
                }
            }
        }
        filled
    }

    /// A body with its placeholders filled. A string that consists of one placeholder becomes its value.
    fn json(&self, body: &Value) -> Result<Value, RequestError> {
        Ok(match body {
            Value::String(text) => {
                let template = Template::parse_body(text).map_err(RequestError::Template)?;
                match template.single() {
                    Some(placeholder) => self.value(placeholder),
                    None => {
                        let parts = template.parts.iter().map(|part| match part {
                            Part::Text(text) => text.clone(),
                            Part::Placeholder(placeholder) => text_of(&self.value(placeholder)),
                        });
                        Value::String(parts.collect())
                    }
                }
            }
            Value::Array(items) => {
                Value::Array(items.iter().map(|item| self.json(item)).collect::<Result<_, _>>()?)
            }
            Value::Object(members) => {
                let filled = members.iter().map(|(name, value)| Ok((name.clone(), self.json(value)?)));
                Value::Object(filled.collect::<Result<_, RequestError>>()?)
            }
            other => other.clone(),
        })
    }
}

/// The characters of a string, the text of another value, and nothing for `null`.
fn text_of(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
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

/// Percent-encodes everything except the unreserved characters of RFC 3986, `:`, which is common in times, and
/// `allowed`.
fn encode(value: &str, allowed: &[u8], into: &mut String) {
    for byte in value.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~:".contains(&byte) || allowed.contains(&byte) {
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
        let request = requests(template, None).unwrap().page(INTERVAL, position, &vec![]).unwrap();
        assert_eq!(request.url.as_str(), expected);
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
        let first = requests.page(INTERVAL, &Position::Page(1), &vec![]).unwrap();
        assert_eq!(first.url.as_str(), "http://127.0.0.1:8090/v1?p=1");
        let next = requests.next(&first, "https://api.example.org/v1?p=2").unwrap();
        assert_eq!(next.url.as_str(), "http://127.0.0.1:8090/v1?p=2");
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
        let first = requests.page(INTERVAL, &Position::Start, &vec![]).unwrap();
        assert_eq!(requests.next(&first, "/v1/items?p=2").unwrap().url.as_str(), "https://h/v1/items?p=2");
        assert_eq!(requests.next(&first, "?p=2").unwrap().url.as_str(), "https://h/v1/items?p=2");
        let behind_proxy = requests.next(&first, "http://h/v1/items?p=2").unwrap();
        assert_eq!(behind_proxy.url.as_str(), "https://h/v1/items?p=2");
        for elsewhere in ["http://h:8080/v1", "https://evil/v1", "//evil/", "file:///etc/passwd"] {
            let error = requests.next(&first, elsewhere).expect_err(elsewhere).to_string();
            assert!(error.contains("another server than https://h"), "{error}");
        }
        for secret in ["https://evil/?key=s3cret", "http://[s3cret?key=s3cret"] {
            let error = requests.next(&first, secret).expect_err(secret).to_string();
            assert!(!error.contains("=s3cret"), "{error}");
        }
    }

    #[test]
    fn intervals_are_written_in_the_format_that_the_source_expects() {
        let at = |template: &str, expected: &str| {
            check(&format!("http://h/?t={template}"), &Position::Start, &format!("http://h/?t={expected}"))
        };
        at("{interval.start:%Y-%m-%d}", "2026-01-01");
        at("{interval.start:%Y-%m-%dT%H:%M:%S}", "2026-01-01T00:00:00");
        at("{interval.start_unix_ms}", "1767225600000");
        at("{interval.last}", "2026-01-01T00:01:00.499Z");
        at("{interval.last_unix}", "1767225660");
        let text = include_str!("../../../../streams/user_created.toml");
        let mut definition = Definition::parse("test", text).unwrap();
        definition.source.url = "http://h/?t={interval.start:%d.%m.%Y %H:%M %z}".to_owned();
        definition.source.zone = Tz::Europe__Berlin;
        let requests = Requests::new(&definition, None).unwrap();
        let request = requests.page(INTERVAL, &Position::Start, &vec![]).unwrap();
        assert_eq!(request.url.as_str(), "http://h/?t=01.01.2026%2001:00%20%2B0100");
    }

    #[test]
    fn query_and_body_are_filled_and_the_first_page_has_no_cursor() {
        let text = include_str!("../../../../streams/user_created.toml");
        let mut definition = Definition::parse("test", text).unwrap();
        let source = &mut definition.source;
        source.url = "http://h/graphql".to_owned();
        source.query = [
            ("created[gte]", "{interval.start}"),
            ("q", "a&b"),
            ("after", "{cursor}"),
            ("s", "{each.symbol}"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .to_vec();
        source.method = "POST".to_owned();
        source.body = Some(serde_json::json!({
            "query": "{ items(first: {page_size}) { id } }",
            "variables": {"after": "{cursor}", "first": "{page_size}", "s": "<{each.symbol}>", "fixed": [1, true]},
        }));
        let requests = Requests::new(&definition, None).unwrap();
        let each = vec![("symbol".to_owned(), "\"BTC/USD\"".to_owned())];
        let at = |cursor: Option<&str>| {
            let request =
                requests.page(INTERVAL, &Position::Cursor(cursor.map(str::to_owned)), &each).unwrap();
            (request.url.to_string(), request.body.unwrap())
        };
        let (url, body) = at(None);
        assert_eq!(url, "http://h/graphql?created[gte]=2026-01-01T00:00:00Z&q=a%26b&s=BTC%2FUSD");
        let expected = r#"{"query":"{ items(first: 500) { id } }","variables":{"after":null,"first":500,"fixed":[1,true],"s":"<BTC/USD>"}}"#;
        assert_eq!(body, expected);
        let (url, body) = at(Some("x=="));
        assert!(url.contains("&after=x%3D%3D&"), "{url}");
        assert!(body.contains("\"after\":\"x==\""), "{body}");
    }

    #[test]
    fn an_encoded_cursor_is_not_encoded_again() {
        let text = include_str!("../../../../streams/orders.toml");
        let text = text
            .replace("pointer = \"/data/paging/next\"", "pointer = \"/data/paging/next\", encoded = true");
        let requests = Requests::new(&Definition::parse("test", &text).unwrap(), None).unwrap();
        let cursor = Position::Cursor(Some("PnM6Mg%3D%3D".to_owned()));
        let url = requests.page(INTERVAL, &cursor, &vec![]).unwrap().url;
        assert!(url.as_str().ends_with("cursor=PnM6Mg%3D%3D"), "{url}");
    }
}
