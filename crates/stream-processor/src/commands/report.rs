//! `windows` prints windows computed from the stored panes, as a table or as JSON.

use crate::config::WindowsArgs;
use crate::error::ProcessorError;
use common::contracts::stream::Definition;
use common::readers::pane_reader::PaneReader;
use common::readers::windows::{Window, WindowParameters, to_json};
use common::runtime::cassandra::connect;
use common::runtime::config::CommonArgs;
use common::runtime::shutdown::Shutdown;
use std::io::Write;
use std::time::Duration;

/// Maximum time to wait for Cassandra.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// Reads the panes selected by `args` and prints their windows.
pub async fn windows(
    common: &CommonArgs,
    definition: &Definition,
    args: &WindowsArgs,
    shutdown: &Shutdown,
) -> Result<(), ProcessorError> {
    let retryable = |e: &dyn std::fmt::Display| ProcessorError::Retryable(e.to_string());
    let session = connect(common, CONNECT_DEADLINE, shutdown).await?;
    let reader = PaneReader::new(session, &common.keyspace, definition).await.map_err(|e| retryable(&e))?;
    let parameters = WindowParameters {
        size: args.size.as_deref(),
        slide: args.slide.as_deref(),
        by: args.by.as_deref(),
        last: args.last.as_deref(),
    };
    let query = reader.query(&parameters, chrono::Utc::now().timestamp_millis());
    let query = query.map_err(|e| ProcessorError::Fatal(e.to_string()))?;
    let read = futures::try_join!(reader.panes(&query), reader.settled_ms());
    let (panes, settled_ms) = read.map_err(|e| retryable(&e))?;
    let windows = query.answer(&panes);
    let text = if args.json {
        format!("{:#}", to_json(&windows, definition, settled_ms))
    } else {
        table(&windows, definition, settled_ms)
    };
    writeln!(std::io::stdout(), "{text}").map_err(|e| retryable(&format!("stdout: {e}")))
}

fn table(windows: &[Window], definition: &Definition, settled_ms: Option<i64>) -> String {
    let mut table = comfy_table::Table::new();
    let mut header: Vec<String> = ["from", "to", "group", "events"].map(str::to_owned).into();
    for measure in &definition.windows.measures {
        header.extend(["average", "least", "greatest"].map(|what| format!("{what} {measure}")));
    }
    header.push("complete".to_owned());
    table.set_header(header);
    let time = |ms: i64| {
        let at = chrono::DateTime::from_timestamp_millis(ms);
        at.map_or_else(String::new, |at| at.format("%Y-%m-%d %H:%M:%S").to_string())
    };
    let number = |value: Option<f64>| value.map_or_else(String::new, |value| format!("{value:.2}"));
    for window in windows {
        let group = if window.value.is_empty() { "all" } else { window.value.as_str() };
        let count = window.sum.count.to_string();
        let mut row = vec![time(window.start_ms), time(window.end_ms), group.to_owned(), count];
        for measure in &window.sum.measures {
            row.extend([measure.average(), measure.min, measure.max].map(number));
        }
        let complete = settled_ms.is_some_and(|settled| window.end_ms <= settled);
        row.push(if complete { "yes" } else { "may still change" }.to_owned());
        table.add_row(row);
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use common::readers::windows::{Measure, Sum};

    #[test]
    fn windows_are_shown_with_their_measures() {
        let text = include_str!("../../../../streams/user_created.toml");
        let definition = Definition::parse("user_created.toml", text).unwrap();
        let measure = Measure { count: 2, sum: 61.0, min: Some(20.0), max: Some(41.0) };
        let window = |start_ms| Window {
            start_ms,
            end_ms: start_ms + 60_000,
            value: String::new(),
            sum: Sum { count: 3, measures: vec![measure] },
        };
        let windows = [window(1_767_225_600_000), window(1_767_225_660_000)];
        insta::assert_snapshot!(table(&windows, &definition, Some(1_767_225_660_000)));
    }
}
