//! Makes keyspace, tables and topics, once: idempotent, waits for its servers, and refuses what exists in another shape.

use crate::config::InitArgs;
use crate::error::ProcessorError;
use common::cassandra::connect;
use common::config::CommonArgs;
use common::kafka::{PARTITIONER, client_config, wait_for_broker};
use common::registry::{Registered, RegistryError, registered};
use common::schema::{self, CONTROL_RETENTION_MS, DEAD_LETTER_RETENTION_MS, SEGMENT_MS, TOPIC_RETENTION_MS};
use common::shutdown::Shutdown;
use common::stream::Definition;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, ResourceSpecifier, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::Consumer;
use rdkafka::error::RDKafkaErrorCode;
use scylla::client::session::Session;
use scylla::value::CqlTimestamp;
use std::time::Duration;

const ADMIN_DEADLINE: Duration = Duration::from_secs(30);

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
    let cluster_id = cluster_id(&common.kafka_brokers, wait).await?;
    let session =
        connect(common, wait, shutdown).await.map_err(|e| ProcessorError::Retryable(e.to_string()))?;
    make_tables(&session, &common.keyspace, definition, args.replication).await?;
    let topic = common.topic_of(definition);
    let wanted = Registered {
        layout: definition.layout(),
        cluster_id: cluster_id.clone(),
        partitions: args.partitions,
    };
    let stream = &definition.stream.name;
    let known = registered(&session, &common.keyspace, stream).await.ok();
    let admin = make_topics(common, &topic, args).await?;
    let found = partition_count(&admin, &topic).await?;
    check_partitions((stream, &topic), found, args.partitions, known.map(|known| known.partitions))?;
    check_topic(&admin, &topic).await?;
    register(&session, &common.keyspace, &definition.stream.name, &wanted).await?;
    Ok(Made { cluster_id, report: report(definition, args, &topic) })
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

async fn make_tables(
    session: &Session,
    keyspace: &str,
    definition: &Definition,
    replication: i32,
) -> Result<(), ProcessorError> {
    let keyspace_cql = format!(
        "CREATE KEYSPACE IF NOT EXISTS {keyspace} WITH replication = \
         {{'class': 'NetworkTopologyStrategy', 'replication_factor': {replication}}}"
    );
    let tables =
        schema::shared_tables(keyspace).into_iter().chain(schema::stream_tables(keyspace, definition));
    let statements = std::iter::once((format!("keyspace {keyspace}"), keyspace_cql)).chain(tables);
    for (name, cql) in statements {
        session.query_unpaged(cql, ()).await.map_err(|e| fatal(&format!("cassandra: making {name}"))(&e))?;
    }
    Ok(())
}

/// Writes the layout once; another one that is there already is refused.
async fn register(
    session: &Session,
    keyspace: &str,
    stream: &str,
    wanted: &Registered,
) -> Result<(), ProcessorError> {
    let insert = format!(
        "INSERT INTO {keyspace}.streams (stream, layout, cluster_id, partitions, partitioner, created_at) \
         VALUES (?, ?, ?, ?, ?, ?) IF NOT EXISTS"
    );
    let now = CqlTimestamp(chrono::Utc::now().timestamp_millis());
    let values = (stream, &wanted.layout, &wanted.cluster_id, wanted.partitions, PARTITIONER, now);
    session
        .query_unpaged(insert, values)
        .await
        .map_err(|e| fatal("cassandra: registering the stream")(&e))?;
    registered_partitions(session, keyspace, stream, wanted).await.map(drop)
}

/// The number of partitions that the stream was registered with. Refuses another layout or cluster, and a topic with fewer
/// partitions. Partitions that were added later are not the stream's.
pub async fn registered_partitions(
    session: &Session,
    keyspace: &str,
    stream: &str,
    now: &Registered,
) -> Result<i32, ProcessorError> {
    let found = registered(session, keyspace, stream).await.map_err(|e| match e {
        RegistryError::Unavailable { .. } => ProcessorError::Retryable(e.to_string()),
        _ => ProcessorError::Fatal(e.to_string()),
    })?;
    if (&found.layout, &found.cluster_id) == (&now.layout, &now.cluster_id)
        && found.partitions <= now.partitions
    {
        return Ok(found.partitions);
    }
    let (registered, now) = (format!("{found:?}"), format!("{now:?}"));
    let another = RegistryError::Another { stream: stream.to_owned(), registered, now };
    Err(ProcessorError::Refused(another.to_string()))
}

async fn make_topics(
    common: &CommonArgs,
    topic: &str,
    args: &InitArgs,
) -> Result<AdminClient<DefaultClientContext>, ProcessorError> {
    let admin: AdminClient<DefaultClientContext> =
        client_config(&common.kafka_brokers, "stream-processor-init")
            .create()
            .map_err(|e| fatal("kafka")(&e))?;
    let dead_letters = schema::dead_letter_topic(topic);
    let text = |ms: i64| ms.to_string();
    let (events, dead, control, segment) = (
        text(TOPIC_RETENTION_MS),
        text(DEAD_LETTER_RETENTION_MS),
        text(CONTROL_RETENTION_MS),
        text(SEGMENT_MS),
    );
    let wanted = [
        (topic, args.partitions, &events, "LogAppendTime"),
        (&dead_letters, 1, &dead, "CreateTime"),
        (&common.control_topic, 1, &control, "CreateTime"),
    ];
    let most = common::kafka::MAX_MESSAGE_BYTES.to_string();
    let topics: Vec<NewTopic<'_>> = wanted
        .iter()
        .map(|(name, partitions, retention, timestamps)| {
            NewTopic::new(name, *partitions, TopicReplication::Fixed(args.replication))
                .set("cleanup.policy", "delete")
                .set("retention.ms", retention)
                .set("segment.ms", &segment)
                .set("message.timestamp.type", timestamps)
                .set("compression.type", "producer")
                .set("max.message.bytes", &most)
        })
        .collect();
    let options = AdminOptions::new().operation_timeout(Some(ADMIN_DEADLINE));
    let made = admin.create_topics(&topics, &options).await.map_err(|e| fatal("kafka: making topics")(&e))?;
    for result in made {
        match result {
            Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
            Err((name, code)) => {
                return Err(ProcessorError::Fatal(format!("kafka: making topic {name}: {code}")));
            }
        }
    }
    Ok(admin)
}

/// The events topic may be there already: its number of partitions must be the stream's.
fn check_partitions(
    (stream, topic): (&str, &str),
    found: i32,
    wanted: i32,
    registered: Option<i32>,
) -> Result<(), ProcessorError> {
    if let Some(registered) = registered.filter(|registered| found > *registered) {
        let (stream, topic) = (stream.to_owned(), topic.to_owned());
        let other = RegistryError::OtherPartitions { stream, topic, registered, found };
        return Err(ProcessorError::Refused(other.to_string()));
    }
    if found != wanted {
        return Err(ProcessorError::Refused(format!(
            "topic `{topic}` has {found} partitions, not {wanted}: the number is never changed; \
             set PIPELINE_PARTITIONS={found}, or choose another topic with PIPELINE_TOPIC"
        )));
    }
    Ok(())
}

/// Its settings must be the contract's too.
async fn check_topic(admin: &AdminClient<DefaultClientContext>, topic: &str) -> Result<(), ProcessorError> {
    let asked = admin
        .describe_configs(&[ResourceSpecifier::Topic(topic)], &AdminOptions::new())
        .await
        .map_err(|e| fatal("kafka: reading the topic's settings")(&e))?;
    let resource = asked.into_iter().next().and_then(Result::ok);
    let timestamps =
        resource.as_ref().and_then(|r| r.get("message.timestamp.type")).and_then(|e| e.value.clone());
    if timestamps.as_deref() != Some("LogAppendTime") {
        return Err(ProcessorError::Refused(format!(
            "topic `{topic}` has message.timestamp.type={}, but it must be LogAppendTime: the broker's clock decides \
             retention and lag; set it with kafka-configs.sh, or choose another topic with PIPELINE_TOPIC",
            timestamps.unwrap_or_else(|| "unknown".into())
        )));
    }
    Ok(())
}

/// A new topic's metadata takes a moment to reach every broker.
async fn partition_count(
    admin: &AdminClient<DefaultClientContext>,
    topic: &str,
) -> Result<i32, ProcessorError> {
    let mut last = String::new();
    for _ in 0..50 {
        let asked = tokio::task::block_in_place(|| admin.inner().fetch_metadata(Some(topic), ADMIN_DEADLINE));
        match asked {
            Ok(metadata) => {
                let found = metadata.topics().iter().find(|t| t.name() == topic && t.error().is_none());
                if let Some(found) = found.filter(|t| !t.partitions().is_empty()) {
                    return Ok(found.partitions().len() as i32);
                }
            }
            Err(e) => last = e.to_string(),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Err(ProcessorError::Retryable(format!("kafka: topic {topic} was made, but is not to be seen {last}")))
}

/// What the layout means at the expected rate.
fn report(definition: &Definition, args: &InitArgs, topic: &str) -> Vec<String> {
    let store = &definition.store;
    let cells = i64::from(args.partitions) * i64::from(store.shards);
    let rows = args.expected_rate as i64 * (store.bucket.millis() / 1000) / cells;
    // About 24 bytes a cell with its share of the row's head, as measured on the default stream.
    let mebibytes = rows * (definition.columns.len() as i64 + 4) * 24 / (1 << 20);
    let horizon = match store.ttl_seconds {
        0 => "none: rows are kept for ever".to_owned(),
        ttl => format!("{} days back", (ttl * 1000 - TOPIC_RETENTION_MS) / 86_400_000 - 2),
    };
    vec![
        format!(
            "topic {topic}: {} partitions; dead letters in {}",
            args.partitions,
            schema::dead_letter_topic(topic)
        ),
        format!(
            "at {} events/s a Cassandra partition ({} of one shard) holds about {rows} rows, {mebibytes} MiB",
            args.expected_rate,
            store.bucket.name()
        ),
        format!("time horizon of events: {horizon}"),
    ]
}
