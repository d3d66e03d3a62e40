//! Fetches pages from the source. Timeouts, a rate limit and size limits before and after decompression apply.
//! Redirects are not followed, and private addresses are rejected unless the definition allows them.

use super::auth::{Authenticator, Credentials, Loaded, SendTokenRequest};
use super::body::{self, Received};
use super::guard::{PrivateAddress, PublicResolver, check_address};
use super::paginate::{Fetched, Headers};
use super::records::Body;
use super::request::PageRequest;
use crate::error::AttemptError;
use async_trait::async_trait;
use common::contracts::run_ledger::Interval;
use common::contracts::stream::{BodyFormat, SourceSettings, Statuses, redacted};
use common::runtime::config::ConfigError;
use reqwest::header::{self, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Method, Response, StatusCode};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex;
use tokio::time::Instant;
use url::{Url, form_urlencoded};

/// Maximum pause accepted from the source: one day.
const MAX_WAIT_MS: i64 = 86_400_000;
/// Bytes of an unsuccessful response that are read, and characters of it that an error shows.
const MAX_ERROR_BYTES: usize = 4096;
const MAX_ERROR_SHOWN: usize = 200;
/// Largest response to a request for an access token.
const MAX_TOKEN_BYTES: u64 = 64 << 10;
/// Headers that say when a rate limit ends, and how many requests are left.
const RESET_HEADERS: [&str; 3] = ["x-ratelimit-reset", "x-rate-limit-reset", "ratelimit-reset"];
const REMAINING_HEADERS: [&str; 3] =
    ["x-ratelimit-remaining", "x-rate-limit-remaining", "ratelimit-remaining"];

/// A fetched page.
#[derive(Debug, Clone)]
pub struct Page {
    /// Decoded text; empty if the source says that there are no records.
    pub text: Vec<u8>,
    /// Format of the text.
    pub format: BodyFormat,
    /// The response headers.
    pub headers: Headers,
    /// Body bytes received over the network, before decompression.
    pub bytes: u64,
    /// The credentials of the request, to be redacted in messages.
    pub credentials: Arc<Loaded>,
}

impl Page {
    /// The text with its format.
    pub fn body(&self) -> Body<'_> {
        Body { text: &self.text, format: self.format }
    }

    /// The JSON text; empty if the page has another format.
    pub fn json(&self) -> &[u8] {
        if self.format == BodyFormat::Json { &self.text } else { &[] }
    }

    /// When the source sent the page, in Unix milliseconds on its own clock: `Date`, plus `Age` if a cache sent it. `Date`
    /// has a resolution of one second, and this is the last millisecond of it.
    pub fn sent_at_ms(&self) -> Option<i64> {
        let date = chrono::DateTime::parse_from_rfc2822(self.headers.get("date")?.trim()).ok()?;
        let age_seconds = self.headers.get("age").and_then(|age| age.trim().parse::<u32>().ok()).unwrap_or(0);
        Some(date.timestamp_millis() + i64::from(age_seconds) * 1000 + 999)
    }

    /// What the next page is derived from.
    pub fn fetched<'a>(&'a self, records: u64, last: Option<&'a [u8]>) -> Fetched<'a> {
        Fetched { records, last, body: self.json(), headers: &self.headers }
    }
}

/// Fails if the interval was not over when the source sent a page, on its own clock: records may then be missing.
pub fn check_is_over(interval: Interval, sent_at_ms: i64) -> Result<(), AttemptError> {
    let left_ms = interval.end_ms - sent_at_ms;
    if left_ms <= 0 {
        return Ok(());
    }
    let error = AttemptError::retryable(format!(
        "the interval ends in {left_ms} ms by the clock of the source (header Date), so the clock of this machine is ahead"
    ));
    Err(AttemptError { retry_after_ms: Some(left_ms), ..error })
}

/// Fetches pages. Implemented for HTTP and by fakes in tests.
#[async_trait]
pub trait FetchPage: Send + Sync {
    /// Fetches one page, without retries except for rejected credentials.
    async fn fetch(&self, request: &PageRequest) -> Result<Page, AttemptError>;
}

/// The client of one stream's source.
#[derive(Debug)]
pub struct SourceClient {
    http: reqwest::Client,
    headers: HeaderMap,
    authenticator: Authenticator,
    statuses: Statuses,
    reset_header: Option<String>,
    format: BodyFormat,
    allow_private: bool,
    page_bytes: u64,
    request_timeout: Duration,
    /// Interval between two requests, and when the next one may start. `None` if the rate is not limited.
    pace: Option<(Duration, Mutex<Instant>)>,
}

/// The client cannot be created.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// A header name, header value or secret is invalid in HTTP.
    #[error("source: header `{0}`: name or value is not allowed in HTTP")]
    Header(String),
    /// A secret cannot be read.
    #[error(transparent)]
    Secret(#[from] ConfigError),
    /// The HTTP library failed.
    #[error("source: http client: {0}")]
    Client(String),
}

impl SourceClient {
    /// Creates the client from `[source]` of a definition and reads its secrets.
    pub fn new(source: &SourceSettings) -> Result<SourceClient, ClientError> {
        // Fails if another part of the process has installed a provider, which works as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let milliseconds = |ms: i64| Duration::from_millis(ms.unsigned_abs());
        let mut builder = reqwest::Client::builder()
            .connect_timeout(milliseconds(source.limits.connect_timeout_ms))
            .timeout(milliseconds(source.limits.request_timeout_ms))
            .redirect(reqwest::redirect::Policy::none())
            // A proxy would resolve names itself and bypass the address check. The library's decompression has no size
            // limit.
            .no_proxy()
            .no_gzip()
            .user_agent(concat!("ingest-producer/", env!("CARGO_PKG_VERSION")));
        if !source.allow_private {
            builder = builder.dns_resolver(Arc::new(PublicResolver));
        }
        Ok(SourceClient {
            http: builder.build().map_err(|e| ClientError::Client(chain(&e)))?,
            headers: headers(source)?,
            authenticator: Authenticator::new(&source.auth)?,
            statuses: source.statuses.clone(),
            reset_header: source.reset_header.clone(),
            format: source.format,
            allow_private: source.allow_private,
            page_bytes: source.limits.page_bytes,
            request_timeout: milliseconds(source.limits.request_timeout_ms),
            pace: source
                .requests_per_second
                .map(|rate| (Duration::from_secs_f64(1.0 / rate), Mutex::new(Instant::now()))),
        })
    }

    async fn keep_pace(&self) {
        let Some((pause, next)) = &self.pace else { return };
        let turn = {
            let mut next = next.lock().await;
            let turn = (*next).max(Instant::now());
            *next = turn + *pause;
            turn
        };
        tokio::time::sleep_until(turn).await;
    }

    fn check_address(&self, url: &Url) -> Result<(), AttemptError> {
        if self.allow_private {
            return Ok(());
        }
        check_address(url).map_err(|e| AttemptError::fatal(e.to_string()))
    }

    /// Sends a request with these credentials and returns the response, whatever its status.
    async fn send(&self, request: &PageRequest, loaded: &Loaded) -> Result<Response, AttemptError> {
        self.keep_pace().await;
        let method = if request.post { Method::POST } else { Method::GET };
        let mut headers = self.headers.clone();
        let mut url = request.url.clone();
        match &loaded.credentials {
            Credentials::Header(name, value) => drop(headers.insert(name.clone(), value.clone())),
            Credentials::Query(parameter, key) => url = with_key(&url, parameter, key),
            Credentials::None | Credentials::Basic { .. } => {}
        }
        let mut sent = self.http.request(method, url).headers(headers);
        if let Credentials::Basic { user, password } = &loaded.credentials {
            sent = sent.basic_auth(user, Some(password));
        }
        if let Some(body) = &request.body {
            sent = sent.header(header::CONTENT_TYPE, "application/json").body(body.clone());
        }
        sent.send().await.map_err(|e| self.failed(e))
    }

    fn failed(&self, error: reqwest::Error) -> AttemptError {
        let error = error.without_url();
        let mut source: Option<&(dyn std::error::Error + 'static)> = Some(&error);
        while let Some(cause) = source {
            if let Some(private) = cause.downcast_ref::<PrivateAddress>() {
                return AttemptError::fatal(private.to_string());
            }
            source = cause.source();
        }
        if error.is_timeout() && !error.is_connect() {
            let limit = self.request_timeout.as_secs_f64();
            return AttemptError::retryable(format!("the source sent no complete response within {limit} s"));
        }
        AttemptError::retryable(format!("the source cannot be read: {}", chain(&error)))
    }

    /// Reads the body and fails as soon as it exceeds `limit` bytes.
    async fn read(&self, mut response: Response, limit: u64) -> Result<Vec<u8>, AttemptError> {
        if response.content_length().is_some_and(|length| length > limit) {
            return Err(body::too_large(limit, ""));
        }
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|e| self.failed(e))? {
            if (body.len() + chunk.len()) as u64 > limit {
                return Err(body::too_large(limit, ""));
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body)
    }

    async fn page(&self, response: Response, credentials: Arc<Loaded>) -> Result<Page, AttemptError> {
        let headers = response_headers(&response);
        let (encoding, content_type) = (headers.get("content-encoding"), headers.get("content-type"));
        let (format, limit) = (self.format, self.page_bytes);
        let bytes = self.read(response, limit).await?;
        let length = bytes.len() as u64;
        let received = Received { bytes, encoding, content_type };
        let decoded = tokio::task::spawn_blocking(move || body::decode(received, format, limit)).await;
        let decoded =
            decoded.map_err(|e| AttemptError::retryable(format!("reading the page panicked: {e}")))?;
        let (text, format) = decoded?;
        Ok(Page { text, format, headers, bytes: length, credentials })
    }

    /// The error of a response whose status means a failure, with the first words of its body.
    async fn status_error(&self, mut response: Response, loaded: &Loaded) -> AttemptError {
        let (status, headers) = (response.status(), response_headers(&response));
        let mut body = Vec::new();
        // A response without a readable body still has a status.
        while body.len() < MAX_ERROR_BYTES
            && let Ok(Some(chunk)) = response.chunk().await
        {
            body.extend_from_slice(&chunk);
        }
        body.truncate(MAX_ERROR_BYTES);
        let received = Received {
            bytes: body,
            encoding: headers.get("content-encoding"),
            content_type: headers.get("content-type"),
        };
        let text = body::decode(received, BodyFormat::Ndjson, MAX_ERROR_BYTES as u64).map(|(text, _)| text);
        let words = shown_words(&loaded.redacted(&String::from_utf8_lossy(&text.unwrap_or_default())));
        let mut cause = format!("the source returned {status}");
        if status.is_redirection() {
            let to = redacted(&headers.get("location").unwrap_or_else(|| "(no location)".to_owned()));
            cause = format!("{status}: redirects are not followed; {to} may be the right source.url");
        } else if !words.is_empty() {
            cause = format!("{cause}: {words}");
        }
        let wait_ms = wait_ms(&headers, self.reset_header.as_deref(), chrono::Utc::now().timestamp_millis());
        let mut error = if self.is_retryable(status, &headers, wait_ms) {
            AttemptError::retryable(cause)
        } else {
            AttemptError::fatal(cause)
        };
        error.http_status = Some(status.as_u16());
        error.retry_after_ms = wait_ms;
        error
    }

    fn is_retryable(&self, status: StatusCode, headers: &Headers, wait_ms: Option<i64>) -> bool {
        let code = status.as_u16();
        if self.statuses.retry.contains(&code) || self.statuses.fail.contains(&code) {
            return self.statuses.retry.contains(&code);
        }
        let rate_limited = status == StatusCode::FORBIDDEN && (wait_ms.is_some() || is_exhausted(headers));
        // A secret may be replaced soon after the source has started to reject the old one.
        let may_be_replaced = status == StatusCode::UNAUTHORIZED && self.authenticator.has_secrets();
        rate_limited
            || may_be_replaced
            || status.is_server_error()
            || matches!(
                status,
                StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_EARLY
            )
    }

    /// Whether a status is a failure rather than a page.
    fn is_failure(&self, status: StatusCode) -> bool {
        let Statuses { retry, fail, end, .. } = &self.statuses;
        let code = status.as_u16();
        !status.is_success() || retry.contains(&code) || fail.contains(&code) || end.contains(&code)
    }
}

#[async_trait]
impl FetchPage for SourceClient {
    async fn fetch(&self, request: &PageRequest) -> Result<Page, AttemptError> {
        self.check_address(&request.url)?;
        let mut loaded = self.authenticator.credentials(self).await?;
        let mut response = self.send(request, &loaded).await?;
        if response.status() == StatusCode::UNAUTHORIZED
            && let Some(renewed) = self.authenticator.after_rejection(&loaded, self).await?
        {
            tracing::info!("the source rejected the credentials; repeating the request with renewed ones");
            loaded = renewed;
            response = self.send(request, &loaded).await?;
        }
        let status = response.status();
        let no_records = matches!(status, StatusCode::NO_CONTENT | StatusCode::RESET_CONTENT);
        if no_records || self.statuses.empty.contains(&status.as_u16()) {
            let headers = response_headers(&response);
            return Ok(Page {
                text: vec![],
                format: BodyFormat::Json,
                headers,
                bytes: 0,
                credentials: loaded,
            });
        }
        if self.is_failure(status) {
            return Err(self.status_error(response, &loaded).await);
        }
        self.page(response, loaded.clone()).await.map_err(|mut error| {
            error.http_status = Some(status.as_u16());
            error.cause = loaded.redacted(&error.cause);
            error
        })
    }
}

impl SendTokenRequest for SourceClient {
    async fn send(
        &self,
        url: Url,
        body: String,
        content_type: &'static str,
    ) -> Result<serde_json::Value, AttemptError> {
        self.check_address(&url)?;
        self.keep_pace().await;
        let request = self.http.post(url).header(header::ACCEPT, "application/json");
        let sent = request.header(header::CONTENT_TYPE, content_type).body(body).send().await;
        let response = sent.map_err(|e| self.failed(e))?;
        if !response.status().is_success() {
            return Err(self.status_error(response, &Loaded::nothing()).await);
        }
        let text = self.read(response, MAX_TOKEN_BYTES).await?;
        serde_json::from_slice(&text).map_err(|_| AttemptError::retryable("the response is not JSON"))
    }
}

/// Adds the API key to a URL. It replaces a key that the URL already contains, as in a next-page URL from the source.
fn with_key(url: &Url, parameter: &str, key: &str) -> Url {
    let encoded = |text: &str| form_urlencoded::byte_serialize(text.as_bytes()).collect::<String>();
    let is_key = |pair: &str| {
        form_urlencoded::parse(pair.as_bytes()).next().is_some_and(|(name, _)| name == parameter)
    };
    let others = url.query().unwrap_or_default().split('&');
    let mut pairs: Vec<String> =
        others.filter(|pair| !pair.is_empty() && !is_key(pair)).map(str::to_owned).collect();
    pairs.push(format!("{}={}", encoded(parameter), encoded(key)));
    let mut url = url.clone();
    url.set_query(Some(&pairs.join("&")));
    url
}

fn response_headers(response: &Response) -> Headers {
    let headers = response.headers().iter();
    Headers(
        headers
            .filter_map(|(name, value)| Some((name.to_string(), value.to_str().ok()?.to_owned())))
            .collect(),
    )
}

/// The first characters of a text from the source, without line breaks and other control characters.
pub fn shown_words(text: &str) -> String {
    let words: String =
        text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_ERROR_SHOWN).collect();
    words.trim().to_owned()
}

/// Whether the source says that no requests are left.
fn is_exhausted(headers: &Headers) -> bool {
    REMAINING_HEADERS.iter().any(|name| headers.get(name).is_some_and(|left| left.trim() == "0"))
}

/// How long the source asks to wait, at most [`MAX_WAIT_MS`]: until the named header, by `Retry-After`, or until the rate
/// limit ends unless requests are left.
pub fn wait_ms(headers: &Headers, reset_header: Option<&str>, now_ms: i64) -> Option<i64> {
    let named = reset_header.and_then(|name| headers.get(name));
    let asked = named.or_else(|| headers.get("retry-after"));
    let has_remaining = REMAINING_HEADERS.iter().any(|name| headers.get(name).is_some());
    let reset = || {
        let reset = RESET_HEADERS.iter().find_map(|name| headers.get(name));
        reset.filter(|_| !has_remaining || is_exhausted(headers))
    };
    pause_ms(&asked.or_else(reset)?, now_ms)
}

/// A pause in seconds, or until a date, Unix seconds or Unix milliseconds.
fn pause_ms(text: &str, now_ms: i64) -> Option<i64> {
    let text = text.trim();
    let ms = match text.parse::<f64>() {
        // Numbers of this size are points in time: the first is after 2001 in seconds, the second in milliseconds.
        Ok(number) if number >= 1e12 => number as i64 - now_ms,
        Ok(number) if number >= 1e9 => (number * 1000.0) as i64 - now_ms,
        Ok(number) if number.is_finite() => (number * 1000.0) as i64,
        Ok(_) => return None,
        Err(_) => chrono::DateTime::parse_from_rfc2822(text).ok()?.timestamp_millis() - now_ms,
    };
    Some(ms.clamp(0, MAX_WAIT_MS))
}

fn headers(source: &SourceSettings) -> Result<HeaderMap, ClientError> {
    let mut headers = HeaderMap::new();
    headers.insert(header::ACCEPT, HeaderValue::from_static("application/json, */*;q=0.5"));
    headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("gzip, deflate, br, zstd"));
    for (name, value) in &source.headers {
        let wrong = || ClientError::Header(name.to_owned());
        let key = HeaderName::from_bytes(name.as_bytes()).map_err(|_| wrong())?;
        headers.insert(key, HeaderValue::from_str(value).map_err(|_| wrong())?);
    }
    Ok(headers)
}

/// Formats an error with all of its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

#[cfg(test)]
#[path = "client_tests.rs"]
mod tests;
