//! Decodes the body of a response: content encodings, character set, byte order mark and format. Pure.

use super::scan;
use crate::error::AttemptError;
use common::contracts::stream::BodyFormat;
use flate2::read::{DeflateDecoder, MultiGzDecoder, ZlibDecoder};
use std::io::Read;

/// Characters of a body that is not what it should be that an error shows.
const MAX_SHOWN: usize = 80;

/// A body as received, with the headers that describe it.
#[derive(Debug, Default)]
pub struct Received {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// The `Content-Encoding` header, if present.
    pub encoding: Option<String>,
    /// The `Content-Type` header, if present.
    pub content_type: Option<String>,
}

/// Decompresses and decodes a body and checks that it is complete and at most `limit` bytes long. Returns its text and its
/// format, which is not [`BodyFormat::Auto`].
pub fn decode(
    received: Received,
    format: BodyFormat,
    limit: u64,
) -> Result<(Vec<u8>, BodyFormat), AttemptError> {
    let Received { mut bytes, encoding, content_type } = received;
    let encodings = encoding.unwrap_or_default().to_ascii_lowercase();
    for encoding in encodings.split(',').map(str::trim).rev() {
        bytes = decompress(bytes, encoding, limit)?;
        if bytes.len() as u64 > limit {
            return Err(too_large(limit, " after decompression"));
        }
    }
    let media_type = content_type.unwrap_or_default().to_ascii_lowercase();
    let text = to_utf8(bytes, &media_type);
    let format = match format {
        BodyFormat::Auto => format_of(&media_type),
        format => format,
    };
    if format == BodyFormat::Json {
        scan::check(&text).map_err(|e| {
            let shown: String = String::from_utf8_lossy(&text[..text.len().min(4 * MAX_SHOWN)])
                .chars()
                .map(|c| if c.is_control() { ' ' } else { c })
                .take(MAX_SHOWN)
                .collect();
            let media_type =
                media_type.split(';').next().filter(|t| !t.is_empty()).unwrap_or("no content type");
            AttemptError::retryable(format!(
                "the page of {} bytes ({media_type}) is {e}; it starts with `{}`",
                text.len(),
                shown.trim()
            ))
        })?;
    }
    Ok((text, format))
}

/// The error of a body that exceeds its size limit.
pub fn too_large(limit: u64, how: &str) -> AttemptError {
    AttemptError::fatal(format!("the page is larger than {limit} bytes{how}; raise source.limits.page_bytes"))
}

/// The format that a media type names; JSON for an unknown one.
pub fn format_of(media_type: &str) -> BodyFormat {
    let essence = media_type.split(';').next().unwrap_or_default().trim();
    match essence {
        "text/csv" | "application/csv" => BodyFormat::Csv { delimiter: b',' },
        "text/tab-separated-values" => BodyFormat::Csv { delimiter: b'\t' },
        _ if ["ndjson", "jsonl", "jsonlines", "stream+json"].iter().any(|name| essence.ends_with(name)) => {
            BodyFormat::Ndjson
        }
        _ => BodyFormat::Json,
    }
}

fn decompress(bytes: Vec<u8>, encoding: &str, limit: u64) -> Result<Vec<u8>, AttemptError> {
    let read = |reader: &mut dyn Read| {
        let mut text = Vec::new();
        reader.take(limit + 1).read_to_end(&mut text).map(|_| text)
    };
    let text = match encoding {
        "" | "identity" => return Ok(bytes),
        "gzip" | "x-gzip" => read(&mut MultiGzDecoder::new(bytes.as_slice())),
        // RFC 9110 means the zlib format, but some servers send raw deflate data.
        "deflate" => read(&mut ZlibDecoder::new(bytes.as_slice()))
            .or_else(|_| read(&mut DeflateDecoder::new(bytes.as_slice()))),
        "br" => read(&mut brotli_decompressor::Decompressor::new(bytes.as_slice(), 4096)),
        "zstd" => {
            zstd::stream::read::Decoder::new(bytes.as_slice()).and_then(|mut decoder| read(&mut decoder))
        }
        other => {
            return Err(AttemptError::fatal(format!(
                "the source used content-encoding `{other}`; gzip, deflate, br and zstd are supported"
            )));
        }
    };
    text.map_err(|e| AttemptError::retryable(format!("the page is not valid {encoding}: {e}")))
}

/// The text as UTF-8 without a byte order mark. The character set is that of the mark or of the media type, and UTF-8
/// for a label that is unknown or wrong: JSON has no other one.
fn to_utf8(bytes: Vec<u8>, media_type: &str) -> Vec<u8> {
    let label = media_type.split(';').find_map(|part| part.trim().strip_prefix("charset="));
    let label = label.map(|label| label.trim_matches(['"', '\'', ' ']));
    let declared = label.and_then(|label| encoding_rs::Encoding::for_label(label.as_bytes()));
    let marked = encoding_rs::Encoding::for_bom(&bytes);
    let is_utf8 = std::str::from_utf8(&bytes).is_ok();
    match (marked, declared) {
        (Some((encoding, length)), _) if encoding == encoding_rs::UTF_8 => bytes[length..].to_vec(),
        (Some((encoding, length)), _) => {
            encoding.decode_without_bom_handling(&bytes[length..]).0.into_owned().into_bytes()
        }
        (None, Some(encoding)) if encoding != encoding_rs::UTF_8 && !is_utf8 => {
            encoding.decode_without_bom_handling(&bytes).0.into_owned().into_bytes()
        }
        // Invalid UTF-8 affects only the records that contain it.
        (None, _) => bytes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;
    use flate2::Compression;
    use flate2::write::{DeflateEncoder, GzEncoder, ZlibEncoder};
    use std::io::Write;

    const LIMIT: u64 = 10_000;

    fn decoded(
        bytes: &[u8],
        encoding: &str,
        content_type: &str,
    ) -> Result<(Vec<u8>, BodyFormat), AttemptError> {
        let header = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        let received = Received {
            bytes: bytes.to_vec(),
            encoding: header(encoding),
            content_type: header(content_type),
        };
        decode(received, BodyFormat::Auto, LIMIT)
    }

    fn check(bytes: &[u8], encoding: &str, content_type: &str, expected: &str) {
        let (text, _) = decoded(bytes, encoding, content_type).unwrap();
        assert_eq!(String::from_utf8_lossy(&text), expected, "{encoding} {content_type}");
    }

    fn check_error(bytes: &[u8], encoding: &str, kind: Kind, expected: &str) {
        let error = decoded(bytes, encoding, "text/html; charset=utf-8").expect_err(expected);
        assert_eq!(error.kind, kind, "{error}");
        assert!(error.cause.contains(expected), "`{expected}` is not in `{error}`");
    }

    fn gzip(text: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
        encoder.write_all(text).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn every_usual_encoding_is_decompressed_in_any_case_of_letters() {
        let text = b"[1, 2]";
        check(text, "", "", "[1, 2]");
        check(text, "identity", "", "[1, 2]");
        check(&gzip(text), "GZIP", "", "[1, 2]");
        let mut zlib = ZlibEncoder::new(Vec::new(), Compression::best());
        zlib.write_all(text).unwrap();
        check(&zlib.finish().unwrap(), "Deflate", "", "[1, 2]");
        let mut raw = DeflateEncoder::new(Vec::new(), Compression::best());
        raw.write_all(text).unwrap();
        check(&raw.finish().unwrap(), "deflate", "", "[1, 2]");
        let zstd = zstd::encode_all(text.as_slice(), 3).unwrap();
        check(&zstd, "zstd", "", "[1, 2]");
        check(&gzip(&zstd), "zstd, gzip", "", "[1, 2]");
        // Compressed by zlib.brotliCompressSync of Node.js.
        check(&[139, 2, 128, 91, 49, 44, 32, 50, 93, 3], "br", "", "[1, 2]");
        check_error(b"x", "compress", Kind::Fatal, "content-encoding `compress`; gzip, deflate, br and zstd");
        check_error(&gzip(&[b'x'; 500])[..20], "gzip", Kind::Retryable, "not valid gzip");
        check_error(
            &gzip(&vec![b' '; 5_000_000]),
            "gzip",
            Kind::Fatal,
            "larger than 10000 bytes after decompression",
        );
        let bomb = zstd::encode_all(vec![b' '; 5_000_000].as_slice(), 3).unwrap();
        check_error(&bomb, "zstd", Kind::Fatal, "larger than 10000 bytes after decompression");
    }

    #[test]
    fn character_sets_and_byte_order_marks_are_decoded() {
        check(b"\xef\xbb\xbf{}", "", "application/json", "{}");
        check(b"\xff\xfe\"\0\xe9\0\"\0", "", "", "\"é\"");
        check(b"\"\xe9\"", "", "application/json; charset=ISO-8859-1", "\"é\"");
        check("\"é\"".as_bytes(), "", "application/json; charset=latin1", "\"é\"");
        for wrong in ["charset=utf8mb4", "charset=\"UTF-8\"", "charset", "charset=;x"] {
            check("\"é\"".as_bytes(), "", &format!("application/json; {wrong}"), "\"é\"");
        }
    }

    #[test]
    fn the_content_type_names_the_format() {
        let format = |content_type| decoded(b"[]", "", content_type).unwrap().1;
        assert_eq!(format(""), BodyFormat::Json);
        assert_eq!(format("application/vnd.api+json"), BodyFormat::Json);
        assert_eq!(format("application/x-ndjson; charset=utf-8"), BodyFormat::Ndjson);
        assert_eq!(format("Application/JSONL"), BodyFormat::Ndjson);
        assert_eq!(format("text/csv"), BodyFormat::Csv { delimiter: b',' });
        assert_eq!(format("text/tab-separated-values"), BodyFormat::Csv { delimiter: b'\t' });
    }

    #[test]
    fn a_page_that_is_not_json_shows_its_content_type_and_how_it_starts() {
        let expected =
            "(text/html) is not valid JSON at byte 0: invalid start of a value; it starts with `<html>  <b>`";
        check_error(b"<html>\r\n<b>", "", Kind::Retryable, expected);
        check_error(b"{\"a\": [1", "", Kind::Retryable, "at byte 8: the text ends inside brackets");
    }
}
