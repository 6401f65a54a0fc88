//! Buffers and the arithmetic on them.

use std::hint::black_box;

use tightfit_program::{Buffer, Dtype, Place, QuantType, get_devices, get_quota, get_usage, nf4};

use crate::{Answer, number};

pub(crate) fn misbehave(behavior: &str, rest: &[String]) -> Option<Answer> {
    Some(match behavior {
        "honest" => honest(),
        "never-free" => never_free(),
        "allocate" => Buffer::allocate(0, number(rest)).map(|buffer| buffer.length().to_string()),
        "allocate-on" => Buffer::allocate(number(rest) as u32, 1).map(|_| "allocated".into()),
        "allocate-twice" => allocate_twice(number(rest), number(&rest[1..])),
        "loop-with-memory" => loop_with_memory(),
        "panic-with-memory" => panic_with_memory(),
        "read" => with_100(|buffer| {
            let read = buffer.read(number(rest), number(&rest[1..]))?;
            Ok(format!("{} bytes", read.len()))
        }),
        "write" => with_100(|buffer| {
            buffer.write(number(rest), &vec![1; number(&rest[1..]) as usize])?;
            Ok("written".into())
        }),
        "copy" => with_100(|buffer| {
            let [to, from, bytes] = [0, 1, 2].map(|argument| number(&rest[argument..]));
            buffer.copy_from(to, buffer, from, bytes)?;
            Ok("copied".into())
        }),
        "write-much" => write_much(number(rest)),
        "read-much" => {
            let bytes = number(rest);
            Buffer::allocate(0, bytes)
                .and_then(|buffer| Ok(format!("{} bytes", buffer.read(0, bytes)?.len())))
        }
        "copy-between-devices" => copy_between_devices(),
        "quantize-between-devices" => quantize_between_devices(),
        "dequantize" => dequantize(number(rest)),
        "fragment" => fragment(),
        "many-small" => many_small(number(rest)),
        "zeros" => zeros(number(rest)),
        "call-without-end" => loop {
            // Costs hardly any fuel.
            black_box(get_devices());
        },
        "ask-usage-of" => get_usage(number(rest) as u32).map(|usage| format!("{usage:?}")),
        "look-around" => Ok(format!("{:?} {:?}", get_devices(), get_quota())),
        "scribble" => scribble(number(rest) as u8),
        _ => return None,
    })
}

fn with_100(work: impl FnOnce(&Buffer) -> Answer) -> Answer {
    work(&Buffer::allocate(0, 100)?)
}

/// Does some of everything, as a program should.
fn honest() -> Answer {
    let source = Buffer::allocate(0, 256)?;
    let numbers = (0..64).flat_map(|number| (number as f32).to_le_bytes());
    source.write(0, &numbers.collect::<Vec<u8>>())?;
    let (codes, absmax) = (Buffer::allocate(0, 32)?, Buffer::allocate(0, 4)?);
    let place = |buffer| Place { buffer, offset: 0 };
    nf4::quantize(
        &place(&source),
        Dtype::F32,
        64,
        64,
        &place(&codes),
        &place(&absmax),
    )?;
    let (nf4, f32) = (QuantType::Nf4, Dtype::F32);
    nf4::dequantize(
        nf4,
        &place(&codes),
        &place(&absmax),
        64,
        64,
        f32,
        &place(&source),
    )?;
    let last = source.read(252, 4)?;
    let last = f32::from_le_bytes([last[0], last[1], last[2], last[3]]);
    Ok(format!("{last} {:?}", get_usage(0)?.requested.now))
}

fn never_free() -> Answer {
    for _ in 0..100 {
        let buffer = Buffer::allocate(0, 10_000)?;
        buffer.write(0, &vec![0xa5; 10_000])?;
        std::mem::forget(buffer);
    }
    Ok(get_usage(0)?.requested.now.to_string())
}

fn allocate_twice(first: u64, second: u64) -> Answer {
    let _first = Buffer::allocate(0, first)?;
    let _second = Buffer::allocate(0, second)?;
    Ok("both".into())
}

fn loop_with_memory() -> Answer {
    let buffer = Buffer::allocate(0, 1 << 20)?;
    buffer.write(0, &vec![0xa5; 1 << 20])?;
    loop {
        black_box(&buffer);
    }
}

fn panic_with_memory() -> Answer {
    let _buffer = Buffer::allocate(0, 1 << 20)?;
    panic!("the program has lost its head");
}

fn write_much(bytes: u64) -> Answer {
    let buffer = Buffer::allocate(0, bytes)?;
    buffer.write(0, &vec![1; bytes as usize])?;
    Ok("written".into())
}

fn copy_between_devices() -> Answer {
    let (one, other) = (Buffer::allocate(0, 10)?, Buffer::allocate(1, 10)?);
    one.copy_from(0, &other, 0, 10)?;
    Ok("copied".into())
}

fn quantize_between_devices() -> Answer {
    let (one, other) = (Buffer::allocate(0, 256)?, Buffer::allocate(1, 256)?);
    let place = |buffer| Place { buffer, offset: 0 };
    nf4::quantize(
        &place(&one),
        Dtype::F32,
        64,
        64,
        &place(&one),
        &place(&other),
    )?;
    Ok("quantized".into())
}

/// Into a buffer that has room for 64.
fn dequantize(elements: u64) -> Answer {
    let buffer = Buffer::allocate(0, 256)?;
    let place = || Place {
        buffer: &buffer,
        offset: 0,
    };
    nf4::dequantize(
        QuantType::Nf4,
        &place(),
        &place(),
        elements,
        64,
        Dtype::F32,
        &place(),
    )?;
    Ok("dequantized".into())
}

/// Frees every other buffer, and wants as much again in one piece and in pieces.
fn fragment() -> Answer {
    let limit = get_quota().limit;
    let each = limit / 64;
    let mut buffers = Vec::new();
    while let Ok(buffer) = Buffer::allocate(0, each) {
        buffers.push(Some(buffer));
    }
    let count = buffers.len();
    buffers
        .iter_mut()
        .step_by(2)
        .for_each(|buffer| *buffer = None);
    let refused = Buffer::allocate(0, limit / 2).is_err();
    for buffer in buffers.iter_mut().step_by(2) {
        *buffer = Some(Buffer::allocate(0, each)?);
    }
    Ok(format!(
        "{count} buffers, {refused}, {}",
        get_quota().reserved.now
    ))
}

fn many_small(count: u64) -> Answer {
    let buffers: Result<Vec<Buffer>, _> = (0..count).map(|_| Buffer::allocate(0, 1)).collect();
    let buffers = buffers?;
    for (number, buffer) in buffers.iter().enumerate() {
        buffer.write(0, &[number as u8])?;
    }
    for (number, buffer) in buffers.iter().enumerate() {
        assert_eq!(buffer.read(0, 1)?, [number as u8]);
    }
    Ok(get_usage(0)?.reserved.now.to_string())
}

/// Leaves no byte of the quota unwritten.
fn scribble(byte: u8) -> Answer {
    let limit = get_quota().limit;
    let buffer = Buffer::allocate(0, limit)?;
    for start in (0..limit).step_by(1 << 20) {
        let bytes = (limit - start).min(1 << 20);
        buffer.write(start, &vec![byte; bytes as usize])?;
    }
    let read = buffer.read(limit - 1, 1)?;
    Ok(format!("{read:?}"))
}

/// Looks for anything that is not zero in memory that it has not written, again and again.
fn zeros(rounds: u64) -> Answer {
    let limit = get_quota().limit;
    for round in 0..rounds {
        let half = Buffer::allocate(0, limit / 2)?;
        // What is written last makes the host clear what is before.
        half.write(limit / 2 - 1, &[round as u8 + 1])?;
        for start in (0..limit / 2 - 1).step_by(1 << 20) {
            let bytes = (limit / 2 - 1 - start).min(1 << 20);
            let read = half.read(start, bytes)?;
            assert!(read.iter().all(|&byte| byte == 0), "somebody's bytes");
        }
        half.write(0, &[0xa5; 4096])?;
        let usage = get_usage(0)?;
        assert_eq!(usage.requested.now, limit / 2, "somebody's usage");
        assert_eq!(
            get_quota().reserved.now,
            usage.reserved.now,
            "somebody's quota"
        );
    }
    Ok("zeros".into())
}
