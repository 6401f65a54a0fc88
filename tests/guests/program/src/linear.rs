//! Products: with shapes that lie, operands that overlap, weights whose memory is gone, and without end.

use std::hint::black_box;

use tightfit_program::{
    Buffer, Dtype, Error, Product, QuantType, Weight, finish, get_usage, multiply, nf4,
};

use crate::{Answer, models, number};

pub(crate) fn misbehave(behavior: &str, rest: &[String]) -> Option<Answer> {
    Some(match behavior {
        "multiply" => multiply_all(number(rest) as u32),
        "weight" => weight_of(
            &rest[0],
            number(&rest[1..]),
            [2, 3].map(|n| number(&rest[n..])),
        ),
        "weight-between-devices" => {
            let (codes, absmax) = (Buffer::allocate(0, 4096), Buffer::allocate(1, 4096));
            codes
                .and_then(|codes| from_codes(&[8, 64], 64, (&codes, 0), (&absmax?, 0)))
                .map(|_| "made".into())
        }
        "operand" => operand(&rest[0], number(&rest[1..])),
        "operand-elsewhere" => operand_elsewhere(&rest[0]),
        "rows" => Setup::new(None).and_then(|it| it.multiply(number(rest) as u32)),
        "overlap" => overlap(&rest[0]),
        "float" => float(&rest[0]),
        "experts-missing" => Setup::new(Some(4)).and_then(|it| it.multiply(1)),
        "experts-unasked" => Setup::new(None).and_then(|it| {
            let product = it.product(1).with_experts(it.small.at(0));
            multiply(&[product]).map(|()| "multiplied".into())
        }),
        "experts-of-nobody" => experts_of_nobody(),
        "one-of-many-is-bad" => one_of_many_is_bad(),
        "free-and-multiply" => free_and_multiply(),
        "unload-and-multiply" => unload_and_multiply(),
        "overwrite-after-multiply" => overwrite_after_multiply(),
        "weight-of-model" => weight_of_model(number(rest) as u32),
        "hoard-weights" => hoard_weights(number(rest)),
        "multiply-without-end" => multiply_without_end(),
        "multiply-long" => multiply_long(),
        "list-without-end" => loop {
            if let Err(error) = list_of(3000) {
                return Some(Err(error));
            }
        },
        "list" => list_of(number(rest)),
        "finish-nothing" => finish().map(|()| "finished".into()),
        "panic-while-queued" => panic_while_queued(),
        "quantize-all" => quantize_all(),
        "quantize-in" => quantize_in(number(rest)),
        "read-what-was-not-written" => read_what_was_not_written(),
        "scratch" => scratch(number(rest)),
        _ => return None,
    })
}

/// Numbers that differ, the same on every run.
fn numbers(count: u64, step: u64) -> Vec<u8> {
    let number = |index: u64| ((index * step) % 1009) as f32 / 500.0 - 1.0;
    (0..count)
        .flat_map(|index| number(index).to_le_bytes())
        .collect()
}

fn from_codes(
    shape: &[u64],
    block: u32,
    (codes, codes_at): (&Buffer, u64),
    (absmax, absmax_at): (&Buffer, u64),
) -> Result<Weight, Error> {
    let (codes, absmax) = (codes.at(codes_at), absmax.at(absmax_at));
    Weight::from_codes(QuantType::Nf4, shape, block, &codes, &absmax)
}

/// FNV-1a, to compare what devices give.
fn digest(bytes: &[u8]) -> u64 {
    let start = 0xcbf2_9ce4_8422_2325u64;
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
    bytes.iter().fold(start, step)
}

const OUTPUTS: u64 = 96;
const INPUTS: u64 = 128;
const ROWS: u64 = 5;

/// A weight and operands of products with it, f32.
struct Setup {
    codes: Buffer,
    absmax: Buffer,
    weight: Weight,
    x: Buffer,
    y: Buffer,
    /// A bias, or numbers of experts.
    small: Buffer,
}

impl Setup {
    fn new(experts: Option<u64>) -> Result<Setup, Error> {
        let all = experts.unwrap_or(1) * OUTPUTS;
        let elements = all * INPUTS;
        let source = Buffer::of(0, &numbers(elements, 7919))?;
        let codes = Buffer::allocate(0, elements / 2)?;
        let absmax = Buffer::allocate(0, elements / 16)?;
        let (f32, at) = (Dtype::F32, 0);
        nf4::quantize(
            &source.at(at),
            f32,
            elements,
            64,
            &codes.at(at),
            &absmax.at(at),
        )?;
        let matrix = [OUTPUTS, INPUTS];
        let shape: Vec<u64> = experts.into_iter().chain(matrix).collect();
        Ok(Setup {
            weight: from_codes(&shape, 64, (&codes, 0), (&absmax, 0))?,
            x: Buffer::of(0, &numbers(ROWS * INPUTS, 31))?,
            y: Buffer::allocate(0, 4 * ROWS * OUTPUTS)?,
            small: Buffer::of(0, &numbers(all, 3))?,
            codes,
            absmax,
        })
    }

    fn product(&self, rows: u32) -> Product<'_> {
        Product::new(&self.weight, self.x.at(0), rows, Dtype::F32, self.y.at(0))
    }

    fn multiply(&self, rows: u32) -> Answer {
        multiply(&[self.product(rows)])?;
        finish()?;
        Ok("multiplied".into())
    }

    fn y(&self) -> Result<Vec<f32>, Error> {
        floats(&self.y)
    }
}

fn floats(buffer: &Buffer) -> Result<Vec<f32>, Error> {
    let bytes = buffer.read(0, buffer.length())?;
    let float = |bytes: &[u8]| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    Ok(bytes.chunks_exact(4).map(float).collect())
}

/// Computes products in this program's own numbers.
fn by_hand(it: &Setup, row: usize, expert: u64) -> Result<Vec<f32>, Error> {
    let elements = it.codes.length() * 2;
    let weights = Buffer::allocate(0, 4 * elements)?;
    let (nf4, f32) = (QuantType::Nf4, Dtype::F32);
    let (codes, absmax) = (it.codes.at(0), it.absmax.at(0));
    nf4::dequantize(nf4, &codes, &absmax, elements, 64, f32, &weights.at(0))?;
    let (weights, x) = (floats(&weights)?, floats(&it.x)?);
    let inputs = INPUTS as usize;
    let x = &x[row * inputs..][..inputs];
    let first = (expert * OUTPUTS) as usize;
    let output = |output: usize| {
        let row = &weights[(first + output) * inputs..][..inputs];
        let products = row
            .iter()
            .zip(x)
            .map(|(w, x)| f64::from(*w) * f64::from(*x));
        products.sum::<f64>() as f32
    };
    Ok((0..OUTPUTS as usize).map(output).collect())
}

fn largest_difference(one: &[f32], two: &[f32]) -> f32 {
    let pairs = one.iter().zip(two);
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Products of everything that there is, compared with the program's own: the answer is what differs.
fn multiply_all(seed: u32) -> Answer {
    let rows = ROWS as u32;
    let it = Setup::new(None)?;
    // Several in one list: the second takes what the first gives, as a bias of its own.
    let second = Buffer::allocate(0, 4 * ROWS * OUTPUTS)?;
    let chained = Product::new(&it.weight, it.x.at(0), rows, Dtype::F32, second.at(0))
        .with_bias(it.y.at(0))
        .by_row();
    multiply(&[it.product(rows).by_row(), chained])?;
    finish()?;
    let (y, second) = (it.y()?, floats(&second)?);
    let mut worst = 0f32;
    for row in 0..ROWS as usize {
        let expected = by_hand(&it, row, 0)?;
        let outputs = OUTPUTS as usize;
        let have = &y[row * outputs..][..outputs];
        worst = worst.max(largest_difference(have, &expected));
        let sums: Vec<f32> = expected
            .iter()
            .zip(&y)
            .map(|(one, two)| one + two)
            .collect();
        worst = worst.max(largest_difference(
            &second[row * outputs..][..outputs],
            &sums,
        ));
    }
    // Each row by itself, to the bit.
    let alone = Buffer::allocate(0, 4 * OUTPUTS)?;
    let mut same = true;
    for row in 0..ROWS {
        let x = it.x.at(4 * row * INPUTS);
        multiply(&[Product::new(&it.weight, x, 1, Dtype::F32, alone.at(0)).by_row()])?;
        let all = it.y.read(4 * row * OUTPUTS, 4 * OUTPUTS)?;
        same &= alone.read(0, 4 * OUTPUTS)? == all;
    }
    let many = Setup::new(Some(4))?;
    let ids: Vec<u32> = (0..rows).map(|row| (row * 3 + seed) % 4).collect();
    let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    let experts = Buffer::of(0, &bytes)?;
    multiply(&[many
        .product(rows)
        .with_experts(experts.at(0))
        .with_bias(many.small.at(0))])?;
    let (y, bias) = (many.y()?, floats(&many.small)?);
    for (row, id) in ids.into_iter().enumerate() {
        let expected = by_hand(&many, row, id.into())?;
        let outputs = OUTPUTS as usize;
        let bias = &bias[id as usize * outputs..][..outputs];
        let sums: Vec<f32> = expected
            .iter()
            .zip(bias)
            .map(|(one, two)| one + two)
            .collect();
        worst = worst.max(largest_difference(&y[row * outputs..][..outputs], &sums));
    }
    Ok(format!("{} {same} {}", worst < 1e-4, many.weight.device()))
}

/// A weight of any shape, from buffers of 8 KiB each.
fn weight_of(shape: &str, block: u64, [codes_at, absmax_at]: [u64; 2]) -> Answer {
    let shape: Vec<u64> = shape
        .split(',')
        .filter_map(|length| length.parse().ok())
        .collect();
    let (codes, absmax) = (Buffer::allocate(0, 8192)?, Buffer::allocate(0, 8192)?);
    let weight = from_codes(
        &shape,
        block as u32,
        (&codes, codes_at),
        (&absmax, absmax_at),
    )?;
    Ok(format!("{:?}", weight.shape()))
}

/// One operand begins where it should not.
fn operand(which: &str, offset: u64) -> Answer {
    let it = Setup::new((which == "experts").then_some(4))?;
    let mut product = it.product(ROWS as u32);
    match which {
        "input" => product.input = it.x.at(offset),
        "output" => product.output = it.y.at(offset),
        "bias" => product.bias = Some(it.small.at(offset)),
        _ => product.experts = Some(it.small.at(offset)),
    }
    multiply(&[product])?;
    Ok("multiplied".into())
}

fn operand_elsewhere(which: &str) -> Answer {
    let it = Setup::new((which == "experts").then_some(4))?;
    let other = Buffer::allocate(1, 1 << 16)?;
    let mut product = it.product(1);
    match which {
        "input" => product.input = other.at(0),
        "output" => product.output = other.at(0),
        "bias" => product.bias = Some(other.at(0)),
        _ => product.experts = Some(other.at(0)),
    }
    multiply(&[product])?;
    Ok("multiplied".into())
}

/// The output lies in what is read.
fn overlap(which: &str) -> Answer {
    let it = Setup::new((which == "experts").then_some(4))?;
    let mut product = it.product(1);
    match which {
        // An output of 96 numbers fits into what is behind the last number of the input.
        "input" => product.output = it.x.at(4 * (INPUTS - 1)),
        "bias" => {
            product.bias = Some(it.small.at(0));
            product.output = it.small.at(0);
        }
        "experts" => {
            product.experts = Some(it.small.at(4));
            product.output = it.small.at(0);
        }
        "codes" => product.output = it.codes.at(it.codes.length() - 4 * OUTPUTS),
        _ => product.output = it.absmax.at(0),
    }
    multiply(&[product])?;
    Ok("multiplied".into())
}

fn float(which: &str) -> Answer {
    let it = Setup::new(None)?;
    let mut product = it.product(1);
    product.float = match which {
        "i64" => Dtype::I64,
        "bool" => Dtype::Bool,
        "f16" => Dtype::F16,
        _ => Dtype::Bf16,
    };
    multiply(&[product])?;
    finish()?;
    Ok("multiplied".into())
}

/// Numbers that are of no expert: their rows are left as they are, also where nothing was ever written.
fn experts_of_nobody() -> Answer {
    let it = Setup::new(Some(4))?;
    let ids = [4, 0, u32::MAX, 1 << 31, i32::MAX as u32];
    let ids = Buffer::of(0, &ids.map(u32::to_le_bytes).concat())?;
    multiply(&[it.product(ROWS as u32).with_experts(ids.at(0))])?;
    let y = it.y()?;
    let rows: Vec<bool> = y
        .chunks_exact(OUTPUTS as usize)
        .map(|row| row.iter().all(|number| *number == 0.0))
        .collect();
    it.y.write(0, &[0x3f; 8])?;
    // All of them, and the first one, of nobody, by itself.
    for rows in [ROWS as u32, 1] {
        multiply(&[it.product(rows).with_experts(ids.at(0))])?;
    }
    Ok(format!("{rows:?} {:?}", it.y.read(0, 8)?))
}

/// The last one of three is refused, so that none is done.
fn one_of_many_is_bad() -> Answer {
    let it = Setup::new(None)?;
    let bad = Product {
        input: it.x.at(4),
        ..it.product(ROWS as u32)
    };
    let result = multiply(&[it.product(1), it.product(2), bad]);
    let untouched = it.y()?.iter().all(|number| *number == 0.0);
    match result {
        Err(Error::InvalidArgument(_)) => Ok(format!("{untouched}")),
        other => Ok(format!("{other:?}")),
    }
}

/// A weight keeps the memory of its buffers, and gives it back.
fn free_and_multiply() -> Answer {
    let it = Setup::new(None)?;
    multiply(&[it.product(ROWS as u32)])?;
    let before = it.y()?;
    let held = || get_usage(0).map(|usage| usage.requested.now);
    let Setup {
        codes,
        absmax,
        weight,
        x,
        y,
        ..
    } = it;
    let all = held()?;
    drop((codes, absmax));
    let kept = held()?;
    // Whoever gets memory now must not get that.
    let others: Result<Vec<Buffer>, Error> =
        (0..16).map(|_| Buffer::of(0, &[0xff; 8192])).collect();
    let others = others?;
    multiply(&[Product::new(
        &weight,
        x.at(0),
        ROWS as u32,
        Dtype::F32,
        y.at(0),
    )])?;
    let same = floats(&y)? == before;
    drop((weight, others));
    Ok(format!("{same} {} {}", all == kept, kept > held()?))
}

/// The same with a model.
fn unload_and_multiply() -> Answer {
    let model = models::load()?;
    let weight = Weight::of(&model, 2)?;
    let shape = weight.shape();
    let inputs = shape[shape.len() - 1];
    let x = Buffer::of(0, &numbers(inputs, 5))?;
    let y = Buffer::allocate(0, 4 * shape[0])?;
    let product = || Product::new(&weight, x.at(0), 1, Dtype::F32, y.at(0));
    multiply(&[product()])?;
    let before = floats(&y)?;
    drop(model);
    y.write(0, &vec![0; y.length() as usize])?;
    multiply(&[product()])?;
    let same = floats(&y)? == before && before.iter().any(|number| *number != 0.0);
    let reserved = get_usage(0)?.reserved.now;
    drop(weight);
    Ok(format!("{same} {}", reserved > get_usage(0)?.reserved.now))
}

/// What is queued comes before what is written later.
fn overwrite_after_multiply() -> Answer {
    let it = Setup::new(None)?;
    multiply(&[it.product(ROWS as u32)])?;
    let before = it.y()?;
    for _ in 0..3 {
        multiply(&[it.product(ROWS as u32)])?;
        it.x.write(0, &vec![0; it.x.length() as usize])?;
        it.x.write(0, &numbers(ROWS * INPUTS, 31))?;
    }
    let same = it.y()? == before;
    it.codes.write(0, &vec![0; it.codes.length() as usize])?;
    multiply(&[it.product(ROWS as u32)])?;
    Ok(format!("{same} {}", it.y()? == before))
}

fn weight_of_model(tensor: u32) -> Answer {
    let model = models::load()?;
    Weight::of(&model, tensor).map(|weight| format!("{:?}", weight.shape()))
}

fn hoard_weights(count: u64) -> Answer {
    let (codes, absmax) = (Buffer::allocate(0, 32)?, Buffer::allocate(0, 4)?);
    let make = |_| from_codes(&[1, 64], 64, (&codes, 0), (&absmax, 0));
    let weights: Result<Vec<Weight>, Error> = (0..count).map(make).collect();
    Ok(weights?.len().to_string())
}

fn multiply_without_end() -> Answer {
    let it = Setup::new(None)?;
    loop {
        multiply(&[it.product(ROWS as u32)])?;
        black_box(&it);
    }
}

/// One call that is more work than there is time for.
fn multiply_long() -> Answer {
    let (outputs, inputs, rows) = (4096, 4096, 4096);
    let elements = outputs * inputs;
    let codes = Buffer::allocate(0, elements / 2)?;
    let absmax = Buffer::allocate(0, elements / 16)?;
    let weight = from_codes(&[outputs, inputs], 64, (&codes, 0), (&absmax, 0))?;
    let (x, y) = (
        Buffer::allocate(0, 4 * rows * inputs)?,
        Buffer::allocate(0, 4 * rows * outputs)?,
    );
    let product = || Product::new(&weight, x.at(0), rows as u32, Dtype::F32, y.at(0));
    let all: Vec<Product<'_>> = (0..64).map(|_| product()).collect();
    multiply(&all)?;
    Ok("multiplied".into())
}

/// A list of so many products.
fn list_of(count: u64) -> Answer {
    let it = Setup::new(None)?;
    let product = || it.product(ROWS as u32);
    let products: Vec<Product<'_>> = (0..count).map(|_| product()).collect();
    multiply(&products)?;
    finish()?;
    Ok(products.len().to_string())
}

fn panic_while_queued() -> Answer {
    let it = Setup::new(None)?;
    for _ in 0..10 {
        multiply(&[it.product(ROWS as u32)])?;
    }
    panic!("the program has lost its head");
}

/// All of `nf4` at odd and even places, on top of each other and in pieces: the answer is what it gives.
fn quantize_all() -> Answer {
    let count = 5000u64;
    let mut given = Vec::new();
    let source = Buffer::of(0, &[vec![0; 16], numbers(count, 7919)].concat())?;
    for (codes_at, absmax_at, target_at) in [(0, 0, 0), (1, 4, 4), (7, 1, 2), (0, 0, 1)] {
        let codes = Buffer::allocate(0, 4096)?;
        let absmax = Buffer::allocate(0, 4096)?;
        let (small, nested) = (Buffer::allocate(0, 128)?, Buffer::allocate(0, 16)?);
        let target = Buffer::allocate(0, 4 * count + 8)?;
        let blocks = count.div_ceil(64);
        let f32 = Dtype::F32;
        let from = source.at(16);
        let (to, scales) = (codes.at(codes_at), absmax.at(absmax_at));
        let wrong = nf4::quantize(&from, f32, count, 64, &to, &scales)?;
        let mean = nf4::quantize_absmax(&scales, blocks, &small.at(0), &nested.at(0))?;
        nf4::dequantize_absmax(&small.at(0), &nested.at(0), mean, blocks, &scales)?;
        let nf4 = QuantType::Nf4;
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
            nf4::dequantize(nf4, &to, &scales, count, 64, dtype, &target.at(target_at))?;
            given.extend(target.read(0, target.length())?);
        }
        let bytes = source.read(16, 4 * count)?;
        let again = nf4::quantize_bytes(&bytes, f32, 64, &to, &scales)?;
        given.extend([wrong.to_le_bytes(), again.to_le_bytes()].concat());
        given.extend(mean.to_le_bytes());
        for buffer in [&codes, &absmax, &small, &nested] {
            given.extend(buffer.read(0, buffer.length())?);
        }
        // On top of what it reads, at its end: piece by piece, as the processor does it.
        let (codes, absmax) = (source.at(0), absmax.at(0));
        nf4::dequantize(nf4, &codes, &absmax, 64, 64, f32, &codes)?;
        target.copy_from(8, &source, 0, 4 * count)?;
        target.copy_from(4 * count / 2, &target, 0, 100)?;
        given.extend(target.read(0, target.length())?);
        source.write(0, &[0; 256])?;
        source.write(16, &numbers(60, 7919))?;
    }
    Ok(format!("{} bytes {:x}", given.len(), digest(&given)))
}

/// Leaves no byte of so many for anything else.
fn quantize_in(bytes: u64) -> Answer {
    let count = 4096u64;
    let source = Buffer::of(0, &numbers(count, 7919))?;
    let (codes, absmax) = (
        Buffer::allocate(0, count / 2)?,
        Buffer::allocate(0, count / 16)?,
    );
    let mut rest = Vec::new();
    let mut piece = bytes;
    while piece >= 256 {
        match Buffer::allocate(0, piece) {
            Ok(buffer) => rest.push(buffer),
            Err(_) => piece /= 2,
        }
        if rest.len() > 100 {
            break;
        }
    }
    let (f32, at) = (Dtype::F32, 0);
    nf4::quantize(
        &source.at(at),
        f32,
        count,
        64,
        &codes.at(at),
        &absmax.at(at),
    )?;
    let given = [codes.read(0, count / 2)?, absmax.read(0, count / 16)?].concat();
    Ok(format!("{:x}", digest(&given)))
}

/// Looks for what others have left in memory that was never written, behind and between what is.
fn read_what_was_not_written() -> Answer {
    for round in 1..4u8 {
        let dirty = Buffer::allocate(0, 1 << 16)?;
        dirty.write(0, &vec![round; 1 << 16])?;
        drop(dirty);
        let it = Setup::new(None)?;
        let target = Buffer::allocate(0, 1 << 16)?;
        let (nf4, f32) = (QuantType::Nf4, Dtype::F32);
        let (codes, absmax) = (it.codes.at(0), it.absmax.at(0));
        nf4::dequantize(nf4, &codes, &absmax, 64, 64, f32, &target.at(4096))?;
        let product = Product {
            output: target.at(16384),
            ..it.product(2)
        };
        multiply(&[product])?;
        // A copy of what was never written is zeros, too.
        let source = Buffer::allocate(0, 4096)?;
        target.copy_from(32768, &source, 0, 4096)?;
        let written = [4096..4352, 16384..16384 + 8 * OUTPUTS as usize];
        let bytes = target.read(0, 1 << 16)?;
        for (at, byte) in bytes.iter().enumerate() {
            if *byte != 0 && !written.iter().any(|range| range.contains(&at)) {
                return Ok(format!("byte {at} is {byte}"));
            }
        }
    }
    Ok("zeros".into())
}

/// What products need beside their operands, as it is told and as it is taken, beside so many bytes more.
fn scratch(taken: u64) -> Answer {
    let _taken = Buffer::allocate(0, taken)?;
    let (outputs, inputs) = (256u64, 1024u64);
    let elements = outputs * inputs;
    let (codes, absmax) = (
        Buffer::allocate(0, elements / 2)?,
        Buffer::allocate(0, elements / 16)?,
    );
    let weight = from_codes(&[outputs, inputs], 64, (&codes, 0), (&absmax, 0))?;
    let (x, y) = (
        Buffer::allocate(0, 2 * inputs)?,
        Buffer::allocate(0, 2 * outputs)?,
    );
    let told = weight.scratch_bytes(1);
    let before = get_usage(0)?.requested.now;
    multiply(&[Product::new(&weight, x.at(0), 1, Dtype::Bf16, y.at(0))])?;
    finish()?;
    let taken = get_usage(0)?.requested.now - before;
    Ok(format!("{} {} {}", told > 0, taken > 0, taken <= told))
}
