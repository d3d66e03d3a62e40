//! A process that does not stop is terminated after its grace period. The test program starts itself as that process.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, helpers included")]
#![expect(clippy::print_stdout, reason = "the child signals on stdout that it is listening")]

use common::runtime::shutdown::Shutdown;
use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};
use std::time::Duration;

const CHILD: &str = "SHUTDOWN_TEST_CHILD";

/// Installs the signal handlers, then blocks its only thread forever. Begins shutdown itself if `trigger` is `itself`.
fn hang(trigger: &str) -> ! {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let shutdown = Shutdown::on_signals(Duration::from_millis(50)).unwrap();
        drop(shutdown.running("a task that has ended"));
        let _hanging = shutdown.running("a client that never closes");
        println!("listening");
        if trigger == "itself" {
            shutdown.begin();
        }
        loop {
            std::thread::park();
        }
    })
}

/// Starts the child, sends it the signal `trigger` unless that is `itself`, and checks its exit code and log.
fn check(trigger: &str, code: i32) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_hanging_process_exits_after_its_grace_period", "--nocapture"])
        .env(CHILD, trigger)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    lines.find(|line| line.as_ref().is_ok_and(|line| line.ends_with("listening"))).unwrap().unwrap();
    if trigger != "itself" {
        let pid = child.id().to_string();
        assert!(Command::new("kill").args([trigger, &pid]).status().unwrap().success());
    }
    let mut log = String::new();
    child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(code), "{trigger}: {log}");
    assert!(log.contains("a client that never closes") && !log.contains("has ended"), "{trigger}: {log}");
}

#[test]
fn a_hanging_process_exits_after_its_grace_period() {
    if let Ok(trigger) = std::env::var(CHILD) {
        hang(&trigger);
    }
    check("-TERM", 143);
    check("-INT", 130);
    check("itself", 1);
}
