//! Asks the real Prometheus what each expression returns, and says what is missing. It knows no metric by name but the few
//! that may be away while all is well.

use std::collections::BTreeMap;

use local_stack::servers::http_client;
use serde_json::Value;

use crate::promql::{asked, comparing_all};
use crate::sources::{Expression, Kind, list, text};

/// Selectors that may be empty while all is well, each with its reason.
const LEGITIMATELY_EMPTY: [(&str, &str); 1] =
    [("ALERTS{alertstate=\"firing\"}", "has series only while an alert fires; the panel says 0 meanwhile")];

/// One series of an answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Series {
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its value now.
    pub value: f64,
}

/// The Prometheus of the tests. Answers are kept: within one look everything is asked once.
pub struct Prometheus {
    client: reqwest::Client,
    url: String,
    kept: BTreeMap<String, Result<Vec<Series>, String>>,
}

impl Prometheus {
    /// At `http://HOST:PORT`.
    pub fn at(url: &str) -> Prometheus {
        Prometheus { client: http_client().unwrap(), url: url.to_owned(), kept: BTreeMap::new() }
    }

    /// `GET /api/v1/…`: its `data`, or Prometheus's own words.
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

    /// An instant query.
    pub async fn query(&mut self, expression: &str) -> Result<Vec<Series>, String> {
        if let Some(kept) = self.kept.get(expression) {
            return kept.clone();
        }
        let answer = self.get("query", &[("query", expression)]).await.map(|data| series(&data));
        self.kept.insert(expression.to_owned(), answer.clone());
        answer
    }

    /// Forgets all answers: from now on Prometheus is asked again.
    pub fn look_again(&mut self) {
        self.kept.clear();
    }

    /// Alerts that fire: `Name`, or `Name job` where the alert is about one job.
    pub async fn firing(&self) -> Vec<String> {
        let data = self.get("alerts", &[]).await.unwrap();
        let firing = list(&data, "/alerts").iter().filter(|alert| text(alert, "/state") == "firing");
        let name = |a: &Value| format!("{} {}", text(a, "/labels/alertname"), text(a, "/labels/job"));
        firing.map(|alert| name(alert).trim_end().to_owned()).collect()
    }

    /// What is wrong with an expression; nothing is good.
    pub async fn faults(&mut self, expression: &Expression) -> Vec<String> {
        let asked = asked(&expression.text);
        let mut faults = Vec::new();
        let mut labels = Vec::new();
        if asked.selectors.is_empty() {
            faults.push("asks for no metric".to_owned());
        }
        for selector in &asked.selectors {
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
        for label in &asked.groupings {
            if !has(&labels, label) {
                faults.push(format!("groups by {label}, which no series has"));
            }
        }
        faults.extend(self.faults_of_whole(expression, &labels).await);
        faults
    }

    async fn faults_of_whole(&mut self, expression: &Expression, selected: &[Series]) -> Vec<String> {
        let expected = match &expression.kind {
            Kind::Variable(label) if has(selected, label) => return Vec::new(),
            Kind::Variable(label) => return vec![format!("no series has the label {label}")],
            // What an absence asks for was looked for above.
            Kind::Alert(_) if expression.text.contains("absent(") => return Vec::new(),
            Kind::Panel(_) | Kind::Record(_) => expression.text.clone(),
            Kind::Alert(_) | Kind::Annotation(_) => comparing_all(&expression.text),
        };
        let found = match self.query(&expected).await {
            Ok(found) => found,
            Err(error) => return vec![error],
        };
        let mut faults = Vec::new();
        if found.iter().all(|series| series.value.is_nan()) {
            faults.push(if found.is_empty() { "is empty".to_owned() } else { "is not a number".to_owned() });
        }
        if let Kind::Panel(labels) | Kind::Annotation(labels) = &expression.kind {
            faults.extend(
                labels
                    .iter()
                    .filter(|l| !has(&found, l))
                    .map(|l| format!("its legend names {l}, which no series has")),
            );
        }
        if let Kind::Record(name) = &expression.kind
            && self.query(name).await.is_ok_and(|kept| kept.is_empty())
        {
            faults.push(format!("nothing is recorded as {name}"));
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
