//! Templates of URLs, query parameters and bodies: text with placeholders such as `{interval.start}` or
//! `{interval.start:%Y-%m-%d}`. Pure.
//!
//! | placeholder | value |
//! |---|---|
//! | `interval.start`, `interval.end` | the bounds of the interval, RFC 3339 in UTC |
//! | `interval.last` | the last millisecond of the interval, for APIs whose end is inclusive |
//! | …`_unix`, …`_unix_ms` | the same in Unix seconds or milliseconds |
//! | …`:FORMAT` | the same in a `strftime` format, in the time zone `source.zone` |
//! | `interval.seed` | text that depends on the stream and the interval only |
//! | `page`, `page_size`, `offset`, `cursor` | the position of the page |
//! | `each.NAME` | a value of `source.for_each` |

use crate::contracts::time::is_format;

/// A bound of the interval.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// The first millisecond.
    Start,
    /// The first millisecond after the interval.
    End,
    /// The last millisecond.
    Last,
}

/// How a bound of the interval is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BoundFormat {
    /// RFC 3339 in UTC, with milliseconds unless they are 0.
    Rfc3339,
    /// Unix seconds.
    Unix,
    /// Unix milliseconds.
    UnixMillis,
    /// A `strftime` format.
    Strftime(String),
}

/// A placeholder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Placeholder {
    /// A bound of the interval.
    Interval(Bound, BoundFormat),
    /// Text that depends on the stream and the interval only.
    Seed,
    /// Page number.
    Page,
    /// Records per page.
    PageSize,
    /// Offset of the page.
    Offset,
    /// Cursor from the previous page.
    Cursor,
    /// A value of `source.for_each`.
    Each(String),
}

/// A part of a template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// Text to copy.
    Text(String),
    /// A placeholder to replace.
    Placeholder(Placeholder),
}

/// Names without a format, for messages.
const NAMES: &str = "{interval.start}, {interval.end}, {interval.last} (each also with _unix, _unix_ms or :FORMAT), \
                     {interval.seed}, {page}, {page_size}, {offset}, {cursor}, {each.NAME}";

/// A parsed template.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Template {
    /// The parts in order.
    pub parts: Vec<Part>,
}

impl Template {
    /// Parses a template in which every brace belongs to a placeholder. The error names the placeholder.
    pub fn parse(text: &str) -> Result<Template, String> {
        Template::parts(text, |name| {
            let name = name.ok_or_else(|| format!("`{text}` has an opening brace without a closing one"))?;
            Placeholder::parse(name).map(Some).map_err(|problem| {
                problem.unwrap_or_else(|| format!("unknown placeholder `{{{name}}}`; use one of {NAMES}"))
            })
        })
    }

    /// Parses text of a body, in which braces that enclose no placeholder are copied, as in GraphQL.
    pub fn parse_body(text: &str) -> Result<Template, String> {
        Template::parts(text, |name| match name.map_or(Err(None), Placeholder::parse) {
            Ok(placeholder) => Ok(Some(placeholder)),
            Err(Some(problem)) => Err(problem),
            Err(None) => Ok(None),
        })
    }

    fn parts(
        text: &str,
        read: impl Fn(Option<&str>) -> Result<Option<Placeholder>, String>,
    ) -> Result<Template, String> {
        let mut parts = Vec::new();
        let mut copied = String::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('{') {
            copied.push_str(before);
            let enclosed = after.split_once('}');
            match read(enclosed.map(|(name, _)| name))? {
                Some(placeholder) => {
                    parts.extend((!copied.is_empty()).then(|| Part::Text(std::mem::take(&mut copied))));
                    parts.push(Part::Placeholder(placeholder));
                    rest = enclosed.map_or("", |(_, rest)| rest);
                }
                None => {
                    copied.push('{');
                    rest = after;
                }
            }
        }
        copied.push_str(rest);
        parts.extend((!copied.is_empty()).then_some(Part::Text(copied)));
        Ok(Template { parts })
    }

    /// The placeholders in order.
    pub fn placeholders(&self) -> impl Iterator<Item = &Placeholder> {
        self.parts.iter().filter_map(|part| match part {
            Part::Placeholder(placeholder) => Some(placeholder),
            Part::Text(_) => None,
        })
    }

    /// The placeholder, if the template consists of exactly one.
    pub fn single(&self) -> Option<&Placeholder> {
        match self.parts.as_slice() {
            [Part::Placeholder(placeholder)] => Some(placeholder),
            _ => None,
        }
    }
}

impl Placeholder {
    /// Parses the text between two braces. The error is `None` if it does not look like a placeholder.
    fn parse(name: &str) -> Result<Placeholder, Option<String>> {
        let fixed = match name {
            "interval.seed" => Some(Placeholder::Seed),
            "page" => Some(Placeholder::Page),
            "page_size" => Some(Placeholder::PageSize),
            "offset" => Some(Placeholder::Offset),
            "cursor" => Some(Placeholder::Cursor),
            _ => name.strip_prefix("each.").map(|each| Placeholder::Each(each.to_owned())),
        };
        if let Some(placeholder) = fixed {
            return Ok(placeholder);
        }
        let rest = name.strip_prefix("interval.").ok_or(None)?;
        let (bound, format) =
            rest.split_once(':').map_or((rest, None), |(bound, format)| (bound, Some(format)));
        let (bound, unix) = match bound.split_once('_') {
            Some((bound, "unix")) => (bound, Some(BoundFormat::Unix)),
            Some((bound, "unix_ms")) => (bound, Some(BoundFormat::UnixMillis)),
            Some(_) => return Err(None),
            None => (bound, None),
        };
        let bound = match bound {
            "start" => Bound::Start,
            "end" => Bound::End,
            "last" => Bound::Last,
            _ => return Err(Some(format!("unknown placeholder `{{{name}}}`; use one of {NAMES}"))),
        };
        let format = match (unix, format) {
            (Some(unix), None) => unix,
            (None, None) => BoundFormat::Rfc3339,
            (None, Some(format)) if is_format(format) => BoundFormat::Strftime(format.to_owned()),
            _ => {
                let problem = format!(
                    "`{{{name}}}` has no valid strftime format; write for example {{interval.start:%Y-%m-%d}}"
                );
                return Err(Some(problem));
            }
        };
        Ok(Placeholder::Interval(bound, format))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: &[Part]) {
        assert_eq!(Template::parse(text).map(|t| t.parts).as_deref(), Ok(expected), "{text}");
    }

    fn text(text: &str) -> Part {
        Part::Text(text.to_owned())
    }

    #[test]
    fn a_template_consists_of_text_and_placeholders() {
        use Part::Placeholder as P;
        check("plain", &[text("plain")]);
        check("", &[]);
        check("a{page}b", &[text("a"), P(Placeholder::Page), text("b")]);
        check(
            "{interval.start:%Y-%m-%d}{each.symbol}",
            &[
                P(Placeholder::Interval(Bound::Start, BoundFormat::Strftime("%Y-%m-%d".to_owned()))),
                P(Placeholder::Each("symbol".to_owned())),
            ],
        );
        check("{interval.last_unix_ms}", &[P(Placeholder::Interval(Bound::Last, BoundFormat::UnixMillis))]);
        check("{interval.end}", &[P(Placeholder::Interval(Bound::End, BoundFormat::Rfc3339))]);
    }

    #[test]
    fn an_unknown_placeholder_is_named() {
        for wrong in
            ["{curser}", "{interval.begin}", "{interval.start_iso}", "{interval.start:%Q}", "{page", "{}"]
        {
            assert!(Template::parse(wrong).unwrap_err().contains('`'), "{wrong}");
        }
        let error = Template::parse("{interval.start:%Q}").unwrap_err();
        assert!(error.contains("no valid strftime format"), "{error}");
    }

    #[test]
    fn the_braces_of_a_graphql_query_are_copied() {
        let query = "query { items(first: {page_size}) { nodes { id } } }";
        let parts = Template::parse_body(query).unwrap().parts;
        assert_eq!(
            parts,
            [
                text("query { items(first: "),
                Part::Placeholder(Placeholder::PageSize),
                text(") { nodes { id } } }")
            ]
        );
        assert_eq!(Template::parse_body("{cursor}").unwrap().single(), Some(&Placeholder::Cursor));
        assert!(Template::parse_body("{interval.begin}").is_err(), "it looks like a placeholder");
    }
}
