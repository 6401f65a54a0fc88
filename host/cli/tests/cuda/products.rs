//! Products with weights in a GPU's memory: right, without allocating or waiting, and in the memory that was
//! planned.

use cuda_stand_in::application::Application;
use tightfit::device::{Device, DeviceOperands, HostDevice};
use tightfit::kernels::half::{bf16, f16};
use tightfit::kernels::{Float, FloatType};
use tightfit::load::load;
use tightfit::model::{Model, TailAllocation};
use tightfit::plan::{Plan, PlanOptions};
use tightfit::products::{Linear, LinearError, LinearOptions};
use tightfit::types::Format;

use tempfile::TempDir;
use tightfit::kernels::Activation;
use tightfit_tests::golden::{GoldenModel, MOE_MODELS};
use tightfit_tests::loading::load_with_auto;
use tightfit_tests::reference::{Config, Reference};

use super::memory::open;
use super::{Driver, Kind, Kinds, MIB, QuantizeOn, in_small_pieces, nf4};

/// Weights of which products are made in every way.
const WEIGHTS: &[Kind] = &[
    ("plain", "BF16", 2, &[130, 320], nf4(64, false)),
    ("split among blocks", "BF16", 2, &[40, 2048], nf4(64, true)),
    ("double", "F16", 2, &[72, 192], nf4(128, true)),
    ("small blocks", "F32", 4, &[33, 96], nf4(32, true)),
    ("odd", "BF16", 2, &[17, 45], nf4(64, false)),
    ("experts", "BF16", 2, &[2, 128, 128], nf4(64, true)),
    ("no weight", "BF16", 2, &[40, 64], Format::Stored),
];

/// Loads onto one device.
pub(super) fn loaded(
    kinds: &Kinds,
    device: &[Box<dyn Device>],
    options: &PlanOptions,
    headroom: u64,
) -> Model {
    let infos: Vec<_> = device.iter().map(|device| device.info()).collect();
    let tensors = kinds.checkpoint.tensors();
    let placements = kinds.plan(device).tensors;
    let placements: Vec<_> = placements.iter().map(|tensor| tensor.placement).collect();
    let plan = Plan::new_with(tensors, &[], &infos, &placements, &[headroom], options);
    let plan = plan.unwrap_or_else(|error| panic!("{error}"));
    let options = in_small_pieces(QuantizeOn::Cpu, 1);
    load(&kinds.checkpoint, &plan, device, &options).unwrap_or_else(|error| panic!("{error}"))
}

pub(super) fn on_the_processor(kinds: &Kinds) -> Model {
    let devices: [Box<dyn Device>; 1] = [Box::new(HostDevice::cpu(None))];
    loaded(kinds, &devices, &PlanOptions::default(), 0)
}

/// Every product there is in a model.
fn products(model: &Model) -> Vec<Linear<'_>> {
    let mut all = Vec::new();
    for tensor in model
        .tensors()
        .filter(|tensor| tensor.quantization().is_some())
    {
        match *tensor.shape() {
            [matrices, _, _] => {
                let of = |index| model.linear_of(tensor.name(), index).unwrap();
                all.extend((0..matrices).map(of));
            }
            _ => all.push(model.linear(tensor.name()).unwrap()),
        }
    }
    all
}

/// Numbers between -1 and 1.
pub(super) fn numbers<T: Number>(count: usize, seed: u64) -> Vec<T> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = |_| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
        T::of(((state >> 33) as f32) / (1u64 << 30) as f32 - 1.0)
    };
    (0..count).map(next).collect()
}

pub(super) trait Number: Float {
    /// How far results may be apart, as a part of the largest.
    const APART: f32;
    fn of(value: f32) -> Self;
    fn value(self) -> f32;
}

impl Number for f32 {
    const APART: f32 = 1e-5;
    fn of(value: f32) -> f32 {
        value
    }
    fn value(self) -> f32 {
        self
    }
}

impl Number for f16 {
    const APART: f32 = 1.0 / 1024.0;
    fn of(value: f32) -> f16 {
        f16::from_f32(value)
    }
    fn value(self) -> f32 {
        self.to_f32()
    }
}

impl Number for bf16 {
    const APART: f32 = 1.0 / 128.0;
    fn of(value: f32) -> bf16 {
        bf16::from_f32(value)
    }
    fn value(self) -> f32 {
        self.to_f32()
    }
}

/// The product of operands that are copied to wherever the weight is.
fn product<T: Number>(linear: &Linear<'_>, rows: usize, by_row: bool) -> Vec<T> {
    let mut y = vec![T::of(f32::NAN); rows * linear.outputs()];
    let x: Vec<T> = numbers(rows * linear.inputs(), 1);
    let bias: Vec<T> = numbers(linear.outputs(), 2);
    let options = LinearOptions::default().with_by_row(by_row);
    linear
        .forward_with(&x, rows, Some(&bias), &mut y, &options)
        .unwrap_or_else(|error| panic!("{error}"));
    y
}

fn compare<T: Number>(here: &Linear<'_>, there: &Linear<'_>, rows: usize) {
    let (need, have) = (
        product::<T>(here, rows, false),
        product::<T>(there, rows, false),
    );
    let largest = need
        .iter()
        .fold(0.0, |most, y| f32::max(most, y.value().abs()));
    for (index, (need, have)) in need.iter().zip(&have).enumerate() {
        assert!(
            (need.value() - have.value()).abs() <= T::APART * largest,
            "{there:?} of {}, {rows} rows: result {index} is {}, should be {}",
            T::TYPE,
            have.value(),
            need.value()
        );
    }
}

#[test]
fn a_gpus_products_are_those_of_the_processor() {
    let kinds = Kinds::new(WEIGHTS);
    let here = on_the_processor(&kinds);
    let driver = Driver::start(1);
    let devices = open(&["cuda:0"]);
    let there = loaded(&kinds, &devices, &PlanOptions::default(), 0);
    for (here, there) in products(&here).iter().zip(&products(&there)) {
        assert!(there.is_on_gpu() && !here.is_on_gpu());
        for rows in [0, 1, 9, 70] {
            compare::<bf16>(here, there, rows);
            compare::<f32>(here, there, rows);
        }
        compare::<f16>(here, there, 20);
    }
    drop(there);
    assert_eq!(devices[0].usage().reserved.now, 0);
    drop(devices);
    driver.clean_report("products");
}

pub(super) fn bytes(values: &[bf16]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

/// A model with operands of the application's behind the weights.
struct Placed<'m> {
    application: &'m Application,
    linear: Linear<'m>,
    x: TailAllocation,
    y: TailAllocation,
    bias: TailAllocation,
    rows: usize,
}

impl<'m> Placed<'m> {
    fn new(
        application: &'m Application,
        model: &'m Model,
        linear: Linear<'m>,
        rows: usize,
    ) -> Self {
        let allocate = |elements: usize| {
            let tail = model.tail(0).unwrap();
            tail.allocate(2 * elements as u64 + 2).unwrap()
        };
        Placed {
            application,
            x: allocate(rows * linear.inputs()),
            y: allocate(rows * linear.outputs()),
            bias: allocate(linear.outputs()),
            linear,
            rows,
        }
    }

    fn operands(&self) -> DeviceOperands {
        let at = |piece: &TailAllocation| piece.address().unwrap().pointer;
        DeviceOperands::new(at(&self.x), at(&self.y), self.application.stream())
            .with_bias(at(&self.bias))
    }

    /// The product of rows of bf16, from one on.
    fn product(
        &self,
        first: usize,
        rows: usize,
        operands: DeviceOperands,
        by_row: bool,
    ) -> Vec<bf16> {
        let linear = &self.linear;
        let x: Vec<bf16> = numbers(self.rows * linear.inputs(), 1);
        let x = &x[first * linear.inputs()..][..rows * linear.inputs()];
        self.application.put(operands.x, &bytes(x));
        let bias: Vec<bf16> = numbers(linear.outputs(), 2);
        self.application.put(operands.bias, &bytes(&bias));
        let len = 2 * rows * linear.outputs();
        self.application.put(operands.y, &vec![0xff; len]);
        self.give(rows, &operands, by_row).unwrap();
        self.application.synchronize();
        let y = self.application.get(operands.y, len);
        let (y, _) = y.as_chunks::<2>();
        y.iter().copied().map(bf16::from_le_bytes).collect()
    }

    fn give(
        &self,
        rows: usize,
        operands: &DeviceOperands,
        by_row: bool,
    ) -> Result<(), LinearError> {
        // SAFETY: pointers to memory of the device that `self` and the caller keep, as long as needed, in a
        // stream that is waited for before they go.
        unsafe {
            self.linear
                .forward_on_device(FloatType::Bf16, rows, operands, by_row)
        }
    }
}

#[test]
fn products_are_given_to_a_stream_of_the_applications() {
    let kinds = Kinds::new(WEIGHTS);
    let driver = Driver::start(1);
    let devices = open(&["cuda:0"]);
    let options = PlanOptions::default()
        .with_rows(70)
        .with_reserved_headroom(true);
    let model = loaded(&kinds, &devices, &options, 2 * MIB);
    let planned = model.plan().devices[0].clone();
    let application = Application::start(0);
    let workspace = model.linear_workspace(0, 70).unwrap();
    let at = workspace.address().unwrap().pointer;
    assert!(workspace.bytes() <= planned.products && at.is_multiple_of(256));
    for linear in products(&model) {
        let name = linear.tensor().name();
        for by_row in [false, true] {
            let placed = Placed::new(&application, &model, linear.clone(), 70);
            let operands = placed.operands().with_workspace(at, workspace.bytes());
            let all = placed.product(0, 70, operands, by_row);
            // The same as where operands are copied, to the bit.
            assert!(
                all == product::<bf16>(&linear, 70, by_row),
                "{name}, {by_row}"
            );
            // With another number of rows, and with a workspace of no more than these need.
            for (first, rows) in [(0, 1), (69, 1), (3, 8), (30, 33)] {
                let need = linear.workspace_bytes(rows, FloatType::Bf16, by_row);
                assert!(need <= linear.workspace_bytes(70, FloatType::Bf16, by_row));
                let operands = operands.with_workspace(at, need);
                let some = placed.product(first, rows, operands, by_row);
                if by_row {
                    let same = &all[first * linear.outputs()..][..rows * linear.outputs()];
                    assert!(some == same, "{name}: {rows} rows from {first}");
                }
            }
        }
    }
    // Copied operands were beside the plan, and nothing else was.
    drop(workspace);
    assert_eq!(devices[0].usage().reserved.now, planned.size.reserved);
    drop(model);
    assert_eq!(devices[0].usage().reserved.now, 0);
    drop((application, devices));
    driver.clean_report("streams");
}

#[test]
fn after_it_is_lent_a_product_only_launches() {
    let Some(stand_in) = super::stand_in("the calls that are made", &super::Setup::default())
    else {
        return;
    };
    let kinds = Kinds::new(WEIGHTS);
    let devices = open(&["cuda:0"]);
    let options = PlanOptions::default()
        .with_rows(200)
        .with_reserved_headroom(true);
    let model = loaded(&kinds, &devices, &options, MIB);
    let reserved = model.plan().devices[0].size.reserved;
    let application = Application::start(0);
    let workspace = model.linear_workspace(0, 200).unwrap();
    let at = workspace.address().unwrap().pointer;
    let linears = products(&model);
    // All of it within the plan: kernels, constants, workspace.
    let usage = devices[0].usage().reserved;
    assert_eq!((usage.now, usage.peak), (reserved, reserved));
    for linear in linears {
        let placed = Placed::new(&application, &model, linear, 200);
        let operands = placed.operands().with_workspace(at, workspace.bytes());
        for by_row in [false, true] {
            let before = stand_in.report().calls.len();
            placed.give(200, &operands, by_row).unwrap();
            let calls = stand_in.report().calls.split_off(before);
            // A map is made by the processor alone.
            let others = [
                "cuCtxGetCurrent",
                "cuCtxPushCurrent",
                "cuTensorMapEncodeTiled",
                "cuLaunchKernel",
                "cuLaunchKernelEx",
                "cuCtxPopCurrent",
            ];
            assert!(
                calls.iter().all(|call| others.contains(&&call[..])),
                "{calls:?}"
            );
            application.synchronize();
        }
    }
    let loaded = stand_in.report().calls;
    let modules = loaded.iter().filter(|call| *call == "cuModuleLoadData");
    assert_eq!(modules.count(), 1);
    drop((workspace, model, application, devices));
    stand_in.report().is_clean("launches");
}

#[test]
fn operands_that_cannot_be_are_refused_before_anything_is_launched() {
    let kinds = Kinds::new(WEIGHTS);
    let driver = Driver::start(1);
    let devices = open(&["cuda:0"]);
    let options = PlanOptions::default()
        .with_rows(16)
        .with_reserved_headroom(true);
    let model = loaded(&kinds, &devices, &options, MIB);
    let application = Application::start(0);
    let workspace = model.linear_workspace(0, 16).unwrap();
    let at = workspace.address().unwrap().pointer;
    let linear = model.linear("split among blocks").unwrap();
    let placed = Placed::new(&application, &model, linear.clone(), 16);
    let good = placed.operands().with_workspace(at, workspace.bytes());
    let need = linear.workspace_bytes(16, FloatType::Bf16, false);
    assert!(need > 16384 && linear.workspace_bytes(16, FloatType::F32, false) == 0);
    let mut bad = [good; 7];
    bad[0].x = 0;
    bad[1].x += 1;
    bad[2].y = 0;
    bad[3].bias += 1;
    bad[4].workspace = 0;
    bad[5].workspace += 128;
    bad[6].workspace_bytes = need - 1;
    let named = [
        "x ",
        "x ",
        "y ",
        "the bias",
        "the workspace",
        "the workspace",
        "the workspace",
    ];
    for (bad, named) in bad.iter().zip(named) {
        let error = placed.give(16, bad, false).unwrap_err().to_string();
        assert!(error.starts_with(named), "{error}");
        assert!(
            error.contains("'split among blocks'") && error.contains("need"),
            "{error}"
        );
    }
    // Of no rows there is nothing to be computed, wherever they are.
    let nowhere = DeviceOperands::new(0, 0, application.stream());
    placed.give(0, &nowhere, false).unwrap();
    // No matrix of a stack begins between scales of one nested scale.
    let error = model.linear_of("experts", 2).unwrap_err();
    assert!(
        matches!(error, LinearError::NoSuchMatrix { have: 2, .. }),
        "{error}"
    );
    assert!(matches!(
        model.linear("no weight"),
        Err(LinearError::NotFourBit { .. })
    ));
    drop((placed, linear, workspace));
    drop((model, application, devices));
    driver.clean_report("refused");
}

#[test]
fn a_matrix_between_nested_scales_is_multiplied_as_a_part_of_its_stack() {
    const STACKS: &[Kind] = &[
        ("general", "BF16", 2, &[3, 40, 96], nf4(64, true)),
        ("fast", "BF16", 2, &[3, 200, 192], nf4(64, true)),
    ];
    let kinds = Kinds::new(STACKS);
    let here = on_the_processor(&kinds);
    let driver = Driver::start(1);
    let devices = open(&["cuda:0"]);
    let there = loaded(&kinds, &devices, &PlanOptions::default(), 0);
    for (here, there) in products(&here).iter().zip(&products(&there)) {
        for rows in [0, 1, 3, 40] {
            compare::<bf16>(here, there, rows);
            compare::<f32>(here, there, rows);
        }
    }
    let linear = there.linear_of("fast", 1).unwrap();
    let mut dx = [0f32; 192];
    let error = linear.input_gradient(&[0.0; 200], 1, &mut dx).unwrap_err();
    let error = error.to_string();
    assert!(
        error.contains("nested scale") && error.contains("16384"),
        "{error}"
    );
    drop((there, devices));
    driver.clean_report("between");
}

#[test]
fn what_was_not_planned_is_in_the_ledger_and_goes_with_the_model() {
    let kinds = Kinds::new(WEIGHTS);
    let driver = Driver::start(1);
    let devices = open(&["cuda:0"]);
    // Headroom that is reserved for the application stays its own.
    let options = PlanOptions::default().with_reserved_headroom(true);
    let model = loaded(&kinds, &devices, &options, MIB);
    let reserved = || devices[0].usage().reserved.now;
    let planned = reserved();
    let granularity = devices[0].info().granularity;
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| drop(products(&model)));
        }
    });
    assert_eq!(reserved(), planned + granularity);
    assert_eq!(model.tail(0).unwrap().used().peak, 0);
    let workspace = model.linear_workspace(0, 8).unwrap();
    let more = workspace.bytes().next_multiple_of(granularity);
    assert_eq!(reserved(), planned + granularity + more);
    drop(model);
    // A workspace that is its own memory lives on.
    assert_eq!(reserved(), more);
    drop(workspace);
    assert_eq!(reserved(), 0);
    drop(devices);
    driver.clean_report("beside");
}

#[test]
fn golden_models_run_on_a_gpu() {
    let driver = Driver::start(1);
    for name in ["llama", "qwen3_moe", "qwen3_5_moe"] {
        let golden = GoldenModel::unpack(name);
        // Experts in stacks are computed as layers of experts, which they are not in the files.
        let stacked = TempDir::new().unwrap();
        let path = match MOE_MODELS.contains(&name) && name != "qwen3_moe" {
            true => {
                golden.write_with_fused_experts(stacked.path());
                stacked.path().to_owned()
            }
            false => golden.path("bf16"),
        };
        let config = Config::read(&golden.path("bf16/config.json"));
        for settings in [&[][..], &[("double-quant", "true"), ("rows", "8")]] {
            let logits = |device| {
                let model = load_with_auto(&path, &[device], settings);
                if path == stacked.path() {
                    let layer = model.experts("model.layers.1.mlp.experts", Activation::Silu);
                    assert_eq!(layer.unwrap().is_on_gpu(), device != "cpu");
                }
                Reference::new(&config, &model).logits(&[1, 5, 3]).data
            };
            let (here, there) = (logits("cpu"), logits("cuda:0"));
            for (here, there) in here.iter().zip(&there) {
                assert!(
                    (here - there).abs() <= 1e-4,
                    "{name}: {there}, should be {here}"
                );
            }
        }
    }
    driver.clean_report("golden models");
}

#[test]
fn a_weight_without_double_quantization_needs_nothing_beside_it() {
    const PLAIN: &[Kind] = &[("plain", "BF16", 2, &[130, 320], nf4(64, false))];
    let kinds = Kinds::new(PLAIN);
    let driver = Driver::start(1);
    let devices = open(&["cuda:0"]);
    let model = loaded(&kinds, &devices, &PlanOptions::default(), 0);
    let linear = model.linear("plain").unwrap();
    let usage = devices[0].usage().reserved;
    assert_eq!(
        (usage.now, usage.peak),
        (usage.now, model.plan().devices[0].size.reserved)
    );
    drop(linear);
    drop((model, devices));
    driver.clean_report("plain");
}
