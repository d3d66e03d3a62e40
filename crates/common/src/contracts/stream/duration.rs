//! Durations of a stream file: their text form and milliseconds.

/// Parses a duration such as `90s` or `1h 30m` to milliseconds. The error quotes the text.
pub(super) fn parse_duration(text: &str) -> Result<i64, String> {
    let invalid =
        || format!("`{text}` is not a duration; write for example \"90s\", \"10m\", \"1h 30m\" or \"365d\"");
    let duration = humantime::parse_duration(text).map_err(|_| invalid())?;
    i64::try_from(duration.as_millis()).map_err(|_| invalid())
}

/// The text form of milliseconds, such as `1h 30m`.
pub(super) fn format_ms(ms: i64) -> String {
    humantime::format_duration(std::time::Duration::from_millis(ms.unsigned_abs())).to_string()
}
