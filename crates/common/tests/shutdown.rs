//! The last resort of a process that does not end: this test program starts itself as that process.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, helpers included")]
#![expect(clippy::print_stdout, reason = "the child tells its parent that it listens")]

use common::shutdown::Shutdown;
use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};
use std::time::Duration;

const CHILD: &str = "SHUTDOWN_TEST_CHILD";

/// Blocks its only thread forever once it listens; `how` says what asks it to stop.
fn hang(how: &str) -> ! {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let shutdown = Shutdown::on_signals(Duration::from_millis(50)).unwrap();
        drop(shutdown.running("something that has ended"));
        let _hanging = shutdown.running("a client that never closes");
        println!("listening");
        if how == "itself" {
            shutdown.begin();
        }
        loop {
            std::thread::park();
        }
    })
}

fn check(how: &str, code: i32) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_process_that_hangs_ends_after_its_grace", "--nocapture"])
        .env(CHILD, how)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    lines.find(|line| line.as_ref().is_ok_and(|line| line.ends_with("listening"))).unwrap().unwrap();
    if how != "itself" {
        let pid = child.id().to_string();
        assert!(Command::new("kill").args([how, &pid]).status().unwrap().success());
    }
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(code), "{how}: {said}");
    assert!(said.contains("a client that never closes") && !said.contains("has ended"), "{how}: {said}");
}

#[test]
fn a_process_that_hangs_ends_after_its_grace() {
    if let Ok(how) = std::env::var(CHILD) {
        hang(&how);
    }
    check("-TERM", 143);
    check("-INT", 130);
    check("itself", 1);
}
