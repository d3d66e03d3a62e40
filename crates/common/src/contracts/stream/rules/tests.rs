//! Tests of the rules, by mistakes in a shipped stream file.

use super::super::{
    Auth, ContentMode, Definition, OffsetStep, PageOrder, Place, Schedule, Secret, SourceSettings,
};

const GOOD: &str = include_str!("../../../../../../streams/user_created.toml");

fn mistakes(text: &str) -> Vec<String> {
    Definition::parse("test.toml", text).expect_err("must be refused").problems
}

fn check(change: (&str, &str), expected: &str) {
    assert!(GOOD.contains(change.0), "`{}` is not in the file", change.0);
    let found = mistakes(&GOOD.replace(change.0, change.1));
    assert!(found.iter().any(|p| p.contains(expected)), "{expected} is not in {found:#?}");
}

#[test]
fn the_shipped_definitions_are_valid() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../streams");
    let files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|f| f.unwrap().path()).collect();
    assert!(files.len() >= 5);
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        if let Err(e) = Definition::parse(&file.display().to_string(), &text) {
            panic!("{e}");
        }
    }
}

#[test]
fn every_mistake_is_reported_with_its_key_and_a_remedy() {
    check(("every = ", "evry = "), "`stream.schedule.evry`: unknown key; use one of cron, every");
    check(
        ("every = \"1m\"", "every = \"1 fortnight\""),
        "`stream.schedule.every`: `1 fortnight` is not a duration",
    );
    check(("type = \"text\"", "type = \"number\""), "unknown CQL type `number`; use one of text, int");
    check(("kind = \"page\"", "kind = \"pages\""), "unknown value `pages`; use one of none, page");
    check(
        ("kind = \"page\"", "kind = \"cursor\", last_record = \"id\""),
        "`id` is not a JSON pointer; write `/id`",
    );
    check(("kind = \"page\"", "kind = \"cursor\""), "`source.pagination.pointer`: is missing");
    check(("results={page_size}", "results=500"), "`source.page_size`: no request contains `{page_size}`");
    check(("url = ", "body = { a = 1 }\nurl = "), "`source.body`: requires method = \"POST\"");
    check(("url = ", "query = { a = \"{each.x}\" }\nurl = "), "`{each.x}` is not a value of source.for_each");
    check(
        ("url = ", "for_each = { name = \"x\", values = [1] }\nurl = "),
        "`source.for_each`: no request uses it",
    );
    check(("pointer = \"/email\"", "pointer = \"parent:/email\""), "source.records needs a wildcard");
    check(("pointer = \"/email\"", "pointer = \"each:x\""), "`x` is not a value of source.for_each");
    check(
        ("pointer = \"/dob/age\"", "pointer = \"/dob/age\"\nunit = \"s\""),
        "only valid for type timestamp",
    );
    check(("pointer = \"/registered/date\"", "format = \"%Q\""), "`%Q` is not a strftime format");
    check(("pointer = \"/registered/date\"", "zone = \"Mars\""), "`Mars` is not a time zone");
    check(("required = true", "required = true\non_misfit = \"null\""), "cannot have on_misfit");
    check(
        ("time = \"interval\"", "time = \"interval\"\ntime_unit = \"s\""),
        "`event.time`: must be a JSON pointer if its unit",
    );
    check(
        ("time = \"interval\"", "accept = [\"avro\"]"),
        "`event.accept`: unknown value `avro`; use some of binary",
    );
    check(("time = \"interval\"", "accept = []"), "`event.accept`: is empty");
    let plain = ("time = \"interval\"", "accept = [\"plain\"]");
    check(plain, "`event.accept`: \"plain\" requires event.time");
    check(
        ("time = \"interval\"", "ahead = \"59m\""),
        "`event.ahead`: `59m` is out of range; use 1h to 1year",
    );
    check(("time = \"interval\"", "ahead = \"366d\""), "+ lateness + catch-up + event.ahead; use");
    check(("{interval.seed}", "{seed}"), "unknown placeholder `{seed}`");
    check(("pane = \"1m\"", "pane = \"7m\""), "does not divide the bucket");
    check(("lateness = \"10m\"", "lateness = \"1m\""), "less than 3 schedule intervals");
    check(
        ("catch_up = 10", "catch_up_limit = \"36d\""),
        "`stream.catch_up_limit`: 1month 5days 13h 26m 24s contains more than 50000 intervals; use at most 1month 4days",
    );
    check(("ttl = \"365d\"", "ttl = \"3d\""), "shorter than topic retention");
    check(("name = \"email\"", "name = \"event_id\""), "the pipeline reserves this name");
    check(("name = \"email\"", "name = \"token\""), "CQL reserves this name; choose another one and set");
    check(("name = \"user_created\"", "name = \"order\""), "CQL reserves `order`");
    check(("measures = [\"age\"]", "measures = [\"email\"]"), "a measure must be int, bigint or double");
}

/// The source of the shipped definition with this change.
fn source(change: (&str, &str)) -> SourceSettings {
    assert!(GOOD.contains(change.0), "`{}` is not in the file", change.0);
    Definition::parse("test.toml", &GOOD.replace(change.0, change.1)).unwrap().source
}

#[test]
fn every_kind_of_pagination_is_parsed() {
    let paged = "&page={page}\"\nallow_private = true\nrecords = \"/results\"\npage_size = 500\npagination = { kind = \"page\", first = 1, pages = 2 }";
    let by = |place: &str, pagination: &str| {
        let to = format!(
            "{place}\"\nallow_private = true\nrecords = \"/results\"\npage_size = 500\npagination = {{ {pagination} }}"
        );
        source((paged, &to)).pagination.order
    };
    let place = || Place::Pointer("/next".to_owned());
    assert_eq!(by("", "kind = \"none\""), PageOrder::None);
    assert_eq!(
        by("&skip={offset}", "kind = \"offset\""),
        PageOrder::Offset { first: 0, step: OffsetStep::Records }
    );
    assert_eq!(
        by(
            "&after={cursor}",
            "kind = \"cursor\", pointer = \"/next\", more = \"!/end\", total = \"header:X-T\""
        ),
        PageOrder::Cursor { next: place(), encoded: false }
    );
    assert_eq!(
        by("&after={cursor}", "kind = \"cursor\", pointer = \"header:X-Next\", encoded = true"),
        PageOrder::Cursor { next: Place::Header("x-next".to_owned()), encoded: true }
    );
    assert_eq!(by("", "kind = \"link_header\""), PageOrder::LinkHeader);
    assert_eq!(by("", "kind = \"next_url\", pointer = \"/next\""), PageOrder::NextUrl { next: place() });
}

#[test]
fn every_kind_of_authentication_is_parsed() {
    let text = str::to_owned;
    let auth = |line: &str| {
        source(("allow_private = true", &format!("allow_private = true\nauth = {{ {line} }}"))).auth
    };
    assert_eq!(auth("kind = \"none\""), Auth::None);
    let file = |name: &str| Secret::File(name.to_owned());
    assert_eq!(
        auth("kind = \"bearer\", token_file = \"/run/token\""),
        Auth::Bearer { token: file("/run/token") }
    );
    assert_eq!(
        auth("kind = \"bearer\", token_env = \"TOKEN\""),
        Auth::Bearer { token: Secret::Env("TOKEN".to_owned()) }
    );
    let user = text("me");
    assert_eq!(
        auth("kind = \"basic\", user = \"me\", password_file = \"/run/password\""),
        Auth::Basic { user, password: file("/run/password") }
    );
    let header = text("x-api-key");
    assert_eq!(
        auth("kind = \"api_key\", header = \"x-api-key\", key_file = \"/run/key\""),
        Auth::ApiKey { header, key: file("/run/key") }
    );
    let query = text("key");
    assert_eq!(
        auth("kind = \"api_key\", query = \"key\", key_file = \"/run/key\""),
        Auth::ApiKeyInQuery { query, key: file("/run/key") }
    );
    check(
        (
            "allow_private = true",
            "allow_private = true\nauth = { kind = \"api_key\", header = \"a\", query = \"b\", key_file = \"c\" }",
        ),
        "`source.auth.query`: set either `header` or `query`, not both",
    );
    check(
        ("allow_private = true", "allow_private = true\nauth = { kind = \"bearer\" }"),
        "`source.auth.token_file`: is missing; set it to a file with the secret, or set `token_env`",
    );
    let oauth = auth(
        "kind = \"oauth2\", token_url = \"https://h/token\", client_id = \"me\", client_secret_env = \"S\", scope = \"a\"",
    );
    let Auth::Token(request) = oauth else { panic!("{oauth:?}") };
    assert_eq!((request.url.as_str(), request.fields.len(), request.json), ("https://h/token", 3, false));
}

#[test]
fn a_secret_in_a_definition_is_refused_with_a_remedy_and_never_repeated() {
    let check = |change: (&str, &str), expected: &str| {
        let found = mistakes(&GOOD.replace(change.0, change.1));
        assert!(found.iter().any(|p| p.contains(expected)), "{expected} is not in {found:#?}");
        assert!(!found.iter().any(|p| p.contains("S3CRET")), "{found:#?}");
    };
    check(("127.0.0.1:8090", "ada:S3CRET@127.0.0.1:8090"), "password_file = ");
    check(("&page={page}", "&page={page}&api_key=S3CRET"), "parameter `api_key` looks like a secret");
    check(("&page={page}", "&page={page}&api_key=S3CRET"), "query = \"api_key\", key_file = ");
    check(
        ("allow_private = true", "allow_private = true\nheaders = { Authorization = \"Bearer S3CRET\" }"),
        "`source.headers`: `Authorization` looks like a secret",
    );
    check(("http://127.0.0.1:8090/api/?", "ftp://h/?token=S3CRET&"), "`ftp://h/?token=…&results=…");
}

#[test]
fn the_defaults_cover_an_outage_of_a_night_and_of_a_weekend() {
    let stream = |change: (&str, &str)| {
        assert!(GOOD.contains(change.0), "`{}` is not in the file", change.0);
        Definition::parse("test.toml", &GOOD.replace(change.0, change.1)).unwrap().stream
    };
    let shipped = stream(("catch_up = 10", "catch_up = 10"));
    let Schedule::Every(interval_ms) = shipped.schedule else { panic!("{shipped:?}") };
    assert!(shipped.catch_up_limit_ms / interval_ms >= 4320, "catch-up must cover three days");
    assert!(shipped.retry.deadline_ms >= 8 * 3_600_000 && shipped.retry.attempts.is_none(), "{shipped:?}");
    assert_eq!(shipped.catch_up, 10, "the first start must not fetch the whole catch-up limit");
    let often = stream(("every = \"1m\"", "every = \"1s\""));
    assert_eq!(often.catch_up_limit_ms, 50_000_000, "the limit is MAX_CATCH_UP_INTERVALS intervals");
    let few = stream(("backoff = \"1s\"", "backoff = \"1s\", attempts = 5"));
    assert_eq!(few.retry.attempts, Some(5));
}

#[test]
fn plain_records_are_accepted_only_if_they_contain_the_whole_event() {
    let orders = include_str!("../../../../../../streams/orders.toml");
    let accepting = |change: (&str, &str)| {
        assert!(orders.contains(change.0), "`{}` is not in the file", change.0);
        let accept = "[event]\naccept = [\"plain\", \"binary\", \"plain\"]";
        Definition::parse("orders.toml", &orders.replace(change.0, change.1).replace("[event]", accept))
    };
    let accepted = accepting(("", "")).unwrap().event.accept;
    assert_eq!(accepted, [ContentMode::Binary, ContentMode::Plain]);
    let check = |change: (&str, &str), expected: &str| {
        let found = accepting(change).expect_err("must be refused").problems;
        assert!(found.iter().any(|p| p.contains(expected)), "{expected} is not in {found:#?}");
    };
    check(("id = \"/order/id\"\n", ""), "`event.accept`: \"plain\" requires event.id");
    let around = "a plain record has no page around it, so pointer `page:/status` leads nowhere";
    check(("pointer = \"/order/status\"", "pointer = \"page:/status\""), around);
}

#[test]
fn one_error_lists_all_mistakes() {
    let found =
        mistakes("[stream]\nname = \"A\"\ntypo = 1\n[event]\ntime = \"now\"\n[store]\nbucket = \"2h\"");
    for part in
        ["`stream.typo`", "`stream.name`", "`source.url`", "`event.time`", "`store.bucket`", "`column`"]
    {
        assert!(found.iter().any(|p| p.contains(part)), "{part} is not in {found:#?}");
    }
}
