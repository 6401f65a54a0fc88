//! Handles that the program does not have.

use tightfit_program::{Buffer, Checkpoint, get_quota};

use crate::Answer;

#[link(wasm_import_module = "tightfit:host/buffers@0.1.0")]
unsafe extern "C" {
    #[link_name = "[method]buffer.length"]
    fn length(handle: u32) -> u64;
    #[link_name = "[resource-drop]buffer"]
    fn drop_buffer(handle: u32);
}

#[link(wasm_import_module = "tightfit:host/checkpoints@0.1.0")]
unsafe extern "C" {
    #[link_name = "[method]checkpoint.tensor-count"]
    fn tensor_count(handle: u32) -> u32;
}

pub(crate) fn misbehave(behavior: &str) -> Option<Answer> {
    // SAFETY: the functions take any number, and whatever they do with it is what the test is about.
    unsafe {
        Some(match behavior {
            "forge" => Ok(length(12_345).to_string()),
            "free-twice" => Buffer::allocate(0, 100).map(|buffer| {
                let handle = buffer.take_handle();
                drop_buffer(handle);
                drop_buffer(handle);
                "twice".into()
            }),
            "use-after-free" => Buffer::allocate(0, 100).map(|buffer| {
                let handle = buffer.handle();
                drop(buffer);
                length(handle).to_string()
            }),
            "buffer-as-checkpoint" => Buffer::allocate(0, 100).map(|buffer| {
                // A number that is no checkpoint, and may be that of one that there is.
                tensor_count(buffer.handle()).to_string()
            }),
            "checkpoint-as-buffer" => {
                Checkpoint::open("model").map(|checkpoint| length(checkpoint.handle()).to_string())
            }
            "use-closed-checkpoint" => Checkpoint::open("model").map(|checkpoint| {
                let handle = checkpoint.handle();
                drop(checkpoint);
                tensor_count(handle).to_string()
            }),
            "exhaust-handles" => loop {
                match Buffer::allocate(0, 0) {
                    Ok(buffer) => std::mem::forget(buffer),
                    Err(error) => return Some(Err(error)),
                }
            },
            "exhaust-handles-with-checkpoints" => loop {
                match Checkpoint::open("model") {
                    Ok(checkpoint) => std::mem::forget(checkpoint),
                    Err(error) => return Some(Err(error)),
                }
            },
            "exhaust-memory-in-pieces" => loop {
                match Buffer::allocate(0, get_quota().limit / 1000) {
                    Ok(buffer) => std::mem::forget(buffer),
                    Err(error) => return Some(Err(error)),
                }
            },
            _ => return None,
        })
    }
}
