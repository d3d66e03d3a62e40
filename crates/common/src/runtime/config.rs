//! Settings that all services share, and the parser for all settings. A flag takes precedence over a `PIPELINE_…`
//! environment variable, which takes precedence over the file given with `--config`, which takes precedence over the
//! default. Each service flattens [`CommonArgs`] into its own clap type and calls [`parse`].

use crate::contracts::stream::{Definition, DefinitionError};
use clap::{Args, CommandFactory, FromArgMatches};
use serde::Serialize;
use std::ffi::OsString;
use std::path::PathBuf;

/// Settings of every service.
#[derive(Debug, Clone, Args, Serialize)]
#[command(next_help_heading = "Global options")]
pub struct CommonArgs {
    /// Kafka bootstrap servers, comma separated
    #[arg(long, global = true, env = "PIPELINE_KAFKA_BROKERS", default_value = "127.0.0.1:9092")]
    pub kafka_brokers: String,
    /// Cassandra contact points, comma separated
    #[arg(long, global = true, env = "PIPELINE_CASSANDRA_NODES", default_value = "127.0.0.1:9042")]
    pub cassandra_nodes: String,
    /// Cassandra user, if the cluster requires authentication
    #[arg(long, global = true, env = "PIPELINE_CASSANDRA_USER")]
    pub cassandra_user: Option<String>,
    /// File with the password of the Cassandra user
    #[arg(long, global = true, env = "PIPELINE_CASSANDRA_PASSWORD_FILE")]
    pub cassandra_password_file: Option<PathBuf>,
    /// Cassandra datacenter to connect to; required if the cluster has more than one [default: the only one]
    #[arg(long, global = true, env = "PIPELINE_CASSANDRA_DATACENTER")]
    pub cassandra_datacenter: Option<String>,
    /// Cassandra keyspace
    #[arg(long, global = true, env = "PIPELINE_KEYSPACE", default_value = "pipeline")]
    pub keyspace: String,
    /// Stream definition file
    #[arg(
        long = "stream",
        global = true,
        env = "PIPELINE_STREAM",
        default_value = "streams/user_created.toml"
    )]
    pub stream: PathBuf,
    /// Events topic; dead letters go to `<topic>.dlq` [default: the name of the stream]
    #[arg(long, global = true, env = "PIPELINE_TOPIC")]
    pub topic: Option<String>,
    /// Topic of the commands to the producer
    #[arg(long, global = true, env = "PIPELINE_CONTROL_TOPIC", default_value = "pipeline.control")]
    pub control_topic: String,
    /// Name of this instance, unique within its service; also its static member name in the consumer group
    /// [default: the host name]
    #[arg(long, global = true, env = "PIPELINE_INSTANCE")]
    pub instance: Option<String>,
    /// Host names accepted in HTTP requests besides localhost and IP addresses, comma separated; others get status 421
    #[arg(long, global = true, env = "PIPELINE_HTTP_HOSTS", default_value = "")]
    pub http_hosts: String,
    /// Log filter, such as `info` or `info,rdkafka=debug`
    #[arg(long, global = true, env = "PIPELINE_LOG", default_value = "info")]
    pub log: String,
    /// Log format: `auto` (pretty on a terminal, otherwise json), `json` or `pretty`
    #[arg(long, global = true, env = "PIPELINE_LOG_FORMAT", default_value = "auto")]
    pub log_format: LogFormat,
    /// TOML file with settings: the names of the flags, with `_` instead of `-`
    #[arg(long = "config", global = true, env = "PIPELINE_CONFIG")]
    #[serde(skip)]
    pub config_file: Option<PathBuf>,
    /// Print the effective settings as JSON and exit
    #[arg(long, global = true)]
    #[serde(skip)]
    pub print_config: bool,
}

/// Format of the logs on stderr.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// `Pretty` on a terminal, otherwise `Json`.
    Auto,
    /// One JSON object per line.
    Json,
    /// Human-readable.
    Pretty,
}

/// An invalid setting.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The stream file cannot be read.
    #[error("stream file {file}: {cause}; choose another with --stream or PIPELINE_STREAM")]
    StreamUnreadable {
        /// Path as given.
        file: String,
        /// The error of the operating system.
        cause: std::io::Error,
    },
    /// The stream file is invalid.
    #[error(transparent)]
    Stream(#[from] DefinitionError),
    /// A secret file cannot be read.
    #[error("secret file {file}: {cause}")]
    Secret {
        /// Path as given.
        file: String,
        /// The error of the operating system.
        cause: std::io::Error,
    },
    /// A secret file is empty.
    #[error("secret file {file} is empty")]
    EmptySecret {
        /// Path as given.
        file: String,
    },
    /// The environment variable of a secret is not set.
    #[error("environment variable {name} is not set or empty; the stream definition reads a secret from it")]
    SecretVariable {
        /// Name of the variable.
        name: String,
    },
}

/// Pairs of settings that must be set together, by their clap ids.
const PAIRS: [(&str, &str); 1] = [("cassandra_user", "cassandra_password_file")];

impl CommonArgs {
    /// Reads and validates the stream definition.
    pub fn definition(&self) -> Result<Definition, ConfigError> {
        let file = self.stream.display().to_string();
        let text = std::fs::read_to_string(&self.stream)
            .map_err(|cause| ConfigError::StreamUnreadable { file: file.clone(), cause })?;
        Ok(Definition::parse(&file, &text)?)
    }

    /// The configured events topic. Defaults to the name of the stream.
    pub fn topic_of(&self, definition: &Definition) -> String {
        self.topic.clone().unwrap_or_else(|| definition.stream.name.clone())
    }

    /// The configured instance name. Defaults to the host name.
    pub fn instance_name(&self) -> String {
        self.instance.clone().unwrap_or_else(host_name)
    }
}

/// The name of this host, or `localhost` if it cannot be read.
fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .or_else(|_| std::fs::read_to_string("/etc/hostname"))
        .map(|name| name.trim().to_owned())
        .ok()
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| "localhost".to_owned())
}

/// Reads a secret from a file, without trailing newlines.
pub fn read_secret(file: &std::path::Path) -> Result<String, ConfigError> {
    let name = || file.display().to_string();
    let text = std::fs::read_to_string(file).map_err(|cause| ConfigError::Secret { file: name(), cause })?;
    match text.trim_end_matches(['\r', '\n']) {
        "" => Err(ConfigError::EmptySecret { file: name() }),
        secret => Ok(secret.to_owned()),
    }
}

/// Reads a secret from an environment variable.
pub fn read_secret_variable(name: &str) -> Result<String, ConfigError> {
    let secret = std::env::var(name).ok().filter(|secret| !secret.is_empty());
    secret.ok_or_else(|| ConfigError::SecretVariable { name: name.to_owned() })
}

/// Parses the command line and the environment of this process. Prints an error and exits with code 2 if a setting is
/// invalid.
pub fn parse<T: CommandFactory + FromArgMatches>() -> T {
    let environment = std::env::var_os("PIPELINE_CONFIG");
    parse_from(std::env::args_os().collect(), environment).unwrap_or_else(|e| e.exit())
}

/// Like [`parse`], but with the given arguments. `config_variable` is the value of `PIPELINE_CONFIG`.
pub fn parse_from<T: CommandFactory + FromArgMatches>(
    arguments: Vec<OsString>,
    config_variable: Option<OsString>,
) -> Result<T, clap::Error> {
    let mut command = T::command();
    if let Some(file) = config_file(&arguments).or(config_variable) {
        command = with_file_defaults(command, &PathBuf::from(file))?;
    }
    let matches = command.try_get_matches_from_mut(arguments)?;
    check_pairs(&matches)?;
    T::from_arg_matches(&matches)
}

/// Fails if only one setting of a pair is set. The error names all such pairs. An empty value counts as not set.
fn check_pairs(matches: &clap::ArgMatches) -> Result<(), clap::Error> {
    let given = |name: &str| {
        let values = matches.try_get_raw(name).ok().flatten();
        values.is_some_and(|mut values| values.any(|value| !value.is_empty()))
    };
    let variable = |name: &str| format!("PIPELINE_{}", name.to_uppercase());
    let problems: Vec<String> = PAIRS
        .iter()
        .flat_map(|(one, other)| [(one, other), (other, one)])
        .filter(|(one, other)| given(one) && !given(other))
        .map(|(one, other)| format!("  - {} is set, but {} is not", variable(one), variable(other)))
        .collect();
    if problems.is_empty() {
        return Ok(());
    }
    let text = format!("settings that belong together:\n{}\nset both or neither\n", problems.join("\n"));
    Err(clap::Error::raw(clap::error::ErrorKind::MissingRequiredArgument, text))
}

fn config_file(arguments: &[OsString]) -> Option<OsString> {
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        let Some(text) = argument.to_str() else { continue };
        if text == "--config" {
            return rest.next().cloned();
        }
        if let Some(file) = text.strip_prefix("--config=") {
            return Some(file.into());
        }
    }
    None
}

/// Makes the values of the file the defaults of the arguments with the same names. The error names all mistakes.
fn with_file_defaults(command: clap::Command, file: &std::path::Path) -> Result<clap::Command, clap::Error> {
    let fail = |text: String| clap::Error::raw(clap::error::ErrorKind::InvalidValue, text + "\n");
    let name = file.display();
    let text = std::fs::read_to_string(file).map_err(|e| fail(format!("settings file {name}: {e}")))?;
    let table: toml::Table = text
        .parse()
        .map_err(|e: toml::de::Error| fail(format!("settings file {name}: {}", e.to_string().trim())))?;
    let mut known: Vec<String> = command.get_arguments().map(|a| a.get_id().to_string()).collect();
    for sub in command.get_subcommands() {
        known.extend(sub.get_arguments().map(|a| a.get_id().to_string()));
    }
    let mut problems = Vec::new();
    let mut values = Vec::new();
    for (key, value) in table {
        if !known.contains(&key) || key == "config_file" {
            problems.push(format!("  - `{key}`: unknown setting; --help lists them"));
        } else if value.is_table() || value.is_array() {
            problems.push(format!("  - `{key}`: must be a single value"));
        } else {
            values.push((key, value.as_str().map_or_else(|| value.to_string(), str::to_owned)));
        }
    }
    if !problems.is_empty() {
        return Err(fail(format!(
            "settings file {name}: {} mistake(s)\n{}",
            problems.len(),
            problems.join("\n")
        )));
    }
    Ok(values.into_iter().fold(command, |command, (key, value)| set_default(command, &key, value)))
}

fn set_default(command: clap::Command, key: &str, value: String) -> clap::Command {
    let command = if command.get_arguments().any(|a| a.get_id() == key) {
        command.mut_arg(key, |a| a.default_value(value.clone()))
    } else {
        command
    };
    command.mut_subcommands(|sub| {
        if sub.get_arguments().any(|a| a.get_id() == key) {
            sub.mut_arg(key, |a| a.default_value(value.clone()))
        } else {
            sub
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser, Debug)]
    struct Cli {
        #[command(flatten)]
        common: CommonArgs,
        #[command(subcommand)]
        command: Command,
    }

    #[derive(clap::Subcommand, Debug)]
    enum Command {
        Run {
            #[arg(long, default_value_t = 5)]
            batch: u32,
        },
    }

    fn parse_with(file: &str, arguments: &[&str]) -> Result<Cli, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("settings.toml");
        std::fs::write(&path, file).unwrap();
        let arguments = std::iter::once("x").chain(arguments.iter().copied()).map(OsString::from).collect();
        parse_from(arguments, Some(path.into())).map_err(|e| e.to_string())
    }

    #[test]
    fn a_flag_beats_the_file_and_the_file_beats_the_default() {
        let cli = parse_with("keyspace = \"from_file\"\nbatch = 7", &["run"]).unwrap();
        assert_eq!(cli.common.keyspace, "from_file");
        let Command::Run { batch } = cli.command;
        assert_eq!(batch, 7);
        let cli = parse_with("keyspace = \"from_file\"", &["run", "--keyspace", "flag"]).unwrap();
        assert_eq!(cli.common.keyspace, "flag");
        assert_eq!(parse_with("", &["run"]).unwrap().common.keyspace, "pipeline");
    }

    #[test]
    fn a_setting_without_its_counterpart_is_refused_whatever_its_source() {
        let half = "PIPELINE_CASSANDRA_USER is set, but PIPELINE_CASSANDRA_PASSWORD_FILE is not";
        for (file, arguments) in
            [("cassandra_user = \"ada\"", &["run"][..]), ("", &["run", "--cassandra-user", "ada"])]
        {
            let error = parse_with(file, arguments).unwrap_err();
            assert!(error.contains(half), "{error}");
        }
        let error = parse_with("cassandra_password_file = \"/p\"", &["run"]).unwrap_err();
        assert!(error.contains("PIPELINE_CASSANDRA_USER is not"), "{error}");
        let both =
            parse_with("cassandra_user = \"ada\"", &["run", "--cassandra-password-file", "/p"]).unwrap();
        assert_eq!(both.common.cassandra_user.as_deref(), Some("ada"));
        parse_with("cassandra_user = \"\"", &["run"]).unwrap();
    }

    #[test]
    fn an_empty_secret_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "\r\n").unwrap();
        assert!(read_secret(file.path()).unwrap_err().to_string().ends_with("is empty"));
        std::fs::write(file.path(), "open sesame\n").unwrap();
        assert_eq!(read_secret(file.path()).unwrap(), "open sesame");
    }

    #[test]
    fn one_error_names_all_unknown_settings() {
        let error = parse_with("keyspaec = \"x\"\nbrokers = [1]", &["run"]).unwrap_err();
        assert!(error.contains("`keyspaec`: unknown setting") && error.contains("`brokers`"), "{error}");
    }
}
