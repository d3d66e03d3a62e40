//! `[source]`: which requests fetch an interval, how they are authenticated, and where a response contains records.

use chrono_tz::Tz;
use serde::Serialize;

/// Most values of a `for_each`, listed in the definition or returned by its listing.
pub const MAX_FOR_EACH: u32 = 10_000;

/// `[source]`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SourceSettings {
    /// URL template. `template.rs` lists the placeholders.
    pub url: String,
    /// Query parameters that are added to the URL: names and templates.
    pub query: Vec<(String, String)>,
    /// `GET` or `POST`.
    pub method: String,
    /// JSON body of a request. Its strings may contain placeholders.
    pub body: Option<serde_json::Value>,
    /// Request headers: names and values.
    pub headers: Vec<(String, String)>,
    /// Time zone in which `{interval.start:FORMAT}` writes times.
    pub zone: Tz,
    /// How requests are authenticated.
    pub auth: Auth,
    /// The values for which the requests of an interval are repeated. `None` to send them once.
    pub for_each: Option<ForEach>,
    /// How the pages of an interval follow one another, and where they end.
    pub pagination: Pagination,
    /// Path of the records in a page: a JSON pointer in which the token `*` stands for every element or member.
    pub records: String,
    /// How the records are arranged at `records`.
    pub shape: RecordShape,
    /// Format of a response.
    pub format: BodyFormat,
    /// Signs of an error in a response with a successful status. One that is set fails the attempt.
    pub error: Vec<Flag>,
    /// Least records of an interval. An interval with fewer records fails and is retried.
    pub min_records: u32,
    /// Statuses with a meaning of their own.
    pub statuses: Statuses,
    /// Response header that says when the rate limit ends, in addition to the usual ones.
    pub reset_header: Option<String>,
    /// Records per page, the value of the placeholder `{page_size}`. `None` if the definition does not set it.
    pub page_size: Option<u32>,
    /// Whether the source may have a private or loopback address.
    pub allow_private: bool,
    /// Limits of one run.
    pub limits: Limits,
    /// Most requests per second. `None` for no limit.
    pub requests_per_second: Option<f64>,
}

/// How the records are arranged at `source.records`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RecordShape {
    /// An array of records, or an object that is the only record.
    Rows,
    /// An object with one array per field. The nth elements of all arrays form the nth record.
    Columnar,
}

/// Format of a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum BodyFormat {
    /// By `Content-Type`: NDJSON, CSV, or JSON for every other type.
    Auto,
    /// One JSON value.
    Json,
    /// One JSON value per line. Each is a record.
    Ndjson,
    /// Comma-separated values with a header line. Each record is an object of strings.
    Csv {
        /// The character between two fields.
        delimiter: u8,
    },
}

/// A secret that is read when it is needed and never part of the definition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Secret {
    /// The content of a file without trailing line breaks.
    File(String),
    /// The value of an environment variable.
    Env(String),
}

/// `[source.auth]`.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Auth {
    /// No credentials.
    None,
    /// `Authorization: Bearer <token>`.
    Bearer {
        /// The token.
        token: Secret,
    },
    /// HTTP basic authentication.
    Basic {
        /// User name.
        user: String,
        /// The password.
        password: Secret,
    },
    /// A key in a header.
    ApiKey {
        /// Header name.
        header: String,
        /// The key.
        key: Secret,
    },
    /// A key in a query parameter.
    ApiKeyInQuery {
        /// Parameter name.
        query: String,
        /// The key.
        key: Secret,
    },
    /// `Authorization: Bearer <token>` with a token that another request returns.
    Token(TokenRequest),
}

/// The request for an access token: OAuth 2.0 client credentials (RFC 6749, section 4.4) or a login of the API.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TokenRequest {
    /// URL of the request, which is a POST.
    pub url: String,
    /// Fields of the body.
    pub fields: Vec<(String, String)>,
    /// Fields whose values are secrets.
    pub secrets: Vec<(String, Secret)>,
    /// Whether the body is JSON. Otherwise it is form-encoded, as OAuth requires.
    pub json: bool,
    /// JSON pointer to the token in the response.
    pub token: String,
    /// Header that carries the token; `Authorization` with the prefix `Bearer ` by default.
    pub header: Option<String>,
}

/// Where a value of a response is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// JSON pointer into the body.
    Pointer(String),
    /// Name of a response header.
    Header(String),
}

/// A condition on a value of a response. A value is set unless it is absent, `null`, `false`, `0` or empty.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Flag {
    /// The value.
    pub place: Place,
    /// Whether the condition holds if the value is *not* set.
    pub negated: bool,
}

/// How the pages of an interval follow one another, and where they end.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Pagination {
    /// How the next page is found.
    pub order: PageOrder,
    /// Most pages to read. Reading ends there without an error.
    pub pages: Option<u32>,
    /// Whether more pages follow a page. Absent values end the pages.
    pub more: Option<Flag>,
    /// Number of records of the interval.
    pub total: Option<Place>,
    /// Number of pages of the interval.
    pub total_pages: Option<Place>,
    /// Whether a page with fewer than `page_size` records is the last one.
    pub short_page_ends: bool,
}

/// How the next page of an interval is found.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PageOrder {
    /// One request per interval.
    None,
    /// `{page}` counts up. Ends at a page without records.
    Page {
        /// Number of the first page.
        first: u64,
        /// Difference between two page numbers.
        step: u64,
    },
    /// `{offset}` counts up. Ends at a page without records.
    Offset {
        /// Offset of the first record.
        first: u64,
        /// By how much `{offset}` grows with each page.
        step: OffsetStep,
    },
    /// `{cursor}` is a cursor from the previous page. Ends if it is absent, null or empty.
    Cursor {
        /// The cursor in the previous page.
        next: Place,
        /// Whether the cursor is percent-encoded already.
        encoded: bool,
    },
    /// `{cursor}` is a value of the last record in the previous page. Ends at a page without records.
    LastRecord {
        /// JSON pointer into the last record.
        pointer: String,
    },
    /// The next URL is in the RFC 8288 header `Link: <…>; rel="next"`.
    LinkHeader,
    /// The next URL is in the page. Ends if it is absent, null or empty.
    NextUrl {
        /// The URL in the page.
        next: Place,
    },
}

/// By how much `{offset}` grows with each page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum OffsetStep {
    /// By the number of records in the page.
    Records,
    /// By `page_size`, for servers that filter records after paging.
    PageSize,
}

/// The values for which the requests of an interval are repeated.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ForEach {
    /// Values in the definition.
    Values {
        /// Name of the placeholder `{each.NAME}`.
        name: String,
        /// The values, each as JSON.
        values: Vec<serde_json::Value>,
    },
    /// Values from a listing of the same API, read at the start of every run.
    Listing(Box<Listing>),
}

/// A listing that provides the values of a `for_each`, such as the repositories of an organization.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Listing {
    /// URL template.
    pub url: String,
    /// Query parameters: names and templates.
    pub query: Vec<(String, String)>,
    /// Path of the records in a page.
    pub records: String,
    /// How the pages of the listing follow one another.
    pub pagination: Pagination,
    /// Names of placeholders and their JSON pointers into a record of the listing.
    pub fields: Vec<(String, String)>,
    /// Most records of the listing. More fail the attempt.
    pub limit: u32,
}

impl ForEach {
    /// The names of the placeholders `{each.NAME}`.
    pub fn names(&self) -> Vec<&str> {
        match self {
            ForEach::Values { name, .. } => vec![name],
            ForEach::Listing(listing) => listing.fields.iter().map(|(name, _)| name.as_str()).collect(),
        }
    }
}

/// Statuses with a meaning of their own. All others keep their usual meaning.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Statuses {
    /// The attempt fails and is retried soon.
    pub retry: Vec<u16>,
    /// The attempt fails, and only a slow retry follows.
    pub fail: Vec<u16>,
    /// The interval has no (further) records.
    pub empty: Vec<u16>,
    /// The previous page was the last one. As the response to the first request it is an error.
    pub end: Vec<u16>,
}

/// `[source.limits]`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Limits {
    /// Most bytes of one page, both before and after decompression.
    pub page_bytes: u64,
    /// Most pages of one interval.
    pub pages: u32,
    /// Most records of one interval.
    pub records: u32,
    /// Timeout for connecting, in milliseconds.
    pub connect_timeout_ms: i64,
    /// Timeout for a whole request, in milliseconds.
    pub request_timeout_ms: i64,
}
