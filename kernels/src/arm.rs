//! The vector instruction set of 64-bit Arm. As the modules of `x86.rs` it has one function for each
//! kernel; all of them are unsafe to call from ordinary code, although every such machine has the
//! instructions.

pub(crate) mod neon;
