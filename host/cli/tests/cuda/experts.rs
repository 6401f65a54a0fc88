//! Layers of experts, and products with an expert for each row, with weights in a GPU's memory.

use cuda_stand_in::application::Application;
use tightfit::device::DeviceExpertsOperands;
use tightfit::kernels::half::{bf16, f16};
use tightfit::kernels::{Activation, Choices, FloatType};
use tightfit::model::{Model, TailAllocation};
use tightfit::plan::PlanOptions;
use tightfit::products::{
    Experts, ExpertsLinear, ExpertsNames, GateTensors, LinearError, WorkspaceOptions,
};

use super::memory::open;
use super::products::{Number, bytes, loaded, numbers, on_the_processor};
use super::{Driver, Kind, Kinds, MIB, nf4};

/// Layers for the fast kernels and for the others, also with matrices that begin between nested scales.
pub(super) const LAYERS: &[Kind] = &[
    (
        "fast.gate_up_proj",
        "BF16",
        2,
        &[5, 256, 320],
        nf4(64, true),
    ),
    ("fast.down_proj", "BF16", 2, &[5, 320, 128], nf4(128, false)),
    ("odd.gate_up_proj", "BF16", 2, &[3, 34, 45], nf4(64, true)),
    ("odd.down_proj", "BF16", 2, &[3, 45, 17], nf4(64, true)),
    ("apart.0.w1.weight", "BF16", 2, &[64, 64], nf4(64, true)),
    ("apart.0.w3.weight", "BF16", 2, &[64, 64], nf4(64, true)),
    ("apart.0.w2.weight", "BF16", 2, &[64, 64], nf4(64, true)),
    // Laid out as stacks.
    (
        "each.experts.0.w1.weight",
        "BF16",
        2,
        &[64, 128],
        nf4(64, false),
    ),
    (
        "each.experts.0.w2.weight",
        "BF16",
        2,
        &[128, 64],
        nf4(64, false),
    ),
    (
        "each.experts.0.w3.weight",
        "BF16",
        2,
        &[64, 128],
        nf4(64, false),
    ),
    (
        "each.experts.1.w1.weight",
        "BF16",
        2,
        &[64, 128],
        nf4(64, false),
    ),
    (
        "each.experts.1.w2.weight",
        "BF16",
        2,
        &[128, 64],
        nf4(64, false),
    ),
    (
        "each.experts.1.w3.weight",
        "BF16",
        2,
        &[64, 128],
        nf4(64, false),
    ),
    (
        "each.experts.2.w1.weight",
        "BF16",
        2,
        &[64, 128],
        nf4(64, false),
    ),
    (
        "each.experts.2.w2.weight",
        "BF16",
        2,
        &[128, 64],
        nf4(64, false),
    ),
    (
        "each.experts.2.w3.weight",
        "BF16",
        2,
        &[64, 128],
        nf4(64, false),
    ),
    // The same with a mean each, and nested scales that do not end at a multiple of 256 bytes.
    (
        "double.experts.0.w1.weight",
        "BF16",
        2,
        &[64, 256],
        nf4(64, true),
    ),
    (
        "double.experts.0.w2.weight",
        "BF16",
        2,
        &[256, 64],
        nf4(64, true),
    ),
    (
        "double.experts.0.w3.weight",
        "BF16",
        2,
        &[64, 256],
        nf4(64, true),
    ),
    (
        "double.experts.1.w1.weight",
        "BF16",
        2,
        &[64, 256],
        nf4(64, true),
    ),
    (
        "double.experts.1.w2.weight",
        "BF16",
        2,
        &[256, 64],
        nf4(64, true),
    ),
    (
        "double.experts.1.w3.weight",
        "BF16",
        2,
        &[64, 256],
        nf4(64, true),
    ),
    (
        "double.experts.2.w1.weight",
        "BF16",
        2,
        &[64, 256],
        nf4(64, true),
    ),
    (
        "double.experts.2.w2.weight",
        "BF16",
        2,
        &[256, 64],
        nf4(64, true),
    ),
    (
        "double.experts.2.w3.weight",
        "BF16",
        2,
        &[64, 256],
        nf4(64, true),
    ),
];

const KINDS: [(&str, Activation); 4] = [
    ("fast", Activation::Silu),
    ("odd", Activation::Clamped { limit: 0.5 }),
    ("each.experts", Activation::Gelu),
    ("double.experts", Activation::Silu),
];

/// Ids of experts, some of which there are not.
pub(super) fn ids(count: usize, experts: usize, seed: usize) -> Vec<i32> {
    let id = |i: usize| match (i * 7 + seed) % 11 {
        4 => -1,
        9 => experts as i32,
        number => ((number * 5 + i + seed) % experts) as i32,
    };
    (0..count).map(id).collect()
}

fn layer<T: Number>(layer: &Experts<'_>, tokens: usize, of_token: usize) -> Vec<T> {
    let ids = ids(tokens * of_token, layer.experts(), 1);
    let weights: Vec<f32> = numbers(tokens * of_token, 4);
    let choices = Choices {
        of_token,
        ids: &ids,
        weights: &weights,
    };
    let x: Vec<T> = numbers(tokens * layer.hidden(), 1);
    let gate_up_bias: Vec<T> = numbers(layer.experts() * 2 * layer.intermediate(), 2);
    let down_bias: Vec<T> = numbers(layer.experts() * layer.hidden(), 3);
    let mut y = vec![T::of(f32::NAN); x.len()];
    layer
        .forward(&x, &choices, Some(&gate_up_bias), Some(&down_bias), &mut y)
        .unwrap_or_else(|error| panic!("{error}"));
    y
}

fn linear<T: Number>(linear: &ExpertsLinear<'_>, rows: usize) -> Vec<T> {
    let ids = ids(rows, linear.experts(), 2);
    let x: Vec<T> = numbers(rows * linear.inputs(), 1);
    let bias: Vec<T> = numbers(linear.experts() * linear.outputs(), 2);
    // What is skipped stays.
    let mut y = vec![T::of(0.25); rows * linear.outputs()];
    linear
        .forward(&x, &ids, Some(&bias), &mut y)
        .unwrap_or_else(|error| panic!("{error}"));
    y
}

fn assert_near<T: Number>(need: &[T], have: &[T], what: &str) {
    assert_eq!(need.len(), have.len());
    let largest = need
        .iter()
        .fold(0.0, |most, y| f32::max(most, y.value().abs()));
    for (index, (need, have)) in need.iter().zip(have).enumerate() {
        assert!(
            (need.value() - have.value()).abs() <= 2.0 * T::APART * largest,
            "{what} of {}: result {index} is {}, should be {}",
            T::TYPE,
            have.value(),
            need.value()
        );
    }
}

fn compare<T: Number>(here: &Model, there: &Model, tokens: usize) {
    for (module, activation) in KINDS {
        let of = |model: &Model| {
            let experts = model.experts(module, activation).unwrap();
            layer::<T>(&experts, tokens, 3)
        };
        assert_near(&of(here), &of(there), &format!("{module}, {tokens} tokens"));
        let names = ExpertsNames::find(here, module, activation).unwrap();
        let mut stacks = vec![names.down];
        if let GateTensors::Together(both, _) = names.gates {
            stacks.push(both);
        }
        for stack in stacks {
            let of = |model: &Model| linear::<T>(&model.experts_linear(&stack).unwrap(), tokens);
            let what = format!("{stack:?}, {tokens} rows");
            assert_near(&of(here), &of(there), &what);
        }
    }
}

#[test]
fn a_gpus_experts_are_those_of_the_processor() {
    let kinds = Kinds::new(LAYERS);
    let here = on_the_processor(&kinds);
    let driver = Driver::start(1);
    let devices = open(&["cuda:0"]);
    let there = loaded(&kinds, &devices, &PlanOptions::default(), 0);
    for tokens in [0, 1, 2, 9, 40] {
        compare::<bf16>(&here, &there, tokens);
        compare::<f32>(&here, &there, tokens);
    }
    compare::<f16>(&here, &there, 9);
    let apart = |model: &Model| model.experts("apart", Activation::Silu).map(|_| ());
    assert!(apart(&here).is_ok());
    let error = apart(&there).unwrap_err();
    assert!(matches!(error, LinearError::NotStacked { .. }), "{error}");
    assert!(error.to_string().contains("'apart.0.w1.weight'"), "{error}");
    drop(there);
    assert_eq!(devices[0].usage().reserved.now, 0);
    drop(devices);
    driver.clean_report("experts");
}

/// Operands of the application's behind the weights.
pub(super) struct Placed<'m> {
    application: &'m Application,
    pub(super) layer: Experts<'m>,
    of_token: usize,
    pieces: Vec<TailAllocation>,
    workspace: (u64, u64),
}

impl<'m> Placed<'m> {
    pub(super) fn new(
        application: &'m Application,
        model: &'m Model,
        layer: Experts<'m>,
        [tokens, of_token]: [usize; 2],
        workspace: (u64, u64),
    ) -> Placed<'m> {
        let (experts, hidden) = (layer.experts(), layer.hidden());
        let lengths = [
            2 * tokens * hidden,
            4 * tokens * of_token,
            4 * tokens * of_token,
            2 * experts * 2 * layer.intermediate(),
            2 * experts * hidden,
            2 * tokens * hidden,
        ];
        let tail = model.tail(0).unwrap();
        let pieces = lengths.map(|bytes| tail.allocate(bytes as u64).unwrap());
        Placed {
            application,
            layer,
            of_token,
            pieces: pieces.into(),
            workspace,
        }
    }

    fn at(&self, index: usize) -> u64 {
        self.pieces[index].address().unwrap().pointer
    }

    /// Puts the operands of these tokens in place; `seed` is for x and the ids.
    pub(super) fn put(&self, first: usize, tokens: usize, seed: usize) {
        let (experts, hidden) = (self.layer.experts(), self.layer.hidden());
        let pairs = first * self.of_token..(first + tokens) * self.of_token;
        let of_x = first * hidden..(first + tokens) * hidden;
        let x: Vec<bf16> = numbers(of_x.end, seed as u64);
        let ids = &ids(pairs.end, experts, seed)[pairs.clone()];
        let weights: Vec<f32> = numbers(pairs.end, 4);
        let gate_up: Vec<bf16> = numbers(experts * 2 * self.layer.intermediate(), 2);
        let down: Vec<bf16> = numbers(experts * hidden, 3);
        let put = |index, bytes: &[u8]| self.application.put(self.at(index), bytes);
        put(0, &bytes(&x[of_x]));
        let ids: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        put(1, &ids);
        let weights = weights[pairs]
            .iter()
            .flat_map(|weight| weight.to_le_bytes());
        put(2, &weights.collect::<Vec<u8>>());
        put(3, &bytes(&gate_up));
        put(4, &bytes(&down));
        put(5, &vec![0xff; 2 * tokens * hidden]);
    }

    pub(super) fn operands(&self) -> DeviceExpertsOperands {
        let [x, ids, weights, gate_up, down, y] = [0, 1, 2, 3, 4, 5].map(|index| self.at(index));
        let stream = self.application.stream();
        DeviceExpertsOperands::new(x, ids, weights, y, stream)
            .with_biases(gate_up, down)
            .with_workspace(self.workspace.0, self.workspace.1)
    }

    pub(super) fn give(
        &self,
        tokens: usize,
        operands: &DeviceExpertsOperands,
    ) -> Result<(), LinearError> {
        // SAFETY: pointers to memory of the device that `self` and the caller keep, as long as needed, in a
        // stream that is waited for before they go.
        unsafe {
            self.layer
                .forward_on_device(FloatType::Bf16, tokens, self.of_token, operands)
        }
    }

    pub(super) fn y(&self, tokens: usize) -> Vec<u8> {
        let len = 2 * tokens * self.layer.hidden();
        self.application.get(self.at(5), len)
    }

    /// What the operands give that were put there, copied through host memory.
    pub(super) fn expected(&self, tokens: usize, seed: usize) -> Vec<u8> {
        let (experts, hidden) = (self.layer.experts(), self.layer.hidden());
        let ids = ids(tokens * self.of_token, experts, seed);
        let weights: Vec<f32> = numbers(ids.len(), 4);
        let choices = Choices {
            of_token: self.of_token,
            ids: &ids,
            weights: &weights,
        };
        let x: Vec<bf16> = numbers(tokens * hidden, seed as u64);
        let gate_up: Vec<bf16> = numbers(experts * 2 * self.layer.intermediate(), 2);
        let down: Vec<bf16> = numbers(experts * hidden, 3);
        let mut y = vec![bf16::ZERO; x.len()];
        self.layer
            .forward(&x, &choices, Some(&gate_up), Some(&down), &mut y)
            .unwrap_or_else(|error| panic!("{error}"));
        bytes(&y)
    }
}

#[test]
fn layers_are_given_to_a_stream_within_what_was_planned() {
    let kinds = Kinds::new(LAYERS);
    let driver = Driver::start(1);
    let devices = open(&["cuda:0"]);
    let options = PlanOptions::default()
        .with_rows(40)
        .with_experts_per_token(3)
        .with_reserved_headroom(true);
    let model = loaded(&kinds, &devices, &options, MIB);
    let planned = model.plan().devices[0].clone();
    let application = Application::start(0);
    let wanted = WorkspaceOptions::rows(40).with_experts_per_token(3);
    let workspace = model.product_workspace(0, &wanted).unwrap();
    assert!(workspace.bytes() <= planned.products);
    let at = workspace.address().unwrap().pointer;
    let usage = devices[0].usage().reserved;
    assert_eq!(
        (usage.now, usage.peak),
        (planned.size.reserved, planned.size.reserved)
    );
    for (module, activation) in KINDS {
        let layer = model.experts(module, activation).unwrap();
        let place = (at, workspace.bytes());
        let placed = Placed::new(&application, &model, layer.clone(), [40, 3], place);
        let row = 2 * layer.hidden();
        let compute = |first, tokens, workspace_bytes| {
            placed.put(first, tokens, 1);
            let operands = placed.operands().with_workspace(at, workspace_bytes);
            placed
                .give(tokens, &operands)
                .unwrap_or_else(|error| panic!("{error}"));
            application.synchronize();
            placed.y(tokens)
        };
        let all = compute(0, 40, workspace.bytes());
        assert_eq!(devices[0].usage().reserved.now, planned.size.reserved);
        assert!(all == placed.expected(40, 1), "{module}");
        for (first, tokens) in [(0, 1), (39, 1), (3, 8), (20, 17)] {
            // Of no more tokens no more is needed, and others do not change a bit.
            let need = layer.workspace_bytes(tokens, 3, FloatType::Bf16);
            assert!(need <= layer.workspace_bytes(40, 3, FloatType::Bf16));
            let some = compute(first, tokens, need);
            assert!(
                some == all[first * row..][..tokens * row],
                "{module}, {tokens} from {first}"
            );
        }
        // What cannot be is refused before anything is launched.
        let good = placed.operands();
        let need = layer.workspace_bytes(40, 3, FloatType::Bf16);
        for (bad, named) in [
            (good.with_workspace(at, need - 1), "the workspace"),
            (good.with_workspace(0, need), "the workspace"),
            (good.with_biases(1, 0), "the bias of gate and up"),
            (good.with_biases(0, 1), "the bias of down"),
        ] {
            let error = placed.give(40, &bad).unwrap_err().to_string();
            assert!(
                error.starts_with(named) && error.contains(module),
                "{error}"
            );
        }
        let nowhere = |x, ids, weights, y| {
            let operands = DeviceExpertsOperands::new(x, ids, weights, y, application.stream());
            placed
                .give(40, &operands.with_workspace(at, need))
                .unwrap_err()
                .to_string()
        };
        assert!(nowhere(0, 256, 256, 256).starts_with("x "));
        assert!(nowhere(256, 2, 256, 256).starts_with("the ids"));
        assert!(nowhere(256, 256, 0, 256).starts_with("the weights of the ids"));
        assert!(nowhere(256, 256, 256, 1).starts_with("y "));
    }
    drop(workspace);
    drop(model);
    assert_eq!(devices[0].usage().reserved.now, 0);
    drop((application, devices));
    driver.clean_report("experts in a stream");
}

#[test]
fn after_it_is_lent_a_layer_only_launches() {
    let Some(stand_in) = super::stand_in("the calls that are made", &super::Setup::default())
    else {
        return;
    };
    let kinds = Kinds::new(LAYERS);
    let devices = open(&["cuda:0"]);
    let options = PlanOptions::default()
        .with_rows(40)
        .with_reserved_headroom(true);
    let model = loaded(&kinds, &devices, &options, MIB);
    let application = Application::start(0);
    let wanted = WorkspaceOptions::rows(40).with_experts_per_token(3);
    let workspace = model.product_workspace(0, &wanted).unwrap();
    let place = (workspace.address().unwrap().pointer, workspace.bytes());
    for (module, activation) in KINDS {
        let layer = model.experts(module, activation).unwrap();
        let placed = Placed::new(&application, &model, layer, [40, 3], place);
        for (tokens, launches) in [(40, 4), (1, 3)] {
            placed.put(0, tokens, 1);
            let before = stand_in.report().calls.len();
            placed.give(tokens, &placed.operands()).unwrap();
            let calls = stand_in.report().calls.split_off(before);
            let launched = calls.iter().filter(|call| *call == "cuLaunchKernelEx");
            assert_eq!(launched.count(), launches, "{module}");
            let allowed = [
                "cuCtxGetCurrent",
                "cuCtxPushCurrent",
                "cuLaunchKernelEx",
                "cuCtxPopCurrent",
            ];
            assert!(
                calls.iter().all(|call| allowed.contains(&&call[..])),
                "{calls:?}"
            );
            application.synchronize();
        }
    }
    let modules = stand_in.report().calls;
    let modules = modules.iter().filter(|call| *call == "cuModuleLoadData");
    assert_eq!(modules.count(), 2);
    drop((workspace, model, application, devices));
    stand_in.report().is_clean("launches of experts");
}
