//! The dashboard service: what it reports during faults, which host names it accepts, and which requests it refuses.

use std::time::Duration;

use local_stack::servers::http_client;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::harness::{LONG_TIMEOUT, Pipeline, Service, TIMEOUT, wait_for, wait_until};
use crate::outages::Proxy;

/// Longer than the request timeout of the service.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

impl Service {
    /// State and reason of an instance in `/api/v1/services`. `None` if the instance is not listed or the request
    /// fails.
    async fn listed(&self, instance: &str) -> Option<(String, Value)> {
        let services = self.json("/api/v1/services").await?;
        let one = services["services"].as_array()?.iter().find(|one| one["instance"] == instance)?.clone();
        Some((one["state"].as_str()?.to_owned(), one["reason"].clone()))
    }

    async fn lists(&self, instance: &str, state: &str) -> bool {
        self.listed(instance).await.is_some_and(|(found, _)| found == state)
    }

    /// The current time of the service in Unix seconds.
    async fn unix_seconds(&self) -> i64 {
        let overview = self.json("/api/v1/overview").await.unwrap();
        let as_of = chrono::DateTime::parse_from_rfc3339(overview["as_of"].as_str().unwrap());
        as_of.unwrap().timestamp()
    }

    /// The last point of the throughput chart in Unix seconds.
    async fn chart_ends(&self) -> i64 {
        let chart = self.json("/api/v1/throughput?minutes=1").await.unwrap();
        chart["points"].as_array().unwrap().last().unwrap()["at"].as_i64().unwrap()
    }

    /// The complete HTTP answer to a request with this `Host` header.
    async fn get_with_host(&self, host: &str, path: &str) -> String {
        let address = self.address.strip_prefix("http://").unwrap();
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_processor_is_listed_as_silent_and_a_refusing_one_with_its_reason() {
    let mut pipeline = Pipeline::initialised("presence").await;
    let mut dashboard = pipeline.dashboard();
    dashboard.ready().await;
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    wait_until("the processor is listed as ready", TIMEOUT, || async {
        dashboard.lists("one", "ready").await
    })
    .await;
    processor.kill().await;
    wait_until("the processor is listed as silent", TIMEOUT, || async {
        dashboard.lists("one", "silent").await
    })
    .await;

    pipeline.edit_stream(|text| text.replace("values = [\"female\", \"male\"]", "values = [\"female\"]"));
    let mut refusing = pipeline.processor("one");
    assert_eq!(refusing.end().await.code(), Some(3), "{}", refusing.log_text());
    let (_, reason) = wait_for("the processor is listed as refused", TIMEOUT, || async {
        dashboard.listed("one").await.filter(|(state, _)| state == "refused")
    })
    .await;
    assert!(reason.as_str().unwrap().contains("registered"), "{reason}");

    pipeline.edit_stream(|text| text.replace("values = [\"female\"]", "values = [\"female\", \"male\"]"));
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    wait_until("the processor is listed as ready again", TIMEOUT, || async {
        dashboard.lists("one", "ready").await
    })
    .await;
    processor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn figures_are_unknown_while_cassandra_hangs_and_known_again_afterwards() {
    let pipeline = Pipeline::initialised("still").await;
    let proxy = Proxy::to(pipeline.cassandra_address()).await;
    let mut dashboard = pipeline.dashboard_with(&[("PIPELINE_CASSANDRA_NODES", proxy.address.clone())]);
    dashboard.ready().await;
    let windows = "/api/v1/windows?last=10m";
    assert!(dashboard.json(windows).await.unwrap()["windows"].is_array());
    proxy.hangs.send_replace(true);
    wait_until("the figures of cassandra are unknown", TIMEOUT, || async {
        let overview = dashboard.json("/api/v1/overview").await.unwrap_or_default();
        overview["rows_written"].is_null() && overview["reasons"]["rows_written"]["source"] == "cassandra"
    })
    .await;
    for list in ["runs", "services"] {
        let answer = dashboard.json(&format!("/api/v1/{list}")).await.unwrap();
        assert!(answer[list].is_null() && answer["reason"]["source"] == "cassandra", "{answer}");
    }
    let (seen, chart_ends) = (dashboard.unix_seconds().await, dashboard.chart_ends().await);
    wait_until("some seconds have passed", TIMEOUT, || async { dashboard.unix_seconds().await > seen + 3 })
        .await;
    assert_eq!(
        dashboard.chart_ends().await,
        chart_ends,
        "the chart must not show zeros for seconds that could not be read"
    );
    let requests = (0..12).map(|_| async {
        let url = format!("{}{windows}", dashboard.address);
        let answer = http_client().unwrap().get(url).timeout(ANSWER_TIMEOUT).send().await.unwrap();
        let (status, retry) = (answer.status().as_u16(), answer.headers().contains_key("retry-after"));
        (status, retry, answer.json::<Value>().await.unwrap())
    });
    for (status, retry, answer) in futures::future::join_all(requests).await {
        assert!(status == 504 || (status == 503 && retry), "{status} {answer}");
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(!message.contains('\n') && !message.is_empty(), "{answer}");
    }
    proxy.hangs.send_replace(false);
    wait_until("the figures of cassandra are known again", LONG_TIMEOUT, || async {
        dashboard.json("/api/v1/overview").await.is_some_and(|overview| overview["rows_written"] == 0)
    })
    .await;
    wait_until("the windows are known again", TIMEOUT, || async {
        dashboard.json(windows).await.is_some_and(|answer| answer["windows"].is_array())
    })
    .await;
    dashboard.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn foreign_host_names_and_expensive_queries_are_refused() {
    let pipeline = Pipeline::initialised("names").await;
    let mut dashboard = pipeline.dashboard_with(&[("PIPELINE_HTTP_HOSTS", "metrics-dashboard".to_owned())]);
    dashboard.ready().await;
    for path in ["/", "/api/v1/overview", "/api/v1/stream", "/api/v1/services", "/metrics", "/readyz"] {
        let answer = dashboard.get_with_host("rebound.example:8050", path).await;
        assert!(answer.starts_with("HTTP/1.1 421") && !answer.contains(&pipeline.topic), "{path}: {answer}");
    }
    for host in ["localhost:8050", "127.0.0.1", "metrics-dashboard:8050"] {
        let answer = dashboard.get_with_host(host, "/metrics").await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{host}: {answer}");
    }
    let answer = dashboard.get_with_host("localhost", "/api/v1/windows?by=nationality&last=30d").await;
    assert!(answer.starts_with("HTTP/1.1 400") && answer.contains(r#""source":"request""#), "{answer}");
    assert!(answer.contains("ask for a shorter span"), "{answer}");
    dashboard.stop().await;
}
