//! Implements `run`: connects to Kafka and Cassandra, checks that the stream definition matches the registered one, and
//! runs the consumer group until shutdown.

use crate::commands::checkpoint;
use crate::commands::init;
use crate::config::RunArgs;
use crate::count::poison_gate::{PoisonLimits, WINDOW_RECORDS};
use crate::count::windows::pane::{Pane, PaneShape};
use crate::error::ProcessorError;
use crate::housekeeping;
use crate::io::dead_letters::DeadLetterTopic;
use crate::io::store::cassandra::CassandraStore;
use crate::io::store::requests::StoreContext;
use crate::metrics::Metrics;
use crate::pipeline::fetch::ChunkLimits;
use crate::pipeline::group;
use crate::pipeline::group::client::MemberSettings;
use crate::pipeline::group::ownership::{self, Ownership, Watched};
use crate::pipeline::group::parts::{GroupSettings, Parts};
use crate::pipeline::open::{Opener, Replays};
use common::contracts::stream::Definition;
use common::readers::registry::changed;
use common::runtime::admin::hosts::Hosts;
use common::runtime::admin::{self, Health};
use common::runtime::config::CommonArgs;
use common::runtime::kafka::{self, Topic, partition_count};
use common::runtime::presence::{self, Holdings, Instance};
use common::runtime::shutdown::Shutdown;
use rdkafka::consumer::Consumer;
use scylla::client::session::Session;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// The process is unhealthy if the group's thread reports no heartbeat for this long. The thread polls every 100 ms and
/// blocks only while it stops partitions.
const STALL_LIMIT: Duration = Duration::from_secs(60);
/// Maximum size of a chunk, in bytes of record values.
const CHUNK_BYTES: usize = 8 << 20;
/// The panes of one chunk may take the memory limit for hot panes and filters divided by this number, in addition to
/// it.
const CHUNK_PANES_DIVISOR: usize = 2;
/// How long to wait for the topic's metadata.
pub const METADATA_DEADLINE: Duration = Duration::from_secs(10);

/// What `run` has before it connects.
struct Service<'a> {
    common: &'a CommonArgs,
    args: &'a RunArgs,
    definition: Arc<Definition>,
    topic: String,
    instance: String,
    metrics: Arc<Metrics>,
    health: Arc<Health>,
    shutdown: Shutdown,
    abandon: CancellationToken,
}

fn fatal(what: &str) -> impl Fn(&dyn std::fmt::Display) -> ProcessorError + '_ {
    move |cause| ProcessorError::Fatal(format!("{what}: {cause}"))
}

/// Processes events until a signal or an error.
pub async fn run(
    common: &CommonArgs,
    args: &RunArgs,
    definition: Definition,
    shutdown: Shutdown,
) -> Result<(), ProcessorError> {
    #[cfg(feature = "failpoints")]
    args.kill_at
        .as_ref()
        .map_or(Ok(()), crate::pipeline::kill_at::KillAt::arm)
        .map_err(ProcessorError::Fatal)?;
    // Safe to log: secrets are kept in files, and the settings hold only their paths.
    let settings = serde_json::json!({"common": common, "run": args});
    tracing::info!(%settings, version = env!("CARGO_PKG_VERSION"), "settings in force");
    let service = Service {
        common,
        args,
        topic: common.topic_of(&definition),
        instance: common.instance_name(),
        definition: Arc::new(definition),
        metrics: Arc::new(Metrics::new().map_err(|e| fatal("cannot register the metrics")(&e))?),
        health: Health::new(STALL_LIMIT, &["kafka", "cassandra"]),
        shutdown,
        abandon: CancellationToken::new(),
    };
    service.serve().await?;
    let _name_lock = checkpoint::lock_instance(&args.checkpoints, &service.instance)?;
    let parts = Arc::new(service.connect().await?);
    service.abandon_after_deadline();
    service.start_housekeeping(&parts)?;
    let registration = tokio::spawn(service.watch_registration(&parts));
    let runtime = tokio::runtime::Handle::current();
    let running = service.shutdown.running("consumer group");
    let ended = tokio::task::spawn_blocking(move || group::run(&parts, &runtime)).await;
    drop(running);
    service.shutdown.begin();
    ended.map_err(|e| fatal("the consumer group's thread failed")(&e))??;
    registration.await.map_err(|e| fatal("watching the registration failed")(&e))?
}

impl Service<'_> {
    /// Serves `/healthz`, `/readyz` and `/metrics`.
    async fn serve(&self) -> Result<(), ProcessorError> {
        let metrics = &self.metrics;
        metrics
            .watch_checkpoints(self.args.checkpoints.clone(), &self.definition.stream.name)
            .map_err(|e| fatal("cannot register the metrics")(&e))?;
        let router = admin::router(Arc::clone(&self.health), metrics.registry.clone());
        let router = admin::guarded(router, &Hosts::new(&self.common.http_hosts), &metrics.registry);
        let router = router.map_err(|e| fatal("cannot register the metrics")(&e))?;
        let served = admin::serve(self.args.http_listen, router, self.shutdown.clone()).await;
        served.map(drop).map_err(|e| ProcessorError::Fatal(e.to_string()))
    }

    /// Aborts calls that still wait for Cassandra when the revoke deadline has passed since shutdown started. Their
    /// batches are not committed.
    fn abandon_after_deadline(&self) {
        let (shutdown, health, abandon) =
            (self.shutdown.clone(), Arc::clone(&self.health), self.abandon.clone());
        let deadline = self.revoke_deadline();
        tokio::spawn(async move {
            shutdown.begun().await;
            health.stopping();
            tokio::time::sleep(deadline).await;
            abandon.cancel();
        });
    }

    /// Starts the daily verification, unless it is switched off.
    fn start_housekeeping(
        &self,
        parts: &Parts<CassandraStore, DeadLetterTopic>,
    ) -> Result<(), ProcessorError> {
        let Some(verify_at_ms) = self.args.verify_at.millis() else { return Ok(()) };
        self.metrics.verification.enabled.set(1);
        let context = housekeeping::Context {
            session: Arc::clone(&parts.session),
            keyspace: self.common.keyspace.clone(),
            definition: Arc::clone(&parts.opener.definition),
            brokers: self.common.kafka_brokers.clone(),
            topic: self.topic.clone(),
            instance: self.instance.clone(),
            holdings: parts.holdings.clone(),
            metrics: Arc::clone(&self.metrics),
            shutdown: self.shutdown.clone(),
        };
        housekeeping::start(context, verify_at_ms).map_err(|e| fatal("cannot start the housekeeping")(&e))
    }

    /// Starts shutdown once `init` has registered another layout. The supervisor restarts the process, which then reads
    /// the new stream file.
    fn watch_registration(
        &self,
        parts: &Parts<CassandraStore, DeadLetterTopic>,
    ) -> impl Future<Output = Result<(), ProcessorError>> + use<> {
        let (session, definition) = (Arc::clone(&parts.session), Arc::clone(&parts.opener.definition));
        let (keyspace, shutdown) = (self.common.keyspace.clone(), self.shutdown.clone());
        async move {
            let changed = tokio::select! {
                () = shutdown.begun() => return Ok(()),
                changed = changed(&session, &keyspace, &definition) => changed,
            };
            tracing::warn!("{changed}");
            shutdown.begin();
            Err(init::of_registry(changed))
        }
    }

    /// Connects to Kafka and Cassandra and checks that the stream definition matches the registered one.
    async fn connect(&self) -> Result<Parts<CassandraStore, DeadLetterTopic>, ProcessorError> {
        let (common, brokers) = (self.common, &self.common.kafka_brokers);
        let wait = Duration::from_secs(self.args.start_seconds);
        let cluster_id = init::cluster_id(brokers, wait).await?;
        self.health.set("kafka", Ok(()));
        let session = common::runtime::cassandra::connect(common, wait, &self.shutdown).await?;
        self.health.set("cassandra", Ok(()));
        let partitions = topic_partitions(brokers, &self.topic).await?;
        let found = Topic { cluster_id: cluster_id.clone(), partitions };
        let registered = init::registered_stream(&session, common, &self.definition, &found).await?;
        let partitions = registered.partitions;
        let definition = Arc::new(registered.complete((*self.definition).clone()));
        init::check_servers(&session, common, &definition).await?;
        let context = StoreContext {
            session: Arc::clone(&session),
            metrics: Arc::clone(&self.metrics),
            abandon: self.abandon.clone(),
            in_flight: self.args.in_flight as usize,
            start_deadline: wait,
        };
        let store = Arc::new(CassandraStore::new(&common.keyspace, &definition, context).await?);
        let (watched, shutdown) = (Arc::clone(&store), self.shutdown.clone());
        tokio::spawn(async move { watched.watch(&shutdown).await });
        let dead_letters =
            DeadLetterTopic::new(brokers, &self.topic, Arc::clone(&self.health), self.abandon.clone());
        let dead_letters = Arc::new(dead_letters.map_err(|e| ProcessorError::Fatal(e.to_string()))?);
        let who = Instance::new(common, "stream-processor", &definition.stream.name);
        let holdings = Holdings::default();
        let opener = self.opener(definition, partitions, cluster_id, store)?;
        let ownership = self.observe(&session, &who, &opener, &holdings);
        Ok(Parts {
            settings: self.group_settings(),
            opener,
            dead_letters,
            session,
            who,
            holdings,
            ownership,
            health: Arc::clone(&self.health),
            metrics: Arc::clone(&self.metrics),
            shutdown: self.shutdown.clone(),
        })
    }

    /// Announces this instance to the others, and watches the announcements of all instances.
    fn observe(
        &self,
        session: &Arc<Session>,
        who: &Instance,
        opener: &Opener<CassandraStore>,
        holdings: &Holdings,
    ) -> Arc<Ownership> {
        let announcing = presence::announce(
            Arc::clone(session),
            who.clone(),
            holdings.clone(),
            Arc::clone(&self.health),
            self.shutdown.clone(),
        );
        tokio::spawn(announcing);
        let ownership = Arc::new(Ownership::default());
        let watched = Watched {
            session: Arc::clone(session),
            who: who.clone(),
            probe: Arc::clone(&opener.probe),
            topic: self.topic.clone(),
            partitions: opener.partitions,
            holdings: holdings.clone(),
            health: Arc::clone(&self.health),
            metrics: Arc::clone(&self.metrics),
        };
        tokio::spawn(ownership::watch(watched, Arc::clone(&ownership), self.shutdown.clone()));
        ownership
    }

    fn opener(
        &self,
        definition: Arc<Definition>,
        partitions: i32,
        cluster_id: String,
        store: Arc<CassandraStore>,
    ) -> Result<Opener<CassandraStore>, ProcessorError> {
        let brokers = &self.common.kafka_brokers;
        let probe = kafka::plain_consumer(brokers, "stream-processor-probe");
        Ok(Opener {
            brokers: brokers.clone(),
            probe: Arc::new(probe.map_err(|e| fatal("cannot create the kafka client")(&e))?),
            definition,
            topic: self.topic.clone(),
            partitions,
            cluster_id,
            checkpoints: self.args.checkpoints.clone(),
            holder: format!("instance {}, pid {}", self.instance, std::process::id()),
            recover: self.args.recover,
            replays: Replays::new(self.args.replay),
            max_memory_bytes: self.max_memory_bytes(),
            held_deadline: self.revoke_deadline(),
            store,
            metrics: Arc::clone(&self.metrics),
            health: Arc::clone(&self.health),
        })
    }

    fn group_settings(&self) -> GroupSettings {
        let default_group = || format!("stream-processor.{}", self.definition.stream.name);
        let pane_bytes = Pane::empty(&PaneShape::new(&self.definition)).bytes();
        GroupSettings {
            member: MemberSettings {
                brokers: self.common.kafka_brokers.clone(),
                group_id: self.args.group_id.clone().unwrap_or_else(default_group),
                instance: self.instance.clone(),
            },
            topic: self.topic.clone(),
            limits: ChunkLimits {
                records: self.args.batch_records as usize,
                bytes: CHUNK_BYTES,
                panes: (self.max_memory_bytes() / CHUNK_PANES_DIVISOR / pane_bytes).max(1),
                linger: Duration::from_millis(u64::from(self.args.batch_millis)),
            },
            poison: PoisonLimits {
                consecutive: self.args.poison_in_a_row,
                window_poison: self.args.poison_percent * WINDOW_RECORDS / 100,
            },
            revoke_deadline: self.revoke_deadline(),
        }
    }

    /// Maximum memory for the hot panes and filters of one partition.
    fn max_memory_bytes(&self) -> usize {
        (self.args.seen_memory_mib as usize) << 20
    }

    /// How long a partition may take to stop.
    fn revoke_deadline(&self) -> Duration {
        Duration::from_secs(self.args.revoke_seconds)
    }
}

/// Number of partitions that the topic has now.
pub async fn topic_partitions(brokers: &str, topic: &str) -> Result<i32, ProcessorError> {
    let (brokers, topic) = (brokers.to_owned(), topic.to_owned());
    let request = tokio::task::spawn_blocking(move || {
        let client = common::runtime::kafka::wait_for_broker(&brokers, METADATA_DEADLINE)?;
        partition_count(client.client(), &brokers, &topic, METADATA_DEADLINE)
    });
    let count = request.await.map_err(|e| fatal("reading the topic's metadata failed")(&e))?;
    count.map_err(|e| ProcessorError::Fatal(e.to_string()))
}
