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
    /// Rows, their type, and whether their bits shall not depend on each other.
    pub product: Product,
    /// [rows, inputs], row-major.
    pub x: DeviceBytes,
    /// \[outputs\].
    pub bias: Option<DeviceBytes>,
    /// Gets [rows, outputs], row-major.
    pub y: DeviceBytes,
    /// To work in: [`super::Queue::workspace_bytes`], at a multiple of 256. Its first 16 KiB are zero before
    /// its first product, and again after each. `None` where none is needed.
    pub workspace: Option<DeviceBytes>,
}

/// A quantized matrix W [outputs, inputs], which begins with a block.
#[derive(Debug, Clone)]
pub struct QueuedWeights {
    /// The table of values.
    pub quant_type: QuantType,
    /// Elements that share a scale.
    pub block_size: BlockSize,
    /// Rows.
    pub outputs: usize,
    /// Columns.
    pub inputs: usize,
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
        let elements = self.outputs.saturating_mul(self.inputs);
        let blocks = blocks(elements, self.block_size);
        let mut operands = vec![O::read("codes", &self.codes, packed_bytes(elements), 1)];
        match &self.scales {
            QueuedScales::Absmax(absmax) => operands.push(O::read("absmax", absmax, blocks, 4)),
            QueuedScales::Double {
                codes,
                nested,
                mean,
                map,
            } => operands.extend([
                O::read("absmax", codes, blocks, 1),
                O::read(
                    "nested absmax",
                    nested,
                    blocks.div_ceil(NESTED_BLOCK_SIZE),
                    4,
                ),
                O::read("the mean", mean, 1, 4),
                O::read("the map", map, 256, 4),
            ]),
        }
        operands
    }
}

impl QueuedProduct {
    /// About as many bytes as could be moved while it is computed.
    pub(super) fn arithmetic(&self) -> u64 {
        let (outputs, inputs) = (self.weights.outputs as u64, self.weights.inputs as u64);
        let multiplications = outputs.saturating_mul(inputs);
        let multiplications = multiplications.saturating_mul(self.product.rows as u64);
        multiplications / MULTIPLICATIONS_OF_A_BYTE
    }

    pub(super) fn operands(&self) -> Vec<Operand<'_>> {
        use Operand as O;
        let Product { float, rows, .. } = self.product;
        let (outputs, inputs) = (self.weights.outputs, self.weights.inputs);
        let each = float.bytes();
        let mut operands = self.weights.operands();
        operands.push(O::read("x", &self.x, rows.saturating_mul(inputs), each));
        if let Some(bias) = &self.bias {
            operands.push(O::read("the bias", bias, outputs, each));
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
