//! Single weights of a loaded model, and their parts for other libraries.

use std::sync::Arc;

use pyo3::exceptions::{PyAttributeError, PyBufferError};
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyTuple};
use tightfit::kernels::FloatType;
use tightfit::model::Stacked;
use tightfit::plan::PartKind;
use tightfit::types::{Format, elements};

use crate::checkpoint::type_name;
use crate::dlpack;
use crate::failure::Failure;
use crate::model::Loaded;

/// One loaded tensor.
///
/// A plain one is imported as it is (`torch.from_dlpack(weight)`), a 4-bit one part by part, as
/// bitsandbytes holds them: `codes` uint8 [bytes, 1], `absmax` float32 [blocks], or uint8 under double
/// quantization with `nested_absmax` float32. Nothing is copied, and nobody may write to it.
#[pyclass(frozen, module = "tightfit")]
pub(crate) struct Weight {
    loaded: Arc<Loaded>,
    index: usize,
    stack: Option<Arc<[usize]>>,
}

/// A part of a weight, where it lies: for `torch.from_dlpack`, `numpy.from_dlpack` and others.
#[pyclass(frozen, module = "tightfit")]
pub(crate) struct Part {
    loaded: Arc<Loaded>,
    index: usize,
    stack: Option<Arc<[usize]>>,
    kind: PartKind,
    /// Whether elements are given as unsigned integers of their size.
    raw: bool,
}

impl Weight {
    pub(crate) fn new(loaded: Arc<Loaded>, index: usize) -> Weight {
        Weight {
            loaded,
            index,
            stack: None,
        }
    }

    /// Tensors that lie one behind the other, by their indices, as one weight; None where they do not.
    pub(crate) fn stack(
        loaded: Arc<Loaded>,
        model: &tightfit::Model,
        indices: Vec<usize>,
    ) -> Option<Weight> {
        stacked(model, &indices)?;
        Some(Weight {
            index: *indices.first()?,
            stack: Some(indices.into()),
            loaded,
        })
    }

    /// Calls with the tensor while the model is there.
    fn with<R>(&self, py: Python<'_>, call: impl FnOnce(tightfit::Tensor<'_>) -> R) -> PyResult<R> {
        with(py, &self.loaded, self.index, call)
    }

    fn part(&self, py: Python<'_>, kind: PartKind, name: &str) -> PyResult<Part> {
        let has = self.with(py, |tensor| {
            tensor.parts().iter().any(|part| part.kind == kind)
        })?;
        match has {
            true => Ok(Part {
                loaded: Arc::clone(&self.loaded),
                index: self.index,
                stack: self.stack.clone(),
                kind,
                raw: false,
            }),
            false => Err(PyAttributeError::new_err(format!(
                "'{}' has no {name} as it is stored ({})",
                self.name(py)?,
                self.format(py)?
            ))),
        }
    }
}

/// How many tensors a weight has, if it is a stack of them.
fn count(stack: Option<&Arc<[usize]>>) -> Option<u64> {
    stack.map(|stack| stack.len() as u64)
}

fn stacked<'m>(model: &'m tightfit::Model, indices: &[usize]) -> Option<Stacked<'m>> {
    let tensors = indices.iter().map(|&index| model.tensor_at(index));
    Stacked::of(tensors.collect::<Option<_>>()?)
}

fn with<R>(
    py: Python<'_>,
    loaded: &Loaded,
    index: usize,
    call: impl FnOnce(tightfit::Tensor<'_>) -> R,
) -> PyResult<R> {
    let model = loaded.model().map_err(|failure| failure.raise(py))?;
    match model.tensor_at(index) {
        Some(tensor) => Ok(call(tensor)),
        None => Err(Failure::internal("internal error: a weight that was not loaded").raise(py)),
    }
}

#[pymethods]
impl Weight {
    /// Its key in the checkpoint: of a stack that of its first.
    #[getter]
    fn name(&self, py: Python<'_>) -> PyResult<String> {
        self.with(py, |tensor| tensor.name().to_owned())
    }

    /// Type of its elements as safetensors names it: of a 4-bit weight the one that it had before.
    #[getter]
    fn dtype(&self, py: Python<'_>) -> PyResult<&'static str> {
        self.with(py, |tensor| match tensor.format() {
            Format::Cast(dtype) => dtype.safetensors_name(),
            Format::Stored | Format::Nf4 { .. } => tensor.dtype().safetensors_name(),
        })
    }

    /// Row-major shape in elements.
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let shape = self.with(py, |tensor| tensor.shape().to_vec())?;
        PyTuple::new(
            py,
            count(self.stack.as_ref())
                .into_iter()
                .chain(shape)
                .collect::<Vec<_>>(),
        )
    }

    /// How it is stored: `stored`, `nf4`, `nf4+double`, `nf4/128`, `cast:bf16`, `cast:f16` or `cast:f32`.
    #[getter]
    fn format(&self, py: Python<'_>) -> PyResult<String> {
        self.with(py, |tensor| tensor.format().to_string())
    }

    /// Its device, for example `cuda:0`.
    #[getter]
    fn device(&self, py: Python<'_>) -> PyResult<String> {
        let device = self.with(py, |tensor| tensor.device())?;
        Ok(self.loaded.device_name(device))
    }

    /// `nf4` or `fp4` if it is in 4 bits, quantized while loading or before; else None.
    #[getter]
    fn quant_type(&self, py: Python<'_>) -> PyResult<Option<&'static str>> {
        self.with(py, |tensor| {
            Some(type_name(tensor.quantization()?.quant_type))
        })
    }

    /// Elements that share a scale, if it is in 4 bits.
    #[getter]
    fn block_size(&self, py: Python<'_>) -> PyResult<Option<usize>> {
        self.with(py, |tensor| {
            Some(tensor.quantization()?.block_size.elements())
        })
    }

    /// The mean of the scales, if it is double-quantized: bitsandbytes' `offset`.
    #[getter]
    fn absmax_mean(&self, py: Python<'_>) -> PyResult<Option<f32>> {
        self.with(py, |tensor| tensor.absmax_mean())
    }

    /// The elements of a weight that is not in 4 bits.
    #[getter]
    fn data(&self, py: Python<'_>) -> PyResult<Part> {
        self.part(py, PartKind::Data, "data")
    }

    /// Two 4-bit codes in a byte, the earlier element in the high half.
    #[getter]
    fn codes(&self, py: Python<'_>) -> PyResult<Part> {
        self.part(py, PartKind::Codes, "codes")
    }

    /// One scale for each block.
    #[getter]
    fn absmax(&self, py: Python<'_>) -> PyResult<Part> {
        self.part(py, PartKind::Absmax, "absmax")
    }

    /// One scale for 256 scales, under double quantization.
    #[getter]
    fn nested_absmax(&self, py: Python<'_>) -> PyResult<Part> {
        self.part(py, PartKind::NestedAbsmax, "nested_absmax")
    }

    /// All elements as a new numpy array of `float32` or `float16`: 4-bit weights are dequantized, others
    /// converted.
    #[pyo3(signature = (dtype = "float32"))]
    fn dequantize<'py>(&self, py: Python<'py>, dtype: &str) -> PyResult<Bound<'py, PyAny>> {
        let to = match dtype {
            "float32" => FloatType::F32,
            "float16" => FloatType::F16,
            other => {
                let message = format!("dtype is '{other}', not 'float32' or 'float16'");
                return Err(Failure::usage(message).raise(py));
            }
        };
        let model = self.loaded.model().map_err(|failure| failure.raise(py))?;
        let shape = self.shape(py)?;
        let each = self.with(py, |tensor| elements(tensor.shape()).unwrap_or(0))? as usize;
        let each = each * to.bytes();
        let alone = [self.index];
        let indices = self.stack.as_deref().unwrap_or(&alone);
        let bytes = PyByteArray::new_with(py, each * indices.len(), |bytes| {
            let filled = py.detach(|| {
                for (index, bytes) in indices.iter().zip(bytes.chunks_mut(each.max(1))) {
                    let tensor = model.tensor_at(*index).ok_or_else(|| {
                        Failure::internal("internal error: a weight that was not loaded")
                    })?;
                    tensor
                        .to_float_at(0, to, bytes)
                        .map_err(|error| match &error {
                            tightfit::model::ModelError::Device(source) => {
                                Failure::from_report(source)
                            }
                            _ => Failure::usage(error),
                        })?;
                }
                Ok::<_, Failure>(())
            });
            filled.map_err(|failure| failure.raise(py))
        })?;
        let numpy = py.import("numpy")?;
        numpy
            .call_method1("frombuffer", (bytes, dtype))?
            .call_method1("reshape", (shape,))
    }

    /// The elements of a plain weight in host memory as a read-only numpy array, in place; see
    /// `Part.numpy`.
    fn numpy<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let data = slf.get().data(slf.py())?;
        Part::numpy(&Bound::new(slf.py(), data)?)
    }

    fn __dlpack_device__(&self, py: Python<'_>) -> PyResult<(i32, i32)> {
        self.exportable(py)?.__dlpack_device__(py)
    }

    #[pyo3(signature = (*, stream = None, max_version = None, dl_device = None, copy = None))]
    fn __dlpack__<'py>(
        &self,
        py: Python<'py>,
        stream: Option<i64>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(i32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let part = self.exportable(py)?;
        part.__dlpack__(py, stream, max_version, dl_device, copy)
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        self.with(py, |tensor| {
            let count = count(self.stack.as_ref()).into_iter();
            let shape: Vec<_> = count.chain(tensor.shape().iter().copied()).collect();
            format!(
                "Weight({:?}, {} {shape:?}, {} on {})",
                tensor.name(),
                tensor.dtype(),
                tensor.format(),
                self.loaded.device_name(tensor.device())
            )
        })
    }
}

impl Weight {
    fn exportable(&self, py: Python<'_>) -> PyResult<Part> {
        // Attribute errors would say that there is no such protocol.
        self.part(py, PartKind::Data, "data")
            .map_err(|error| PyBufferError::new_err(error.value(py).to_string()))
    }
}

impl Part {
    fn exported(&self, py: Python<'_>) -> PyResult<tightfit::dlpack::Exported> {
        let exported = with(py, &self.loaded, self.index, |tensor| match &self.stack {
            None => Some(tensor.to_dlpack(self.kind)),
            Some(stack) => Some(stacked(tensor.model(), stack)?.to_dlpack(self.kind)),
        })?;
        let exported = exported
            .ok_or_else(|| Failure::internal("internal error: a stack that is none").raise(py))?;
        exported.map_err(|error| PyBufferError::new_err(error.to_string()))
    }
}

#[pymethods]
impl Part {
    /// Its length in bytes.
    #[getter]
    fn bytes(&self, py: Python<'_>) -> PyResult<u64> {
        with(py, &self.loaded, self.index, |tensor| {
            let mut parts = tensor.parts().iter();
            let part = parts.find(|part| part.kind == self.kind);
            part.map_or(0, |part| part.bytes) * count(self.stack.as_ref()).unwrap_or(1)
        })
    }

    /// The address of its first byte: in host memory, or in the GPU's. 0 if it has none.
    #[getter]
    fn address(&self, py: Python<'_>) -> PyResult<u64> {
        Ok(self.exported(py)?.address())
    }

    /// The same bytes as unsigned integers of the elements' size, for libraries that do not know the type.
    fn raw(&self) -> Part {
        Part {
            loaded: Arc::clone(&self.loaded),
            index: self.index,
            stack: self.stack.clone(),
            kind: self.kind,
            raw: true,
        }
    }

    /// Imports it into numpy, in place and read-only. Types that numpy does not have come from `ml_dtypes`
    /// where that is installed.
    fn numpy<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let from = slf.py().import("tightfit._arrays")?.getattr("to_numpy")?;
        from.call1((slf,))
    }

    /// Type of its elements as safetensors names it.
    #[getter]
    fn dtype(&self, py: Python<'_>) -> PyResult<&'static str> {
        with(py, &self.loaded, self.index, |tensor| match self.kind {
            PartKind::Data => match tensor.format() {
                Format::Cast(dtype) => dtype.safetensors_name(),
                Format::Stored | Format::Nf4 { .. } => tensor.dtype().safetensors_name(),
            },
            PartKind::Codes => "U8",
            PartKind::Absmax if tensor.absmax_mean().is_some() => "U8",
            PartKind::Absmax | PartKind::NestedAbsmax => "F32",
        })
    }

    /// Shape in elements.
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let bytes = self.bytes(py)?;
        let shape = with(py, &self.loaded, self.index, |tensor| match self.kind {
            PartKind::Data => {
                let count = count(self.stack.as_ref()).into_iter();
                count.chain(tensor.shape().iter().copied()).collect()
            }
            PartKind::Codes => vec![bytes, 1],
            PartKind::Absmax if tensor.absmax_mean().is_some() => vec![bytes],
            PartKind::Absmax | PartKind::NestedAbsmax => vec![bytes / 4],
        })?;
        PyTuple::new(py, shape)
    }

    /// DLPack's device type and number.
    fn __dlpack_device__(&self, py: Python<'_>) -> PyResult<(i32, i32)> {
        let device = self.exported(py)?.device();
        Ok((device.device_type, device.device_id))
    }

    /// A capsule of its own: `dltensor_versioned`, or `dltensor` for those who do not know that, which
    /// cannot say that nobody may write to it. All transfers have ended when a load returns, so that there
    /// is nothing that a stream would have to wait for.
    #[pyo3(signature = (*, stream = None, max_version = None, dl_device = None, copy = None))]
    fn __dlpack__<'py>(
        &self,
        py: Python<'py>,
        stream: Option<i64>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(i32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let exported = self.exported(py)?;
        let device = exported.device();
        dlpack::check(device, stream, dl_device, copy)?;
        let versioned = max_version.is_some_and(|(major, _)| major >= 1);
        dlpack::capsule(py, exported, versioned, self.raw)
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        Ok(format!("Part({:?}, {} bytes)", self.kind, self.bytes(py)?))
    }
}
