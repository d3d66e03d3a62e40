//! Why an attempt ended without success, and what its caller does about it.

/// What the caller does about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Another attempt may help.
    Retryable,
    /// No attempt will help: the definition, the source's answer or the rights are wrong.
    Fatal,
}

/// Longest cause that is stored, in bytes: it goes into a ledger row and must not grow with what a server sends.
pub const MAX_CAUSE_BYTES: usize = 500;

/// A failed attempt, as the ledger records it.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{cause}")]
pub struct AttemptError {
    /// What to do about it.
    pub kind: Kind,
    /// What went wrong, at most [`MAX_CAUSE_BYTES`].
    pub cause: String,
    /// The source's status, where it answered.
    pub http_status: Option<u16>,
    /// The pause the source asked for.
    pub retry_after_ms: Option<i64>,
}

impl AttemptError {
    /// One that may pass.
    pub fn retryable(cause: impl Into<String>) -> AttemptError {
        AttemptError::new(Kind::Retryable, cause.into())
    }

    /// One that stays.
    pub fn fatal(cause: impl Into<String>) -> AttemptError {
        AttemptError::new(Kind::Fatal, cause.into())
    }

    fn new(kind: Kind, cause: String) -> AttemptError {
        AttemptError { kind, cause: shortened(&cause), http_status: None, retry_after_ms: None }
    }
}

/// At most [`MAX_CAUSE_BYTES`] of a text, cut between characters.
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
