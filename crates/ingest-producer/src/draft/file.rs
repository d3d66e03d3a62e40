//! Writes the drafted definition, with a comment on every guess.

use super::Answer;
use super::columns::{Field, MAX_COLUMNS, column_name, is_in, snake, type_of};
use super::event::{self, Ids};
use super::pages::Paging;
use super::records::{Format, Found, Leaf};
use super::request::{Request, Role};
use common::contracts::stream::{BodyFormat, CqlType, RecordShape, looks_secret};
use common::contracts::time::{TimeReading, TimeUnit};
use std::fmt::Write;
use url::form_urlencoded;

/// Width of comments.
const WIDTH: usize = 118;
/// Other candidates that a comment lists.
const MAX_OTHERS: usize = 6;
/// Longest stream name.
const MAX_NAME: usize = 40;
/// Secrets of at least this length are looked for in the finished file; shorter ones occur by chance.
const MIN_SECRET: usize = 6;
/// Words of host names that say nothing about the API.
const HOST_WORDS: &str = " api app com de dev io net org rest v1 v2 www ";

/// The guessed event time.
#[derive(Debug, Default)]
pub(super) struct Time {
    /// Pointer, also with the prefix `page:`. `None` for `interval`.
    pub pointer: Option<String>,
    reading: TimeReading,
    /// Whether the time may change or belong to something else.
    is_doubtful: bool,
    others: Vec<String>,
}

impl Time {
    /// The best time of the records, or a time of the page.
    pub fn guess(fields: &[Field<'_>], leaves: &[Leaf<'_>], now_ms: i64) -> Time {
        let times = event::times(fields, now_ms);
        if let Some(best) = times.first() {
            return Time {
                pointer: Some(best.pointer.clone()),
                reading: best.reading.clone(),
                is_doubtful: event::is_other_time(best),
                others: times[1..].iter().map(|f| f.pointer.clone()).collect(),
            };
        }
        let of_page = leaves.iter().find_map(|leaf| {
            let mut field = Field {
                name: String::new(),
                pointer: leaf.pointer.to_owned(),
                values: vec![Some(leaf.raw)],
                cql_type: CqlType::Text,
                reading: TimeReading::default(),
            };
            (field.cql_type, field.reading) = type_of(&field);
            event::can_be_time(&field, now_ms).then_some(field)
        });
        of_page.map_or_else(Time::default, |field| Time {
            pointer: Some(format!("page:{}", field.pointer)),
            reading: field.reading,
            ..Time::default()
        })
    }
}

/// Everything that was guessed.
pub(super) struct Draft<'a> {
    pub answer: &'a Answer<'a>,
    pub format: &'a Format,
    pub found: &'a Found,
    pub fields: &'a [Field<'a>],
    pub request: &'a Request,
    pub paging: Paging,
    pub ids: Ids,
    pub time: Time,
}

impl Draft<'_> {
    /// The file.
    pub fn text(&self) -> String {
        let mut out = String::new();
        comment(
            &mut out,
            "A first definition, drafted by `ingest-producer source new` from one page. Every guess says why. Correct it, \
             then run `ingest-producer source check --stream FILE`, and start the pipeline with \
             `PIPELINE_STREAM=FILE ./run`. docs/sources.md describes every key.",
        );
        self.stream(&mut out);
        self.source(&mut out);
        self.event(&mut out);
        let columns = self.columns();
        out.push('\n');
        comment(
            &mut out,
            "Types are those that all values of the page fit. `required = true` makes a record without a value a dead \
             letter; `on_misfit = \"null\"` stores a row although a value does not fit.",
        );
        if self.found.pointer.ends_with("/*") {
            let name = if self.fields.iter().any(|f| f.name == "key") { "record_key" } else { "key" };
            let _ = writeln!(out, "\n[[column]]\nname = \"{name}\"\ntype = \"text\"\npointer = \"key:\"");
        }
        let records = self.fields.first().map_or(0, |f| f.values.len());
        for field in columns.iter().take(MAX_COLUMNS) {
            column(&mut out, field, records);
        }
        if let Some(more) = columns.len().checked_sub(MAX_COLUMNS + 1) {
            out.push('\n');
            comment(&mut out, &format!("{} more fields are left out.", more + 1));
        }
        windows(&mut out, &columns);
        out
    }

    fn name(&self) -> String {
        self.answer.name.map_or_else(|| name_of(self.answer.url), |name| limited(&column_name(name)))
    }

    fn stream(&self, out: &mut String) {
        let bounds = self.request.bounds();
        let is_daily = bounds.iter().any(|bound| bound.ends_with("%d}"));
        let name = self.name();
        let _ = writeln!(out, "\n[stream]\nname = \"{name}\"");
        if bounds.is_empty() {
            comment(
                out,
                "The URL has no time range, so every interval fetches the same pages again; a record counts once per \
                 (time, id). If the API can filter by time, add its parameters with {interval.start} and {interval.end}.",
            );
        } else if is_daily {
            comment(out, "The API takes dates, so an interval is a day.");
        }
        let every = if is_daily { "1d" } else { "10m" };
        let _ = writeln!(out, "schedule = {{ every = \"{every}\" }}");
        let catch_up = if bounds.is_empty() { 1 } else { 6 };
        let _ = writeln!(
            out,
            "# Intervals before the first start that are fetched as well.\ncatch_up = {catch_up}"
        );
        out.push_str("max_active_runs = 1\n");
    }

    fn source(&self, out: &mut String) {
        let Draft { paging, request, found, answer, .. } = self;
        out.push_str("\n[source]\n");
        if !request.bounds().is_empty() {
            let is_inclusive = request.bounds().iter().any(|bound| bound.contains("last"));
            let end = if is_inclusive {
                "The API includes the end, because both bounds were the same."
            } else {
                "If the API includes the end, records at the bound are fetched twice and counted once; to avoid that, write {interval.last}."
            };
            comment(out, &format!("Placeholders of the interval replace its bounds in the URL. {end}"));
        }
        let _ = writeln!(out, "url = {}", quoted(&request.template(paging.position)));
        if let Some(added) = &paging.added {
            let _ = writeln!(out, "query = {{ {} = \"{}\" }}", quoted(added), paging.position);
        }
        if answer.allow_private {
            out.push_str("allow_private = true\n");
        }
        self.credentials(out);
        let named: Vec<&str> = found.others.iter().take(MAX_OTHERS).map(String::as_str).collect();
        comment(out, &format!("Records: {}.{}", found.place.words(), others("Other places", &named)));
        let _ = writeln!(out, "records = {}", quoted(&found.pointer));
        if found.shape == RecordShape::Columnar {
            out.push_str("shape = \"columnar\"\n");
        }
        match self.format.body {
            BodyFormat::Ndjson if self.format.declared => out.push_str("format = \"ndjson\"\n"),
            BodyFormat::Csv { delimiter } if self.format.declared => {
                let delimiter = quoted(&char::from(delimiter).to_string());
                let _ = writeln!(out, "format = \"csv\"\ndelimiter = {delimiter}");
            }
            _ => {}
        }
        let size = |role: &Role| match role {
            Role::Size(size) => Some(*size),
            _ => None,
        };
        if let Some(size) = request.number(size) {
            let _ = writeln!(out, "# Raise it to the most that the API allows.\npage_size = {size}");
        }
        comment(out, &paging.why);
        if !paging.toml.is_empty() {
            let _ = writeln!(out, "pagination = {}", paging.toml);
        }
    }

    /// Headers without secrets, and where to read the secret from.
    fn credentials(&self, out: &mut String) {
        let (secret, plain): (Vec<_>, Vec<_>) =
            self.answer.request_headers.iter().partition(|(name, _)| looks_secret(name));
        if !plain.is_empty() {
            let pairs: Vec<String> =
                plain.iter().map(|(name, value)| format!("{} = {}", quoted(name), quoted(value))).collect();
            let _ = writeln!(out, "headers = {{ {} }}", pairs.join(", "));
        }
        let variable = format!("{}_KEY", self.name().to_uppercase());
        let in_header = secret.iter().map(|(name, value)| {
            let scheme = value.split(' ').next().unwrap_or_default().to_lowercase();
            match (name.eq_ignore_ascii_case("authorization"), scheme.as_str()) {
                (true, "bearer") => format!("{{ kind = \"bearer\", token_env = \"{variable}\" }}"),
                (true, "basic") => {
                    format!("{{ kind = \"basic\", user = \"USER\", password_env = \"{variable}\" }}")
                }
                _ => format!("{{ kind = \"api_key\", header = {}, key_env = \"{variable}\" }}", quoted(name)),
            }
        });
        let in_query = self.request.secrets.iter().map(|name| {
            format!("{{ kind = \"api_key\", query = {}, key_env = \"{variable}\" }}", quoted(name))
        });
        for (n, auth) in in_header.chain(in_query).enumerate() {
            if n == 0 {
                let text = format!(
                    "This file must not contain secrets: export {variable}, or name a file with …_file."
                );
                comment(out, &text);
                let _ = writeln!(out, "auth = {auth}");
            } else {
                let _ = writeln!(out, "# Another secret; a definition has one:\n# auth = {auth}");
            }
        }
    }

    fn event(&self, out: &mut String) {
        let Draft { ids, time, .. } = self;
        out.push_str("\n[event]\n");
        let named: Vec<&str> = ids.others.iter().take(MAX_OTHERS).map(String::as_str).collect();
        match ids.chosen.as_slice() {
            [] => comment(
                out,
                "Nothing identifies a record in this page, so it is identified by its position: if an interval is \
                 fetched again and the answer has changed, records count twice. Set id = \"/FIELD\", or several fields.",
            ),
            chosen => {
                comment(out, &format!("{}{}", ids.why, others("Also unique", &named)));
                let list: Vec<String> = chosen.iter().map(|pointer| quoted(pointer)).collect();
                let single = list.len() == 1;
                let _ = writeln!(
                    out,
                    "id = {}",
                    if single { list[0].clone() } else { format!("[{}]", list.join(", ")) }
                );
            }
        }
        let named: Vec<&str> = time.others.iter().take(MAX_OTHERS).map(String::as_str).collect();
        let candidates = others("Other times", &named);
        let Some(pointer) = &time.pointer else {
            comment(
                out,
                "No field is a past time in every record, so an event gets a time within the interval in which it \
                 is fetched: a record that several intervals return counts in each. Set time = \"/FIELD\" if there is one.",
            );
            let _ = writeln!(out, "time = \"interval\"\ntype = \"{}\"", self.name());
            return;
        };
        let doubt = if time.is_doubtful {
            " It may change, and then the record counts again, at its new time."
        } else if pointer.starts_with("page:") {
            " The records have no time, so that of the page is used."
        } else {
            ""
        };
        comment(
            out,
            &format!(
                "When the event happened, ideally the time by which the API filters.{doubt}{candidates}"
            ),
        );
        let _ = writeln!(out, "time = {}", quoted(pointer));
        reading(out, &time.reading, "time_");
        let _ = writeln!(out, "type = \"{}\"", self.name());
    }

    /// The fields that become columns: all but the id and the time, which events have anyway.
    fn columns(&self) -> Vec<&Field<'_>> {
        let is_event_field = |f: &&Field<'_>| {
            self.time.pointer.as_deref() == Some(f.pointer.as_str())
                || matches!(self.ids.chosen.as_slice(), [id] if *id == f.pointer)
        };
        let others: Vec<&Field<'_>> = self.fields.iter().filter(|f| !is_event_field(f)).collect();
        if others.is_empty() { self.fields.iter().collect() } else { others }
    }
}

fn column(out: &mut String, field: &Field<'_>, records: usize) {
    let Field { name, pointer, cql_type, .. } = field;
    let present = field.present();
    out.push('\n');
    match present {
        0 => comment(out, "Empty in every record of the page, so its type is unknown."),
        n if n < records => comment(out, &format!("Absent or null in {} of {records} records.", records - n)),
        _ => {}
    }
    let _ = writeln!(out, "[[column]]\nname = \"{name}\"\ntype = \"{}\"", cql_type.name());
    if *pointer != format!("/{name}") {
        let _ = writeln!(out, "pointer = {}", quoted(pointer));
    }
    reading(out, &field.reading, "");
    if field.is_complete() {
        out.push_str("# required = true\n");
    }
}

/// How a time is read, where it is not the default.
fn reading(out: &mut String, reading: &TimeReading, prefix: &str) {
    if reading.unit != TimeUnit::default()
        && let Some((name, _)) = TimeUnit::ALL.iter().find(|(_, unit)| *unit == reading.unit)
    {
        let _ = writeln!(out, "{prefix}unit = \"{name}\"");
    }
    if let Some(zone) = reading.zone {
        let _ = writeln!(
            out,
            "# The values have no offset; declare the time zone they are in.\n{prefix}zone = \"{zone}\""
        );
    }
}

fn windows(out: &mut String, columns: &[&Field<'_>]) {
    let columns = &columns[..columns.len().min(MAX_COLUMNS)];
    out.push_str("\n[store]\nbucket = \"1d\"\nshards = 1\n# How long rows are kept, such as \"365d\"; \"0\" keeps them forever.\nttl = \"0\"\n");
    out.push_str("\n[windows]\npane = \"10m\"\n");
    let measures = event::measures(columns);
    if measures.is_empty() {
        comment(out, "No numeric column is worth a sum; name some with measures = [\"COLUMN\"].");
    } else {
        let list: Vec<String> = measures.iter().map(|name| quoted(name)).collect();
        comment(
            out,
            "Count, sum, minimum and maximum of these columns are kept. Choose those that mean something.",
        );
        let _ = writeln!(out, "measures = [{}]", list.join(", "));
    }
    for (name, values) in event::groups(columns) {
        let list: Vec<String> = values.iter().map(|value| quoted(value)).collect();
        out.push('\n');
        comment(out, "Few distinct texts in this page. Values that are not listed count as `(other)`.");
        let _ = writeln!(out, "[[windows.group_by]]\ncolumn = \"{name}\"\nvalues = [{}]", list.join(", "));
    }
}

/// Writes a comment in lines of at most [`WIDTH`] characters. Control characters become spaces.
fn comment(out: &mut String, text: &str) {
    let mut line = "#".to_owned();
    for word in text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty()) {
        if line.len() > 1 && line.len() + 1 + word.len() > WIDTH {
            let _ = writeln!(out, "{line}");
            line = "#".to_owned();
        }
        line.push(' ');
        line.push_str(word);
    }
    let _ = writeln!(out, "{line}");
}

fn others(label: &str, list: &[&str]) -> String {
    if list.is_empty() { String::new() } else { format!(" {label}: {}.", list.join(", ")) }
}

/// A TOML basic string. JSON escapes all that TOML requires except DEL.
pub(super) fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string().replace('\u{7f}', "\\u007f")
}

fn limited(name: &str) -> String {
    name[..name.len().min(MAX_NAME)].trim_end_matches('_').to_owned()
}

/// A stream name from the host and the last words of the path.
fn name_of(url: &str) -> String {
    let url = url.split(['?', '#']).next().unwrap_or_default();
    let (host, path) =
        url.split_once("//").map_or(url, |(_, rest)| rest).split_once('/').unwrap_or((url, ""));
    let host = host.split(':').next().unwrap_or_default();
    let is_name = |word: &&str| {
        word.starts_with(|c: char| c.is_ascii_alphabetic()) && !is_in(&word.to_lowercase(), HOST_WORDS)
    };
    let site = host.split('.').rfind(is_name).filter(|site| *site != "localhost");
    let list = path.trim_end_matches(".json").split(['/', '.']).rfind(is_name);
    let words: Vec<String> =
        site.into_iter().chain(list).map(snake).filter(|word| !word.is_empty()).collect();
    limited(&column_name(if words.is_empty() { "mine".to_owned() } else { words.join("_") }.as_str()))
}

/// The secrets of the request.
pub(super) fn secrets(answer: &Answer<'_>) -> Vec<String> {
    let query = answer.url.split_once('?').map_or("", |(_, query)| query);
    let pairs = form_urlencoded::parse(query.as_bytes());
    let in_query = pairs.filter(|(name, _)| looks_secret(name)).map(|(_, value)| value.into_owned());
    let secret = answer.request_headers.iter().filter(|(name, _)| looks_secret(name));
    let in_headers = secret.filter_map(|(_, value)| value.rsplit(' ').next().map(str::to_owned));
    in_query.chain(in_headers).filter(|secret| secret.len() >= MIN_SECRET).collect()
}
