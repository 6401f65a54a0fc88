//! The host's time for giving a product to a stream: what `forward_on_device` adds to the launch itself, in
//! one run.
//!
//! `cargo bench -p tightfit-cli --bench on_device` runs on the stand-in for NVIDIA's driver, whose own calls
//! are slow; with `TIGHTFIT_CUDA=real` on the first GPU. The launches beside it are of the same kernel with
//! the same arguments, with the context made current in the same way. Medians of calls that are interleaved.

use std::time::{Duration, Instant};

use cuda_stand_in::application::Application;
use cuda_stand_in::control::{Setup, StandIn};
use tightfit::checkpoint::Checkpoint;
use tightfit::device::{DeviceExpertsOperands, DeviceOperands, open_devices};
use tightfit::kernels::cuda::linear::{self, Linear};
use tightfit::kernels::{Activation, BlockSize, FloatType};
use tightfit::load::{LoadOptions, load};
use tightfit::plan::{PartKind, Plan, PlanOptions};
use tightfit::products::WorkspaceOptions;
use tightfit::types::{Format, Placement};
use tightfit_tests::models;

const ROWS: usize = 4;
const CHOICES: usize = 2;
/// Few: the stand-in's kernels are emulated.
const CALLS: usize = 300;

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_secs_f64() * 1e6
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let is_real = std::env::var_os("TIGHTFIT_CUDA").is_some_and(|value| value == "real");
    let _stand_in = (!is_real).then(|| StandIn::start(&Setup::default()));
    let directory = tempfile::tempdir()?;
    let bytes = |elements: usize| vec![0x3c; 2 * elements];
    let tensors = [
        ("linear", "BF16", &[128u64, 256][..], bytes(128 * 256)),
        ("l.gate_up_proj", "BF16", &[4, 128, 64], bytes(4 * 128 * 64)),
        ("l.down_proj", "BF16", &[4, 64, 64], bytes(4 * 64 * 64)),
    ];
    let tensors: Vec<_> = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| (*name, *dtype, *shape, &bytes[..]))
        .collect();
    models::write_safetensors(&directory.path().join("model.safetensors"), &tensors);
    let checkpoint = Checkpoint::open(directory.path())?;
    let devices = open_devices(&["cuda:0".parse()?])?;
    let infos: Vec<_> = devices.iter().map(|device| device.info()).collect();
    let placement = Placement {
        device: Some(0),
        format: Format::NF4,
    };
    let options = PlanOptions::default()
        .with_rows(ROWS as u64)
        .with_reserved_headroom(true);
    let placements = [placement; 3];
    let tensors = checkpoint.tensors();
    let plan = Plan::new_with(tensors, &[], &infos, &placements, &[1 << 20], &options)?;
    let model = load(&checkpoint, &plan, &devices, &LoadOptions::default())?;
    let product = model.linear("linear")?;
    let layer = model.experts("l", Activation::Silu)?;
    let wanted = WorkspaceOptions::rows(ROWS).with_experts_per_token(CHOICES);
    let workspace = model.product_workspace(0, &wanted)?;
    let at = workspace.address().map_or(0, |address| address.pointer);
    let tail = model.tail(0).ok_or("it has a tail")?;
    let pieces = [1024, 1024, 4096, 4096]
        .map(|bytes| tail.allocate(2 * bytes))
        .into_iter()
        .collect::<Result<Vec<_>, _>>()?;
    let address = |index: usize| pieces[index].address().map_or(0, |address| address.pointer);
    let application = Application::start(0);
    for (index, piece) in pieces.iter().enumerate() {
        application.put(address(index), &vec![0; piece.bytes() as usize]);
    }

    let gpu = application.gpu();
    let launch = Linear {
        float: FloatType::Bf16,
        rows: ROWS,
        outputs: product.outputs(),
        inputs: product.inputs(),
        block_size: BlockSize::DEFAULT,
        aligned: true,
        by_row: false,
    }
    .launch(gpu)?;
    let image = linear::module(gpu.compute_capability)?;
    let name = std::ffi::CString::new(launch.kernel)?;
    let kernel = application.kernel(&image, &name, launch.shared_bytes);
    let part = |kind| {
        let part = product.tensor().device_part(kind);
        part.map_or(0, |part| part.address().pointer)
    };
    let mut arguments = [
        part(PartKind::Codes),
        part(PartKind::Absmax),
        0,
        0,
        0,
        address(2),
        0,
        address(3),
        if launch.workspace_bytes == 0 { 0 } else { at },
        ROWS as u64,
        product.outputs() as u64,
        product.inputs() as u64,
        64,
        0,
        u64::from(launch.shares),
    ];
    let operands = DeviceOperands::new(address(2), address(3), application.stream())
        .with_workspace(at, workspace.bytes());
    let of_experts = DeviceExpertsOperands::new(
        address(2),
        address(0),
        address(1),
        address(3),
        application.stream(),
    )
    .with_workspace(at, workspace.bytes());
    let mut times = [vec![], vec![], vec![]];
    for call in 0..CALLS {
        let start = Instant::now();
        // SAFETY: the kernel's arguments, of memory that is kept until the stream is done.
        unsafe { kernel.launch(launch.grid, launch.threads, &mut arguments) };
        times[0].push(start.elapsed());
        let start = Instant::now();
        // SAFETY: as above.
        unsafe { product.forward_on_device(FloatType::Bf16, ROWS, &operands, false) }?;
        times[1].push(start.elapsed());
        let start = Instant::now();
        // SAFETY: as above.
        unsafe { layer.forward_on_device(FloatType::Bf16, ROWS, CHOICES, &of_experts) }?;
        times[2].push(start.elapsed());
        if call % 20 == 19 {
            application.synchronize();
        }
    }
    application.synchronize();
    let [bare, linear, experts] = times.map(median);
    println!(
        "{} on {gpu:?}",
        if is_real { "a GPU" } else { "the stand-in" }
    );
    println!("launch alone                  {bare:8.2} us");
    println!(
        "Linear::forward_on_device     {linear:8.2} us, {:+.2} us",
        linear - bare
    );
    let more = experts - 4.0 * bare;
    println!("Experts::forward_on_device    {experts:8.2} us, of 4 launches {more:+.2} us");
    drop(kernel);
    drop((product, layer, workspace, pieces));
    drop((model, application));
    Ok(())
}
