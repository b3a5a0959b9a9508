//! Power cuts of the state directory: everything that reached its disk is recorded, and an agent starts on what each
//! flush left. The cuts of whole machines are those of `cargo xtask power`.

mod log;
#[expect(dead_code, reason = "the tests of reboots use all of it")]
#[path = "../reboot/machine.rs"]
mod machine;
mod state;
