//! Tensors in files, read and written with the `safetensors` crate, which shares no code with
//! the reader under test.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize_to_file};

/// One tensor with its data.
#[derive(Debug, Clone, PartialEq)]
pub struct FileTensor {
    /// Type of the elements.
    pub dtype: Dtype,
    /// Row-major.
    pub shape: Vec<usize>,
    /// Little-endian.
    pub data: Vec<u8>,
}

impl FileTensor {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Tensors by name.
#[derive(Debug, Clone, Default)]
pub struct FileTensors(pub BTreeMap<String, FileTensor>);

impl FileTensors {
    /// Every tensor of a `.safetensors` file, or of all such files in a directory.
    pub fn read(path: &Path) -> FileTensors {
        let mut tensors = FileTensors::default();
        if path.is_dir() {
            for entry in fs::read_dir(path).expect("the directory can be read") {
                let file = entry.expect("the directory can be read").path();
                if file.extension().is_some_and(|name| name == "safetensors") {
                    tensors.read_file(&file);
                }
            }
        } else {
            tensors.read_file(path);
        }
        tensors
    }

    fn read_file(&mut self, path: &Path) {
        let bytes = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let file = SafeTensors::deserialize(&bytes)
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        for (name, view) in file.iter() {
            let tensor = FileTensor {
                dtype: view.dtype(),
                shape: view.shape().to_vec(),
                data: view.data().to_vec(),
            };
            let before = self.0.insert(name.to_owned(), tensor);
            assert!(before.is_none(), "{name} is in two files");
        }
    }

    /// Writes all tensors into one file.
    pub fn write(&self, path: &Path) {
        let views = self.0.iter().map(|(name, tensor)| {
            let view = TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.data)
                .unwrap_or_else(|error| panic!("{name}: {error}"));
            (name, view)
        });
        serialize_to_file(views, None, path)
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }

    /// The tensor with this name.
    pub fn get(&self, name: &str) -> &FileTensor {
        self.0
            .get(name)
            .unwrap_or_else(|| panic!("the file has no tensor {name}"))
    }

    /// The data of the tensor with this name.
    pub fn data(&self, name: &str) -> &[u8] {
        &self.get(name).data
    }

    /// The state that bitsandbytes writes beside a quantized weight.
    pub fn quant_state(&self, weight: &str) -> serde_json::Value {
        let state = ["nf4", "fp4"]
            .iter()
            .find_map(|kind| {
                self.0
                    .get(&format!("{weight}.quant_state.bitsandbytes__{kind}"))
            })
            .unwrap_or_else(|| panic!("{weight} has no quantization state"));
        serde_json::from_slice(&state.data).expect("the quantization state is JSON")
    }

    /// The offset of double quantization in that state.
    pub fn nested_offset(&self, weight: &str) -> f32 {
        let offset = self.quant_state(weight)["nested_offset"]
            .as_f64()
            .unwrap_or_else(|| panic!("the state of {weight} has no offset"));
        // It was an f32, printed as the f64 of the same value.
        offset as f32
    }
}

/// Little-endian bytes as numbers.
pub fn floats(bytes: &[u8]) -> Vec<f32> {
    let (chunks, rest) = bytes.as_chunks::<4>();
    assert!(rest.is_empty(), "{} bytes are not f32 numbers", bytes.len());
    chunks.iter().copied().map(f32::from_le_bytes).collect()
}

/// How many steps lie between two positive numbers of type f32.
pub fn ulps(a: f32, b: f32) -> u32 {
    assert!(a >= 0.0 && b >= 0.0, "{a} and {b} are to be positive");
    a.to_bits().abs_diff(b.to_bits())
}

/// Distance from a positive number to the next larger one.
pub fn ulp(value: f32) -> f32 {
    value.next_up() - value
}
