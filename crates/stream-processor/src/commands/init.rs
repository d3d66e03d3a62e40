//! `init` creates keyspace, tables and topics, and registers the stream. It waits for the servers, migrates tables of
//! earlier versions, and refuses changes that would break stored data. It is idempotent. `run` checks the servers
//! against the same requirements.

mod contract;
mod tables;
mod topics;

use crate::config::InitArgs;
use crate::error::ProcessorError;
use common::contracts::event::DAY_MS;
use common::contracts::stream::Definition;
use common::contracts::stream::layout::Changes;
use common::contracts::topics::dead_letter_topic;
use common::readers::registry::{Registered, check_layout, check_tables};
use common::runtime::cassandra::{connect, local_datacenter};
use common::runtime::config::CommonArgs;
use common::runtime::kafka::{Topic, wait_for_broker};
use common::runtime::shutdown::Shutdown;
use contract::{Replicas, keyspace_differences, needed_to_run, weak_durability};
use rdkafka::consumer::Consumer;
use scylla::client::session::Session;
use std::time::Duration;
pub(crate) use tables::of_registry;
use tables::{Keyspace, check_change};
use topics::{ADMIN_DEADLINE, Admin};

/// The result of a successful `init`.
#[derive(Debug)]
pub struct Initialized {
    /// Id of the Kafka cluster.
    pub cluster_id: String,
    /// Summary for the user, one line each.
    pub report: Vec<String>,
}

fn fatal(what: &str) -> impl Fn(&dyn std::fmt::Display) -> ProcessorError + '_ {
    move |cause| ProcessorError::Fatal(format!("{what}: {cause}"))
}

/// Creates everything that `definition` needs.
pub async fn init(
    common: &CommonArgs,
    definition: &Definition,
    args: &InitArgs,
    shutdown: &Shutdown,
) -> Result<Initialized, ProcessorError> {
    let wait = Duration::from_secs(args.wait_seconds);
    let replicas = replicas(args)?;
    let cluster_id = cluster_id(&common.kafka_brokers, wait).await?;
    let session = connect(common, wait, shutdown).await?;
    let datacenter = local_datacenter(&session, common)?;
    let stream = definition.stream.name.as_str();
    let keyspace = Keyspace { session: &session, name: &common.keyspace, stream };
    keyspace.create(&datacenter, replicas.factor).await?;
    let found = keyspace.found().await?;
    let mut differences = keyspace_differences(&common.keyspace, &found, &datacenter, Some(replicas.factor));
    // All checks that may refuse run before anything is altered.
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
    admin.create_topics(&contracts, replicas.factor).await?;
    let (partitions, _) = admin.partitions(&topic).await?;
    let found = Topic { cluster_id: cluster_id.clone(), partitions };
    check_topic(stream, &topic, &found, args.partitions, known.as_ref())?;
    for contract in &contracts {
        if let Some(found) = admin.settings(&contract.name).await? {
            differences.extend(contract.differences(&found, Some(replicas.factor), &common.kafka_brokers));
        }
    }
    refuse_differences(&differences)?;
    let altered = keyspace.create_tables(definition).await?;
    let changes = keyspace.register(&definition.layout(), &found).await?;
    // A concurrent `init` may have registered the stream first.
    registered_stream(&session, common, definition, &found).await?;
    let mut report = report(definition, args, &topic);
    report.extend(altered.iter().map(|statement| format!("altered: {statement}")));
    report.extend(describe_changes(&changes));
    Ok(Initialized { cluster_id, report })
}

fn describe_changes(changes: &Changes) -> Option<String> {
    (!changes.is_empty()).then(|| {
        format!(
            "registered changes, which take effect when each service restarts, processors first:\n{changes}"
        )
    })
}

fn replicas(args: &InitArgs) -> Result<Replicas, ProcessorError> {
    let factor = args.replication;
    let min_insync = args.min_insync_replicas.unwrap_or(Replicas::default_min_insync(factor));
    if min_insync > factor {
        return Err(ProcessorError::Fatal(format!(
            "PIPELINE_MIN_INSYNC_REPLICAS={min_insync} is greater than PIPELINE_REPLICATION={factor}, \
             so every write would fail; lower the former or raise the latter"
        )));
    }
    Ok(Replicas { factor, min_insync })
}

fn refuse_differences(differences: &[String]) -> Result<(), ProcessorError> {
    if differences.is_empty() {
        return Ok(());
    }
    let lines: Vec<String> = differences.iter().map(|line| format!("  - {line}")).collect();
    Err(ProcessorError::Refused(format!(
        "topics or keyspace do not meet the requirements:\n{}",
        lines.join("\n")
    )))
}

/// Waits up to `wait` for a broker and returns the id of its cluster.
pub async fn cluster_id(brokers: &str, wait: Duration) -> Result<String, ProcessorError> {
    let brokers = brokers.to_owned();
    let fetched = tokio::task::spawn_blocking(move || {
        let client = wait_for_broker(&brokers, wait).map_err(|e| ProcessorError::Retryable(e.to_string()))?;
        client.client().fetch_cluster_id(ADMIN_DEADLINE).ok_or_else(|| {
            ProcessorError::Retryable(format!("kafka at {brokers} did not return its cluster id"))
        })
    });
    fetched.await.map_err(|e| ProcessorError::Fatal(format!("fetching the cluster id: {e}")))?
}

/// Returns the registration of the stream. Refuses tables of a different version, a different layout or cluster, and a
/// topic with fewer partitions than registered. Partitions that were added to the topic later do not belong to the
/// stream.
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

/// Refuses to run if topics or keyspace no longer have the settings that exact counting depends on.
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
            None => tracing::warn!(
                topic = contract.name,
                "cannot check the settings of the topic: it does not exist or access is denied"
            ),
        }
    }
    refuse_differences(&differences)
}

/// Checks an events topic that may have existed before: its cluster and number of partitions must be those of the
/// stream.
fn check_topic(
    stream: &str,
    topic: &str,
    found: &Topic,
    expected: i32,
    registered: Option<&Registered>,
) -> Result<(), ProcessorError> {
    if let Some(registered) = registered {
        registered.check_topic(stream, topic, found).map_err(of_registry)?;
    }
    if found.partitions != expected {
        let found = found.partitions;
        return Err(ProcessorError::Refused(format!(
            "topic `{topic}` has {found} partitions, not {expected}, and init never changes this number; \
             set PIPELINE_PARTITIONS={found}, or choose another topic with PIPELINE_TOPIC"
        )));
    }
    Ok(())
}

/// Describes the topic, the size of a Cassandra partition at the expected rate, and the maximum age of events.
fn report(definition: &Definition, args: &InitArgs, topic: &str) -> Vec<String> {
    let store = &definition.store;
    let cells = i64::from(args.partitions) * i64::from(store.shards);
    let rows = args.expected_rate as i64 * (store.bucket.millis() / 1000) / cells;
    // About 24 bytes per cell, including its share of the row header, measured on the default stream.
    let mebibytes = rows * (definition.columns.len() as i64 + 4) * 24 / (1 << 20);
    let horizon = match definition.horizon_ms() {
        None => "unlimited, because rows never expire".to_owned(),
        Some(ms) => format!("{} days", ms / DAY_MS),
    };
    vec![
        format!(
            "topic {topic}: {} partitions; dead letters in {}",
            args.partitions,
            dead_letter_topic(topic)
        ),
        format!(
            "at {} events/s, a Cassandra partition ({} of one shard) holds about {rows} rows or {mebibytes} MiB",
            args.expected_rate,
            store.bucket.name()
        ),
        format!("maximum age of events: {horizon}"),
    ]
}
