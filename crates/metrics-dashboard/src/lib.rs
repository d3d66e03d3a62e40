//! metrics-dashboard: a live view of the pipeline that never shows a figure it does not know.
//!
//! Every second it reads Cassandra ([`cassandra_view`]) and Kafka ([`kafka_view`]), combines the results ([`overview`], from
//! [`rates`], [`lag`] and [`services`], all pure) and sends them to all clients ([`feed`], the one file that orders
//! effects). [`api`] serves the page, the JSON and the event stream. The service keeps no state that matters: it can be
//! killed at any time, and any number of instances can run.
//!
//! If a server is down, its figures are `null` with a reason and the service is not ready. The service recovers
//! automatically when the server is back.

pub mod api;
pub mod cassandra_view;
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

use anyhow::Context;
use common::runtime::admin::hosts::Hosts;
use common::runtime::admin::{self, Health};
use common::runtime::shutdown::Shutdown;
use reason::Origin;
use std::sync::Arc;
use std::time::Duration;

/// The service counts as unhealthy if the feed makes no progress for this long.
const STALL_LIMIT: Duration = Duration::from_secs(15);
/// Grace period of a shutdown. It is short, because no work has to be finished.
const GRACE: Duration = Duration::from_secs(5);

/// Runs until SIGTERM or SIGINT and returns the exit code of the signal.
///
/// # Errors Fails if a setting is invalid or the service cannot listen on its address. A server that does not respond
/// is not an error.
pub async fn run(config: &config::Config) -> anyhow::Result<u8> {
    let settings = serde_json::to_string(config).context("settings")?;
    let version = env!("CARGO_PKG_VERSION");
    tracing::info!(settings, version, page_built = api::page::is_built(), "settings in force");
    let definition = config.common.definition()?;
    let shutdown = Shutdown::on_signals(GRACE).context("signals")?;
    let health = Health::new(STALL_LIMIT, &[Origin::Kafka, Origin::Cassandra].map(Origin::name));
    let metrics = metrics::Metrics::new(&definition.stream.name, api::MAX_WATCHERS)?;
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
    feed::run(&stream, &board, &metrics, &health, &shutdown).await;
    health.stopping();
    tracing::info!("stopped");
    Ok(shutdown.exit_code())
}
