//! Checkpoints and models.

use tightfit_program::{
    Buffer, Checkpoint, Dtype, Format, Model, Nf4Format, PartKind, Placement, get_names, get_quota,
    get_usage,
};

use crate::{Answer, number};

pub(crate) fn misbehave(behavior: &str, rest: &[String]) -> Option<Answer> {
    Some(match behavior {
        "open" => Checkpoint::open(&rest[0]).map(|open| open.tensor_count().to_string()),
        "names" => Ok(format!("{:?}", get_names())),
        "load" => load().map(|model| format!("{:?}", model.get_statistics())),
        "plan" => plan(&rest[0]),
        "load-and-forget" => load_and_forget(),
        "panic-with-model" => load().map(|model| {
            assert!(model.find("").is_some(), "the program has lost its head");
            String::new()
        }),
        "load-after-buffer" => load_after_buffer(number(rest)),
        "drop-checkpoint-in-use" => drop_checkpoint_in_use(),
        "read-outside-tensor" => read_outside_tensor(number(rest), number(&rest[1..])),
        "read-tensor" => read_tensor(),
        "elements-outside" => load().and_then(|model| {
            let read = model.read_elements(2, number(rest), number(&rest[1..]), Dtype::F32)?;
            Ok(format!("{} bytes", read.len()))
        }),
        "part-outside" => load().and_then(|model| {
            let read = model.read_part(2, PartKind::Codes, number(rest), number(&rest[1..]))?;
            Ok(format!("{} bytes", read.len()))
        }),
        "elements-of-integers" => load().and_then(|model| {
            model.read_elements(3, 0, 1, Dtype::F32)?;
            Ok("read".into())
        }),
        "load-without-end" => loop {
            if let Err(error) = load() {
                return Some(Err(error));
            }
        },
        "batches" => batches(),
        _ => return None,
    })
}

fn open() -> Result<Checkpoint, tightfit_program::Error> {
    Checkpoint::open("model")
}

/// As many as there are, on the first device; second copies and what cannot be quantized are stored.
fn placements(checkpoint: &Checkpoint) -> Vec<Placement> {
    let stored = |tensor: tightfit_program::Tensor| Placement {
        device: Some(0),
        format: match tensor.dtype {
            Dtype::Bf16 => Format::NF4,
            _ => Format::Stored,
        },
    };
    checkpoint.all_tensors().into_iter().map(stored).collect()
}

pub(crate) fn load() -> Result<Model, tightfit_program::Error> {
    let checkpoint = open()?;
    Model::load(&checkpoint, &placements(&checkpoint), &[0, 0])
}

/// The plan with this fault.
fn plan(fault: &str) -> Answer {
    let checkpoint = open()?;
    let mut placements = placements(&checkpoint);
    let mut headroom = vec![0, 0];
    let nf4 = |block_size| {
        Format::Nf4(Nf4Format {
            block_size,
            double_quantized: true,
        })
    };
    match fault {
        "none" => {}
        "too-few" => placements.truncate(1),
        "too-many" => placements.push(placements[0]),
        "a-million" => placements = vec![placements[0]; 1_000_000],
        "no-such-device" => placements[2].device = Some(2),
        "block-48" => placements[2].format = nf4(48),
        "integers" => placements[3].format = nf4(64),
        "cast-i8" => placements[2].format = Format::Cast(Dtype::I8),
        "torn-tie" => placements[1].device = Some(1),
        "few-headrooms" => headroom.clear(),
        "endless-headroom" => headroom[0] = u64::MAX,
        other => panic!("no fault is called {other}"),
    }
    let model = Model::load(&checkpoint, &placements, &headroom)?;
    Ok(format!("{} tensors", model.get_statistics().quantized))
}

fn load_and_forget() -> Answer {
    for _ in 0..10 {
        std::mem::forget(load()?);
    }
    Ok(get_usage(0)?.reserved.now.to_string())
}

/// Takes everything but this many bytes of the quota first.
fn load_after_buffer(left: u64) -> Answer {
    let _buffer = Buffer::allocate(1, get_quota().limit - left)?;
    load().map(|_| "loaded".into())
}

fn drop_checkpoint_in_use() -> Answer {
    let checkpoint = open()?;
    let second = open()?;
    let model = Model::load(&checkpoint, &placements(&checkpoint), &[0, 0])?;
    drop(checkpoint);
    let buffer = Buffer::allocate(0, 128)?;
    second.read_tensor(3, 0, 128, &buffer, 0)?;
    drop(second);
    let read = model.read_elements(2, 0, 64, Dtype::F32)?;
    Ok(format!("{} bytes", read.len()))
}

/// Bytes of a tensor of 128 bytes into a buffer of 128 bytes.
fn read_outside_tensor(start: u64, bytes: u64) -> Answer {
    let buffer = Buffer::allocate(0, 128)?;
    open()?.read_tensor(3, start, bytes, &buffer, 0)?;
    Ok("read".into())
}

/// Opens first, then allocates, then reads: what happens to the file in between is up to the test.
fn read_tensor() -> Answer {
    let checkpoint = open()?;
    let buffer = Buffer::allocate(0, 128)?;
    checkpoint.read_tensor(3, 0, 128, &buffer, 0)?;
    Ok("read".into())
}

fn batches() -> Answer {
    let checkpoint = open()?;
    let count = |first, count| checkpoint.tensors(first, count).len();
    Ok(format!(
        "{} {} {} {}",
        count(0, u32::MAX),
        count(1, 2),
        count(u32::MAX, u32::MAX),
        checkpoint.all_ties().len()
    ))
}
