//! Fetches pages from the source. Timeouts, a rate limit and size limits before and after decompression apply.
//! Redirects are not followed, and private addresses are rejected unless the definition allows them.

use super::scan;
use crate::error::AttemptError;
use async_trait::async_trait;
use common::contracts::stream::{Auth, SourceSettings, redacted};
use common::runtime::config::read_secret;
use flate2::read::MultiGzDecoder;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::header::{self, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Method, Response, StatusCode};
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex;
use tokio::time::Instant;
use url::{Host, Url, form_urlencoded};

/// Maximum pause accepted from `Retry-After`: one day.
const MAX_RETRY_AFTER_MS: i64 = 86_400_000;

/// A fetched page.
#[derive(Debug, Clone)]
pub struct Page {
    /// Complete JSON text, decompressed.
    pub body: Vec<u8>,
    /// The `Link` header, if present.
    pub link: Option<String>,
    /// Body bytes received over the network, before decompression.
    pub bytes: u64,
}

/// Fetches pages. Implemented for HTTP and by fakes in tests.
#[async_trait]
pub trait FetchPage: Send + Sync {
    /// Fetches one page with a single request, without retries.
    async fn fetch(&self, url: &Url) -> Result<Page, AttemptError>;
}

/// The client of one stream's source.
#[derive(Debug)]
pub struct SourceClient {
    http: reqwest::Client,
    method: Method,
    headers: HeaderMap,
    basic: Option<(String, String)>,
    /// Query parameter and API key that are added to every request.
    key: Option<(String, String)>,
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
    /// A secret file cannot be read.
    #[error(transparent)]
    Secret(#[from] common::runtime::config::ConfigError),
    /// The HTTP library failed.
    #[error("source: http client: {0}")]
    Client(String),
}

impl SourceClient {
    /// Creates the client from `[source]` of a definition and reads its secret file.
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
            method: if source.method == "POST" { Method::POST } else { Method::GET },
            headers: headers(source)?,
            basic: match &source.auth {
                Auth::Basic { user, password_file } => {
                    Some((user.clone(), read_secret(Path::new(password_file))?))
                }
                _ => None,
            },
            key: match &source.auth {
                Auth::ApiKeyInQuery { query, key_file } => {
                    Some((query.clone(), read_secret(Path::new(key_file))?))
                }
                _ => None,
            },
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
        let address = match url.host() {
            Some(Host::Ipv4(v4)) => IpAddr::V4(v4),
            Some(Host::Ipv6(v6)) => IpAddr::V6(v6),
            _ => return Ok(()),
        };
        if self.allow_private || !is_private(address) {
            return Ok(());
        }
        Err(AttemptError::fatal(PrivateAddress { host: address.to_string() }.to_string()))
    }

    /// Adds the API key to a URL. It replaces a key that the URL already contains, as in a next-page URL from the
    /// source.
    fn with_key(&self, url: &Url) -> Url {
        let mut url = url.clone();
        if let Some((parameter, key)) = &self.key {
            let encoded = |text: &str| form_urlencoded::byte_serialize(text.as_bytes()).collect::<String>();
            let is_key = |pair: &str| {
                form_urlencoded::parse(pair.as_bytes()).next().is_some_and(|(name, _)| name == *parameter)
            };
            let others = url.query().unwrap_or_default().split('&');
            let mut pairs: Vec<String> =
                others.filter(|pair| !pair.is_empty() && !is_key(pair)).map(str::to_owned).collect();
            pairs.push(format!("{}={}", encoded(parameter), encoded(key)));
            url.set_query(Some(&pairs.join("&")));
        }
        url
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

    /// Reads the body and fails as soon as it exceeds the size limit.
    async fn read(&self, mut response: Response) -> Result<Vec<u8>, AttemptError> {
        let limit = self.page_bytes;
        if response.content_length().is_some_and(|length| length > limit) {
            return Err(too_large(limit, ""));
        }
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|e| self.failed(e))? {
            if (body.len() + chunk.len()) as u64 > limit {
                return Err(too_large(limit, ""));
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body)
    }
}

#[async_trait]
impl FetchPage for SourceClient {
    async fn fetch(&self, url: &Url) -> Result<Page, AttemptError> {
        self.check_address(url)?;
        self.keep_pace().await;
        let mut request =
            self.http.request(self.method.clone(), self.with_key(url)).headers(self.headers.clone());
        if let Some((user, password)) = &self.basic {
            request = request.basic_auth(user, Some(password));
        }
        let response = request.send().await.map_err(|e| self.failed(e))?;
        let status = response.status();
        let with_status = |mut error: AttemptError| {
            error.http_status = Some(status.as_u16());
            error
        };
        if !status.is_success() {
            return Err(status_error(status, response.headers()));
        }
        let text =
            |name: HeaderName| response.headers().get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
        let (link, encoding) = (text(header::LINK), text(header::CONTENT_ENCODING));
        let body = self.read(response).await.map_err(with_status)?;
        let bytes = body.len() as u64;
        let limit = self.page_bytes;
        let unpacked = tokio::task::spawn_blocking(move || unpack(body, encoding.as_deref(), limit)).await;
        let unpacked =
            unpacked.map_err(|e| AttemptError::retryable(format!("reading the page panicked: {e}")))?;
        Ok(Page { body: unpacked.map_err(with_status)?, link, bytes })
    }
}

/// Decompresses the body and checks that the text is within the size limit and not truncated.
fn unpack(body: Vec<u8>, encoding: Option<&str>, limit: u64) -> Result<Vec<u8>, AttemptError> {
    let text = match encoding {
        None | Some("identity" | "") => body,
        Some("gzip" | "x-gzip") => {
            let mut text = Vec::new();
            let read = MultiGzDecoder::new(body.as_slice()).take(limit + 1).read_to_end(&mut text);
            read.map_err(|e| AttemptError::retryable(format!("the page is not valid gzip: {e}")))?;
            text
        }
        Some(other) => {
            return Err(AttemptError::fatal(format!(
                "the source used content-encoding `{other}`; only gzip is supported"
            )));
        }
    };
    if text.len() as u64 > limit {
        return Err(too_large(limit, " after decompression"));
    }
    scan::check(&text)
        .map_err(|e| AttemptError::retryable(format!("the page of {} bytes is {e}", text.len())))?;
    Ok(text)
}

fn too_large(limit: u64, how: &str) -> AttemptError {
    AttemptError::fatal(format!("the page is larger than {limit} bytes{how}; raise source.limits.page_bytes"))
}

/// Maps an unsuccessful response to an error that says whether a retry may succeed.
fn status_error(status: StatusCode, headers: &HeaderMap) -> AttemptError {
    let header = |name: HeaderName| headers.get(name).and_then(|v| v.to_str().ok());
    let mut error = if status.is_redirection() {
        let to = redacted(header(header::LOCATION).unwrap_or("(no location)"));
        AttemptError::fatal(format!("{status}: redirects are not followed; {to} may be the right source.url"))
    } else if status.is_server_error()
        || matches!(
            status,
            StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_EARLY
        )
    {
        AttemptError::retryable(format!("the source returned {status}"))
    } else {
        AttemptError::fatal(format!("the source returned {status}"))
    };
    error.http_status = Some(status.as_u16());
    error.retry_after_ms = header(header::RETRY_AFTER)
        .and_then(|text| retry_after_ms(text, chrono::Utc::now().timestamp_millis()));
    error
}

/// Parses `Retry-After`, in seconds or as a date, as a pause of at most [`MAX_RETRY_AFTER_MS`].
fn retry_after_ms(text: &str, now_ms: i64) -> Option<i64> {
    let ms = match text.trim().parse::<i64>() {
        Ok(seconds) => seconds.checked_mul(1000)?,
        Err(_) => chrono::DateTime::parse_from_rfc2822(text.trim()).ok()?.timestamp_millis() - now_ms,
    };
    Some(ms.clamp(0, MAX_RETRY_AFTER_MS))
}

fn headers(source: &SourceSettings) -> Result<HeaderMap, ClientError> {
    let mut headers = HeaderMap::new();
    headers.insert(header::ACCEPT, HeaderValue::from_static("application/json"));
    headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("gzip"));
    let mut add = |name: &str, value: String, secret: bool| {
        let wrong = || ClientError::Header(name.to_owned());
        let key = HeaderName::from_bytes(name.as_bytes()).map_err(|_| wrong())?;
        let mut value = HeaderValue::from_str(&value).map_err(|_| wrong())?;
        value.set_sensitive(secret);
        headers.insert(key, value);
        Ok::<(), ClientError>(())
    };
    for (name, value) in &source.headers {
        add(name, value.clone(), false)?;
    }
    match &source.auth {
        // The library encodes user and password for basic authentication.
        Auth::None | Auth::Basic { .. } | Auth::ApiKeyInQuery { .. } => {}
        Auth::Bearer { token_file } => {
            add("authorization", format!("Bearer {}", read_secret(Path::new(token_file))?), true)?;
        }
        Auth::ApiKey { header, key_file } => add(header, read_secret(Path::new(key_file))?, true)?,
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

#[derive(Debug, thiserror::Error)]
#[error("{host} is a private address; set source.allow_private = true to allow it")]
struct PrivateAddress {
    host: String,
}

/// Resolves names to public addresses only. Checking each resolution also covers names whose address changes (DNS
/// rebinding).
#[derive(Debug)]
struct PublicResolver;

impl Resolve for PublicResolver {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let host = name.as_str().to_owned();
            let found: Vec<SocketAddr> = tokio::net::lookup_host((host.as_str(), 0)).await?.collect();
            if found.iter().any(|address| is_private(address.ip())) {
                return Err(PrivateAddress { host }.into());
            }
            Ok(Box::new(found.into_iter()) as Addrs)
        })
    }
}

/// Whether an address is not publicly routable, such as private, local and reserved addresses.
fn is_private(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => is_private_v4(v4),
        IpAddr::V6(v6) => is_private_v6(v6),
    }
}

fn is_private_v4(a: Ipv4Addr) -> bool {
    let [first, second, third, _] = a.octets();
    a.is_private()
        || a.is_loopback()
        || a.is_link_local()
        || a.is_multicast()
        || a.is_documentation()
        || first == 0
        || first >= 240
        // Carrier-grade NAT (RFC 6598), protocol assignments (RFC 6890), benchmarks (RFC 2544).
        || (first == 100 && (64..128).contains(&second))
        || (first == 192 && second == 0 && third == 0)
        || (first == 198 && (18..20).contains(&second))
}

fn is_private_v6(a: Ipv6Addr) -> bool {
    let s = a.segments();
    let v4 = |high: u16, low: u16| Ipv4Addr::from((u32::from(high) << 16) | u32::from(low));
    a.is_loopback()
        || a.is_unspecified()
        || a.is_multicast()
        || a.is_unique_local()
        || a.is_unicast_link_local()
        // Site-local (RFC 3879), discard (RFC 6666), documentation (RFC 3849, RFC 9637), segment routing (RFC 9602).
        || (s[0] & 0xffc0 == 0xfec0)
        || s[..4] == [0x100, 0, 0, 0]
        || s[..2] == [0x2001, 0xdb8]
        || (s[0] == 0x3fff && s[1] < 0x1000)
        || s[0] == 0x5f00
        // Protocol assignments (RFC 2928), including Teredo, which reaches hosts behind a NAT.
        || (s[0] == 0x2001 && s[1] < 0x200)
        // Local NAT64 (RFC 8215), whose targets depend on the local network.
        || s[..3] == [0x64, 0xff9b, 1]
        // Embedded IPv4 addresses: mapped, compatible (RFC 4291), translated (RFC 2765), NAT64 (RFC 6052), 6to4 (RFC
        // 3056).
        || a.to_ipv4_mapped().is_some_and(is_private_v4)
        || (s[..6] == [0; 6] && is_private_v4(v4(s[6], s[7])))
        || (s[..6] == [0, 0, 0, 0, 0xffff, 0] && is_private_v4(v4(s[6], s[7])))
        || (s[..6] == [0x64, 0xff9b, 0, 0, 0, 0] && is_private_v4(v4(s[6], s[7])))
        || (s[0] == 0x2002 && is_private_v4(v4(s[1], s[2])))
}

#[cfg(test)]
#[path = "client_tests.rs"]
mod tests;
