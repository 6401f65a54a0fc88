//! The vector instruction sets of x86-64, one module each. Every module has the same functions; all
//! of them are unsafe to call from ordinary code, because the machine must have the instructions.

pub(crate) mod avx2;
pub(crate) mod avx512;
