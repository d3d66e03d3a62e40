//! By which host names a service may be asked. A page of another site can make its own name point to this machine (DNS rebinding);
//! the browser then takes the service for that site and lets its scripts read every answer. Such a request names the site
//! in its `Host` header, so names are checked against a list, `/metrics` and the probes included.
//!
//! Always allowed: `localhost` and every IP address. An address is not looked up, so it cannot be rebound; probes and scrapes by
//! address need no setting. Other names, such as a container's, come from `PIPELINE_HTTP_HOSTS`.

use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode, Version, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

/// Characters of a refused name that are repeated in the answer.
const SHOWN_MOST: usize = 100;

/// Names that a service answers to besides `localhost` and IP addresses.
#[derive(Debug, Clone, Default)]
pub struct Hosts(Arc<[String]>);

impl Hosts {
    /// From a list separated by commas, without ports.
    pub fn new(names: &str) -> Hosts {
        let names = names.split(',').map(|name| name.trim().to_ascii_lowercase());
        Hosts(names.filter(|name| !name.is_empty()).collect())
    }

    /// Whether a `Host` header, with or without a port, may be answered.
    fn allow(&self, host: &str) -> bool {
        if let Some(rest) = host.strip_prefix('[') {
            return rest.split_once(']').is_some_and(|(address, _)| address.parse::<Ipv6Addr>().is_ok());
        }
        let name = host.split_once(':').map_or(host, |(name, _)| name);
        let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
        name == "localhost" || name.parse::<IpAddr>().is_ok() || self.0.contains(&name)
    }
}

/// Answers 421 to a request for any other name.
pub(super) async fn check(State(hosts): State<Hosts>, request: Request, next: Next) -> Response {
    let named: Vec<&str> = request
        .headers()
        .get_all(header::HOST)
        .iter()
        .map(|value| HeaderValue::to_str(value).unwrap_or("?"))
        .chain(request.uri().authority().map(|authority| authority.as_str()))
        .collect();
    // Browsers always name a host. Before HTTP/1.1 a request need not.
    let refused = match named.iter().find(|host| !hosts.allow(host)) {
        Some(host) => host,
        None if named.is_empty() && request.version() > Version::HTTP_10 => "",
        None => return next.run(request).await,
    };
    let shown: String = refused.chars().take(SHOWN_MOST).collect();
    let text = format!(
        "this service does not answer to the name `{shown}`: ask for localhost or an IP address, or add the name to PIPELINE_HTTP_HOSTS\n"
    );
    (StatusCode::MISDIRECTED_REQUEST, text).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::{self, Health};
    use crate::shutdown::Shutdown;
    use prometheus::Registry;
    use std::time::Duration;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[test]
    fn localhost_addresses_and_the_names_of_the_setting_are_allowed_and_no_other() {
        let hosts = Hosts::new("dashboard, Metrics.example");
        let check = |host: &str, allowed| assert_eq!(hosts.allow(host), allowed, "{host}");
        for host in [
            "localhost",
            "LOCALHOST:8050",
            "localhost.:1",
            "127.0.0.1:8050",
            "10.1.2.3",
            "[::1]:8050",
            "[::1]",
        ] {
            check(host, true);
        }
        for host in ["dashboard:8050", "Dashboard", "metrics.example."] {
            check(host, true);
        }
        for host in [
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "evil.example:127",
            "dashboard.evil.example",
            "",
            "?",
            "::1",
            "[evil.example]",
            "[::1",
            "localhost@evil.example",
        ] {
            check(host, false);
        }
        assert!(!Hosts::default().allow("dashboard"));
    }

    #[tokio::test]
    async fn a_request_for_another_name_reads_nothing() {
        let (registry, shutdown) = (Registry::new(), Shutdown::default());
        let health = Health::new(Duration::from_secs(60), &[]);
        let router = admin::router(health, registry.clone());
        let router = admin::guarded(router, &Hosts::new("dashboard"), &registry).unwrap();
        let address = admin::serve("127.0.0.1:0".parse().unwrap(), router, shutdown.clone()).await.unwrap();
        let ask = async |request: &str| {
            let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
            stream.write_all(request.replace('\n', "\r\n").as_bytes()).await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            answer
        };
        let end = "Connection: close\n\n";
        for path in ["/metrics", "/readyz", "/nowhere"] {
            let answer = ask(&format!("GET {path} HTTP/1.1\nHost: evil.example:8050\n{end}")).await;
            assert!(answer.starts_with("HTTP/1.1 421") && answer.contains("PIPELINE_HTTP_HOSTS"), "{answer}");
        }
        for request in [
            "GET /healthz HTTP/1.1\nHost: localhost\nHost: evil.example\n",
            "GET http://evil.example/healthz HTTP/1.1\nHost: localhost\n",
            "GET /healthz HTTP/1.1\n",
        ] {
            assert!(!ask(&format!("{request}{end}")).await.contains(" 200 OK"), "{request}");
        }
        for request in [
            "GET /healthz HTTP/1.1\nHost: dashboard:8050\n",
            "GET /healthz HTTP/1.1\nHost: 127.0.0.1\n",
            "GET /healthz HTTP/1.0\n",
        ] {
            assert!(ask(&format!("{request}{end}")).await.contains(" 200 OK"), "{request}");
        }
        let counted = ask(&format!("GET /metrics HTTP/1.1\nHost: localhost\n{end}")).await;
        assert!(
            counted.contains("pipeline_http_requests_total{route=\"/metrics\",status=\"4xx\"} 1\n"),
            "{counted}"
        );
        shutdown.begin();
    }
}
