//! The processor under the definition that takes the most memory of all that pass the checks: panes of a second, all of a month
//! open, four group-by columns of 256 groups, and 128 measures. One pane takes 4 MiB, and every event falls into another one.

use std::fmt::Write;

use super::loads::Backlog;
use super::{init, measure, stress};
use crate::config::Settings;
use crate::error::{Error, Result};
use crate::terminal::Terminal;

/// Most columns of a definition; each is a measure.
const COLUMNS: usize = 128;

/// Most group-by columns and groups of each.
const GROUP_BY: (usize, u32) = (4, 256);

/// Events, evenly spread over [`SPAN`].
const EVENTS: u64 = 20_000;

/// What the topic keeps.
const SPAN: &str = "7d";

/// Keyspace and topic: the stream's name is another than the other parts'.
const NAME: &str = "bench_worst";

/// Drains events of which each has a pane of its own.
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
    use common::stream::{Definition, MAX_GROUP_BY, MAX_GROUPS};

    #[test]
    fn no_definition_that_passes_the_checks_takes_more() {
        let worst = Definition::parse("worst", &definition()).unwrap();
        assert_eq!((worst.windows.group_by.len(), worst.windows.measures.len()), (MAX_GROUP_BY, COLUMNS));
        assert_eq!(GROUP_BY.1 as usize, MAX_GROUPS);
        let another = "\n[[column]]\nname = \"one_more\"\ntype = \"double\"\npointer = \"/one_more\"\n";
        assert!(Definition::parse("worst", &format!("{}{another}", definition())).is_err());
    }
}
