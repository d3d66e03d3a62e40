//! Output for the user: progress lines on stderr, data and tables on stdout.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use comfy_table::{ContentArrangement, Table, presets};

/// Writes lines for the user. Uses colours only on a terminal, and only if `NO_COLOR` is not set.
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
    /// Reports a finished step and how long it took.
    pub fn done(&self, name: &str, detail: &str, took: Duration) {
        self.progress(&format!(
            "{} {name:<18} {:>5.1} s  {detail}",
            self.paint("32", "ok  "),
            took.as_secs_f64()
        ));
    }

    /// Announces a step that takes a while.
    pub fn started(&self, name: &str, detail: &str) {
        self.progress(&format!("{} {name:<18}          {detail}", self.paint("2", "…   ")));
    }

    /// Reports a problem that does not stop the command.
    pub fn warning(&self, text: &str) {
        self.progress(&format!("{} {text}", self.paint("33", "note")));
    }

    /// Reports the error that ended the command or one of its parts.
    pub fn failure(&self, text: &str) {
        self.progress(&format!("{} {text}", self.paint("31", "fail")));
    }

    /// Writes a progress line unchanged.
    pub fn progress(&self, line: &str) {
        // A closed stderr must not stop the servers.
        let _ = writeln!(std::io::stderr(), "{line}");
    }

    /// Writes a data line unchanged.
    pub fn data(&self, line: &str) {
        let _ = writeln!(std::io::stdout(), "{line}");
    }

    /// Writes a table as data.
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
