//! Tests of the client against a server with all kinds of invalid responses.

use super::*;
use crate::error::Kind;
use common::contracts::stream::{Auth, Definition, Secret, TokenRequest};
use wiremock::matchers::{body_string, header as has_header, method, path, query_param};
use wiremock::{Mock, MockServer, ResponseTemplate};

fn source(change: impl FnOnce(&mut SourceSettings)) -> SourceSettings {
    let text = include_str!("../../../../streams/user_created.toml");
    let mut source = Definition::parse("test", text).unwrap().source;
    source.limits.page_bytes = 10_000;
    source.limits.request_timeout_ms = 400;
    change(&mut source);
    source
}

fn get(url: &str) -> PageRequest {
    PageRequest { post: false, url: url.parse().unwrap(), body: None }
}

async fn serve(answer: ResponseTemplate) -> MockServer {
    let server = MockServer::start().await;
    Mock::given(method("GET")).respond_with(answer).mount(&server).await;
    server
}

async fn fetch(answer: ResponseTemplate) -> Result<Page, AttemptError> {
    let server = serve(answer).await;
    SourceClient::new(&source(|_| {})).unwrap().fetch(&get(&server.uri())).await
}

async fn check(answer: ResponseTemplate, kind: Kind, expected: &str) -> AttemptError {
    let error = fetch(answer).await.expect_err(expected);
    assert_eq!(error.kind, kind, "{error}");
    assert!(error.cause.contains(expected), "`{expected}` is not in `{error}`");
    error
}

fn status(code: u16) -> ResponseTemplate {
    ResponseTemplate::new(code)
}

#[tokio::test]
async fn a_page_has_its_link_header_and_size() {
    let page = fetch(
        status(200)
            .append_header("link", "</2>; rel=next")
            .append_header("link", "</3>")
            .set_body_string("{\"a\": 1}"),
    )
    .await
    .unwrap();
    let link = page.headers.get("link");
    assert_eq!(
        (page.json(), link.as_deref(), page.bytes),
        (b"{\"a\": 1}".as_slice(), Some("</2>; rel=next, </3>"), 8)
    );
    let empty = fetch(status(204)).await.unwrap();
    assert_eq!(empty.json(), b"");
}

#[tokio::test]
async fn only_errors_that_may_pass_are_retryable() {
    check(status(500), Kind::Retryable, "500").await;
    check(status(503), Kind::Retryable, "503").await;
    check(status(408), Kind::Retryable, "408").await;
    check(status(404), Kind::Fatal, "404").await;
    check(status(401), Kind::Fatal, "401").await;
    let cut = "the page of 13 bytes (text/plain) is not valid JSON at byte 13: the text ends inside brackets";
    check(status(200).set_body_string("{\"results\": ["), Kind::Retryable, cut).await;
    check(status(200).set_body_string("Bad Gateway"), Kind::Retryable, "not valid JSON at byte 0").await;
    check(status(200).set_body_string("[".repeat(5000)), Kind::Retryable, "the text ends inside brackets")
        .await;
    let slow = status(200).set_body_string("[]").set_delay(Duration::from_secs(5));
    check(slow, Kind::Retryable, "no complete response within 0.4 s").await;
}

#[tokio::test]
async fn a_failure_has_the_words_of_the_source_and_says_when_to_retry() {
    let error = check(status(429).insert_header("retry-after", "7"), Kind::Retryable, "429").await;
    assert_eq!((error.retry_after_ms, error.http_status), (Some(7000), Some(429)));
    let words = status(400).set_body_string("{\"error\":\r\n \"Invalid date\"}");
    check(words, Kind::Fatal, "the source returned 400 Bad Request: {\"error\":   \"Invalid date\"}").await;
    let long = check(status(500).set_body_string("ä".repeat(5000)), Kind::Retryable, "500").await;
    assert!(long.cause.chars().count() < 260, "{long}");
    let limited = status(403).insert_header("retry-after", "2");
    assert_eq!(check(limited, Kind::Retryable, "403").await.retry_after_ms, Some(2000));
    check(status(403).insert_header("x-ratelimit-remaining", "0"), Kind::Retryable, "403").await;
    check(status(403), Kind::Fatal, "403").await;
}

#[test]
fn the_pause_until_a_retry_is_read_from_every_usual_header() {
    let now_ms = 1_445_412_470_000;
    let wait = |headers: &[(&str, &str)], named: Option<&str>| {
        let headers = headers.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
        wait_ms(&Headers(headers), named, now_ms)
    };
    let check = |value: &str, expected: Option<i64>| {
        for name in ["retry-after", "x-ratelimit-reset", "ratelimit-reset"] {
            assert_eq!(wait(&[(name, value)], None), expected, "{name}: {value}");
        }
        assert_eq!(wait(&[("x-own", value), ("retry-after", "1")], Some("x-own")), expected, "{value}");
    };
    check("Wed, 21 Oct 2015 07:28:00 GMT", Some(10_000));
    check("Wed, 21 Oct 2015 07:27:00 GMT", Some(0));
    check("30", Some(30_000));
    check("0.5", Some(500));
    check("1445412480", Some(10_000));
    check("1445412480000", Some(10_000));
    check("99999999", Some(MAX_WAIT_MS));
    check("soon", None);
    check("NaN", None);
    let reset = ("x-ratelimit-reset", "30");
    assert_eq!(wait(&[reset, ("x-ratelimit-remaining", "12")], None), None, "requests are left");
    assert_eq!(wait(&[reset, ("x-ratelimit-remaining", "0")], None), Some(30_000));
}

#[tokio::test]
async fn statuses_mean_what_the_definition_says() {
    let fetch = async |code: u16| {
        let server = serve(status(code).set_body_string("[]")).await;
        let source = source(|s| {
            s.statuses =
                Statuses { retry: vec![202, 404], fail: vec![500], empty: vec![410], end: vec![400] };
        });
        SourceClient::new(&source).unwrap().fetch(&get(&server.uri())).await
    };
    for (code, kind) in
        [(202, Kind::Retryable), (404, Kind::Retryable), (500, Kind::Fatal), (400, Kind::Fatal)]
    {
        assert_eq!(fetch(code).await.unwrap_err().kind, kind, "{code}");
    }
    assert_eq!(fetch(410).await.unwrap().json(), b"");
    assert_eq!(fetch(200).await.unwrap().json(), b"[]");
}

#[tokio::test]
async fn bodies_are_bounded_before_and_after_decompression() {
    check(status(200).set_body_bytes(vec![b' '; 10_001]), Kind::Fatal, "larger than 10000 bytes; raise")
        .await;
    let unknown = status(200).insert_header("content-encoding", "compress").set_body_string("x");
    check(unknown, Kind::Fatal, "content-encoding `compress`; gzip, deflate, br and zstd").await;
}

#[tokio::test]
async fn a_redirect_is_not_followed() {
    let inside = "http://169.254.169.254/latest/meta-data/";
    check(status(302).insert_header("location", inside), Kind::Fatal, inside).await;
}

#[tokio::test]
async fn a_refused_connection_is_retryable() {
    let client = SourceClient::new(&source(|_| {})).unwrap();
    let error = client.fetch(&get("http://127.0.0.1:1/")).await.unwrap_err();
    assert_eq!(error.kind, Kind::Retryable);
    assert!(error.cause.contains("refused"), "{error}");
}

#[tokio::test]
async fn private_addresses_are_rejected_as_literals_and_as_names() {
    let client = SourceClient::new(&source(|s| s.allow_private = false)).unwrap();
    let inside = [
        "127.0.0.1",
        "10.1.2.3",
        "2130706433",
        "0x7f.1",
        "[::1]",
        "[::ffff:192.168.0.1]",
        "localhost",
        "100.64.0.1",
    ];
    for host in inside {
        let error = client.fetch(&get(&format!("http://{host}:9/"))).await.expect_err(host);
        assert_eq!(error.kind, Kind::Fatal, "{host}: {error}");
        assert!(error.cause.contains("is a private address"), "{host}: {error}");
    }
}

#[tokio::test]
async fn requests_are_authenticated_as_the_definition_specifies() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("secret").display().to_string();
    std::fs::write(&file, "open sesame\n").unwrap();
    let cases = [
        (Auth::Bearer { token: Secret::File(file.clone()) }, "authorization", "Bearer open sesame"),
        (
            Auth::Basic { user: "ali".into(), password: Secret::File(file.clone()) },
            "authorization",
            "Basic YWxpOm9wZW4gc2VzYW1l",
        ),
        (Auth::ApiKey { header: "X-Key".into(), key: Secret::File(file.clone()) }, "x-key", "open sesame"),
    ];
    for (auth, name, value) in cases {
        let server = MockServer::start().await;
        let expected = Mock::given(has_header(name, value)).and(has_header("x-own", "1"));
        expected.respond_with(status(200).set_body_string("[]")).mount(&server).await;
        let source = source(|s| {
            s.auth = auth;
            s.headers = vec![("x-own".to_owned(), "1".to_owned())];
        });
        SourceClient::new(&source).unwrap().fetch(&get(&server.uri())).await.expect(value);
    }
    let missing = source(|s| s.auth = Auth::Bearer { token: Secret::File("/nowhere".into()) });
    assert!(SourceClient::new(&missing).unwrap_err().to_string().contains("secret file /nowhere"));
}

#[tokio::test]
async fn the_api_key_is_in_the_query_of_every_request_and_in_no_message() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "s3cret &\n").unwrap();
    let key = Secret::File(file.path().display().to_string());
    let client = SourceClient::new(&source(|s| {
        s.auth = Auth::ApiKeyInQuery { query: "key".to_owned(), key };
    }))
    .unwrap();
    let server = MockServer::start().await;
    let with_key = Mock::given(query_param("key", "s3cret &")).and(query_param("a[gte]", "1 2"));
    with_key.respond_with(status(200).set_body_string("[]")).mount(&server).await;
    // The second URL is that of a next page from a source that repeats the query it received.
    for query in ["a[gte]=1%202", "key=s3cret+%26&a[gte]=1%202"] {
        client.fetch(&get(&format!("{}/?{query}", server.uri()))).await.expect(query);
    }
    for port in [server.address().port(), 1] {
        let url = format!("http://127.0.0.1:{port}/?a=o3her&key=s3cret");
        let error = client.fetch(&get(&url)).await.unwrap_err();
        assert!(!error.cause.contains("s3cret") && !error.cause.contains("o3her"), "{error}");
    }
    let answer = status(302).insert_header("location", "https://ada:s3cret@h/?key=s3cret");
    let error = check(answer, Kind::Fatal, "https://h/?key=…").await;
    assert!(!error.cause.contains("s3cret"), "{error}");
}

#[tokio::test]
async fn requests_respect_the_rate_limit() {
    let server = serve(status(200).set_body_string("[]")).await;
    let client = SourceClient::new(&source(|s| s.requests_per_second = Some(50.0))).unwrap();
    let started = Instant::now();
    for _ in 0..6 {
        client.fetch(&get(&server.uri())).await.unwrap();
    }
    assert!(started.elapsed() >= Duration::from_millis(100), "{:?}", started.elapsed());
}

#[tokio::test]
async fn a_rejected_secret_is_read_again_once() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "one").unwrap();
    let secret = Secret::File(file.path().display().to_string());
    let client = SourceClient::new(&source(|s| s.auth = Auth::Bearer { token: secret })).unwrap();
    let server = MockServer::start().await;
    let accepts = |token: &str| Mock::given(has_header("authorization", format!("Bearer {token}").as_str()));
    accepts("two").respond_with(status(200).set_body_string("[]")).mount(&server).await;
    accepts("one").respond_with(status(401).set_body_string("one has expired")).mount(&server).await;
    let error = client.fetch(&get(&server.uri())).await.unwrap_err();
    assert_eq!(
        (error.kind, error.http_status),
        (Kind::Retryable, Some(401)),
        "the file may be replaced later"
    );
    assert!(error.cause.ends_with("… has expired"), "{error}");
    std::fs::write(file.path(), "two").unwrap();
    client.fetch(&get(&server.uri())).await.unwrap();
    assert_eq!(server.received_requests().await.unwrap().len(), 3);
}

#[tokio::test]
async fn an_access_token_is_requested_and_renewed() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "s3cret&").unwrap();
    let server = MockServer::start().await;
    let request = TokenRequest {
        url: format!("{}/token", server.uri()),
        fields: vec![("grant_type".to_owned(), "client_credentials".to_owned())],
        secrets: vec![("client_secret".to_owned(), Secret::File(file.path().display().to_string()))],
        json: false,
        token: "/access_token".to_owned(),
        header: None,
    };
    let client = SourceClient::new(&source(|s| s.auth = Auth::Token(request))).unwrap();
    let token = |token: &str| {
        let body = body_string("grant_type=client_credentials&client_secret=s3cret%26");
        let answer =
            status(200).set_body_json(serde_json::json!({"access_token": token, "expires_in": 3600}));
        Mock::given(path("/token")).and(body).respond_with(answer).up_to_n_times(1)
    };
    let accepts = |token: &str| {
        let mock =
            Mock::given(path("/items")).and(has_header("authorization", format!("Bearer {token}").as_str()));
        mock.respond_with(status(200).set_body_string("[]")).up_to_n_times(2)
    };
    for name in ["one", "two"] {
        token(name).mount(&server).await;
        accepts(name).mount(&server).await;
    }
    Mock::given(path("/items")).respond_with(status(401)).mount(&server).await;
    let items = get(&format!("{}/items", server.uri()));
    for _ in 0..3 {
        client.fetch(&items).await.unwrap();
    }
    client.fetch(&items).await.unwrap();
    let error = client.fetch(&items).await.unwrap_err();
    assert!(
        error.cause.starts_with("the request for an access token failed: the source returned 404"),
        "{error}"
    );
    assert!(!error.cause.contains("s3cret"), "{error}");
}
