//! Finds the records of a page: in arrays, objects keyed by an id, nested arrays, parallel arrays, lines and CSV rows.
//! Records are found one at a time, so that a large page needs little memory. Pure.

use super::scan::{self, Member, NotJson};
pub use common::contracts::extract::{Record, kind};
use common::contracts::stream::{BodyFormat, RecordShape};
use std::borrow::Cow;
use std::collections::BTreeMap;

/// Text of a page and its format, which is not [`BodyFormat::Auto`].
#[derive(Debug, Clone, Copy)]
pub struct Body<'a> {
    /// Decoded text; empty if the page has none.
    pub text: &'a [u8],
    /// Its format.
    pub format: BodyFormat,
}

/// The records of a page cannot be found.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum RecordsError {
    /// The value at the pointer can hold no records.
    #[error("source.records: `{pointer}` is {found} in the response of the source, not {expected}")]
    NotRecords {
        /// The definition's pointer.
        pointer: String,
        /// Type of the value.
        found: &'static str,
        /// What it has to be.
        expected: &'static str,
    },
    /// The arrays of a columnar page have different lengths.
    #[error("source.records: the arrays at `{0}` have different lengths, so they do not form records")]
    Ragged(String),
    /// The body is not valid CSV.
    #[error("the page is not valid CSV: {0}")]
    NotCsv(String),
    /// The body is not valid JSON up to the value at the pointer.
    #[error(transparent)]
    NotJson(#[from] NotJson),
}

/// An iterator over records.
pub type Records<'a> = Box<dyn Iterator<Item = Result<Record<'a>, RecordsError>> + Send + 'a>;

/// Finds the records of a page. `None` if the pointer leads nowhere or to `null`, or if the page is empty.
pub fn records<'a>(
    body: Body<'a>,
    pointer: &str,
    shape: RecordShape,
) -> Result<Option<Records<'a>>, RecordsError> {
    if body.text.is_empty() {
        return Ok(None);
    }
    match (body.format, shape) {
        (BodyFormat::Ndjson, _) => Ok(Some(Box::new(lines(body.text)))),
        (BodyFormat::Csv { delimiter }, _) => Ok(Some(Box::new(rows(body.text, delimiter)?))),
        (BodyFormat::Auto | BodyFormat::Json, RecordShape::Columnar) => columnar(body.text, pointer),
        (BodyFormat::Auto | BodyFormat::Json, RecordShape::Rows) => {
            Ok(Walk::start(body.text, pointer)?.map(|walk| Box::new(walk) as Records<'a>))
        }
    }
}

fn lines(text: &[u8]) -> impl Iterator<Item = Result<Record<'_>, RecordsError>> {
    let lines = text.split(|b| *b == b'\n').map(<[u8]>::trim_ascii);
    lines.filter(|line| !line.is_empty()).map(|line| Ok(Record::plain(line)))
}

/// The rows of a CSV text as objects of strings, named by the header line.
fn rows(
    text: &[u8],
    delimiter: u8,
) -> Result<impl Iterator<Item = Result<Record<'_>, RecordsError>> + Send, RecordsError> {
    let mut reader = csv::ReaderBuilder::new().delimiter(delimiter).from_reader(text);
    let not_csv = |e: csv::Error| RecordsError::NotCsv(e.to_string());
    let names: Vec<String> =
        reader.headers().map_err(not_csv)?.iter().map(|name| name.trim().to_owned()).collect();
    Ok(reader.into_records().map(move |row| {
        let row = row.map_err(not_csv)?;
        let members: BTreeMap<&str, &str> = names.iter().map(String::as_str).zip(row.iter()).collect();
        let text = serde_json::to_vec(&members).map_err(|e| RecordsError::NotCsv(e.to_string()))?;
        Ok(Record::plain(text))
    }))
}

/// One member of a columnar page: its quoted name and its elements.
type Column<'a> = (String, Box<dyn Iterator<Item = Result<Member<'a>, NotJson>> + Send + 'a>);

fn columnar<'a>(text: &'a [u8], pointer: &str) -> Result<Option<Records<'a>>, RecordsError> {
    let Some(at) = scan::locate(text, pointer)?.filter(|at| text[*at] != b'n') else { return Ok(None) };
    let not_records = |found| RecordsError::NotRecords {
        pointer: pointer.to_owned(),
        found,
        expected: "an object of arrays, as shape = \"columnar\" requires",
    };
    if text[at] != b'{' {
        return Err(not_records(kind(text.get(at))));
    }
    let mut columns: Vec<Column<'a>> = Vec::new();
    for member in scan::items(text, at) {
        let member = member?;
        if member.text.first() == Some(&b'[') {
            let name = serde_json::Value::from(member.name.as_ref()).to_string();
            columns.push((name, Box::new(scan::items(text, member.at))));
        }
    }
    if columns.is_empty() {
        return Err(not_records("an object without arrays"));
    }
    let pointer = pointer.to_owned();
    let mut failed = false;
    Ok(Some(Box::new(std::iter::from_fn(move || {
        if failed {
            return None;
        }
        let next = columnar_record(&mut columns, &pointer).transpose();
        failed = matches!(next, Some(Err(_)));
        next
    }))))
}

/// The next elements of all columns as one object, or `None` after the last.
fn columnar_record<'a>(
    columns: &mut [Column<'a>],
    pointer: &str,
) -> Result<Option<Record<'a>>, RecordsError> {
    let mut object = vec![b'{'];
    let mut ended = 0;
    for (name, elements) in columns.iter_mut() {
        let Some(element) = elements.next().transpose()? else {
            ended += 1;
            continue;
        };
        if object.len() > 1 {
            object.push(b',');
        }
        object.extend_from_slice(name.as_bytes());
        object.push(b':');
        object.extend_from_slice(element.text);
    }
    object.push(b'}');
    match ended {
        0 => Ok(Some(Record::plain(object))),
        ended if ended == columns.len() => Ok(None),
        _ => Err(RecordsError::Ragged(pointer.to_owned())),
    }
}

/// Walks from the root of a page to its records, one level per wildcard of the pointer.
struct Walk<'a> {
    text: &'a [u8],
    pointer: String,
    /// The pointers between the wildcards.
    segments: Vec<String>,
    /// Whether the last token is a wildcard, so that the values it matches are the records.
    ends_with_wildcard: bool,
    levels: Vec<Level<'a>>,
}

/// The elements or members that are still to be visited below one value.
struct Level<'a> {
    items: Box<dyn Iterator<Item = Result<Member<'a>, NotJson>> + Send + 'a>,
    /// The value that the wildcard above this level matched, and its name.
    parent: Option<&'a [u8]>,
    key: Option<Cow<'a, str>>,
}

impl<'a> Walk<'a> {
    /// `None` if the pointer leads nowhere or to `null` before the first wildcard.
    fn start(text: &'a [u8], pointer: &str) -> Result<Option<Walk<'a>>, RecordsError> {
        let tokens: Vec<&str> = pointer.split('/').skip(1).collect();
        let segments = tokens.split(|token| *token == "*");
        let segments: Vec<String> =
            segments.map(|tokens| tokens.iter().map(|token| format!("/{token}")).collect()).collect();
        let ends_with_wildcard = tokens.last() == Some(&"*");
        let mut walk =
            Walk { text, pointer: pointer.to_owned(), segments, ends_with_wildcard, levels: Vec::new() };
        let root = scan::locate(text, "")?.unwrap_or(0);
        let found = walk.descend(root, None, None)?;
        Ok(found.then_some(walk))
    }

    /// The depth at which the items are records.
    fn last_level(&self) -> usize {
        if self.ends_with_wildcard { self.segments.len() - 1 } else { self.segments.len() }
    }

    /// Opens the container below the value at `at`. `false` if there is none.
    fn descend(
        &mut self,
        at: usize,
        parent: Option<&'a [u8]>,
        key: Option<Cow<'a, str>>,
    ) -> Result<bool, RecordsError> {
        let segment = &self.segments[self.levels.len()];
        let Some(at) = scan::locate_from(self.text, at, segment)? else { return Ok(false) };
        let is_last = self.levels.len() + 1 == self.last_level() && !self.ends_with_wildcard;
        let items: Box<dyn Iterator<Item = Result<Member<'a>, NotJson>> + Send + 'a> = match self.text.get(at)
        {
            Some(b'n') => return Ok(false),
            Some(b'[') => Box::new(scan::items(self.text, at)),
            Some(b'{') if is_last => {
                let only = scan::value_at(self.text, at)?;
                Box::new(std::iter::once(Ok(Member { name: Cow::Borrowed(""), at, text: only })))
            }
            Some(b'{') => Box::new(scan::items(self.text, at)),
            other => {
                return Err(RecordsError::NotRecords {
                    pointer: self.pointer.clone(),
                    found: kind(other),
                    expected: "an array or an object",
                });
            }
        };
        self.levels.push(Level { items, parent, key });
        Ok(true)
    }

    fn record(&mut self) -> Result<Option<Record<'a>>, RecordsError> {
        loop {
            let depth = self.levels.len();
            let last_level = self.last_level();
            let Some(level) = self.levels.last_mut() else { return Ok(None) };
            let Some(item) = level.items.next().transpose()? else {
                self.levels.pop();
                continue;
            };
            let name = (!item.name.is_empty()).then_some(item.name);
            if depth == last_level {
                let key = if self.ends_with_wildcard { name } else { level.key.clone() };
                return Ok(Some(Record { text: Cow::Borrowed(item.text), parent: level.parent, key }));
            }
            self.descend(item.at, Some(item.text), name)?;
        }
    }
}

impl<'a> Iterator for Walk<'a> {
    type Item = Result<Record<'a>, RecordsError>;

    fn next(&mut self) -> Option<Self::Item> {
        let next = self.record().transpose();
        if matches!(next, Some(Err(_))) {
            self.levels.clear();
        }
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &'static str, pointer: &str) -> Option<Vec<(String, String, String)>> {
        let body = Body { text: text.as_bytes(), format: BodyFormat::Json };
        let records = records(body, pointer, RecordShape::Rows).unwrap()?;
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        Some(
            records
                .map(|record| {
                    let Record { text: record, parent, key } = record.unwrap();
                    (
                        text(&record),
                        parent.map(text).unwrap_or_default(),
                        key.unwrap_or_default().into_owned(),
                    )
                })
                .collect(),
        )
    }

    fn check(text: &'static str, pointer: &str, expected: &[(&str, &str, &str)]) {
        let found = found(text, pointer).unwrap();
        let found: Vec<(&str, &str, &str)> =
            found.iter().map(|(r, p, k)| (r.as_str(), p.as_str(), k.as_str())).collect();
        assert_eq!(found, expected, "{pointer} in {text}");
    }

    #[test]
    fn records_are_found_in_arrays_objects_and_nested_arrays() {
        check("[1, 2]", "", &[("1", "", ""), ("2", "", "")]);
        check(r#"{"a": {"b": [1]}}"#, "/a/b", &[("1", "", "")]);
        check(r#"{"id": 7}"#, "", &[(r#"{"id": 7}"#, "", "")]);
        check(
            r#"{"x": {"a": {"n": 1}, "b": {"n": 2}}}"#,
            "/x/*",
            &[(r#"{"n": 1}"#, "", "a"), (r#"{"n": 2}"#, "", "b")],
        );
        let orders =
            r#"{"data": [{"id": 1, "lines": [10, 11]}, {"id": 2}, {"id": 3, "lines": []}, {"lines": [12]}]}"#;
        let first = r#"{"id": 1, "lines": [10, 11]}"#;
        check(
            orders,
            "/data/*/lines",
            &[("10", first, ""), ("11", first, ""), ("12", r#"{"lines": [12]}"#, "")],
        );
        let nested = r#"{"r": {"eu": {"s": [{"v": [1]}, {"v": [2]}]}, "us": {"s": [{"v": [3]}]}}}"#;
        check(
            nested,
            "/r/*/s/*/v",
            &[("1", r#"{"v": [1]}"#, ""), ("2", r#"{"v": [2]}"#, ""), ("3", r#"{"v": [3]}"#, "")],
        );
    }

    #[test]
    fn an_absent_list_is_told_apart_from_an_empty_one() {
        assert_eq!(found(r#"{"total": 0}"#, "/items"), None);
        assert_eq!(found(r#"{"items": null}"#, "/items"), None);
        assert_eq!(found("", "/items"), None);
        assert_eq!(found(r#"{"items": []}"#, "/items"), Some(vec![]));
        let body = Body { text: br#"{"items": 3}"#, format: BodyFormat::Json };
        let error = records(body, "/items", RecordShape::Rows).err().unwrap().to_string();
        assert_eq!(
            error,
            "source.records: `/items` is a number in the response of the source, not an array or an object"
        );
    }

    fn texts(records: Records<'_>) -> Vec<Result<String, String>> {
        records
            .map(|r| r.map(|r| String::from_utf8_lossy(&r.text).into_owned()).map_err(|e| e.to_string()))
            .collect()
    }

    #[test]
    fn parallel_arrays_form_records() {
        let columnar = |text: &'static str| {
            let body = Body { text: text.as_bytes(), format: BodyFormat::Json };
            records(body, "/hourly", RecordShape::Columnar).map(|found| texts(found.unwrap()))
        };
        let found = columnar(r#"{"hourly": {"unit": "C", "time": ["a", "b"], "t": [1.5, null]}}"#).unwrap();
        assert_eq!(
            found,
            [Ok(r#"{"time":"a","t":1.5}"#.to_owned()), Ok(r#"{"time":"b","t":null}"#.to_owned())]
        );
        let ragged = columnar(r#"{"hourly": {"time": ["a", "b"], "t": [1.5]}}"#).unwrap();
        assert!(
            ragged.len() == 2 && ragged[1].as_ref().unwrap_err().contains("different lengths"),
            "{ragged:?}"
        );
        assert!(columnar(r#"{"hourly": [1]}"#).is_err());
        assert!(columnar(r#"{"hourly": {"a": 1}}"#).is_err());
    }

    #[test]
    fn lines_and_csv_rows_are_records() {
        let body = Body { text: b"{\"a\":1}\r\n\n{\"a\":2}", format: BodyFormat::Ndjson };
        let found = texts(records(body, "", RecordShape::Rows).unwrap().unwrap());
        assert_eq!(found, [Ok("{\"a\":1}".to_owned()), Ok("{\"a\":2}".to_owned())]);
        let body = Body { text: b"id;note\n1;\"a;b\"\n2;", format: BodyFormat::Csv { delimiter: b';' } };
        let found = texts(records(body, "", RecordShape::Rows).unwrap().unwrap());
        assert_eq!(
            found,
            [Ok(r#"{"id":"1","note":"a;b"}"#.to_owned()), Ok(r#"{"id":"2","note":""}"#.to_owned())]
        );
        let body = Body { text: b"id,note\n1,2,3", format: BodyFormat::Csv { delimiter: b',' } };
        let found = texts(records(body, "", RecordShape::Rows).unwrap().unwrap());
        assert!(found[0].as_ref().unwrap_err().contains("not valid CSV"), "{found:?}");
    }
}
