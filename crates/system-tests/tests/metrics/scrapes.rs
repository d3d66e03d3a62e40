//! Tests of the exported metrics. The families of the JMX agents must match the golden scrapes, and the seconds of the
//! stages must match the elapsed time.

use std::collections::BTreeMap;
use std::time::Instant;

use local_stack::servers::http_client;

use crate::{WITHIN, load, sources, variable};

/// The type of each metric family, from the `# TYPE` lines.
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
        let golden = sources::root().join(format!("crates/system-tests/tests/golden/{server}.prom"));
        let golden = types(&std::fs::read_to_string(golden).unwrap());
        let now = types(&scrape(&variable(agent)).await);
        assert_eq!(
            now, golden,
            "{server}: if the change is intended, save the new scrape in tests/golden/{server}.prom"
        );
    }
}

/// The seconds of each stage of each partition, summed over `states`.
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
async fn the_seconds_of_each_stage_add_up_to_the_elapsed_time_under_load() {
    const ALL: [&str; 3] = ["idle", "busy", "backpressured"];
    let _load = load(5);
    let processor = variable("PIPELINE_TEST_PROCESSOR");
    let started = Instant::now();
    let first_text = scrape(&processor).await;
    let first_read = Instant::now();
    let (first, busy) = (stage_seconds(&first_text, &ALL), stage_seconds(&first_text, &["busy"]));
    let mut ticks = tokio::time::interval(std::time::Duration::from_millis(500));
    let (second, second_start) = loop {
        ticks.tick().await;
        let start = Instant::now();
        let text = scrape(&processor).await;
        let all_were_busy =
            stage_seconds(&text, &["busy"]).iter().all(|(stage, seconds)| *seconds > busy[stage]);
        if all_were_busy {
            break (stage_seconds(&text, &ALL), start);
        }
        assert!(started.elapsed() < WITHIN, "some stages are never busy under load:\n{text}");
    };
    let most = started.elapsed().as_secs_f64();
    let least = (second_start - first_read).as_secs_f64();
    assert_eq!(first.len(), 12, "expected two stages of six partitions: {first:?}");
    for (stage, seconds) in &second {
        let passed = seconds - first[stage];
        assert!(
            least - 0.001 <= passed && passed <= most + 0.001,
            "{stage}: counted {passed} s, but between {least} and {most} s elapsed"
        );
    }
}
