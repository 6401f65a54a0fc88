//! From styles to slices.

use std::ops::Range;

use tightfit_guest::in_memory::InMemory;
use tightfit_guest::names::{TensorKind, kind_of_module};
use tightfit_guest::sizing::bits;
use tightfit_guest::slices::equal_parts;
use tightfit_guest::{Format, Level, Placement, Refusal, Request, Slice, Tensor, transposed};

use crate::PLAN;
use crate::experts::Experts;
use crate::heads::Heads;
use crate::plan::{Found, Plan, shown};
use crate::styles::Style;

/// Entries that one note names.
pub(crate) const MOST_NOTED: usize = 8;

/// What every device has.
#[derive(Debug)]
pub(crate) struct Parts {
    /// The device of each tensor that is whole on one; none for what has slices, and for the second copy of a
    /// tied one.
    pub(crate) devices: Vec<Option<u32>>,
    /// Those of a tensor one after the other, in the devices' order.
    pub(crate) slices: Vec<Slice>,
    /// What the user may want to know.
    pub(crate) notes: Vec<(Level, String)>,
}

/// What becomes of one tensor.
enum Fate {
    /// Every device has all of it.
    Everywhere,
    /// One has.
    On(usize),
    /// Each device has the ranges with its number, of this dimension.
    Cut(usize, Vec<Vec<Range<u64>>>),
}

/// What there was of something, and the first of it.
#[derive(Default)]
struct Noted<'a> {
    count: usize,
    first: &'a str,
}

impl<'a> Noted<'a> {
    fn add(&mut self, name: &'a str) {
        if self.count == 0 {
            self.first = name;
        }
        self.count += 1;
    }
}

/// Cuts every tensor as its style says; tables of embeddings as `embeddings` does, if that is given.
///
/// # Errors
/// A refusal where a tensor cannot be cut so, and where none is.
pub(crate) fn cut(
    request: &Request,
    kinds: &[TensorKind],
    formats: &[Format],
    embeddings: Option<Style>,
    plan: &mut Plan,
) -> Result<Parts, Refusal> {
    let devices = request.devices.len();
    let duplicates = request.duplicates();
    let transposed = transposed(request);
    let in_memory = InMemory::new(request);
    let cutter = Cutter {
        devices,
        heads: Heads::read(&request.config_json),
        experts: Experts::of(request),
    };
    let mut parts = Parts {
        devices: vec![None; request.tensors.len()],
        slices: Vec::new(),
        notes: Vec::new(),
    };
    let (mut torn, mut uneven, mut single) = <(Noted<'_>, Noted<'_>, Noted<'_>)>::default();
    let (mut is_any_cut, mut copies) = (false, 0);
    for (t, tensor) in request.tensors.iter().enumerate() {
        if duplicates[t] {
            continue;
        }
        let name = style_name(request, t, kinds[t]);
        let (mut found, is_stacked) = cutter.style(plan, &in_memory, name);
        if let (Some(style), TensorKind::Embedding) = (embeddings, kinds[t]) {
            found = Some(Found {
                style,
                is_of_module: true,
            });
        }
        let fate = match found.filter(|found| found.style != Style::Replicate) {
            Some(_) if transposed[t] => {
                return Err(Refusal::unsupported(format!(
                    "{} is of a Conv1D module, whose rows are inputs: these are not cut",
                    tensor.name
                )));
            }
            Some(found) => cutter.fate(tensor, found, is_stacked)?,
            None => Fate::Everywhere,
        };
        is_any_cut |= !matches!(fate, Fate::Everywhere);
        match fate {
            _ if devices == 1 => parts.devices[t] = Some(0),
            Fate::On(device) => parts.devices[t] = Some(device as u32),
            Fate::Everywhere => {
                let before = parts.slices.len();
                let all = Slice::copies(t, tensor, devices, formats[t]);
                parts.slices.extend(all);
                if parts.slices.len() == before {
                    // A scalar has no slices.
                    parts.devices[t] = Some(0);
                    single.add(&tensor.name);
                }
                copies += 1;
            }
            Fate::Cut(dimension, of_device) => {
                let lengths = of_device.iter().map(|ranges| length(ranges));
                if lengths.clone().min() != lengths.max() {
                    uneven.add(&tensor.name);
                }
                let mut is_torn = false;
                for (device, ranges) in of_device.into_iter().enumerate() {
                    let placement = Placement::on(device, formats[t]);
                    let slice = Slice::new(t, dimension, ranges, placement);
                    is_torn |= is_torn_by(tensor, &slice, formats[t])?;
                    parts.slices.push(slice);
                }
                if is_torn {
                    torn.add(&tensor.name);
                }
            }
        }
    }
    if devices == 1 {
        return Ok(parts);
    }
    if !is_any_cut {
        return Err(Refusal::unsupported(format!(
            "no tensor of this model is of a module that is cut: each device would hold all of it. Setting \
             `{PLAN}` can say which are"
        )));
    }
    parts.note(torn, uneven, single, copies, devices);
    Ok(parts)
}

impl Parts {
    fn note(
        &mut self,
        torn: Noted<'_>,
        uneven: Noted<'_>,
        single: Noted<'_>,
        copies: usize,
        devices: usize,
    ) {
        let mut note = |level, noted: &Noted<'_>, what: &str| {
            if noted.count > 0 {
                let (count, first) = (noted.count, shown(noted.first));
                self.notes.push((
                    level,
                    format!("{count} tensors {what}, {first} the first of them"),
                ));
            }
        };
        note(
            Level::Info,
            &torn,
            "are cut within blocks: each part is quantized by itself, and not as in the whole",
        );
        note(
            Level::Info,
            &uneven,
            "have no equal parts: the last is smaller",
        );
        note(
            Level::Warn,
            &single,
            "are scalars or empty, and on the first device only",
        );
        self.notes.push((
            Level::Debug,
            format!(
                "{devices} devices, {} slices, {copies} tensors on each",
                self.slices.len()
            ),
        ));
    }
}

/// Returns the name by which a tensor's style is found. A table that is tied to the output head is the table,
/// whichever name the checkpoint stores it by.
fn style_name(request: &Request, t: usize, kind: TensorKind) -> &str {
    let own = request.tensors[t].name.as_str();
    if kind != TensorKind::Embedding || kind_of_module(own) == TensorKind::Embedding {
        return own;
    }
    let of_this = request.ties.iter().filter(|tie| tie.tensor as usize == t);
    let mut aliases = of_this.map(|tie| tie.alias.as_str());
    aliases
        .find(|alias| kind_of_module(alias) == TensorKind::Embedding)
        .unwrap_or(own)
}

/// How tensors are cut.
struct Cutter<'a> {
    devices: usize,
    heads: Heads,
    experts: Experts<'a>,
}

impl Cutter<'_> {
    /// Returns a tensor's style, and whether that is the style of a stack which it is of one matrix of.
    fn style(&self, plan: &mut Plan, in_memory: &InMemory, name: &str) -> (Option<Found>, bool) {
        // An entry for the matrix itself comes before one for its stack.
        if let Some(found) = plan.style(name) {
            return (Some(found), false);
        }
        if self.experts.number(name).is_none() {
            let moved = in_memory.name(name);
            return (moved.and_then(|name| plan.style(&name)), false);
        }
        let module = name.rsplit_once('.').map_or(name, |(module, _)| module);
        let stack = in_memory.name(&format!("{module}.weight"));
        let found = stack.and_then(|stack| plan.style(&stack));
        let is_of_module = true;
        (
            found.map(|found| Found {
                is_of_module,
                ..found
            }),
            true,
        )
    }

    fn fate(&self, tensor: &Tensor, found: Found, is_stacked: bool) -> Result<Fate, Refusal> {
        let expert = if is_stacked {
            self.experts.number(&tensor.name)
        } else {
            None
        };
        let style = match (found.style, expert) {
            (Style::Experts, Some((number, count))) => {
                let parts = self.whole(&tensor.name, count, "experts", "")?;
                let owner = parts.iter().position(|part| part.contains(&number));
                return Ok(owner.map_or(Fate::Everywhere, Fate::On));
            }
            // Of two matrices in one only one is here.
            (Style::PackedColumns, Some(_)) => Style::Columns { gathered: true },
            (Style::PackedRows, Some(_)) => Style::Rows,
            (style, _) => style,
        };
        let (module, leaf) = match tensor.name.rsplit_once('.') {
            Some(split) => split,
            None => ("", tensor.name.as_str()),
        };
        let is_bias = leaf == "bias" || leaf.ends_with("_bias");
        // Scales, zero points and packed weights of other methods would have to be cut each in its way.
        let is_plain = is_bias || leaf == "weight" || !found.is_of_module;
        // Elements of less than a byte are not cut.
        let is_whole = tensor.quantized.is_some() || bits(tensor.dtype).is_multiple_of(8);
        if !is_plain || !is_whole {
            return Err(Refusal::unsupported(format!(
                "{} cannot be cut: of a module only weights and biases are, in types of whole bytes; a checkpoint \
                 of another method has to be decoded for that",
                tensor.name
            )));
        }
        let Some((dimension, packed)) = style.cut(tensor.shape.len(), is_bias) else {
            return Ok(Fate::Everywhere);
        };
        let length = tensor.shape[dimension];
        let name = &tensor.name;
        let parts = match style {
            Style::Experts => self.whole(name, length, "experts", "")?,
            Style::Columns { gathered: false } => match self.heads.of(module) {
                Some(heads) if length.is_multiple_of(heads.count) => {
                    let each = length / heads.count;
                    let key = format!(" ({})", heads.key);
                    let parts = self.whole(name, heads.count, "heads", &key)?;
                    parts
                        .into_iter()
                        .map(|part| part.start * each..part.end * each)
                        .collect()
                }
                Some(heads) => {
                    return Err(Refusal::unsupported(format!(
                        "{name} has {length} rows, which are not those of {} heads ({})",
                        heads.count, heads.key
                    )));
                }
                None => equal_parts(length, self.devices),
            },
            _ if packed > 1 => {
                if !length.is_multiple_of(2) {
                    return Err(Refusal::unsupported(format!(
                        "{name} has {length} rows or columns, which are not those of two matrices"
                    )));
                }
                self.whole(
                    name,
                    length / 2,
                    "rows or columns in each of two matrices",
                    "",
                )?
            }
            _ => equal_parts(length, self.devices),
        };
        if parts.iter().any(Range::is_empty) {
            return Err(Refusal::unsupported(format!(
                "{name} has {length} rows or columns, too few for each of {} devices to have some",
                self.devices
            )));
        }
        let half = length / 2;
        let ranges = parts.into_iter().map(|part| match packed {
            1 => vec![part],
            _ => vec![part.clone(), part.start + half..part.end + half],
        });
        Ok(Fate::Cut(dimension, ranges.collect()))
    }

    /// Gives each device as many.
    fn whole(
        &self,
        name: &str,
        count: u64,
        what: &str,
        key: &str,
    ) -> Result<Vec<Range<u64>>, Refusal> {
        let devices = self.devices as u64;
        if count == 0 || !count.is_multiple_of(devices) {
            return Err(Refusal::unsupported(format!(
                "{name} has {count} {what}{key}, which {devices} devices cannot share evenly: a number of devices \
                 that divides {count} would do, or a setting `{PLAN}` that does not cut it"
            )));
        }
        Ok(equal_parts(count, self.devices))
    }
}

fn length(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
}

/// Returns whether a slice has other blocks than its tensor.
///
/// # Errors
/// A refusal where the tensor is quantized already.
fn is_torn_by(tensor: &Tensor, slice: &Slice, format: Format) -> Result<bool, Refusal> {
    let block_size = match (&tensor.quantized, format) {
        (Some(quantized), _) => quantized.block_size,
        (None, Format::Nf4(nf4)) => nf4.block_size,
        (None, Format::Stored | Format::Cast(_)) => return Ok(false),
    };
    let keeps = slice.keeps_blocks(&tensor.shape, u64::from(block_size));
    if !keeps && tensor.quantized.is_some() {
        return Err(Refusal::unsupported(format!(
            "{} is quantized already in blocks of {block_size} elements, and would be cut within them: fewer \
             devices or a setting `{PLAN}` that does not cut it would do",
            tensor.name
        )));
    }
    Ok(!keeps)
}
