//! Finds values in JSON text without building a tree: the array of records in a page, the elements of an array one by
//! one, and the value at a pointer. It validates only what it needs to find the end of a value, so that an invalid
//! record affects only itself and not its page. `extract.rs` parses each record strictly. Pure.

use serde::de::IgnoredAny;
use std::borrow::Cow;

/// The text is not valid JSON, as far as the scanner validates it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not valid JSON at byte {at}: {what}")]
pub struct NotJson {
    /// Byte offset from the start of the scanned text.
    pub at: usize,
    /// The error at that offset.
    pub what: &'static str,
}

/// Checks that the text is exactly one value: it is not truncated, its brackets match, and nothing follows.
pub fn check(text: &[u8]) -> Result<(), NotJson> {
    let mut scanner = Scanner { text, at: 0 };
    let value = scanner.value()?;
    // To the scanner, the plain-text error of a proxy looks like a scalar.
    if !matches!(value[0], b'{' | b'[') && serde_json::from_slice::<IgnoredAny>(value).is_err() {
        return Err(NotJson { at: scanner.at - value.len(), what: "invalid start of a value" });
    }
    match scanner.peek() {
        None => Ok(()),
        Some(_) => Err(scanner.error("unexpected data after the value")),
    }
}

/// Returns the text of the value at an RFC 6901 pointer, or `None` if the pointer leads nowhere. The last of several
/// members with the same name wins.
pub fn find<'a>(text: &'a [u8], pointer: &str) -> Result<Option<&'a [u8]>, NotJson> {
    let at = locate(text, pointer)?;
    at.map(|at| Scanner { text, at }.value()).transpose()
}

/// Returns the byte offset of the value at an RFC 6901 pointer, or `None` if the pointer leads nowhere.
pub fn locate(text: &[u8], pointer: &str) -> Result<Option<usize>, NotJson> {
    locate_from(text, 0, pointer)
}

/// Like [`locate`], starting at the value at `from`.
pub fn locate_from(text: &[u8], from: usize, pointer: &str) -> Result<Option<usize>, NotJson> {
    let mut scanner = Scanner { text, at: from };
    scanner.peek();
    let mut at = scanner.at;
    for token in tokens(pointer) {
        match step(text, at, &token)? {
            Some(inner) => at = inner,
            None => return Ok(None),
        }
    }
    Ok(Some(at))
}

fn step(text: &[u8], at: usize, token: &str) -> Result<Option<usize>, NotJson> {
    let mut found = None;
    match text.get(at) {
        Some(b'{') => {
            for member in members(text, at) {
                let member = member?;
                if member.name == token {
                    found = Some(member.at);
                }
            }
        }
        Some(b'[') => {
            if let Some(index) = index(token) {
                found = elements(text, at).nth(index).transpose()?.map(|element| element.at);
            }
        }
        _ => {}
    }
    Ok(found)
}

/// The unescaped tokens of a pointer.
pub(super) fn tokens(pointer: &str) -> impl Iterator<Item = String> + '_ {
    pointer.split('/').skip(1).map(|token| token.replace("~1", "/").replace("~0", "~"))
}

/// Parses an array index. RFC 6901 allows neither a sign nor a leading zero.
pub(super) fn index(token: &str) -> Option<usize> {
    let plain = token.bytes().all(|b| b.is_ascii_digit()) && (token == "0" || !token.starts_with('0'));
    plain.then(|| token.parse().ok()).flatten()
}

/// An element of an array.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Element<'a> {
    /// Byte offset of the element.
    pub at: usize,
    /// Text of the element.
    pub text: &'a [u8],
}

/// A member of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member<'a> {
    /// Unescaped name.
    pub name: Cow<'a, str>,
    /// Byte offset of the value.
    pub at: usize,
    /// Text of the value.
    pub text: &'a [u8],
}

/// Iterates over the elements of the array that starts at `at`.
pub fn elements(text: &[u8], at: usize) -> impl Iterator<Item = Result<Element<'_>, NotJson>> {
    let mut items = Items::new(text, at);
    std::iter::from_fn(move || items.next_with(Scanner::element))
}

/// Iterates over the members of the object that starts at `at`.
pub fn members(text: &[u8], at: usize) -> impl Iterator<Item = Result<Member<'_>, NotJson>> {
    let mut items = Items::new(text, at);
    std::iter::from_fn(move || items.next_with(Scanner::member))
}

/// Iterates over the elements of the array, or the members of the object, that starts at `at`. Elements have no name.
pub fn items(text: &[u8], at: usize) -> impl Iterator<Item = Result<Member<'_>, NotJson>> {
    let is_object = text.get(at) == Some(&b'{');
    let mut items = Items::new(text, at);
    std::iter::from_fn(move || {
        if is_object {
            return items.next_with(Scanner::member);
        }
        let element = items.next_with(Scanner::element)?;
        Some(element.map(|Element { at, text }| Member { name: Cow::Borrowed(""), at, text }))
    })
}

/// The text of the value at `at`.
pub fn value_at(text: &[u8], at: usize) -> Result<&[u8], NotJson> {
    Scanner { text, at }.value()
}

/// Length in bytes of the quoted string at the start of a text. `None` if it does not end.
pub fn string_length(text: &[u8]) -> Option<usize> {
    let mut scanner = Scanner { text, at: 0 };
    scanner.string().ok().map(|()| scanner.at)
}

/// Iterates over the items between the brackets of an array or object.
struct Items<'a> {
    scanner: Scanner<'a>,
    started: bool,
    ended: bool,
}

impl<'a> Items<'a> {
    fn new(text: &'a [u8], at: usize) -> Items<'a> {
        Items { scanner: Scanner { text, at: at + 1 }, started: false, ended: false }
    }

    fn next_with<T>(
        &mut self,
        read: impl FnOnce(&mut Scanner<'a>) -> Result<T, NotJson>,
    ) -> Option<Result<T, NotJson>> {
        if self.ended {
            return None;
        }
        let scanner = &mut self.scanner;
        let item = match (scanner.peek(), std::mem::replace(&mut self.started, true)) {
            (Some(b']' | b'}'), _) => {
                self.ended = true;
                return None;
            }
            (_, false) => read(scanner),
            (Some(b','), true) => {
                scanner.at += 1;
                read(scanner)
            }
            (_, true) => Err(scanner.error("expected a comma")),
        };
        self.ended = item.is_err();
        Some(item)
    }
}

struct Scanner<'a> {
    text: &'a [u8],
    at: usize,
}

impl<'a> Scanner<'a> {
    fn error(&self, what: &'static str) -> NotJson {
        NotJson { at: self.at, what }
    }

    /// Skips white space and returns the next byte without consuming it.
    fn peek(&mut self) -> Option<u8> {
        while let Some(byte) = self.text.get(self.at) {
            if !matches!(byte, b' ' | b'\t' | b'\n' | b'\r') {
                return Some(*byte);
            }
            self.at += 1;
        }
        None
    }

    fn value(&mut self) -> Result<&'a [u8], NotJson> {
        let first = self.peek();
        let from = self.at;
        match first {
            Some(b'"') => self.string()?,
            Some(b'{' | b'[') => self.container()?,
            None | Some(b',' | b':' | b'}' | b']') => return Err(self.error("expected a value")),
            Some(_) => self.scalar(),
        }
        Ok(&self.text[from..self.at])
    }

    fn element(&mut self) -> Result<Element<'a>, NotJson> {
        let text = self.value()?;
        Ok(Element { at: self.at - text.len(), text })
    }

    fn member(&mut self) -> Result<Member<'a>, NotJson> {
        if self.peek() != Some(b'"') {
            return Err(self.error("expected a member name"));
        }
        let from = self.at;
        self.string()?;
        let quoted = &self.text[from..self.at];
        let name = name(quoted).ok_or(NotJson { at: from, what: "invalid member name" })?;
        if self.peek() != Some(b':') {
            return Err(self.error("expected a colon"));
        }
        self.at += 1;
        let Element { at, text } = self.element()?;
        Ok(Member { name, at, text })
    }

    /// Consumes a string, from its opening to its closing quote.
    fn string(&mut self) -> Result<(), NotJson> {
        self.at += 1;
        loop {
            let rest = self.text.get(self.at..).unwrap_or_default();
            let Some(next) = rest.iter().position(|byte| matches!(byte, b'"' | b'\\')) else {
                self.at = self.text.len();
                return Err(self.error("the text ends inside a string"));
            };
            let escaped = rest[next] == b'\\';
            self.at += next + 1 + usize::from(escaped);
            if !escaped {
                return Ok(());
            }
        }
    }

    /// Consumes an array or object, from its opening to its closing bracket.
    fn container(&mut self) -> Result<(), NotJson> {
        let mut open = Vec::new();
        while let Some(byte) = self.text.get(self.at) {
            match byte {
                b'"' => {
                    self.string()?;
                    continue;
                }
                b'{' => open.push(b'}'),
                b'[' => open.push(b']'),
                b'}' | b']' if open.pop() != Some(*byte) => {
                    return Err(self.error("mismatched closing bracket"));
                }
                _ => {}
            }
            self.at += 1;
            if open.is_empty() {
                return Ok(());
            }
        }
        Err(self.error("the text ends inside brackets"))
    }

    fn scalar(&mut self) {
        let ends = |byte: &u8| {
            matches!(byte, b',' | b':' | b'{' | b'}' | b'[' | b']' | b'"' | b' ' | b'\t' | b'\n' | b'\r')
        };
        let rest = &self.text[self.at..];
        self.at += rest.iter().position(ends).unwrap_or(rest.len());
    }
}

/// The unescaped member name, or `None` if an escape or the UTF-8 is invalid.
fn name(quoted: &[u8]) -> Option<Cow<'_, str>> {
    let inner = &quoted[1..quoted.len() - 1];
    if inner.contains(&b'\\') {
        return serde_json::from_slice(quoted).ok().map(Cow::Owned);
    }
    std::str::from_utf8(inner).ok().map(Cow::Borrowed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn check_find(text: &str, pointer: &str, expected: Option<&str>) {
        let found = find(text.as_bytes(), pointer).unwrap();
        assert_eq!(found, expected.map(str::as_bytes), "{pointer} in {text}");
    }

    #[test]
    fn a_pointer_resolves_to_the_text_of_its_value() {
        let text = r#" {"a": {"b/c": [1, {"~d": "x\"]"}], "": 1e400}, "a\u0062": -0.10, "n": null} "#;
        check_find(text, "", Some(text.trim()));
        check_find(text, "/a/b~1c/0", Some("1"));
        check_find(text, "/a/b~1c/1/~0d", Some(r#""x\"]""#));
        check_find(text, "/a/", Some("1e400"));
        check_find(text, "/ab", Some("-0.10"));
        check_find(text, "/n", Some("null"));
        for nothing in ["/b", "/a/b~1c/2", "/a/b~1c/01", "/a/b~1c/-1", "/n/x", "/a/b~1c/0/0"] {
            check_find(text, nothing, None);
        }
        check_find(r#"{"a":1,"a":2}"#, "/a", Some("2"));
    }

    fn texts(array: &str) -> Vec<Result<&str, NotJson>> {
        let elements = elements(array.as_bytes(), 0);
        elements.map(|element| element.map(|e| std::str::from_utf8(e.text).unwrap())).collect()
    }

    fn check_elements(array: &str, expected: &[&str]) {
        assert_eq!(texts(array), expected.iter().map(|e| Ok(*e)).collect::<Vec<_>>(), "{array}");
    }

    #[test]
    fn an_invalid_element_is_returned_as_an_element() {
        check_elements("[]", &[]);
        check_elements("[ 1 ,\"a,b\",[2,3], {} ]", &["1", "\"a,b\"", "[2,3]", "{}"]);
        check_elements(r#"[{"v":NaN},{"v":1.5}]"#, &[r#"{"v":NaN}"#, r#"{"v":1.5}"#]);
        check_elements(
            r#"[{"t":"\ud83d"},{"t":01}, nonsense]"#,
            &[r#"{"t":"\ud83d"}"#, r#"{"t":01}"#, "nonsense"],
        );
    }

    fn check_rejected(text: &str, at: usize, what: &'static str) {
        assert_eq!(check(text.as_bytes()), Err(NotJson { at, what }), "{text}");
    }

    #[test]
    fn truncated_or_invalid_text_is_rejected_at_the_offset_of_the_error() {
        check_rejected("", 0, "expected a value");
        check_rejected(r#"{"a": [1, 2"#, 11, "the text ends inside brackets");
        check_rejected(r#"{"a": "b"#, 8, "the text ends inside a string");
        check_rejected(r#"["\"#, 3, "the text ends inside a string");
        check_rejected("[1}", 2, "mismatched closing bracket");
        check_rejected("[1] [2]", 4, "unexpected data after the value");
        check_rejected("<html><body>", 0, "invalid start of a value");
        check_rejected(" bad gateway", 1, "invalid start of a value");
    }

    #[test]
    fn elements_must_be_separated_by_commas() {
        assert_eq!(texts("[1 2]"), [Ok("1"), Err(NotJson { at: 3, what: "expected a comma" })]);
        assert_eq!(texts("[1,]"), [Ok("1"), Err(NotJson { at: 3, what: "expected a value" })]);
    }

    #[test]
    fn elements_are_scanned_on_demand() {
        // The text after an element is not scanned before the next element is requested.
        let mut elements = elements(b"[{\"a\":1}, ", 0);
        assert_eq!(elements.next(), Some(Ok(Element { at: 1, text: br#"{"a":1}"# })));
        assert_eq!(elements.next(), Some(Err(NotJson { at: 10, what: "expected a value" })));
        assert_eq!(elements.next(), None);
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            "[a-c\"\\\\/\\[\\]{},:~ é]{0,6}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 40, 5, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                prop::collection::btree_map("[a-c\"\\\\/~ é]{0,2}", inner, 0..5)
                    .prop_map(|members| Value::Object(members.into_iter().collect())),
            ]
        })
    }

    fn every_pointer(value: &Value, at: &str, into: &mut Vec<String>) {
        into.push(at.to_owned());
        match value {
            Value::Array(items) => {
                items
                    .iter()
                    .enumerate()
                    .for_each(|(n, item)| every_pointer(item, &format!("{at}/{n}"), into));
            }
            Value::Object(members) => members.iter().for_each(|(name, item)| {
                let token = name.replace('~', "~0").replace('/', "~1");
                every_pointer(item, &format!("{at}/{token}"), into);
            }),
            _ => {}
        }
    }

    proptest! {
        #[test]
        fn every_value_of_valid_json_is_found_as_in_a_parsed_tree(value in any_json(), pretty in any::<bool>()) {
            let text = if pretty { serde_json::to_string_pretty(&value) } else { serde_json::to_string(&value) };
            let text = text.unwrap();
            prop_assert_eq!(check(text.as_bytes()), Ok(()));
            let mut pointers = vec!["/nowhere".to_owned()];
            every_pointer(&value, "", &mut pointers);
            for pointer in pointers {
                let found = find(text.as_bytes(), &pointer).unwrap();
                let found: Option<Value> = found.map(|raw| serde_json::from_slice(raw).unwrap());
                prop_assert_eq!(found.as_ref(), value.pointer(&pointer), "{}", pointer);
            }
        }

        #[test]
        fn arbitrary_bytes_neither_panic_nor_loop(bytes in prop::collection::vec(prop::sample::select(b"[]{}\",:\\ ax1\xff".to_vec()), 0..40)) {
            let _ = check(&bytes);
            let _ = find(&bytes, "/a/0");
            prop_assert!(elements(&bytes, 0).count() <= bytes.len() + 1);
            prop_assert!(members(&bytes, 0).count() <= bytes.len() + 1);
        }

        #[test]
        fn every_truncation_is_detected(value in any_json(), cut in any::<prop::sample::Index>()) {
            let text = json!([value]).to_string();
            let cut = cut.index(text.len());
            prop_assert!(check(&text.as_bytes()[..cut]).is_err());
        }
    }
}
