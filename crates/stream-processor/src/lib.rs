//! Kafka → Cassandra, every event counted once.
//!
//! A tour: [`group`] joins the consumer group and gives each assigned partition a fetch thread ([`fetch`], which decodes by
//! [`decode`] into [`chunk`]s) and a [`worker`]. [`open`] gathers where the partition stands and [`start`] decides where it
//! begins. The worker is the one file that orders effects; what a chunk comes to is decided in [`partition`] over
//! [`windows`], [`write_plan`] cuts it to statements, [`store`] and [`dead_letters`] write it, [`state`] commits it.
//! [`init`] makes tables and topics; [`verify`], [`report`], [`dlq`] and [`checkpoint`] are for operators;
//! [`log_reader`] reads a topic beside the group.

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
pub mod stages;
pub mod start;
pub mod state;
pub mod store;
pub mod verify;
pub mod windows;
pub mod worker;
pub mod write_plan;

use crate::config::{Cli, Command, RunArgs, VerifyArgs};
use crate::dead_letters::DeadLetterTopic;
use crate::error::ProcessorError;
use crate::fetch::ChunkLimits;
use crate::group::{Group, GroupSettings};
use crate::metrics::Metrics;
use crate::open::{Opener, Replays};
use crate::poison_gate::{PoisonLimits, WINDOW_RECORDS};
use crate::store::cassandra::{CassandraStore, StoreContext};
use crate::verify::Verifier;
use common::admin::hosts::Hosts;
use common::admin::{self, Health};
use common::config::CommonArgs;
use common::kafka::partition_count;
use common::presence::{self, Instance};
use common::registry::Registered;
use common::schema::dead_letter_topic;
use common::shutdown::Shutdown;
use common::stream::Definition;
use rdkafka::consumer::Consumer;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// The group's thread polls every 100 ms; it stands still only while a partition is opened or given up.
const STALL_LIMIT: Duration = Duration::from_secs(60);
/// Bytes of one chunk at most.
const CHUNK_BYTES: usize = 8 << 20;
/// Requests of `verify` in flight: it runs beside a processor.
const VERIFY_IN_FLIGHT: usize = 8;
const METADATA_DEADLINE: Duration = Duration::from_secs(10);
/// How long the process may take to end after its partitions had their time to stop.
const END_SECONDS: u64 = 5;

/// Runs one command to its end; the exit code says how it ended (143 or 130 after a signal).
pub async fn run(cli: Cli) -> Result<u8, ProcessorError> {
    let revoke_seconds = if let Command::Run(args) = &cli.command { args.revoke_seconds } else { 0 };
    let shutdown = Shutdown::on_signals(Duration::from_secs(revoke_seconds + END_SECONDS))
        .map_err(|e| ProcessorError::Fatal(format!("signals: {e}")))?;
    let definition = || cli.common.definition().map_err(|e| ProcessorError::Fatal(e.to_string()));
    if let Command::Checkpoint(command) = &cli.command {
        checkpoint::run(command, definition)?;
        return Ok(0);
    }
    let definition = definition()?;
    match &cli.command {
        Command::Init(args) => {
            let made = init::init(&cli.common, &definition, args, &shutdown).await?;
            made.report.iter().for_each(|line| tracing::info!("{line}"));
            Ok(0)
        }
        Command::Run(args) => {
            let ended = process(&cli.common, args, definition, shutdown.clone()).await;
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
        Command::Checkpoint(_) => Ok(0),
    }
}

/// `verify`: beside a running processor, or with `--rebuild` instead of one.
async fn verify(
    common: &CommonArgs,
    args: &VerifyArgs,
    definition: Definition,
    shutdown: &Shutdown,
) -> Result<(), ProcessorError> {
    let metrics = Arc::new(Metrics::new().map_err(|e| ProcessorError::Fatal(format!("metrics: {e}")))?);
    let session = common::cassandra::connect(common, METADATA_DEADLINE, shutdown).await;
    let session = session.map_err(|e| ProcessorError::Retryable(e.to_string()))?;
    let partitions = topic_partitions(&common.kafka_brokers, &common.topic_of(&definition)).await?;
    let context = StoreContext {
        session: Arc::clone(&session),
        metrics,
        abandon: shutdown.token().clone(),
        in_flight: VERIFY_IN_FLIGHT,
    };
    let store = CassandraStore::new(&common.keyspace, &definition, context).await?;
    let (keyspace, brokers) = (common.keyspace.clone(), common.kafka_brokers.clone());
    let topic = common.topic_of(&definition);
    let sources = verify::Sources { session, keyspace, definition, brokers, topic, store };
    let verifier = Verifier::new(sources, (args.memory_mib as usize) << 20).await?;
    verify::command::run(&verifier, args, partitions).await
}

/// The service: until a signal or an error.
async fn process(
    common: &CommonArgs,
    args: &RunArgs,
    definition: Definition,
    shutdown: Shutdown,
) -> Result<(), ProcessorError> {
    #[cfg(feature = "failpoints")]
    args.kill_at.as_ref().map_or(Ok(()), kill_at::KillAt::arm).map_err(ProcessorError::Fatal)?;
    // Secrets stand in files: only their paths are settings.
    let settings = serde_json::json!({"common": common, "run": args});
    tracing::info!(%settings, "settings in force");
    let metrics = Arc::new(Metrics::new().map_err(|e| ProcessorError::Fatal(format!("metrics: {e}")))?);
    metrics
        .watch_checkpoints(args.checkpoints.clone(), &definition.stream.name)
        .map_err(|e| ProcessorError::Fatal(format!("metrics: {e}")))?;
    let health = Health::new(STALL_LIMIT, &["kafka", "cassandra"]);
    let router = admin::router(Arc::clone(&health), metrics.registry.clone());
    let router = admin::guarded(router, &Hosts::new(&common.http_hosts), &metrics.registry)
        .map_err(|e| ProcessorError::Fatal(format!("metrics: {e}")))?;
    admin::serve(args.http_listen, router, shutdown.clone())
        .await
        .map_err(|e| ProcessorError::Fatal(e.to_string()))?;
    let instance = common.instance_name();
    let _name_lock = checkpoint::lock_instance(&args.checkpoints, &instance)?;
    let abandon = CancellationToken::new();
    let group = connect(common, args, definition, (&metrics, &health, &shutdown, &abandon)).await?;
    let runtime = tokio::runtime::Handle::current();
    let until_stopped = shutdown.clone();
    let deadline = Duration::from_secs(args.revoke_seconds);
    tokio::spawn(async move {
        until_stopped.begun().await;
        health.stopping();
        // Whoever still waits for Cassandra after the deadline gives up: nothing of the batch is committed.
        tokio::time::sleep(deadline).await;
        abandon.cancel();
    });
    let running = shutdown.running("consumer group");
    let ended = tokio::task::spawn_blocking(move || group.run(&runtime)).await;
    drop(running);
    shutdown.begin();
    ended.map_err(|e| ProcessorError::Fatal(format!("group: {e}")))?
}

type Shared<'a> = (&'a Arc<Metrics>, &'a Arc<Health>, &'a Shutdown, &'a CancellationToken);

/// Connects to both servers and checks that the stream is the registered one.
async fn connect(
    common: &CommonArgs,
    args: &RunArgs,
    definition: Definition,
    (metrics, health, shutdown, abandon): Shared<'_>,
) -> Result<Group<CassandraStore, DeadLetterTopic>, ProcessorError> {
    let wait = Duration::from_secs(args.start_seconds);
    let (topic, instance) = (common.topic_of(&definition), common.instance_name());
    let cluster_id = init::cluster_id(&common.kafka_brokers, wait).await?;
    health.set("kafka", Ok(()));
    let session = common::cassandra::connect(common, wait, shutdown).await;
    let session = session.map_err(|e| ProcessorError::Retryable(e.to_string()))?;
    health.set("cassandra", Ok(()));
    let partitions = topic_partitions(&common.kafka_brokers, &topic).await?;
    let wanted = Registered { layout: definition.layout(), cluster_id: cluster_id.clone(), partitions };
    init::check_registered(&session, &common.keyspace, &definition.stream.name, &wanted).await?;
    let who = Instance {
        keyspace: common.keyspace.clone(),
        service: "stream-processor",
        instance: instance.clone(),
    };
    tokio::spawn(presence::announce(Arc::clone(&session), who, Arc::clone(health), shutdown.clone()));
    let context = StoreContext {
        session,
        metrics: Arc::clone(metrics),
        abandon: abandon.clone(),
        in_flight: args.in_flight as usize,
    };
    let store = Arc::new(CassandraStore::new(&common.keyspace, &definition, context).await?);
    let dlq = dead_letter_topic(&topic);
    let dead_letters = DeadLetterTopic::new(&common.kafka_brokers, &topic, &dlq, abandon.clone());
    let dead_letters = Arc::new(dead_letters.map_err(|e| ProcessorError::Fatal(e.to_string()))?);
    let revoke_deadline = Duration::from_secs(args.revoke_seconds);
    let group_id =
        args.group_id.clone().unwrap_or_else(|| format!("stream-processor.{}", definition.stream.name));
    let settings = GroupSettings {
        brokers: common.kafka_brokers.clone(),
        topic: topic.clone(),
        group_id,
        instance: instance.clone(),
        limits: ChunkLimits {
            records: args.batch_records as usize,
            bytes: CHUNK_BYTES,
            linger: Duration::from_millis(u64::from(args.batch_millis)),
        },
        poison: PoisonLimits {
            consecutive: args.poison_in_a_row,
            window_poison: args.poison_percent * WINDOW_RECORDS / 100,
        },
        revoke_deadline,
    };
    let opener = Opener {
        brokers: common.kafka_brokers.clone(),
        definition: Arc::new(definition),
        topic,
        cluster_id,
        checkpoints: args.checkpoints.clone(),
        holder: format!("instance {instance}, pid {}", std::process::id()),
        recover: args.recover,
        replays: Replays::new(args.replay),
        memory_most: (args.seen_memory_mib as usize) << 20,
        held_deadline: revoke_deadline,
        store,
        metrics: Arc::clone(metrics),
        health: Arc::clone(health),
        shutdown: shutdown.clone(),
    };
    Group::new(settings, opener, dead_letters, Arc::clone(health), shutdown.clone())
}

async fn topic_partitions(brokers: &str, topic: &str) -> Result<i32, ProcessorError> {
    let (brokers, topic) = (brokers.to_owned(), topic.to_owned());
    let asked = tokio::task::spawn_blocking(move || {
        let client = common::kafka::wait_for_broker(&brokers, METADATA_DEADLINE)?;
        partition_count(client.client(), &brokers, &topic, METADATA_DEADLINE)
    });
    let asked = asked.await.map_err(|e| ProcessorError::Fatal(format!("asking kafka: {e}")))?;
    asked.map_err(|e| ProcessorError::Fatal(e.to_string()))
}

#[cfg(test)]
#[path = "../tests/simulation/mod.rs"]
mod simulation;
