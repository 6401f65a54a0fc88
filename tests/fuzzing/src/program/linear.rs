//! Calls of `linear`.

use tightfit_wasm::wit::bindings::tightfit::host::types::Dtype;
use tightfit_wasm::wit::program::bindings::tightfit::host::linear::{
    Host as _, HostWeight, Product, Rounding,
};
use tightfit_wasm::wit::program::{CallError, Weight};
use wasmtime::component::Resource;

use super::written::Range;
use super::{Kind, Program, is_long};

/// What a product that lies about nothing has: the lengths of a weight.
const USUAL: [&[u64]; 6] = [
    &[16, 64],
    &[3, 32],
    &[4, 8, 32],
    &[2, 17, 64],
    &[1, 16],
    &[64, 96],
];

pub(super) fn float_bytes(float: Dtype) -> u64 {
    match float {
        Dtype::F32 => 4,
        Dtype::F16 | Dtype::Bf16 => 2,
        // Refused.
        _ => 0,
    }
}

impl Program<'_> {
    fn weight(&mut self) -> Resource<Weight> {
        Resource::new_borrow(self.pick(Kind::Weight))
    }

    pub(super) fn call_linear(&mut self, call: u8) {
        match call {
            0 => {
                let (model, tensor) = (self.model(), self.input.index());
                let result = self.view().of(model, tensor);
                if let Some(weight) = self.done(result) {
                    self.weights.push(weight.rep());
                }
            }
            1 => self.weight_from_codes(),
            2..=4 => self.multiply(),
            5 => self.look_at_weight(),
            6 => {
                let rep = self.weight().rep();
                let result = HostWeight::drop(&mut self.view(), Resource::new_own(rep));
                self.done(result.map_err(CallError::Trap));
                self.forget(rep);
            }
            _ => {
                let result = self.view().finish();
                self.done(result);
            }
        }
    }

    fn weight_from_codes(&mut self) {
        let shape: Vec<u64> = match self.input.byte() {
            kind @ 0..=199 => USUAL[usize::from(kind) % USUAL.len()].to_vec(),
            kind => (0..kind % 5).map(|_| self.input.length().into()).collect(),
        };
        let (block, quant_type) = (self.input.block_size(), self.input.quant_type());
        let (codes, absmax) = (self.place(), self.place());
        let before = self.before();
        let view = &mut self.view();
        let result = view.from_codes(quant_type, shape.clone(), block, codes, absmax);
        self.check_written(before, &[]);
        if let Some(weight) = self.done(result) {
            let handle = || Resource::new_borrow(weight.rep());
            assert_eq!(
                HostWeight::shape(&mut self.view(), handle()).unwrap(),
                shape
            );
            self.weights.push(weight.rep());
        }
    }

    /// One that has what its weight says, unless the input will have it otherwise.
    fn product(&mut self) -> Product {
        let weight = self.weight();
        let (input, rows, float) = (self.place(), self.input.length(), self.input.dtype());
        let output = self.place();
        let more = self.input.byte();
        let has_experts = self.shape_of(&weight).len() == 3;
        let names_experts = has_experts != (more & 8 != 0 && more & 16 != 0);
        Product {
            input,
            rows,
            float,
            bias: (more & 1 != 0).then(|| self.place()),
            output,
            experts: names_experts.then(|| self.place()),
            rounding: match more & 4 {
                0 => Rounding::Fastest,
                _ => Rounding::ByRow,
            },
            weight,
        }
    }

    /// The lengths of a weight; none of a forged one.
    fn shape_of(&mut self, weight: &Resource<Weight>) -> Vec<u64> {
        let handle = Resource::new_borrow(weight.rep());
        HostWeight::shape(&mut self.view(), handle).unwrap_or_default()
    }

    fn multiply(&mut self) {
        let count = match self.input.byte() {
            kind @ 0..=249 => kind % 4,
            kind => kind,
        };
        let mut products = Vec::new();
        let mut written = Vec::new();
        for _ in 0..count {
            if self.input.0.is_empty() {
                break;
            }
            let product = self.product();
            let shape = self.shape_of(&product.weight);
            let outputs = shape.iter().rev().nth(1).copied().unwrap_or(0);
            let lengths = [product.rows.into(), outputs];
            if is_long(lengths.into_iter().chain(shape.last().copied())) {
                return;
            }
            written.push(Range::new(
                &product.output,
                &lengths,
                float_bytes(product.float),
            ));
            products.push(product);
        }
        let before = self.before();
        let result = self.view().multiply(products);
        if self.done(result).is_none() {
            // All of them are looked at before the first one.
            written.clear();
        }
        self.check_written(before, &written);
    }

    fn look_at_weight(&mut self) {
        let (rep, rows) = (self.weight().rep(), self.input.length());
        let weight = || Resource::new_borrow(rep);
        let result = HostWeight::shape(&mut self.view(), weight());
        if let Some(shape) = self.done(result.map_err(CallError::Trap)) {
            assert!(matches!(shape.len(), 2 | 3) && !shape.contains(&0));
        }
        let result = HostWeight::device(&mut self.view(), weight());
        let device = self.done(result.map_err(CallError::Trap));
        assert!(device.is_none_or(|device| device < 2));
        let result = self.view().scratch_bytes(weight(), rows);
        self.done(result.map_err(CallError::Trap));
    }
}
