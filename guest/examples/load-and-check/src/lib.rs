//! Loads a checkpoint onto the first device, its matrices in NF4, and says how far they are from what
//! they were.

use tightfit_program::{
    Buffer, Checkpoint, Dtype, Format, GaveUp, Level, Model, Placement, Program,
};
use tightfit_program::{Tensor, get_devices, get_usage, log, program};

struct LoadAndCheck;
program!(LoadAndCheck);

impl Program for LoadAndCheck {
    fn run(arguments: Vec<String>) -> Result<String, GaveUp> {
        let [name] = arguments.as_slice() else {
            return Err("give the name under which a checkpoint was granted".into());
        };
        let checkpoint = Checkpoint::open(name)?;
        let tensors = checkpoint.all_tensors();
        let headroom = vec![0; get_devices().len()];
        let model = Model::load(&checkpoint, &placements(&checkpoint, &tensors), &headroom)?;
        let statistics = model.get_statistics();
        let mut answer = format!(
            "{} of {} tensors quantized, {} bytes reserved\n",
            statistics.quantized,
            tensors.len(),
            get_usage(0)?.reserved.now,
        );
        for (index, tensor) in (0..)
            .zip(&tensors)
            .filter(|(_, tensor)| is_matrix(tensor))
            .take(3)
        {
            let error = largest_error(&checkpoint, &model, index, tensor)?;
            answer += &format!("{}: off by at most {error:.6}\n", tensor.name);
        }
        log(
            Level::Info,
            &format!("{} bytes read", statistics.bytes_read),
        );
        Ok(answer)
    }
}

fn is_matrix(tensor: &Tensor) -> bool {
    tensor.shape.len() == 2 && tensor.dtype == Dtype::Bf16 && tensor.quantized.is_none()
}

/// Everything on the first device; second copies of tied tensors nowhere.
fn placements(checkpoint: &Checkpoint, tensors: &[Tensor]) -> Vec<Placement> {
    let format = |tensor| {
        if is_matrix(tensor) {
            Format::NF4
        } else {
            Format::Stored
        }
    };
    let mut placements: Vec<Placement> = tensors
        .iter()
        .map(|tensor| Placement {
            device: Some(0),
            format: format(tensor),
        })
        .collect();
    for tie in checkpoint.all_ties() {
        if let Some(alias) = tie.alias_tensor {
            placements[alias as usize].device = None;
        }
    }
    placements
}

/// The largest difference between a tensor as it is loaded and as the checkpoint has it.
fn largest_error(
    checkpoint: &Checkpoint,
    model: &Model,
    index: u32,
    tensor: &Tensor,
) -> Result<f32, GaveUp> {
    // As much as a buffer gives in one call, or less.
    const PIECE: u64 = 1 << 20;
    let elements: u64 = tensor.shape.iter().product();
    let buffer = Buffer::allocate(0, 2 * PIECE)?;
    let mut largest = 0f32;
    let mut first = 0;
    while first < elements {
        let count = PIECE.min(elements - first);
        checkpoint.read_tensor(index, 2 * first, 2 * count, &buffer, 0)?;
        let source = buffer.read(0, 2 * count)?;
        let loaded = model.read_elements(index, first, count, Dtype::F32)?;
        for (source, loaded) in source.chunks_exact(2).zip(loaded.chunks_exact(4)) {
            let source = f32::from_le_bytes([0, 0, source[0], source[1]]);
            let loaded = f32::from_le_bytes([loaded[0], loaded[1], loaded[2], loaded[3]]);
            largest = largest.max((source - loaded).abs());
        }
        first += count;
    }
    Ok(largest)
}
