//! Why something is not known or cannot be answered: who did not answer, what failed and what to do, and the client library's own
//! words. Pure.

use serde::Serialize;
use std::fmt;

/// Whose answer is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// Kafka.
    Kafka,
    /// Cassandra.
    Cassandra,
    /// This service.
    Dashboard,
    /// The request itself is wrong.
    Request,
}

/// A reason, as JSON `{"source": …, "message": …, "detail": …}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Reason {
    /// Whose answer is missing.
    pub source: Source,
    /// One line: what failed, and what to do.
    pub message: String,
    /// More about the cause, in the words of the client library; `None`: there is no more to say.
    pub detail: Option<String>,
}

impl Reason {
    /// A reason without detail.
    pub fn new(source: Source, message: impl Into<String>) -> Reason {
        Reason { source, message: message.into(), detail: None }
    }

    /// The same with the cause.
    pub fn with_detail(self, detail: impl Into<String>) -> Reason {
        Reason { detail: Some(detail.into()), ..self }
    }

    /// A reason made of an error whose text has its cause in brackets: the cause becomes the detail.
    pub fn without_cause(source: Source, error: &impl fmt::Display, cause: &str) -> Reason {
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
    fn the_cause_in_brackets_becomes_the_detail() {
        let error = "kafka at k:9092 does not answer (Meta data: Broker (Local) failure); is it running?";
        let reason = Reason::without_cause(Source::Kafka, &error, "Meta data: Broker (Local) failure");
        assert_eq!(reason.message, "kafka at k:9092 does not answer; is it running?");
        assert_eq!(reason.detail.as_deref(), Some("Meta data: Broker (Local) failure"));
        assert_eq!(
            serde_json::json!(Reason::new(Source::Request, "no")),
            serde_json::json!({"source": "request", "message": "no", "detail": null})
        );
    }
}
