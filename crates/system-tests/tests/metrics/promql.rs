//! A parser for the part of PromQL that the tests need: the selectors, grouping labels and comparisons of an
//! expression. Prometheus itself checks whether the expression is valid. Pure.

/// Aggregation operators. A parenthesis or `by` may follow them, and they are not metrics.
const AGGREGATIONS: [&str; 12] = [
    "sum",
    "min",
    "max",
    "avg",
    "count",
    "group",
    "stddev",
    "stdvar",
    "topk",
    "bottomk",
    "quantile",
    "count_values",
];
/// Keywords that a list of labels follows.
const LABEL_LISTS: [&str; 6] = ["by", "without", "on", "ignoring", "group_left", "group_right"];
/// Other words that are not metrics.
const KEYWORDS: [&str; 7] = ["and", "or", "unless", "bool", "offset", "inf", "nan"];

/// A selector of an expression: a metric name with its label matchers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selector {
    /// The name of the metric.
    pub name: String,
    /// The selector with its matchers as written in the expression.
    pub text: String,
    /// The labels in the matchers.
    pub labels: Vec<String>,
    /// Byte offset of the selector in the expression.
    pub at: usize,
}

/// The parts of an expression that depend on exported series.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Query {
    /// The selectors in the order of the expression.
    pub selectors: Vec<Selector>,
    /// The labels that the expression groups or joins by.
    pub groupings: Vec<String>,
}

/// An expression and the current byte offset in it.
struct Reader<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Reader<'a> {
    fn peek(&self) -> Option<char> {
        self.text[self.at..].chars().next()
    }

    fn take_while(&mut self, fits: impl Fn(char) -> bool) -> &'a str {
        let rest = &self.text[self.at..];
        let end = rest.find(|c| !fits(c)).unwrap_or(rest.len());
        self.at += end;
        &rest[..end]
    }

    fn skip_space(&mut self) {
        self.take_while(char::is_whitespace);
    }

    /// Skips a string literal. The current character is its opening quote.
    fn string(&mut self) {
        let Some(quote) = self.peek() else { return };
        self.at += 1;
        while let Some(c) = self.peek() {
            self.at += c.len_utf8();
            match c {
                '\\' => self.at += self.peek().map_or(0, char::len_utf8),
                c if c == quote => return,
                _ => {}
            }
        }
    }

    /// Skips `{…}` and returns the labels in the matchers.
    fn matchers(&mut self) -> Vec<String> {
        let mut labels = Vec::new();
        self.at += 1;
        while let Some(c) = self.peek() {
            match c {
                '}' => {
                    self.at += 1;
                    break;
                }
                '"' | '\'' => self.string(),
                c if is_word(c) => labels.push(self.take_while(is_word).to_owned()),
                c => self.at += c.len_utf8(),
            }
        }
        labels
    }

    /// Skips a label list such as `(a, b)` and returns its labels. Returns no labels if the next character is not `(`.
    fn label_list(&mut self) -> Vec<String> {
        self.skip_space();
        if self.peek() != Some('(') {
            return Vec::new();
        }
        self.at += 1;
        let list = self.take_while(|c| c != ')');
        self.at += 1;
        list.split(',').map(str::trim).filter(|label| !label.is_empty()).map(str::to_owned).collect()
    }
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_' || c == ':'
}

/// Parses an expression that contains no Grafana variables.
pub fn parse(text: &str) -> Query {
    let mut query = Query::default();
    let mut reader = Reader { text, at: 0 };
    while let Some(c) = reader.peek() {
        let at = reader.at;
        match c {
            '"' | '\'' | '`' => reader.string(),
            '[' => drop(reader.take_while(|c| c != ']')),
            c if c.is_ascii_digit() => drop(reader.take_while(|c| is_word(c) || c == '.')),
            c if is_word(c) => {
                let word = reader.take_while(is_word);
                if LABEL_LISTS.contains(&word) {
                    query.groupings.extend(reader.label_list());
                    continue;
                }
                let name_end = reader.at;
                reader.skip_space();
                let is_call = reader.peek() == Some('(');
                if is_call || AGGREGATIONS.contains(&word) || KEYWORDS.contains(&word.to_lowercase().as_str())
                {
                    continue;
                }
                let labels = if reader.peek() == Some('{') { reader.matchers() } else { Vec::new() };
                let end = if text[at..reader.at].ends_with('}') { reader.at } else { name_end };
                let text = text[at..end].to_owned();
                query.selectors.push(Selector { name: word.to_owned(), text, labels, at });
            }
            c => reader.at += c.len_utf8(),
        }
    }
    query
}

/// Adds `bool` to every comparison, so that it returns 0 or 1 instead of dropping series. The expression of an alert
/// then has series even if the alert does not fire. It is empty only if the labels of the compared series do not match.
pub fn with_bool_comparisons(text: &str) -> String {
    let mut all = String::with_capacity(text.len() + 16);
    let mut reader = Reader { text, at: 0 };
    while let Some(c) = reader.peek() {
        let at = reader.at;
        match c {
            '"' | '\'' | '`' => reader.string(),
            '{' => drop(reader.matchers()),
            '<' | '>' | '=' | '!' => {
                let comparison = reader.take_while(|c| "<>=!".contains(c));
                all.push_str(comparison);
                reader.skip_space();
                all.push_str(if text[reader.at..].starts_with("bool") { " " } else { " bool " });
                continue;
            }
            c => reader.at += c.len_utf8(),
        }
        all.push_str(&text[at..reader.at]);
    }
    all
}

/// Replaces the variables of a Grafana expression as Grafana does when all values are selected.
pub fn with_variables(text: &str, rate_interval: &str) -> String {
    let mut all = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        all.push_str(&rest[..at]);
        let name = &rest[at + 1..];
        let end = name.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(name.len());
        all.push_str(if name[..end].starts_with("__") { rate_interval } else { ".+" });
        rest = &name[end..];
    }
    all.push_str(rest);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, selectors: &[&str], groupings: &[&str]) {
        let query = parse(text);
        let found: Vec<&str> = query.selectors.iter().map(|s| s.text.as_str()).collect();
        assert_eq!(
            (found.as_slice(), query.groupings),
            (selectors, groupings.iter().map(|g| (*g).to_owned()).collect())
        );
        for selector in &query.selectors {
            assert!(text[selector.at..].starts_with(&selector.text), "{text}");
        }
    }

    #[test]
    fn parse_finds_exactly_the_selectors_and_groupings() {
        check("up", &["up"], &[]);
        check(
            "sum by (le, job) (rate(a_bucket{x=\"}y\", z!~'q'}[5m]))",
            &["a_bucket{x=\"}y\", z!~'q'}"],
            &["le", "job"],
        );
        check("time() - max(a > 0) > 2 * max(b) and max(c) == 0", &["a", "b", "c"], &[]);
        check("a / ignoring (state) group_left () b offset 5m", &["a", "b"], &["state"]);
        check("histogram_quantile(0.99, sum without(i)(rate(a[1m])))", &["a"], &["i"]);
        check("count(up == 0) or vector(0)", &["up"], &[]);
        check("job:a:rate5m{x=\"1\"} > 1e3", &["job:a:rate5m{x=\"1\"}"], &[]);
        check("sum(a) by (b)", &["a"], &["b"]);
    }

    #[test]
    fn parse_finds_the_labels_of_matchers() {
        assert_eq!(parse("a{x=\"y\", z!~\"b=c,d\"}").selectors[0].labels, ["x", "z"]);
    }

    #[test]
    fn only_comparisons_outside_matchers_become_bool() {
        let check = |text: &str, all: &str| assert_eq!(with_bool_comparisons(text), all);
        check("a{x!=\"1\"} > 2 and b == 0", "a{x!=\"1\"} > bool 2 and b == bool 0");
        check("a >= bool 2", "a >= bool 2");
        check("max(a <= b) != 1", "max(a <= bool b) != bool 1");
    }

    #[test]
    fn grafana_variables_are_replaced() {
        assert_eq!(
            with_variables("rate(a{t=~\"$topic\"}[$__rate_interval])", "1m"),
            "rate(a{t=~\".+\"}[1m])"
        );
    }
}
