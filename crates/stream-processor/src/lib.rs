//! Writes events from Kafka to Cassandra and counts each exactly once.
//!
//! [`service`] wires the parts of `run` together. [`group`] joins the consumer group and starts a fetch thread
//! ([`fetch`]) and a [`worker`] for each assigned partition. The fetch thread uses [`decode`] to turn records into
//! [`chunk`]s. [`open`] reads what is stored about a partition, and [`start`] decides at which offset it starts. The
//! worker is the only file that orders effects: [`partition`] applies a chunk to the panes in [`windows`],
//! [`write_plan`] splits the result into statements, [`store`] and [`dead_letters`] write it, and [`state`] commits it.
//!
//! [`init`] creates tables and topics. [`verify`], [`report`], [`dlq`], [`skip`] and [`checkpoint`] implement the
//! operator commands. [`log_reader`] reads a topic outside the consumer group.

pub mod checkpoint;
pub mod chunk;
pub mod config;
pub mod dead_letters;
pub mod decode;
pub mod dlq;
pub mod error;
pub mod fetch;
pub mod group;
pub mod init;
#[cfg(feature = "failpoints")]
pub mod kill_at;
pub mod log_reader;
pub mod metrics;
pub mod open;
pub mod partition;
pub mod poison_gate;
pub mod report;
pub mod service;
pub mod skip;
pub mod stages;
pub mod start;
pub mod state;
pub mod store;
pub mod verify;
pub mod windows;
pub mod worker;
pub mod write_plan;

use crate::config::{Cli, Command, VerifyArgs};
use crate::error::ProcessorError;
use crate::metrics::Metrics;
use crate::service::{METADATA_DEADLINE, topic_partitions};
use crate::store::cassandra::CassandraStore;
use crate::store::requests::StoreContext;
use crate::verify::Verifier;
use common::config::CommonArgs;
use common::presence;
use common::registry::check_layout;
use common::shutdown::Shutdown;
use common::stream::Definition;
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
    let session = common::cassandra::connect(common, METADATA_DEADLINE, shutdown).await?;
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
