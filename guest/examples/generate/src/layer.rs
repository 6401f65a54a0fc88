//! One layer of a decoder.

use tightfit_program::transformer::{
    Activation, Cache, HeadNorms, Heads, Norm, Rotary, Visible, attend, combine, dense, gate,
    rms_norm, rotate, route,
};
use tightfit_program::{Buffer, Dtype, GaveUp, Place, Product, Rounding, Weight, multiply};

use crate::config::{Config, Experts};
use crate::decoder::Activations;
use crate::load::{Loaded, bytes_of};

/// A matrix in 4 bits with its bias, if it has one.
pub(crate) struct Linear {
    weight: Weight,
    bias: Option<Buffer>,
    pub(crate) outputs: usize,
}

impl Linear {
    fn load(model: &Loaded, name: &str) -> Result<Linear, GaveUp> {
        let weight = model.weight(&format!("{name}.weight"))?;
        let outputs = weight.shape()[0] as usize;
        let bias = format!("{name}.bias");
        Ok(Linear {
            bias: match model.has(&bias) {
                true => Some(model.vector(&bias, outputs)?),
                false => None,
            },
            weight,
            outputs,
        })
    }

    fn product<'a>(&'a self, x: &'a Buffer, rows: u32, float: Dtype, y: &'a Buffer) -> Product<'a> {
        Product {
            weight: &self.weight,
            input: begin(x),
            rows,
            float,
            bias: self.bias.as_ref().map(begin),
            output: begin(y),
            experts: None,
            rounding: Rounding::Fastest,
        }
    }
}

pub(crate) fn begin(buffer: &Buffer) -> Place<'_> {
    Place { buffer, offset: 0 }
}

enum Mlp {
    Dense {
        gate: Linear,
        up: Linear,
        down: Linear,
    },
    /// `[experts, out, in]` each, and the name of the router.
    Experts {
        gate: Weight,
        up: Weight,
        down: Weight,
        router: String,
        count: usize,
    },
}

pub(crate) struct Layer {
    norms: [Buffer; 2],
    queries: Linear,
    keys: Linear,
    values: Linear,
    output: Linear,
    head_norms: [Option<Buffer>; 2],
    mlp: Mlp,
    cache: [Buffer; 2],
    window: Option<u32>,
}

impl Layer {
    pub(crate) fn load(
        model: &mut Loaded,
        config: &Config,
        number: usize,
        device: u32,
        float: Dtype,
        context: usize,
    ) -> Result<Layer, GaveUp> {
        let name = |part: &str| format!("model.layers.{number}.{part}");
        let attention = |part: &str| Linear::load(model, &name(&format!("self_attn.{part}_proj")));
        let [queries, keys, values, output] = [
            attention("q")?,
            attention("k")?,
            attention("v")?,
            attention("o")?,
        ];
        let (of_queries, of_keys) = (config.heads * config.head, config.kv_heads * config.head);
        for (linear, need) in [
            (&queries, of_queries),
            (&keys, of_keys),
            (&values, of_keys),
            (&output, config.hidden),
        ] {
            if linear.outputs != need {
                return Err(format!(
                    "a projection of layer {number} has {} outputs, not {need}",
                    linear.outputs
                )
                .into());
            }
        }
        let head_norm = |part: &str| {
            let name = name(&format!("self_attn.{part}_norm.weight"));
            match model.has(&name) {
                true => model.vector(&name, config.head).map(Some),
                false => Ok(None),
            }
        };
        let bytes = (context * of_keys * bytes_of(float)) as u64;
        Ok(Layer {
            norms: [
                model.vector(&name("input_layernorm.weight"), config.hidden)?,
                model.vector(&name("post_attention_layernorm.weight"), config.hidden)?,
            ],
            head_norms: [head_norm("q")?, head_norm("k")?],
            cache: [
                Buffer::allocate(device, bytes)?,
                Buffer::allocate(device, bytes)?,
            ],
            window: config.windows[number],
            mlp: Mlp::load(model, number)?,
            queries,
            keys,
            values,
            output,
        })
    }

    /// The width of what lies between the matrices of the feed-forward network.
    pub(crate) fn intermediate(&self) -> usize {
        match &self.mlp {
            Mlp::Dense { gate, .. } => gate.outputs,
            Mlp::Experts { gate, .. } => gate.shape()[1] as usize,
        }
    }

    pub(crate) fn experts(&self) -> usize {
        match &self.mlp {
            Mlp::Dense { .. } => 0,
            Mlp::Experts { count, .. } => *count,
        }
    }

    pub(crate) fn cache_bytes(&self) -> u64 {
        self.cache.iter().map(Buffer::length).sum()
    }

    /// Queues the layer for some rows from a position on. What comes in is `hidden`, and `more` unless it is the
    /// first layer; what goes out is `hidden` and `more`.
    pub(crate) fn forward(
        &self,
        model: &Loaded,
        config: &Config,
        on: &Activations,
        position: usize,
        rows: usize,
        is_first: bool,
    ) -> Result<(), GaveUp> {
        let (float, count) = (on.float, rows as u32);
        let norm = |weight| Norm {
            float,
            rows: count,
            columns: config.hidden as u32,
            eps: config.eps,
            weight_offset: 0.0,
            weight: begin(weight),
        };
        let more = (!is_first).then(|| begin(&on.more));
        let (hidden, normed) = (begin(&on.hidden), begin(&on.normed));
        rms_norm(&norm(&self.norms[0]), &hidden, more.as_ref(), &normed)?;
        multiply(&[
            self.queries.product(&on.normed, count, float, &on.queries),
            self.keys.product(&on.normed, count, float, &on.keys),
            self.values.product(&on.normed, count, float, &on.values),
        ])?;
        let heads = Heads {
            float,
            rows: count,
            query_heads: config.heads as u32,
            kv_heads: config.kv_heads as u32,
            head_size: config.head as u32,
        };
        let cache = || Cache {
            capacity: on.context as u32,
            keys: begin(&self.cache[0]),
            values: begin(&self.cache[1]),
        };
        let positions = || Place {
            buffer: &on.positions,
            offset: 4 * position as u64,
        };
        let [of_queries, of_keys] = &self.head_norms;
        let norms = HeadNorms {
            eps: config.eps,
            weight_offset: 0.0,
            queries: of_queries.as_ref().map(begin),
            keys: of_keys.as_ref().map(begin),
        };
        let rotary = Rotary {
            dimensions: 2 * config.frequencies.len() as u32,
            frequencies: begin(&on.frequencies),
            scaling: config.scaling,
        };
        let (queries, keys, values) = (begin(&on.queries), begin(&on.keys), begin(&on.values));
        rotate(
            heads,
            &norms,
            &rotary,
            &positions(),
            &queries,
            &keys,
            &values,
            &cache(),
        )?;
        let visible = match self.window {
            Some(window) => Visible::Window(window),
            None => Visible::Causal,
        };
        let scale = 1.0 / (config.head as f32).sqrt();
        let most = (position + rows) as u32;
        let (queries, mixed) = (begin(&on.queries), begin(&on.mixed));
        attend(
            heads,
            &cache(),
            &positions(),
            visible,
            most,
            scale,
            &queries,
            &mixed,
        )?;
        multiply(&[self.output.product(&on.mixed, count, float, &on.more)])?;
        let more = begin(&on.more);
        rms_norm(&norm(&self.norms[1]), &hidden, Some(&more), &normed)?;
        self.mlp.forward(model, config, on, rows)
    }
}

impl Mlp {
    fn load(model: &mut Loaded, number: usize) -> Result<Mlp, GaveUp> {
        let name = |part: &str| format!("model.layers.{number}.{part}");
        let routers = ["mlp.gate", "block_sparse_moe.gate"];
        let router = routers.map(|router| name(&format!("{router}.weight")));
        let Some(router) = router.into_iter().find(|router| model.has(router)) else {
            let linear = |part: &str| Linear::load(model, &name(&format!("mlp.{part}_proj")));
            return Ok(Mlp::Dense {
                gate: linear("gate")?,
                up: linear("up")?,
                down: linear("down")?,
            });
        };
        let count = model.shape(&router)?[0] as usize;
        let mut stack = |part: &str| {
            let stack = model.take_stack(&format!("{number}.{part}"));
            let stack = stack.filter(|stack| stack.shape()[0] == count as u64);
            stack.ok_or_else(|| format!("layer {number} has not all of its {count} experts"))
        };
        Ok(Mlp::Experts {
            gate: stack("gate")?,
            up: stack("up")?,
            down: stack("down")?,
            router,
            count,
        })
    }

    /// From `normed` to `more`.
    fn forward(
        &self,
        model: &Loaded,
        config: &Config,
        on: &Activations,
        rows: usize,
    ) -> Result<(), GaveUp> {
        let (float, count) = (on.float, rows as u32);
        match (self, &config.experts) {
            (
                Mlp::Experts {
                    gate,
                    up,
                    down,
                    router,
                    count,
                },
                Some(experts),
            ) => {
                let stacks = [gate, up, down];
                forward_experts(model, config, on, rows, stacks, router, *count, experts)
            }
            (Mlp::Experts { .. }, None) => Err("config.json says nothing of experts".into()),
            (
                Mlp::Dense {
                    gate: of_gate,
                    up,
                    down,
                },
                _,
            ) => {
                multiply(&[
                    of_gate.product(&on.normed, count, float, &on.gates),
                    up.product(&on.normed, count, float, &on.ups),
                ])?;
                let elements = (rows * of_gate.outputs) as u64;
                let (gates, ups) = (begin(&on.gates), begin(&on.ups));
                gate(
                    float,
                    Activation::Silu,
                    elements,
                    &gates,
                    &ups,
                    &begin(&on.inner),
                )?;
                multiply(&[down.product(&on.inner, count, float, &on.more)])?;
                Ok(())
            }
        }
    }
}

#[expect(clippy::too_many_arguments, reason = "each is something else")]
fn forward_experts(
    model: &Loaded,
    config: &Config,
    on: &Activations,
    rows: usize,
    [of_gate, up, down]: [&Weight; 3],
    router: &str,
    count: usize,
    experts: &Experts,
) -> Result<(), GaveUp> {
    let float = on.float;
    let (chosen, hidden) = (experts.chosen, config.hidden);
    let between = of_gate.shape()[1] as usize;
    let normed = begin(&on.normed);
    let router = model.parameter(router)?;
    dense(&router, &normed, rows as u32, None, &begin(&on.scores))?;
    let (scores, ids) = (begin(&on.scores), begin(&on.expert_ids));
    let weights = begin(&on.expert_weights);
    let normalize = experts.normalize;
    route(
        float,
        rows as u32,
        count as u32,
        chosen as u32,
        normalize,
        &scores,
        &ids,
        &weights,
    )?;
    let pairs = rows * chosen;
    let size = bytes_of(float);
    let row = (hidden * size) as u64;
    let product = |weight, input, rows: usize, output| Product {
        weight,
        input,
        rows: rows as u32,
        float,
        bias: None,
        output,
        experts: None,
        rounding: Rounding::Fastest,
    };
    let at = |buffer, element: usize, size: usize| Place {
        buffer,
        offset: (element * size) as u64,
    };
    let mut products = vec![];
    if rows == 1 {
        // A product for each choice, so that nothing has to be copied.
        for pair in 0..pairs {
            for (weight, output) in [(of_gate, &on.gates), (up, &on.ups)] {
                let output = at(output, pair * between, size);
                products.push(Product {
                    experts: Some(at(&on.expert_ids, pair, 4)),
                    ..product(weight, begin(&on.normed), 1, output)
                });
            }
        }
    } else {
        for pair in 0..pairs {
            let from = (pair / chosen) as u64 * row;
            on.repeated
                .copy_from(pair as u64 * row, &on.normed, from, row)?;
        }
        for (weight, output) in [(of_gate, &on.gates), (up, &on.ups)] {
            products.push(Product {
                experts: Some(begin(&on.expert_ids)),
                ..product(weight, begin(&on.repeated), pairs, begin(output))
            });
        }
    }
    multiply(&products)?;
    let elements = (pairs * between) as u64;
    let (gates, ups) = (begin(&on.gates), begin(&on.ups));
    gate(
        float,
        Activation::Silu,
        elements,
        &gates,
        &ups,
        &begin(&on.inner),
    )?;
    multiply(&[Product {
        experts: Some(begin(&on.expert_ids)),
        ..product(down, begin(&on.inner), pairs, begin(&on.parts))
    }])?;
    let (parts, weights) = (begin(&on.parts), begin(&on.expert_weights));
    let more = begin(&on.more);
    combine(
        float,
        rows as u32,
        chosen as u32,
        hidden as u32,
        &parts,
        &weights,
        &more,
    )?;
    Ok(())
}
