//! The stream definition: a TOML file that describes the source of the events, their columns, their storage and their
//! windows. This module contains the types. `stream/parse.rs` parses the file, and `stream/rules.rs` checks the rules
//! that involve several keys. Pure.

mod duration;
pub mod layout;
mod parse;
mod rules;
mod secrets;

use crate::contracts::event::{Bucket, DAY_MS};
use crate::contracts::topics::TOPIC_RETENTION_MS;
pub use secrets::redacted;
use serde::{Deserialize, Serialize};

/// Most group-by columns of a stream. Each one adds rows to every pane.
pub const MAX_GROUP_BY: usize = 4;
/// Most groups of a group-by column. All other values count towards [`OTHER`].
pub const MAX_GROUPS: usize = 256;
/// The group of all values without a group of their own.
pub const OTHER: &str = "(other)";
/// Most intervals that a producer catches up. It plans them in memory.
pub const MAX_CATCH_UP_INTERVALS: i64 = 50_000;
/// Rows must outlive the log by at least this time (two days), so that every duplicate that can still be read is
/// recognized.
pub const TTL_MARGIN_MS: i64 = 2 * DAY_MS;
/// The dimension that counts all events of a pane.
pub const ALL: &str = "";

/// A stream definition that has passed every check.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Definition {
    /// Name, schedule and retry policy.
    pub stream: StreamSettings,
    /// The REST API to fetch from.
    pub source: SourceSettings,
    /// How a source record is mapped to an event.
    pub event: EventMapping,
    /// The declared columns, in the order of the file.
    pub columns: Vec<Column>,
    /// Layout of the rows in Cassandra.
    pub store: StoreSettings,
    /// Panes, allowed lateness, group-by columns and measures.
    pub windows: Windows,
}

/// `[stream]`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StreamSettings {
    /// Name of the stream, and of its event table and by default its topic: `[a-z][a-z0-9_]{0,39}`.
    pub name: String,
    /// How time is divided into intervals.
    pub schedule: Schedule,
    /// Earliest start of the first interval in Unix milliseconds. Defaults to `catch_up` intervals before the first
    /// planning.
    pub start_ms: Option<i64>,
    /// Number of intervals before the first planning that a new stream fetches.
    pub catch_up: u32,
    /// Missing and failed intervals up to this age in milliseconds are fetched automatically. The last `catch_up`
    /// intervals always are. Older intervals need an operator.
    pub catch_up_limit_ms: i64,
    /// Most concurrent runs.
    pub max_active_runs: u32,
    /// How failed fetches are retried.
    pub retry: RetryPolicy,
}

/// How time is divided into half-open UTC intervals.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Fixed length in milliseconds, aligned to the Unix epoch. From 1 s to 31 d.
    Every(i64),
    /// A five-field cron expression in UTC. An interval lasts from one occurrence to the next.
    Cron(String),
}

/// `[stream] retry`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RetryPolicy {
    /// Attempts after which the run is marked failed. `None` if only `deadline_ms` limits them.
    pub attempts: Option<u32>,
    /// Initial backoff in milliseconds. It doubles with each attempt, with jitter.
    pub backoff_ms: i64,
    /// Longest backoff in milliseconds until the run is marked failed.
    pub max_backoff_ms: i64,
    /// A failed attempt marks the run failed once this time, in milliseconds, has passed since the first attempt.
    pub deadline_ms: i64,
    /// Longest backoff in milliseconds between further attempts of a failed run.
    pub failed_backoff_ms: i64,
    /// Timeout of one attempt in milliseconds.
    pub attempt_timeout_ms: i64,
}

/// `[source]`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SourceSettings {
    /// URL with placeholders: `{interval.start}`, `{interval.end}` (RFC 3339), `{interval.start_unix}`,
    /// `{interval.end_unix}` (seconds), `{interval.seed}`, `{page}`, `{page_size}`, `{offset}`, `{cursor}`.
    pub url: String,
    /// `GET` or `POST`.
    pub method: String,
    /// Request headers, in the order of the file.
    pub headers: Vec<(String, String)>,
    /// How requests are authenticated.
    pub auth: Auth,
    /// How the next page is found.
    pub pagination: Pagination,
    /// JSON pointer to the array of records in a page.
    pub records: String,
    /// Records per page, the value of the placeholder `{page_size}`.
    pub page_size: u32,
    /// Whether the source may have a private or loopback address.
    pub allow_private: bool,
    /// Limits of one run.
    pub limits: Limits,
    /// Most requests per second. `None` for no limit.
    pub requests_per_second: Option<f64>,
}

/// `[source.auth]`. Secrets are always read from files.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Auth {
    /// No credentials.
    None,
    /// `Authorization: Bearer <token>`.
    Bearer {
        /// File with the token.
        token_file: String,
    },
    /// HTTP basic authentication.
    Basic {
        /// User name.
        user: String,
        /// File with the password.
        password_file: String,
    },
    /// A key in a header.
    ApiKey {
        /// Header name.
        header: String,
        /// File with the key.
        key_file: String,
    },
    /// A key in a query parameter.
    ApiKeyInQuery {
        /// Parameter name.
        query: String,
        /// File with the key.
        key_file: String,
    },
}

/// How the next page of an interval is found.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Pagination {
    /// One request per interval.
    None,
    /// `{page}` counts up from `first` until a page has fewer than `page_size` records or `pages` pages are read.
    Page {
        /// Number of the first page.
        first: u32,
        /// Pages to read. `None` to read until a page has fewer than `page_size` records.
        pages: Option<u32>,
    },
    /// `{offset}` is the number of records read so far. Ends at a page with fewer than `page_size` records.
    Offset,
    /// `{cursor}` is the cursor in the previous page. Ends if it is absent, null or empty.
    Cursor {
        /// JSON pointer to the next cursor.
        pointer: String,
    },
    /// `{cursor}` is a value of the last record in the previous page. Ends at a page without records.
    LastRecord {
        /// JSON pointer into the last record.
        pointer: String,
        /// JSON pointer to a boolean in the page that is `true` if more pages follow. `None` to read until a page
        /// without records.
        more: Option<String>,
    },
    /// The next URL is in the RFC 8288 header `Link: <…>; rel="next"`.
    LinkHeader,
    /// The next URL is in the page. Ends if it is absent or null.
    NextUrl {
        /// JSON pointer to the next URL.
        pointer: String,
    },
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

/// `[event]`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct EventMapping {
    /// JSON pointer to the id in the source record. `None` to derive the id from stream, interval start and index.
    pub id: Option<String>,
    /// Origin of the event time.
    pub time: EventTime,
    /// CloudEvents type.
    pub event_type: String,
    /// JSON pointer to the Kafka key. `None` to use the event id. Records with equal ids must have equal keys.
    pub key: Option<String>,
}

/// Origin of the event time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventTime {
    /// Derived from stream, interval and id: a point within the interval.
    Interval,
    /// JSON pointer to an RFC 3339 string or a number of Unix milliseconds.
    Pointer(String),
    /// JSON pointer to an RFC 3339 string or a number of Unix seconds.
    Seconds(String),
}

/// One `[[column]]`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Column {
    /// Name of the column, and its key in the flat JSON value of the Kafka record.
    pub name: String,
    /// CQL type.
    pub cql_type: CqlType,
    /// JSON pointer into the source record.
    pub pointer: String,
    /// Whether a record without a value becomes a dead letter.
    pub required: bool,
}

/// The CQL types a column can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CqlType {
    /// UTF-8 text. Accepts JSON strings, numbers and booleans.
    Text,
    /// 32-bit signed integer.
    Int,
    /// 64-bit signed integer.
    Bigint,
    /// 64-bit IEEE 754 float.
    Double,
    /// `true` or `false`.
    Boolean,
    /// Milliseconds since the epoch. Accepts RFC 3339 strings and numbers of Unix milliseconds.
    Timestamp,
    /// UUID. Accepts the RFC 4122 text form.
    Uuid,
}

impl CqlType {
    /// All variants.
    pub const ALL: [CqlType; 7] = [
        CqlType::Text,
        CqlType::Int,
        CqlType::Bigint,
        CqlType::Double,
        CqlType::Boolean,
        CqlType::Timestamp,
        CqlType::Uuid,
    ];

    /// The CQL name.
    pub fn name(self) -> &'static str {
        match self {
            CqlType::Text => "text",
            CqlType::Int => "int",
            CqlType::Bigint => "bigint",
            CqlType::Double => "double",
            CqlType::Boolean => "boolean",
            CqlType::Timestamp => "timestamp",
            CqlType::Uuid => "uuid",
        }
    }

    /// Whether a column of this type can be a measure.
    pub fn is_numeric(self) -> bool {
        matches!(self, CqlType::Int | CqlType::Bigint | CqlType::Double)
    }
}

/// `[store]`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StoreSettings {
    /// Time span of one Cassandra partition.
    pub bucket: Bucket,
    /// Cassandra partitions per bucket and Kafka partition.
    pub shards: u32,
    /// TTL of rows. 0 if rows do not expire.
    pub ttl_seconds: i64,
    /// The shortest TTL that the stream ever had, from its registration. `None` if the definition was not completed
    /// with the registration.
    #[serde(skip)]
    pub shortest_ttl_seconds: Option<i64>,
}

impl StoreSettings {
    /// The shortest TTL of all rows, including rows written before the TTL was raised. 0 if no row expires.
    pub fn least_ttl_seconds(&self) -> i64 {
        self.shortest_ttl_seconds.unwrap_or(self.ttl_seconds)
    }

    /// Age in milliseconds beyond which an event is refused, because a row of a copy that can still be read may have
    /// expired. `None` if no row expires.
    pub fn horizon_ms(&self) -> Option<i64> {
        let ttl_ms = self.least_ttl_seconds().saturating_mul(1000);
        (ttl_ms > 0).then(|| ttl_ms - TOPIC_RETENTION_MS - TTL_MARGIN_MS)
    }
}

/// `[windows]`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Windows {
    /// Pane length in milliseconds. Divides the bucket length.
    pub pane_ms: i64,
    /// Allowed lateness in milliseconds: an event further behind the highest event time of its partition counts as
    /// late.
    pub lateness_ms: i64,
    /// Group-by columns, at most [`MAX_GROUP_BY`].
    pub group_by: Vec<GroupBy>,
    /// Numeric columns whose count, sum, minimum and maximum are stored per pane.
    pub measures: Vec<String>,
}

/// One group-by column and its groups.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GroupBy {
    /// Name of the column.
    pub column: String,
    /// How its values are assigned to groups.
    pub groups: Groups,
}

/// The groups of a column. The group of an event depends only on the value of the column.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Groups {
    /// One group per listed value, at most [`MAX_GROUPS`].
    Values(Vec<String>),
    /// `[from + i·step, from + (i+1)·step)` for `i` below `count`. The name of a group is its lower bound.
    Step {
        /// Lower bound of the first group.
        from: f64,
        /// Width of a group.
        step: f64,
        /// Number of groups, at most [`MAX_GROUPS`].
        count: u16,
    },
}

impl GroupBy {
    /// Number of groups, including [`OTHER`], which is the last one.
    pub fn len(&self) -> usize {
        match &self.groups {
            Groups::Values(values) => values.len() + 1,
            Groups::Step { count, .. } => usize::from(*count) + 1,
        }
    }

    /// Always `false`, because every column has the group [`OTHER`].
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The name of group `index` as stored in the pane table. An index past the last group yields [`OTHER`].
    pub fn label(&self, index: usize) -> String {
        match &self.groups {
            Groups::Values(values) => values.get(index).cloned().unwrap_or_else(|| OTHER.to_owned()),
            Groups::Step { from, step, count } if index < usize::from(*count) => {
                format!("{}", from + step * index as f64)
            }
            Groups::Step { .. } => OTHER.to_owned(),
        }
    }
}

/// All mistakes in a stream file, one per line.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("stream file {file}: {} mistake(s)\n{}", problems.len(), problems.iter().map(|p| format!("  - {p}")).collect::<Vec<_>>().join("\n"))]
pub struct DefinitionError {
    /// Name of the file as given.
    pub file: String,
    /// Each problem names the key, the value and a remedy.
    pub problems: Vec<String>,
}

impl Definition {
    /// Index of a declared column in `columns`.
    pub fn column_index(&self, name: &str) -> Option<usize> {
        self.columns.iter().position(|c| c.name == name)
    }

    /// Most rows of one pane: one for all events, and one per group of each group-by column.
    pub fn pane_rows(&self) -> usize {
        1 + self.windows.group_by.iter().map(GroupBy::len).sum::<usize>()
    }
}
