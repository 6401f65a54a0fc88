//! What the program is told.

use tightfit_program::{Dtype, GaveUp};

pub(crate) struct Options {
    /// The name under which the checkpoint was granted.
    pub(crate) model: String,
    /// The prompt.
    pub(crate) tokens: Vec<u32>,
    /// Tokens to generate at most.
    pub(crate) max: usize,
    /// Tokens that end it.
    pub(crate) stop: Vec<u32>,
    /// Greedy where it is 0.
    pub(crate) temperature: f32,
    /// From how many of the likeliest tokens one is chosen.
    pub(crate) top: u32,
    pub(crate) seed: u64,
    /// The type of activations, and of what is not quantized.
    pub(crate) float: Dtype,
    pub(crate) device: u32,
    /// Rows of the prompt that are computed together.
    pub(crate) rows: usize,
    /// Whether to give the logits of the prompt, and generate nothing.
    pub(crate) logits: bool,
}

const USAGE: &str = "give the name of a model and --tokens 1,2,3; then, if you like, --max N, --stop IDS, \
    --temperature T, --top K, --seed N, --float bf16|f16|f32, --device N, --rows N, --logits";

impl Options {
    pub(crate) fn parse(arguments: &[String]) -> Result<Options, GaveUp> {
        let mut arguments = arguments.iter();
        let mut options = Options {
            model: arguments.next().ok_or(USAGE)?.clone(),
            tokens: vec![],
            max: 32,
            stop: vec![],
            temperature: 0.0,
            top: 50,
            seed: 0,
            float: Dtype::Bf16,
            device: 0,
            rows: 64,
            logits: false,
        };
        while let Some(name) = arguments.next() {
            if name == "--logits" {
                options.logits = true;
                continue;
            }
            let value = arguments.next().ok_or(USAGE)?;
            match name.as_str() {
                "--tokens" => options.tokens = ids(value)?,
                "--stop" => options.stop = ids(value)?,
                "--max" => options.max = number(value)?,
                "--temperature" => options.temperature = number(value)?,
                "--top" => options.top = number(value)?,
                "--seed" => options.seed = number(value)?,
                "--device" => options.device = number(value)?,
                "--rows" => options.rows = number(value)?,
                "--float" => {
                    options.float = match value.as_str() {
                        "bf16" => Dtype::Bf16,
                        "f16" => Dtype::F16,
                        "f32" => Dtype::F32,
                        _ => return Err(USAGE.into()),
                    }
                }
                _ => return Err(USAGE.into()),
            }
        }
        if options.tokens.is_empty() || options.rows == 0 || !options.temperature.is_finite() {
            return Err(USAGE.into());
        }
        Ok(options)
    }
}

fn number<T: std::str::FromStr>(text: &str) -> Result<T, GaveUp> {
    text.parse()
        .map_err(|_| format!("'{text}' is no such number").into())
}

fn ids(text: &str) -> Result<Vec<u32>, GaveUp> {
    text.split(',').map(|id| number(id.trim())).collect()
}
