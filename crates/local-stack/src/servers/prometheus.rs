//! Prometheus, if its Debian package could be downloaded. Its configuration comes from
//! `prometheus/prometheus-local.yml`.

use std::fs;
use std::path::Path;
use std::time::Duration;

use super::write_config;
use crate::config::{Settings, loopback};
use crate::error::{Error, Result};
use crate::process::Spec;

/// Maximum size of the store. Prometheus deletes the oldest blocks beyond it.
const RETENTION: &str = "512MB";

/// Process specification of Prometheus.
pub fn spec(settings: &Settings, binary: &Path) -> Result<Spec> {
    let template_file = settings.checkout.join("prometheus/prometheus-local.yml");
    let template = fs::read_to_string(&template_file).map_err(Error::io(&template_file))?;
    let ports = settings.ports;
    let values = [
        ("producer", ports.producer),
        ("processor", ports.processor),
        ("dashboard", ports.dashboard),
        ("kafka_agent", ports.kafka_agent),
        ("cassandra_agent", ports.cassandra_agent),
        ("prometheus", ports.prometheus),
    ]
    .map(|(name, port)| (name, loopback(port)));
    let config = settings.folders.config().join("prometheus.yml");
    let rules = settings.checkout.join("prometheus").display().to_string();
    write_config(&config, &template, &[&values[..], &[("rules", rules)]].concat())?;
    let data = settings.folders.data().join("prometheus");
    Ok(Spec {
        name: "prometheus".to_owned(),
        program: binary.to_owned(),
        arguments: vec![
            format!("--config.file={}", config.display()).into(),
            format!("--storage.tsdb.path={}", data.display()).into(),
            format!("--storage.tsdb.retention.size={RETENTION}").into(),
            format!("--web.listen-address={}", loopback(ports.prometheus)).into(),
        ],
        environment: Vec::new(),
        folder: settings.folders.logs(),
        address: format!("http://{}", loopback(ports.prometheus)),
        grace: Duration::from_secs(15),
    })
}
