//! The producer. It fetches every interval of a schedule from a REST API and produces the records to Kafka, and it
//! retries until both have succeeded.
//!
//! Pure modules: [`schedule`] divides time into intervals, [`planner`] decides from the ledger's rows what to run now,
//! and [`source`] builds requests, follows pages and turns records into events. Modules with effects:
//! [`source::client`] calls the API, [`ledger`] is the run ledger in Cassandra, and [`publish`] hands events to Kafka
//! and counts acknowledgements. [`run`] orders these effects for one attempt, [`service`] runs the planner and starts
//! attempts, and [`control`] executes the commands of the control topic. Command-line tools: [`stress`] measures
//! throughput, [`new`] drafts the definition of a stream with the pure module [`draft`], [`check`] previews the events of
//! a source, and [`runs`] and [`backfill`] work on the ledger.
//!
//! The one rule: a run succeeds when every page has been fetched and every record acknowledged. Until then its interval
//! stays due, and every attempt produces the same event ids.

// The ledger suite is compiled both here and in `tests/ledger.rs`. This alias lets it use the same paths in both.
#[cfg(test)]
extern crate self as ingest_producer;

pub mod backfill;
pub mod check;
pub mod config;
pub mod control;
pub mod draft;
pub mod error;
pub mod ledger;
pub mod metrics;
pub mod new;
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
use common::contracts::stream::Definition;
use common::readers::registry::{check_layout, check_tables};
use common::runtime::admin::hosts::Hosts;
use common::runtime::admin::{self, Health};
use common::runtime::alarm::JobAlarm;
use common::runtime::presence::{self, Holdings, Instance};
use common::runtime::shutdown::Shutdown;
use config::{Command, Config, ControlArgs, RunArgs, RunsCommand, SourceCommand, StressArgs};
use control::log::CassandraControlLog;
use control::{CommandContext, Control, listen, work::Worker};
use ledger::cassandra::CassandraLedger;
use metrics::Metrics;
use publish::KafkaPublisher;
use registration::RegisteredTopic;
use run::Runner;
use scylla::client::session::Session;
use service::Service;
use source::client::{ClientError, SourceClient};
use source::extract::Extractor;
use source::request::Requests;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;

/// How long to wait for Kafka and Cassandra at startup.
const START_DEADLINE: Duration = Duration::from_secs(30);
/// How long the main loop may stall before `/healthz` fails. Planning 50,000 intervals takes seconds.
const STALL_LIMIT: Duration = Duration::from_secs(30);
/// How long to wait at shutdown for queued records to reach Kafka.
const FLUSH_DEADLINE: Duration = Duration::from_secs(5);
/// How long the process may take to shut down: 5 s to drain runs, 5 s to flush records, and some headroom.
const GRACE: Duration = Duration::from_secs(15);

/// The output of a command.
#[derive(Debug, Default)]
pub struct CommandOutput {
    /// Text for stdout; nothing is printed if it is empty.
    pub text: String,
    /// Exit code of the process.
    pub code: u8,
}

impl CommandOutput {
    /// Output with exit code 0.
    pub fn text(text: impl Into<String>) -> CommandOutput {
        CommandOutput { text: text.into(), code: 0 }
    }
}

/// The client of a definition's source.
fn client(definition: &Definition, requests: &Requests) -> Result<SourceClient, ClientError> {
    let mut source = definition.source.clone();
    requests.replace_token_origin(&mut source.auth);
    SourceClient::new(&source)
}

/// The current time in Unix milliseconds.
pub fn now_ms() -> i64 {
    chrono::Utc::now().timestamp_millis()
}

/// Executes the command of `config`.
pub async fn run(config: &Config) -> anyhow::Result<CommandOutput> {
    // The only command without a stream definition.
    if let Command::Source(SourceCommand::New(args)) = &config.command {
        return new::new(args, now_ms()).await;
    }
    let definition = config.common.definition()?;
    let shutdown = Shutdown::on_signals(GRACE).context("cannot install signal handlers")?;
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
        Command::Source(SourceCommand::New(args)) => new::new(args, now_ms()).await,
        Command::Source(SourceCommand::Check(args)) => {
            let requests = Requests::new(&definition, config.source_origin.as_deref())?;
            let client = client(&definition, &requests)?;
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
        Command::Control(args) => control_command(config, args, &definition, &shutdown).await,
        Command::Backfill { args, dry_run } => {
            let connections = Connections::connect(config, definition, &shutdown).await?;
            let done = backfill::backfill(&connections.runner, args, *dry_run, &shutdown).await;
            connections.flush().await;
            done
        }
    }
}

async fn ledger(
    config: &Config,
    definition: &Definition,
    shutdown: &Shutdown,
) -> anyhow::Result<CassandraLedger> {
    let session = common::runtime::cassandra::connect(&config.common, START_DEADLINE, shutdown).await?;
    Ok(CassandraLedger::new(session, &config.common.keyspace, &definition.stream.name).await?)
}

async fn control_command(
    config: &Config,
    args: &ControlArgs,
    definition: &Definition,
    shutdown: &Shutdown,
) -> anyhow::Result<CommandOutput> {
    let common = &config.common;
    let session = common::runtime::cassandra::connect(common, START_DEADLINE, shutdown).await?;
    let stream = &definition.stream.name;
    let log = CassandraControlLog::new(session, &common.keyspace, stream).await?;
    control::send::control(common, stream, &log, args, shutdown).await
}

/// The runner and the connections it uses.
struct Connections {
    runner: Arc<Runner>,
    session: Arc<Session>,
    publisher: Arc<KafkaPublisher>,
    health: Arc<Health>,
    /// Notified after each command of the control topic.
    commands: Arc<Notify>,
}

impl Connections {
    async fn connect(
        config: &Config,
        definition: Definition,
        shutdown: &Shutdown,
    ) -> anyhow::Result<Connections> {
        let common = &config.common;
        let health = Health::new(STALL_LIMIT, &[publish::DEPENDENCY, service::DEPENDENCY]);
        let metrics = Metrics::new().context("cannot register metrics")?;
        let requests = Requests::new(&definition, config.source_origin.as_deref())?;
        let source = Arc::new(client(&definition, &requests)?);
        let (brokers, instance) = (common.kafka_brokers.clone(), common.instance_name());
        let topic = common.topic_of(&definition);
        let publisher = KafkaPublisher::new(&brokers, &instance, &topic, metrics.clone(), health.clone())?;
        let publisher = Arc::new(publisher);
        let probe = publisher.clone();
        tokio::task::spawn_blocking(move || probe.describe(START_DEADLINE)).await.context("kafka")??;
        health.set(publish::DEPENDENCY, Ok(()));
        let session = common::runtime::cassandra::connect(common, START_DEADLINE, shutdown).await?;
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
        Ok(Connections { runner, session, publisher, health, commands: Arc::default() })
    }

    /// Returns a future that executes commands of the control topic until shutdown.
    async fn command_listener(
        &self,
        config: &Config,
        shutdown: &Shutdown,
    ) -> anyhow::Result<impl Future<Output = anyhow::Result<()>> + use<>> {
        let (common, runner) = (&config.common, &self.runner);
        let stream = runner.definition.stream.name.clone();
        let log = CassandraControlLog::new(self.session.clone(), &common.keyspace, &stream).await?;
        let (brokers, topic) = (common.kafka_brokers.clone(), common.topic_of(&runner.definition));
        let executed = self.commands.clone();
        let work = Worker { runner: runner.clone(), brokers: brokers.clone(), topic, executed };
        let process_id = uuid::Uuid::new_v4().simple().to_string();
        let control = Control::new(CommandContext {
            stream: stream.clone(),
            owner: format!("{}/{}", runner.owner, &process_id[..8]),
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
            tracing::error!(error = %e, "flushing records panicked");
        }
    }
}

async fn produce(
    config: &Config,
    args: &RunArgs,
    definition: Definition,
    shutdown: &Shutdown,
) -> anyhow::Result<CommandOutput> {
    let settings = serde_json::to_string(config)?;
    tracing::info!(settings, version = env!("CARGO_PKG_VERSION"), "settings in force");
    if definition.event.id.is_empty() {
        tracing::warn!(stream = definition.stream.name, "{}", check::NO_ID);
    }
    let connections = Connections::connect(config, definition, shutdown).await?;
    let registry = &connections.runner.metrics.registry;
    let router = admin::router(connections.health.clone(), registry.clone());
    let router = admin::guarded(router, &Hosts::new(&config.common.http_hosts), registry)?;
    admin::serve(args.http_listen, router, shutdown.clone()).await?;
    let stream = &connections.runner.definition.stream.name;
    let instance = Instance::new(&config.common, "ingest-producer", stream);
    let announcing = presence::announce(
        connections.session.clone(),
        instance,
        Holdings::default(),
        connections.health.clone(),
        shutdown.clone(),
    );
    tokio::spawn(announcing);
    let (session, runner) = (connections.session.clone(), connections.runner.clone());
    let (keyspace, stopped) = (config.common.keyspace.clone(), shutdown.clone());
    let registration =
        tokio::spawn(
            async move { registration::watch(&session, &keyspace, &runner.definition, &stopped).await },
        );
    let commands_running = shutdown.running("commands");
    let commands = tokio::spawn(connections.command_listener(config, shutdown).await?);
    let runs_running = shutdown.running("runs");
    let Connections { runner, health, commands: executed, .. } = &connections;
    let alarm = Arc::new(JobAlarm::start());
    let service = Service::new(runner.clone(), health.clone(), alarm, executed.clone());
    let served = service.run(shutdown).await;
    drop(runs_running);
    shutdown.begin();
    if let Err(e) = commands.await.context("commands")? {
        tracing::error!(error = format!("{e:#}"), "the control topic listener failed");
    }
    drop(commands_running);
    let _flushing = shutdown.running("flush");
    connections.flush().await;
    served?;
    registration.await.context("registration")??;
    Ok(CommandOutput { text: String::new(), code: shutdown.exit_code() })
}

async fn stress(
    config: &Config,
    args: &StressArgs,
    definition: Definition,
    shutdown: Shutdown,
) -> anyhow::Result<CommandOutput> {
    registration::check_load(&config.common, &definition, START_DEADLINE, &shutdown).await?;
    let (brokers, topic) = (config.common.kafka_brokers.clone(), config.common.topic_of(&definition));
    let (stopped, settings) = (shutdown.clone(), args.clone());
    let running =
        tokio::task::spawn_blocking(move || stress::run(&brokers, &topic, &definition, &settings, &stopped));
    let report = running.await.context("stress")??;
    let text = if args.json { serde_json::to_string(&report)? } else { format!("stress: {report}") };
    let code = if report.failures > 0 { 1 } else { shutdown.exit_code() };
    Ok(CommandOutput { text, code })
}
