//! Process specifications of the programs in this workspace: the source simulator and the three services. They are
//! configured through environment variables, as in production.

use std::fs;
use std::time::Duration;

use common::contracts::stream::Definition;

use crate::config::{Settings, loopback};
use crate::error::{Error, Result};
use crate::process::Spec;

/// Address of the source in the shipped stream definition. If the ports were moved, the producer needs the new address.
const DEFAULT_SOURCE: &str = "127.0.0.1:8090";

/// Time limit for a service to shut down after SIGTERM.
const GRACE: Duration = Duration::from_secs(20);

/// The source simulator.
pub fn source(settings: &Settings) -> Result<Spec> {
    let address = loopback(settings.ports.source);
    let spec = service(settings, "source", "source-simulator", &["--listen", &address])?;
    Ok(Spec { address: format!("http://{address}"), ..spec })
}

/// `stream-processor init`, which creates the keyspace, tables and topics, then exits.
pub fn init(settings: &Settings) -> Result<Spec> {
    service(settings, "init", "stream-processor", &["init"])
}

/// `ingest-producer run`, which copies records from the REST API to Kafka.
pub fn producer(settings: &Settings) -> Result<Spec> {
    service(settings, "ingest-producer", "ingest-producer", &["run"])
        .map(|spec| listening(spec, settings.ports.producer))
}

/// `ingest-producer stress`, which sends events as fast as Kafka accepts them, then exits.
pub fn stress(settings: &Settings, arguments: &[&str]) -> Result<Spec> {
    service(settings, "stress", "ingest-producer", &[&["stress"], arguments].concat())
}

/// `ingest-producer stress` at `rate` events per second for `seconds`, with 5 % duplicates. Then it exits.
pub fn load(settings: &Settings, seconds: u64, rate: u64) -> Result<Spec> {
    let (seconds, rate) = (seconds.to_string(), rate.to_string());
    let arguments = ["stress", "--seconds", &seconds, "--rate", &rate, "--duplicates", "5"];
    service(settings, "stress", "ingest-producer", &arguments)
}

/// `stream-processor verify`, which compares panes and totals with the rows. It succeeds only if nothing differs.
pub fn verify(settings: &Settings) -> Result<Spec> {
    service(settings, "verify", "stream-processor", &["verify"])
}

/// Environment variables that name the keyspace, topics, consumer group and instance of a run after `name`.
pub fn names(name: &str) -> Vec<(String, String)> {
    [
        ("PIPELINE_KEYSPACE", name.to_owned()),
        ("PIPELINE_TOPIC", name.to_owned()),
        ("PIPELINE_CONTROL_TOPIC", format!("{name}.control")),
        ("PIPELINE_GROUP_ID", name.to_owned()),
        ("PIPELINE_INSTANCE", name.to_owned()),
    ]
    .map(|(variable, value)| (variable.to_owned(), value))
    .into()
}

/// Reads the stream definition of the services.
pub fn definition(settings: &Settings) -> Result<Definition> {
    let text = fs::read_to_string(&settings.stream).map_err(Error::io(&settings.stream))?;
    Definition::parse(&settings.stream.display().to_string(), &text)
        .map_err(|error| Error::Refused(error.to_string()))
}

/// `stream-processor run`, which writes events from Kafka to Cassandra.
pub fn processor(settings: &Settings) -> Result<Spec> {
    service(settings, "stream-processor", "stream-processor", &["run"])
        .map(|spec| listening(spec, settings.ports.processor))
}

/// `metrics-dashboard`, which serves the page from data in Cassandra and Kafka.
pub fn dashboard(settings: &Settings) -> Result<Spec> {
    service(settings, "metrics-dashboard", "metrics-dashboard", &[])
        .map(|spec| listening(spec, settings.ports.dashboard))
}

fn service(settings: &Settings, name: &str, program: &str, arguments: &[&str]) -> Result<Spec> {
    Ok(Spec {
        name: name.to_owned(),
        program: settings.program(program)?,
        arguments: arguments.iter().map(Into::into).collect(),
        environment: environment(settings),
        folder: settings.checkout.clone(),
        address: String::new(),
        grace: GRACE,
    })
}

fn listening(mut spec: Spec, port: u16) -> Spec {
    spec.address = format!("http://{}", loopback(port));
    spec.environment.push(("PIPELINE_HTTP_LISTEN".to_owned(), loopback(port)));
    spec
}

fn environment(settings: &Settings) -> Vec<(String, String)> {
    let mut environment = vec![
        ("PIPELINE_KAFKA_BROKERS", loopback(settings.ports.kafka)),
        ("PIPELINE_CASSANDRA_NODES", loopback(settings.ports.cassandra)),
        ("PIPELINE_STREAM", settings.stream.display().to_string()),
        ("PIPELINE_CHECKPOINTS", settings.checkpoints.display().to_string()),
    ];
    if let Some(origin) = source_origin(settings) {
        environment.push(("PIPELINE_SOURCE_ORIGIN", origin));
    }
    environment.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

/// Origin of the source: the one that the user set, otherwise the simulator if the stream definition uses its address.
/// `None` leaves the definition as it is.
fn source_origin(settings: &Settings) -> Option<String> {
    if settings.source_origin.is_some() {
        return settings.source_origin.clone();
    }
    let definition = fs::read_to_string(&settings.stream).ok()?;
    definition.contains(DEFAULT_SOURCE).then(|| format!("http://{}", loopback(settings.ports.source)))
}

/// Programs that must exist before a start.
pub const PROGRAMS: [&str; 4] =
    ["source-simulator", "ingest-producer", "stream-processor", "metrics-dashboard"];
