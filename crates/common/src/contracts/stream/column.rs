//! `[[column]]`: a declared column, its CQL type and how its values are read.

use crate::contracts::time::TimeReading;
use serde::{Deserialize, Serialize};

/// One `[[column]]`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Column {
    /// Name of the column, and its key in the flat JSON value of the Kafka record.
    pub name: String,
    /// Type of the column.
    pub cql_type: CqlType,
    /// Pointer to the value in the source record.
    pub pointer: String,
    /// Whether a record without a value becomes a dead letter.
    pub required: bool,
    /// How values of a timestamp column are read.
    pub reading: TimeReading,
    /// What becomes of a value that does not fit the type.
    pub on_misfit: OnMisfit,
}

/// What becomes of a value that does not fit the type of its column.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnMisfit {
    /// Its record becomes a dead letter.
    #[default]
    DeadLetter,
    /// The column stays absent, and a metric counts the value.
    Null,
}

/// The types a column can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CqlType {
    /// UTF-8 text. Accepts JSON strings, numbers and booleans.
    Text,
    /// 32-bit signed integer. Accepts numbers without a fractional part and their text.
    Int,
    /// 64-bit signed integer. Accepts numbers without a fractional part and their text.
    Bigint,
    /// Integer of any size. Accepts numbers without a fractional part and their text.
    Varint,
    /// 64-bit IEEE 754 float. Accepts numbers and their text.
    Double,
    /// Decimal number of any size. Accepts numbers and their text, and keeps every digit.
    Decimal,
    /// `true` or `false`, also as text.
    Boolean,
    /// Milliseconds since the epoch. [`TimeReading`] says what it accepts.
    Timestamp,
    /// UUID. Accepts the RFC 4122 text form.
    Uuid,
    /// Any JSON value, stored as its text in a column of type text.
    Json,
}

impl CqlType {
    /// All variants.
    pub const ALL: [CqlType; 10] = [
        CqlType::Text,
        CqlType::Int,
        CqlType::Bigint,
        CqlType::Varint,
        CqlType::Double,
        CqlType::Decimal,
        CqlType::Boolean,
        CqlType::Timestamp,
        CqlType::Uuid,
        CqlType::Json,
    ];

    /// The name in a definition.
    pub fn name(self) -> &'static str {
        match self {
            CqlType::Text => "text",
            CqlType::Int => "int",
            CqlType::Bigint => "bigint",
            CqlType::Varint => "varint",
            CqlType::Double => "double",
            CqlType::Decimal => "decimal",
            CqlType::Boolean => "boolean",
            CqlType::Timestamp => "timestamp",
            CqlType::Uuid => "uuid",
            CqlType::Json => "json",
        }
    }

    /// The CQL name.
    pub fn cql(self) -> &'static str {
        if self == CqlType::Json { "text" } else { self.name() }
    }

    /// Whether a column of this type can be a measure.
    pub fn is_numeric(self) -> bool {
        matches!(self, CqlType::Int | CqlType::Bigint | CqlType::Double)
    }
}
