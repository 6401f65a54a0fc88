//! What a decoder computes between products: with lengths, places, ids and positions that lie, and without end.

use std::collections::BTreeMap;
use std::hint::black_box;

use tightfit_program::transformer::{
    Activation, Cache, Faults, HeadNorms, Heads, Norm, Parameter, Rotary, Visible, add, attend,
    combine, dense, gate, gather, rms_norm, rotate, route, take_faults, top,
};
use tightfit_program::{Buffer, Checkpoint, Dtype, Error, Format, Model, Place, Placement, output};

use crate::{Answer, number};

pub(crate) fn misbehave(behavior: &str, rest: &[String]) -> Option<Answer> {
    Some(match behavior {
        "step" => step(&rest[0], &rest[1..]),
        "ids" => ids(&rest[0]),
        "positions" => positions(&rest[0]),
        "faults-are-taken-once" => faults_are_taken_once(),
        "faults-of" => take_faults(number(rest) as u32).map(|faults| show(faults).into()),
        "cache-reads-as-zeros" => cache_reads_as_zeros(),
        "attend-without-end" => attend_without_end(),
        "attend-long" => attend_long(),
        "dense-long" => dense_long(),
        "norm-long" => norm_long(),
        "decode-honestly" => honest(),
        "say" => say(number(rest), number(&rest[1..])),
        "say-without-end" => loop {
            if let Err(error) = output("and on ") {
                break Err(error);
            }
        },
        _ => return None,
    })
}

/// The granted model: its first tensor as it is, the second not at all, the third in NF4, the last as it is.
fn load() -> Result<Model, Error> {
    let checkpoint = Checkpoint::open("model")?;
    let place = |(device, format)| Placement { device, format };
    let placements = [
        (Some(0), Format::Stored),
        (None, Format::Stored),
        (Some(0), Format::NF4),
        (Some(0), Format::Stored),
    ];
    Model::load(&checkpoint, &placements.map(place), &[0, 0])
}

fn show(faults: Faults) -> &'static str {
    match faults {
        _ if faults == Faults::empty() => "none",
        _ if faults == Faults::ID => "id",
        _ if faults == Faults::POSITION => "position",
        _ => "both",
    }
}

/// Bytes of every buffer: what fits the lengths that there are by default, and not much more.
const BYTES: u64 = 8192;

/// Lengths that a test changes, and where places are.
struct Given(BTreeMap<String, u64>);

impl Given {
    fn new(changes: &[String]) -> Given {
        let change = |text: &String| {
            let (name, value) = text.split_once('=').expect("tests give name=value");
            (name.to_owned(), value.parse().expect("tests give a number"))
        };
        Given(changes.iter().map(change).collect())
    }

    fn is(&self, name: &str, default: u64) -> u64 {
        self.0.get(name).copied().unwrap_or(default)
    }

    fn length(&self, name: &str, default: u32) -> u32 {
        self.is(name, default.into()) as u32
    }
}

/// One call, valid but for what is changed.
fn step(operation: &str, changes: &[String]) -> Answer {
    let given = Given::new(changes);
    let buffers = (0..10)
        .map(|_| Buffer::allocate(0, BYTES))
        .collect::<Result<Vec<_>, _>>()?;
    let elsewhere = Buffer::allocate(1, BYTES)?;
    // Places by number: in buffers of their own, unless they are said to be in another one's.
    let at = |number: u64| {
        let buffer = given.is(&format!("in{number}"), number);
        Place {
            buffer: match buffer {
                99 => &elsewhere,
                buffer => &buffers[buffer as usize],
            },
            offset: given.is(&format!("at{number}"), 0),
        }
    };
    let float = match given.is("float", 0) {
        0 => Dtype::F32,
        1 => Dtype::Bf16,
        2 => Dtype::F16,
        3 => Dtype::I32,
        _ => Dtype::F64,
    };
    let (rows, columns, k) = (
        given.length("rows", 3),
        given.length("columns", 64),
        given.length("k", 4),
    );
    let elements = given.is("elements", 100);
    let heads = Heads {
        float,
        rows,
        query_heads: given.length("query-heads", 4),
        kv_heads: given.length("kv-heads", 2),
        head_size: given.length("head-size", 16),
    };
    let cache = Cache {
        capacity: given.length("capacity", 8),
        keys: at(3),
        values: at(4),
    };
    match operation {
        "rms-norm" => {
            let norm = Norm {
                float,
                rows,
                columns,
                eps: 1e-6,
                weight_offset: 0.0,
                weight: at(1),
            };
            let more = (given.is("add", 1) == 1).then(|| at(2));
            rms_norm(&norm, &at(0), more.as_ref(), &at(3))?;
        }
        "add" => add(float, elements, &at(0), &at(1))?,
        "gate" => gate(float, Activation::Silu, elements, &at(0), &at(1), &at(2))?,
        "rotate" => {
            let norms = HeadNorms {
                eps: 1e-6,
                weight_offset: 0.0,
                queries: Some(at(7)),
                keys: None,
            };
            let rotary = Rotary {
                dimensions: given.length("dimensions", 16),
                frequencies: at(5),
                scaling: 1.0,
            };
            rotate(
                heads,
                &norms,
                &rotary,
                &at(6),
                &at(0),
                &at(1),
                &at(2),
                &cache,
            )?;
        }
        "attend" => {
            let visible = match given.is("visible", 0) {
                0 => Visible::Causal,
                1 => Visible::Window(given.length("window", 4)),
                _ => Visible::First(given.length("first", 4)),
            };
            let most = given.length("most", 8);
            attend(heads, &cache, &at(6), visible, most, 1.0, &at(0), &at(1))?;
        }
        "top" => top(float, rows, columns, k, &at(0), &at(1), &at(2))?,
        "route" => route(float, rows, columns, k, true, &at(0), &at(1), &at(2))?,
        "combine" => combine(float, rows, k, columns, &at(0), &at(1), &at(2))?,
        // Of the model's [64, 32] bf16, an I64 vector, and what is in 4 bits.
        "gather" | "dense" => {
            let model = load()?;
            let parameter = Parameter {
                model: &model,
                tensor: given.length("tensor", 0),
            };
            match operation {
                "gather" => gather(&parameter, &at(0), rows, &at(1))?,
                _ => dense(&parameter, &at(0), rows, None, &at(1))?,
            }
        }
        _ => panic!("no such operation"),
    }
    Ok(show(take_faults(0)?).into())
}

fn words(words: &[u32]) -> Result<Buffer, Error> {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    Buffer::of(0, &bytes)
}

fn list(text: &str) -> Vec<u32> {
    text.split(',')
        .map(|word| word.parse().expect("tests give numbers"))
        .collect()
}

/// Rows of the model's table, for ids whatever they are.
fn ids(text: &str) -> Answer {
    let model = load()?;
    let ids = list(text);
    let y = Buffer::of(0, &vec![0xee; 64 * ids.len()])?;
    let table = Parameter {
        model: &model,
        tensor: 0,
    };
    gather(&table, &words(&ids)?.at(0), ids.len() as u32, &y.at(0))?;
    let faults = show(take_faults(0)?);
    let rows = y.read(0, y.length())?;
    let zero = rows.chunks(64).map(|row| row.iter().all(|byte| *byte == 0));
    Ok(format!("{faults} {:?}", zero.collect::<Vec<bool>>()))
}

/// Keys and values of ones into a cache of 4 rows, at positions whatever they are, and what is there.
fn positions(text: &str) -> Answer {
    let positions = list(text);
    let rows = positions.len();
    let ones: Vec<u8> = (0..8 * rows).flat_map(|_| 1f32.to_le_bytes()).collect();
    let [q, k, v, y] = [(); 4].map(|()| Buffer::of(0, &ones));
    let (q, k, v, y) = (q?, k?, v?, y?);
    let [keys, values] = [(); 2].map(|()| Buffer::of(0, &[0; 128 + 64]));
    let (keys, values) = (keys?, values?);
    let heads = Heads {
        float: Dtype::F32,
        rows: rows as u32,
        query_heads: 1,
        kv_heads: 1,
        head_size: 8,
    };
    let cache = || Cache {
        capacity: 4,
        keys: keys.at(0),
        values: values.at(0),
    };
    let norms = HeadNorms {
        eps: 0.0,
        weight_offset: 0.0,
        queries: None,
        keys: None,
    };
    let nothing = Buffer::allocate(0, 0)?;
    let rotary = Rotary {
        dimensions: 0,
        frequencies: nothing.at(0),
        scaling: 1.0,
    };
    let positions = words(&positions)?;
    let at = positions.at(0);
    rotate(
        heads,
        &norms,
        &rotary,
        &at,
        &q.at(0),
        &k.at(0),
        &v.at(0),
        &cache(),
    )?;
    let first = show(take_faults(0)?);
    let written = values.read(0, values.length())?;
    let written = written
        .chunks(32)
        .map(|row| row.iter().any(|byte| *byte != 0));
    let written: Vec<bool> = written.collect();
    attend(
        heads,
        &cache(),
        &at,
        Visible::Causal,
        4,
        1.0,
        &q.at(0),
        &y.at(0),
    )?;
    let second = show(take_faults(0)?);
    let finite = y
        .read(0, y.length())?
        .chunks(4)
        .all(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]).is_finite());
    Ok(format!("{first} {written:?} {second} {finite}"))
}

fn faults_are_taken_once() -> Answer {
    let model = load()?;
    let table = Parameter {
        model: &model,
        tensor: 0,
    };
    let (ids, y) = (words(&[64])?, Buffer::allocate(0, 64)?);
    gather(&table, &ids.at(0), 1, &y.at(0))?;
    let faults = [take_faults(0)?, take_faults(0)?, take_faults(1)?];
    let none = Faults::empty();
    Ok(format!("{:?}", faults.map(|faults| faults == none)))
}

/// A cache that was never written, in memory that somebody has used before.
fn cache_reads_as_zeros() -> Answer {
    drop(Buffer::of(0, &[0x7f; 65536])?);
    let buffers = [(); 4].map(|()| Buffer::allocate(0, 8192));
    let [q, keys, values, y] = buffers;
    let (q, keys, values, y) = (q?, keys?, values?, y?);
    let heads = Heads {
        float: Dtype::F32,
        rows: 1,
        query_heads: 1,
        kv_heads: 1,
        head_size: 8,
    };
    let cache = Cache {
        capacity: 256,
        keys: keys.at(0),
        values: values.at(0),
    };
    let positions = words(&[255])?;
    let visible = Visible::Causal;
    attend(
        heads,
        &cache,
        &positions.at(0),
        visible,
        256,
        1.0,
        &q.at(0),
        &y.at(0),
    )?;
    let bytes = y.read(0, 8192)?;
    Ok(bytes.iter().all(|byte| *byte == 0).to_string())
}

/// What is too much for one call: all heads of many rows, over a long cache.
struct Long {
    heads: Heads,
    q: Buffer,
    keys: Buffer,
    values: Buffer,
    positions: Buffer,
    y: Buffer,
}

impl Long {
    const CAPACITY: u32 = 1 << 17;

    fn new(rows: u32, query_heads: u32) -> Result<Long, Error> {
        let heads = Heads {
            float: Dtype::F32,
            rows,
            query_heads,
            kv_heads: 1,
            head_size: 8,
        };
        let queries = u64::from(rows) * u64::from(query_heads) * 32;
        let cache = u64::from(Long::CAPACITY) * 32;
        Ok(Long {
            heads,
            q: Buffer::allocate(0, queries)?,
            keys: Buffer::allocate(0, cache)?,
            values: Buffer::allocate(0, cache)?,
            positions: words(&vec![Long::CAPACITY - 1; rows as usize])?,
            y: Buffer::allocate(0, queries)?,
        })
    }

    fn attend(&self) -> Result<(), Error> {
        let cache = Cache {
            capacity: Long::CAPACITY,
            keys: self.keys.at(0),
            values: self.values.at(0),
        };
        let (positions, visible) = (self.positions.at(0), Visible::Causal);
        let (q, y) = (self.q.at(0), self.y.at(0));
        attend(
            self.heads,
            &cache,
            &positions,
            visible,
            Long::CAPACITY,
            1.0,
            &q,
            &y,
        )
    }
}

fn attend_without_end() -> Answer {
    let long = Long::new(1, 1)?;
    loop {
        long.attend()?;
        black_box(&long);
    }
}

fn attend_long() -> Answer {
    Long::new(4, 4096)?.attend()?;
    Ok("attended".into())
}

fn dense_long() -> Answer {
    let model = load()?;
    let weight = Parameter {
        model: &model,
        tensor: 0,
    };
    let rows = 1 << 18;
    let (x, y) = (
        Buffer::allocate(0, rows * 64)?,
        Buffer::allocate(0, rows * 128)?,
    );
    loop {
        dense(&weight, &x.at(0), rows as u32, None, &y.at(0))?;
        black_box(&y);
    }
}

fn norm_long() -> Answer {
    let elements: u64 = 1 << 22;
    let [x, y] = [(); 2].map(|()| Buffer::allocate(0, 4 * elements));
    let (x, y, weight) = (x?, y?, Buffer::allocate(0, 4)?);
    loop {
        let norm = Norm {
            float: Dtype::F32,
            rows: elements as u32,
            columns: 1,
            eps: 1.0,
            weight_offset: 0.0,
            weight: weight.at(0),
        };
        rms_norm(&norm, &x.at(0), None, &y.at(0))?;
        black_box(&y);
    }
}

/// Adds, norms and finds the largest, in the order of the calls and with nothing read in between.
fn honest() -> Answer {
    let numbers = |scale: f32| (0..8).flat_map(move |i| (i as f32 * scale).to_le_bytes());
    let bytes = |scale| numbers(scale).collect::<Vec<u8>>();
    let (x, more) = (Buffer::of(0, &bytes(1.0))?, Buffer::of(0, &bytes(-3.0))?);
    let weight = Buffer::of(
        0,
        &(0..8).flat_map(|_| 1f32.to_le_bytes()).collect::<Vec<u8>>(),
    )?;
    let [y, ids, values] = [(); 3].map(|()| Buffer::allocate(0, 32));
    let (y, ids, values) = (y?, ids?, values?);
    let norm = Norm {
        float: Dtype::F32,
        rows: 1,
        columns: 8,
        eps: 0.0,
        weight_offset: 0.0,
        weight: weight.at(0),
    };
    rms_norm(&norm, &x.at(0), Some(&more.at(0)), &y.at(0))?;
    top(Dtype::F32, 1, 8, 2, &y.at(0), &ids.at(0), &values.at(0))?;
    let ids = ids.read(0, 8)?;
    // The numbers are 0, -2, -4 and so on.
    Ok(format!("{} {}", ids[0], ids[4]))
}

fn say(count: u64, bytes: u64) -> Answer {
    for _ in 0..count {
        output(&"x".repeat(bytes as usize))?;
    }
    Ok("said".into())
}
