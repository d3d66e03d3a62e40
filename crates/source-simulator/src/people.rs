//! People in the format of randomuser.me. The seed, the page and the index determine each person. Pure.

use super::faults::Answer;
use super::names::{NATIONALITIES, Nationality, Postcode};
use super::random::Random;
use chrono::{DateTime, Datelike, SecondsFormat};
use serde_json::{Value, json};

/// Ages are calculated as of this day, 2026-07-01, so that a person never changes.
const REFERENCE_MS: i64 = 1_782_864_000_000;
const DAY_MS: i64 = 86_400_000;
const ADJECTIVES: &str = "yellow|silver|happy|lazy|tiny|angry|beautiful|organic|purple|sad|ticklish|brown";
const ANIMALS: &str = "peacock|tiger|rabbit|bear|duck|wolf|butterfly|zebra|koala|goose|elephant|swan";
const PASSWORDS: &str = "addison|bigdaddy|sunshine|walnut|topgun|lakota|indigo|harley|wizard|bonjour";

/// Returns the body of a response: `count` people of a page, changed according to `answer`, and the info block.
pub fn page(seed: &str, page: u64, count: u64, answer: Answer) -> Value {
    let mut people: Vec<Value> = (0..count).map(|index| person(seed, page, index)).collect();
    match answer {
        _ if page != 1 => {}
        Answer::AsBefore => {}
        Answer::OneMore => people.insert(0, person(seed, page, count)),
        Answer::OneLess => drop(people.remove(0)),
        Answer::OneChanged => people[0]["name"]["first"] = "Changed".into(),
    }
    json!({"results": people, "info": {"seed": seed, "results": count, "page": page, "version": "1.4"}})
}

/// Returns the person with this page and index for a seed.
pub fn person(seed: &str, page: u64, index: u64) -> Value {
    let random = &mut Random::new(seed, &[page, index]);
    let country = &NATIONALITIES[random.below(NATIONALITIES.len() as u64) as usize];
    let female = random.below(2) == 0;
    let first = random.pick(if female { country.female } else { country.male });
    let last = random.pick(country.last);
    let title = if female { random.pick("Miss|Mrs|Ms|Madame") } else { random.pick("Mr|Monsieur|Mr|Mr") };
    let born = born(random);
    let age = age(born);
    // People register at most 24 years before the reference day, and never after it.
    let registered =
        REFERENCE_MS - (random.below(24 * 365) as i64) * DAY_MS - random.below(DAY_MS as u64) as i64;
    let username = format!("{}{}{}", random.pick(ADJECTIVES), random.pick(ANIMALS), 100 + random.below(900));
    let portrait = format!("{}/{}.jpg", if female { "women" } else { "men" }, random.below(100));
    json!({
        "gender": if female { "female" } else { "male" },
        "name": {"title": title, "first": first, "last": last},
        "location": location(random, country),
        "email": email(first, last, &username),
        "login": {
            "uuid": random.uuid().to_string(),
            "username": username,
            "password": random.pick(PASSWORDS),
            "salt": random.hex(8),
            "md5": random.hex(32),
            "sha1": random.hex(40),
            "sha256": random.hex(64),
        },
        "dob": {"date": rfc3339(born), "age": age},
        "registered": {"date": rfc3339(registered), "age": (REFERENCE_MS - registered) / (365 * DAY_MS)},
        "phone": random.fill(country.phone),
        "cell": random.fill(country.phone),
        "id": {"name": "", "value": null},
        "picture": {
            "large": format!("https://randomuser.me/api/portraits/{portrait}"),
            "medium": format!("https://randomuser.me/api/portraits/med/{portrait}"),
            "thumbnail": format!("https://randomuser.me/api/portraits/thumb/{portrait}"),
        },
        "nat": country.code,
    })
}

/// Returns a birthday 18 to 90 years before the reference day, in Unix milliseconds. Younger people are more frequent.
fn born(random: &mut Random) -> i64 {
    let years = 18.0 + 72.0 * random.fraction().powf(1.6);
    REFERENCE_MS - (years * 365.2425 * DAY_MS as f64) as i64
}

/// Returns the age in full years on the reference day.
fn age(born_ms: i64) -> i32 {
    let day = |ms| DateTime::from_timestamp_millis(ms).unwrap_or_default();
    let (born, reference) = (day(born_ms), day(REFERENCE_MS));
    let before_birthday = (reference.month(), reference.day()) < (born.month(), born.day());
    reference.year() - born.year() - i32::from(before_birthday)
}

fn location(random: &mut Random, country: &Nationality) -> Value {
    let (city, state) = random.pick(country.cities).split_once('/').unwrap_or_default();
    let postcode = match country.postcode {
        Postcode::Text(pattern) => Value::from(random.fill(pattern)),
        Postcode::Number(pattern) => Value::from(random.fill(pattern).parse::<u32>().unwrap_or_default()),
    };
    json!({
        "street": {"number": 1 + random.below(9999), "name": random.pick(country.streets)},
        "city": city,
        "state": state,
        "country": country.country,
        "postcode": postcode,
        "coordinates": {
            "latitude": format!("{:.4}", random.fraction() * 180.0 - 90.0),
            "longitude": format!("{:.4}", random.fraction() * 360.0 - 180.0),
        },
        "timezone": {"offset": country.timezone.0, "description": country.timezone.1},
    })
}

/// Returns `first.last@example.com` in ASCII. If a name cannot be written in ASCII, the user name is used instead.
fn email(first: &str, last: &str, username: &str) -> String {
    let plain = |name: &str| -> String {
        name.chars()
            .filter_map(ascii)
            .map(|c| c.to_ascii_lowercase())
            .filter(char::is_ascii_alphanumeric)
            .collect()
    };
    let (first, last) = (plain(first), plain(last));
    if first.is_empty() || last.is_empty() {
        return format!("{username}@example.com");
    }
    format!("{first}.{last}@example.com")
}

fn ascii(c: char) -> Option<char> {
    const PLAIN: [(&str, char); 11] = [
        ("áàâãäåæ", 'a'),
        ("éèêë", 'e'),
        ("íìîïı", 'i'),
        ("óòôõöø", 'o'),
        ("úùûü", 'u'),
        ("çćč", 'c'),
        ("ñ", 'n'),
        ("šşß", 's'),
        ("ž", 'z'),
        ("đ", 'd'),
        ("ğ", 'g'),
    ];
    if c.is_ascii() {
        return Some(c);
    }
    let lower = c.to_lowercase().next().unwrap_or(c);
    if lower.is_ascii() {
        return Some(lower);
    }
    PLAIN.iter().find(|(from, _)| from.contains(lower)).map(|(_, to)| *to)
}

fn rfc3339(ms: i64) -> String {
    DateTime::from_timestamp_millis(ms).unwrap_or_default().to_rfc3339_opts(SecondsFormat::Millis, true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_person_depends_only_on_seed_page_and_index() {
        assert_eq!(person("a", 1, 0), person("a", 1, 0));
        let others = [person("b", 1, 0), person("a", 2, 0), person("a", 1, 1)];
        assert!(others.iter().all(|other| other["login"]["uuid"] != person("a", 1, 0)["login"]["uuid"]));
        let of = |count| page("a", 1, count, Answer::AsBefore)["results"][4].clone();
        assert_eq!(of(5), of(500));
    }

    #[test]
    fn a_changed_answer_leaves_all_other_people_unchanged() {
        let people = |answer, number| page("a", number, 3, answer)["results"].as_array().unwrap().clone();
        let before = people(Answer::AsBefore, 1);
        assert_eq!(people(Answer::OneMore, 1)[1..], before);
        assert_eq!(people(Answer::OneLess, 1), before[1..]);
        let changed = people(Answer::OneChanged, 1);
        assert_eq!((&changed[0]["login"], &changed[1..]), (&before[0]["login"], &before[1..]));
        assert_ne!(changed[0], before[0]);
        assert_eq!(people(Answer::OneMore, 2), people(Answer::AsBefore, 2));
    }

    #[test]
    fn people_are_plausible() {
        let body = page("plausible", 3, 2000, Answer::AsBefore);
        let people = body["results"].as_array().unwrap();
        let mut nationalities = std::collections::BTreeSet::new();
        let mut postcodes = [0, 0];
        for person in people {
            nationalities.insert(person["nat"].as_str().unwrap());
            let age = person["dob"]["age"].as_i64().unwrap();
            assert!((18..=90).contains(&age), "{person}");
            let email = person["email"].as_str().unwrap();
            assert!(email.is_ascii() && email.ends_with("@example.com"), "{email}");
            assert!(person["location"]["state"].as_str().is_some_and(|s| !s.is_empty()), "{person}");
            postcodes[usize::from(person["location"]["postcode"].is_string())] += 1;
        }
        assert_eq!(nationalities.len(), 21);
        assert!(
            postcodes[0] > postcodes[1] && postcodes[1] > 100,
            "both numeric and text postcodes must occur: {postcodes:?}"
        );
    }

    #[test]
    fn the_first_person_matches_the_snapshot() {
        insta::assert_json_snapshot!(person("snapshot", 1, 0));
    }
}
