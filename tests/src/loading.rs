//! Checkpoints planned by the default policy and loaded, as an application does it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::LazyLock;

use tightfit::checkpoint::Checkpoint;
use tightfit::device::{Device, open_devices};
use tightfit::load::{LoadError, LoadOptions, load};
use tightfit::model::{Model, Tensor};
use tightfit::plan::{PartKind, Plan, ProposeError, propose};
use tightfit::types::Format;
use tightfit_wasm::policy::WasmPolicy;
use tightfit_wasm::sandbox::Limits;

/// The default policy, compiled once.
pub fn auto() -> &'static WasmPolicy {
    static AUTO: LazyLock<WasmPolicy> = LazyLock::new(|| {
        WasmPolicy::builtin("auto", Limits::default())
            .expect("there is a policy of this name")
            .expect("it compiles")
    });
    &AUTO
}

/// The setting that turns double quantization on.
pub const DOUBLE_QUANT: &[(&str, &str)] = &[("double-quant", "true")];

/// A checkpoint with devices and a plan for them.
#[derive(Debug)]
pub struct Planned {
    /// The checkpoint.
    pub checkpoint: Checkpoint,
    /// The devices, in the order of the plan.
    pub devices: Vec<Box<dyn Device>>,
    /// Where everything goes.
    pub plan: Plan,
}

impl Planned {
    /// Opens a checkpoint and has the default policy place it on devices such as `sim:1GiB`.
    pub fn new(path: &Path, devices: &[&str], settings: &[(&str, &str)]) -> Planned {
        Planned::try_new(path, devices, settings).unwrap_or_else(|error| panic!("{error}"))
    }

    /// The same where the policy may refuse.
    ///
    /// # Errors
    /// When it gave no plan.
    pub fn try_new(
        path: &Path,
        devices: &[&str],
        settings: &[(&str, &str)],
    ) -> Result<Planned, ProposeError> {
        let checkpoint = Checkpoint::open(path).unwrap_or_else(|error| panic!("{error}"));
        let specs: Vec<_> = devices
            .iter()
            .map(|spec| spec.parse().unwrap_or_else(|error| panic!("{error}")))
            .collect();
        let devices = open_devices(&specs).unwrap_or_else(|error| panic!("{error}"));
        let infos: Vec<_> = devices.iter().map(|device| device.info()).collect();
        let settings: Vec<_> = settings
            .iter()
            .map(|&(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        let proposed = propose(&checkpoint, auto(), &infos, &settings)?;
        Ok(Planned {
            checkpoint,
            devices,
            plan: proposed.plan,
        })
    }

    /// Carries out the plan.
    pub fn load(&self, options: &LoadOptions<'_>) -> Model {
        self.try_load(options)
            .unwrap_or_else(|error| panic!("{error}"))
    }

    /// The same where that may fail.
    ///
    /// # Errors
    /// When it does.
    pub fn try_load(&self, options: &LoadOptions<'_>) -> Result<Model, LoadError> {
        load(&self.checkpoint, &self.plan, &self.devices, options)
    }
}

/// Plans and loads with the default options.
pub fn load_with_auto(path: &Path, devices: &[&str], settings: &[(&str, &str)]) -> Model {
    Planned::new(path, devices, settings).load(&LoadOptions::default())
}

/// A part that the tensor has.
pub fn part<'m>(tensor: Tensor<'m>, kind: PartKind) -> &'m [u8] {
    tensor
        .part(kind)
        .unwrap_or_else(|| panic!("{} has no {kind:?}", tensor.name()))
}

/// The tensor of this name.
pub fn tensor<'m>(model: &'m Model, name: &str) -> Tensor<'m> {
    model
        .tensor(name)
        .unwrap_or_else(|| panic!("{name} was not loaded"))
}

/// Everything that a model holds, wherever it lies.
pub type Contents = BTreeMap<String, StoredTensor>;

/// What is stored of one tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredTensor {
    /// How.
    pub format: Format,
    /// Data; or codes, scales and nested scales, as far as the format has them.
    pub parts: Vec<Vec<u8>>,
    /// The offset of double quantization.
    pub absmax_mean: Option<u32>,
}

/// A copy of everything that a model holds.
pub fn contents(model: &Model) -> Contents {
    const KINDS: [PartKind; 4] = [
        PartKind::Data,
        PartKind::Codes,
        PartKind::Absmax,
        PartKind::NestedAbsmax,
    ];
    let stored = |tensor: Tensor<'_>| StoredTensor {
        format: tensor.format(),
        parts: KINDS
            .into_iter()
            .filter_map(|kind| tensor.read_part(kind).expect("memory can be read"))
            .collect(),
        // As bits, so that equal means the same.
        absmax_mean: tensor.absmax_mean().map(f32::to_bits),
    };
    model
        .tensors()
        .map(|tensor| (tensor.name().to_owned(), stored(tensor)))
        .collect()
}
