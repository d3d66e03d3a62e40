//! Evaluates expressions in the real Prometheus and reports missing series and labels. It knows no metric by name
//! except the few that may be absent in a healthy stack.

use std::collections::BTreeMap;

use local_stack::servers::http_client;
use serde_json::Value;

use crate::promql::{parse, with_bool_comparisons};
use crate::sources::{Expression, Kind, list, text};

/// Selectors that may be empty in a healthy stack, each with the reason.
const LEGITIMATELY_EMPTY: [(&str, &str); 1] =
    [("ALERTS{alertstate=\"firing\"}", "has series only while an alert fires; the panel shows 0 otherwise")];

/// One series of a query result.
#[derive(Debug, Clone, PartialEq)]
pub struct Series {
    /// The labels, including `__name__` if present.
    pub labels: BTreeMap<String, String>,
    /// The current value.
    pub value: f64,
}

/// A client of the test's Prometheus. It caches query results until [`Prometheus::clear_cache`] is called.
pub struct Prometheus {
    client: reqwest::Client,
    url: String,
    cache: BTreeMap<String, Result<Vec<Series>, String>>,
}

impl Prometheus {
    /// A client for the Prometheus at `http://HOST:PORT`.
    pub fn at(url: &str) -> Prometheus {
        Prometheus { client: http_client().unwrap(), url: url.to_owned(), cache: BTreeMap::new() }
    }

    /// Sends `GET /api/v1/PATH`. Returns `data` of the answer, or the error of Prometheus.
    pub async fn get(&self, path: &str, query: &[(&str, &str)]) -> Result<Value, String> {
        let url = reqwest::Url::parse_with_params(&format!("{}/api/v1/{path}", self.url), query).unwrap();
        let answer = self.client.get(url).send().await.map_err(|e| e.to_string())?;
        let mut answer: Value = answer.json().await.map_err(|e| e.to_string())?;
        if answer["status"] == "success" {
            Ok(answer["data"].take())
        } else {
            Err(answer["error"].to_string())
        }
    }

    /// Runs an instant query, unless its result is cached.
    pub async fn query(&mut self, expression: &str) -> Result<Vec<Series>, String> {
        if let Some(cached) = self.cache.get(expression) {
            return cached.clone();
        }
        let answer = self.get("query", &[("query", expression)]).await.map(|data| series(&data));
        self.cache.insert(expression.to_owned(), answer.clone());
        answer
    }

    /// Drops all cached results.
    pub fn clear_cache(&mut self) {
        self.cache.clear();
    }

    /// The firing alerts, each as `Name` or, if it has a job label, as `Name job`.
    pub async fn firing(&self) -> Vec<String> {
        let data = self.get("alerts", &[]).await.unwrap();
        let firing = list(&data, "/alerts").iter().filter(|alert| text(alert, "/state") == "firing");
        let name = |a: &Value| format!("{} {}", text(a, "/labels/alertname"), text(a, "/labels/job"));
        firing.map(|alert| name(alert).trim_end().to_owned()).collect()
    }

    /// The faults of an expression. Empty if the expression is correct.
    pub async fn faults(&mut self, expression: &Expression) -> Vec<String> {
        let query = parse(&expression.text);
        let mut faults = Vec::new();
        let mut labels = Vec::new();
        if query.selectors.is_empty() {
            faults.push("contains no selector".to_owned());
        }
        for selector in &query.selectors {
            if LEGITIMATELY_EMPTY.iter().any(|(text, _)| *text == selector.text) {
                continue;
            }
            let found = match self.query(&selector.text).await {
                Ok(found) => found,
                Err(error) => return vec![error],
            };
            if found.is_empty() {
                faults.push(format!("{} has no series", selector.text));
            }
            for label in &selector.labels {
                if !has(&found, label) {
                    faults.push(format!("no series of {} has the label {label}", selector.name));
                }
            }
            labels.extend(found);
        }
        for label in &query.groupings {
            if !has(&labels, label) {
                faults.push(format!("groups by the label {label}, which no series has"));
            }
        }
        faults.extend(self.faults_of_whole(expression, &labels).await);
        faults
    }

    /// Evaluates the whole expression. `selected` contains the series of its selectors.
    async fn faults_of_whole(&mut self, expression: &Expression, selected: &[Series]) -> Vec<String> {
        let expected = match &expression.kind {
            Kind::Variable(label) if has(selected, label) => return Vec::new(),
            Kind::Variable(label) => return vec![format!("no series has the label {label}")],
            // The selectors inside `absent` were checked above.
            Kind::Alert(_) if expression.text.contains("absent(") => return Vec::new(),
            Kind::Panel(_) | Kind::Record(_) => expression.text.clone(),
            Kind::Alert(_) | Kind::Annotation(_) => with_bool_comparisons(&expression.text),
        };
        let found = match self.query(&expected).await {
            Ok(found) => found,
            Err(error) => return vec![error],
        };
        let mut faults = Vec::new();
        if found.iter().all(|series| series.value.is_nan()) {
            faults.push(if found.is_empty() {
                "returns no series".to_owned()
            } else {
                "returns only NaN".to_owned()
            });
        }
        if let Kind::Panel(labels) | Kind::Annotation(labels) = &expression.kind {
            faults.extend(
                labels
                    .iter()
                    .filter(|l| !has(&found, l))
                    .map(|l| format!("its legend uses the label {l}, which no series has")),
            );
        }
        if let Kind::Record(name) = &expression.kind
            && self.query(name).await.is_ok_and(|recorded| recorded.is_empty())
        {
            faults.push(format!("the recorded metric {name} has no series"));
        }
        faults
    }
}

fn has(series: &[Series], label: &str) -> bool {
    series.iter().any(|series| series.labels.contains_key(label))
}

fn series(data: &Value) -> Vec<Series> {
    if data["resultType"] != "vector" {
        return vec![Series { labels: BTreeMap::new(), value: number(&data["result"][1]) }];
    }
    let one = |result: &Value| Series {
        labels: result["metric"]
            .as_object()
            .map(|labels| {
                labels.iter().map(|(k, v)| (k.clone(), v.as_str().unwrap_or_default().to_owned())).collect()
            })
            .unwrap_or_default(),
        value: number(&result["value"][1]),
    };
    list(data, "/result").iter().map(one).collect()
}

fn number(value: &Value) -> f64 {
    value.as_str().and_then(|text| text.parse().ok()).unwrap_or(f64::NAN)
}
