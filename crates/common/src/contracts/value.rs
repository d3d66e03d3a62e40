//! Turns the JSON text of a value into the CQL bytes of a column. The processor stores what this module returns, and
//! `source check` shows what it rejects. Pure.

use crate::contracts::stream::{Column, CqlType};
use num_bigint::BigInt;
use std::borrow::Cow;
use uuid::Uuid;

/// Most characters of a value that a message quotes.
const MAX_SHOWN: usize = 64;
/// Most digits of a varint or decimal, and its largest exponent. A few bytes of text could otherwise cost gigabytes.
const MAX_DIGITS: usize = 10_000;

/// Appends the CQL bytes of a value to `out`. Returns `false` if the value is null, and why it does not fit the column
/// otherwise. Empty text is null in every column that is not text.
pub fn encode(raw: &str, column: &Column, out: &mut Vec<u8>) -> Result<bool, String> {
    let first = raw.as_bytes().first().copied().unwrap_or(b'n');
    let cql_type = column.cql_type;
    match (first, cql_type) {
        (b'n', _) => return Ok(false),
        (_, CqlType::Json) => {
            out.extend_from_slice(raw.as_bytes());
            return Ok(true);
        }
        (b'{' | b'[', _) => return misfit(raw, cql_type),
        _ => {}
    }
    let text = if first == b'"' { string(raw)? } else { Cow::Borrowed(raw) };
    if cql_type == CqlType::Text {
        out.extend_from_slice(text.as_bytes());
        return Ok(true);
    }
    let text = text.trim();
    if text.is_empty() {
        return Ok(false);
    }
    let is_boolean = matches!(first, b't' | b'f');
    let fits = match cql_type {
        CqlType::Boolean if is_boolean || first == b'"' => boolean(text).map(|flag| out.push(u8::from(flag))),
        _ if is_boolean => None,
        CqlType::Int => integer(text).and_then(|n| i32::try_from(n).ok()).map(|n| put(out, &n.to_be_bytes())),
        CqlType::Bigint => {
            integer(text).and_then(|n| i64::try_from(n).ok()).map(|n| put(out, &n.to_be_bytes()))
        }
        CqlType::Varint => varint(text).map(|n| put(out, &n.to_signed_bytes_be())),
        // A number outside the range of a double would become infinite.
        CqlType::Double => number(text).filter(|n| n.is_finite()).map(|n| put(out, &n.to_be_bytes())),
        CqlType::Decimal => decimal(text).map(|(unscaled, scale)| {
            put(out, &scale.to_be_bytes());
            put(out, &unscaled.to_signed_bytes_be());
        }),
        CqlType::Timestamp => match column.reading.read(text) {
            Ok(ms) => {
                put(out, &ms.to_be_bytes());
                Some(())
            }
            Err(e) => return Err(format!("{} {e}", quoted(raw))),
        },
        CqlType::Uuid if first == b'"' => Uuid::parse_str(text).ok().map(|uuid| put(out, uuid.as_bytes())),
        CqlType::Boolean | CqlType::Uuid | CqlType::Text | CqlType::Json => None,
    };
    fits.map_or_else(|| misfit(raw, cql_type), |()| Ok(true))
}

fn put(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(bytes);
}

fn boolean(text: &str) -> Option<bool> {
    [("true", true), ("false", false)]
        .iter()
        .find(|(name, _)| text.eq_ignore_ascii_case(name))
        .map(|(_, flag)| *flag)
}

/// A number as JSON writes it, with an optional plus sign. Rust also accepts `inf` and `nan`.
fn number(text: &str) -> Option<f64> {
    let is_numeric = |b: u8| b.is_ascii_digit() || matches!(b, b'+' | b'-' | b'.' | b'e' | b'E');
    text.bytes().all(is_numeric).then(|| text.parse().ok()).flatten()
}

/// A whole number that may be written with a fraction of zeros or an exponent.
fn integer(text: &str) -> Option<i128> {
    if let Ok(number) = text.parse() {
        return Some(number);
    }
    let (unscaled, scale) = decimal(text)?;
    whole(unscaled, scale).and_then(|number| i128::try_from(number).ok())
}

fn varint(text: &str) -> Option<BigInt> {
    let (unscaled, scale) = decimal(text)?;
    whole(unscaled, scale)
}

/// `unscaled · 10^-scale`, unless it has a fractional part.
fn whole(unscaled: BigInt, scale: i32) -> Option<BigInt> {
    let factor = BigInt::from(10).pow(scale.unsigned_abs());
    if scale <= 0 {
        return Some(unscaled * factor);
    }
    let (quotient, remainder) = (&unscaled / &factor, &unscaled % &factor);
    (remainder == BigInt::ZERO).then_some(quotient)
}

/// Parses a decimal number as its unscaled value and its scale: the number of digits after the point.
fn decimal(text: &str) -> Option<(BigInt, i32)> {
    let (mantissa, exponent) = match text.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, exponent.parse::<i32>().ok()?),
        None => (text, 0),
    };
    let (sign, digits) = match mantissa.strip_prefix('-') {
        Some(digits) => ("-", digits),
        None => ("", mantissa.strip_prefix('+').unwrap_or(mantissa)),
    };
    let (integral, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let all_digits = integral.bytes().chain(fraction.bytes()).all(|b| b.is_ascii_digit());
    let count = integral.len() + fraction.len();
    if !all_digits || count == 0 || count > MAX_DIGITS || exponent.unsigned_abs() as usize > MAX_DIGITS {
        return None;
    }
    let unscaled = format!("{sign}{integral}{fraction}").parse().ok()?;
    Some((unscaled, i32::try_from(fraction.len()).ok()? - exponent))
}

/// Returns the characters of a quoted string. A string without escapes is borrowed from the text.
fn string(quoted: &str) -> Result<Cow<'_, str>, String> {
    if quoted.contains('\\') {
        return serde_json::from_str(quoted).map(Cow::Owned).map_err(|e| e.to_string());
    }
    Ok(Cow::Borrowed(&quoted[1..quoted.len() - 1]))
}

fn misfit<T>(raw: &str, cql_type: CqlType) -> Result<T, String> {
    Err(format!("{} is not a valid {}", quoted(raw), cql_type.name()))
}

fn quoted(raw: &str) -> String {
    match raw.as_bytes()[0] {
        b'{' => "an object".to_owned(),
        b'[' => "a list".to_owned(),
        _ => format!("`{}`", raw.trim_matches('"').chars().take(MAX_SHOWN).collect::<String>()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contracts::stream::OnMisfit;
    use crate::contracts::time::TimeReading;
    use proptest::prelude::*;

    fn encoded(raw: &str, cql_type: CqlType) -> Result<Option<Vec<u8>>, String> {
        let column = Column {
            name: "c".to_owned(),
            cql_type,
            pointer: "/c".to_owned(),
            required: false,
            reading: TimeReading::seconds(),
            on_misfit: OnMisfit::DeadLetter,
        };
        let mut out = Vec::new();
        encode(raw, &column, &mut out).map(|present| present.then_some(out))
    }

    fn check(raw: &str, cql_type: CqlType, expected: &[u8]) {
        assert_eq!(encoded(raw, cql_type), Ok(Some(expected.to_vec())), "{raw} as {}", cql_type.name());
    }

    fn check_misfit(raw: &str, cql_type: CqlType, expected: &str) {
        let error = encoded(raw, cql_type).expect_err(raw);
        assert!(error.contains(expected), "`{expected}` is not in `{error}`");
    }

    #[test]
    fn numbers_are_read_from_numbers_and_from_text_without_loss() {
        for raw in ["17", "\"17\"", "\" 17 \"", "17.0", "\"17.00\"", "1.7e1", "\"+17\""] {
            check(raw, CqlType::Int, &17i32.to_be_bytes());
            check(raw, CqlType::Bigint, &17i64.to_be_bytes());
            check(raw, CqlType::Double, &17f64.to_be_bytes());
            check(raw, CqlType::Varint, &[17]);
        }
        check("9007199254740993", CqlType::Bigint, &9_007_199_254_740_993i64.to_be_bytes());
        check("\"91234.50000000\"", CqlType::Double, &91234.5f64.to_be_bytes());
        check("0.30000000000000004", CqlType::Double, &0.300_000_000_000_000_04f64.to_be_bytes());
        check("18446744073709551616", CqlType::Varint, &[1, 0, 0, 0, 0, 0, 0, 0, 0]);
        check("-1", CqlType::Varint, &[0xff]);
        check("1.10", CqlType::Decimal, &[0, 0, 0, 2, 110]);
        check("\"-0.05\"", CqlType::Decimal, &[0, 0, 0, 2, 0xfb]);
        check("1e3", CqlType::Decimal, &[0xff, 0xff, 0xff, 0xfd, 1]);
    }

    #[test]
    fn a_value_that_would_lose_digits_does_not_fit() {
        check_misfit("17.5", CqlType::Int, "`17.5` is not a valid int");
        check_misfit("2147483648", CqlType::Int, "is not a valid int");
        check_misfit("9223372036854775808", CqlType::Bigint, "is not a valid bigint");
        check_misfit("1e400", CqlType::Double, "is not a valid double");
        check_misfit("\"inf\"", CqlType::Double, "`inf` is not a valid double");
        check_misfit("\"1,000\"", CqlType::Int, "`1,000` is not a valid int");
        check_misfit("1e10001", CqlType::Varint, "is not a valid varint");
        check_misfit("true", CqlType::Int, "`true` is not a valid int");
        check_misfit("1", CqlType::Boolean, "`1` is not a valid boolean");
        check_misfit("[1]", CqlType::Text, "a list is not a valid text");
        check_misfit("{}", CqlType::Timestamp, "an object is not a valid timestamp");
        check_misfit("\"2026-01-01T00:00:00\"", CqlType::Timestamp, "has no time zone; declare one");
        check_misfit("\"x\"", CqlType::Uuid, "`x` is not a valid uuid");
        check_misfit("7", CqlType::Uuid, "`7` is not a valid uuid");
        check_misfit("\"\\ud83d\"", CqlType::Text, "hex escape");
    }

    #[test]
    fn every_other_type_is_read() {
        check("\"a\\u00e9\"", CqlType::Text, "aé".as_bytes());
        check("1.50", CqlType::Text, b"1.50");
        check("true", CqlType::Text, b"true");
        check("\"True\"", CqlType::Boolean, &[1]);
        check("false", CqlType::Boolean, &[0]);
        check("[\"x\", {\"y\": 1}]", CqlType::Json, b"[\"x\", {\"y\": 1}]");
        check("\"x\"", CqlType::Json, b"\"x\"");
        check("1767225600.5", CqlType::Timestamp, &1_767_225_600_500i64.to_be_bytes());
        check("\"2026-01-01T00:00:00.5Z\"", CqlType::Timestamp, &1_767_225_600_500i64.to_be_bytes());
        let uuid = "0f2a6a6e-9a0e-4f0f-8a0c-0a6d1e6a7b11";
        check(&format!("\"{uuid}\""), CqlType::Uuid, Uuid::parse_str(uuid).unwrap().as_bytes());
    }

    #[test]
    fn null_and_empty_text_are_absent() {
        for cql_type in CqlType::ALL {
            assert_eq!(encoded("null", cql_type), Ok(None));
        }
        for cql_type in CqlType::ALL.into_iter().filter(|t| !matches!(t, CqlType::Text | CqlType::Json)) {
            assert_eq!(encoded("\"\"", cql_type), Ok(None), "{}", cql_type.name());
        }
        check("\"\"", CqlType::Text, b"");
    }

    proptest! {
        #[test]
        fn doubles_and_integers_keep_every_bit(double in any::<f64>(), integer in any::<i64>(), as_text in any::<bool>()) {
            let written = |text: String| if as_text { format!("\"{text}\"") } else { text };
            if double.is_finite() {
                let raw = written(serde_json::to_string(&double).unwrap());
                prop_assert_eq!(encoded(&raw, CqlType::Double), Ok(Some(double.to_be_bytes().to_vec())));
            }
            let raw = written(integer.to_string());
            prop_assert_eq!(encoded(&raw, CqlType::Bigint), Ok(Some(integer.to_be_bytes().to_vec())));
            let varint = encoded(&raw, CqlType::Varint).unwrap().unwrap();
            prop_assert_eq!(BigInt::from_signed_bytes_be(&varint), BigInt::from(integer));
        }
    }
}
