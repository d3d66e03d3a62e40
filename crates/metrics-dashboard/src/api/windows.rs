//! `GET /api/v1/windows?size=5m&slide=1m&by=nationality&last=1h`: tumbling (without `slide`) and sliding windows with their measures.

use super::{Api, Refusal, bad, unknown};
use crate::error::Error;
use crate::reason::{Reason, Source};
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use chrono::Utc;
use common::windows::{Asked, to_json};
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
    let Query(asked) =
        parameters.map_err(|e| bad(format!("{e}; parameters are size, slide, by and last")))?;
    let store = api.connected_store()?;
    let lengths = Asked {
        size: asked.size.as_deref(),
        slide: asked.slide.as_deref(),
        by: asked.by.as_deref(),
        last: asked.last.as_deref(),
    };
    let question = store.panes().question(&lengths, Utc::now().timestamp_millis());
    let question = question.map_err(|e| bad(e.to_string()))?;
    let _place = api.place_to_read()?;
    let read = futures::try_join!(store.panes().panes(&question), store.panes().settled_ms());
    let (panes, settled_ms) = read.map_err(|e| unknown(Error::Panes(e).reason()))?;
    // Megabytes of sums and JSON would hold up whoever shares this thread.
    let answer = tokio::task::spawn_blocking(move || {
        let windows = to_json(&question.answer(&panes), store.panes().definition(), settled_ms);
        let by = Some(question.dimension).filter(|by| !by.is_empty());
        json!({"size_ms": question.size_ms, "slide_ms": question.slide_ms, "by": by, "windows": windows})
            .to_string()
    });
    let json = answer.await.map_err(|e| {
        let reason =
            Reason::new(Source::Dashboard, "the windows could not be summed").with_detail(e.to_string());
        Refusal(StatusCode::INTERNAL_SERVER_ERROR, reason)
    })?;
    Ok(([(header::CONTENT_TYPE, "application/json")], json))
}
