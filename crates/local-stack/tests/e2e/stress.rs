//! Load, and kills under load: every event counts once.

use std::os::unix::process::ExitStatusExt;

use crate::harness::{PATIENT, Pipeline, long, wait_until};

/// How often the processor is killed on the way.
const KILLS: i64 = 5;

#[tokio::test(flavor = "multi_thread")]
async fn every_stressed_event_arrives_exactly_once_through_five_kills() {
    let events: i64 = if long() { 500_000 } else { 120_000 };
    let pipeline = Pipeline::initialised("kills").await;
    pipeline.stress(events as u64).await;
    for kill in 1..=KILLS {
        let mut processor = pipeline.processor("one");
        processor.ready().await;
        let enough = events * kill / (KILLS + 1);
        wait_until("a part of the log is processed", PATIENT, || async {
            pipeline.progress().await.events >= enough
        })
        .await;
        processor.kill().await;
    }
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    wait_until("all of the log is processed", PATIENT, || async {
        pipeline.progress().await.events >= events
    })
    .await;
    pipeline.assert_counted_once(events).await;
    assert_eq!(pipeline.progress().await.duplicates, 0, "a replay after a kill is no duplicate");
    processor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_counted_once_whatever_step_the_processor_dies_at() {
    const EVENTS: i64 = 60_000;
    let pipeline = Pipeline::initialised("steps").await;
    pipeline.stress_with(&["--messages", "60000", "--duplicates", "10"]).await;
    let steps = pipeline.steps().await;
    // Each step twice: with the state files kept, and with them lost as well.
    for (life, step) in steps.iter().chain(&steps).enumerate() {
        let mut processor = pipeline.processor_killed_at(&format!("{step}={}", 2 + life % 5));
        let ended = processor.end().await;
        assert_eq!(ended.signal(), Some(9), "{step}: {ended:?}: {}", processor.words());
        if life >= steps.len() {
            pipeline.lose_checkpoints();
        }
    }
    let left = pipeline.progress().await;
    assert!(left.next_offsets < EVENTS, "the kills came on the way: {left:?}");
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    wait_until("all of the log is processed", PATIENT, || async {
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
async fn events_are_counted_once_although_the_checkpoints_are_lost() {
    let pipeline = Pipeline::initialised("lost_volume").await;
    pipeline.stress(30_000).await;
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    wait_until("a part of the log is processed", PATIENT, || async {
        pipeline.progress().await.events > 5_000
    })
    .await;
    processor.kill().await;
    pipeline.lose_checkpoints();
    let mut processor = pipeline.processor("one");
    processor.ready().await;
    wait_until("all of the log is processed", PATIENT, || async {
        pipeline.progress().await.events >= 30_000
    })
    .await;
    pipeline.assert_counted_once(30_000).await;
    processor.stop().await;
}
