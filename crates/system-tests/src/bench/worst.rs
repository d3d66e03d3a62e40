//! Measures the processor with the valid stream definition that needs the most memory: panes of one second that stay
//! open for a month, four group-by columns with 256 groups each, and 128 measures. Each pane takes 4 MiB, and every
//! event falls into a different pane.

use std::fmt::Write;

use local_stack::config::Settings;
use local_stack::error::{Error, Result};
use local_stack::terminal::Terminal;

use super::loads::Backlog;
use super::{init, measure, stress};

/// Maximum number of columns of a definition. Each column is a measure.
const COLUMNS: usize = 128;

/// Maximum number of group-by columns, and maximum number of groups of each.
const GROUP_BY: (usize, u32) = (4, 256);

/// Number of events, spread evenly over [`SPAN`].
const EVENTS: u64 = 20_000;

/// Retention of the topic, which limits the age of the events.
const SPAN: &str = "7d";

/// Keyspace and topic. They differ from those of the other loads, because the stream has a different name.
const NAME: &str = "bench_worst";

/// Drains events that all fall into different panes.
pub(super) async fn run(private: &Settings, terminal: Terminal) -> Result<Backlog> {
    let mut settings = private.clone();
    settings.stream = private.folders.root.join("worst.toml");
    std::fs::write(&settings.stream, definition()).map_err(Error::io(&settings.stream))?;
    init(&settings, NAME).await?;
    stress(&settings, NAME, &["--messages", &EVENTS.to_string(), "--span", SPAN]).await?;
    let drained = measure::drain(&settings, NAME, EVENTS, terminal).await?;
    Ok(Backlog::new(EVENTS, &drained))
}

fn definition() -> String {
    let mut text = String::from(
        r#"[stream]
name = "worst"
schedule = { every = "1m" }

[source]
url = "http://127.0.0.1:8090/"
allow_private = true

[event]
id = "/id"
time = "/time"
type = "worst"

[store]
bucket = "1d"
shards = 4
ttl = "0"
"#,
    );
    let names: Vec<String> = (0..COLUMNS).map(|n| format!("column_{n}")).collect();
    for name in &names {
        let _ = write!(text, "\n[[column]]\nname = \"{name}\"\ntype = \"double\"\npointer = \"/{name}\"\n");
    }
    let _ = write!(text, "\n[windows]\npane = \"1s\"\nlateness = \"31d\"\nmeasures = {names:?}\n");
    for name in &names[..GROUP_BY.0] {
        let count = GROUP_BY.1;
        let _ = write!(text, "\n[[windows.group_by]]\ncolumn = \"{name}\"\nstep = 1\ncount = {count}\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use common::contracts::stream::{Definition, MAX_GROUP_BY, MAX_GROUPS};

    #[test]
    fn no_valid_definition_needs_more_memory() {
        let worst = Definition::parse("worst", &definition()).unwrap();
        assert_eq!((worst.windows.group_by.len(), worst.windows.measures.len()), (MAX_GROUP_BY, COLUMNS));
        assert_eq!(GROUP_BY.1 as usize, MAX_GROUPS);
        let another = "\n[[column]]\nname = \"one_more\"\ntype = \"double\"\npointer = \"/one_more\"\n";
        assert!(Definition::parse("worst", &format!("{}{another}", definition())).is_err());
    }
}
