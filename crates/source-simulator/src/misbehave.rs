//! Applies a fault to a request or to its response.

use super::faults::{Fault, Faults};
use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, Response, StatusCode, header};
use flate2::Compression;
use flate2::write::GzEncoder;
use futures::stream::{self, StreamExt};
use std::io::Write;
use std::time::Duration;

/// Maximum size of a body that is buffered to be corrupted.
const MAX_BODY: usize = 64 << 20;
/// Size of one piece of an oversized body.
const PIECE: usize = 64 << 10;

/// Returns a response that replaces the real one, or `None` if the fault corrupts the real response instead.
pub fn replacement(fault: Fault, faults: &Faults) -> Option<Response<Body>> {
    match fault {
        Fault::Error => Some(plain(StatusCode::INTERNAL_SERVER_ERROR, r#"{"error":"simulated"}"#)),
        Fault::NotFound => Some(plain(StatusCode::NOT_FOUND, r#"{"error":"simulated"}"#)),
        Fault::Throttle => {
            let answer = plain(StatusCode::TOO_MANY_REQUESTS, r#"{"error":"slow down"}"#);
            Some(with_header(answer, header::RETRY_AFTER, &faults.retry_after))
        }
        Fault::Redirect => {
            Some(with_header(plain(StatusCode::FOUND, ""), header::LOCATION, &faults.redirect_to))
        }
        Fault::Oversized => Some(Response::new(oversized(faults.oversized_bytes))),
        Fault::Bomb => {
            let answer = Response::new(Body::from(bomb(faults.oversized_bytes)));
            Some(with_header(answer, header::CONTENT_ENCODING, "gzip"))
        }
        Fault::Drip
        | Fault::Truncated
        | Fault::Malformed
        | Fault::Reset
        | Fault::Endless
        | Fault::BrokenRecords => None,
    }
}

/// Corrupts a real response.
pub async fn corrupt(fault: Fault, faults: &Faults, answer: Response<Body>) -> Response<Body> {
    let (mut parts, body) = answer.into_parts();
    let Ok(bytes) = axum::body::to_bytes(body, MAX_BODY).await else {
        return plain(StatusCode::INTERNAL_SERVER_ERROR, "the response is too large to be corrupted");
    };
    parts.headers.remove(header::CONTENT_LENGTH);
    let half = bytes.slice(..bytes.len() / 2);
    let body = match fault {
        Fault::Truncated => Body::from(half),
        Fault::Malformed => Body::from([b"<html>".as_slice(), &half].concat()),
        Fault::Reset => {
            let broken = Err(std::io::Error::from(std::io::ErrorKind::ConnectionReset));
            // The delay lets the first half reach the client before the connection is reset.
            let pause = Duration::from_millis(20);
            let end = stream::once(async move {
                tokio::time::sleep(pause).await;
                broken
            });
            Body::from_stream(stream::once(async move { Ok(half) }).chain(end))
        }
        Fault::Drip => drip(bytes, faults),
        Fault::BrokenRecords => Body::from(broken_records(&String::from_utf8_lossy(&bytes))),
        _ => Body::from(bytes),
    };
    Response::from_parts(parts, body)
}

/// Breaks three records in a page of people: an age that is not valid JSON, a name cut within a character, and an age
/// that overflows every number type.
fn broken_records(page: &str) -> String {
    // Each person has two `age` fields: the age of the person, and the age of the registration.
    let page = replace_nth(page, "\"age\":", 0, "\"age\":unknown,\"was\":");
    let page = replace_nth(&page, "\"first\":\"", 1, "\"first\":\"\\ud83d");
    replace_nth(&page, "\"age\":", 4, "\"age\":1e400,\"was\":")
}

/// Replaces the occurrence with index `nth`, counted from 0.
fn replace_nth(text: &str, from: &str, nth: usize, to: &str) -> String {
    match text.match_indices(from).nth(nth) {
        Some((at, _)) => format!("{}{to}{}", &text[..at], &text[at + from.len()..]),
        None => text.to_owned(),
    }
}

fn drip(bytes: Bytes, faults: &Faults) -> Body {
    let pause = Duration::from_millis(faults.drip_ms);
    let size = faults.drip_bytes;
    let pieces = (0..bytes.len()).step_by(size).map(move |at| bytes.slice(at..bytes.len().min(at + size)));
    Body::from_stream(stream::iter(pieces.collect::<Vec<_>>()).then(move |piece| async move {
        tokio::time::sleep(pause).await;
        Ok::<_, std::io::Error>(piece)
    }))
}

fn oversized(bytes: usize) -> Body {
    let piece = Bytes::from(vec![b' '; PIECE]);
    Body::from_stream(stream::iter(
        (0..bytes.div_ceil(PIECE)).map(move |_| Ok::<_, std::io::Error>(piece.clone())),
    ))
}

fn bomb(bytes: usize) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    let piece = vec![b' '; PIECE];
    for _ in 0..bytes.div_ceil(PIECE) {
        // Writing to memory cannot fail. Even if it did, a shorter bomb would still work.
        if encoder.write_all(&piece).is_err() {
            break;
        }
    }
    encoder.finish().unwrap_or_default()
}

fn plain(status: StatusCode, text: &'static str) -> Response<Body> {
    let mut answer = Response::new(Body::from(text));
    *answer.status_mut() = status;
    with_header(answer, header::CONTENT_TYPE, "application/json")
}

fn with_header(mut answer: Response<Body>, name: header::HeaderName, value: &str) -> Response<Body> {
    if let Ok(value) = HeaderValue::from_str(value) {
        answer.headers_mut().insert(name, value);
    }
    answer
}
