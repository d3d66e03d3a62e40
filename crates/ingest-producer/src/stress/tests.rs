//! Tests of `stress` against a mock broker.

use super::*;
use rdkafka::mocking::MockCluster;
use rdkafka::producer::DefaultProducerContext;

const TOPIC: &str = "events";

fn users() -> Definition {
    Definition::parse("users", include_str!("../../../../streams/user_created.toml")).unwrap()
}

fn args(messages: Option<u64>, rate: u64, seconds: Option<u64>) -> StressArgs {
    StressArgs {
        messages,
        rate,
        seconds,
        payload_bytes: None,
        duplicates: 0,
        span: None,
        senders: 2,
        json: false,
    }
}

fn stress(args: &StressArgs) -> anyhow::Result<Report> {
    let cluster: MockCluster<'static, DefaultProducerContext> = MockCluster::new(1).unwrap();
    cluster.create_topic(TOPIC, 6, 1).unwrap();
    run(&cluster.bootstrap_servers(), TOPIC, &users(), args, &Shutdown::default())
}

#[test]
fn every_message_is_acknowledged() {
    let report = stress(&args(Some(20_001), 0, None)).unwrap();
    assert_eq!((report.messages, report.acked, report.failures), (20_001, 20_001, 0), "{report}");
    assert!(report.ack_ms.p50 > 0.0 && report.ack_ms.p99 >= report.ack_ms.p50, "{report}");
}

#[test]
fn the_rate_is_kept_and_the_duration_ends_the_run() {
    let report = stress(&args(None, 2000, Some(1))).unwrap();
    assert!((1990..=2000).contains(&report.messages), "{report}");
    assert!(report.seconds >= 0.9, "{report}");
}

#[test]
fn the_due_time_of_a_message_depends_only_on_its_index() {
    let start = Instant::now();
    let due_ms = |index| intended_at(start, index, 500.0).unwrap().duration_since(start).as_millis();
    assert_eq!([0, 1, 500, 1_000_000].map(due_ms), [0, 2, 1000, 2_000_000]);
    assert_eq!(intended_at(start, 7, 0.0), None);
}

#[test]
fn a_report_is_printed_as_a_line_and_as_json() {
    let ack_ms = report::Latency { p50: 12.34, p99: 45.6, max: 99.0 };
    let report = Report {
        messages: 500_000,
        acked: 499_999,
        failures: 1,
        first_failure: Some("Local: Message timed out".to_owned()),
        seconds: 1.5,
        messages_per_second: 333_332.7,
        value_bytes: 251,
        ack_ms,
    };
    insta::assert_snapshot!(report.to_string());
    insta::assert_json_snapshot!(report);
}
