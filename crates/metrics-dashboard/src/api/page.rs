//! The page: the files of `web/dist`, which `npm run build` creates and `cargo build` embeds. A program built without
//! them serves everything else, and explains at `/` how to build the page.

use axum::extract::Path;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use rust_embed::RustEmbed;

#[derive(RustEmbed)]
#[folder = "web/dist"]
#[allow_missing = true]
struct Files;

const INDEX: &str = "index.html";
const NOT_BUILT: &str = "the page is not built: run `npm ci && npm run build` in crates/metrics-dashboard/web, then \
                         build the service again; the figures are at /api/v1/overview\n";

/// Whether this program contains the page.
pub fn is_built() -> bool {
    Files::get(INDEX).is_some()
}

pub(super) async fn index(headers: HeaderMap) -> Response {
    respond(INDEX, &headers)
}

pub(super) async fn file(Path(path): Path<String>, headers: HeaderMap) -> Response {
    respond(&path, &headers)
}

fn respond(path: &str, headers: &HeaderMap) -> Response {
    let Some(found) = Files::get(path) else {
        return if path == INDEX || !is_built() {
            (StatusCode::SERVICE_UNAVAILABLE, NOT_BUILT).into_response()
        } else {
            (StatusCode::NOT_FOUND, format!("/{path} not found\n")).into_response()
        };
    };
    let digest = found.metadata.sha256_hash();
    let hex: String = digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    let tag = format!("\"{hex}\"");
    if headers.get(header::IF_NONE_MATCH).is_some_and(|given| given.as_bytes() == tag.as_bytes()) {
        return (StatusCode::NOT_MODIFIED, [(header::ETAG, tag)]).into_response();
    }
    let media_type = match path.rsplit('.').next() {
        Some("html") => "text/html; charset=utf-8",
        Some("js") => "text/javascript; charset=utf-8",
        Some("css") => "text/css; charset=utf-8",
        Some("svg") => "image/svg+xml",
        _ => "application/octet-stream",
    };
    ([(header::CONTENT_TYPE, media_type.to_owned()), (header::ETAG, tag)], found.data).into_response()
}
