//! What the user reads: progress lines and tables. Progress goes to stderr, data to stdout; no decisions.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use comfy_table::{ContentArrangement, Table, presets};

/// Writes lines for people; colours only on a terminal without `NO_COLOR`.
#[derive(Clone, Copy, Debug)]
pub struct Terminal {
    colour: bool,
}

impl Default for Terminal {
    fn default() -> Self {
        Self { colour: std::io::stderr().is_terminal() && crate::config::colours_allowed() }
    }
}

impl Terminal {
    /// A step that is done, with the seconds it took.
    pub fn done(&self, name: &str, detail: &str, took: Duration) {
        self.progress(&format!(
            "{} {name:<18} {:>5.1} s  {detail}",
            self.paint("32", "ok  "),
            took.as_secs_f64()
        ));
    }

    /// A step that takes long enough to be announced.
    pub fn begins(&self, name: &str, detail: &str) {
        self.progress(&format!("{} {name:<18}          {detail}", self.paint("2", "…   ")));
    }

    /// Something the user should know though everything goes on.
    pub fn warning(&self, text: &str) {
        self.progress(&format!("{} {text}", self.paint("33", "note")));
    }

    /// The one line that says why nothing goes on.
    pub fn failure(&self, text: &str) {
        self.progress(&format!("{} {text}", self.paint("31", "fail")));
    }

    /// A line of progress as it is.
    pub fn progress(&self, line: &str) {
        // A closed stderr must not stop the servers.
        let _ = writeln!(std::io::stderr(), "{line}");
    }

    /// A line of data as it is.
    pub fn data(&self, line: &str) {
        let _ = writeln!(std::io::stdout(), "{line}");
    }

    /// A table of data.
    pub fn table<const N: usize>(&self, header: [&str; N], rows: &[[String; N]]) {
        let mut table = Table::new();
        table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
        table.set_header(header);
        for row in rows {
            table.add_row(row.iter());
        }
        for line in table.lines() {
            self.data(line.trim_end());
        }
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour { format!("\u{1b}[{code}m{text}\u{1b}[0m") } else { text.to_owned() }
    }
}
