//! What a fuzzer's bytes mean.

use tightfit_wasm::wit::bindings::tightfit::host::types;
use tightfit_wasm::wit::program::bindings::tightfit::host::models::PartKind;

/// What is left of the input. Where there is nothing, it is zeros.
pub(super) struct Input<'a>(pub(super) &'a [u8]);

impl Input<'_> {
    pub(super) fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        first
    }

    /// Mostly something that makes sense, now and then an edge, now and then anything.
    pub(super) fn number(&mut self) -> u64 {
        match self.byte() {
            kind @ 0..=127 => u64::from(kind),
            128..=199 => u64::from(u16::from_le_bytes([self.byte(), self.byte()])),
            200..=219 => u64::MAX - u64::from(self.byte()),
            220..=239 => 1 << (self.byte() % 64),
            240..=255 => u64::from_le_bytes(std::array::from_fn(|_| self.byte())),
        }
    }

    pub(super) fn index(&mut self) -> u32 {
        match self.byte() {
            kind @ 0..=249 => u32::from(kind % 8),
            _ => self.number() as u32,
        }
    }

    /// Of two that there are, mostly the first, so that what belongs together is often on one.
    pub(super) fn device(&mut self) -> u32 {
        match self.byte() {
            0..=219 => 0,
            220..=249 => 1,
            _ => self.number() as u32,
        }
    }

    /// A length of a matrix, mostly one that others have too.
    pub(super) fn length(&mut self) -> u32 {
        const LENGTHS: [u32; 12] = [1, 2, 3, 4, 8, 16, 17, 32, 33, 64, 5, 0];
        match self.byte() {
            kind @ 0..=239 => LENGTHS[usize::from(kind) % LENGTHS.len()],
            _ => self.number() as u32,
        }
    }

    /// Where in a buffer something begins: mostly where anything may.
    pub(super) fn offset(&mut self) -> u64 {
        match self.byte() {
            0..=127 => 0,
            kind @ 128..=223 => 16 * u64::from(kind - 128),
            kind @ 224..=243 => u64::from(kind - 224),
            _ => self.number(),
        }
    }

    pub(super) fn flag(&mut self) -> bool {
        self.byte() % 2 == 1
    }

    pub(super) fn float(&mut self) -> f32 {
        match self.byte() {
            kind @ 0..=199 => f32::from(kind) / 16.0,
            _ => f32::from_bits(self.number() as u32),
        }
    }

    pub(super) fn dtype(&mut self) -> types::Dtype {
        match self.byte() % 8 {
            0..=2 => types::Dtype::F32,
            3 | 4 => types::Dtype::F16,
            5 | 6 => types::Dtype::Bf16,
            _ => types::Dtype::I64,
        }
    }

    pub(super) fn block_size(&mut self) -> u32 {
        match self.byte() {
            kind @ 0..=239 => 32 << (kind % 8),
            _ => self.number() as u32,
        }
    }

    pub(super) fn quant_type(&mut self) -> types::QuantType {
        match self.flag() {
            true => types::QuantType::Fp4,
            false => types::QuantType::Nf4,
        }
    }

    pub(super) fn format(&mut self) -> types::Format {
        match self.byte() % 8 {
            0 => types::Format::Cast(self.dtype()),
            1..=3 => types::Format::Stored,
            kind => types::Format::Nf4(types::Nf4Format {
                block_size: self.block_size(),
                double_quantized: kind % 2 == 0,
            }),
        }
    }

    pub(super) fn part(&mut self) -> PartKind {
        match self.byte() % 4 {
            0 => PartKind::Data,
            1 => PartKind::Codes,
            2 => PartKind::Absmax,
            _ => PartKind::NestedAbsmax,
        }
    }

    /// Bytes that a program writes: of one value, or of numbers as ids and positions are, or as values are.
    pub(super) fn bytes(&mut self) -> Vec<u8> {
        let (kind, value) = (self.byte() % 3, self.byte());
        let count = self.number() % 70_000;
        match kind {
            0 => vec![value; count as usize],
            1 => {
                let number = |i: u64| ((i * 7) % (u64::from(value) + 1)) as u32;
                (0..count / 4)
                    .flat_map(|i| number(i).to_le_bytes())
                    .collect()
            }
            _ => {
                let number = |i: u64| ((i * 31 + u64::from(value)) % 127) as f32 / 64.0 - 1.0;
                (0..count / 4)
                    .flat_map(|i| number(i).to_le_bytes())
                    .collect()
            }
        }
    }
}
