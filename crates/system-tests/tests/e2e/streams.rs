//! The shipped stream definitions against the simulator's endpoints of the same format. The tests run `source check` as
//! a new user would, fetch intervals, and compare the counts with the records of the source.

use serde_json::Value;
use source_simulator::public::{Api, CHARGES, COMMITS, QUESTIONS};

use crate::harness::{Pipeline, now_ms, shipped, text};

const INTERVAL_S: i64 = 600;

#[tokio::test(flavor = "multi_thread")]
async fn source_check_shows_the_events_of_every_shipped_stream() {
    let pipeline = Pipeline::new("checks").await;
    let _source = pipeline.source().await;
    let files = std::fs::read_dir(shipped("x").parent().unwrap()).unwrap();
    let mut checked = 0;
    for file in files.map(|file| file.unwrap().path()) {
        let file = file.to_str().unwrap();
        let check = |more: &'static [&'static str]| {
            let arguments = [&["source", "check", "--stream", file], more].concat();
            let pipeline = &pipeline;
            async move {
                let output = pipeline.run("ingest-producer", &arguments, &[]).await;
                assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
                text(&output.stdout)
            }
        };
        let table = check(&[]).await;
        assert!(!table.contains("warning:"), "{file}: {table}");
        let report: Value = serde_json::from_str(&check(&["--json", "--events", "1000"]).await).unwrap();
        let events = report["events"].as_array().unwrap();
        assert!(events.len() >= 100, "{file}: expected a full page, got {} events", events.len());
        assert!(events.iter().all(|e| e["id"].is_string() && e["time"].is_string()), "{file}");
        checked += 1;
    }
    assert!(checked >= 5, "only {checked} files were checked");
}

#[tokio::test(flavor = "multi_thread")]
async fn three_public_api_formats_are_ingested_completely() {
    let pipeline = Pipeline::new("shapes").await;
    let _source = pipeline.source().await;
    let from_s = (now_ms() / 1000 - 7200).div_euclid(INTERVAL_S) * INTERVAL_S;
    let to_s = from_s + 2 * INTERVAL_S;
    let rfc3339 = |at_s: i64| chrono::DateTime::from_timestamp(at_s, 0).unwrap().to_rfc3339();
    let count = |api: Api, beyond_s: i64| -> usize {
        let starts = (from_s..to_s).step_by(usize::try_from(INTERVAL_S).unwrap());
        starts.map(|at| api.records(at, at + INTERVAL_S + beyond_s).unwrap().len()).sum()
    };
    // Stack Exchange includes the end of an interval. Charges are fetched in half intervals, which does not change the
    // count.
    let streams = [
        ("github_commits", count(COMMITS, 0)),
        ("stripe_charges", count(CHARGES, 0)),
        ("stackexchange_questions", count(QUESTIONS, 1)),
    ];
    for (stream, expected) in streams {
        let file = shipped(stream).to_str().unwrap().to_owned();
        let topic = format!("{}_{stream}", pipeline.topic);
        let run = |arguments: Vec<String>| {
            let (pipeline, topic) = (&pipeline, topic.clone());
            let arguments = [arguments, vec!["--stream".to_owned(), file.clone()]].concat();
            async move {
                let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
                let output =
                    pipeline.run(program_of(arguments[0]), &arguments, &[("PIPELINE_TOPIC", topic)]).await;
                assert!(
                    output.status.success(),
                    "{arguments:?}: {}{}",
                    text(&output.stdout),
                    text(&output.stderr)
                );
            }
        };
        run(vec!["init".to_owned()]).await;
        run(vec![
            "backfill".to_owned(),
            "--from".to_owned(),
            rfc3339(from_s),
            "--to".to_owned(),
            rfc3339(to_s),
        ])
        .await;
        assert_eq!(pipeline.log_end(&topic).await, expected as i64, "{stream}");
    }
    let runs = pipeline.runs().await;
    assert!(runs.values().all(|run| run.state == "succeeded"), "{runs:?}");
}

/// The program that has this command.
fn program_of(command: &str) -> &'static str {
    if command == "init" { "stream-processor" } else { "ingest-producer" }
}
