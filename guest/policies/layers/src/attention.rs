//! What the layers keep of what they have seen, by the shapes of their tensors.
//!
//! Keys and values are as wide as the rows of the matrices that make them, whatever config.json calls
//! that width or leaves out. Only where shapes leave it open does the configuration decide.

use tightfit_guest::Request;

use crate::geometry::Geometry;

/// Keys and values are kept in 16 bits, and what convolutions look back at.
const ELEMENT_BYTES: u64 = 2;
/// Recurrent states are kept in 32.
const STATE_BYTES: u64 = 4;

/// What a module of a layer keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Memory {
    /// So many bytes for every token of the sequence.
    Tokens(u64),
    /// So many bytes for every token of the encoder.
    EncoderTokens(u64),
    /// So many bytes, however long the sequence is.
    State(u64),
}

/// A module of a layer that keeps something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Keeper {
    /// The tensor beside which it belongs, should the layer be split.
    pub(crate) tensor: u32,
    pub(crate) memory: Memory,
    /// Whether the width is that of the tensors, and not of the configuration.
    pub(crate) by_shape: bool,
    /// Whether it is latent attention, which can be kept in two forms.
    pub(crate) is_latent: bool,
}

/// What is read from a layer besides its tensors.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Circumstances<'a> {
    pub(crate) request: &'a Request,
    /// Matrices whose rows are inputs.
    pub(crate) transposed: &'a [bool],
    pub(crate) geometry: &'a Geometry<'a>,
    pub(crate) layer: u64,
    /// The configuration says that the layer has linear attention or another recurrence.
    pub(crate) linear: bool,
    /// Latent attention keeps what its keys and values are made of, not these.
    pub(crate) compressed: bool,
}

/// What a matrix is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Query,
    Key,
    Value,
    /// Queries, keys and values in one matrix.
    Fused,
    KeysAndValues,
    /// What latent attention makes of a token.
    Latent,
    /// Keys and values of what it made.
    FromLatent,
    Output,
    /// The input of a state-space model: all of its parts in one matrix.
    StateInput,
}
const ROLES: usize = 9;

/// Outputs and inputs of a matrix, as far as they are known.
#[derive(Debug, Clone, Copy)]
struct Matrix {
    tensor: u32,
    rows: Option<u64>,
    columns: Option<u64>,
}

/// The tensors of a layer that lie in one module.
#[derive(Debug)]
struct Module<'a> {
    path: &'a str,
    matrices: [Option<Matrix>; ROLES],
    /// The shape of the decay of a state-space model.
    decay: Option<(u32, &'a [u64])>,
    /// Elements that depthwise convolutions look back at, and their channels.
    convolution: Option<(u32, u64, u64)>,
    /// State-space models have it, linear attention does not.
    skip: bool,
    /// A gated linear recurrent unit's parameter: an element of state for each of its own.
    unit: Option<(u32, u64)>,
    /// RWKV's.
    time: Option<u32>,
}

/// Returns what a layer keeps.
///
/// # Errors
/// The module whose keys and values are of unknown width: neither its tensors nor config.json tell.
pub(crate) fn keepers(
    tensors: &[u32],
    prefix: usize,
    around: &Circumstances<'_>,
) -> Result<Vec<Keeper>, String> {
    let modules = modules(tensors, prefix, around);
    let mut keepers: Vec<Keeper> = Vec::new();
    for module in &modules {
        keepers.extend(module.keeps(around)?);
    }
    if keepers.is_empty() && !around.linear {
        // Nothing but what follows attention: how wide that is inside, config.json may tell.
        for module in &modules {
            let asks = module.has(Role::Query) || module.has(Role::Fused);
            if module.has(Role::Output) && !asks && is_attention(module.path) {
                keepers.push(module.by_config(Role::Output, around)?);
            }
        }
    }
    Ok(keepers)
}

fn modules<'a>(tensors: &[u32], prefix: usize, around: &Circumstances<'a>) -> Vec<Module<'a>> {
    let mut modules: Vec<Module<'a>> = Vec::new();
    for &t in tensors {
        let tensor = &around.request.tensors[t as usize];
        let name = tensor.name.get(prefix..).unwrap_or_default();
        let (path, leaf) = name.rsplit_once('.').unwrap_or(("", name));
        let (parent, last) = path.rsplit_once('.').unwrap_or(("", path));
        let shape = &tensor.shape[..];
        match leaf {
            "A_log" | "D" | "recurrent_param" | "time_decay" | "time_faaaa" | "time_maa_x"
            | "x_r" => {
                let elements = product(shape);
                let module = at(&mut modules, path);
                match leaf {
                    "A_log" => module.decay = Some((t, shape)),
                    "D" => module.skip = true,
                    "recurrent_param" => module.unit = Some((t, elements)),
                    _ => module.time = Some(t),
                }
            }
            _ => {
                let is_convolution = matches!(last, "conv1d" | "conv_1d" | "conv" | "q_conv1d")
                    || matches!(last, "k_conv1d" | "v_conv1d");
                if let (true, "weight", [channels, 1, width]) = (is_convolution, leaf, shape) {
                    let elements = channels.saturating_mul(*width);
                    let module = at(&mut modules, parent);
                    let (_, looked_at, all) = module.convolution.unwrap_or((t, 0, 0));
                    module.convolution = Some((
                        t,
                        looked_at.saturating_add(elements),
                        all.saturating_add(*channels),
                    ));
                    continue;
                }
                let Some(role) = role(last) else {
                    continue;
                };
                let (rows, columns) = match (leaf, shape) {
                    ("weight", [rows, columns]) if around.transposed[t as usize] => {
                        (Some(*columns), Some(*rows))
                    }
                    ("weight", [rows, columns]) => (Some(*rows), Some(*columns)),
                    // Packed along the inputs.
                    ("weight_packed", [rows, _]) => (Some(*rows), None),
                    ("bias", [rows]) => (Some(*rows), None),
                    // GPTQ and AWQ pack along one side or the other, and have a scale for each output.
                    ("scales", [_, rows]) => (Some(*rows), None),
                    ("qweight", _) => (None, None),
                    _ => continue,
                };
                let matrix =
                    at(&mut modules, parent).matrices[role as usize].get_or_insert(Matrix {
                        tensor: t,
                        rows: None,
                        columns: None,
                    });
                if leaf == "weight" {
                    matrix.tensor = t;
                }
                matrix.rows = matrix.rows.or(rows);
                matrix.columns = matrix.columns.or(columns);
            }
        }
    }
    modules
}

fn at<'m, 'a>(modules: &'m mut Vec<Module<'a>>, path: &'a str) -> &'m mut Module<'a> {
    // Neighbors are mostly of one module, and a layer has few.
    let found = modules.iter().rposition(|module| module.path == path);
    let found = found.unwrap_or_else(|| {
        modules.push(Module {
            path,
            matrices: [None; ROLES],
            decay: None,
            convolution: None,
            skip: false,
            unit: None,
            time: None,
        });
        modules.len() - 1
    });
    &mut modules[found]
}

fn role(name: &str) -> Option<Role> {
    Some(match name {
        "q_proj" | "q_b_proj" | "wq" | "wq_b" | "q" | "query" | "q_lin" | "q_attn" | "linear_q"
        | "to_q" | "query_proj" => Role::Query,
        "k_proj" | "wk" | "k" | "key" | "k_lin" | "linear_k" | "to_k" | "key_proj" => Role::Key,
        "v_proj" | "wv" | "v" | "value" | "v_lin" | "linear_v" | "to_v" | "value_proj" => {
            Role::Value
        }
        "qkv_proj" | "query_key_value" | "Wqkv" | "wqkv" | "c_attn" | "qkv" | "W_pack"
        | "att_proj" | "in_proj_qkv" | "in_proj_qkvz" => Role::Fused,
        "kv_proj" | "wkv" | "key_value" | "kv" | "to_kv" => Role::KeysAndValues,
        "kv_a_proj_with_mqa" | "kv_a_proj" | "wkv_a" => Role::Latent,
        "kv_b_proj" | "wkv_b" => Role::FromLatent,
        "o_proj" | "out_proj" | "wo" | "o" | "dense" | "c_proj" | "out_lin" | "linear_out"
        | "attn_out" => Role::Output,
        "in_proj" => Role::StateInput,
        _ => return None,
    })
}

fn is_attention(path: &str) -> bool {
    let lower = path.to_ascii_lowercase();
    lower.contains("attn") || lower.contains("attention")
}

/// Returns whether a module of a layer looks at the encoder.
fn is_cross(path: &str) -> bool {
    let lower = path.to_ascii_lowercase();
    let words = ["cross", "encdec", "encoder_attn", "encoder_decoder"];
    words.iter().any(|word| lower.contains(word))
}

impl Module<'_> {
    fn matrix(&self, role: Role) -> Option<Matrix> {
        self.matrices[role as usize]
    }

    fn has(&self, role: Role) -> bool {
        self.matrix(role).is_some()
    }

    fn rows(&self, role: Role) -> Option<u64> {
        self.matrix(role)?.rows
    }

    fn columns(&self, role: Role) -> Option<u64> {
        self.matrix(role)?.columns
    }

    fn keeps(&self, around: &Circumstances<'_>) -> Result<Option<Keeper>, String> {
        // RWKV's second half has a key and a value too, and keeps the last token only.
        let is_attention = !self.path.ends_with("ffn") && !self.path.ends_with("feed_forward");
        if let Some(state) = self.state(around) {
            return Ok(Some(state));
        }
        if !is_attention {
            return Ok(None);
        }
        let keeper = match self.width(around) {
            Some((role, Some(elements))) => self.keeper(role, elements, true),
            Some((role, None)) => self.by_config(role, around)?,
            None => return Ok(None),
        };
        Ok(Some(keeper))
    }

    fn keeper(&self, role: Role, elements: u64, by_shape: bool) -> Keeper {
        let bytes = product(&[elements, ELEMENT_BYTES]);
        Keeper {
            tensor: self.matrix(role).map_or(0, |matrix| matrix.tensor),
            memory: match is_cross(self.path) {
                true => Memory::EncoderTokens(bytes),
                false => Memory::Tokens(bytes),
            },
            by_shape,
            is_latent: role == Role::Latent,
        }
    }

    fn by_config(&self, role: Role, around: &Circumstances<'_>) -> Result<Keeper, String> {
        let elements = around.geometry.token_elements(around.layer);
        let elements = elements.ok_or_else(|| self.path.to_owned())?;
        Ok(self.keeper(role, elements, false))
    }

    /// Returns the elements of the keys and values of a token, with the matrix beside which they belong;
    /// no width where the shapes leave it open, and nothing where there are no keys.
    fn width(&self, around: &Circumstances<'_>) -> Option<(Role, Option<u64>)> {
        let geometry = around.geometry;
        if let Some(latent) = self.matrix(Role::Latent) {
            if around.compressed {
                return Some((Role::Latent, latent.rows));
            }
            // Keys are as wide as queries, values as what goes out.
            let expanded = self.rows(Role::Query).zip(self.columns(Role::Output));
            let expanded = expanded.map(|(keys, values)| keys.saturating_add(values));
            return Some((Role::Latent, expanded));
        }
        if let Some(keys) = self.matrix(Role::Key) {
            if self.path.ends_with("indexer") {
                // Keys by which sparse attention chooses tokens: without values.
                return Some((Role::Key, keys.rows));
            }
            // Without values of their own, keys serve as values too, and are kept twice.
            let values = self.rows(Role::Value).or(keys.rows);
            let both = keys.rows.zip(values);
            return Some((Role::Key, both.map(|(k, v)| k.saturating_add(v))));
        }
        if let Some(both) = self.matrix(Role::KeysAndValues) {
            return Some((Role::KeysAndValues, both.rows));
        }
        let fused = self.matrix(Role::Fused)?;
        let Some(rows) = fused.rows else {
            return Some((Role::Fused, None));
        };
        if self.has(Role::Query) {
            // GPT-2's cross-attention: the queries are elsewhere.
            return Some((Role::Fused, Some(rows)));
        }
        let queries = self.columns(Role::Output);
        if queries == Some(rows) {
            // Queries alone: the keys are those of another layer.
            return None;
        }
        let queries = queries
            .or_else(|| geometry.query_elements(around.layer))
            .or(fused.columns);
        let rest = queries.and_then(|queries| rows.checked_sub(queries));
        let rest = rest.filter(|&rest| rest > 0);
        let rest = rest.or_else(|| {
            geometry
                .token_elements(around.layer)
                .filter(|&kv| kv < rows)
        });
        // As many heads of keys as of queries.
        Some((Role::Fused, Some(rest.unwrap_or(rows / 3 * 2))))
    }

    /// Returns the state of a module that has one in place of keys and values.
    fn state(&self, around: &Circumstances<'_>) -> Option<Keeper> {
        let geometry = around.geometry;
        let convolution = self.convolution.map_or(0, |(_, looked_at, _)| looked_at);
        let keep = |tensor: u32, elements: u64| Keeper {
            tensor,
            memory: Memory::State(
                product(&[elements, STATE_BYTES])
                    .saturating_add(product(&[convolution, ELEMENT_BYTES])),
            ),
            by_shape: true,
            is_latent: false,
        };
        if let Some((tensor, shape)) = self.decay {
            let decay = product(shape);
            let channels = self.convolution.map_or(0, |(_, _, channels)| channels);
            let elements = match shape {
                // Mamba: a state for each channel.
                [_, states] if self.skip && *states > 1 => decay,
                _ if self.skip => {
                    // Mamba 2: the convolution is over the channels and two projections to the states.
                    let input = self.rows(Role::StateInput);
                    let inner = self
                        .columns(Role::Output)
                        .or_else(|| input?.checked_sub(channels)?.checked_sub(decay));
                    let inner = inner.unwrap_or(0);
                    let groups = geometry.state_groups().max(1);
                    let states = channels.saturating_sub(inner) / 2 / groups;
                    inner.saturating_mul(states)
                }
                _ => {
                    // Linear attention with a delta rule: a matrix of keys by values for each head.
                    let values = self.rows(Role::Value).or(self.columns(Role::Output));
                    let values = values.unwrap_or(channels / 3);
                    let keys = self.rows(Role::Key).filter(|_| decay > 0);
                    let head = match keys {
                        Some(keys) => keys / decay,
                        None => geometry.linear_key_head().unwrap_or(values / decay.max(1)),
                    };
                    values.saturating_mul(head)
                }
            };
            return Some(keep(tensor, elements));
        }
        if let Some((tensor, elements)) = self.unit {
            return Some(keep(tensor, elements));
        }
        if let Some(tensor) = self.time {
            let matrix = self.matrix(Role::Key).or(self.matrix(Role::Output));
            let width = matrix.and_then(|matrix| matrix.rows.max(matrix.columns));
            return Some(keep(
                tensor,
                width
                    .unwrap_or(0)
                    .saturating_mul(geometry.head().unwrap_or(64)),
            ));
        }
        if around.linear
            && let Some((role, elements)) = self.width(around)
        {
            // Lightning attention: as much as of keys, by the size of a head.
            let values = elements.unwrap_or(0) / 2;
            let tensor = self.matrix(role).map_or(0, |matrix| matrix.tensor);
            return Some(keep(
                tensor,
                values.saturating_mul(geometry.head().unwrap_or(128)),
            ));
        }
        let (tensor, ..) = self.convolution?;
        // A convolution before attention keeps little beside it; alone it is the layer.
        (!self.has(Role::Key) && !self.has(Role::Fused)).then(|| keep(tensor, 0))
    }
}

fn product(factors: &[u64]) -> u64 {
    let multiply = |product: u64, &factor: &u64| product.saturating_mul(factor);
    factors.iter().fold(1, multiply)
}
