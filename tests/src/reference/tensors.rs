//! Matrices, and the weights of a model by name.

use tightfit::model::Model;
use tightfit::products::LinearError;
use tightfit_kernels::{Activation, FloatType};

use crate::tensors::floats;

/// Numbers in rows: activations as tokens by features, weights as outputs by inputs.
#[derive(Debug, Clone, PartialEq)]
pub struct Matrix {
    /// Length of a row.
    pub columns: usize,
    /// Row-major.
    pub data: Vec<f32>,
}

impl Matrix {
    /// All zeros.
    pub fn zeros(rows: usize, columns: usize) -> Matrix {
        Matrix {
            columns,
            data: vec![0.0; rows * columns],
        }
    }

    /// One row for each item.
    pub fn from_rows(columns: usize, rows: impl IntoIterator<Item = Vec<f32>>) -> Matrix {
        let mut data = Vec::new();
        for row in rows {
            assert_eq!(row.len(), columns, "every row is of one length");
            data.extend(row);
        }
        Matrix { columns, data }
    }

    /// Every row.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = &[f32]> {
        self.data.chunks_exact(self.columns)
    }

    /// Every row, to be changed.
    pub fn rows_mut(&mut self) -> impl ExactSizeIterator<Item = &mut [f32]> {
        self.data.chunks_exact_mut(self.columns)
    }

    /// One row.
    pub fn row(&self, index: usize) -> &[f32] {
        &self.data[index * self.columns..][..self.columns]
    }

    /// One row, to be changed.
    pub fn row_mut(&mut self, index: usize) -> &mut [f32] {
        &mut self.data[index * self.columns..][..self.columns]
    }

    /// The product of this matrix and a vector.
    pub fn apply(&self, input: &[f32]) -> Vec<f32> {
        assert_eq!(input.len(), self.columns, "the inputs are a row long");
        self.rows().map(|row| dot(row, input)).collect()
    }

    /// Adds a matrix of the same shape.
    pub fn add(&mut self, other: &Matrix) {
        assert_eq!(self.data.len(), other.data.len(), "both are of one shape");
        add_scaled(&mut self.data, 1.0, &other.data);
    }
}

/// Sum of the products.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Adds `factor * addend` to `sum`.
pub(super) fn add_scaled(sum: &mut [f32], factor: f32, addend: &[f32]) {
    for (sum, addend) in sum.iter_mut().zip(addend) {
        *sum += factor * addend;
    }
}

/// A weight as numbers, whatever it is stored as.
#[derive(Debug, Clone, PartialEq)]
pub struct Weight {
    /// Row-major.
    pub shape: Vec<usize>,
    /// The elements.
    pub data: Vec<f32>,
}

/// Where weights come from.
pub trait Weights {
    /// The weight of this name, if there is one.
    fn find(&self, name: &str) -> Option<Weight>;

    /// Whether [`Weights::product`] multiplies with the weight of this name as it is stored.
    fn multiplies(&self, name: &str) -> bool {
        let _ = name;
        false
    }

    /// Every row of `inputs` times a weight, or one of a stack, without its numbers being looked at.
    fn product(&self, name: &str, index: Option<u64>, inputs: &Matrix) -> Matrix {
        let _ = (index, inputs);
        panic!("{name} is multiplied by its numbers");
    }

    /// What a layer of experts makes of every row of `inputs`, where it is computed as a whole.
    fn experts(&self, module: &str, inputs: &Matrix, choices: &Choices) -> Option<Matrix> {
        let _ = (module, inputs, choices);
        None
    }
}

/// Which experts each token goes to, and how much each of them counts; each token has as many.
#[derive(Debug, Clone, PartialEq)]
pub struct Choices {
    /// Experts of a token.
    pub of_token: usize,
    /// [tokens, of_token].
    pub ids: Vec<i32>,
    /// [tokens, of_token].
    pub weights: Vec<f32>,
}

/// A loaded model. Weights in 4 bits are multiplied as they lie; others, and where a table is looked up in,
/// are made f32 and not rounded to bf16 on the way.
impl Weights for Model {
    fn find(&self, name: &str) -> Option<Weight> {
        let tensor = self.tensor(name)?;
        let bytes = tensor
            .to_float(FloatType::F32)
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let length = |&length: &u64| usize::try_from(length).expect("it is in memory");
        Some(Weight {
            shape: tensor.shape().iter().map(length).collect(),
            data: floats(&bytes),
        })
    }

    fn multiplies(&self, name: &str) -> bool {
        let tensor = self.tensor(name);
        tensor.is_some_and(|tensor| tensor.quantization().is_some())
    }

    fn product(&self, name: &str, index: Option<u64>, inputs: &Matrix) -> Matrix {
        let linear = match index {
            None => self.linear(name),
            Some(index) => self.linear_of(name, index),
        };
        let linear = linear.unwrap_or_else(|error| panic!("{error}"));
        let rows = inputs.rows().len();
        let mut outputs = Matrix::zeros(rows, linear.outputs());
        linear
            .forward(&inputs.data, rows, None, &mut outputs.data)
            .unwrap_or_else(|error| panic!("{error}"));
        outputs
    }

    fn experts(&self, module: &str, inputs: &Matrix, choices: &Choices) -> Option<Matrix> {
        let layer = match self.experts(module, Activation::Silu) {
            Ok(layer) => layer,
            // Of these single experts are multiplied, or their numbers.
            Err(
                LinearError::NotFourBit { .. }
                | LinearError::NotStacked { .. }
                | LinearError::NoExperts { .. },
            ) => return None,
            Err(error) => panic!("{error}"),
        };
        let mut outputs = Matrix::zeros(inputs.rows().len(), inputs.columns);
        let choices = tightfit_kernels::Choices {
            of_token: choices.of_token,
            ids: &choices.ids,
            weights: &choices.weights,
        };
        layer
            .forward(&inputs.data, &choices, None, None, &mut outputs.data)
            .unwrap_or_else(|error| panic!("{error}"));
        Some(outputs)
    }
}

/// A weight to multiply with: as numbers, or as it is stored.
pub(super) enum Layer<'w> {
    Numbers(Matrix),
    Stored {
        weights: &'w dyn Weights,
        name: String,
        index: Option<u64>,
    },
}

impl Layer<'_> {
    /// The product of the weight and every row.
    pub(super) fn apply_to_rows(&self, inputs: &Matrix) -> Matrix {
        match self {
            Layer::Numbers(weight) => Matrix::from_rows(
                weight.data.len() / weight.columns,
                inputs.rows().map(|row| weight.apply(row)),
            ),
            Layer::Stored {
                weights,
                name,
                index,
            } => weights.product(name, *index, inputs),
        }
    }

    /// The product of the weight and a vector.
    pub(super) fn apply(&self, input: &[f32]) -> Vec<f32> {
        let input = Matrix {
            columns: input.len(),
            data: input.to_vec(),
        };
        self.apply_to_rows(&input).data
    }
}

impl dyn Weights + '_ {
    fn get(&self, name: &str) -> Weight {
        self.find(name)
            .unwrap_or_else(|| panic!("the model has no {name}"))
    }

    /// A weight of one dimension.
    pub(super) fn vector(&self, name: &str) -> Vec<f32> {
        let weight = self.get(name);
        assert_eq!(weight.shape.len(), 1, "{name} is {:?}", weight.shape);
        weight.data
    }

    /// A weight of two dimensions.
    pub(super) fn matrix(&self, name: &str) -> Matrix {
        let Weight { shape, data } = self.get(name);
        let [_, columns] = shape[..] else {
            panic!("{name} is {shape:?}");
        };
        Matrix { columns, data }
    }

    /// A weight of two dimensions to multiply with.
    pub(super) fn layer(&self, name: &str) -> Layer<'_> {
        match self.multiplies(name) {
            true => Layer::Stored {
                weights: self,
                name: name.to_owned(),
                index: None,
            },
            false => Layer::Numbers(self.matrix(name)),
        }
    }

    /// A weight of three dimensions, as one matrix for each index of the first; `None` where there
    /// is no such weight.
    pub(super) fn stack(&self, name: &str) -> Option<Vec<Matrix>> {
        let Weight { shape, data } = self.find(name)?;
        let [_, rows, columns] = shape[..] else {
            panic!("{name} is {shape:?}");
        };
        let matrix = |data: &[f32]| Matrix {
            columns,
            data: data.to_vec(),
        };
        Some(data.chunks_exact(rows * columns).map(matrix).collect())
    }

    /// The same to multiply with.
    pub(super) fn layers(&self, name: &str) -> Option<Vec<Layer<'_>>> {
        let layer = |(index, matrix)| match self.multiplies(name) {
            true => Layer::Stored {
                weights: self,
                name: name.to_owned(),
                index: Some(index as u64),
            },
            false => Layer::Numbers(matrix),
        };
        Some(
            self.stack(name)?
                .into_iter()
                .enumerate()
                .map(layer)
                .collect(),
        )
    }

    /// What a linear layer makes of every row: its weight times the row, and its bias, if it has
    /// one, added.
    pub(super) fn linear(&self, module: &str, inputs: &Matrix) -> Matrix {
        let weight = self.layer(&format!("{module}.weight"));
        let bias = self.find(&format!("{module}.bias"));
        let mut outputs = weight.apply_to_rows(inputs);
        if let Some(bias) = bias {
            for row in outputs.rows_mut() {
                add_scaled(row, 1.0, &bias.data);
            }
        }
        outputs
    }
}
