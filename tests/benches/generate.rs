//! How many tokens a second the program that generates gives in the sandbox, and the same operations called
//! natively, one after the other, on the processor.
//!
//! ```text
//! tightfit synth qwen2.5-0.5b /tmp/model
//! cargo bench --locked -p tightfit-tests --bench generate -- /tmp/model 32
//! ```
//!
//! The model is of the Llama and Qwen2 kinds, without scaled rotary embedding. Both give the same tokens.

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use serde_json::Value;
use tightfit::device::{Device, HostDevice, HostOperands};
use tightfit::model::Model;
use tightfit::plan::PartKind;
use tightfit::products::LinearOptions;
use tightfit_kernels::decoder::{Attention, Heads, Operand, Operation, RmsNorm, Rotation, Visible};
use tightfit_kernels::{Activation, FloatType, Kernels};
use tightfit_tests::generate::generate;
use tightfit_tests::loading::load_with_auto;

const FLOAT: FloatType = FloatType::Bf16;
const PROMPT: u32 = 11;

fn main() {
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| a != "--bench")
        .collect();
    let [model, count] = &arguments[..] else {
        println!("give the directory of a model and a number of tokens");
        return;
    };
    let (path, count) = (
        Path::new(model),
        count.parse::<usize>().expect("a number of tokens"),
    );
    let devices: Arc<[Box<dyn Device>]> =
        Arc::from([Box::new(HostDevice::cpu(None)) as Box<dyn Device>]);
    let max = count.to_string();
    let sandboxed = generate(
        path,
        &devices,
        &["--tokens", &PROMPT.to_string(), "--max", &max],
    );
    let pace = |seconds: f64| (count - 1) as f64 / seconds;
    println!("sandboxed: {:.2} tokens/s", pace(sandboxed.seconds));
    print!("{}", sandboxed.answer);
    let (tokens, seconds) = natively(path, count);
    println!("natively: {:.2} tokens/s", pace(seconds));
    println!("share: {:.3}", seconds / sandboxed.seconds);
    println!("the same tokens: {}", tokens == sandboxed.tokens);
}

struct Loop<'m> {
    model: &'m Model,
    kernels: Kernels,
    threads: NonZeroUsize,
    hidden: usize,
    heads: Heads,
    eps: f32,
    frequencies: Vec<u8>,
    capacity: usize,
}

fn natively(path: &Path, count: usize) -> (Vec<u32>, f64) {
    let config = std::fs::read(path.join("config.json")).expect("a configuration");
    let config: Value = serde_json::from_slice(&config).expect("JSON");
    let number = |name: &str| config[name].as_u64().map(|number| number as usize);
    let model = load_with_auto(path, &["cpu"], &[("skip", "lm_head*")]);
    let hidden = number("hidden_size").expect("hidden_size");
    let query_heads = number("num_attention_heads").expect("num_attention_heads");
    let head_size = number("head_dim").unwrap_or(hidden / query_heads);
    let theta = config["rope_theta"]
        .as_f64()
        .or(config["rope_parameters"]["rope_theta"].as_f64());
    let theta = theta.unwrap_or(10000.0);
    let frequency = |i: usize| theta.powf(-2.0 * i as f64 / head_size as f64) as f32;
    let on = Loop {
        model: &model,
        kernels: Kernels::detect(),
        threads: std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN),
        hidden,
        heads: Heads {
            float: FLOAT,
            rows: 1,
            query_heads,
            kv_heads: number("num_key_value_heads").unwrap_or(query_heads),
            head_size,
        },
        eps: config["rms_norm_eps"].as_f64().unwrap_or(1e-6) as f32,
        frequencies: (0..head_size / 2)
            .flat_map(|i| frequency(i).to_le_bytes())
            .collect(),
        capacity: count + 1,
    };
    on.run(
        number("num_hidden_layers").expect("num_hidden_layers"),
        count,
    )
}

impl Loop<'_> {
    fn data(&self, name: &str) -> &[u8] {
        let tensor = self
            .model
            .tensor(name)
            .unwrap_or_else(|| panic!("no {name}"));
        tensor.part(PartKind::Data).expect("not quantized, in bf16")
    }

    fn step(&self, operation: Operation, operands: Vec<Operand<'_>>) {
        let done = self
            .kernels
            .decode_step(&operation, operands, self.threads, &|| true);
        done.unwrap_or_else(|error| panic!("{operation:?}: {error}"));
    }

    fn linear(&self, name: &str, x: &[u8], y: &mut Vec<u8>) {
        let linear = self
            .model
            .linear(&format!("{name}.weight"))
            .unwrap_or_else(|e| panic!("{e}"));
        let bias = self.model.tensor(&format!("{name}.bias"));
        let bias = bias.and_then(|bias| bias.part(PartKind::Data));
        y.resize(linear.outputs() * 2, 0);
        let operands = HostOperands { x, bias, y };
        let done = linear.forward_bytes(FLOAT, 1, operands, &LinearOptions::default());
        done.unwrap_or_else(|error| panic!("{name}: {error}"));
    }

    fn norm(&self, name: &str, x: &mut [u8], add: Option<&[u8]>, y: &mut [u8]) {
        let norm = RmsNorm {
            float: FLOAT,
            rows: 1,
            columns: self.hidden,
            eps: self.eps,
            weight_offset: 0.0,
        };
        let weight = Operand::Read(self.data(&format!("{name}.weight")));
        let operands = match add {
            Some(add) => vec![
                Operand::Written(x),
                Operand::Read(add),
                weight,
                Operand::Written(y),
            ],
            None => vec![Operand::Read(x), weight, Operand::Written(y)],
        };
        self.step(
            Operation::RmsNorm {
                norm,
                add: add.is_some(),
            },
            operands,
        );
    }

    fn run(&self, layers: usize, count: usize) -> (Vec<u32>, f64) {
        let table = self.data("model.embed_tokens.weight");
        let vocabulary = table.len() / 2 / self.hidden;
        let head = self.model.tensor("lm_head.weight");
        let head = head
            .and_then(|head| head.part(PartKind::Data))
            .unwrap_or(table);
        let heads = self.heads;
        let row = |heads: usize| vec![0u8; heads * self.heads.head_size * 2];
        let cache = row(heads.kv_heads * self.capacity);
        let mut caches: Vec<[Vec<u8>; 2]> = (0..layers)
            .map(|_| [cache.clone(), cache.clone()])
            .collect();
        let mut hidden = vec![0u8; self.hidden * 2];
        let (mut normed, mut mixed) = (hidden.clone(), row(heads.query_heads));
        let [mut q, mut k, mut v, mut more, mut gates, mut ups] = [(); 6].map(|()| vec![]);
        let mut logits = vec![0u8; vocabulary * 2];
        let (mut token, mut tokens) = (PROMPT, vec![]);
        let mut start = Instant::now();
        for position in 0..count {
            let (ids, at) = (token.to_le_bytes(), (position as u32).to_le_bytes());
            let gather = Operation::Gather {
                float: FLOAT,
                rows: 1,
                table_rows: vocabulary,
                columns: self.hidden,
            };
            let operands = vec![
                Operand::Read(table),
                Operand::Read(&ids),
                Operand::Written(&mut hidden),
            ];
            self.step(gather, operands);
            for (number, [keys, values]) in caches.iter_mut().enumerate() {
                let name = |part: &str| format!("model.layers.{number}.{part}");
                let add = (number > 0).then_some(&more[..]);
                self.norm(&name("input_layernorm"), &mut hidden, add, &mut normed);
                self.linear(&name("self_attn.q_proj"), &normed, &mut q);
                self.linear(&name("self_attn.k_proj"), &normed, &mut k);
                self.linear(&name("self_attn.v_proj"), &normed, &mut v);
                let rotation = Rotation {
                    heads,
                    rotary: heads.head_size,
                    scaling: 1.0,
                    capacity: self.capacity,
                    norm_eps: 0.0,
                    norm_weight_offset: 0.0,
                };
                let operands = vec![
                    Operand::Written(&mut q),
                    Operand::Read(&k),
                    Operand::Read(&v),
                    Operand::Read(&at),
                    Operand::Read(&self.frequencies),
                    Operand::Written(keys),
                    Operand::Written(values),
                ];
                self.step(
                    Operation::Rotate {
                        rotation,
                        norms: [false; 2],
                    },
                    operands,
                );
                let attention = Attention {
                    heads,
                    capacity: self.capacity,
                    visible: Visible::Causal { window: None },
                    scale: 1.0 / (heads.head_size as f32).sqrt(),
                };
                let operands = vec![
                    Operand::Read(&q),
                    Operand::Read(keys),
                    Operand::Read(values),
                    Operand::Read(&at),
                    Operand::Written(&mut mixed),
                ];
                self.step(
                    Operation::Attend {
                        attention,
                        most: position + 1,
                    },
                    operands,
                );
                self.linear(&name("self_attn.o_proj"), &mixed, &mut more);
                self.norm(
                    &name("post_attention_layernorm"),
                    &mut hidden,
                    Some(&more),
                    &mut normed,
                );
                self.linear(&name("mlp.gate_proj"), &normed, &mut gates);
                self.linear(&name("mlp.up_proj"), &normed, &mut ups);
                let mut inner = vec![0u8; gates.len()];
                let gate = Operation::Gate {
                    float: FLOAT,
                    activation: Activation::Silu,
                    elements: gates.len() / 2,
                };
                let operands = vec![
                    Operand::Read(&gates),
                    Operand::Read(&ups),
                    Operand::Written(&mut inner),
                ];
                self.step(gate, operands);
                self.linear(&name("mlp.down_proj"), &inner, &mut more);
            }
            self.norm("model.norm", &mut hidden, Some(&more), &mut normed);
            let dense = Operation::Dense {
                float: FLOAT,
                lengths: [1, vocabulary, self.hidden],
                bias: false,
            };
            let operands = vec![
                Operand::Read(head),
                Operand::Read(&normed),
                Operand::Written(&mut logits),
            ];
            self.step(dense, operands);
            let (mut id, mut value) = ([0; 4], [0; 4]);
            let top = Operation::Top {
                float: FLOAT,
                lengths: [1, vocabulary, 1],
            };
            let operands = vec![
                Operand::Read(&logits),
                Operand::Written(&mut id),
                Operand::Written(&mut value),
            ];
            self.step(top, operands);
            token = u32::from_le_bytes(id);
            tokens.push(token);
            if position == 0 {
                start = Instant::now();
            }
        }
        (tokens, start.elapsed().as_secs_f64())
    }
}
