//! What the parts export: the agents' families and types against the golden scrapes, and the stages' seconds against the
//! clock.

use std::collections::BTreeMap;
use std::time::Instant;

use local_stack::servers::http_client;

use crate::{WITHIN, load, sources, variable};

/// Families with their types, as `# TYPE` tells them.
pub fn types(scrape: &str) -> BTreeMap<String, String> {
    let line = |line: &str| {
        let (name, kind) = line.strip_prefix("# TYPE ")?.split_once(' ')?;
        Some((name.to_owned(), kind.to_owned()))
    };
    scrape.lines().filter_map(line).collect()
}

async fn scrape(address: &str) -> String {
    let answer = http_client().unwrap().get(format!("{address}/metrics")).send().await.unwrap();
    answer.text().await.unwrap()
}

#[tokio::test]
async fn both_agents_export_the_families_of_the_golden_scrapes() {
    for (server, agent) in
        [("kafka", "PIPELINE_TEST_KAFKA_AGENT"), ("cassandra", "PIPELINE_TEST_CASSANDRA_AGENT")]
    {
        let golden = sources::root().join(format!("crates/local-stack/tests/golden/{server}.prom"));
        let golden = types(&std::fs::read_to_string(golden).unwrap());
        let now = types(&scrape(&variable(agent)).await);
        assert_eq!(
            now, golden,
            "{server}: after a wanted change write its scrape to tests/golden/{server}.prom"
        );
    }
}

/// Seconds of each partition's stage: those in `states`, together.
fn stage_seconds(scrape: &str, states: &[&str]) -> BTreeMap<String, f64> {
    let mut seconds = BTreeMap::new();
    for line in scrape.lines().filter(|line| line.starts_with("processor_stage_seconds_total{")) {
        let (labels, value) = line.split_once("} ").unwrap();
        let (states_of, others): (Vec<&str>, Vec<&str>) =
            labels.split(',').partition(|label| label.starts_with("state="));
        let counts = states.iter().any(|state| states_of[0] == format!("state=\"{state}\""));
        let value = if counts { value.parse::<f64>().unwrap() } else { 0.0 };
        *seconds.entry(others.join(",")).or_default() += value;
    }
    seconds
}

#[tokio::test]
async fn the_seconds_of_each_stage_add_up_to_the_time_that_passed_under_load() {
    const ALL: [&str; 3] = ["idle", "busy", "backpressured"];
    let _load = load(5);
    let processor = variable("PIPELINE_TEST_PROCESSOR");
    let begun = Instant::now();
    let first_text = scrape(&processor).await;
    let first_read = Instant::now();
    let (first, busy) = (stage_seconds(&first_text, &ALL), stage_seconds(&first_text, &["busy"]));
    let mut ticks = tokio::time::interval(std::time::Duration::from_millis(500));
    let (second, second_asked) = loop {
        ticks.tick().await;
        let asked = Instant::now();
        let text = scrape(&processor).await;
        let all_worked =
            stage_seconds(&text, &["busy"]).iter().all(|(stage, seconds)| *seconds > busy[stage]);
        if all_worked {
            break (stage_seconds(&text, &ALL), asked);
        }
        assert!(begun.elapsed() < WITHIN, "not every stage works under load:\n{text}");
    };
    let most = begun.elapsed().as_secs_f64();
    let least = (second_asked - first_read).as_secs_f64();
    assert_eq!(first.len(), 12, "two stages of six partitions: {first:?}");
    for (stage, seconds) in &second {
        let passed = seconds - first[stage];
        assert!(
            least - 0.001 <= passed && passed <= most + 0.001,
            "{stage}: {passed} s counted, {least} to {most} s passed"
        );
    }
}
