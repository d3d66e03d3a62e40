//! Reads times as APIs write them: RFC 3339 and its usual variants, Unix times in any unit, declared formats and local
//! times of a named zone. Pure.

use chrono::format::{Item, StrftimeItems};
use chrono::{DateTime, NaiveDate, NaiveDateTime, NaiveTime, TimeZone};
use chrono_tz::Tz;
use serde::{Deserialize, Serialize};

/// Unit of a Unix time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum TimeUnit {
    /// Seconds.
    #[serde(rename = "s")]
    Seconds,
    /// Milliseconds.
    #[default]
    #[serde(rename = "ms")]
    Milliseconds,
    /// Microseconds.
    #[serde(rename = "us")]
    Microseconds,
    /// Nanoseconds.
    #[serde(rename = "ns")]
    Nanoseconds,
}

impl TimeUnit {
    /// All units and their names in a definition.
    pub const ALL: [(&'static str, TimeUnit); 4] = [
        ("s", TimeUnit::Seconds),
        ("ms", TimeUnit::Milliseconds),
        ("us", TimeUnit::Microseconds),
        ("ns", TimeUnit::Nanoseconds),
    ];

    fn is_default(&self) -> bool {
        *self == TimeUnit::default()
    }

    /// Power of ten of one second in this unit.
    fn digits(self) -> u32 {
        match self {
            TimeUnit::Seconds => 0,
            TimeUnit::Milliseconds => 3,
            TimeUnit::Microseconds => 6,
            TimeUnit::Nanoseconds => 9,
        }
    }
}

/// How a value is read as a time.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TimeReading {
    /// Unit of a number, or of text that consists of a number.
    #[serde(default, skip_serializing_if = "TimeUnit::is_default")]
    pub unit: TimeUnit,
    /// `strftime` format of text. `None` for RFC 3339 and its usual variants.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<String>,
    /// Time zone of text without an offset. `None` to reject such text, except dates, which are in UTC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<Tz>,
}

/// Why a value is not a time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TimeError {
    /// The value has no form of a time.
    #[error("is not a time: use RFC 3339, a Unix time in {unit}, or declare a format")]
    Unreadable {
        /// The declared unit.
        unit: &'static str,
    },
    /// The text has no offset, and no zone is declared.
    #[error("has no time zone; declare one, for example \"UTC\"")]
    NoZone,
    /// The local time does not exist in the declared zone.
    #[error("does not exist in {0}, where clocks were moved forward")]
    Skipped(Tz),
    /// The text does not have the declared format.
    #[error("does not have the format `{0}`")]
    OtherFormat(String),
}

impl TimeReading {
    /// Reads Unix times in seconds.
    pub fn seconds() -> TimeReading {
        TimeReading { unit: TimeUnit::Seconds, ..TimeReading::default() }
    }

    /// Reads a value, a JSON number or the characters of a JSON string, as Unix milliseconds. Finer digits are
    /// truncated.
    pub fn read(&self, text: &str) -> Result<i64, TimeError> {
        let text = text.trim();
        if let Some(format) = &self.format {
            return self.formatted(text, format);
        }
        if let Some(ms) = unix_ms(text, self.unit) {
            return Ok(ms);
        }
        if let Some(inner) = text.strip_prefix("/Date(").and_then(|rest| rest.strip_suffix(")/")) {
            // OData 2: milliseconds in UTC. The offset after them is only for display.
            let digits = inner.find(['+', '-']).filter(|at| *at > 0).map_or(inner, |at| &inner[..at]);
            return digits.parse().map_err(|_| self.unreadable());
        }
        if let Ok(at) = DateTime::parse_from_rfc3339(text) {
            return Ok(at.timestamp_millis());
        }
        self.variant(text)
    }

    /// RFC 3339 with a space or another offset, without seconds, offset or time, and RFC 2822.
    fn variant(&self, text: &str) -> Result<i64, TimeError> {
        if let Ok(at) = DateTime::parse_from_rfc2822(text) {
            return Ok(at.timestamp_millis());
        }
        let date_length = "2026-01-01".len();
        let date = text.get(..date_length).and_then(|date| NaiveDate::parse_from_str(date, "%Y-%m-%d").ok());
        let date = date.ok_or_else(|| self.unreadable())?;
        let rest = text[date_length..].trim_start_matches(['T', 't', ' ']);
        if rest.is_empty() {
            return in_zone(date.and_time(NaiveTime::MIN), self.zone.unwrap_or(Tz::UTC));
        }
        let offset_at = rest.find(|c: char| !c.is_ascii_digit() && !matches!(c, ':' | '.' | ','));
        let (clock, offset) = rest.split_at(offset_at.unwrap_or(rest.len()));
        let clock = clock.replace(',', ".");
        let time =
            ["%H:%M:%S%.f", "%H:%M"].iter().find_map(|form| NaiveTime::parse_from_str(&clock, form).ok());
        let local = date.and_time(time.ok_or_else(|| self.unreadable())?);
        match offset.trim() {
            "" => in_zone(local, self.zone.ok_or(TimeError::NoZone)?),
            "Z" | "z" | "UTC" | "GMT" => Ok(local.and_utc().timestamp_millis()),
            offset => {
                let seconds = offset_seconds(offset).ok_or_else(|| self.unreadable())?;
                Ok(local.and_utc().timestamp_millis() - seconds * 1000)
            }
        }
    }

    fn formatted(&self, text: &str, format: &str) -> Result<i64, TimeError> {
        if let Ok(at) = DateTime::parse_from_str(text, format) {
            return Ok(at.timestamp_millis());
        }
        let time = NaiveDateTime::parse_from_str(text, format).ok();
        let local =
            time.or_else(|| Some(NaiveDate::parse_from_str(text, format).ok()?.and_time(NaiveTime::MIN)));
        let local = local.ok_or_else(|| TimeError::OtherFormat(format.to_owned()))?;
        in_zone(local, self.zone.ok_or(TimeError::NoZone)?)
    }

    fn unreadable(&self) -> TimeError {
        let unit = match self.unit {
            TimeUnit::Seconds => "seconds",
            TimeUnit::Milliseconds => "milliseconds",
            TimeUnit::Microseconds => "microseconds",
            TimeUnit::Nanoseconds => "nanoseconds",
        };
        TimeError::Unreadable { unit }
    }
}

/// Whether every part of a `strftime` format is known.
pub fn is_format(format: &str) -> bool {
    !format.is_empty() && StrftimeItems::new(format).all(|item| !matches!(item, Item::Error))
}

/// The Unix milliseconds of a local time. Of a time that occurs twice, the first one counts.
fn in_zone(local: NaiveDateTime, zone: Tz) -> Result<i64, TimeError> {
    let at = zone.from_local_datetime(&local).earliest().ok_or(TimeError::Skipped(zone))?;
    Ok(at.timestamp_millis())
}

/// An offset such as `+01:00`, `+0100` or `-05`, in seconds east of UTC.
fn offset_seconds(text: &str) -> Option<i64> {
    let (sign, digits) = match text.strip_prefix('+') {
        Some(rest) => (1, rest),
        None => (-1, text.strip_prefix('-')?),
    };
    let digits = digits.replacen(':', "", 1);
    if !matches!(digits.len(), 2 | 4) || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let hours: i64 = digits[..2].parse().ok()?;
    let minutes: i64 = digits.get(2..).filter(|m| !m.is_empty()).map_or(Some(0), |m| m.parse().ok())?;
    (hours < 24 && minutes < 60).then_some(sign * (hours * 3600 + minutes * 60))
}

/// A decimal number of units as milliseconds, without rounding through a float. `None` if the text is not a number.
fn unix_ms(text: &str, unit: TimeUnit) -> Option<i64> {
    let (negative, digits) = text.strip_prefix('-').map_or((false, text), |digits| (true, digits));
    let (mantissa, exponent) = match digits.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => {
            (mantissa, exponent.parse::<i32>().ok().filter(|e| (-40..=40).contains(e))?)
        }
        None => (digits, 0),
    };
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let is_number = !whole.is_empty() && whole.bytes().chain(fraction.bytes()).all(|b| b.is_ascii_digit());
    if !is_number || whole.len() + fraction.len() > 38 {
        return None;
    }
    let number: i128 = format!("{whole}{fraction}").parse().ok()?;
    // The value in milliseconds is number · 10^scale.
    let scale = exponent - i32::try_from(fraction.len()).ok()? + 3 - unit.digits().cast_signed();
    let factor = 10i128.checked_pow(scale.unsigned_abs());
    let ms = match (scale >= 0, factor) {
        (true, factor) => number.checked_mul(factor?)?,
        (false, None) => 0,
        (false, Some(factor)) => number / factor,
    };
    i64::try_from(if negative { -ms } else { ms }).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// 2026-01-01T00:00:00Z.
    const T0: i64 = 1_767_225_600_000;

    fn reading(unit: TimeUnit, format: Option<&str>, zone: Option<&str>) -> TimeReading {
        TimeReading { unit, format: format.map(str::to_owned), zone: zone.map(|zone| zone.parse().unwrap()) }
    }

    fn check(text: &str, expected: i64) {
        assert_eq!(TimeReading::default().read(text), Ok(expected), "{text}");
    }

    #[test]
    fn rfc_3339_and_its_usual_variants_are_read() {
        for text in [
            "2026-01-01T00:00:03Z",
            "2026-01-01T00:00:03.000+0000",
            "2026-01-01T01:00:03+0100",
            "2026-01-01 01:00:03+01",
            "2026-01-01t00:00:03z",
            "2026-01-01 00:00:03 UTC",
            "2026-01-01T00:00:03,000Z",
            "Thu, 01 Jan 2026 00:00:03 GMT",
            "/Date(1767225603000)/",
            "/Date(1767225603000+0530)/",
            " 1767225603000 ",
            "1767225603000.9",
            "1.767225603e12",
        ] {
            check(text, T0 + 3000);
        }
        check("2026-01-01T00:00Z", T0);
        check("2026-01-01", T0);
        check("/Date(-1000)/", -1000);
    }

    #[test]
    fn unix_times_of_every_unit_keep_their_milliseconds() {
        let read = |unit, text: &str| reading(unit, None, None).read(text);
        assert_eq!(read(TimeUnit::Seconds, "1767225600.000247"), Ok(T0));
        assert_eq!(read(TimeUnit::Seconds, "1767225600.9999"), Ok(T0 + 999));
        assert_eq!(read(TimeUnit::Microseconds, "1767225600123999"), Ok(T0 + 123));
        assert_eq!(read(TimeUnit::Nanoseconds, "1767225600123999999"), Ok(T0 + 123));
        assert_eq!(read(TimeUnit::Seconds, "-1.5"), Ok(-1500));
        assert!(read(TimeUnit::Seconds, "1e400").is_err());
        assert!(read(TimeUnit::Seconds, "9223372036854775807").is_err());
    }

    #[test]
    fn local_times_need_a_zone() {
        let at = |text: &str, zone: Option<&str>| reading(TimeUnit::Milliseconds, None, zone).read(text);
        assert_eq!(at("2026-01-01T00:00:03.000", None), Err(TimeError::NoZone));
        assert_eq!(at("2026-01-01T00:00:03.000", Some("UTC")), Ok(T0 + 3000));
        assert_eq!(at("2026-01-01 01:00", Some("Europe/Berlin")), Ok(T0));
        assert_eq!(at("2026-01-01", Some("Europe/Berlin")), Ok(T0 - 3_600_000));
        assert_eq!(at("2026-01-01T00:00:03Z", Some("Europe/Berlin")), Ok(T0 + 3000), "an offset wins");
        let skipped = at("2026-03-29T02:30:00", Some("Europe/Berlin"));
        assert!(matches!(skipped, Err(TimeError::Skipped(_))), "{skipped:?}");
        let twice = at("2026-10-25T02:30:00", Some("Europe/Berlin"));
        assert_eq!(twice, at("2026-10-25T00:30:00Z", None), "the first of two");
    }

    #[test]
    fn declared_formats_are_read() {
        let at = |text: &str, format: &str, zone: Option<&str>| {
            reading(TimeUnit::Milliseconds, Some(format), zone).read(text)
        };
        assert_eq!(at("01.01.2026", "%d.%m.%Y", Some("UTC")), Ok(T0));
        assert_eq!(at("20260101010000", "%Y%m%d%H%M%S", Some("Europe/Berlin")), Ok(T0));
        assert_eq!(at("01/Jan/2026:01:00:00 +0100", "%d/%b/%Y:%H:%M:%S %z", None), Ok(T0));
        assert_eq!(at("01.01.2026", "%d.%m.%Y", None), Err(TimeError::NoZone));
        assert_eq!(at("yesterday", "%Y", Some("UTC")), Err(TimeError::OtherFormat("%Y".to_owned())));
        assert!(is_format("%Y-%m-%dT%H:%M:%S%.3f") && !is_format("%Q") && !is_format(""));
    }

    #[test]
    fn text_that_is_not_a_time_is_rejected() {
        for text in [
            "",
            "yesterday",
            "2026-13-01",
            "2026-01-01T25:00Z",
            "2026-01-01T00:00:00+25",
            "NaN",
            "1e",
            "--1",
            "/Date(x)/",
        ] {
            assert!(TimeReading::default().read(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in ".{0,30}", zone in any::<bool>()) {
            let reading = reading(TimeUnit::Seconds, None, zone.then_some("America/New_York"));
            let _ = reading.read(&text);
        }

        #[test]
        fn every_time_is_read_back_in_every_form(ms in 0i64..253_402_300_799_000) {
            let at = DateTime::from_timestamp_millis(ms).unwrap();
            for form in ["%Y-%m-%dT%H:%M:%S%.3fZ", "%Y-%m-%d %H:%M:%S%.3f+0000", "%Y-%m-%dT%H:%M:%S%.3f+00"] {
                prop_assert_eq!(TimeReading::default().read(&at.format(form).to_string()), Ok(ms));
            }
            prop_assert_eq!(TimeReading::default().read(&ms.to_string()), Ok(ms));
            let seconds = format!("{}.{:03}", ms / 1000, ms % 1000);
            prop_assert_eq!(TimeReading::seconds().read(&seconds), Ok(ms));
        }
    }
}
