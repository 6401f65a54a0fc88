//! Calls of `transformer`, and of `output`.

use tightfit_wasm::wit::program::bindings::tightfit::host::buffers::Place;
use tightfit_wasm::wit::program::bindings::tightfit::host::output::Host as _;
use tightfit_wasm::wit::program::bindings::tightfit::host::transformer::{
    Activation, Cache, HeadNorms, Heads, Host as _, Norm, Parameter, Rotary, Visible,
};
use tightfit_wasm::wit::program::{CallError, ProgramCtxView};
use wasmtime::component::Resource;

use super::linear::float_bytes;
use super::written::Range;
use super::{Program, is_long};

/// The same place once more.
fn again(place: &Place) -> Place {
    Place {
        buffer: Resource::new_borrow(place.buffer.rep()),
        offset: place.offset,
    }
}

impl Program<'_> {
    fn parameter(&mut self) -> Parameter {
        Parameter {
            model: self.model(),
            tensor: self.input.index(),
        }
    }

    fn optional_place(&mut self) -> Option<Place> {
        self.input.flag().then(|| self.place())
    }

    fn heads(&mut self) -> Heads {
        let kv_heads = self.input.length();
        let kind = self.input.byte();
        Heads {
            float: self.input.dtype(),
            rows: self.input.length(),
            query_heads: match kind % 8 {
                7 => self.input.length(),
                group => kv_heads.wrapping_mul(1 + u32::from(group) % 4),
            },
            kv_heads,
            head_size: match kind {
                0..=223 => 8 << (kind / 8 % 4),
                _ => self.input.length(),
            },
        }
    }

    fn cache(&mut self) -> Cache {
        Cache {
            capacity: self.input.length(),
            keys: self.place(),
            values: self.place(),
        }
    }

    /// Calls, and checks that nothing but these ranges has changed, and nothing at all where the call is refused.
    fn computes(
        &mut self,
        written: &[Range],
        call: impl FnOnce(&mut ProgramCtxView<'_>) -> Result<(), CallError>,
    ) {
        let before = self.before();
        let result = call(&mut self.view());
        let is_done = self.done(result).is_some();
        self.check_written(before, if is_done { written } else { &[] });
    }

    pub(super) fn call_transformer(&mut self, call: u8) {
        match call {
            0 => {
                let (table, ids, rows, y) = (
                    self.parameter(),
                    self.place(),
                    self.input.length(),
                    self.place(),
                );
                // The table's rows have 32 numbers.
                let written = [Range::new(&y, &[rows.into(), 32], 4)];
                self.computes(&written, |view| view.gather(table, ids, rows, y));
            }
            1 => {
                let (weight, x, rows) = (self.parameter(), self.place(), self.input.length());
                let (bias, y) = (self.optional_place(), self.place());
                // At most 64 outputs of 32 inputs.
                if !is_long([rows.into(), 64, 32]) {
                    let written = [Range::new(&y, &[rows.into(), 64], 4)];
                    self.computes(&written, |view| view.dense(weight, x, rows, bias, y));
                }
            }
            2 => self.rms_norm(),
            3 => {
                let (float, elements) = (self.input.dtype(), self.elements());
                let (x, add) = (self.place(), self.place());
                let written = [Range::new(&x, &[elements], float_bytes(float))];
                self.computes(&written, |view| view.add(float, elements, x, add));
            }
            4 => {
                let activation = match self.input.byte() % 3 {
                    0 => Activation::Silu,
                    1 => Activation::Gelu,
                    _ => Activation::GeluTanh,
                };
                let (float, elements) = (self.input.dtype(), self.elements());
                let (gate, up, y) = (self.place(), self.place(), self.place());
                let written = [Range::new(&y, &[elements], float_bytes(float))];
                self.computes(&written, |view| {
                    view.gate(float, activation, elements, gate, up, y)
                });
            }
            5 => self.rotate(),
            6 => self.attend(),
            7 | 8 => self.choose(call == 7),
            9 => {
                let (float, rows, k) =
                    (self.input.dtype(), self.input.length(), self.input.length());
                let columns = self.input.length();
                let (x, weights, y) = (self.place(), self.place(), self.place());
                let written = [Range::new(
                    &y,
                    &[rows.into(), columns.into()],
                    float_bytes(float),
                )];
                self.computes(&written, |view| {
                    view.combine(float, rows, k, columns, x, weights, y)
                });
            }
            10 => {
                let device = self.input.device();
                let result = self.view().take_faults(device);
                self.done(result);
            }
            _ => self.say(),
        }
    }

    fn elements(&mut self) -> u64 {
        self.input.number()
    }

    fn rms_norm(&mut self) {
        let (float, rows, columns) = (self.input.dtype(), self.input.length(), self.input.length());
        let norm = Norm {
            float,
            rows,
            columns,
            eps: self.input.float(),
            weight_offset: self.input.float(),
            weight: self.place(),
        };
        let (x, add, y) = (self.place(), self.optional_place(), self.place());
        let all =
            |place: &Place| Range::new(place, &[rows.into(), columns.into()], float_bytes(float));
        let mut written = vec![all(&y)];
        written.extend(add.is_some().then(|| all(&x)));
        self.computes(&written, |view| view.rms_norm(norm, x, add, y));
    }

    fn rotate(&mut self) {
        let heads = self.heads();
        let norms = HeadNorms {
            eps: self.input.float(),
            weight_offset: self.input.float(),
            queries: self.optional_place(),
            keys: self.optional_place(),
        };
        let rotary = Rotary {
            dimensions: match self.input.byte() {
                kind @ 0..=199 => heads.head_size >> (kind % 3),
                _ => self.input.length(),
            },
            frequencies: self.place(),
            scaling: self.input.float(),
        };
        let [positions, queries, keys, values] = std::array::from_fn(|_| self.place());
        let cache = self.cache();
        let head = [u64::from(heads.head_size), float_bytes(heads.float)];
        let range = |place: &Place, rows: u32, count: u32| {
            Range::new(place, &[rows.into(), count.into(), head[0]], head[1])
        };
        let written = [
            range(&queries, heads.rows, heads.query_heads),
            range(&cache.keys, cache.capacity, heads.kv_heads),
            range(&cache.values, cache.capacity, heads.kv_heads),
        ];
        self.computes(&written, |view| {
            view.rotate(
                heads, norms, rotary, positions, queries, keys, values, cache,
            )
        });
    }

    fn attend(&mut self) {
        let (heads, cache, positions) = (self.heads(), self.cache(), self.place());
        let visible = match self.input.byte() % 4 {
            0 | 1 => Visible::Causal,
            2 => Visible::Window(self.input.length()),
            _ => Visible::First(self.input.length()),
        };
        let (most, scale) = (self.input.length(), self.input.float());
        let (queries, y) = (self.place(), self.place());
        let lengths = [heads.rows, heads.query_heads, heads.head_size].map(u64::from);
        if is_long(lengths.into_iter().chain([cache.capacity.into()])) {
            return;
        }
        let written = [Range::new(&y, &lengths, float_bytes(heads.float))];
        self.computes(&written, |view| {
            view.attend(heads, cache, positions, visible, most, scale, queries, y)
        });
    }

    /// The largest of all, or a router's choice: their numbers are numbers of what there is.
    fn choose(&mut self, routes: bool) {
        let (float, rows) = (self.input.dtype(), self.input.length());
        let (columns, k) = (self.input.length(), self.input.length());
        let normalize = self.input.flag();
        let (x, ids, values) = (self.place(), self.place(), self.place());
        let chosen = [rows.into(), k.into()];
        let written = [&ids, &values].map(|place| Range::new(place, &chosen, 4));
        let went_well = self.went_well.get();
        let found = again(&ids);
        self.computes(&written, |view| match routes {
            true => view.route(float, rows, columns, k, normalize, x, ids, values),
            false => view.top(float, rows, columns, k, x, ids, values),
        });
        if self.went_well.get() > went_well {
            let bytes = 4 * u64::from(rows) * u64::from(k);
            let found = self.read(&found, bytes);
            let (found, _) = found.as_chunks();
            let mut found = found.iter().map(|id| u32::from_le_bytes(*id));
            assert!(found.all(|id| id < columns));
        }
    }

    /// What is said comes out, if anybody listens.
    fn say(&mut self) {
        let text = match self.input.byte() {
            length @ 0..=199 => "ä".repeat(length.into()),
            _ => "x".repeat((self.input.number() % 70_000) as usize),
        };
        let result = self.view().write(text.clone());
        let is_done = self.done(result).is_some();
        assert_eq!(is_done, text.len() <= 64 << 10);
        if let Some(said) = &self.said {
            assert_eq!(said.try_recv().ok(), is_done.then_some(text));
        }
    }
}
