//! Protection against DNS rebinding. A malicious site can point its own domain name to this machine. The browser then
//! treats the service as part of that site, and the scripts of the site can read every response. Such a request carries
//! the domain name of the site in its `Host` header, so every route, including `/metrics` and the probes, checks that
//! header against a list.
//!
//! `localhost` and all IP addresses are always allowed: an address is not resolved, so it cannot be rebound, and probes
//! and scrapes by address need no setting. Other names, such as the name of a container, come from
//! `PIPELINE_HTTP_HOSTS`.

use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode, Version, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

/// The response repeats at most this many characters of a rejected name.
const MAX_SHOWN_CHARACTERS: usize = 100;

/// Host names that a service accepts besides `localhost` and IP addresses.
#[derive(Debug, Clone, Default)]
pub struct Hosts(Arc<[String]>);

impl Hosts {
    /// Parses a comma-separated list of names without ports.
    pub fn new(names: &str) -> Hosts {
        let names = names.split(',').map(|name| name.trim().to_ascii_lowercase());
        Hosts(names.filter(|name| !name.is_empty()).collect())
    }

    /// Whether a request with this `Host` header is allowed. The header may contain a port.
    fn allow(&self, host: &str) -> bool {
        if let Some(rest) = host.strip_prefix('[') {
            return rest.split_once(']').is_some_and(|(address, _)| address.parse::<Ipv6Addr>().is_ok());
        }
        let name = host.split_once(':').map_or(host, |(name, _)| name);
        let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
        name == "localhost" || name.parse::<IpAddr>().is_ok() || self.0.contains(&name)
    }
}

/// Responds with status 421 (Misdirected Request) if the host name is not allowed.
pub(super) async fn check(State(hosts): State<Hosts>, request: Request, next: Next) -> Response {
    let named: Vec<&str> = request
        .headers()
        .get_all(header::HOST)
        .iter()
        .map(|value| HeaderValue::to_str(value).unwrap_or("?"))
        .chain(request.uri().authority().map(|authority| authority.as_str()))
        .collect();
    // Browsers always send a host. Only HTTP/1.0 and older allow a request without one.
    let refused = match named.iter().find(|host| !hosts.allow(host)) {
        Some(host) => host,
        None if named.is_empty() && request.version() > Version::HTTP_10 => "",
        None => return next.run(request).await,
    };
    let shown: String = refused.chars().take(MAX_SHOWN_CHARACTERS).collect();
    let text = format!(
        "host name `{shown}` is not allowed: use localhost or an IP address, or add the name to PIPELINE_HTTP_HOSTS\n"
    );
    (StatusCode::MISDIRECTED_REQUEST, text).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::admin::{self, Health};
    use crate::runtime::shutdown::Shutdown;
    use prometheus::Registry;
    use std::time::Duration;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[test]
    fn only_localhost_ip_addresses_and_configured_names_are_allowed() {
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
    async fn a_request_for_a_name_that_is_not_allowed_is_rejected_on_every_route() {
        let (registry, shutdown) = (Registry::new(), Shutdown::default());
        let health = Health::new(Duration::from_secs(60), &[]);
        let router = admin::router(health, registry.clone());
        let router = admin::guarded(router, &Hosts::new("dashboard"), &registry).unwrap();
        let address = admin::serve("127.0.0.1:0".parse().unwrap(), router, shutdown.clone()).await.unwrap();
        let send = async |request: &str| {
            let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
            stream.write_all(request.replace('\n', "\r\n").as_bytes()).await.unwrap();
            let mut response = String::new();
            stream.read_to_string(&mut response).await.unwrap();
            response
        };
        let end = "Connection: close\n\n";
        for path in ["/metrics", "/readyz", "/nowhere"] {
            let response = send(&format!("GET {path} HTTP/1.1\nHost: evil.example:8050\n{end}")).await;
            assert!(
                response.starts_with("HTTP/1.1 421") && response.contains("PIPELINE_HTTP_HOSTS"),
                "{response}"
            );
        }
        for request in [
            "GET /healthz HTTP/1.1\nHost: localhost\nHost: evil.example\n",
            "GET http://evil.example/healthz HTTP/1.1\nHost: localhost\n",
            "GET /healthz HTTP/1.1\n",
        ] {
            assert!(!send(&format!("{request}{end}")).await.contains(" 200 OK"), "{request}");
        }
        for request in [
            "GET /healthz HTTP/1.1\nHost: dashboard:8050\n",
            "GET /healthz HTTP/1.1\nHost: 127.0.0.1\n",
            "GET /healthz HTTP/1.0\n",
        ] {
            assert!(send(&format!("{request}{end}")).await.contains(" 200 OK"), "{request}");
        }
        let counted = send(&format!("GET /metrics HTTP/1.1\nHost: localhost\n{end}")).await;
        assert!(
            counted.contains("pipeline_http_requests_total{route=\"/metrics\",status=\"4xx\"} 1\n"),
            "{counted}"
        );
        shutdown.begin();
    }
}
