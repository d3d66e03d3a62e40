//! `GET /api/v1/windows?size=5m&slide=1m&by=nationality&last=1h`: sliding windows, or tumbling windows if `slide` is
//! absent, with their measures.

use super::{Api, Refusal, bad_request, unavailable};
use crate::error::Error;
use crate::reason::{Origin, Reason};
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use chrono::Utc;
use common::readers::windows::{WindowParameters, to_json};
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
    let cassandra = api.connected_cassandra()?;
    let parameters = WindowParameters {
        size: parameters.size.as_deref(),
        slide: parameters.slide.as_deref(),
        by: parameters.by.as_deref(),
        last: parameters.last.as_deref(),
    };
    let query = cassandra.panes().query(&parameters, Utc::now().timestamp_millis());
    let query = query.map_err(|e| bad_request(e.to_string()))?;
    let _permit = api.read_permit()?;
    let read = futures::try_join!(cassandra.panes().panes(&query), cassandra.panes().settled_ms());
    let (panes, settled_ms) = read.map_err(|e| unavailable(Error::Panes(e).reason()))?;
    // Summing panes and building megabytes of JSON would block the other tasks of this thread.
    let json = tokio::task::spawn_blocking(move || {
        let windows = to_json(&query.answer(&panes), cassandra.panes().definition(), settled_ms);
        let by = Some(query.dimension).filter(|by| !by.is_empty());
        json!({"size_ms": query.size_ms, "slide_ms": query.slide_ms, "by": by, "windows": windows})
            .to_string()
    });
    let json = json.await.map_err(|e| {
        let reason =
            Reason::new(Origin::Dashboard, "the windows could not be computed").with_detail(e.to_string());
        Refusal(StatusCode::INTERNAL_SERVER_ERROR, reason)
    })?;
    Ok(([(header::CONTENT_TYPE, "application/json")], json))
}
