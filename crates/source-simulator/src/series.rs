//! Time series in the formats of two well-known public APIs: candlesticks of Binance and hourly weather of Open-Meteo.
//! Every minute or hour has exactly one value, which depends on its time alone. Pure.

use super::random::Random;
use chrono::{DateTime, NaiveDate};
use serde_json::{Value, json};

/// Length of a candlestick in milliseconds.
pub const KLINE_MS: i64 = 60_000;
/// Maximum number of candlesticks per request, as in the real API.
pub const MAX_KLINES: usize = 1000;
/// Maximum number of days per request.
const MAX_DAYS: i64 = 31;

/// Returns the candlesticks of a symbol that open in `[from_ms, to_ms]`, oldest first, at most `limit`.
pub fn klines(symbol: &str, from_ms: i64, to_ms: i64, limit: usize) -> Vec<Value> {
    let first = from_ms.max(0).div_euclid(KLINE_MS) + i64::from(from_ms.rem_euclid(KLINE_MS) > 0);
    let opens = (first..).map(|number| number * KLINE_MS).take_while(|open_ms| *open_ms <= to_ms);
    opens.take(limit.min(MAX_KLINES)).map(|open_ms| kline(symbol, open_ms)).collect()
}

fn kline(symbol: &str, open_ms: i64) -> Value {
    let random = &mut Random::new(symbol, &[open_ms.unsigned_abs()]);
    let open = 100.0 + random.fraction() * 50.0;
    let close = open + random.fraction() - 0.5;
    let price = |value: f64| format!("{value:.8}");
    let (trades, volume) = (random.below(900), random.fraction() * 1000.0);
    json!([
        open_ms,
        price(open),
        price(open.max(close) + random.fraction()),
        price(open.min(close) - random.fraction()),
        price(close),
        price(volume),
        open_ms + KLINE_MS - 1,
        price(volume * open),
        trades,
        price(volume / 2.0),
        price(volume * open / 2.0),
        "0",
    ])
}

/// Returns the hours of all days from `from` to `to`, both inclusive, with one array per variable. `None` if the span is
/// invalid.
pub fn weather(from: NaiveDate, to: NaiveDate) -> Option<Value> {
    if !(0..MAX_DAYS).contains(&(to - from).num_days()) {
        return None;
    }
    let first_s = from.and_hms_opt(0, 0, 0)?.and_utc().timestamp();
    let hours = ((to - from).num_days() + 1) * 24;
    let (mut times, mut degrees, mut humidity, mut rain) = (vec![], vec![], vec![], vec![]);
    for at_s in (0..hours).map(|hour| first_s + hour * 3600) {
        let random = &mut Random::new("weather", &[at_s.unsigned_abs()]);
        times.push(DateTime::from_timestamp(at_s, 0)?.format("%Y-%m-%dT%H:%M").to_string());
        degrees.push((random.below(300) as f64 - 50.0) / 10.0);
        humidity.push(30 + random.below(70));
        rain.push(if random.below(5) == 0 { random.below(80) as f64 / 10.0 } else { 0.0 });
    }
    Some(json!({
        "latitude": 52.52,
        "longitude": 13.41,
        "utc_offset_seconds": 0,
        "timezone": "GMT",
        "hourly_units": {"time": "iso8601", "temperature_2m": "°C", "relative_humidity_2m": "%", "precipitation": "mm"},
        "hourly": {
            "time": times,
            "temperature_2m": degrees,
            "relative_humidity_2m": humidity,
            "precipitation": rain,
        },
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const START_MS: i64 = 1_767_225_600_000;

    #[test]
    fn adjacent_intervals_neither_share_nor_miss_a_candlestick() {
        let hour = 3_600_000;
        let whole = klines("BTCUSDT", START_MS, START_MS + hour - 1, MAX_KLINES);
        let cut = START_MS + 30 * KLINE_MS + 7;
        let halves = [
            klines("BTCUSDT", START_MS, cut - 1, MAX_KLINES),
            klines("BTCUSDT", cut, START_MS + hour - 1, MAX_KLINES),
        ];
        assert_eq!((whole.len(), whole), (60, halves.concat()));
        assert_ne!(klines("BTCUSDT", START_MS, START_MS, 1), klines("ETHUSDT", START_MS, START_MS, 1));
    }

    #[test]
    fn every_day_has_24_hours() {
        let day = |text: &str| text.parse::<NaiveDate>().unwrap();
        let found = weather(day("2026-01-01"), day("2026-01-02")).unwrap();
        for variable in ["time", "temperature_2m", "relative_humidity_2m", "precipitation"] {
            assert_eq!(found["hourly"][variable].as_array().unwrap().len(), 48, "{variable}");
        }
        assert_eq!(found["hourly"]["time"][47], "2026-01-02T23:00");
        assert_eq!(weather(day("2026-01-02"), day("2026-01-01")), None);
    }
}
