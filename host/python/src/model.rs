//! Loaded models.

use std::sync::{Arc, PoisonError, RwLock};

use pyo3::exceptions::PyKeyError;
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use tightfit::device::{Device, open_devices};
use tightfit::load::{LoadError, LoadOptions, Reserved, load_reserved};
use tightfit::memory::{DEFAULT_STAGING, Usage};
use tightfit::plan::Proposed;
use tightfit::report::{Report, to_json};
use tightfit::types::{Bytes, parse_bytes};

use crate::failure::Failure;
use crate::plan::Plan;
use crate::products::{self, Experts, Linear, Workspace};
use crate::weight::Weight;
use crate::work;

/// What weights and parts of a model refer to. The model itself goes when it is unloaded; what others
/// have imported from it keeps its device's memory.
pub(crate) struct Loaded {
    model: RwLock<Option<Arc<tightfit::Model>>>,
    checkpoint: Arc<tightfit::Checkpoint>,
    proposed: Arc<Proposed>,
    devices: Arc<[Box<dyn Device>]>,
}

impl Loaded {
    /// # Errors
    /// After `unload`.
    pub(crate) fn model(&self) -> Result<Arc<tightfit::Model>, Failure> {
        let model = self.model.read().unwrap_or_else(PoisonError::into_inner);
        model
            .clone()
            .ok_or_else(|| Failure::usage("the model has been unloaded"))
    }

    pub(crate) fn device_name(&self, index: usize) -> String {
        let device = self.proposed.plan.devices.get(index);
        device.map_or_else(String::new, |plan| plan.device.name.clone())
    }
}

/// A loaded model: a mapping from names of tensors, tied ones too, to `Weight`.
///
/// Its memory is given back when it is unloaded or forgotten, but for devices on which another library
/// still uses a tensor: each imported tensor keeps the whole reservation of its device. A context manager,
/// which unloads it.
#[pyclass(frozen, mapping, module = "tightfit")]
pub(crate) struct Model(Arc<Loaded>);

/// What a model holds of one device, and held at most, as counted by the library. Sizes are in bytes.
#[pyclass(frozen, get_all, module = "tightfit")]
pub(crate) struct DeviceMemory {
    /// For example `cuda:0`.
    name: String,
    /// Bytes of tensors.
    allocated: u64,
    /// The same after alignment.
    padded: u64,
    /// What is taken from the device. After `unload` it says what tensors that others have imported keep.
    reserved: u64,
    /// The most that was taken at any time.
    peak_reserved: u64,
    /// What the plan said would be.
    planned: u64,
}

#[pymethods]
impl DeviceMemory {
    fn __repr__(&self) -> String {
        format!(
            "DeviceMemory({:?}: {} reserved, at most {}, {} planned)",
            self.name,
            Bytes(self.reserved),
            Bytes(self.peak_reserved),
            Bytes(self.planned)
        )
    }
}

impl Model {
    fn weight(&self, index: usize) -> Weight {
        Weight::new(Arc::clone(&self.0), index)
    }

    fn names(&self, py: Python<'_>) -> PyResult<Vec<String>> {
        let model = self.0.model().map_err(|failure| failure.raise(py))?;
        Ok(model
            .tensors()
            .map(|tensor| tensor.name().to_owned())
            .collect())
    }

    fn usage(&self) -> Vec<Usage> {
        self.0.devices.iter().map(|device| device.usage()).collect()
    }
}

#[pymethods]
impl Model {
    /// The plan that was carried out.
    #[getter]
    fn plan(&self) -> Plan {
        Plan {
            checkpoint: Arc::clone(&self.0.checkpoint),
            proposed: Arc::clone(&self.0.proposed),
            devices: Vec::new(),
        }
    }

    /// What it holds of each device, in the plan's order.
    #[getter]
    fn memory(&self) -> Vec<DeviceMemory> {
        let plans = self.0.proposed.plan.devices.iter();
        let each = plans.zip(self.usage()).map(|(plan, usage)| DeviceMemory {
            name: plan.device.name.clone(),
            allocated: usage.requested.now,
            padded: usage.padded.now,
            reserved: usage.reserved.now,
            peak_reserved: usage.reserved.peak,
            planned: plan.reserved(),
        });
        each.collect()
    }

    /// Whether it has not been unloaded.
    #[getter]
    fn is_loaded(&self) -> bool {
        self.0.model().is_ok()
    }

    /// What was planned and done, as `tightfit load --json` prints it.
    fn report<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let model = self.0.model().map_err(|failure| failure.raise(py))?;
        let report = Report::of_plan(&self.0.checkpoint, &self.0.proposed, DEFAULT_STAGING)
            .with_load(&model, &self.usage());
        let text = to_json(&report).map_err(|error| Failure::internal(error).raise(py))?;
        py.import("json")?.call_method1("loads", (text,))
    }

    /// The product with a 4-bit weight [outputs, inputs], or with matrix `index` of a stack [matrices,
    /// outputs, inputs]; `tightfit.ops` computes it. On a GPU its kernels are loaded here.
    #[pyo3(signature = (name, index = None))]
    fn linear(&self, py: Python<'_>, name: String, index: Option<u64>) -> PyResult<Linear> {
        let found = self.0.model().and_then(|model| {
            let device = |index| self.0.device_name(index);
            py.detach(|| Linear::find(model, name, index, device))
        });
        found.map_err(|failure| failure.raise(py))
    }

    /// A layer of experts, by the names of its tensors: `gates` are one list for both projections or two,
    /// gates first; a list has the name of a stack or those of all experts. `activation` is `silu`,
    /// `gelu`, `gelu_tanh` or `clamped`, which has a `limit`; `interleaved`: each gate lies before its own
    /// other row.
    #[pyo3(signature = (gates, down, activation, limit = None, interleaved = false))]
    fn experts(
        &self,
        py: Python<'_>,
        gates: Vec<Vec<String>>,
        down: Vec<String>,
        activation: String,
        limit: Option<f32>,
        interleaved: bool,
    ) -> PyResult<Experts> {
        let found = self.0.model().and_then(|model| {
            let device = |index| self.0.device_name(index);
            py.detach(|| Experts::find(model, gates, down, interleaved, &activation, limit, device))
        });
        found.map_err(|failure| failure.raise(py))
    }

    /// Several tensors of one shape as one `Weight` [tensors, ..], in place, if they lie one behind the other:
    /// the down projections of a layer's experts, or their gates and up projections in turn. Else None;
    /// plans lay experts out so that are on one device and in one format, where the bytes of their parts are
    /// multiples of 256. Double-quantized ones have a mean each, and are no tensor together.
    fn stack(&self, py: Python<'_>, names: Vec<String>) -> PyResult<Option<Weight>> {
        let model = self.0.model().map_err(|failure| failure.raise(py))?;
        let indices = names.into_iter().map(|name| match model.tensor(&name) {
            Some(tensor) => Ok(tensor.index()),
            None => Err(PyKeyError::new_err(name)),
        });
        let indices = indices.collect::<PyResult<_>>()?;
        Ok(Weight::stack(Arc::clone(&self.0), &model, indices))
    }

    /// Memory of a GPU that is enough for products of `rows` rows with each of its weights: what the plan
    /// has reserved for that (`rows` of `tightfit.plan`), or else taken beside it. Empty in host memory.
    #[pyo3(signature = (device, rows, experts_per_token = 0, gradients = false))]
    fn workspace(
        &self,
        py: Python<'_>,
        device: &str,
        rows: usize,
        experts_per_token: usize,
        gradients: bool,
    ) -> PyResult<Workspace> {
        let taken = self.0.model().and_then(|model| {
            let mut devices = self.0.proposed.plan.devices.iter();
            let index = devices
                .position(|plan| plan.device.name == device)
                .ok_or_else(|| Failure::usage(format_args!("no device '{device}' in the plan")))?;
            py.detach(|| products::workspace(&model, index, rows, experts_per_token, gradients))
        });
        taken.map_err(|failure| failure.raise(py))
    }

    /// Gives its memory back, but for devices on which another library still uses a tensor. Its weights
    /// cannot be used any more. A second call does nothing.
    fn unload(&self, py: Python<'_>) {
        let model = self
            .0
            .model
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        py.detach(|| drop(model));
    }

    fn __enter__(slf: PyRef<'_, Self>) -> PyRef<'_, Self> {
        slf
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyTuple>) {
        self.unload(py);
    }

    /// The names, as of a dict.
    fn keys(&self, py: Python<'_>) -> PyResult<Vec<String>> {
        self.names(py)
    }

    /// Everything under them, as of a dict.
    fn values(&self, py: Python<'_>) -> PyResult<Vec<Weight>> {
        let names = self.keys(py)?.into_iter();
        names.map(|name| self.__getitem__(py, name)).collect()
    }

    /// Both, as of a dict.
    fn items(&self, py: Python<'_>) -> PyResult<Vec<(String, Weight)>> {
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
        match self.__getitem__(py, name) {
            Ok(found) => Ok(Some(Bound::new(py, found)?.into_any())),
            Err(error) if error.is_instance_of::<PyKeyError>(py) => Ok(default),
            Err(error) => Err(error),
        }
    }

    fn __len__(&self, py: Python<'_>) -> PyResult<usize> {
        let model = self.0.model().map_err(|failure| failure.raise(py))?;
        Ok(model.tensors().count())
    }

    fn __iter__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        Ok(PyTuple::new(py, self.names(py)?)?.try_iter()?.into_any())
    }

    fn __contains__(&self, py: Python<'_>, name: &str) -> PyResult<bool> {
        let model = self.0.model().map_err(|failure| failure.raise(py))?;
        Ok(model.tensor(name).is_some())
    }

    fn __getitem__(&self, py: Python<'_>, name: String) -> PyResult<Weight> {
        let model = self.0.model().map_err(|failure| failure.raise(py))?;
        match model.tensor(&name) {
            Some(tensor) => Ok(self.weight(tensor.index())),
            None => Err(PyKeyError::new_err(name)),
        }
    }

    fn __repr__(&self) -> String {
        match self.0.model() {
            Ok(model) => format!("Model({} tensors)", model.tensors().count()),
            Err(_) => "Model(unloaded)".to_owned(),
        }
    }
}

/// Carries a plan out: see `tightfit.load`.
#[pyfunction]
#[pyo3(signature = (plan, threads, staging, strict, quantize_on, progress))]
pub(crate) fn load(
    py: Python<'_>,
    plan: &Plan,
    threads: Option<usize>,
    staging: Option<String>,
    strict: bool,
    quantize_on: String,
    progress: Option<Py<PyAny>>,
) -> PyResult<Model> {
    let checkpoint = Arc::clone(&plan.checkpoint);
    let proposed = Arc::clone(&plan.proposed);
    let specs = plan.devices.clone();
    let loaded = work::run(py, progress, move |cancel, counter| {
        let report = |progress| counter.set(progress);
        let mut options = LoadOptions::default()
            .with_strict(strict)
            .with_quantize_on(quantize_on.parse().map_err(Failure::usage)?)
            .with_progress(&report)
            .with_cancel(cancel.clone());
        if let Some(threads) = threads {
            options.threads = threads;
        }
        if let Some(staging) = staging {
            options.staging_bytes = parse_bytes(&staging).map_err(Failure::usage)?;
        }
        let devices: Arc<[Box<dyn Device>]> = open_devices(&specs)?.into();
        let planned = proposed
            .plan
            .devices
            .iter()
            .map(|plan| plan.device.name.clone());
        if !planned.eq(devices.iter().map(|device| device.info().name)) {
            // GPUs that came or went since the plan was made for all there were.
            return Err(LoadError::OtherPlan.into());
        }
        let reserved = Reserved::take(proposed.plan.clone(), &devices)?;
        let model = load_reserved(&checkpoint, reserved, &options)?;
        Ok(Loaded {
            model: RwLock::new(Some(Arc::new(model))),
            checkpoint,
            proposed,
            devices,
        })
    })?;
    Ok(Model(Arc::new(loaded)))
}
