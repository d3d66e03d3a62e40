//! metrics-dashboard: what the pipeline does, as it happens, and nothing that is not so.
//!
//! Each second it reads Cassandra ([`store`]) and Kafka ([`kafka_view`]), puts both together ([`overview`], from [`rates`],
//! [`lag`] and [`services`], all pure) and hands the result to everybody who watches ([`feed`], the one file that orders
//! effects). The page, the JSON and the feed of events are [`api`]'s. It holds nothing that matters: it may be killed at any time, and
//! any number of them may run.
//!
//! A server that is down is shown as such: its figures are `null` with a reason, the service is not ready, and goes on by
//! itself when the server is back.

pub mod api;
pub mod config;
pub mod error;
pub mod feed;
pub mod kafka_view;
pub mod lag;
pub mod metrics;
pub mod overview;
pub mod rates;
pub mod reason;
pub mod services;
pub mod store;

use anyhow::Context;
use common::admin::hosts::Hosts;
use common::admin::{self, Health};
use common::shutdown::Shutdown;
use std::sync::Arc;
use std::time::Duration;

/// Longest time the feed may stand still before the service counts as dead.
const STALL_LIMIT: Duration = Duration::from_secs(15);
/// How long the process may take to end: it holds nothing that has to be brought to an end.
const GRACE: Duration = Duration::from_secs(5);

/// Runs until SIGTERM or SIGINT; the exit code says which.
///
/// # Errors
/// A setting that cannot be used, or an address that cannot be listened on. Servers that do not answer are no error.
pub async fn run(config: &config::Config) -> anyhow::Result<u8> {
    let settings = serde_json::to_string(config).context("settings")?;
    tracing::info!(settings, page_built = api::page::is_built(), "settings in force");
    let definition = config.common.definition()?;
    let shutdown = Shutdown::on_signals(GRACE).context("signals")?;
    let health = Health::new(STALL_LIMIT, &[feed::KAFKA, feed::CASSANDRA]);
    let metrics = metrics::Metrics::new(&definition.stream.name)?;
    let board = feed::Board::new(&definition.stream.name);
    let router = api::router(api::Api::new(board.clone(), metrics.clone(), shutdown.clone()))
        .merge(admin::router(health.clone(), metrics.registry().clone()));
    let router = admin::guarded(router, &Hosts::new(&config.common.http_hosts), metrics.registry())?;
    admin::serve(config.http_listen, router, shutdown.clone()).await?;
    let stream = feed::Stream {
        topic: config.common.topic_of(&definition),
        settings: config.common.clone(),
        definition: Arc::new(definition),
    };
    let _feeding = shutdown.running("feed");
    feed::run(&stream, &board, &metrics, (&health, &shutdown)).await;
    health.stopping();
    tracing::info!("stopped");
    Ok(shutdown.exit_code())
}
