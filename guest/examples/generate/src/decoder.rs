//! The whole model, and what it works in.

use tightfit_program::transformer::{Norm, dense, gather, rms_norm, top};
use tightfit_program::{Buffer, Dtype, GaveUp, Place};

use crate::config::Config;
use crate::layer::{Layer, begin};
use crate::load::{Loaded, bytes_of};
use crate::options::Options;

/// Buffers on the device, each for as many rows as are computed together.
pub(crate) struct Activations {
    pub(crate) float: Dtype,
    /// Rows of caches.
    pub(crate) context: usize,
    pub(crate) hidden: Buffer,
    /// What is to be added to it.
    pub(crate) more: Buffer,
    pub(crate) normed: Buffer,
    pub(crate) queries: Buffer,
    pub(crate) keys: Buffer,
    pub(crate) values: Buffer,
    pub(crate) mixed: Buffer,
    pub(crate) gates: Buffer,
    pub(crate) ups: Buffer,
    pub(crate) inner: Buffer,
    /// 0, 1, 2 and so on, as u32.
    pub(crate) positions: Buffer,
    pub(crate) frequencies: Buffer,
    // Of models with experts.
    pub(crate) scores: Buffer,
    pub(crate) expert_ids: Buffer,
    pub(crate) expert_weights: Buffer,
    pub(crate) parts: Buffer,
    /// Each row as often as it has experts; nothing where rows are computed one at a time.
    pub(crate) repeated: Buffer,
}

pub(crate) struct Decoder<'c> {
    config: &'c Config,
    model: Loaded,
    layers: Vec<Layer>,
    norm: Buffer,
    on: Activations,
    rows: usize,
    /// All tokens, in their order, as u32.
    tokens: Buffer,
    logits: Buffer,
    /// Where the largest logits go, and which tokens' they are.
    largest: [Buffer; 2],
    head: &'static str,
}

const TABLE: &str = "model.embed_tokens.weight";

impl<'c> Decoder<'c> {
    pub(crate) fn new(
        config: &'c Config,
        mut model: Loaded,
        options: &Options,
        context: usize,
    ) -> Result<Decoder<'c>, GaveUp> {
        let (device, float) = (options.device, options.float);
        let layers = (0..config.layers)
            .map(|number| Layer::load(&mut model, config, number, device, float, context));
        let layers = layers.collect::<Result<Vec<Layer>, GaveUp>>()?;
        let rows = options.rows.min(context);
        let words = |count: usize| Buffer::allocate(device, 4 * count as u64);
        let numbers = |count: usize| Buffer::allocate(device, (count * bytes_of(float)) as u64);
        let chosen = config.experts.as_ref().map_or(1, |experts| experts.chosen);
        let between = layers.iter().map(Layer::intermediate).max().unwrap_or(0) * chosen;
        let experts = layers.iter().map(Layer::experts).max().unwrap_or(0);
        let has_experts = usize::from(experts > 0);
        let of_queries = config.heads * config.head;
        let of_keys = config.kv_heads * config.head;
        let on = Activations {
            float,
            context,
            hidden: numbers(rows * config.hidden)?,
            more: numbers(rows * config.hidden)?,
            normed: numbers(rows * config.hidden)?,
            queries: numbers(rows * of_queries)?,
            keys: numbers(rows * of_keys)?,
            values: numbers(rows * of_keys)?,
            mixed: numbers(rows * of_queries)?,
            gates: numbers(rows * between)?,
            ups: numbers(rows * between)?,
            inner: numbers(rows * between)?,
            positions: words(context)?,
            frequencies: words(config.frequencies.len())?,
            scores: numbers(rows * experts)?,
            expert_ids: words(rows * chosen * has_experts)?,
            expert_weights: words(rows * chosen * has_experts)?,
            parts: numbers(rows * chosen * config.hidden * has_experts)?,
            repeated: numbers(match rows {
                1 => 0,
                _ => rows * chosen * config.hidden * has_experts,
            })?,
        };
        let positions = (0..context as u32).flat_map(u32::to_le_bytes);
        let positions: Vec<u8> = positions.collect();
        for (i, piece) in positions.chunks(1 << 20).enumerate() {
            on.positions.write((i << 20) as u64, piece)?;
        }
        let frequencies = config.frequencies.iter().flat_map(|x| x.to_le_bytes());
        on.frequencies.write(0, &frequencies.collect::<Vec<u8>>())?;
        Ok(Decoder {
            norm: model.vector("model.norm.weight", config.hidden)?,
            head: match model.has("lm_head.weight") {
                true => "lm_head.weight",
                false => TABLE,
            },
            tokens: words(context)?,
            logits: numbers(config.vocabulary)?,
            largest: [words(options.top as usize)?, words(options.top as usize)?],
            config,
            model,
            layers,
            on,
            rows,
        })
    }

    /// Rows that are computed together at most.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn cache_bytes(&self) -> u64 {
        self.layers.iter().map(Layer::cache_bytes).sum()
    }

    /// Says which tokens there are from a position on.
    pub(crate) fn write_tokens(&self, position: usize, tokens: &[u32]) -> Result<(), GaveUp> {
        let bytes: Vec<u8> = tokens
            .iter()
            .flat_map(|token| token.to_le_bytes())
            .collect();
        for (i, piece) in bytes.chunks(1 << 20).enumerate() {
            self.tokens
                .write(4 * position as u64 + (i << 20) as u64, piece)?;
        }
        Ok(())
    }

    /// Queues the model for some tokens from a position on, and if asked the logits behind the last of them.
    pub(crate) fn forward(
        &mut self,
        position: usize,
        rows: usize,
        with_logits: bool,
    ) -> Result<(), GaveUp> {
        let (config, on) = (self.config, &self.on);
        let ids = Place {
            buffer: &self.tokens,
            offset: 4 * position as u64,
        };
        let table = self.model.parameter(TABLE)?;
        gather(&table, &ids, rows as u32, &begin(&on.hidden))?;
        for (number, layer) in self.layers.iter().enumerate() {
            layer.forward(&self.model, config, on, position, rows, number == 0)?;
        }
        if !with_logits {
            return Ok(());
        }
        // Of the last row only.
        let last = |buffer| Place {
            buffer,
            offset: ((rows - 1) * config.hidden * bytes_of(on.float)) as u64,
        };
        let norm = Norm {
            float: on.float,
            rows: 1,
            columns: config.hidden as u32,
            eps: config.eps,
            weight_offset: 0.0,
            weight: begin(&self.norm),
        };
        let (hidden, more, normed) = (last(&on.hidden), last(&on.more), begin(&on.normed));
        rms_norm(&norm, &hidden, Some(&more), &normed)?;
        let head = self.model.parameter(self.head)?;
        dense(&head, &normed, 1, None, &begin(&self.logits))?;
        Ok(())
    }

    /// The likeliest token, which becomes the one at a position without leaving the device.
    pub(crate) fn choose_likeliest(&self, position: usize) -> Result<u32, GaveUp> {
        let is_last = position >= self.on.context;
        let target = match is_last {
            true => begin(&self.largest[0]),
            false => Place {
                buffer: &self.tokens,
                offset: 4 * position as u64,
            },
        };
        let (float, columns) = (self.on.float, self.config.vocabulary as u32);
        let values = begin(&self.largest[1]);
        top(float, 1, columns, 1, &begin(&self.logits), &target, &values)?;
        let bytes = match is_last {
            true => self.largest[0].read(0, 4)?,
            false => self.tokens.read(4 * position as u64, 4)?,
        };
        Ok(words_of(&bytes)[0])
    }

    /// The likeliest tokens and their logits.
    pub(crate) fn likeliest(&self, count: u32) -> Result<Vec<(u32, f32)>, GaveUp> {
        let (float, columns) = (self.on.float, self.config.vocabulary as u32);
        let [ids, values] = &self.largest;
        let logits = begin(&self.logits);
        top(
            float,
            1,
            columns,
            count,
            &logits,
            &begin(ids),
            &begin(values),
        )?;
        let ids = words_of(&ids.read(0, 4 * u64::from(count))?);
        let values = words_of(&values.read(0, 4 * u64::from(count))?);
        let values = values.into_iter().map(f32::from_bits);
        Ok(ids.into_iter().zip(values).collect())
    }

    pub(crate) fn set_token(&self, position: usize, token: u32) -> Result<(), GaveUp> {
        match position < self.on.context {
            true => self.write_tokens(position, &[token]),
            false => Ok(()),
        }
    }

    /// The logits that were computed last, as f32.
    pub(crate) fn read_logits(&self) -> Result<Vec<f32>, GaveUp> {
        let bytes = self.logits.read(0, self.logits.length())?;
        Ok(match self.on.float {
            Dtype::F32 => words_of(&bytes).into_iter().map(f32::from_bits).collect(),
            Dtype::Bf16 => halves_of(&bytes)
                .map(|half| f32::from_bits(u32::from(half) << 16))
                .collect(),
            _ => return Err("logits are given in f32 or bf16".into()),
        })
    }
}

fn words_of(bytes: &[u8]) -> Vec<u32> {
    let (words, _) = bytes.as_chunks::<4>();
    words.iter().map(|word| u32::from_le_bytes(*word)).collect()
}

fn halves_of(bytes: &[u8]) -> impl Iterator<Item = u16> {
    let (halves, _) = bytes.as_chunks::<2>();
    halves.iter().map(|half| u16::from_le_bytes(*half))
}
