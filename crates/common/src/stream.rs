//! The stream definition: one TOML file that says where events come from, which columns they have, how they are stored
//! and windowed. Types and what follows from them; reading and checking the file is `stream/parse.rs`, the rules that
//! span several keys are `stream/rules.rs`. Nothing here does I/O.

pub mod layout;
mod parse;
mod rules;
mod secrets;

use crate::event::Bucket;
use layout::Layout;
pub use secrets::redacted;
use serde::{Deserialize, Serialize};

/// Most group-by columns a stream may have: each adds rows to every pane.
pub const MAX_GROUP_BY: usize = 4;
/// Most groups one group-by column may have; every other value counts as [`OTHER`].
pub const MAX_GROUPS: usize = 256;
/// The group of all values that are not listed.
pub const OTHER: &str = "(other)";
/// Most intervals that a producer catches up: it plans them in memory.
pub const MAX_CATCH_UP_INTERVALS: i64 = 50_000;
/// The dimension that counts every event of a pane.
pub const ALL: &str = "";

/// A stream definition that has passed every check.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Definition {
    /// Name, schedule and retry policy.
    pub stream: StreamSettings,
    /// The REST API.
    pub source: Source,
    /// How a record becomes an event.
    pub event: EventMapping,
    /// The declared columns, in the file's order.
    pub columns: Vec<Column>,
    /// How rows are laid out in Cassandra.
    pub store: Store,
    /// Panes, lateness, groups and measures.
    pub windows: Windows,
}

/// `[stream]`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StreamSettings {
    /// Also the name of the topic and of the event table: `[a-z][a-z0-9_]{0,39}`.
    pub name: String,
    /// When intervals begin and end.
    pub schedule: Schedule,
    /// First interval's earliest start in Unix milliseconds; `None`: `catch_up` intervals before the first planning.
    pub start_ms: Option<i64>,
    /// How many intervals before its first planning a new stream begins.
    pub catch_up: u32,
    /// Age in milliseconds up to which intervals that are missing or failed are fetched by themselves, but always the last
    /// `catch_up` intervals; older ones are left to a person.
    pub catch_up_limit_ms: i64,
    /// How many intervals may be fetched at once.
    pub max_active_runs: u32,
    /// What happens when a fetch fails.
    pub retry: RetryPolicy,
}

/// How time is tiled into half-open UTC intervals.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Fixed length in milliseconds, aligned to the Unix epoch; 1 s to 31 d.
    Every(i64),
    /// A five-field cron expression in UTC; an interval reaches from one occurrence to the next.
    Cron(String),
}

/// `[stream] retry`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RetryPolicy {
    /// Attempts before the interval is failed; `None`: only `deadline_ms` limits them.
    pub attempts: Option<u32>,
    /// First pause in milliseconds; doubles with jitter.
    pub backoff_ms: i64,
    /// Longest pause in milliseconds before the interval is failed.
    pub max_backoff_ms: i64,
    /// Time from the first attempt, in milliseconds, after which a failed attempt fails the interval.
    pub deadline_ms: i64,
    /// Longest pause in milliseconds between the attempts that a failed interval still gets.
    pub failed_backoff_ms: i64,
    /// Longest time of one attempt in milliseconds.
    pub attempt_timeout_ms: i64,
}

/// `[source]`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Source {
    /// URL with placeholders: `{interval.start}`, `{interval.end}` (RFC 3339), `{interval.start_unix}`, `{interval.end_unix}`
    /// (seconds), `{interval.seed}`, `{page}`, `{page_size}`, `{offset}`, `{cursor}`.
    pub url: String,
    /// `GET` or `POST`.
    pub method: String,
    /// Request headers, in the file's order.
    pub headers: Vec<(String, String)>,
    /// How requests identify themselves.
    pub auth: Auth,
    /// How the next page is found.
    pub pagination: Pagination,
    /// JSON pointer to the array of records in a page.
    pub records: String,
    /// Records asked for per page (placeholder `{page_size}`).
    pub page_size: u32,
    /// Whether private and loopback addresses may be fetched.
    pub allow_private: bool,
    /// Bounds of one interval.
    pub limits: Limits,
    /// Requests per second at most; `None`: no limit.
    pub requests_per_second: Option<f64>,
}

/// `[source.auth]`; secrets come from files only.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Auth {
    /// No credentials.
    None,
    /// `Authorization: Bearer <token>`.
    Bearer {
        /// File that holds the token.
        token_file: String,
    },
    /// HTTP basic authentication.
    Basic {
        /// User name.
        user: String,
        /// File that holds the password.
        password_file: String,
    },
    /// A key in a header.
    ApiKey {
        /// Header name.
        header: String,
        /// File that holds the key.
        key_file: String,
    },
    /// A key in the query of every request.
    ApiKeyInQuery {
        /// Parameter name.
        query: String,
        /// File that holds the key.
        key_file: String,
    },
}

/// How the next page of an interval is found.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Pagination {
    /// One request an interval.
    None,
    /// `{page}` counts up from `first` until a page has fewer than `page_size` records or `pages` are read.
    Page {
        /// First page's number.
        first: u32,
        /// Pages to read; `None`: until a short page.
        pages: Option<u32>,
    },
    /// `{offset}` counts records up from 0 until a short page.
    Offset,
    /// The answer names the next cursor; absent, null or empty ends the interval.
    Cursor {
        /// JSON pointer to the next cursor.
        pointer: String,
    },
    /// `{cursor}` is taken from the page's last record; a page without records ends the interval.
    LastRecord {
        /// JSON pointer into the last record.
        pointer: String,
        /// JSON pointer to `true` or `false` in the page: whether there is more; `None`: until a page without records.
        more: Option<String>,
    },
    /// RFC 8288 `Link: <…>; rel="next"`.
    LinkHeader,
    /// The answer holds the next URL; absent or null ends the interval.
    NextUrl {
        /// JSON pointer to the next URL.
        pointer: String,
    },
}

/// `[source.limits]`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Limits {
    /// Bytes of one page, before and after decompression.
    pub page_bytes: u64,
    /// Pages of one interval.
    pub pages: u32,
    /// Records of one interval.
    pub records: u32,
    /// Milliseconds to connect.
    pub connect_timeout_ms: i64,
    /// Milliseconds for one whole request.
    pub request_timeout_ms: i64,
}

/// `[event]`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct EventMapping {
    /// JSON pointer to the source's own id; `None`: a UUID v5 of (stream, interval start, index).
    pub id: Option<String>,
    /// Where event time comes from.
    pub time: EventTime,
    /// CloudEvents type.
    pub event_type: String,
    /// JSON pointer to the Kafka key; `None`: the event id. Equal ids must carry equal keys.
    pub key: Option<String>,
}

/// Where event time comes from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventTime {
    /// Spread evenly over the interval, in the order of the records.
    Interval,
    /// JSON pointer to an RFC 3339 text or to Unix milliseconds.
    Pointer(String),
    /// JSON pointer to an RFC 3339 text or to Unix seconds.
    Seconds(String),
}

/// One `[[column]]`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Column {
    /// Column name, and key in the flat JSON value in Kafka.
    pub name: String,
    /// CQL type.
    pub cql_type: CqlType,
    /// JSON pointer into the source's record.
    pub pointer: String,
    /// An event without it is a dead letter.
    pub required: bool,
}

/// The CQL types a column can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CqlType {
    /// UTF-8; takes JSON strings, numbers and booleans.
    Text,
    /// 32 bit.
    Int,
    /// 64 bit.
    Bigint,
    /// IEEE 754, 64 bit.
    Double,
    /// true or false.
    Boolean,
    /// Milliseconds; takes RFC 3339 text or Unix milliseconds.
    Timestamp,
    /// RFC 4122 text.
    Uuid,
}

impl CqlType {
    /// All of them, for messages and parsing.
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

    /// Whether it can be measured.
    pub fn is_numeric(self) -> bool {
        matches!(self, CqlType::Int | CqlType::Bigint | CqlType::Double)
    }
}

/// `[store]`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Store {
    /// Time span of one Cassandra partition.
    pub bucket: Bucket,
    /// Cassandra partitions per bucket and Kafka partition.
    pub shards: u32,
    /// Seconds rows live; 0: forever.
    pub ttl_seconds: i64,
    /// Shortest time that rows of this stream have ever lived, as registered; `None`: not longer registered than the file says.
    #[serde(skip)]
    pub shortest_ttl_seconds: Option<i64>,
}

impl Store {
    /// Seconds that every row of the stream lives at least, also those that were written before the TTL was raised; 0: forever.
    pub fn least_ttl_seconds(&self) -> i64 {
        self.shortest_ttl_seconds.unwrap_or(self.ttl_seconds)
    }
}

/// `[windows]`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Windows {
    /// Pane length in milliseconds; divides the bucket.
    pub pane_ms: i64,
    /// How far behind the highest event time an event is still on time, in milliseconds.
    pub lateness_ms: i64,
    /// Group-by columns, at most [`MAX_GROUP_BY`].
    pub group_by: Vec<GroupBy>,
    /// Numeric columns whose sum, minimum and maximum are kept.
    pub measures: Vec<String>,
}

/// One group-by column and its groups.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GroupBy {
    /// Column name.
    pub column: String,
    /// Its groups.
    pub groups: Groups,
}

/// The groups of a column: decided by the record alone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Groups {
    /// Listed values, at most [`MAX_GROUPS`].
    Values(Vec<String>),
    /// `[from + i·step, from + (i+1)·step)` for `i` below `count`; named by their lower end.
    Step {
        /// Lower end of the first group.
        from: f64,
        /// Width of a group.
        step: f64,
        /// Number of groups, at most [`MAX_GROUPS`].
        count: u16,
    },
}

impl GroupBy {
    /// Number of groups with [`OTHER`], which is the last.
    pub fn len(&self) -> usize {
        match &self.groups {
            Groups::Values(values) => values.len() + 1,
            Groups::Step { count, .. } => usize::from(*count) + 1,
        }
    }

    /// Never: [`OTHER`] is always there.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The name of group `index`, as stored in the pane table.
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

/// Everything wrong with a stream file, one line each.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("stream file {file}: {} mistake(s)\n{}", problems.len(), problems.iter().map(|p| format!("  - {p}")).collect::<Vec<_>>().join("\n"))]
pub struct DefinitionError {
    /// The file's name as given.
    pub file: String,
    /// Each names its key, the value and the way out.
    pub problems: Vec<String>,
}

impl Definition {
    /// Reads a definition from the text of `file` (the name only serves messages), reporting all mistakes at once.
    pub fn parse(file: &str, text: &str) -> Result<Definition, DefinitionError> {
        parse::parse(text).map_err(|problems| DefinitionError { file: file.to_owned(), problems })
    }

    /// Position of a declared column.
    pub fn column_index(&self, name: &str) -> Option<usize> {
        self.columns.iter().position(|c| c.name == name)
    }

    /// Rows of one pane: one for all events, and one per group of each group-by column.
    pub fn pane_rows(&self) -> usize {
        1 + self.windows.group_by.iter().map(GroupBy::len).sum::<usize>()
    }

    /// What stored data depends on.
    pub fn layout(&self) -> Layout {
        Layout::of(self)
    }
}
