//! `GET /api/v1/windows?size=5m&slide=1m&by=nationality&last=1h`: sliding windows, or tumbling windows if `slide` is
//! absent, with their measures.

use super::{Api, Refusal, bad_request, unavailable};
use crate::error::Error;
use crate::reason::{Reason, Source};
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use chrono::Utc;
use common::readers::windows::{Asked, to_json};
use serde::Deserialize;
use serde_json::json;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Parameters {
    size: Option<String>,
    slide: Option<String>,
    by: Option<String>,
    last: Option<String>,
}

pub(super) async fn windows(
    State(api): State<Api>,
    parameters: Result<Query<Parameters>, QueryRejection>,
) -> Result<impl IntoResponse, Refusal> {
    let Query(parameters) = parameters
        .map_err(|e| bad_request(format!("{e}; the parameters are `size`, `slide`, `by` and `last`")))?;
    let store = api.connected_store()?;
    let asked = Asked {
        size: parameters.size.as_deref(),
        slide: parameters.slide.as_deref(),
        by: parameters.by.as_deref(),
        last: parameters.last.as_deref(),
    };
    let question = store.panes().question(&asked, Utc::now().timestamp_millis());
    let question = question.map_err(|e| bad_request(e.to_string()))?;
    let _permit = api.read_permit()?;
    let read = futures::try_join!(store.panes().panes(&question), store.panes().settled_ms());
    let (panes, settled_ms) = read.map_err(|e| unavailable(Error::Panes(e).reason()))?;
    // Summing panes and building megabytes of JSON would block the other tasks of this thread.
    let json = tokio::task::spawn_blocking(move || {
        let windows = to_json(&question.answer(&panes), store.panes().definition(), settled_ms);
        let by = Some(question.dimension).filter(|by| !by.is_empty());
        json!({"size_ms": question.size_ms, "slide_ms": question.slide_ms, "by": by, "windows": windows})
            .to_string()
    });
    let json = json.await.map_err(|e| {
        let reason =
            Reason::new(Source::Dashboard, "the windows could not be computed").with_detail(e.to_string());
        Refusal(StatusCode::INTERNAL_SERVER_ERROR, reason)
    })?;
    Ok(([(header::CONTENT_TYPE, "application/json")], json))
}
