//! Deterministic simulation of the real start decision, worker and partition on fakes: seeded schedules of faults, the
//! schedules of `protocol-model/FINDINGS.md` by name, mutations, the fault matrix, and the state file on a faulty disk. Lives in
//! `tests/`, but is compiled with the crate: it changes fields and takes out repairs that nobody else may.

mod choices;
mod disk;
mod fakes;
mod faulty_disk;
mod findings;
mod golden;
mod hostile;
mod life;
mod log;
mod machine;
mod matrix;
mod mutation_table;
pub(crate) mod mutations;
mod schedule;
mod seeds;
mod servers;
mod world;
