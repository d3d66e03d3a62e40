//! `GET /api/v1/throughput?minutes=M`: events per second, and the lag where this instance knows it, in at most 2,000
//! points.

use super::{Api, Refusal, bad_request, unavailable};
use crate::rates::{self, History, Point, SETTLE_SECONDS, WINDOW_SECONDS};
use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use chrono::Utc;
use serde::{Deserialize, Serialize};

/// Longest span of one chart: a week.
const MAX_MINUTES: i64 = 7 * 24 * 60;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Parameters {
    minutes: Option<String>,
}

#[derive(Serialize)]
pub(super) struct Chart {
    /// Length of the step that one point covers.
    step_seconds: i64,
    points: Vec<ChartPoint>,
}

#[derive(Serialize)]
struct ChartPoint {
    #[serde(flatten)]
    rate: Point,
    /// Highest lag within the step. `None` if this instance did not know it at that time.
    lag_messages: Option<i64>,
    lag_seconds: Option<f64>,
}

pub(super) async fn throughput(
    State(api): State<Api>,
    parameters: Result<Query<Parameters>, QueryRejection>,
) -> Result<Json<Chart>, Refusal> {
    let Query(parameters) =
        parameters.map_err(|e| bad_request(format!("{e}; the only parameter is `minutes`")))?;
    let seconds = 60 * minutes(parameters.minutes.as_deref()).map_err(bad_request)?;
    let cassandra = api.connected_cassandra()?;
    let now = Utc::now().timestamp();
    if seconds <= WINDOW_SECONDS {
        let (history, read_until) = cassandra.last_hour();
        // Seconds that could not be read are unknown rather than idle, so the chart ends before them.
        return Ok(Json(chart(
            &api,
            &history,
            Span { until: now.min(read_until) - SETTLE_SECONDS, seconds, step: 1 },
        )));
    }
    let _permit = api.read_permit()?;
    let history = cassandra.minutes(now - seconds, now).await.map_err(|e| unavailable(e.reason()))?;
    Ok(Json(chart(&api, &history, Span { until: now - SETTLE_SECONDS, seconds, step: 60 })))
}

/// The time that a chart covers, in seconds.
struct Span {
    /// End, as Unix time.
    until: i64,
    /// Length.
    seconds: i64,
    /// Step of the history.
    step: i64,
}

fn chart(api: &Api, history: &History, span: Span) -> Chart {
    let Span { until, seconds, step } = span;
    let width = rates::width_for(seconds, step);
    let to = until.div_euclid(width) * width;
    let points = history.points(to - seconds.div_euclid(width) * width, to, width);
    let with_lag = |lag: &mut crate::lag::LagHistory| {
        let point = |rate: Point| {
            let (lag_messages, lag_seconds) = lag.worst(rate.at, rate.at + width);
            ChartPoint { rate, lag_messages, lag_seconds }
        };
        points.into_iter().map(point).collect()
    };
    Chart { step_seconds: width, points: api.board.with_lag(with_lag) }
}

fn minutes(parameter: Option<&str>) -> Result<i64, String> {
    let Some(text) = parameter else { return Ok(15) };
    match text.parse() {
        Ok(minutes) if (1..=MAX_MINUTES).contains(&minutes) => Ok(minutes),
        _ => Err(format!("minutes `{text}`: must be a whole number from 1 to {MAX_MINUTES}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn minutes_have_a_default_and_bounds() {
        assert_eq!(minutes(None), Ok(15));
        assert_eq!(minutes(Some("60")), Ok(60));
        for bad in ["0", "-1", "10081", "x", "", "1.5", "99999999999999999999"] {
            assert_eq!(
                minutes(Some(bad)),
                Err(format!("minutes `{bad}`: must be a whole number from 1 to 10080"))
            );
        }
    }
}
