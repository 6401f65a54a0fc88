//! Models of which parts are loaded.

use tightfit_program::{Checkpoint, Dtype, Format, Model, Placement, Slice, SliceRange};

use crate::{Answer, number};

pub(crate) fn misbehave(behavior: &str, rest: &[String]) -> Option<Answer> {
    Some(match behavior {
        "slice" => pieces(),
        "slice-same-elements" => same_elements(),
        "slice-badly" => badly(&rest[0]),
        "slice-into" => many(number(rest), 1),
        "slice-into-ranges" => many(1, number(rest)),
        _ => return None,
    })
}

fn nowhere(checkpoint: &Checkpoint) -> Vec<Placement> {
    let nowhere = Placement {
        device: None,
        format: Format::Stored,
    };
    vec![nowhere; checkpoint.tensor_count() as usize]
}

fn on(device: u32, format: Format) -> Placement {
    Placement {
        device: Some(device),
        format,
    }
}

/// A matrix with elements that differ: its number, rows and columns.
fn matrix(checkpoint: &Checkpoint) -> (u32, u64, u64) {
    let tensors = (0..).zip(checkpoint.all_tensors());
    tensors
        .filter(|(_, tensor)| tensor.name.contains("up_proj"))
        .find_map(|(number, tensor)| match tensor.shape[..] {
            [rows, columns] => Some((number, rows, columns)),
            _ => None,
        })
        .expect("it has a matrix")
}

/// The upper rows on one device, the lower ones on the other.
fn halves(checkpoint: &Checkpoint, format: Format) -> Vec<Slice> {
    let (number, rows, _) = matrix(checkpoint);
    vec![
        Slice::new(number, 0, 0..rows / 2, on(0, format)),
        Slice::new(number, 0, rows / 2..rows, on(1, format)),
    ]
}

fn pieces() -> Answer {
    let checkpoint = Checkpoint::open("model")?;
    let (number, ..) = matrix(&checkpoint);
    let slices = halves(&checkpoint, Format::NF4);
    let mut placements = nowhere(&checkpoint);
    let other = (0..placements.len()).find(|&other| other != number as usize);
    placements[other.expect("there are others")] = on(1, Format::Stored);
    let model = Model::load_slices(&checkpoint, &placements, &slices, &[0, 0])?;
    let mut told = Vec::new();
    for tensor in 0..=checkpoint.tensor_count() {
        let Ok(stored) = model.get_tensor(tensor) else {
            continue;
        };
        assert_eq!(model.find(&stored.name), Some(tensor));
        let piece = model.piece(tensor)?.map(|piece| {
            let ranges: Vec<String> = piece
                .ranges
                .iter()
                .map(|range| format!("{}:{}", range.start, range.end))
                .collect();
            format!(
                " of {} {:?}, dimension {}, {}",
                piece.tensor,
                piece.shape,
                piece.dimension,
                ranges.join("+")
            )
        });
        told.push(format!(
            "{} {:?} on {}{}",
            stored.name,
            stored.shape,
            stored.device,
            piece.unwrap_or_default()
        ));
    }
    assert!(model.piece(u32::MAX).is_err());
    Ok(told.join("; "))
}

/// What the slices hold is what the whole does, by rows and by columns.
fn same_elements() -> Answer {
    let checkpoint = Checkpoint::open("model")?;
    let (number, rows, columns) = matrix(&checkpoint);
    let mut placements = nowhere(&checkpoint);
    placements[number as usize] = on(0, Format::Stored);
    let whole = Model::load(&checkpoint, &placements, &[0, 0])?;
    let all = whole.read_elements(number, 0, rows * columns, Dtype::F32)?;
    let rows_cut = halves(&checkpoint, Format::Stored);
    let middle = columns / 2;
    let mut outer = Slice::new(number, 1, 0..1, on(0, Format::Stored));
    outer.ranges.push(SliceRange {
        start: middle,
        end: columns,
    });
    let columns_cut = vec![
        Slice::new(number, 1, 1..middle, on(1, Format::Stored)),
        outer,
    ];
    let mut checked = 0;
    for slices in [rows_cut, columns_cut] {
        let model = Model::load_slices(&checkpoint, &nowhere(&checkpoint), &slices, &[0, 0])?;
        for (tensor, slice) in (number..).zip(&slices) {
            let shape = model.get_tensor(tensor)?.shape;
            let count = shape.iter().product();
            let elements = model.read_elements(tensor, 0, count, Dtype::F32)?;
            let is_in = |index: u64| {
                let mut ranges = slice.ranges.iter();
                ranges.any(|range| (range.start..range.end).contains(&index))
            };
            let mut expected = Vec::new();
            for (index, element) in (0..).zip(all.chunks(4)) {
                let along = match slice.dimension {
                    0 => index / columns,
                    _ => index % columns,
                };
                if is_in(along) {
                    expected.extend_from_slice(element);
                }
            }
            assert_eq!(elements, expected, "{slice:?}");
            checked += count;
        }
    }
    Ok(format!("{} of {}", checked, 2 * rows * columns))
}

fn badly(fault: &str) -> Answer {
    let checkpoint = Checkpoint::open("model")?;
    let mut slices = halves(&checkpoint, Format::NF4);
    let mut placements = nowhere(&checkpoint);
    let number = slices[0].tensor as usize;
    match fault {
        "no-ranges" => slices[0].ranges.clear(),
        "too-long" => slices[1].ranges[0].end += 1,
        "no-such-tensor" => slices[0].tensor = 1000,
        "no-such-dimension" => slices[0].dimension = 2,
        "no-such-device" => slices[0].placement.device = Some(2),
        "twice" => slices.push(slices[1].clone()),
        "whole-too" => placements[number] = on(0, Format::Stored),
        "too-few" => {
            placements.pop();
        }
        "cast-i8" => slices[0].placement.format = Format::Cast(Dtype::I8),
        other => panic!("no fault is called `{other}`"),
    }
    Model::load_slices(&checkpoint, &placements, &slices, &[0, 0])?;
    Ok("loaded".into())
}

/// So many slices of so many ranges each.
fn many(slices: u64, ranges: u64) -> Answer {
    let checkpoint = Checkpoint::open("model")?;
    let (number, ..) = matrix(&checkpoint);
    let mut slice = Slice::new(number, 0, 0..1, on(0, Format::Stored));
    slice.ranges = vec![SliceRange { start: 0, end: 1 }; ranges as usize];
    let slices = vec![slice; slices as usize];
    Model::load_slices(&checkpoint, &nowhere(&checkpoint), &slices, &[0, 0])?;
    Ok("loaded".into())
}
