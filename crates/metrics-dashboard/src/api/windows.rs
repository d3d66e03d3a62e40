//! `GET /api/v1/windows?size=5m&slide=1m&by=nationality&last=1h`: tumbling (without `slide`) and sliding windows with their measures.

use super::{Api, Refusal};
use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use chrono::Utc;
use common::windows::{Question, length_ms, to_json};
use serde::Deserialize;
use serde_json::{Value, json};

const DEFAULT_LAST: &str = "1h";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Asked {
    size: Option<String>,
    slide: Option<String>,
    by: Option<String>,
    last: Option<String>,
}

pub(super) async fn windows(
    State(api): State<Api>,
    asked: Result<Query<Asked>, QueryRejection>,
) -> Result<Json<Value>, Refusal> {
    let bad = |text: String| Refusal(StatusCode::BAD_REQUEST, text);
    let unknown = |reason: String| Refusal(StatusCode::SERVICE_UNAVAILABLE, reason);
    let Query(asked) = asked.map_err(|e| bad(format!("{e}; parameters are size, slide, by and last")))?;
    let store = api.connected_store().map_err(unknown)?;
    let definition = store.panes().definition();
    let length = |name: &str, text: &str| length_ms(name, text).map_err(|e| bad(e.to_string()));
    let size_ms = match &asked.size {
        Some(size) => length("size", size)?,
        None => definition.windows.pane_ms,
    };
    let slide_ms = asked.slide.as_deref().map_or(Ok(size_ms), |slide| length("slide", slide))?;
    let now = Utc::now().timestamp_millis();
    let last_ms = length("last", asked.last.as_deref().unwrap_or(DEFAULT_LAST))?;
    let by = asked.by.as_deref().filter(|by| !by.is_empty());
    let question = Question::new(definition, (size_ms, slide_ms), by, (now.saturating_sub(last_ms), now));
    let question = question.map_err(|e| bad(e.to_string()))?;
    let _place = api.chart_reads.acquire().await.map_err(|e| unknown(e.to_string()))?;
    let read = futures::try_join!(store.panes().panes(&question), store.panes().settled_ms());
    let (panes, settled_ms) = read.map_err(|e| unknown(e.to_string()))?;
    let windows = to_json(&question.answer(&panes), definition, settled_ms);
    Ok(Json(json!({"size_ms": size_ms, "slide_ms": slide_ms, "by": by, "windows": windows})))
}
