//! The kernels for experts as functions, and layers that they compute.

use tightfit_kernels::cuda::{
    self,
    experts::{ExpertsLaunch, ExpertsLayer, ExpertsLayerLaunches, Routing},
    linear::{COUNTERS, Gpu},
};
use tightfit_kernels::{DYNAMIC_MAP, FloatType};

use crate::device::{Argument, Device};
use crate::layers::{Dice, Layer, Stack, assert_near};
use crate::linear::{UNWRITTEN, buffer, number};
use crate::values::{cast, elements, floats, to_bytes};

/// A layer with what it is given on the device.
pub(crate) struct Case {
    pub(crate) layer: Layer,
    pub(crate) float: FloatType,
    pub(crate) choices: usize,
    pub(crate) x: Vec<u8>,
    pub(crate) ids: Vec<i32>,
    pub(crate) weights: Vec<f32>,
    pub(crate) biased: bool,
    pub(crate) aligned: bool,
    pub(crate) multiprocessors: u32,
    /// Whether the kernels for compute capability 7.5 shall do it.
    pub(crate) old: bool,
}

/// What is on the device between launches. Nothing but the counters is cleared, ever.
#[derive(Default)]
pub(crate) struct Memory {
    routing: Vec<u8>,
    workspace: Vec<u8>,
}

impl Memory {
    pub(crate) fn grow(&mut self, routing_bytes: usize, workspace_bytes: usize) {
        if self.workspace.is_empty() {
            self.workspace.resize(COUNTERS, 0);
        }
        let routing = routing_bytes.max(self.routing.len());
        self.routing.resize(routing, 0xff);
        let workspace = workspace_bytes.max(self.workspace.len());
        self.workspace.resize(workspace, 0xff);
    }

    pub(crate) fn check(&self, what: &str) {
        assert!(
            self.workspace[..COUNTERS].iter().all(|byte| *byte == 0),
            "{what}: the counters are not zero again"
        );
    }
}

pub(crate) fn values_of(bytes: &[u8], float: FloatType) -> Vec<f32> {
    floats(&cast(bytes, float, FloatType::F32))
}

fn ids_to_bytes(ids: &[i32]) -> Vec<u8> {
    ids.iter().flat_map(|id| id.to_le_bytes()).collect()
}

/// One product's launch.
pub(crate) struct Product<'a> {
    pub(crate) launch: ExpertsLaunch,
    pub(crate) stack: &'a Stack,
    pub(crate) float: FloatType,
    pub(crate) aligned: bool,
    pub(crate) routing: Routing,
    pub(crate) pairs_of_row: usize,
    pub(crate) x: &'a [u8],
    pub(crate) ids: &'a [i32],
}

impl Product<'_> {
    /// Writes y, with elements of `y_element` bytes. What is only read is copied first.
    pub(crate) fn run(
        &self,
        device: &mut dyn Device,
        y: &mut [u8],
        y_element: usize,
        memory: &mut Memory,
    ) {
        let Product {
            launch,
            stack,
            float,
            aligned,
            routing,
            pairs_of_row,
            x,
            ids,
        } = *self;
        let mut codes = stack.codes.clone();
        let mut absmax = to_bytes(&stack.absmax);
        let mut nested_codes = match &stack.nested {
            Some((codes, _)) => codes.clone(),
            None => vec![],
        };
        let (offset, nested) = stack.means_and_nested();
        let (mut offset, mut nested) = (to_bytes(&offset), to_bytes(&nested));
        let mut map = to_bytes(&DYNAMIC_MAP);
        let mut x = x.to_vec();
        let mut bias = stack.bias.as_ref().map(|bias| elements(bias, float));
        let mut ids = ids_to_bytes(ids);
        let size = float.bytes();
        let mut arguments = vec![buffer(&mut codes, aligned, 1)];
        if stack.nested.is_some() {
            arguments.extend([
                buffer(&mut nested_codes, aligned, 1),
                buffer(&mut nested, aligned, 4),
                buffer(&mut offset, aligned, 4),
                buffer(&mut map, aligned, 4),
            ]);
        } else {
            arguments.extend([
                buffer(&mut absmax, aligned, 4),
                number(0),
                number(0),
                number(0),
            ]);
        }
        arguments.push(buffer(&mut x, aligned, size));
        arguments.push(match &mut bias {
            Some(bias) => buffer(bias, aligned, size),
            None => number(0),
        });
        arguments.push(buffer(y, aligned, y_element));
        arguments.push(match routing.bytes() {
            0 => buffer(&mut ids, true, 4),
            bytes => buffer(&mut memory.routing[..bytes], true, 1),
        });
        arguments.push(match launch.workspace_bytes {
            0 => number(0),
            bytes => buffer(&mut memory.workspace[..bytes], true, 1),
        });
        arguments.extend([
            number(routing.tokens * routing.choices),
            number(pairs_of_row),
            number(stack.experts),
            number(stack.outputs),
            number(stack.inputs),
            number(stack.format.block_size),
            Argument::Number(cuda::quant_type_argument(stack.format.quant_type).into()),
            Argument::Number(launch.form.into()),
            Argument::Number(launch.limit.to_bits().into()),
        ]);
        device.launch_experts(launch, &mut arguments);
    }
}

pub(crate) fn route(
    device: &mut dyn Device,
    launch: Option<ExpertsLaunch>,
    routing: Routing,
    ids: &[i32],
    memory: &mut Memory,
) {
    let Some(launch) = launch else { return };
    let mut ids = ids_to_bytes(ids);
    device.launch_experts(
        launch,
        &mut [
            buffer(&mut ids, true, 4),
            buffer(&mut memory.routing[..routing.bytes()], true, 1),
            number(routing.tokens * routing.choices),
            number(routing.experts),
            number(routing.tile_rows()),
        ],
    );
}

impl Case {
    pub(crate) fn random(
        layer: Layer,
        float: FloatType,
        [tokens, choices]: [usize; 2],
        biased: bool,
        dice: &mut Dice,
    ) -> Case {
        let (experts, hidden) = (layer.gate_up.experts, layer.gate_up.inputs);
        let mut case = Case {
            float,
            choices,
            x: elements(&dice.weights(tokens * hidden, 1.0), float),
            ids: dice.ids(tokens * choices, experts),
            weights: dice.weights(tokens * choices, 1.0),
            layer,
            biased,
            aligned: true,
            multiprocessors: 2,
            old: false,
        };
        if biased {
            for stack in [&mut case.layer.gate_up, &mut case.layer.down] {
                let bias = elements(&dice.weights(stack.experts * stack.outputs, 1.0), float);
                stack.bias = Some(values_of(&bias, float));
            }
        }
        case
    }

    fn routing(&self, tokens: usize) -> Routing {
        Routing {
            tokens,
            choices: self.choices,
            experts: self.layer.gate_up.experts,
        }
    }

    pub(crate) fn launches(&self, device: &dyn Device, tokens: usize) -> ExpertsLayerLaunches {
        let capability = device.compute_capability();
        let layer = ExpertsLayer {
            routing: self.routing(tokens),
            float: self.float,
            hidden: self.layer.gate_up.inputs,
            intermediate: self.layer.down.inputs,
            block_size: self.layer.gate_up.format.block_size(),
            layout: self.layer.layout,
            activation: self.layer.activation,
            apart: self.layer.gate_up.apart > 0,
            aligned: self.aligned,
        };
        let launches = layer.launches(Gpu {
            compute_capability: if self.old { (7, 5) } else { capability },
            multiprocessors: self.multiprocessors,
        });
        launches.expect("not too much")
    }

    /// y, by these launches.
    pub(crate) fn run(
        &self,
        device: &mut dyn Device,
        launches: &ExpertsLayerLaunches,
        x: &[u8],
        ids: &[i32],
        weights: &[f32],
        memory: &mut Memory,
    ) -> Vec<u8> {
        let (hidden, intermediate) = (self.layer.gate_up.inputs, self.layer.down.inputs);
        let size = self.float.bytes();
        let routing = self.routing(ids.len() / self.choices);
        memory.grow(launches.routing_bytes, launches.workspace_bytes);
        route(device, launches.route, routing, ids, memory);
        let mut between = vec![UNWRITTEN; ids.len() * intermediate * size];
        let first = Product {
            launch: launches.gate_up,
            stack: &self.layer.gate_up,
            float: self.float,
            aligned: self.aligned,
            routing,
            pairs_of_row: self.choices,
            x,
            ids,
        };
        first.run(device, &mut between, size, memory);
        let mut parts = vec![UNWRITTEN; ids.len() * hidden * 4];
        let second = Product {
            launch: launches.down,
            stack: &self.layer.down,
            pairs_of_row: 1,
            x: &between,
            ..first
        };
        second.run(device, &mut parts, 4, memory);
        let valid = |id: &i32| (0..routing.experts as i32).contains(id);
        for (pair, id) in ids.iter().enumerate() {
            let of_pair = &between[pair * intermediate * size..][..intermediate * size];
            let unwritten = of_pair.iter().all(|byte| *byte == UNWRITTEN);
            assert!(valid(id) || unwritten, "pair {pair} is skipped");
        }
        let mut y = vec![UNWRITTEN; x.len()];
        device.launch_experts(
            launches.combine,
            &mut [
                buffer(&mut parts, true, 4),
                buffer(&mut ids_to_bytes(ids), true, 4),
                buffer(&mut to_bytes(weights), true, 4),
                buffer(&mut y, self.aligned, size),
                number(routing.tokens),
                number(routing.choices),
                number(routing.experts),
                number(hidden),
            ],
        );
        y
    }

    pub(crate) fn what(&self) -> String {
        let Case {
            layer,
            float,
            choices,
            biased,
            aligned,
            old,
            ..
        } = self;
        let gate_up = &layer.gate_up;
        format!(
            "{float}, [{}, {}, {}], {} of {choices} choices, {:?}, {:?}, {:?}, biased {biased}, \
             aligned {aligned}, old {old}",
            gate_up.experts,
            gate_up.inputs,
            layer.down.inputs,
            self.ids.len(),
            layer.layout,
            layer.activation,
            gate_up.format
        )
    }

    pub(crate) fn check(&self, device: &mut dyn Device, memory: &mut Memory) {
        let launches = self.launches(device, self.ids.len() / self.choices);
        let y = self.run(device, &launches, &self.x, &self.ids, &self.weights, memory);
        memory.check(&self.what());
        self.compare(&y, &self.ids);
    }

    pub(crate) fn compare(&self, y: &[u8], ids: &[i32]) {
        let x = values_of(&self.x, self.float);
        let need = self.layer.expected(self.float, &x, ids, &self.weights);
        assert_near(&values_of(y, self.float), &need, self.float, &self.what());
    }
}
