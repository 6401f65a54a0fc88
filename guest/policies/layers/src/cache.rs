//! Room for what a model keeps while it generates, and for the logits.

use tightfit_guest::config::{self, number};
use tightfit_guest::names::TensorKind::{self, Embedding};
use tightfit_guest::names::side_branch_of;
use tightfit_guest::partition::Item;
use tightfit_guest::transposed;
use tightfit_guest::{Level, Refusal, Request, config::Value};

use crate::attention::{Circumstances, Keeper, Memory, keepers};
use crate::geometry::Geometry;
use crate::options::Options;
use crate::units::{Part, Unit};
use crate::windows::{Sight, Windows};

/// Logits are computed in 32 bits.
const LOGIT_BYTES: u64 = 4;

/// Adds what the layers keep to their tensors, and what the logits need to the output head. Returns what
/// the user may want to know.
///
/// # Errors
/// A refusal when there is attention of unknown width.
pub(crate) fn reserve(
    request: &Request,
    options: &Options,
    kinds: &[TensorKind],
    units: &[Unit<'_>],
    items: &mut [Item],
) -> Result<Vec<(Level, String)>, Refusal> {
    let root = config::parse(&request.config_json);
    let config = config::language_model(&root);
    let layers = reserve_layers(request, options, &root, units, items)?;
    // A tied head is the embedding.
    let table = |unit: &&Unit<'_>| unit.part == Part::Output || unit.part == Part::Input;
    let mut tables = units
        .iter()
        .filter(table)
        .rev()
        .flat_map(|unit| &unit.tensors);
    let head = tables.find(|&&t| matches!(kinds[t as usize], TensorKind::OutputHead | Embedding));
    if let Some(&head) = head {
        let rows = request.tensors[head as usize].shape.first().copied();
        let vocabulary = number(config, &["vocab_size"]).or(rows).unwrap_or(0);
        let logits = product(&[vocabulary, options.batch.into(), LOGIT_BYTES]);
        add(items, head, logits);
    }
    Ok(layers)
}

fn reserve_layers(
    request: &Request,
    options: &Options,
    root: &Value,
    units: &[Unit<'_>],
    items: &mut [Item],
) -> Result<Vec<(Level, String)>, Refusal> {
    let Some(main) = generating_stack(units) else {
        return Ok(vec![]);
    };
    let config = config::language_model(root);
    let (geometry, windows) = (Geometry { config }, Windows::of(config));
    let transposed = transposed(request);
    let encoder_tokens = encoder_tokens(root, options);
    let batch = u64::from(options.batch);
    let (mut shared, mut seen) = (None, Seen::default());
    for unit in units {
        let Part::Layer { stack, index, .. } = unit.part else {
            continue;
        };
        let layer = u64::from(index);
        if stack != main || windows.is_draft(layer) {
            continue;
        }
        let sight = windows.sight(layer);
        let around = Circumstances {
            request,
            transposed: &transposed,
            geometry: &geometry,
            layer,
            linear: sight == Sight::State,
            compressed: options.compressed_latent,
        };
        // A stack's name, two dots, and the layer's number.
        let prefix = stack.len() + 2 + index.checked_ilog10().unwrap_or(0) as usize + 1;
        let mut found = keepers(&unit.tensors, prefix, &around).map_err(|module| {
            Refusal::unsupported(format!(
                "no KV cache can be computed: neither the tensors of {stack}.{index}.{module} nor config.json \
                 tell the width of its keys and values; use `reserve` instead of `context`"
            ))
        })?;
        let attends = |keeper: &&Keeper| matches!(keeper.memory, Memory::Tokens(_));
        match found.iter().find(attends) {
            Some(keeper) => shared = Some(keeper.memory),
            None => {
                if let (true, Some(memory), Some(&tensor)) =
                    (windows.borrows(layer), shared, unit.tensors.first())
                {
                    found.push(Keeper {
                        tensor,
                        memory,
                        by_shape: false,
                        is_latent: false,
                    });
                }
            }
        }
        seen.layer(layer, &found, &geometry, options);
        for keeper in found {
            let tokens = match sight {
                Sight::Everything => options.context.into(),
                Sight::Window(tokens) => u64::from(options.context).min(tokens),
                Sight::State => options.context.into(),
                Sight::Shared => 0,
            };
            let bytes = match keeper.memory {
                Memory::Tokens(bytes) => product(&[bytes, tokens, batch]),
                Memory::EncoderTokens(bytes) => product(&[bytes, encoder_tokens, batch]),
                Memory::State(bytes) => product(&[bytes, batch]),
            };
            add(items, keeper.tensor, bytes);
        }
    }
    Ok(seen.notes(&windows, options, encoder_tokens))
}

/// What there was in the layers, for the user.
#[derive(Debug, Default)]
struct Seen {
    attention: bool,
    cross: bool,
    agrees: bool,
    /// The first layer whose shapes say something else than the configuration: bytes of a token.
    differs: Option<(u64, u64, u64)>,
    latent: bool,
}

impl Seen {
    fn layer(&mut self, layer: u64, found: &[Keeper], geometry: &Geometry<'_>, options: &Options) {
        let stated = geometry.token_elements(layer);
        let stated = stated.map(|elements| elements.saturating_mul(2));
        for keeper in found {
            self.latent |= keeper.is_latent;
            match keeper.memory {
                Memory::EncoderTokens(_) => self.cross = true,
                Memory::State(_) => {}
                Memory::Tokens(bytes) => {
                    self.attention = true;
                    let compressed = keeper.is_latent && options.compressed_latent;
                    let Some(stated) = stated.filter(|_| keeper.by_shape && !compressed) else {
                        continue;
                    };
                    self.agrees |= stated == bytes;
                    if stated != bytes && self.differs.is_none() {
                        self.differs = Some((layer, stated, bytes));
                    }
                }
            }
        }
    }

    fn notes(
        &self,
        windows: &Windows<'_>,
        options: &Options,
        encoder_tokens: u64,
    ) -> Vec<(Level, String)> {
        let mut notes = Vec::new();
        // Where some layers are as stated, others are wider or narrower by design.
        if let (Some((layer, stated, bytes)), false) = (self.differs, self.agrees) {
            notes.push((
                Level::Warn,
                format!(
                    "the KV cache is counted by the shapes of the tensors, {bytes} bytes for a token in layer \
                     {layer}: config.json would make it {stated}"
                ),
            ));
        }
        if let (true, Some(note)) = (self.attention, windows.note()) {
            notes.push((Level::Warn, note));
        }
        if self.latent {
            let counted = match options.compressed_latent {
                true => "compressed, as `latent-cache` says",
                false => {
                    "expanded to keys and values of all heads, as transformers keeps them (`latent-cache`)"
                }
            };
            notes.push((
                Level::Info,
                format!("the cache of latent attention is counted {counted}"),
            ));
        }
        if self.cross {
            notes.push((
                Level::Info,
                format!("the cache of cross-attention is counted for {encoder_tokens} tokens of the encoder"),
            ));
        }
        notes
    }
}

/// Returns the tokens of the encoder: what the user says, or the configuration, or as many as of the
/// decoder.
fn encoder_tokens(root: &Value, options: &Options) -> u64 {
    if options.encoder_context > 0 {
        return options.encoder_context.into();
    }
    // Whisper's sounds are padded to this many, and images of Llama 3.2 cut into so many tiles.
    let vision = &root["vision_config"];
    let tiles = || {
        let side =
            number(vision, &["image_size"])?.checked_div(number(vision, &["patch_size"])?)?;
        let patches = side.checked_mul(side)?.checked_add(1)?;
        patches.checked_mul(number(vision, &["max_num_tiles"])?)
    };
    let language_model = config::language_model(root);
    number(language_model, &["max_source_positions"])
        .filter(|&tokens| tokens > 0)
        .or_else(tiles)
        .unwrap_or(options.context.into())
}

/// Returns the stack that generates: the one with the most layers, the last of several. Encoders and
/// towers do not, unless they are all there is.
fn generating_stack<'a>(units: &[Unit<'a>]) -> Option<&'a str> {
    let mut counts: Vec<(&str, usize)> = Vec::new();
    for unit in units {
        if let Part::Layer { stack, .. } = unit.part {
            match counts.last_mut() {
                Some((last, count)) if *last == stack => *count += 1,
                _ => counts.push((stack, 1)),
            }
        }
    }
    counts.retain(|(stack, _)| side_branch_of(stack).is_none());
    let encodes = |stack: &str| stack.contains("encoder") && !stack.contains("decoder");
    let most = |encoders: bool| {
        let stacks = counts
            .iter()
            .filter(|(stack, _)| encodes(stack) == encoders);
        stacks
            .max_by_key(|(_, count)| *count)
            .map(|(stack, _)| *stack)
    };
    most(false).or_else(|| most(true))
}

fn add(items: &mut [Item], tensor: u32, bytes: u64) {
    let headroom = &mut items[tensor as usize].headroom;
    *headroom = headroom.saturating_add(bytes);
}

fn product(factors: &[u64]) -> u64 {
    let multiply = |product: u64, &factor: &u64| product.saturating_mul(factor);
    factors.iter().fold(1, multiply)
}

#[cfg(test)]
#[path = "cache_tests.rs"]
mod tests;
