//! Checkpoints: opened from a path, an id of the hub, or a list of files.

use std::path::PathBuf;
use std::sync::Arc;

use pyo3::exceptions::PyKeyError;
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use tightfit::checkpoint::{self, Dequantize, OpenOptions};
use tightfit::hub::{self, FetchOptions, FileProgress, Hub};
use tightfit::types::{Format, Placement, QuantType};

use crate::failure::Failure;
use crate::work::{self, Counter};

/// A checkpoint whose files are open and whose headers have been checked. No weight has been read.
///
/// A mapping from names to `TensorInfo`. Can be used from several threads at once.
#[pyclass(frozen, mapping, module = "tightfit")]
pub(crate) struct Checkpoint {
    pub(crate) inner: Arc<tightfit::Checkpoint>,
}

/// A tensor as a checkpoint has it. What bitsandbytes has quantized, or another method whose weights are
/// decoded as they are read, is one tensor with the type and shape that it had before.
#[pyclass(frozen, module = "tightfit")]
pub(crate) struct TensorInfo {
    /// Its key.
    #[pyo3(get)]
    name: String,
    /// Type of its elements as safetensors names it: `BF16`, `F32`, ...
    #[pyo3(get)]
    dtype: &'static str,
    shape: Vec<u64>,
    /// Bytes of all its parts in the checkpoint.
    #[pyo3(get)]
    bytes: u64,
    /// `nf4` or `fp4` if bitsandbytes has quantized it, `encoded` if another method has and it is
    /// decoded as it is read; else None.
    #[pyo3(get)]
    quantized: Option<&'static str>,
    /// The file that it is in.
    #[pyo3(get)]
    file: PathBuf,
    /// What part of which tensor it is, in a checkpoint that has been cut; else None.
    #[pyo3(get)]
    slice: Option<Slice>,
}

/// A part of a tensor: what it has along one dimension.
#[pyclass(frozen, eq, hash, from_py_object, module = "tightfit")]
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct Slice {
    /// The tensor's name.
    #[pyo3(get)]
    tensor: String,
    /// The dimension along which it is cut: 0 are the rows of a matrix, or the experts of a stack.
    #[pyo3(get)]
    dimension: u32,
    /// Indices along it, from the first of each pair to before the second.
    #[pyo3(get)]
    ranges: Vec<(u64, u64)>,
}

#[pymethods]
impl Slice {
    #[new]
    fn new(tensor: String, dimension: u32, ranges: Vec<(u64, u64)>) -> Slice {
        Slice {
            tensor,
            dimension,
            ranges,
        }
    }

    fn __repr__(&self) -> String {
        format!(
            "Slice({:?}, {}, {:?})",
            self.tensor, self.dimension, self.ranges
        )
    }
}

impl From<&checkpoint::Piece> for Slice {
    fn from(piece: &checkpoint::Piece) -> Slice {
        let ranges = piece.ranges.iter();
        Slice {
            tensor: piece.of.clone(),
            // Tensors have few dimensions.
            dimension: u32::try_from(piece.dimension).unwrap_or(u32::MAX),
            ranges: ranges.map(|range| (range.start, range.end)).collect(),
        }
    }
}

/// The tensor of this name; or the only part that there is of it, where it has been cut.
pub(crate) fn find_part(checkpoint: &tightfit::Checkpoint, name: &str) -> Option<usize> {
    checkpoint.find(name).or_else(|| {
        let is_of = |tensor: &checkpoint::TensorInfo| {
            tensor.piece.as_ref().is_some_and(|piece| piece.of == name)
        };
        let mut parts = (0..).zip(checkpoint.tensors());
        let (only, _) = parts.find(|(_, tensor)| is_of(tensor))?;
        parts.all(|(_, tensor)| !is_of(tensor)).then_some(only)
    })
}

#[pymethods]
impl TensorInfo {
    /// Row-major shape in elements.
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.shape)
    }

    fn __repr__(&self) -> String {
        format!(
            "TensorInfo({:?}, {} {:?}{})",
            self.name,
            self.dtype,
            self.shape,
            self.quantized
                .map_or(String::new(), |how| format!(", {how}"))
        )
    }
}

impl Checkpoint {
    fn info(&self, index: usize) -> TensorInfo {
        let tensor = &self.inner.tensors()[index];
        let how = match (&tensor.quantized, &tensor.encoded) {
            (Some(quantized), _) => Some(type_name(quantized.quant_type)),
            (None, Some(_)) => Some("encoded"),
            (None, None) => None,
        };
        TensorInfo {
            name: tensor.name.clone(),
            dtype: tensor.dtype.safetensors_name(),
            shape: tensor.shape.clone(),
            bytes: tensor.source_bytes(),
            quantized: how,
            file: self.inner.shards()[tensor.shard].path().to_owned(),
            slice: tensor.piece.as_deref().map(Slice::from),
        }
    }
}

/// As bitsandbytes names it.
pub(crate) fn type_name(quant_type: QuantType) -> &'static str {
    match quant_type {
        QuantType::Nf4 => "nf4",
        QuantType::Fp4 => "fp4",
    }
}

#[pymethods]
impl Checkpoint {
    /// What was opened: a directory or a file.
    #[getter]
    fn path(&self) -> PathBuf {
        self.inner.path().to_owned()
    }

    /// The files with the weights.
    #[getter]
    fn files(&self) -> Vec<PathBuf> {
        let shards = self.inner.shards().iter();
        shards.map(|shard| shard.path().to_owned()).collect()
    }

    /// The architecture that config.json names, if it names one.
    #[getter]
    fn architecture(&self) -> Option<String> {
        self.inner.config()?.architecture.clone()
    }

    /// Bytes of all tensors, without headers.
    #[getter]
    fn bytes(&self) -> u64 {
        self.inner.source_bytes()
    }

    /// The method that has quantized it already, if one has: `bitsandbytes`, `fp8`, ...
    #[getter]
    fn quantization(&self) -> Option<String> {
        Some(self.inner.quantization()?.name.clone())
    }

    /// Second names of tensors, with the names under which they are loaded.
    #[getter]
    fn ties(&self) -> Vec<(String, String)> {
        let name = |index: usize| self.inner.tensors()[index].name.clone();
        let ties = self.inner.ties().iter();
        ties.map(|tie| (tie.alias.clone(), name(tie.tensor)))
            .collect()
    }

    /// The same checkpoint with every tensor of which there are slices replaced by these, which are tensors of
    /// their own from then on: named ``NAME[0:1024]`` or ``NAME[:, 0:1024]``, or as the tensor where that is all
    /// of it, and found by the tensor's name where it has one only. What is quantized while it is loaded has the
    /// blocks of the whole where the cut is between them.
    fn cut(&self, py: Python<'_>, slices: Vec<Slice>) -> PyResult<Checkpoint> {
        let cut = || {
            let place = |slice: Slice| {
                let index = self.inner.find(&slice.tensor).ok_or_else(|| {
                    Failure::usage(format_args!(
                        "slices: there is no tensor '{}'",
                        slice.tensor
                    ))
                })?;
                let ranges = slice.ranges.into_iter();
                Ok(tightfit::types::Slice {
                    // A checkpoint has a million tensors at most.
                    tensor: u32::try_from(index).unwrap_or(u32::MAX),
                    dimension: slice.dimension,
                    ranges: ranges.map(|(start, end)| start..end).collect(),
                    placement: Placement {
                        device: None,
                        format: Format::Stored,
                    },
                })
            };
            let slices = slices.into_iter().map(place);
            let slices: Vec<_> = slices.collect::<Result<_, Failure>>()?;
            self.inner.cut(&slices).map_err(Failure::usage)
        };
        let inner = Arc::new(cut().map_err(|failure| failure.raise(py))?);
        Ok(Checkpoint { inner })
    }

    /// Every tensor, file by file and in a file by offset.
    fn tensors(&self) -> Vec<TensorInfo> {
        (0..self.inner.tensors().len())
            .map(|index| self.info(index))
            .collect()
    }

    /// The names, as of a dict.
    pub(crate) fn keys(&self, _py: Python<'_>) -> PyResult<Vec<String>> {
        let tensors = self.inner.tensors().iter();
        Ok(tensors.map(|tensor| tensor.name.clone()).collect())
    }

    /// Everything under them, as of a dict.
    fn values(&self, py: Python<'_>) -> PyResult<Vec<TensorInfo>> {
        let names = self.keys(py)?.into_iter();
        names.map(|name| self.__getitem__(name)).collect()
    }

    /// Both, as of a dict.
    fn items(&self, py: Python<'_>) -> PyResult<Vec<(String, TensorInfo)>> {
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
        self.inner.tensors().len()
    }

    fn __iter__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let names = self.inner.tensors().iter().map(|tensor| &tensor.name);
        Ok(PyTuple::new(py, names.collect::<Vec<_>>())?
            .try_iter()?
            .into_any())
    }

    fn __contains__(&self, name: &str) -> bool {
        find_part(&self.inner, name).is_some()
    }

    fn __getitem__(&self, name: String) -> PyResult<TensorInfo> {
        match find_part(&self.inner, &name) {
            Some(index) => Ok(self.info(index)),
            None => Err(PyKeyError::new_err(name)),
        }
    }

    fn __repr__(&self) -> String {
        format!(
            "Checkpoint({:?}: {} tensors, {})",
            self.inner.path(),
            self.inner.tensors().len(),
            tightfit::types::Bytes(self.inner.source_bytes())
        )
    }
}

/// Opens a checkpoint: see `tightfit.open`.
#[pyfunction]
#[pyo3(signature = (source, files, revision, offline, headers, dequantize, progress))]
#[expect(clippy::too_many_arguments, reason = "called by tightfit.open alone")]
pub(crate) fn open(
    py: Python<'_>,
    source: Option<String>,
    files: Vec<PathBuf>,
    revision: Option<String>,
    offline: bool,
    headers: bool,
    dequantize: String,
    progress: Option<Py<PyAny>>,
) -> PyResult<Checkpoint> {
    let inner = work::run(py, progress, |cancel, counter| {
        let mut names = Dequantize::NAMES.into_iter();
        let Some((_, dequantize)) = names.find(|(name, _)| *name == dequantize) else {
            return Err(Failure::usage(format_args!(
                "dequantize is '{dequantize}', not 'auto', 'all' or 'none'"
            )));
        };
        let options = OpenOptions::default()
            .with_dequantize(dequantize)
            .with_cancel(cancel.clone());
        let opened = match source {
            None => tightfit::Checkpoint::open_files(&files, &options)?,
            Some(model) => {
                let mut hub = Hub::from_process();
                hub.offline |= offline;
                find(
                    &hub,
                    &model,
                    revision.as_deref(),
                    headers,
                    &options,
                    counter,
                )?
            }
        };
        remark(&opened);
        Ok(Arc::new(opened))
    })?;
    Ok(Checkpoint { inner })
}

/// Finds a model here or in the cache, and downloads what is missing.
fn find(
    hub: &Hub,
    model: &str,
    revision: Option<&str>,
    headers: bool,
    options: &OpenOptions,
    counter: &Counter,
) -> Result<tightfit::Checkpoint, Failure> {
    let local = checkpoint::resolve_revision(model, revision, &hub.cache)
        .and_then(|path| tightfit::Checkpoint::open_with(&path, options));
    match local {
        Ok(checkpoint) => return Ok(checkpoint),
        Err(error) if !hub.may_have(model, &error) => return Err(error.into()),
        Err(_) => {}
    }
    let report = |progress: FileProgress<'_>| {
        if progress.bytes_done == 0 {
            counter.restart();
        }
        counter.set_bytes(progress.bytes_done, progress.bytes_total);
    };
    let fetch = FetchOptions::default()
        .with_revision(revision)
        .with_dequantize(options.dequantize)
        .with_progress(&report)
        .with_cancel(options.cancel.clone());
    if headers {
        return Ok(hub::headers(hub, model, &fetch)?);
    }
    let path = hub::fetch(hub, model, &fetch)?;
    Ok(tightfit::Checkpoint::open_with(&path, options)?)
}

/// Logs what is worth saying of a checkpoint.
fn remark(checkpoint: &tightfit::Checkpoint) {
    for remark in checkpoint.remarks() {
        tracing::warn!("{remark}");
    }
    for tie in checkpoint.untied() {
        tracing::warn!(
            "'{}' is stored with other values than '{}', to which config.json ties it: both are kept",
            tie.alias,
            checkpoint.tensors()[tie.tensor].name
        );
    }
}
