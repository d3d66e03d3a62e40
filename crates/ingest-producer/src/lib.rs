//! The producer: every interval of a schedule is fetched from a REST API and produced to Kafka, whatever fails in between.
//!
//! A tour. Pure: [`schedule`] tiles time into intervals, [`planner`] decides from the ledger's rows what to run now,
//! [`source`] knows requests, pages and how records become events. With effects: [`source::client`] asks the API,
//! [`ledger`] is the run ledger in Cassandra, [`publish`] hands events to Kafka and counts acknowledgements. [`run`] orders
//! these for one attempt; [`service`] wakes the planner and begins attempts; [`control`] carries out commands of the control
//! topic. Beside it: [`stress`] measures, [`check`] shows what a source gives, [`runs`] and [`backfill`] are the ledger's
//! commands.
//!
//! The one rule: a run has succeeded when every page was fetched and every record acknowledged; until then its interval is
//! due again, and gives the same event ids.

// The ledgers' suite is compiled here and in `tests/ledger.rs`: it names the crate the same way in both.
#[cfg(test)]
extern crate self as ingest_producer;

pub mod backfill;
pub mod check;
pub mod config;
pub mod control;
pub mod error;
pub mod ledger;
pub mod metrics;
pub mod planner;
pub mod publish;
pub mod registration;
pub mod run;
pub mod runs;
pub mod schedule;
pub mod service;
pub mod source;
pub mod stress;
pub mod unresolved;

use anyhow::Context;
use common::admin::hosts::Hosts;
use common::admin::{self, Health};
use common::presence::{self, Holdings, Instance};
use common::registry::{check_layout, check_tables};
use common::shutdown::Shutdown;
use common::stream::Definition;
use config::{Command, Config, ControlArgs, RunArgs, RunsCommand, SourceCommand, StressArgs};
use control::log::CassandraControlLog;
use control::{Control, Desk, listen, work::Worker};
use ledger::cassandra::CassandraLedger;
use metrics::Metrics;
use publish::KafkaPublisher;
use registration::RegisteredTopic;
use run::Runner;
use scylla::client::session::Session;
use service::Service;
use source::client::SourceClient;
use source::extract::Extractor;
use source::request::Requests;
use std::sync::Arc;
use std::time::Duration;

/// How long to wait for Kafka and Cassandra at start.
const START_DEADLINE: Duration = Duration::from_secs(30);
/// How long the main loop may stand still before `/healthz` says so: a planning over 50,000 intervals takes seconds.
const STALL_LIMIT: Duration = Duration::from_secs(30);
/// How long the last records may take to leave.
const FLUSH_DEADLINE: Duration = Duration::from_secs(5);
/// How long the process may take to end: runs have 5 s to drain, records to leave, and then there is some room.
const GRACE: Duration = Duration::from_secs(15);

/// What a command leaves behind.
#[derive(Debug, Default)]
pub struct Done {
    /// For stdout.
    pub text: String,
    /// Exit code.
    pub code: u8,
}

impl Done {
    /// Text for stdout and exit code 0.
    pub fn text(text: impl Into<String>) -> Done {
        Done { text: text.into(), code: 0 }
    }
}

/// Now, in Unix milliseconds.
pub fn now_ms() -> i64 {
    chrono::Utc::now().timestamp_millis()
}

/// Carries out the command.
pub async fn run(config: &Config) -> anyhow::Result<Done> {
    let definition = config.common.definition()?;
    let shutdown = Shutdown::on_signals(GRACE).context("signals")?;
    match &config.command {
        Command::Run(args) => {
            let done = produce(config, args, definition, &shutdown).await;
            if let Err(refusal) = &done
                && registration::is_refusal(refusal)
            {
                presence::refuse(&config.common, "ingest-producer", &format!("{refusal:#}")).await;
            }
            done
        }
        Command::Stress(args) => stress(config, args, definition, shutdown).await,
        Command::Source(SourceCommand::Check(args)) => {
            let requests = Requests::new(&definition, config.source_origin.as_deref())?;
            let client = SourceClient::new(&definition.source)?;
            check::check(&definition, &requests, &client, args, now_ms()).await
        }
        Command::Runs(command) => {
            let ledger = ledger(config, &definition, &shutdown).await?;
            match command {
                RunsCommand::List(args) => runs::list(&ledger, args, now_ms()).await,
                RunsCommand::Show(args) => runs::show(&ledger, args).await,
                RunsCommand::Clear(args) => runs::clear(&ledger, args, now_ms()).await,
                RunsCommand::GiveUp(args) => runs::give_up(&ledger, args, now_ms()).await,
            }
        }
        Command::Control(args) => command(config, args, &definition, &shutdown).await,
        Command::Backfill { args, dry_run } => {
            let parts = Parts::connect(config, definition, &shutdown).await?;
            let done = backfill::backfill(&parts.runner, args, *dry_run, &shutdown).await;
            parts.flush().await;
            done
        }
    }
}

async fn ledger(
    config: &Config,
    definition: &Definition,
    shutdown: &Shutdown,
) -> anyhow::Result<CassandraLedger> {
    let session = common::cassandra::connect(&config.common, START_DEADLINE, shutdown).await?;
    Ok(CassandraLedger::new(session, &config.common.keyspace, &definition.stream.name).await?)
}

async fn command(
    config: &Config,
    args: &ControlArgs,
    definition: &Definition,
    shutdown: &Shutdown,
) -> anyhow::Result<Done> {
    let common = &config.common;
    let session = common::cassandra::connect(common, START_DEADLINE, shutdown).await?;
    let stream = &definition.stream.name;
    let log = CassandraControlLog::new(session, &common.keyspace, stream).await?;
    control::send::control(common, stream, &log, args, shutdown).await
}

/// Everything a run needs, connected.
struct Parts {
    runner: Arc<Runner>,
    session: Arc<Session>,
    publisher: Arc<KafkaPublisher>,
    health: Arc<Health>,
}

impl Parts {
    async fn connect(config: &Config, definition: Definition, shutdown: &Shutdown) -> anyhow::Result<Parts> {
        let common = &config.common;
        let health = Health::new(STALL_LIMIT, &[publish::DEPENDENCY, service::DEPENDENCY]);
        let metrics = Metrics::new().context("metrics")?;
        let requests = Requests::new(&definition, config.source_origin.as_deref())?;
        let source = Arc::new(SourceClient::new(&definition.source)?);
        let (brokers, instance) = (common.kafka_brokers.clone(), common.instance_name());
        let topic = common.topic_of(&definition);
        let made = KafkaPublisher::new(&brokers, &instance, &topic, metrics.clone(), health.clone())?;
        let publisher = Arc::new(made);
        let asked = publisher.clone();
        tokio::task::spawn_blocking(move || asked.describe(START_DEADLINE)).await.context("kafka")??;
        health.set(publish::DEPENDENCY, Ok(()));
        let session = common::cassandra::connect(common, START_DEADLINE, shutdown).await?;
        check_tables(&session, &common.keyspace, &definition.stream.name).await?;
        let registered = check_layout(&session, &common.keyspace, &definition).await?;
        let definition = registered.complete(definition);
        let topic = Arc::new(RegisteredTopic {
            publisher: publisher.clone(),
            session: session.clone(),
            keyspace: common.keyspace.clone(),
            stream: definition.stream.name.clone(),
        });
        topic.compare().await?;
        let stream = &definition.stream.name;
        let ledger = CassandraLedger::new(session.clone(), &common.keyspace, stream).await?;
        health.set(service::DEPENDENCY, Ok(()));
        let runner = Arc::new(Runner {
            extractor: Extractor::new(&definition),
            definition,
            ledger: Arc::new(ledger),
            source,
            publisher: publisher.clone(),
            topic,
            requests,
            metrics,
            owner: instance,
            lease_ms: i64::from(config.lease_seconds) * 1000,
            clock: Arc::new(now_ms),
        });
        Ok(Parts { runner, session, publisher, health })
    }

    /// Listens to the control topic until shutdown.
    async fn commands(
        &self,
        config: &Config,
        shutdown: &Shutdown,
    ) -> anyhow::Result<impl Future<Output = anyhow::Result<()>> + use<>> {
        let (common, runner) = (&config.common, &self.runner);
        let stream = runner.definition.stream.name.clone();
        let log = CassandraControlLog::new(self.session.clone(), &common.keyspace, &stream).await?;
        let (brokers, topic) = (common.kafka_brokers.clone(), common.topic_of(&runner.definition));
        let work = Worker { runner: runner.clone(), brokers: brokers.clone(), topic };
        let life = uuid::Uuid::new_v4().simple().to_string();
        let control = Control::new(Desk {
            stream: stream.clone(),
            owner: format!("{}/{}", runner.owner, &life[..8]),
            log: Arc::new(log),
            work: Arc::new(work),
            clock: runner.clock.clone(),
            metrics: runner.metrics.clone(),
        });
        let source = listen::Source { brokers, topic: common.control_topic.clone(), stream };
        Ok(listen::listen(control, source, runner.ledger.clone(), shutdown.clone()))
    }

    async fn flush(&self) {
        let publisher = self.publisher.clone();
        if let Err(e) = tokio::task::spawn_blocking(move || publisher.flush(FLUSH_DEADLINE)).await {
            tracing::error!(error = %e, "flush");
        }
    }
}

async fn produce(
    config: &Config,
    args: &RunArgs,
    definition: Definition,
    shutdown: &Shutdown,
) -> anyhow::Result<Done> {
    tracing::info!(settings = %serde_json::to_string(config)?, "configuration");
    if definition.event.id.is_none() {
        tracing::warn!(stream = definition.stream.name, "{}", check::NO_ID);
    }
    let parts = Parts::connect(config, definition, shutdown).await?;
    let registry = &parts.runner.metrics.registry;
    let router = admin::router(parts.health.clone(), registry.clone());
    let router = admin::guarded(router, &Hosts::new(&config.common.http_hosts), registry)?;
    admin::serve(args.http_listen, router, shutdown.clone()).await?;
    let stream = &parts.runner.definition.stream.name;
    let who = Instance::new(&config.common, "ingest-producer", stream);
    let announcing = presence::announce(
        parts.session.clone(),
        who,
        Holdings::default(),
        parts.health.clone(),
        shutdown.clone(),
    );
    tokio::spawn(announcing);
    let (session, runner) = (parts.session.clone(), parts.runner.clone());
    let (keyspace, stopped) = (config.common.keyspace.clone(), shutdown.clone());
    let registration =
        tokio::spawn(
            async move { registration::watch(&session, &keyspace, &runner.definition, &stopped).await },
        );
    let commands_running = shutdown.running("commands");
    let commands = tokio::spawn(parts.commands(config, shutdown).await?);
    let runs_running = shutdown.running("runs");
    let served = Service::new(parts.runner.clone(), parts.health.clone()).run(shutdown).await;
    drop(runs_running);
    shutdown.begin();
    if let Err(e) = commands.await.context("commands")? {
        tracing::error!(error = format!("{e:#}"), "commands");
    }
    drop(commands_running);
    let _flushing = shutdown.running("flush");
    parts.flush().await;
    served?;
    registration.await.context("registration")??;
    Ok(Done { text: String::new(), code: shutdown.exit_code() })
}

async fn stress(
    config: &Config,
    args: &StressArgs,
    definition: Definition,
    shutdown: Shutdown,
) -> anyhow::Result<Done> {
    registration::check_load(&config.common, &definition, START_DEADLINE, &shutdown).await?;
    let (brokers, topic) = (config.common.kafka_brokers.clone(), config.common.topic_of(&definition));
    let (stopped, settings) = (shutdown.clone(), args.clone());
    let running =
        tokio::task::spawn_blocking(move || stress::run(&brokers, &topic, &definition, &settings, &stopped));
    let report = running.await.context("stress")??;
    let text = if args.json { serde_json::to_string(&report)? } else { format!("stress: {report}") };
    let code = if report.failures > 0 { 1 } else { shutdown.exit_code() };
    Ok(Done { text, code })
}
