//! Plans, as they are shown and as they are loaded.

use std::collections::HashMap;
use std::sync::Arc;

use pyo3::exceptions::PyKeyError;
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use tightfit::device::{DeviceSpec, planned_devices};
use tightfit::memory::DEFAULT_STAGING;
use tightfit::plan::{PlanOptions, Proposed, propose_with};
use tightfit::report::{Report, to_json};
use tightfit::types::{Bytes, Format};
use tightfit_cli::draw::{self, BarStyle, Heading};

use crate::checkpoint::{Checkpoint, Slice, find_part};
use crate::failure::Failure;
use crate::policies::{self, ByWholeNames};
use crate::{command, work};

/// Columns of a plan that is printed.
const COLUMNS: usize = 100;

/// Where everything goes, exact to the byte. Nothing has been reserved or read.
///
/// A mapping from names of tensors to `PlannedTensor`. `print` shows it as a table, a notebook draws it,
/// and `tightfit.load` carries out this plan and no other.
#[pyclass(frozen, mapping, module = "tightfit")]
pub(crate) struct Plan {
    pub(crate) checkpoint: Arc<tightfit::Checkpoint>,
    pub(crate) proposed: Arc<Proposed>,
    pub(crate) devices: Vec<DeviceSpec>,
}

/// What a plan puts on one device. Sizes are in bytes.
#[pyclass(frozen, get_all, module = "tightfit")]
pub(crate) struct DevicePlan {
    /// For example `cuda:0`.
    name: String,
    /// `cuda`, `cpu` or `sim`.
    kind: String,
    /// What the device has in all.
    capacity: u64,
    /// What of it was free when the plan was made.
    available: u64,
    /// Bytes of all tensors there.
    allocated: u64,
    /// The same after alignment.
    padded: u64,
    /// What will be reserved, in one piece.
    reserved: u64,
    /// To be left free beside them.
    headroom: u64,
    /// What of `reserved` is behind the weights, for the application.
    tail: u64,
    /// Number of tensors there.
    tensors: u64,
}

#[pymethods]
impl DevicePlan {
    fn __repr__(&self) -> String {
        format!(
            "DevicePlan({:?}: {} tensors, {} reserved of {})",
            self.name,
            self.tensors,
            Bytes(self.reserved),
            Bytes(self.available)
        )
    }
}

/// What becomes of one tensor.
#[pyclass(frozen, module = "tightfit")]
pub(crate) struct PlannedTensor {
    /// Its key in the checkpoint.
    #[pyo3(get)]
    name: String,
    /// Type of its elements in the checkpoint, as safetensors names it.
    #[pyo3(get)]
    dtype: &'static str,
    shape: Vec<u64>,
    /// Its device; None where it is not loaded.
    #[pyo3(get)]
    device: Option<String>,
    /// `stored`, `nf4`, `nf4+double`, `nf4/128`, `cast:bf16`, `cast:f16` or `cast:f32`.
    #[pyo3(get)]
    format: String,
    /// Bytes of all its parts.
    #[pyo3(get)]
    bytes: u64,
    /// What part of which tensor it is, where that has been cut; else None.
    #[pyo3(get)]
    slice: Option<Slice>,
}

#[pymethods]
impl PlannedTensor {
    /// Row-major shape in elements.
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.shape)
    }

    fn __repr__(&self) -> String {
        let device = self.device.as_deref().unwrap_or("not loaded");
        format!(
            "PlannedTensor({:?}, {} {:?} -> {} on {device}, {} bytes)",
            self.name, self.dtype, self.shape, self.format, self.bytes
        )
    }
}

impl Plan {
    fn report(&self) -> Report {
        Report::of_plan(&self.checkpoint, &self.proposed, DEFAULT_STAGING)
    }

    fn tensor(&self, index: usize) -> PlannedTensor {
        let (tensor, planned) = (
            &self.checkpoint.tensors()[index],
            &self.proposed.plan.tensors[index],
        );
        let device = planned.placement.device;
        PlannedTensor {
            name: tensor.name.clone(),
            dtype: tensor.dtype.safetensors_name(),
            shape: tensor.shape.clone(),
            device: device.map(|device| {
                self.proposed.plan.devices[device as usize]
                    .device
                    .name
                    .clone()
            }),
            format: planned.placement.format.to_string(),
            bytes: planned.requested(),
            slice: tensor.piece.as_deref().map(Slice::from),
        }
    }
}

#[pymethods]
impl Plan {
    /// The checkpoint that it is for: with the tensors that were not left out.
    #[getter]
    fn checkpoint(&self) -> Checkpoint {
        Checkpoint {
            inner: Arc::clone(&self.checkpoint),
        }
    }

    /// Bytes that will be reserved on all devices.
    #[getter]
    fn bytes(&self) -> u64 {
        let devices = self.proposed.plan.devices.iter();
        devices.map(|device| device.reserved()).sum()
    }

    /// Every device, in the order in which they were given.
    #[getter]
    fn devices(&self) -> Vec<DevicePlan> {
        let device = |plan: &tightfit::plan::DevicePlan| DevicePlan {
            name: plan.device.name.clone(),
            kind: plan.device.kind.to_string(),
            capacity: plan.device.capacity,
            available: plan.device.available,
            allocated: plan.size.requested,
            padded: plan.size.padded,
            reserved: plan.size.reserved,
            headroom: plan.headroom,
            tail: plan.tail,
            tensors: plan.tensors,
        };
        self.proposed.plan.devices.iter().map(device).collect()
    }

    /// The policy's name and version.
    #[getter]
    fn policy(&self) -> String {
        format!("{} {}", self.proposed.policy, self.proposed.version)
    }

    /// Every setting with the value that was used.
    #[getter]
    fn settings(&self) -> HashMap<String, String> {
        self.proposed.settings.iter().cloned().collect()
    }

    /// Every tensor, in the order of the checkpoint.
    fn tensors(&self) -> Vec<PlannedTensor> {
        (0..self.checkpoint.tensors().len())
            .map(|index| self.tensor(index))
            .collect()
    }

    /// The plan as `tightfit plan --json --placements` prints it: dicts, lists, texts and numbers.
    fn to_dict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let report = self
            .report()
            .with_placements(&self.checkpoint, &self.proposed.plan);
        let text = to_json(&report).map_err(|error| Failure::internal(error).raise(py))?;
        py.import("json")?.call_method1("loads", (text,))
    }

    /// The plan as a drawing.
    fn to_svg(&self) -> String {
        let heading = Heading {
            model: &self.checkpoint.path().display().to_string(),
            policy: &self.policy(),
        };
        draw::svg(heading, self.checkpoint.tensors(), &self.proposed.plan)
    }

    /// What a notebook shows.
    fn _repr_html_(&self) -> String {
        self.to_svg()
    }

    fn __str__(&self) -> String {
        draw::plan(
            &self.report(),
            self.checkpoint.tensors(),
            &self.proposed.plan,
            BarStyle::default(),
            COLUMNS,
        )
        .to_string()
    }

    fn __repr__(&self) -> String {
        let devices = self.proposed.plan.devices.iter();
        let devices = devices.map(|plan| format!("{} {}", plan.name(), Bytes(plan.reserved())));
        format!("Plan({})", devices.collect::<Vec<_>>().join(", "))
    }

    /// The names, as of a dict.
    fn keys(&self, py: Python<'_>) -> PyResult<Vec<String>> {
        self.checkpoint().keys(py)
    }

    /// Everything under them, as of a dict.
    fn values(&self, py: Python<'_>) -> PyResult<Vec<PlannedTensor>> {
        let names = self.keys(py)?.into_iter();
        names.map(|name| self.__getitem__(name)).collect()
    }

    /// Both, as of a dict.
    fn items(&self, py: Python<'_>) -> PyResult<Vec<(String, PlannedTensor)>> {
        Ok(self.keys(py)?.into_iter().zip(self.values(py)?).collect())
    }

    /// What is under a name, or `default`.
    #[pyo3(signature = (name, default = None))]
    fn get<'py>(
        &self,
        py: Python<'py>,
        name: String,
        default: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        match self.__getitem__(name) {
            Ok(found) => Ok(Some(Bound::new(py, found)?.into_any())),
            Err(error) if error.is_instance_of::<PyKeyError>(py) => Ok(default),
            Err(error) => Err(error),
        }
    }

    fn __len__(&self) -> usize {
        self.checkpoint.tensors().len()
    }

    fn __iter__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.checkpoint()
            .into_pyobject(py)?
            .try_iter()
            .map(Bound::into_any)
    }

    fn __contains__(&self, name: &str) -> bool {
        find_part(&self.checkpoint, name).is_some()
    }

    fn __getitem__(&self, name: String) -> PyResult<PlannedTensor> {
        match find_part(&self.checkpoint, &name) {
            Some(index) => Ok(self.tensor(index)),
            None => Err(PyKeyError::new_err(name)),
        }
    }
}

/// Reads devices as users name them.
pub(crate) fn device_specs(devices: &[String]) -> Result<Vec<DeviceSpec>, Failure> {
    let parse = |text: &String| text.parse().map_err(Failure::usage);
    devices.iter().map(parse).collect()
}

/// Formats of tensors by name, as their indices.
pub(crate) fn formats(
    checkpoint: &tightfit::Checkpoint,
    formats: &HashMap<String, String>,
) -> Result<Vec<(usize, Format)>, Failure> {
    let fixed = |(name, format): (&String, &String)| {
        let index = find_part(checkpoint, name)
            .ok_or_else(|| Failure::usage(format_args!("formats: there is no tensor '{name}'")))?;
        Ok((index, format.parse().map_err(Failure::usage)?))
    };
    formats.iter().map(fixed).collect()
}

/// The checkpoint without these tensors.
pub(crate) fn without(
    checkpoint: &Arc<tightfit::Checkpoint>,
    omit: &[String],
) -> Result<Arc<tightfit::Checkpoint>, Failure> {
    if omit.is_empty() {
        return Ok(Arc::clone(checkpoint));
    }
    let mut keep = vec![true; checkpoint.tensors().len()];
    for name in omit {
        let index = find_part(checkpoint, name)
            .ok_or_else(|| Failure::usage(format_args!("omit: there is no tensor '{name}'")))?;
        keep[index] = false;
    }
    Ok(Arc::new(checkpoint.filtered(|index| keep[index])))
}

/// Asks a policy: see `tightfit.plan`.
#[pyfunction]
#[pyo3(signature = (checkpoint, devices, policy, settings, formats, omit, limits, rows, experts_per_token, gradients, reserve_headroom))]
#[expect(clippy::too_many_arguments, reason = "called by tightfit.plan alone")]
pub(crate) fn plan(
    py: Python<'_>,
    checkpoint: &Checkpoint,
    devices: Vec<String>,
    policy: String,
    settings: Vec<(String, String)>,
    formats: HashMap<String, String>,
    omit: Vec<String>,
    limits: Vec<(String, String)>,
    rows: u64,
    experts_per_token: u64,
    gradients: bool,
    reserve_headroom: bool,
) -> PyResult<Plan> {
    let checkpoint = Arc::clone(&checkpoint.inner);
    let compiler = command::compiler(py)?;
    work::run(py, None, |cancel, _| {
        let devices = device_specs(&devices)?;
        let checkpoint = without(&checkpoint, &omit)?;
        let policy = policies::open(&policy, &limits, compiler, cancel)?;
        let options = PlanOptions::default()
            .with_formats(self::formats(&checkpoint, &formats)?)
            .with_rows(rows)
            .with_experts_per_token(experts_per_token)
            .with_gradients(gradients)
            .with_reserved_headroom(reserve_headroom)
            .with_cancel(cancel.clone());
        let infos = planned_devices(&devices)?;
        let proposed = propose_with(
            &checkpoint,
            &ByWholeNames(&*policy),
            &infos,
            &settings,
            &options,
        )
        .map_err(|error| Failure::from(error).on(&infos))?;
        Ok(Plan {
            checkpoint,
            proposed: Arc::new(proposed),
            devices,
        })
    })
}
