//! Kills of the processor under load. Every event must count once.

use std::os::unix::process::ExitStatusExt;

use crate::harness::{LONG_TIMEOUT, Pipeline, is_long_run, wait_until};

/// Number of kills before the log is processed.
const KILLS: i64 = 5;

#[tokio::test(flavor = "multi_thread")]
async fn every_event_counts_once_although_the_processor_is_killed_five_times() {
    let events: i64 = if is_long_run() { 500_000 } else { 120_000 };
    let pipeline = Pipeline::initialised("kills").await;
    pipeline.stress(events as u64).await;
    for kill in 1..=KILLS {
        let mut processor = pipeline.processor("one");
        processor.ready().await;
        let enough = events * kill / (KILLS + 1);
        wait_until("part of the log is processed", LONG_TIMEOUT, || async {
            pipeline.progress().await.events >= enough
        })
        .await;
        processor.kill().await;
    }
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    wait_until("the whole log is processed", LONG_TIMEOUT, || async {
        pipeline.progress().await.events >= events
    })
    .await;
    pipeline.assert_counted_once(events).await;
    assert_eq!(pipeline.progress().await.duplicates, 0, "a restart after a kill must not create duplicates");
    processor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_event_counts_once_whichever_step_the_processor_is_killed_at() {
    const EVENTS: i64 = 60_000;
    let pipeline = Pipeline::initialised("steps").await;
    pipeline.stress_with(&["--messages", "60000", "--duplicates", "10"]).await;
    let steps = pipeline.steps().await;
    // Each step twice. The first time the state files survive the kill, the second time they are lost.
    for (run, step) in steps.iter().chain(&steps).enumerate() {
        let mut processor = pipeline.processor_killed_at(&format!("{step}={}", 2 + run % 5));
        let ended = processor.end().await;
        assert_eq!(ended.signal(), Some(9), "{step}: {ended:?}: {}", processor.log_text());
        if run >= steps.len() {
            pipeline.lose_checkpoints();
        }
    }
    let progress = pipeline.progress().await;
    assert!(progress.next_offsets < EVENTS, "the log was processed before the last kill: {progress:?}");
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    wait_until("the whole log is processed", LONG_TIMEOUT, || async {
        pipeline.progress().await.next_offsets >= EVENTS
    })
    .await;
    let progress = pipeline.progress().await;
    assert!(progress.duplicates > 0, "{progress:?}");
    pipeline.assert_counted_once(EVENTS - progress.duplicates).await;
    assert_eq!(pipeline.ids_in_the_log().await, progress.events, "distinct ids in the log");
    pipeline.verify().await;
    processor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_event_counts_once_although_the_checkpoints_are_lost() {
    let pipeline = Pipeline::initialised("lost_volume").await;
    pipeline.stress(30_000).await;
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    wait_until("part of the log is processed", LONG_TIMEOUT, || async {
        pipeline.progress().await.events > 5_000
    })
    .await;
    processor.kill().await;
    pipeline.lose_checkpoints();
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    wait_until("the whole log is processed", LONG_TIMEOUT, || async {
        pipeline.progress().await.events >= 30_000
    })
    .await;
    pipeline.assert_counted_once(30_000).await;
    processor.stop().await;
}
