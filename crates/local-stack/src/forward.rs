//! Commands that a sibling program implements: the tests, the measurements and the simulator are no part of this one.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::Command;

use clap::Args;

use crate::config::Settings;
use crate::error::{Error, Result};

/// Options and arguments of a command that another program implements.
#[derive(Args, Debug)]
#[command(disable_help_flag = true)]
pub struct Forwarded {
    /// Options and arguments of the command; --help lists them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub arguments: Vec<OsString>,
}

impl Forwarded {
    /// Replaces this process with `program`. Its arguments are `command`, then those of the user. Returns only if the
    /// program cannot be executed.
    pub fn execute<T>(&self, settings: &Settings, program: &str, command: &[&str]) -> Result<T> {
        let program = settings.program(program)?;
        let error = Command::new(&program).args(command).args(&self.arguments).exec();
        Err(Error::io(program)(error))
    }
}
