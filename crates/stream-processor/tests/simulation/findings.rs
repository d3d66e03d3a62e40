//! The sixteen findings of the protocol model, one named test each, on the real worker. If the design rules out a
//! finding, the comment of its test describes what is checked instead.

use super::choices::Choices;
use super::life::{Life, StartOptions};
use super::log::{AHEAD_MS, BASE_MS, PANE_MS, Rec, SimEvent, event};
use super::schedule::{Case, Sim};
use super::world::{Cells, World, number, pane_row, position_of};
use crate::error::ProcessorError;
use common::contracts::stream::Definition;

fn sim(records: &[Rec], batches: &[i64]) -> Sim {
    let sim = Sim::new(records.to_vec(), Choices::given(&[]), Case { trace: true, ..Case::default() });
    sim.world().batches = Some(batches.to_vec());
    sim
}

/// The same, with every pane cold except the newest.
fn cold_sim(records: &[Rec], batches: &[i64]) -> Sim {
    let mut sim = sim(records, batches);
    sim.start_options = StartOptions { max_memory_bytes: 0, max_cold: 0, ..sim.start_options };
    sim
}

fn committed(next: i64) -> impl FnMut(&World) -> bool {
    move |world| world.committed.values().any(|committed| *committed >= next)
}

fn published(next: i64) -> impl FnMut(&World) -> bool {
    move |world| !world.progress.is_empty() && position_of(&world.progress).next_offset >= next
}

impl Sim {
    fn batches(&self, sizes: &[i64]) {
        self.world().batches = Some(sizes.to_vec());
    }

    fn lose_volume_and_restart(&mut self) {
        let machine = self.current_machine();
        self.crash();
        self.wipe(machine);
        self.start(machine);
    }

    /// Runs the zombies until they can make no further step.
    fn run_zombie(&mut self) {
        while let Some(id) = self.zombies.first().map(|zombie| zombie.id) {
            if !self.step(id) {
                break;
            }
            self.settle();
        }
    }

    fn assert_no_violation(mut self) {
        self.finish();
        let world = self.world();
        assert!(
            world.violation.is_none(),
            "{}",
            world.trace.iter().flatten().cloned().collect::<Vec<_>>().join("\n")
        );
    }

    fn count_of(&self, pane: i64) -> i64 {
        let key = (BASE_MS + pane * PANE_MS, String::new(), String::new());
        self.world().panes.get(&key).map_or(0, |cells| pane_row(cells).0.count)
    }

    fn error(&mut self) -> ProcessorError {
        self.run_until(|_| false);
        self.owner
            .take()
            .and_then(|owner: Life| owner.ended)
            .and_then(Result::err)
            .expect("the process must end with an error")
    }
}

#[test]
fn finding_1_an_event_of_a_cold_pane_survives_the_loss_of_the_volume() {
    let mut sim = sim(&[event(20_000, 1), event(0, 2)], &[1, 1]);
    sim.start(0);
    sim.run_until(published(2));
    sim.lose_volume_and_restart();
    assert_eq!(sim.count_of(0), 1);
    sim.assert_no_violation();
}

#[test]
fn finding_2a_a_partition_that_moved_away_and_back_is_still_published() {
    let mut sim = sim(&[event(0, 1), event(1, 2), event(2, 3)], &[1]);
    sim.start(0);
    sim.run_until(published(1));
    sim.batches(&[1]);
    sim.crash();
    sim.start(1);
    sim.run_until(published(2));
    sim.crash();
    sim.start(0);
    sim.run_until(published(3));
    assert_eq!(sim.count_of(0), 3);
    sim.assert_no_violation();
}

/// The clocks of machines 1 and 2 are a thousand seconds behind and ahead. Clocks must have no effect.
#[test]
fn finding_2b_owners_with_clocks_behind_and_ahead_write_values_that_take_effect() {
    let mut sim = sim(&[event(0, 1), event(1, 2), event(2, 3), event(3, 4)], &[1]);
    for (machine, next) in [(0, 1), (2, 2), (1, 3), (2, 4)] {
        sim.batches(&[1]);
        sim.start(machine);
        sim.run_until(published(next));
        assert_eq!(sim.count_of(0), next);
        sim.crash();
    }
    sim.start(1);
    sim.assert_no_violation();
}

#[test]
fn finding_2c_writes_of_a_replay_lose_against_stored_rows_until_it_has_caught_up() {
    let mut sim = sim(&[event(0, 1), event(1, 2), event(2, 3)], &[2]);
    sim.start(0);
    sim.run_until(published(2));
    sim.crash();
    sim.start_options.replay = true;
    sim.batches(&[1, 1, 1]);
    sim.start(0);
    sim.run_until(committed(1));
    assert_eq!(position_of(&sim.world().progress.clone()).next_offset, 2);
    sim.assert_no_violation();
}

#[test]
fn finding_2d_repeating_a_batch_in_smaller_batches_never_decreases_a_count() {
    let mut sim = sim(&[event(0, 1), event(1, 2)], &[2]);
    sim.start(0);
    // The panes are written, but the batch is not committed.
    sim.run_until(|world| world.panes.len() >= 3);
    assert_eq!(sim.count_of(0), 2);
    sim.batches(&[1, 1]);
    sim.lose_volume_and_restart();
    sim.run_until(committed(1));
    assert_eq!(sim.count_of(0), 2, "the count must not drop to 1");
    sim.assert_no_violation();
}

#[test]
fn finding_3_an_interrupted_replay_of_a_trimmed_log_leaves_every_value_unchanged() {
    let records = [event(0, 1), event(1, 2), event(10_000, 3), event(0, 1), event(20_000, 4)];
    let mut sim = sim(&records, &[2, 2]);
    sim.start(0);
    sim.run_until(published(4));
    sim.crash();
    sim.wipe(0);
    sim.world().log.low = 1;
    sim.start_options.replay = true;
    sim.batches(&[1, 1, 1, 1]);
    sim.start(0);
    // The volume is lost again halfway through the replay.
    sim.run_until(committed(2));
    assert_eq!(sim.count_of(0), 2);
    sim.lose_volume_and_restart();
    sim.run_until(published(5));
    assert_eq!((sim.count_of(0), sim.count_of(1)), (2, 1));
    sim.assert_no_violation();
}

#[test]
fn finding_4_a_row_written_before_a_crash_is_still_added_to_its_pane() {
    let mut sim = cold_sim(&[event(20_000, 1), event(0, 2)], &[1, 1]);
    sim.start(0);
    sim.run_until(|world| world.rows.len() == 2);
    assert_eq!(sim.count_of(0), 0, "the pane must not be written yet");
    sim.crash();
    sim.start(0);
    sim.run_until(published(2));
    assert_eq!(sim.count_of(0), 1);
    sim.assert_no_violation();
}

#[test]
fn finding_5_copies_in_one_batch_count_once_in_cold_panes_and_if_hot_from_moves() {
    let mut cold = cold_sim(&[event(20_000, 1), event(0, 2), event(0, 2)], &[1, 2]);
    cold.start(0);
    cold.run_until(published(3));
    assert_eq!(cold.count_of(0), 1);
    cold.assert_no_violation();
    let mut rising = sim(&[event(0, 1), event(15_000, 2), event(0, 1)], &[3]);
    rising.start(0);
    rising.run_until(published(3));
    assert_eq!(rising.count_of(0), 1);
    rising.assert_no_violation();
}

#[test]
fn finding_6_a_lookup_waits_until_the_previous_batch_is_acknowledged() {
    let mut sim = cold_sim(&[event(20_000, 1), event(0, 2), event(0, 2)], &[1, 1, 1]);
    sim.start(0);
    // The next batch is fetched and decoded, but the row of the previous batch is not written yet.
    sim.run_until(|world| world.rows.len() == 1 && world.batches.as_ref().is_some_and(Vec::is_empty));
    let looked_up =
        |world: &World| world.trace.iter().flatten().any(|line| line.contains("looks up offset 2"));
    sim.run_until(|world| world.rows.len() == 2);
    assert!(!looked_up(&sim.world()));
    sim.run_until(committed(2));
    assert!(!looked_up(&sim.world()));
    sim.run_until(published(3));
    assert!(looked_up(&sim.world()));
    assert_eq!(sim.count_of(0), 1);
    sim.assert_no_violation();
}

#[test]
fn finding_7_one_id_at_two_times_is_two_events_in_hot_and_cold_panes() {
    let records = [event(20_000, 9), event(0, 1), event(3_000, 1)];
    for mut sim in [sim(&records, &[1, 2]), cold_sim(&records, &[1, 1, 1])] {
        sim.start(0);
        sim.run_until(published(3));
        assert_eq!(sim.count_of(0), 2);
        sim.assert_no_violation();
    }
}

#[test]
fn finding_8_a_recovered_partition_has_no_hot_pane_up_to_the_watermark() {
    // Pane 2 is the newest and was hot. The copy at offset 2 must be detected although the filter is lost.
    let mut sim = sim(&[event(20_000, 1), event(24_000, 2), event(20_000, 1)], &[2]);
    sim.start(0);
    sim.run_until(published(2));
    sim.lose_volume_and_restart();
    sim.run_until(published(3));
    assert_eq!(sim.count_of(2), 2);
    sim.assert_no_violation();
}

/// Panes are never recounted from rows, so this checks the reverse: an owner that is behind must not count rows of
/// later offsets that another owner has written.
#[test]
fn finding_9_rows_of_later_offsets_are_not_counted_by_an_owner_that_is_behind() {
    let records = [event(20_000, 1), event(0, 2), event(1, 3), event(2, 4)];
    let mut sim = cold_sim(&records, &[1, 1, 1, 1]);
    sim.start(0);
    sim.run_until(committed(1));
    sim.batches(&[1, 1, 1]);
    sim.move_to(1);
    sim.run_until(published(4));
    assert_eq!(sim.count_of(0), 3);
    sim.run_zombie();
    assert_eq!(sim.count_of(0), 3);
    sim.assert_no_violation();
}

#[test]
fn finding_10_events_whose_rows_may_have_expired_are_dead_letters_in_every_replay() {
    let old = |at, id| Rec::TooOld(SimEvent { at, id, kind: 0, score: 0 });
    let mut sim = sim(&[event(0, 1), event(0, 2), old(0, 1), old(0, 3), Rec::Poison], &[2, 1]);
    sim.start(0);
    sim.run_until(published(3));
    sim.world().expire();
    sim.lose_volume_and_restart();
    sim.run_until(published(5));
    assert_eq!(sim.count_of(0), 2);
    let totals = position_of(&sim.world().progress.clone()).totals;
    assert_eq!((totals.events, totals.duplicates, totals.dead_letters), (2, 0, 3));
    sim.assert_no_violation();
}

/// Every simulated write checks that no row has the offset of a later copy. This test checks the refusal of a row that
/// has one, which indicates a different log.
#[test]
fn finding_11_a_row_with_a_later_offset_than_its_record_is_refused() {
    let mut sim = cold_sim(&[event(20_000, 1), event(0, 2)], &[1, 1]);
    let cells = Cells::from([("kafka_offset", (0, 9i64.to_be_bytes().to_vec()))]);
    sim.world().rows.insert((BASE_MS, "e2".into()), cells);
    sim.start(0);
    let error = sim.error();
    assert_eq!(error.exit_code(), 3, "{error}");
    assert!(error.to_string().contains("offset 1 is already stored with the later offset 9"), "{error}");
}

#[test]
fn finding_12_another_layout_or_a_recreated_topic_is_refused_even_if_the_state_is_lost() {
    let mut sim = sim(&[event(0, 1), event(1, 2), event(2, 3)], &[2]);
    sim.start(0);
    sim.run_until(published(2));
    sim.crash();
    let same = std::sync::Arc::clone(&sim.environment.definition);
    let mut other = (*same).clone();
    other.store.shards = 5;
    sim.environment.definition = other.into();
    sim.start(0);
    let error = sim.error();
    assert!(error.exit_code() == 3 && error.to_string().contains("another layout"), "{error}");
    sim.environment.definition = same;
    // The topic was recreated and the volume is lost. Only the fingerprint in the progress row reveals the change.
    sim.wipe(0);
    sim.world().log.broker = 77;
    sim.start(0);
    let error = sim.error();
    assert!(
        error.exit_code() == 3 && error.to_string().contains("the topic was deleted and created again"),
        "{error}"
    );
}

#[test]
fn finding_13_one_event_from_2099_is_a_dead_letter_and_makes_no_pane_cold() {
    let far = Rec::TooFar(SimEvent { at: 70 * 365 * 86_400_000, id: 9, kind: 0, score: 0 });
    let mut sim = sim(&[event(0, 1), far, event(1, 2)], &[1, 1, 1]);
    sim.start(0);
    sim.run_until(published(3));
    assert!(!sim.world().trace.iter().flatten().any(|line| line.contains("looks up")));
    sim.assert_no_violation();
}

#[test]
fn finding_14_a_dead_letter_may_be_sent_twice_but_totals_count_it_once() {
    let mut sim = sim(&[event(0, 1), Rec::Poison, event(1, 2)], &[3]);
    sim.start(0);
    sim.run_until(|world| !world.dead.is_empty());
    sim.crash();
    sim.start(0);
    sim.run_until(published(3));
    assert_eq!(sim.world().dead.get(&1), Some(&2));
    assert_eq!(position_of(&sim.world().progress.clone()).totals.dead_letters, 1);
    sim.assert_no_violation();
}

#[test]
fn finding_15_a_restart_within_a_second_keeps_the_running_total_correct() {
    let mut sim = sim(&[event(0, 1), event(1, 2), event(2, 3)], &[1, 1, 1]);
    sim.start(0);
    sim.run_until(committed(2));
    // The process crashes between commit and publish, and a replay follows in the same second.
    sim.crash();
    sim.batches(&[1]);
    sim.start(0);
    sim.run_until(published(3));
    sim.run_until(|world| world.throughput.values().any(|cells| number(cells, "total") == Some(3)));
    sim.crash();
    sim.start_options.replay = true;
    sim.batches(&[1, 1, 1]);
    sim.start(0);
    sim.run_until(|_| false);
    assert_eq!(sim.world().throughput.get(&0).and_then(|cells| number(cells, "total")), Some(3));
    sim.assert_no_violation();
}

#[test]
fn finding_16_a_pane_that_does_not_divide_the_bucket_is_refused() {
    let text = include_str!("../../../../streams/user_created.toml");
    let error = Definition::parse("s.toml", &text.replace("pane = \"1m\"", "pane = \"7m\"")).unwrap_err();
    assert!(error.to_string().contains("does not divide the bucket"), "{error}");
}

#[test]
fn an_event_ahead_of_time_counts_once_even_if_the_state_is_lost() {
    let records =
        [event(20_000, 1), event(AHEAD_MS, 2), event(21_000, 3), event(AHEAD_MS, 2), event(22_000, 4)];
    let mut sim = sim(&records, &[2]);
    sim.start(0);
    sim.run_until(published(2));
    sim.lose_volume_and_restart();
    sim.run_until(published(5));
    assert_eq!((sim.count_of(2), sim.count_of(AHEAD_MS / PANE_MS)), (3, 1));
    let totals = position_of(&sim.world().progress.clone()).totals;
    assert_eq!((totals.events, totals.duplicates), (4, 1));
    sim.assert_no_violation();
}

#[test]
fn events_of_the_present_are_not_late_after_an_event_ahead_of_time() {
    // The records have timestamps 20 s after the start of the first pane.
    let records = [event(AHEAD_MS, 1), event(20_000, 2), event(19_000, 3)];
    let mut sim = sim(&records, &[1, 1, 1]);
    sim.start(0);
    sim.run_until(published(3));
    let totals = position_of(&sim.world().progress.clone()).totals;
    assert_eq!((totals.events, totals.late), (3, 0));
    sim.assert_no_violation();
}

#[test]
fn a_recovered_owner_publishes_the_same_progress_row_before_its_first_batch() {
    let mut sim = sim(&[event(0, 1), event(1, 2)], &[2]);
    sim.start(0);
    sim.run_until(published(2));
    let before = sim.world().progress.clone();
    sim.lose_volume_and_restart();
    sim.run_until(|_| false);
    assert_eq!(sim.world().progress, before);
    sim.assert_no_violation();
}
