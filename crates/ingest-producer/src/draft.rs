//! Drafts a stream definition from one answer of an unknown API, for `source new`. [`records`] finds the records,
//! [`columns`] types their fields, [`event`] picks id, time and groups, [`request`] reads the given URL, [`pages`] finds
//! the next page, and [`file`](mod@file) writes the definition with a reason for each guess. Pure.

mod columns;
mod event;
mod file;
mod pages;
mod records;
mod request;
#[cfg(test)]
mod tests;

use crate::source::paginate::Headers;
use crate::source::records::Body;
use common::contracts::stream::{BodyFormat, RecordShape};
use records::Leaf;

/// Plausible event times, in Unix milliseconds. Times before 2000 or after 2100 are probably read in a wrong unit.
pub const PLAUSIBLE_MS: std::ops::Range<i64> = 946_684_800_000..4_102_444_800_000;

/// An answer of an API, and the request for it.
#[derive(Debug, Clone, Copy)]
pub struct Answer<'a> {
    /// Name of the stream. `None` to derive it from the URL.
    pub name: Option<&'a str>,
    /// The URL as given, with secrets.
    pub url: &'a str,
    /// Request headers as given, with secrets.
    pub request_headers: &'a [(String, String)],
    /// Whether the address may be private.
    pub allow_private: bool,
    /// Decoded text of the answer.
    pub text: &'a [u8],
    /// Response headers.
    pub headers: &'a Headers,
    /// The current time in Unix milliseconds.
    pub now_ms: i64,
}

/// No definition can be drafted from an answer.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum DraftError {
    /// The answer is in a format without records.
    #[error(
        "the answer is neither JSON, NDJSON nor CSV ({problem}); it starts with `{shown}`. Give the URL of the API, not of a web page"
    )]
    NotRecords {
        /// The first error.
        problem: String,
        /// The first characters of the answer.
        shown: String,
    },
    /// The answer reports an error instead of records.
    #[error(
        "the answer reports an error: {words}. Give a URL, and headers if needed, for which the API returns records"
    )]
    Reported {
        /// The words of the source.
        words: String,
    },
    /// The answer has no records.
    #[error(
        "the answer has no records, so there is nothing to derive columns from; give a URL that returns some, for example of a longer time range"
    )]
    Empty,
}

/// Drafts the definition of the stream that the answer belongs to.
pub fn draft(answer: &Answer<'_>) -> Result<String, DraftError> {
    let text = answer.text.trim_ascii();
    if text.is_empty() {
        return Err(DraftError::Empty);
    }
    let format = records::format(&answer.headers.get("content-type").unwrap_or_default(), text)?;
    let found = match format.body {
        BodyFormat::Json | BodyFormat::Auto => records::find(text),
        BodyFormat::Ndjson | BodyFormat::Csv { .. } => records::Found {
            pointer: String::new(),
            shape: RecordShape::Rows,
            place: records::Place::Lines,
            count: 0,
            others: vec![],
        },
    };
    let is_json = format.body == BodyFormat::Json;
    if is_json && let Some(error) = records::reported(text, &found) {
        return Err(error);
    }
    let texts = records::texts(Body { text, format: format.body }, &found)?;
    let leaves = if is_json { records::leaves(text, &found) } else { vec![] };
    let leaves: Vec<Leaf<'_>> = leaves.iter().map(|(pointer, raw)| Leaf { pointer, raw }).collect();
    let fields = columns::fields(&texts);
    let request = request::Request::read(answer.url);
    let time = file::Time::guess(&fields, &leaves, answer.now_ms);
    let is_keyed = found.pointer.ends_with("/*");
    let ids = event::ids(&fields, time.pointer.as_deref(), is_keyed);
    let around = pages::Around {
        request: &request,
        headers: answer.headers,
        leaves: &leaves,
        records: texts.len(),
        id: Some(ids.chosen.as_slice()).filter(|ids| ids.len() == 1).map(|ids| ids[0].as_str()),
    };
    let paging = around.paging();
    let draft = file::Draft {
        answer,
        format: &format,
        found: &found,
        fields: &fields,
        request: &request,
        paging,
        ids,
        time,
    };
    let mut text = draft.text();
    // The source may have repeated a secret in its answer.
    for secret in file::secrets(answer) {
        text = text.replace(&secret, "SECRET");
    }
    Ok(text)
}
