//! What a decoder computes between its products, against f64.

use tightfit_kernels::cuda::decoder::{self, Call};
use tightfit_kernels::cuda::linear::{COUNTERS, Gpu};
use tightfit_kernels::decoder::{Faults, Operation};

use crate::decoding::{self, Decoder};
use crate::device::{Argument, Device};
use crate::linear::buffer;

/// A device as a decoder: with so many multiprocessors, which decide how work is dealt out, and matrices that are
/// only aligned where they have to be.
struct Launches<'a> {
    device: &'a mut dyn Device,
    multiprocessors: u32,
    aligned: bool,
    /// Never cleared: each launch leaves it as it needs it.
    workspace: Vec<u8>,
}

impl Decoder for Launches<'_> {
    fn run(&mut self, operation: &Operation, operands: &mut [Vec<u8>]) -> Faults {
        let gpu = Gpu {
            compute_capability: self.device.compute_capability(),
            multiprocessors: self.multiprocessors,
        };
        let Some(Call { launch, arguments }) = decoder::call(operation, gpu).expect("possible")
        else {
            return Faults::NONE;
        };
        self.workspace.resize(COUNTERS.max(self.workspace.len()), 0);
        let bytes = launch.workspace_bytes.max(self.workspace.len());
        self.workspace.resize(bytes, 0xff);
        let mut faults = [0; 4];
        {
            let shapes = operation.operands();
            let mut operands: Vec<Option<Argument<'_>>> = shapes
                .iter()
                .zip(operands)
                .map(|(shape, bytes)| {
                    assert_eq!(bytes.len(), shape.bytes(), "{}", shape.name);
                    let aligned = self.aligned || shape.align == 16;
                    Some(buffer(bytes, aligned, shape.size))
                })
                .collect();
            let mut workspace = Some(&mut self.workspace);
            let mut word = Some(&mut faults);
            let arguments = arguments.into_iter().map(|argument| match argument {
                decoder::Argument::Operand(i) => operands[i].take().expect("once"),
                decoder::Argument::Faults => buffer(word.take().expect("once"), true, 4),
                decoder::Argument::Workspace if launch.workspace_bytes > 0 => {
                    let workspace = workspace.take().expect("once");
                    buffer(&mut workspace[..launch.workspace_bytes], true, 8)
                }
                decoder::Argument::Workspace => Argument::Number(0),
                decoder::Argument::Number(number) => Argument::Number(number),
            });
            let mut arguments: Vec<Argument<'_>> = arguments.collect();
            self.device.launch_decoder(launch, &mut arguments);
        }
        let counters = &self.workspace[..COUNTERS];
        assert!(
            counters.iter().all(|byte| *byte == 0),
            "{operation:?}: counters are not zero"
        );
        let faults = Faults::from_bits(u32::from_le_bytes(faults));
        assert!(operation.may_find_faults() || !faults.any());
        faults
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

pub(crate) fn combinations(device: &mut dyn Device) {
    both_ways(device, decoding::combinations);
}
