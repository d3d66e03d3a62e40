//! As much of PromQL as must be read to find what an expression asks for: its selectors, the labels it groups by, its
//! comparisons. Prometheus itself judges whether it is valid. Pure.

/// Words in front of a parenthesis, or of `by`, that are no metrics.
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
/// Words followed by a list of labels.
const LABEL_LISTS: [&str; 6] = ["by", "without", "on", "ignoring", "group_left", "group_right"];
/// Other words that are no metrics.
const WORDS: [&str; 7] = ["and", "or", "unless", "bool", "offset", "inf", "nan"];

/// One metric as an expression names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selector {
    /// Its name.
    pub name: String,
    /// With its matchers, as written.
    pub text: String,
    /// Labels that the matchers name.
    pub labels: Vec<String>,
    /// Where the name begins in the expression.
    pub at: usize,
}

/// What an expression asks for.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// Metrics in their order.
    pub selectors: Vec<Selector>,
    /// Labels that it groups or joins by.
    pub groupings: Vec<String>,
}

/// A position in an expression.
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

    /// From an opening quote to behind the closing one.
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

    /// From `{` to behind `}`: the labels in front of the operators.
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

    /// `(a, b)`, where there is one.
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

/// Reads an expression whose variables are replaced already.
pub fn asked(text: &str) -> Asked {
    let mut asked = Asked::default();
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
                    asked.groupings.extend(reader.label_list());
                    continue;
                }
                let behind = reader.at;
                reader.skip_space();
                let is_call = reader.peek() == Some('(');
                if is_call || AGGREGATIONS.contains(&word) || WORDS.contains(&word.to_lowercase().as_str()) {
                    continue;
                }
                let labels = if reader.peek() == Some('{') { reader.matchers() } else { Vec::new() };
                let end = if text[at..reader.at].ends_with('}') { reader.at } else { behind };
                let text = text[at..end].to_owned();
                asked.selectors.push(Selector { name: word.to_owned(), text, labels, at });
            }
            c => reader.at += c.len_utf8(),
        }
    }
    asked
}

/// The same expression with every comparison telling 0 or 1 instead of leaving out what is not so: with it an alert that
/// has nothing to say still has series, unless what it compares does not fit together.
pub fn comparing_all(text: &str) -> String {
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

/// The expression of a board with Grafana's variables replaced as Grafana would, all values chosen.
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
        let asked = asked(text);
        let found: Vec<&str> = asked.selectors.iter().map(|s| s.text.as_str()).collect();
        assert_eq!(
            (found.as_slice(), asked.groupings),
            (selectors, groupings.iter().map(|g| (*g).to_owned()).collect())
        );
        for selector in &asked.selectors {
            assert!(text[selector.at..].starts_with(&selector.text), "{text}");
        }
    }

    #[test]
    fn selectors_and_groupings_are_found_and_nothing_else() {
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
    fn labels_of_matchers_are_found() {
        assert_eq!(asked("a{x=\"y\", z!~\"b=c,d\"}").selectors[0].labels, ["x", "z"]);
    }

    #[test]
    fn comparisons_outside_of_matchers_tell_all() {
        let check = |text: &str, all: &str| assert_eq!(comparing_all(text), all);
        check("a{x!=\"1\"} > 2 and b == 0", "a{x!=\"1\"} > bool 2 and b == bool 0");
        check("a >= bool 2", "a >= bool 2");
        check("max(a <= b) != 1", "max(a <= bool b) != bool 1");
    }

    #[test]
    fn variables_of_boards_are_replaced() {
        assert_eq!(
            with_variables("rate(a{t=~\"$topic\"}[$__rate_interval])", "1m"),
            "rate(a{t=~\".+\"}[1m])"
        );
    }
}
