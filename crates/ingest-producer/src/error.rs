//! Why an attempt failed, and what its caller does about it.

/// What the caller does about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A retry may succeed.
    Retryable,
    /// A retry does not help: the definition, the response of the source or the permissions are wrong.
    Fatal,
}

/// Maximum length of a stored cause in bytes. It is part of a ledger row and must not grow with what a server sends.
pub const MAX_CAUSE_BYTES: usize = 500;

/// A failed attempt, as the ledger records it.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{cause}")]
pub struct AttemptError {
    /// Whether a retry may succeed.
    pub kind: Kind,
    /// What went wrong, at most [`MAX_CAUSE_BYTES`] long.
    pub cause: String,
    /// HTTP status of the source; absent if it did not respond.
    pub http_status: Option<u16>,
    /// The pause that the source requested with `Retry-After`.
    pub retry_after_ms: Option<i64>,
}

impl AttemptError {
    /// An error that a retry may fix.
    pub fn retryable(cause: impl Into<String>) -> AttemptError {
        AttemptError::new(Kind::Retryable, cause.into())
    }

    /// An error that a retry does not fix.
    pub fn fatal(cause: impl Into<String>) -> AttemptError {
        AttemptError::new(Kind::Fatal, cause.into())
    }

    fn new(kind: Kind, cause: String) -> AttemptError {
        AttemptError { kind, cause: shortened(&cause), http_status: None, retry_after_ms: None }
    }
}

/// Truncates a text to [`MAX_CAUSE_BYTES`], at a character boundary.
pub fn shortened(text: &str) -> String {
    match text
        .char_indices()
        .map(|(at, c)| at + c.len_utf8())
        .take_while(|end| *end <= MAX_CAUSE_BYTES - 3)
        .last()
    {
        Some(end) if text.len() > MAX_CAUSE_BYTES => format!("{}…", &text[..end]),
        _ => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_cause_is_cut_between_characters() {
        let error = AttemptError::fatal("ä".repeat(1000));
        assert!(error.cause.len() <= MAX_CAUSE_BYTES && error.cause.ends_with("ä…"), "{}", error.cause.len());
        assert_eq!(AttemptError::fatal("short").cause, "short");
    }
}
