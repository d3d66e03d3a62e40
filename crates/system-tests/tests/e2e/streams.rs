//! The shipped stream definitions against the simulator's endpoints of the same format. The tests run `source check` and
//! `source new` as a new user would, fetch intervals, and compare the counts with the records of the source.

use serde_json::Value;
use source_simulator::public::{Api, CHARGES, COMMITS, EARTHQUAKES, ISSUES, QUESTIONS, TICKETS};

use crate::harness::{LONG_TIMEOUT, Pipeline, now_ms, shipped, text, wait_until};

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
        let full_page = if file.contains("hourly") { 24 } else { 100 };
        assert!(events.len() >= full_page, "{file}: expected a full page, got {} events", events.len());
        assert!(events.iter().all(|e| e["id"].is_string() && e["time"].is_string()), "{file}");
        checked += 1;
    }
    assert!(checked >= 10, "only {checked} files were checked");
}

/// Two completed intervals of this length that ended at least two hours ago, in Unix seconds.
fn past_intervals(interval_s: i64) -> (i64, i64) {
    let from_s = (now_ms() / 1000 - 7200 - 2 * interval_s).div_euclid(interval_s) * interval_s;
    (from_s, from_s + 2 * interval_s)
}

fn rfc3339(at_s: i64) -> String {
    chrono::DateTime::from_timestamp(at_s, 0).unwrap().to_rfc3339_opts(chrono::SecondsFormat::Secs, true)
}

/// The records of two intervals, each with its end extended by `beyond_s`.
fn count(api: Api, beyond_s: i64) -> usize {
    let (from_s, to_s) = past_intervals(INTERVAL_S);
    let starts = (from_s..to_s).step_by(usize::try_from(INTERVAL_S).unwrap());
    starts.map(|at| api.records(at, at + INTERVAL_S + beyond_s).unwrap().len()).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_public_api_format_is_ingested_completely() {
    let pipeline = Pipeline::new("shapes").await;
    let _source = pipeline.source().await;
    // Stack Exchange includes the end of an interval. Charges are fetched in half intervals, which does not change the
    // count. Candlesticks: one a minute for each of three symbols.
    let streams = [
        ("github_commits", INTERVAL_S, count(COMMITS, 0)),
        ("stripe_charges", INTERVAL_S, count(CHARGES, 0)),
        ("stackexchange_questions", INTERVAL_S, count(QUESTIONS, 1)),
        ("usgs_earthquakes", INTERVAL_S, count(EARTHQUAKES, 0)),
        ("github_issues", INTERVAL_S, count(ISSUES, 0)),
        ("zendesk_tickets", INTERVAL_S, count(TICKETS, 0)),
        ("binance_klines", 3600, 2 * 60 * 3),
        ("open_meteo_hourly", 86_400, 2 * 24),
    ];
    for (stream, interval_s, expected) in streams {
        let (from_s, to_s) = past_intervals(interval_s);
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

/// Drafts a definition from a page of the simulator as a new user would, and fetches two intervals with it.
async fn draft_and_ingest(name: &str, interval_s: i64, page: String, expected: usize) {
    let mut pipeline = Pipeline::new(name).await;
    let _source = pipeline.source().await;
    let file = pipeline.folder.join("drafted.toml");
    let file = file.to_str().unwrap();
    let url = pipeline.source_origin() + &page;
    let arguments = ["source", "new", &url, "--name", name, "--allow-private", "--output", file];
    let drafted = pipeline.run("ingest-producer", &arguments, &[]).await;
    assert!(drafted.status.success(), "{name}: {}", text(&drafted.stderr));
    let next = format!("source check --stream {file}");
    assert!(text(&drafted.stdout).contains(&next), "{name}: {}", text(&drafted.stdout));
    let again = pipeline.run("ingest-producer", &arguments, &[]).await;
    assert!(text(&again.stderr).contains("existing files are not overwritten"), "{name}");
    let checked = pipeline.run("ingest-producer", &["source", "check", "--stream", file], &[]).await;
    assert!(checked.status.success(), "{name}: {}{}", text(&checked.stdout), text(&checked.stderr));

    let definition = std::fs::read_to_string(file).unwrap();
    pipeline.edit_stream(|_| definition.clone());
    pipeline.init().await;
    let (from_s, to_s) = past_intervals(interval_s);
    let (from, to) = (rfc3339(from_s), rfc3339(to_s));
    let fetched = pipeline.run("ingest-producer", &["backfill", "--from", &from, "--to", &to], &[]).await;
    assert!(fetched.status.success(), "{name}: {}{}", text(&fetched.stdout), text(&fetched.stderr));
    let processor = pipeline.processor("one");
    wait_until("the whole log is processed", LONG_TIMEOUT, || async {
        pipeline.progress().await.next_offsets == pipeline.log_end(&pipeline.topic).await
    })
    .await;
    assert_eq!(pipeline.progress().await.dead_letters, 0, "{name}: {definition}");
    assert_eq!(pipeline.rows().await, expected as i64, "{name}: {definition}");
    pipeline.verify().await;
    processor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drafted_definition_ingests_every_record() {
    let (from_s, to_s) = past_intervals(INTERVAL_S);
    let (from, to) = (rfc3339(from_s), rfc3339(to_s));
    let span = format!("created[gte]={from_s}&created[lt]={to_s}");
    let pages = [
        ("charges", format!("/v1/charges?{span}&limit=100"), count(CHARGES, 0)),
        ("commits", format!("/repos/a/b/commits?since={from}&until={to}&per_page=100"), count(COMMITS, 0)),
        (
            "earthquakes",
            format!("/fdsnws/event/1/query?format=csv&starttime={from}&endtime={to}&limit=100&offset=1"),
            // The draft includes the end of an interval.
            count_distinct(EARTHQUAKES),
        ),
    ];
    for (name, page, expected) in pages {
        draft_and_ingest(name, INTERVAL_S, page, expected).await;
    }
    let day = |at_s: i64| rfc3339(at_s)[..10].to_owned();
    let (from_s, _) = past_intervals(86_400);
    let page = format!("/v1/archive?start_date={}&end_date={}", day(from_s), day(from_s));
    draft_and_ingest("weather", 86_400, page, 2 * 24).await;
}

/// The records of two intervals, both ends included.
fn count_distinct(api: Api) -> usize {
    let (from_s, to_s) = past_intervals(INTERVAL_S);
    api.records(from_s, to_s + 1).unwrap().len()
}
