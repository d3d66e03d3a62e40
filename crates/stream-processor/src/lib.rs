//! Writes events from Kafka to Cassandra and counts each exactly once.
//!
//! [`service`] wires the parts of `run` together. In [`pipeline`], `group` joins the consumer group and starts a fetch thread
//! (`fetch`) and a `worker` for each assigned partition; `open` reads what is stored about a partition, and `start` decides
//! at which offset it starts. [`record`] turns Kafka records into chunks of events. The worker is the only file that orders
//! effects: [`count`] applies a chunk and splits the result into statements, and [`io`] writes it and commits the state.
//! [`housekeeping`] verifies the day before, beside the workers.
//! [`commands`] implements `init` and the operator commands.

pub mod commands;
pub mod config;
pub mod count;
pub mod error;
pub mod housekeeping;
pub mod io;
pub mod metrics;
pub mod pipeline;
pub mod record;
pub mod service;

use crate::commands::verify::Verifier;
use crate::commands::{checkpoint, dlq, init, report, skip, verify};
use crate::config::{Cli, Command, VerifyArgs};
use crate::error::ProcessorError;
use crate::io::store::cassandra::CassandraStore;
use crate::io::store::requests::StoreContext;
use crate::metrics::Metrics;
use crate::service::{METADATA_DEADLINE, topic_partitions};
use common::contracts::stream::Definition;
use common::readers::registry::check_layout;
use common::runtime::config::CommonArgs;
use common::runtime::presence;
use common::runtime::shutdown::Shutdown;
use std::sync::Arc;
use std::time::Duration;

/// Maximum number of Cassandra requests of `verify` in flight. Low, because `verify` runs beside a processor.
const VERIFY_IN_FLIGHT: usize = 8;
/// How long the process may take to exit after the partitions' deadline to stop has passed.
const EXIT_SECONDS: u64 = 5;

/// Runs one command to completion and returns the exit code: 0, or 143 or 130 after a signal.
pub async fn run(cli: Cli) -> Result<u8, ProcessorError> {
    let revoke_seconds = if let Command::Run(args) = &cli.command { args.revoke_seconds } else { 0 };
    let shutdown = Shutdown::on_signals(Duration::from_secs(revoke_seconds + EXIT_SECONDS))
        .map_err(|e| ProcessorError::Fatal(format!("cannot install the signal handlers: {e}")))?;
    let definition = || cli.common.definition().map_err(|e| ProcessorError::Fatal(e.to_string()));
    if let Command::Checkpoint(command) = &cli.command {
        checkpoint::run(command, definition)?;
        return Ok(0);
    }
    let definition = definition()?;
    match &cli.command {
        Command::Init(args) => {
            let created = init::init(&cli.common, &definition, args, &shutdown).await?;
            created.report.iter().for_each(|line| tracing::info!("{line}"));
            Ok(0)
        }
        Command::Run(args) => {
            let ended = service::run(&cli.common, args, definition, shutdown.clone()).await;
            if let Err(ProcessorError::Refused(reason)) = &ended {
                presence::refuse(&cli.common, "stream-processor", reason).await;
            }
            ended.map(|()| shutdown.exit_code())
        }
        Command::Verify(args) => {
            verify(&cli.common, args, definition, &shutdown).await?;
            Ok(0)
        }
        Command::Windows(args) => {
            report::windows(&cli.common, &definition, args, &shutdown).await?;
            Ok(0)
        }
        Command::Dlq(command) => {
            dlq::run(&cli.common, &definition, command, &shutdown).await?;
            Ok(0)
        }
        Command::Skip(args) => {
            skip::skip(&cli.common, &definition, args, &shutdown).await?;
            Ok(0)
        }
        Command::Checkpoint(_) => Ok(0),
    }
}

/// Runs `verify` beside a running processor. With `--rebuild`, the processor must be stopped.
async fn verify(
    common: &CommonArgs,
    args: &VerifyArgs,
    definition: Definition,
    shutdown: &Shutdown,
) -> Result<(), ProcessorError> {
    let metrics = Arc::new(
        Metrics::new().map_err(|e| ProcessorError::Fatal(format!("cannot register the metrics: {e}")))?,
    );
    let session = common::runtime::cassandra::connect(common, METADATA_DEADLINE, shutdown).await?;
    let registered =
        check_layout(&session, &common.keyspace, &definition).await.map_err(init::of_registry)?;
    let definition = registered.complete(definition);
    let partitions = topic_partitions(&common.kafka_brokers, &common.topic_of(&definition)).await?;
    let context = StoreContext {
        session: Arc::clone(&session),
        metrics,
        abandon: shutdown.token().clone(),
        in_flight: VERIFY_IN_FLIGHT,
        start_deadline: METADATA_DEADLINE,
    };
    let store = CassandraStore::new(&common.keyspace, &definition, context).await?;
    let (keyspace, brokers) = (common.keyspace.clone(), common.kafka_brokers.clone());
    let topic = common.topic_of(&definition);
    let sources = verify::Sources { session, keyspace, definition, brokers, topic, store };
    let verifier = Verifier::new(sources, (args.memory_mib as usize) << 20).await?;
    verify::command::run(&verifier, args, partitions).await
}

#[cfg(test)]
#[path = "../tests/simulation/mod.rs"]
mod simulation;
