//! The vector instruction sets of x86-64, one module each. Every module has the same functions; all
//! of them are unsafe to call from ordinary code, because the machine must have the instructions.

pub(crate) mod avx2;
pub(crate) mod avx512;

/// Blocks are taken in groups: first the absmax of each, then the reciprocals together, then the
/// codes. One block after the other, the codes would wait for the long way from its elements to its
/// reciprocal, and fill the processor's queues with waiting instructions, so that the next block
/// could not be started either.
const GROUP_BLOCKS: usize = 16;

/// How many blocks of this many bytes to take together: the second pass shall find them in the
/// first-level cache.
const fn group_blocks(block_bytes: usize) -> usize {
    match 4096 / block_bytes {
        0 => 1,
        1..GROUP_BLOCKS => 4096 / block_bytes,
        _ => GROUP_BLOCKS,
    }
}
