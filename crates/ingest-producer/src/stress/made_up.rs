//! Synthetic events with the columns of a definition, cheap enough for hundreds of thousands of events per second.
//! Values are built once into a pool, and ids and times are written into reused buffers.

use chrono::{DateTime, SecondsFormat};
use chrono_tz::Tz;
use common::contracts::stream::{Column, CqlType, Definition, Groups};
use serde_json::{Map, Value};

/// Number of distinct values. More values would not change the compression ratio.
const POOL: usize = 2048;
/// Maximum distance of a repeated message from its original, in messages.
const RECENT: usize = 4096;

const FIRST: &str =
    "Ava|Liam|Freja|Jonas|Léa|Hugo|Aoife|Daan|Ingrid|Onni|Meera|Arjun|Zeynep|Luka|Camila|Mateo|Олена|Тарас";
const LAST: &str =
    "Nguyen|Tremblay|Jensen|Fischer|Moreau|García|O'Brien|Visser|Berg|Korhonen|Nair|Demir|Ilić|Souza|Мороз";
const PLACES: &str = "Australia/Perth/AU|Brazil/Recife/BR|Canada/Halifax/CA|Switzerland/Bern/CH|Germany/Kassel/DE|\
                      Denmark/Odense/DK|Spain/Vigo/ES|Finland/Oulu/FI|France/Dijon/FR|United Kingdom/Leeds/GB|\
                      Ireland/Sligo/IE|India/Kochi/IN|Mexico/Oaxaca/MX|Netherlands/Utrecht/NL|Norway/Bergen/NO|\
                      New Zealand/Nelson/NZ|Serbia/Niš/RS|Turkey/Bursa/TR|Ukraine/Львів/UA|United States/Austin/US";

/// The pool of values.
#[derive(Debug)]
pub(super) struct Pool {
    values: Vec<Vec<u8>>,
}

impl Pool {
    pub(super) fn new(definition: &Definition, payload_bytes: Option<u32>) -> Pool {
        let min_bytes = payload_bytes.map_or(0, |bytes| bytes as usize);
        Pool { values: (0..POOL as u64).map(|n| value(definition, n, min_bytes)).collect() }
    }

    pub(super) fn value(&self, index: u64) -> &[u8] {
        // Consecutive messages differ.
        &self.values[index as usize % POOL]
    }

    /// Mean size of a value in bytes.
    pub(super) fn value_bytes(&self) -> u64 {
        self.values.iter().map(|v| v.len() as u64).sum::<u64>() / POOL as u64
    }
}

fn value(definition: &Definition, n: u64, min_bytes: usize) -> Vec<u8> {
    let mut object: Map<String, Value> = definition
        .columns
        .iter()
        .zip(1..)
        .map(|(c, salt)| (c.name.clone(), cell(definition, c, n, salt)))
        .collect();
    let mut bytes = Value::Object(object.clone()).to_string().into_bytes();
    // Length of `,"padding":""`.
    const FRAME: usize = 13;
    if bytes.len() + FRAME <= min_bytes {
        object.insert("padding".to_owned(), "x".repeat(min_bytes - bytes.len() - FRAME).into());
        bytes = Value::Object(object).to_string().into_bytes();
    }
    bytes
}

/// A plausible value, chosen by the declared groups of the column if there are any, otherwise by its name, otherwise
/// by its type.
fn cell(definition: &Definition, column: &Column, n: u64, salt: u64) -> Value {
    let draw = mix(n.wrapping_mul(1000).wrapping_add(salt));
    let group = definition.windows.group_by.iter().find(|g| g.column == column.name);
    match group.map(|g| &g.groups) {
        Some(Groups::Values(values)) if column.cql_type == CqlType::Text => {
            return values[draw as usize % values.len()].clone().into();
        }
        Some(Groups::Step { from, step, count }) => {
            let number = from + step * f64::from(*count) * fraction(draw);
            return if column.cql_type == CqlType::Double { number.into() } else { (number as i64).into() };
        }
        _ => {}
    }
    // All columns of a person derive from the same draw, so that they are consistent.
    let person = mix(n);
    let place = || pick(PLACES, mix(person)).split('/');
    match (column.name.as_str(), column.cql_type) {
        ("first_name", CqlType::Text) => pick(FIRST, person).into(),
        ("last_name", CqlType::Text) => pick(LAST, person >> 16).into(),
        ("country", CqlType::Text) => place().next().into(),
        ("city", CqlType::Text) => place().nth(1).into(),
        ("email", CqlType::Text) => format!("user{}@example.com", person % 1_000_000).into(),
        ("username", CqlType::Text) => format!("happyduck{}", person % 10_000).into(),
        ("postcode", CqlType::Text) => (10_000 + person % 89_999).into(),
        ("age", _) => (18 + person % 72).into(),
        (_, CqlType::Text) => format!("{}-{}", column.name, draw % 1000).into(),
        (_, CqlType::Int) => (draw % 1000).into(),
        (_, CqlType::Decimal) => format!("{}.{:02}", draw % 1000, draw / 1000 % 100).into(),
        (_, CqlType::Json) => serde_json::json!([draw % 10]),
        (_, CqlType::Bigint | CqlType::Varint) => (draw % 1_000_000_000).into(),
        (_, CqlType::Double) => ((fraction(draw) * 100_000.0).round() / 100.0).into(),
        (_, CqlType::Boolean) => (draw.is_multiple_of(2)).into(),
        (_, CqlType::Timestamp) => {
            time_text(column, 1_300_000_000_000 + (draw % 450_000_000_000) as i64).into()
        }
        (_, CqlType::Uuid) => {
            uuid::Uuid::from_u128(u128::from(draw) << 64 | u128::from(person)).to_string().into()
        }
    }
}

fn pick(list: &'static str, draw: u64) -> &'static str {
    let count = list.split('|').count();
    list.split('|').nth(draw as usize % count).unwrap_or(list)
}

fn fraction(draw: u64) -> f64 {
    (draw >> 11) as f64 / (1u64 << 53) as f64
}

/// The finalizer of SplitMix64, which turns consecutive numbers into unrelated ones.
fn mix(n: u64) -> u64 {
    let z = n.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A time in the format that the column declares.
fn time_text(column: &Column, ms: i64) -> String {
    let at = DateTime::from_timestamp_millis(ms).unwrap_or_default();
    match &column.reading.format {
        Some(format) => at.with_timezone(&column.reading.zone.unwrap_or(Tz::UTC)).format(format).to_string(),
        None => rfc3339(ms),
    }
}

fn rfc3339(ms: i64) -> String {
    DateTime::from_timestamp_millis(ms).unwrap_or_default().to_rfc3339_opts(SecondsFormat::Millis, true)
}

/// Id and event time of a message as text, in reused buffers.
#[derive(Debug)]
pub(super) struct Identity {
    /// Upper half of the ids, unique for each run and sender.
    high: u64,
    index: u64,
    id: [u8; 36],
    time_ms: i64,
    time: String,
}

impl Identity {
    pub(super) fn new(sender: u64) -> Identity {
        let high = mix(uuid::Uuid::new_v4().as_u64_pair().0 ^ sender);
        Identity { high, index: 0, id: [0; 36], time_ms: -1, time: String::new() }
    }

    /// Switches to the message with number `index`.
    pub(super) fn set(&mut self, index: u64, time_ms: i64) {
        self.index = index;
        // UUID version 8 (RFC 9562) is meant for custom ids. The builder sets only the version and variant bits.
        let bits = u128::from(self.high) << 64 | u128::from(mix(index));
        let id = uuid::Builder::from_custom_bytes(bits.to_be_bytes()).into_uuid();
        id.hyphenated().encode_lower(&mut self.id);
        if self.time_ms != time_ms {
            self.time_ms = time_ms;
            self.time = rfc3339(time_ms);
        }
    }

    pub(super) fn id(&self) -> &[u8] {
        &self.id
    }

    pub(super) fn index(&self) -> u64 {
        self.index
    }

    pub(super) fn time(&self) -> &[u8] {
        self.time.as_bytes()
    }
}

/// What identifies a message within its sender.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Number {
    pub(super) index: u64,
    pub(super) time_ms: i64,
}

/// Chooses which messages repeat an earlier one.
#[derive(Debug)]
pub(super) struct Repeats {
    percent: u64,
    recent: Vec<Number>,
}

impl Repeats {
    pub(super) fn new(percent: u8) -> Repeats {
        Repeats { percent: u64::from(percent), recent: Vec::new() }
    }

    /// The message to send at position `index`: the message itself, or one of the last [`RECENT`].
    pub(super) fn choose(&mut self, index: u64, time_ms: i64) -> Number {
        let own = Number { index, time_ms };
        if self.percent == 0 {
            return own;
        }
        let draw = mix(index);
        if draw % 100 < self.percent && !self.recent.is_empty() {
            return self.recent[(draw >> 32) as usize % self.recent.len()];
        }
        if self.recent.len() < RECENT {
            self.recent.push(own);
        } else {
            self.recent[index as usize % RECENT] = own;
        }
        own
    }
}

/// Formats `number` in decimal digits.
pub(super) fn decimal(mut number: u64, buffer: &mut [u8; 20]) -> &[u8] {
    let mut at = buffer.len();
    loop {
        at -= 1;
        buffer[at] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            return &buffer[at..];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use common::contracts::value;
    use std::collections::HashSet;

    fn users() -> Definition {
        Definition::parse("users", include_str!("../../../../streams/user_created.toml")).unwrap()
    }

    fn orders() -> Definition {
        Definition::parse("orders", include_str!("../../../../streams/orders.toml")).unwrap()
    }

    #[test]
    fn every_declared_column_has_a_value_of_its_type() {
        for definition in [users(), orders()] {
            let pool = Pool::new(&definition, None);
            for index in 0..POOL as u64 {
                let value: Map<String, Value> = serde_json::from_slice(pool.value(index)).unwrap();
                for column in &definition.columns {
                    let cell = &value[&column.name];
                    let fits = value::encode(&cell.to_string(), column, &mut Vec::new());
                    assert_eq!(fits, Ok(true), "{}: {cell}", column.name);
                }
            }
        }
    }

    #[test]
    fn values_are_padded_to_the_requested_size() {
        let pool = Pool::new(&users(), Some(600));
        assert!((0..50).all(|n| pool.value(n).len() == 600));
        assert!(
            Pool::new(&users(), Some(10)).value_bytes() > 150,
            "a value is never shorter than its columns"
        );
    }

    #[test]
    fn ids_are_valid_and_unique() {
        let (mut first, mut second) = (Identity::new(0), Identity::new(1));
        let mut seen = HashSet::new();
        for index in 0..2000 {
            for identity in [&mut first, &mut second] {
                identity.set(index, 1_767_225_600_123);
                let id = uuid::Uuid::try_parse_ascii(identity.id()).unwrap();
                assert_eq!(
                    (id.get_version_num(), identity.time()),
                    (8, b"2026-01-01T00:00:00.123Z".as_slice())
                );
                assert!(seen.insert(id));
            }
        }
        first.set(7, 0);
        assert!(
            !seen.insert(uuid::Uuid::try_parse_ascii(first.id()).unwrap()),
            "the same number has the same id"
        );
    }

    #[test]
    fn the_requested_share_of_messages_repeats_earlier_ones_unchanged() {
        let mut repeats = Repeats::new(10);
        let mut seen = std::collections::HashMap::new();
        let mut repeated = 0;
        for index in 0..20_000u64 {
            let chosen = repeats.choose(index, index as i64);
            repeated += u32::from(chosen.index != index);
            assert_eq!(*seen.entry(chosen.index).or_insert(chosen), chosen);
        }
        assert!((1800..2200).contains(&repeated), "{repeated}");
        let mut none = Repeats::new(0);
        assert!((0..1000).all(|index| none.choose(index, 0).index == index));
    }

    #[test]
    fn numbers_are_formatted_in_decimal() {
        for number in [0, 7, 10, 1_767_225_600_123_456, u64::MAX] {
            assert_eq!(decimal(number, &mut [0; 20]), number.to_string().as_bytes());
        }
    }
}
