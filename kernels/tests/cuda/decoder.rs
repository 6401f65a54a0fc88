//! What a decoder computes between its products, against f64.

use tightfit_kernels::cuda::decoder::{self as launches, DecoderLaunch};
use tightfit_kernels::cuda::linear::{COUNTERS, Gpu};
use tightfit_kernels::decoder::{Attention, Faults, RmsNorm, Rotation, RotationOperands};
use tightfit_kernels::{Activation, FloatType};

use crate::decoding::{self, Decoder};
use crate::device::{Argument, Device};
use crate::linear::{UNWRITTEN, buffer, number};
use crate::values::{floats, to_bytes};

/// A device as a decoder: with so many multiprocessors, which decide how work is dealt out, and matrices that are
/// only aligned where they have to be.
struct Launches<'a> {
    device: &'a mut dyn Device,
    multiprocessors: u32,
    aligned: bool,
    /// Never cleared: each launch leaves it as it needs it.
    workspace: Vec<u8>,
}

fn real(value: f32) -> Argument<'static> {
    Argument::Number(u64::from(value.to_bits()))
}

fn to_words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn words(bytes: &[u8]) -> Vec<u32> {
    let (words, _) = bytes.as_chunks::<4>();
    words.iter().map(|word| u32::from_le_bytes(*word)).collect()
}

fn optional<'a>(bytes: &'a mut Option<Vec<u8>>, aligned: bool, element: usize) -> Argument<'a> {
    match bytes {
        Some(bytes) => buffer(bytes, aligned, element),
        None => number(0),
    }
}

impl Launches<'_> {
    fn gpu(&self) -> Gpu {
        Gpu {
            compute_capability: self.device.compute_capability(),
            multiprocessors: self.multiprocessors,
        }
    }

    fn run(&mut self, launch: DecoderLaunch, arguments: &mut [Argument<'_>]) {
        self.device.launch_decoder(launch, arguments);
    }

    /// The workspace of a launch, which is taken out meanwhile.
    fn workspace(&mut self, launch: &DecoderLaunch) -> Vec<u8> {
        let mut workspace = std::mem::take(&mut self.workspace);
        if workspace.is_empty() {
            workspace.resize(COUNTERS, 0);
        }
        workspace.resize(workspace.len().max(launch.workspace_bytes), 0xff);
        workspace
    }

    fn give_back(&mut self, workspace: Vec<u8>) {
        assert!(
            workspace[..COUNTERS].iter().all(|byte| *byte == 0),
            "counters are not zero again"
        );
        self.workspace = workspace;
    }
}

impl Decoder for Launches<'_> {
    fn rms_norm(
        &mut self,
        norm: &RmsNorm,
        x: &mut [u8],
        add: Option<&[u8]>,
        weight: &[u8],
    ) -> Vec<u8> {
        let mut y = vec![UNWRITTEN; x.len()];
        if norm.rows == 0 {
            return y;
        }
        let (size, aligned) = (norm.float.bytes(), self.aligned);
        let (mut add, mut weight) = (add.map(<[u8]>::to_vec), weight.to_vec());
        let launch = launches::rms_norm(norm).expect("possible");
        self.run(
            launch,
            &mut [
                buffer(x, aligned, size),
                optional(&mut add, aligned, size),
                buffer(&mut weight, aligned, size),
                buffer(&mut y, aligned, size),
                number(norm.columns),
                real(norm.eps),
                real(norm.weight_offset),
            ],
        );
        y
    }

    fn gate(
        &mut self,
        float: FloatType,
        activation: Activation,
        gate: &[u8],
        up: &[u8],
    ) -> Vec<u8> {
        let (mut gate, mut up, mut y) = (gate.to_vec(), up.to_vec(), vec![UNWRITTEN; gate.len()]);
        let (size, aligned) = (float.bytes(), self.aligned);
        let elements = gate.len() / size;
        let activation = launches::activation_argument(activation).expect("known");
        self.run(
            launches::gate(float, elements).expect("possible"),
            &mut [
                buffer(&mut gate, aligned, size),
                buffer(&mut up, aligned, size),
                buffer(&mut y, aligned, size),
                number(elements),
                number(activation as usize),
            ],
        );
        y
    }

    fn add(&mut self, float: FloatType, x: &mut [u8], add: &[u8]) {
        let (size, aligned, mut add) = (float.bytes(), self.aligned, add.to_vec());
        let elements = x.len() / size;
        self.run(
            launches::add(float, elements).expect("possible"),
            &mut [
                buffer(x, aligned, size),
                buffer(&mut add, aligned, size),
                number(elements),
            ],
        );
    }

    fn gather(
        &mut self,
        float: FloatType,
        columns: usize,
        table: &[u8],
        ids: &[u32],
    ) -> (Vec<u8>, Faults) {
        let size = float.bytes();
        let rows = table.len().checked_div(columns * size).unwrap_or(7);
        let mut y = vec![UNWRITTEN; ids.len() * columns * size];
        let (mut table, mut faults) = (table.to_vec(), [0; 4]);
        let (count, mut ids) = (ids.len(), to_words(ids));
        let aligned = self.aligned;
        self.run(
            launches::gather(float, count, rows, columns).expect("possible"),
            &mut [
                buffer(&mut table, aligned, size),
                buffer(&mut ids, aligned, 4),
                buffer(&mut y, aligned, size),
                buffer(&mut faults, true, 4),
                number(count),
                number(rows),
                number(columns),
            ],
        );
        (y, Faults::from_bits(u32::from_le_bytes(faults)))
    }

    fn dense(
        &mut self,
        float: FloatType,
        lengths: [usize; 3],
        weights: &[u8],
        x: &[u8],
        bias: Option<&[u8]>,
    ) -> Vec<u8> {
        let (size, aligned, [rows, outputs, inputs]) = (float.bytes(), self.aligned, lengths);
        let mut y = vec![UNWRITTEN; rows * outputs * size];
        let (mut weights, mut x, mut bias) =
            (weights.to_vec(), x.to_vec(), bias.map(<[u8]>::to_vec));
        self.run(
            launches::dense(float, lengths).expect("possible"),
            &mut [
                buffer(&mut weights, aligned, size),
                buffer(&mut x, aligned, size),
                optional(&mut bias, aligned, size),
                buffer(&mut y, aligned, size),
                number(rows),
                number(outputs),
                number(inputs),
            ],
        );
        y
    }

    fn rotate(&mut self, rotation: &Rotation, operands: RotationOperands<'_>) -> Faults {
        let heads = &rotation.heads;
        let size = heads.float.bytes();
        let (mut keys, mut values) = (operands.keys.to_vec(), operands.values.to_vec());
        let mut query_norm = operands.query_norm.map(<[u8]>::to_vec);
        let mut key_norm = operands.key_norm.map(<[u8]>::to_vec);
        let mut positions = to_words(operands.positions);
        let (mut frequencies, mut faults) = (to_bytes(operands.frequencies), [0; 4]);
        self.run(
            launches::rotate(rotation).expect("possible"),
            &mut [
                buffer(operands.queries, true, size),
                buffer(&mut keys, true, size),
                buffer(&mut values, true, size),
                optional(&mut query_norm, true, size),
                optional(&mut key_norm, true, size),
                buffer(&mut positions, true, 4),
                buffer(&mut frequencies, true, 4),
                buffer(operands.key_cache, true, size),
                buffer(operands.value_cache, true, size),
                buffer(&mut faults, true, 4),
                number(heads.rows),
                number(heads.query_heads),
                number(heads.kv_heads),
                number(heads.head_size),
                number(rotation.rotary),
                number(rotation.capacity),
                real(rotation.scaling),
                real(rotation.norm_eps),
                real(rotation.norm_weight_offset),
            ],
        );
        Faults::from_bits(u32::from_le_bytes(faults))
    }

    fn attend(
        &mut self,
        attention: &Attention,
        queries: &[u8],
        [keys, values]: [&[u8]; 2],
        positions: &[u32],
    ) -> (Vec<u8>, Faults) {
        let heads = &attention.heads;
        let (size, mut y) = (heads.float.bytes(), vec![UNWRITTEN; queries.len()]);
        if heads.rows == 0 {
            return (y, Faults::NONE);
        }
        let (mut queries, mut keys, mut values) =
            (queries.to_vec(), keys.to_vec(), values.to_vec());
        let (mut positions, mut faults) = (to_words(positions), [0; 4]);
        let launch = launches::attend(attention, attention.capacity, self.gpu()).expect("possible");
        let [window, length] = launches::visible_arguments(attention.visible);
        let mut workspace = self.workspace(&launch);
        self.run(
            launch,
            &mut [
                buffer(&mut queries, true, size),
                buffer(&mut keys, true, size),
                buffer(&mut values, true, size),
                buffer(&mut positions, true, 4),
                buffer(&mut y, true, size),
                match launch.workspace_bytes {
                    0 => number(0),
                    bytes => buffer(&mut workspace[..bytes], true, 4),
                },
                buffer(&mut faults, true, 4),
                number(heads.rows),
                number(heads.query_heads),
                number(heads.kv_heads),
                number(heads.head_size),
                number(attention.capacity),
                number(window as usize),
                number(length as usize),
                number(launch.shares as usize),
                real(attention.scale),
            ],
        );
        self.give_back(workspace);
        (y, Faults::from_bits(u32::from_le_bytes(faults)))
    }

    fn top(&mut self, float: FloatType, lengths: [usize; 3], x: &[u8]) -> (Vec<u32>, Vec<f32>) {
        let [rows, columns, k] = lengths;
        let launch = launches::top(float, lengths, self.gpu()).expect("possible");
        let mut ids = vec![UNWRITTEN; rows * k * 4];
        let (mut values, mut x, aligned) = (ids.clone(), x.to_vec(), self.aligned);
        let mut workspace = self.workspace(&launch);
        self.run(
            launch,
            &mut [
                buffer(&mut x, aligned, float.bytes()),
                buffer(&mut ids, aligned, 4),
                buffer(&mut values, aligned, 4),
                match launch.workspace_bytes {
                    0 => number(0),
                    bytes => buffer(&mut workspace[..bytes], true, 8),
                },
                number(rows),
                number(columns),
                number(k),
                number(launch.shares as usize),
            ],
        );
        self.give_back(workspace);
        (words(&ids), floats(&values))
    }

    fn route(
        &mut self,
        float: FloatType,
        lengths: [usize; 3],
        normalize: bool,
        scores: &[u8],
    ) -> (Vec<i32>, Vec<f32>) {
        let [rows, experts, k] = lengths;
        let mut ids = vec![UNWRITTEN; rows * k * 4];
        let (mut weights, mut scores, aligned) = (ids.clone(), scores.to_vec(), self.aligned);
        self.run(
            launches::route(float, lengths).expect("possible"),
            &mut [
                buffer(&mut scores, aligned, float.bytes()),
                buffer(&mut ids, aligned, 4),
                buffer(&mut weights, aligned, 4),
                number(rows),
                number(experts),
                number(k),
                number(usize::from(normalize)),
            ],
        );
        let ids = words(&ids).into_iter().map(|id| id as i32).collect();
        (ids, floats(&weights))
    }
}

fn both_ways(device: &mut dyn Device, check: fn(&mut dyn Decoder)) {
    for (multiprocessors, aligned) in [(132, true), (3, false)] {
        check(&mut Launches {
            device,
            multiprocessors,
            aligned,
            workspace: vec![],
        });
    }
}

pub(crate) fn norms(device: &mut dyn Device) {
    both_ways(device, decoding::norms);
}

pub(crate) fn elementwise(device: &mut dyn Device) {
    both_ways(device, decoding::elementwise);
}

pub(crate) fn gathering(device: &mut dyn Device) {
    both_ways(device, decoding::gathering);
}

pub(crate) fn dense_products(device: &mut dyn Device) {
    both_ways(device, decoding::dense_products);
}

pub(crate) fn rotations(device: &mut dyn Device) {
    both_ways(device, decoding::rotations);
}

pub(crate) fn attentions(device: &mut dyn Device) {
    both_ways(device, decoding::attentions);
}

pub(crate) fn extreme_attentions(device: &mut dyn Device) {
    both_ways(device, decoding::extreme_attentions);
}

pub(crate) fn choices(device: &mut dyn Device) {
    both_ways(device, decoding::choices);
}

pub(crate) fn routes(device: &mut dyn Device) {
    both_ways(device, decoding::routes);
}
