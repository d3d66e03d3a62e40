//! Makes keyspace, tables and topics, and registers the stream: idempotent, waits for its servers, brings what earlier versions
//! made forward, and refuses what it must not change. `run` compares with the same description.

mod contract;
mod tables;
mod topics;

use crate::config::InitArgs;
use crate::error::ProcessorError;
use common::cassandra::{connect, local_datacenter};
use common::config::CommonArgs;
use common::kafka::{Topic, wait_for_broker};
use common::registry::{Registered, check_layout, check_tables};
use common::schema::{TOPIC_RETENTION_MS, dead_letter_topic};
use common::shutdown::Shutdown;
use common::stream::Definition;
use common::stream::layout::Changes;
use contract::{Replicas, keyspace_differences, needed_to_run, weak_durability};
use rdkafka::consumer::Consumer;
use scylla::client::session::Session;
use std::time::Duration;
pub(crate) use tables::of_registry;
use tables::{Keyspace, check_change};
use topics::{ADMIN_DEADLINE, Admin};

/// What `init` made sure of.
#[derive(Debug)]
pub struct Made {
    /// Kafka cluster.
    pub cluster_id: String,
    /// Lines for the user.
    pub report: Vec<String>,
}

fn fatal(what: &str) -> impl Fn(&dyn std::fmt::Display) -> ProcessorError + '_ {
    move |cause| ProcessorError::Fatal(format!("{what}: {cause}"))
}

/// Makes everything `definition` needs.
pub async fn init(
    common: &CommonArgs,
    definition: &Definition,
    args: &InitArgs,
    shutdown: &Shutdown,
) -> Result<Made, ProcessorError> {
    let wait = Duration::from_secs(args.wait_seconds);
    let replicas = replicas(args)?;
    let cluster_id = cluster_id(&common.kafka_brokers, wait).await?;
    let session = connect(common, wait, shutdown).await?;
    let datacenter = local_datacenter(&session, common)?;
    let stream = definition.stream.name.as_str();
    let keyspace = Keyspace { session: &session, name: &common.keyspace, stream };
    keyspace.make(&datacenter, replicas.factor).await?;
    let found = keyspace.found().await?;
    let mut differences = keyspace_differences(&common.keyspace, &found, &datacenter, Some(replicas.factor));
    // Nothing is altered before everything that would be refused has been looked at.
    keyspace.refuse_newer_tables().await?;
    let known = keyspace.registered().await?;
    let topic = common.topic_of(definition);
    if let Some(known) = &known {
        check_change(stream, known, &definition.layout())?;
        let same_partitions = Topic { cluster_id: cluster_id.clone(), partitions: known.partitions };
        known.check_topic(stream, &topic, &same_partitions).map_err(of_registry)?;
    }
    let admin = Admin::new(&common.kafka_brokers, "stream-processor-init")?;
    let contracts = contract::topics(&topic, &common.control_topic, args.partitions, replicas);
    admin.make(&contracts, replicas.factor).await?;
    let (partitions, _) = admin.partitions(&topic).await?;
    let found = Topic { cluster_id: cluster_id.clone(), partitions };
    check_topic((stream, &topic), &found, args.partitions, known.as_ref())?;
    for contract in &contracts {
        if let Some(found) = admin.settings(&contract.name).await? {
            differences.extend(contract.differences(&found, Some(replicas.factor), &common.kafka_brokers));
        }
    }
    refuse_differences(&differences)?;
    let altered = keyspace.make_tables(definition).await?;
    let changes = keyspace.register(&definition.layout(), &found).await?;
    // Another `init` may have been first.
    registered_stream(&session, common, definition, &found).await?;
    let mut report = report(definition, args, &topic);
    report.extend(altered.iter().map(|statement| format!("altered: {statement}")));
    report.extend(told(&changes));
    Ok(Made { cluster_id, report })
}

fn told(changes: &Changes) -> Option<String> {
    (!changes.is_empty()).then(|| {
        format!("registered, to be taken up when each service starts again, processors first:\n{changes}")
    })
}

fn replicas(args: &InitArgs) -> Result<Replicas, ProcessorError> {
    let factor = args.replication;
    let min_insync = args.min_insync_replicas.unwrap_or(Replicas::usual_min_insync(factor));
    if min_insync > factor {
        return Err(ProcessorError::Fatal(format!(
            "PIPELINE_MIN_INSYNC_REPLICAS={min_insync} is more than PIPELINE_REPLICATION={factor}: nothing could be written"
        )));
    }
    Ok(Replicas { factor, min_insync })
}

fn refuse_differences(differences: &[String]) -> Result<(), ProcessorError> {
    if differences.is_empty() {
        return Ok(());
    }
    let lines: Vec<String> = differences.iter().map(|line| format!("  - {line}")).collect();
    Err(ProcessorError::Refused(format!("topics or keyspace are not as they must be:\n{}", lines.join("\n"))))
}

/// Waits for a broker and returns the cluster's id.
pub async fn cluster_id(brokers: &str, wait: Duration) -> Result<String, ProcessorError> {
    let brokers = brokers.to_owned();
    let asked = tokio::task::spawn_blocking(move || {
        let client = wait_for_broker(&brokers, wait).map_err(|e| ProcessorError::Retryable(e.to_string()))?;
        client.client().fetch_cluster_id(ADMIN_DEADLINE).ok_or_else(|| {
            ProcessorError::Retryable(format!("kafka at {brokers} does not tell its cluster id"))
        })
    });
    asked.await.map_err(|e| ProcessorError::Fatal(format!("asking kafka: {e}")))?
}

/// How the stream was registered. Refuses tables of another version, another layout or cluster, and a topic with fewer partitions.
/// Partitions that were added later are not the stream's.
pub async fn registered_stream(
    session: &Session,
    common: &CommonArgs,
    definition: &Definition,
    found: &Topic,
) -> Result<Registered, ProcessorError> {
    let (keyspace, stream) = (&common.keyspace, &definition.stream.name);
    check_tables(session, keyspace, stream).await.map_err(of_registry)?;
    let registered = check_layout(session, keyspace, definition).await.map_err(of_registry)?;
    let own = Topic { partitions: found.partitions.min(registered.partitions), ..found.clone() };
    registered.check_topic(stream, &common.topic_of(definition), &own).map_err(of_registry)?;
    Ok(registered)
}

/// Refuses to run where topics or keyspace no longer have what the promises rest on.
pub async fn check_servers(
    session: &Session,
    common: &CommonArgs,
    definition: &Definition,
) -> Result<(), ProcessorError> {
    let (topic, stream) = (common.topic_of(definition), definition.stream.name.as_str());
    let datacenter = local_datacenter(session, common)?;
    let found = Keyspace { session, name: &common.keyspace, stream }.found().await?;
    let mut differences = keyspace_differences(&common.keyspace, &found, &datacenter, None);
    let admin = Admin::new(&common.kafka_brokers, "stream-processor-check")?;
    for contract in needed_to_run(&topic, definition.store.least_ttl_seconds() > 0) {
        match admin.settings(&contract.name).await? {
            Some(found) => {
                differences.extend(contract.differences(&found, None, &common.kafka_brokers));
                if let Some(weak) = weak_durability(&contract.name, &found) {
                    tracing::warn!("{weak}");
                }
            }
            None => tracing::warn!(topic = contract.name, "the topic's settings could not be checked"),
        }
    }
    refuse_differences(&differences)
}

/// The events topic may be there already: cluster and number of partitions must be the stream's.
fn check_topic(
    (stream, topic): (&str, &str),
    found: &Topic,
    wanted: i32,
    registered: Option<&Registered>,
) -> Result<(), ProcessorError> {
    if let Some(registered) = registered {
        registered.check_topic(stream, topic, found).map_err(of_registry)?;
    }
    if found.partitions != wanted {
        let found = found.partitions;
        return Err(ProcessorError::Refused(format!(
            "topic `{topic}` has {found} partitions, not {wanted}: the number is never changed; \
             set PIPELINE_PARTITIONS={found}, or choose another topic with PIPELINE_TOPIC"
        )));
    }
    Ok(())
}

/// What the layout means at the expected rate.
fn report(definition: &Definition, args: &InitArgs, topic: &str) -> Vec<String> {
    let store = &definition.store;
    let cells = i64::from(args.partitions) * i64::from(store.shards);
    let rows = args.expected_rate as i64 * (store.bucket.millis() / 1000) / cells;
    // About 24 bytes a cell with its share of the row's head, as measured on the default stream.
    let mebibytes = rows * (definition.columns.len() as i64 + 4) * 24 / (1 << 20);
    let horizon = match store.least_ttl_seconds() {
        0 => "none: rows are kept forever".to_owned(),
        ttl => format!("{} days back", (ttl * 1000 - TOPIC_RETENTION_MS) / 86_400_000 - 2),
    };
    vec![
        format!(
            "topic {topic}: {} partitions; dead letters in {}",
            args.partitions,
            dead_letter_topic(topic)
        ),
        format!(
            "at {} events/s a Cassandra partition ({} of one shard) holds about {rows} rows, {mebibytes} MiB",
            args.expected_rate,
            store.bucket.name()
        ),
        format!("time horizon of events: {horizon}"),
    ]
}
