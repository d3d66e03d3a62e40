//! Deterministic simulation of the real start decision, worker and partition on fakes. It runs seeded schedules of
//! faults, the sixteen named findings of the protocol model, mutations of the protocol, a matrix of every fault at
//! every step, and the state file on a faulty disk. The code is in `tests/` but compiled with the crate, because it
//! changes private fields and disables safeguards.

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
