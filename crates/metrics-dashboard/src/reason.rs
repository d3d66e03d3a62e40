//! Reasons: why a figure is unknown or a request fails. A reason names the source of the problem, what failed and what
//! to do, and carries the error of the client library. Pure.

use serde::Serialize;
use std::fmt;

/// The origin of a problem.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// Kafka.
    Kafka,
    /// Cassandra.
    Cassandra,
    /// This service.
    Dashboard,
    /// The request itself is wrong.
    Request,
}

impl Origin {
    /// Name in `/readyz`, in metric labels and in messages.
    pub fn name(self) -> &'static str {
        match self {
            Origin::Kafka => "kafka",
            Origin::Cassandra => "cassandra",
            Origin::Dashboard => "dashboard",
            Origin::Request => "request",
        }
    }
}

/// A reason, as JSON `{"source": …, "message": …, "detail": …}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Reason {
    /// The origin of the problem.
    pub source: Origin,
    /// One line: what failed, and what to do.
    pub message: String,
    /// The error of the client library, if there is one.
    pub detail: Option<String>,
}

impl Reason {
    /// Creates a reason without a detail.
    pub fn new(source: Origin, message: impl Into<String>) -> Reason {
        Reason { source, message: message.into(), detail: None }
    }

    /// Sets the detail.
    pub fn with_detail(self, detail: impl Into<String>) -> Reason {
        Reason { detail: Some(detail.into()), ..self }
    }

    /// Creates a reason from an error whose text contains `cause` in parentheses. Moves the cause from the message to
    /// the detail.
    pub fn without_cause(source: Origin, error: &impl fmt::Display, cause: &str) -> Reason {
        let message = error.to_string().replacen(&format!(" ({cause})"), "", 1);
        Reason::new(source, message).with_detail(cause)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        self.detail.as_ref().map_or(Ok(()), |detail| write!(f, " ({detail})"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_in_parentheses_becomes_the_detail() {
        let error = "kafka at k:9092 does not answer (Meta data: Broker (Local) failure); is it running?";
        let reason = Reason::without_cause(Origin::Kafka, &error, "Meta data: Broker (Local) failure");
        assert_eq!(reason.message, "kafka at k:9092 does not answer; is it running?");
        assert_eq!(reason.detail.as_deref(), Some("Meta data: Broker (Local) failure"));
        assert_eq!(
            serde_json::json!(Reason::new(Origin::Request, "no")),
            serde_json::json!({"source": "request", "message": "no", "detail": null})
        );
    }
}
