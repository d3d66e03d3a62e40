//! The stream definition: a TOML file that describes the source of the events, their columns, their storage and their
//! windows. This module contains the types. `stream/parse.rs` parses the file, and `stream/rules.rs` checks the rules
//! that involve several keys. Pure.

mod column;
mod duration;
mod event;
pub mod layout;
mod parse;
mod rules;
mod secrets;
mod source;
pub mod template;

use crate::contracts::event::{Bucket, DAY_MS, DEFAULT_AHEAD_MS};
use crate::contracts::topics::TOPIC_RETENTION_MS;
use chrono_tz::Tz;
pub use column::{Column, CqlType, OnMisfit};
pub use event::{ContentMode, EventMapping, EventTime};
pub use rules::is_reserved_column;
pub use secrets::{looks_secret, redacted};
use serde::{Deserialize, Serialize};
pub use source::{
    Auth, BodyFormat, Flag, ForEach, Limits, Listing, OffsetStep, PageOrder, Pagination, Place, RecordShape,
    Secret, SourceSettings, Statuses, TokenRequest,
};

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
    /// How long after its end an interval is fetched, in milliseconds. Many sources index a record some time after its
    /// event time.
    pub delay_ms: i64,
    /// How many times an interval is fetched again: each time that one of so many following intervals is fetched.
    pub lookback: u32,
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

/// How time is divided into half-open intervals.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Fixed length in milliseconds, aligned to the Unix epoch. From 1 s to 31 d.
    Every(i64),
    /// A cron expression. An interval lasts from one occurrence to the next.
    Cron {
        /// Five fields: minute, hour, day of the month, month, day of the week.
        expression: String,
        /// Time zone of the fields. A day in it can have 23 or 25 hours.
        zone: Tz,
    },
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
}

/// `[windows]`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Windows {
    /// Pane length in milliseconds. Divides the bucket length.
    pub pane_ms: i64,
    /// Allowed lateness in milliseconds: an event further behind the watermark of its partition counts as late.
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

    /// Age in milliseconds beyond which an event is refused, because a row of a copy that can still be read may have
    /// expired. A row of an event ahead of time is written, and expires, that much earlier. `None` if no row expires.
    pub fn horizon_ms(&self) -> Option<i64> {
        let ttl_ms = self.store.least_ttl_seconds().saturating_mul(1000);
        let earlier_ms = self.event.ahead_ms - DEFAULT_AHEAD_MS;
        (ttl_ms > 0).then(|| ttl_ms - TOPIC_RETENTION_MS - TTL_MARGIN_MS - earlier_ms)
    }

    /// Most rows of one pane: one for all events, and one per group of each group-by column.
    pub fn pane_rows(&self) -> usize {
        1 + self.windows.group_by.iter().map(GroupBy::len).sum::<usize>()
    }
}
