//! Calls of the interfaces that have memory, files and 4-bit numbers.

use tightfit_wasm::wit::bindings::slicing::tightfit::host::slices;
use tightfit_wasm::wit::bindings::tightfit::host::types;
use tightfit_wasm::wit::program::CallError;
use tightfit_wasm::wit::program::bindings::tightfit::host::buffers::HostBuffer;
use tightfit_wasm::wit::program::bindings::tightfit::host::checkpoints::HostCheckpoint;
use tightfit_wasm::wit::program::bindings::tightfit::host::models::HostModel;
use tightfit_wasm::wit::program::bindings::tightfit::host::nf4::Host as _;
use tightfit_wasm::wit::program::bindings::tightfit::host::sliced_models;
use wasmtime::component::Resource;

use super::{Program, TENSORS, TOKENIZER};

impl Program<'_> {
    /// Calls of devices, buffers, `nf4`, checkpoints and models.
    pub(super) fn call_memory(&mut self, call: u8) {
        match call {
            0..=3 => {
                let (device, bytes) = (self.input.device(), self.input.number());
                let result = self.view().allocate(device, bytes);
                if let Some(buffer) = self.done(result) {
                    self.buffers.push(buffer.rep());
                }
            }
            4 => {
                let rep = self.buffer().rep();
                let result = HostBuffer::drop(&mut self.view(), Resource::new_own(rep));
                self.done(result.map_err(CallError::Trap));
                self.forget(rep);
            }
            5 | 6 => {
                let (buffer, offset) = (self.buffer(), self.input.number());
                let bytes = self.input.bytes();
                let result = self.view().write(buffer, offset, bytes);
                self.done(result);
            }
            7 => {
                let buffer = self.buffer();
                let (offset, bytes) = (self.input.number(), self.input.number());
                let result = self.view().read(buffer, offset, bytes);
                if let Some(read) = self.done(result) {
                    assert_eq!(read.len() as u64, bytes);
                }
            }
            8 => {
                let (to, from) = (self.buffer(), self.buffer());
                let [offset, start, bytes] = std::array::from_fn(|_| self.input.number());
                let result = self.view().copy_from(to, offset, from, start, bytes);
                self.done(result);
            }
            9 => {
                let (source, dtype, elements) =
                    (self.place(), self.input.dtype(), self.input.number());
                let (block, codes, absmax) = (self.input.block_size(), self.place(), self.place());
                let result = self
                    .view()
                    .quantize(source, dtype, elements, block, codes, absmax);
                self.done(result);
            }
            10 => {
                let bytes = self.input.bytes();
                let (dtype, block) = (self.input.dtype(), self.input.block_size());
                let (codes, absmax) = (self.place(), self.place());
                let result = self
                    .view()
                    .quantize_bytes(bytes, dtype, block, codes, absmax);
                self.done(result);
            }
            11 => {
                let (codes, absmax, elements) = (self.place(), self.place(), self.input.number());
                let (block, dtype) = (self.input.block_size(), self.input.dtype());
                let target = self.place();
                let kind = self.input.quant_type();
                let view = &mut self.view();
                let result = view.dequantize(kind, codes, absmax, elements, block, dtype, target);
                self.done(result);
            }
            12 => {
                let (absmax, count) = (self.place(), self.input.number());
                let (codes, nested) = (self.place(), self.place());
                let result = self.view().quantize_absmax(absmax, count, codes, nested);
                self.done(result);
            }
            13 => {
                let (codes, nested) = (self.place(), self.place());
                let mean = f32::from_bits(self.input.number() as u32);
                let (count, absmax) = (self.input.number(), self.place());
                let result = self
                    .view()
                    .dequantize_absmax(codes, nested, mean, count, absmax);
                self.done(result);
            }
            14 | 15 => {
                let name =
                    ["model", "model", "model", "/model"][usize::from(self.input.byte() % 4)];
                let result = self.view().open(name.to_owned());
                if let Some(open) = self.done(result) {
                    self.checkpoints.push(open.rep());
                }
            }
            16 => {
                let rep = self.checkpoint().rep();
                let result = HostCheckpoint::drop(&mut self.view(), Resource::new_own(rep));
                self.done(result.map_err(CallError::Trap));
                self.forget(rep);
            }
            17 => self.look_at_checkpoint(),
            18 => {
                let (open, tensor) = (self.checkpoint(), self.input.index());
                let (start, bytes) = (self.input.number(), self.input.number());
                let (buffer, offset) = (self.buffer(), self.input.number());
                let view = &mut self.view();
                let result = view.read_tensor(open, tensor, start, bytes, buffer, offset);
                self.done(result);
            }
            19 | 20 => self.load(),
            21 => {
                let rep = self.model().rep();
                let result = HostModel::drop(&mut self.view(), Resource::new_own(rep));
                self.done(result.map_err(CallError::Trap));
                self.forget(rep);
            }
            22 => {
                let (model, tensor) = (self.model(), self.input.index());
                let result = self.view().get_tensor(model, tensor);
                self.done(result);
                let model = self.model();
                let name = "lm_head.weight".to_owned();
                let result = HostModel::find(&mut self.view(), model, name);
                self.done(result.map_err(CallError::Trap));
            }
            23 => {
                let (model, tensor, part) = (self.model(), self.input.index(), self.input.part());
                let (start, bytes) = (self.input.number(), self.input.number());
                let result = self.view().read_part(model, tensor, part, start, bytes);
                if let Some(read) = self.done(result) {
                    assert_eq!(read.len() as u64, bytes);
                }
            }
            24 => {
                let (model, tensor, part) = (self.model(), self.input.index(), self.input.part());
                let (start, bytes) = (self.input.number(), self.input.number());
                let (buffer, offset) = (self.buffer(), self.input.number());
                let view = &mut self.view();
                let result = view.read_part_into(model, tensor, part, start, bytes, buffer, offset);
                self.done(result);
            }
            25 => {
                let (model, tensor) = (self.model(), self.input.index());
                let (first, count, to) =
                    (self.input.number(), self.input.number(), self.input.dtype());
                let result = self.view().read_elements(model, tensor, first, count, to);
                self.done(result);
            }
            _ => {
                let (model, tensor) = (self.model(), self.input.index());
                let (first, count, to) =
                    (self.input.number(), self.input.number(), self.input.dtype());
                let (buffer, offset) = (self.buffer(), self.input.number());
                let view = &mut self.view();
                let result =
                    view.read_elements_into(model, tensor, first, count, to, buffer, offset);
                self.done(result);
            }
        }
    }

    fn look_at_checkpoint(&mut self) {
        let rep = self.checkpoint().rep();
        let (first, count) = (self.input.index(), self.input.index());
        let open = || Resource::new_borrow(rep);
        let tensors = self.view().tensors(open(), first, count);
        let tensors = self.done(tensors.map_err(CallError::Trap));
        assert!(tensors.is_none_or(|tensors| tensors.len() <= count as usize));
        let ties = self.view().ties(open(), first, count);
        self.done(ties.map_err(CallError::Trap));
        let config = self.view().config_json(open());
        self.done(config.map_err(CallError::Trap));
    }

    /// Reads a file beside the weights, which is there or not, or is none that is read.
    pub(super) fn look_beside_weights(&mut self) {
        let name = ["tokenizer.json", "vocab.json", "config.json", ""];
        let name = name[usize::from(self.input.byte() % 4)];
        let open = self.checkpoint();
        let again = Resource::new_borrow(open.rep());
        let result = self.view().companion_bytes(open, name.to_owned());
        if let Some(bytes) = self.done(result) {
            let expected = (name == "tokenizer.json").then_some(TOKENIZER.len() as u64);
            assert_eq!(bytes, expected);
        }
        let (start, bytes) = (self.input.number(), self.input.number());
        let result = self
            .view()
            .read_companion(again, name.to_owned(), start, bytes);
        if let Some(read) = self.done(result) {
            assert_eq!(read, TOKENIZER[start as usize..][..bytes as usize]);
        }
    }

    pub(super) fn load_slices(&mut self) {
        let open = self.checkpoint();
        let slices = (0..self.input.byte() % 8).map(|_| slices::Slice {
            tensor: self.input.index(),
            dimension: u32::from(self.input.byte() % 4),
            ranges: (0..self.input.byte() % 4)
                .map(|_| slices::Range {
                    start: self.input.length().into(),
                    end: self.input.length().into(),
                })
                .collect(),
            placement: types::Placement {
                device: match self.input.byte() {
                    0..=20 => None,
                    250..=255 => Some(self.input.index()),
                    device => Some(u32::from(device % 2)),
                },
                format: self.input.format(),
            },
        });
        let slices = slices.collect();
        let nowhere = types::Placement {
            device: None,
            format: types::Format::Stored,
        };
        let placements = vec![nowhere; TENSORS];
        let headroom = vec![0, 0];
        let view = &mut self.view();
        let result = sliced_models::Host::load(view, open, placements, slices, headroom);
        if let Some(model) = self.done(result) {
            self.models.push(model.rep());
        }
    }

    fn load(&mut self) {
        let open = self.checkpoint();
        let placements = match self.input.byte() {
            // As many as there are tensors.
            0..=239 => TENSORS,
            other => usize::from(other - 240),
        };
        let placements = (0..placements)
            .map(|_| types::Placement {
                device: match self.input.byte() {
                    0..=50 => None,
                    250..=255 => Some(self.input.index()),
                    device => Some(u32::from(device % 2)),
                },
                format: self.input.format(),
            })
            .collect();
        let headroom = match self.input.byte() {
            0..=250 => vec![0, u64::from(self.input.byte())],
            _ => vec![self.input.number(); usize::from(self.input.byte() % 4)],
        };
        let result = self.view().load(open, placements, headroom);
        if let Some(model) = self.done(result) {
            self.models.push(model.rep());
        }
    }
}
