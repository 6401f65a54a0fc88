//! Products in a queue.

use tightfit_kernels::{BlockSize, NESTED_BLOCK_SIZE, QuantType, blocks, packed_bytes};

use super::operation::Operand;
use crate::device::{DeviceBytes, Product};

/// Multiplications that take as long as moving a byte, about, on a GPU without fast ones.
const MULTIPLICATIONS_OF_A_BYTE: u64 = 16;

/// `y = x * transpose(W) + bias`, of ranges of a device's memory.
#[derive(Debug, Clone)]
pub struct QueuedProduct {
    /// W.
    pub weights: QueuedWeights,
    /// Rows, their type, and whether their bits shall not depend on each other. Not transposed.
    pub product: Product,
    /// [rows, inputs], row-major.
    pub x: DeviceBytes,
    /// For a weight with experts, the number of an expert for each row, as u32. The y of a row whose number
    /// is none is left as it is. Rows with experts never depend on each other.
    pub experts: Option<DeviceBytes>,
    /// \[outputs\], or [experts, outputs].
    pub bias: Option<DeviceBytes>,
    /// Gets [rows, outputs], row-major.
    pub y: DeviceBytes,
    /// To work in: [`super::Queue::workspace_bytes`], at a multiple of 256. Its first 16 KiB are zero before
    /// its first product, and again after each. `None` where none is needed.
    pub workspace: Option<DeviceBytes>,
}

/// The lengths of a matrix, or of a stack of them for experts, in one piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MatrixShape {
    /// Matrices of a stack.
    pub experts: Option<usize>,
    /// Rows of a matrix.
    pub outputs: usize,
    /// Columns.
    pub inputs: usize,
    /// Elements that share a scale.
    pub block_size: BlockSize,
}

impl MatrixShape {
    /// Rows of all matrices.
    pub fn all_outputs(&self) -> usize {
        self.outputs.saturating_mul(self.experts.unwrap_or(1))
    }

    /// Elements of all matrices.
    pub fn elements(&self) -> usize {
        self.all_outputs().saturating_mul(self.inputs)
    }
}

/// A quantized matrix W [outputs, inputs], or a stack [experts, outputs, inputs], which begins with a block.
#[derive(Debug, Clone)]
pub struct QueuedWeights {
    /// The table of values.
    pub quant_type: QuantType,
    /// Its lengths.
    pub shape: MatrixShape,
    /// Two codes a byte.
    pub codes: DeviceBytes,
    /// Scales of the blocks.
    pub scales: QueuedScales,
}

/// Scales of a matrix in a device's memory.
#[derive(Debug, Clone)]
pub enum QueuedScales {
    /// An f32 for each block.
    Absmax(DeviceBytes),
    /// Under double quantization.
    Double {
        /// A byte for each block.
        codes: DeviceBytes,
        /// An f32 for every 256 of them, rounded up.
        nested: DeviceBytes,
        /// Their mean, as f32.
        mean: DeviceBytes,
        /// The values of the codes, 256 of f32.
        map: DeviceBytes,
    },
}

impl QueuedWeights {
    fn operands(&self) -> Vec<Operand<'_>> {
        use Operand as O;
        let elements = self.shape.elements();
        let blocks = blocks(elements, self.shape.block_size);
        let mut operands = vec![O::weight("codes", &self.codes, packed_bytes(elements), 1)];
        match &self.scales {
            QueuedScales::Absmax(absmax) => operands.push(O::weight("absmax", absmax, blocks, 4)),
            QueuedScales::Double {
                codes,
                nested,
                mean,
                map,
            } => operands.extend([
                O::weight("absmax", codes, blocks, 1),
                O::weight(
                    "nested absmax",
                    nested,
                    blocks.div_ceil(NESTED_BLOCK_SIZE),
                    4,
                ),
                O::weight("the mean", mean, 1, 4),
                O::weight("the map", map, 256, 4),
            ]),
        }
        operands
    }
}

impl QueuedProduct {
    /// About as many bytes as could be moved while it is computed.
    pub(super) fn arithmetic(&self) -> u64 {
        let MatrixShape {
            outputs, inputs, ..
        } = self.weights.shape;
        let multiplications = (outputs as u64).saturating_mul(inputs as u64);
        let multiplications = multiplications.saturating_mul(self.product.rows as u64);
        multiplications / MULTIPLICATIONS_OF_A_BYTE
    }

    /// What is wrong with what is there and what is not.
    pub(super) fn check(&self) -> Result<(), String> {
        if self.product.transposed {
            return Err("a queue has no products with transposed weights".to_owned());
        }
        match (self.weights.shape.experts, &self.experts) {
            (Some(_), None) => Err("there are no experts of rows for a stack".to_owned()),
            (None, Some(_)) => Err("there are experts of rows for one matrix".to_owned()),
            _ => Ok(()),
        }
    }

    pub(super) fn operands(&self) -> Vec<Operand<'_>> {
        use Operand as O;
        let Product { float, rows, .. } = self.product;
        let MatrixShape {
            outputs, inputs, ..
        } = self.weights.shape;
        let each = float.bytes();
        let mut operands = self.weights.operands();
        operands.push(O::read("x", &self.x, rows.saturating_mul(inputs), each));
        if let Some(bias) = &self.bias {
            let count = self.weights.shape.all_outputs();
            operands.push(O::read("the bias", bias, count, each));
        }
        if let Some(experts) = &self.experts {
            operands.push(O::read("experts", experts, rows, 4));
        }
        operands.push(O::written("y", &self.y, rows.saturating_mul(outputs), each));
        if let Some(workspace) = &self.workspace {
            operands.push(Operand {
                align: 256,
                ..O::written("the workspace", workspace, workspace.bytes() as usize, 1)
            });
        }
        operands
    }
}
