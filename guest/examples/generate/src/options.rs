//! What the program is told.

use tightfit_program::{Dtype, GaveUp};

pub(crate) struct Options {
    /// The name under which the checkpoint was granted.
    pub(crate) model: String,
    /// The prompt: tokens, or a text.
    pub(crate) tokens: Vec<u32>,
    pub(crate) text: Option<String>,
    /// Whether to give text; else tokens.
    pub(crate) gives_text: bool,
    /// Tokens to generate at most.
    pub(crate) max: usize,
    /// Tokens that end it. Where none are given, a text ends where the checkpoint says.
    pub(crate) stop: Option<Vec<u32>>,
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

const USAGE: &str = "give the name of a model, and --tokens 1,2,3 or --text TEXT; then, if you like, --max N, --stop IDS, \
    --as text|tokens, --temperature T, --top K, --seed N, --float bf16|f16|f32, --device N, --rows N, --logits";

impl Options {
    pub(crate) fn parse(arguments: &[String]) -> Result<Options, GaveUp> {
        let mut arguments = arguments.iter();
        let mut options = Options {
            model: arguments.next().ok_or(USAGE)?.clone(),
            tokens: vec![],
            text: None,
            gives_text: false,
            max: 32,
            stop: None,
            temperature: 0.0,
            top: 50,
            seed: 0,
            float: Dtype::Bf16,
            device: 0,
            rows: 64,
            logits: false,
        };
        let mut gives_text = None;
        while let Some(name) = arguments.next() {
            if name == "--logits" {
                options.logits = true;
                continue;
            }
            let value = arguments.next().ok_or(USAGE)?;
            match name.as_str() {
                "--tokens" => options.tokens = ids(value)?,
                "--text" => options.text = Some(value.clone()),
                "--as" => {
                    gives_text = Some(match value.as_str() {
                        "text" => true,
                        "tokens" => false,
                        _ => return Err(USAGE.into()),
                    });
                }
                "--stop" => options.stop = Some(ids(value)?),
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
        options.gives_text = gives_text.unwrap_or(options.text.is_some());
        let has_one_prompt = options.tokens.is_empty() == options.text.is_some();
        if !has_one_prompt || options.rows == 0 || !options.temperature.is_finite() {
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
