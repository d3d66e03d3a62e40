//! Tests of the client against a server with all kinds of invalid responses.

use super::*;
use crate::error::Kind;
use common::contracts::stream::Definition;
use flate2::Compression;
use flate2::write::GzEncoder;
use std::io::Write;
use wiremock::matchers::{header as has_header, method, query_param};
use wiremock::{Mock, MockServer, ResponseTemplate};

fn source(change: impl FnOnce(&mut SourceSettings)) -> SourceSettings {
    let text = include_str!("../../../../streams/user_created.toml");
    let mut source = Definition::parse("test", text).unwrap().source;
    source.limits.page_bytes = 10_000;
    source.limits.request_timeout_ms = 400;
    change(&mut source);
    source
}

async fn serve(answer: ResponseTemplate) -> MockServer {
    let server = MockServer::start().await;
    Mock::given(method("GET")).respond_with(answer).mount(&server).await;
    server
}

async fn fetch(answer: ResponseTemplate) -> Result<Page, AttemptError> {
    let server = serve(answer).await;
    SourceClient::new(&source(|_| {})).unwrap().fetch(&server.uri().parse().unwrap()).await
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

fn gzip(text: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(text).unwrap();
    encoder.finish().unwrap()
}

fn packed(body: Vec<u8>) -> ResponseTemplate {
    status(200).insert_header("content-encoding", "gzip").set_body_bytes(body)
}

#[tokio::test]
async fn a_page_has_its_link_header_and_size() {
    let page = fetch(status(200).insert_header("link", "</2>; rel=next").set_body_string("{\"a\": 1}"))
        .await
        .unwrap();
    assert_eq!(
        (page.body.as_slice(), page.link.as_deref(), page.bytes),
        (b"{\"a\": 1}".as_slice(), Some("</2>; rel=next"), 8)
    );
    let page = fetch(packed(gzip(b"[1, 2]"))).await.unwrap();
    assert_eq!(page.body, b"[1, 2]");
}

#[tokio::test]
async fn only_errors_that_may_pass_are_retryable() {
    check(status(500), Kind::Retryable, "500").await;
    check(status(503), Kind::Retryable, "503").await;
    check(status(408), Kind::Retryable, "408").await;
    check(status(404), Kind::Fatal, "404").await;
    check(status(401), Kind::Fatal, "401").await;
    let cut = "the page of 13 bytes is not valid JSON at byte 13: the text ends inside brackets";
    check(status(200).set_body_string("{\"results\": ["), Kind::Retryable, cut).await;
    check(status(200).set_body_string("Bad Gateway"), Kind::Retryable, "not valid JSON at byte 0").await;
    check(status(200).set_body_string("[".repeat(5000)), Kind::Retryable, "the text ends inside brackets")
        .await;
    let slow = status(200).set_body_string("[]").set_delay(Duration::from_secs(5));
    check(slow, Kind::Retryable, "no complete response within 0.4 s").await;
    let mut broken = gzip(&[b'x'; 500]);
    broken.truncate(20);
    check(packed(broken), Kind::Retryable, "not valid gzip").await;
}

#[tokio::test]
async fn retry_after_may_be_seconds_or_a_date() {
    let error = check(status(429).insert_header("retry-after", "7"), Kind::Retryable, "429").await;
    assert_eq!((error.retry_after_ms, error.http_status), (Some(7000), Some(429)));
    let now_ms = 1_445_412_470_000;
    assert_eq!(retry_after_ms("Wed, 21 Oct 2015 07:28:00 GMT", now_ms), Some(10_000));
    assert_eq!(retry_after_ms("Wed, 21 Oct 2015 07:27:00 GMT", now_ms), Some(0), "a date in the past");
    assert_eq!(retry_after_ms("99999999", now_ms), Some(MAX_RETRY_AFTER_MS));
    assert_eq!(retry_after_ms("soon", now_ms), None);
}

#[tokio::test]
async fn bodies_are_bounded_before_and_after_decompression() {
    check(status(200).set_body_bytes(vec![b' '; 10_001]), Kind::Fatal, "larger than 10000 bytes; raise")
        .await;
    let bomb = gzip(&vec![b' '; 5_000_000]);
    assert!(bomb.len() < 10_000, "the compressed body is below the limit");
    check(packed(bomb), Kind::Fatal, "larger than 10000 bytes after decompression").await;
    let brotli = status(200).insert_header("content-encoding", "br").set_body_string("x");
    check(brotli, Kind::Fatal, "content-encoding `br`; only gzip is supported").await;
}

#[tokio::test]
async fn a_redirect_is_not_followed() {
    let inside = "http://169.254.169.254/latest/meta-data/";
    check(status(302).insert_header("location", inside), Kind::Fatal, inside).await;
}

#[tokio::test]
async fn a_refused_connection_is_retryable() {
    let client = SourceClient::new(&source(|_| {})).unwrap();
    let error = client.fetch(&"http://127.0.0.1:1/".parse().unwrap()).await.unwrap_err();
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
        let error = client.fetch(&format!("http://{host}:9/").parse().unwrap()).await.expect_err(host);
        assert_eq!(error.kind, Kind::Fatal, "{host}: {error}");
        assert!(error.cause.contains("is a private address"), "{host}: {error}");
    }
}

#[test]
fn public_addresses_are_not_private() {
    for address in
        ["1.1.1.1", "100.128.0.1", "192.0.1.1", "198.20.0.1", "2606:4700::1111", "64:ff9b::808:808"]
    {
        assert!(!is_private(address.parse().unwrap()), "{address}");
    }
    for address in [
        "0.0.0.0",
        "255.255.255.255",
        "198.18.0.1",
        "fe80::1",
        "fd00::1",
        "64:ff9b::a00:1",
        "2002:a00:1::",
        "64:ff9b:1::808:808",
        "2001:0:4136:e378:8000:63bf:3fff:fdd2",
        "fec0::1",
        "feff::1",
        "::10.0.0.1",
        "::ffff:0:10.0.0.1",
        "2001:db8::1",
        "100::1",
        "3fff::1",
        "5f00::1",
    ] {
        assert!(is_private(address.parse().unwrap()), "{address}");
    }
}

#[tokio::test]
async fn requests_are_authenticated_as_the_definition_specifies() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("secret").display().to_string();
    std::fs::write(&file, "open sesame\n").unwrap();
    let cases = [
        (Auth::Bearer { token_file: file.clone() }, "authorization", "Bearer open sesame"),
        (
            Auth::Basic { user: "ali".into(), password_file: file.clone() },
            "authorization",
            "Basic YWxpOm9wZW4gc2VzYW1l",
        ),
        (Auth::ApiKey { header: "X-Key".into(), key_file: file.clone() }, "x-key", "open sesame"),
    ];
    for (auth, name, value) in cases {
        let server = MockServer::start().await;
        let expected = Mock::given(has_header(name, value)).and(has_header("x-own", "1"));
        expected.respond_with(status(200).set_body_string("[]")).mount(&server).await;
        let source = source(|s| {
            s.auth = auth;
            s.headers = vec![("x-own".to_owned(), "1".to_owned())];
        });
        SourceClient::new(&source).unwrap().fetch(&server.uri().parse().unwrap()).await.expect(value);
    }
    let missing = source(|s| s.auth = Auth::Bearer { token_file: "/nowhere".into() });
    assert!(SourceClient::new(&missing).unwrap_err().to_string().contains("secret file /nowhere"));
}

#[tokio::test]
async fn the_api_key_is_in_the_query_of_every_request_and_in_no_message() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "s3cret &\n").unwrap();
    let key_file = file.path().display().to_string();
    let client = SourceClient::new(&source(|s| {
        s.auth = Auth::ApiKeyInQuery { query: "key".to_owned(), key_file };
    }))
    .unwrap();
    let server = MockServer::start().await;
    let with_key = Mock::given(query_param("key", "s3cret &")).and(query_param("a[gte]", "1 2"));
    with_key.respond_with(status(200).set_body_string("[]")).mount(&server).await;
    // The second URL is that of a next page from a source that repeats the query it received.
    for query in ["a[gte]=1%202", "key=s3cret+%26&a[gte]=1%202"] {
        client.fetch(&format!("{}/?{query}", server.uri()).parse().unwrap()).await.expect(query);
    }
    for port in [server.address().port(), 1] {
        let url = format!("http://127.0.0.1:{port}/?a=o3her&key=s3cret");
        let error = client.fetch(&url.parse().unwrap()).await.unwrap_err();
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
        client.fetch(&server.uri().parse().unwrap()).await.unwrap();
    }
    assert!(started.elapsed() >= Duration::from_millis(100), "{:?}", started.elapsed());
}
