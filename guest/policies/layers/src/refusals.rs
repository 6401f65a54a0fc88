//! Saying no, with numbers.

use tightfit_guest::amounts;
use tightfit_guest::names::TensorKind;
use tightfit_guest::partition::{Bin, Item};
use tightfit_guest::sizing::Sizer;
use tightfit_guest::{Format, Nf4Format, PreviousFailure, Refusal, Request};

use crate::options::Options;
use crate::place;

/// Returns what an earlier attempt found, where this is another.
pub(crate) fn earlier_failure(request: &Request) -> Option<String> {
    let PreviousFailure {
        device,
        needed,
        available,
    } = request.failure?;
    let device = request.devices.get(device as usize)?;
    Some(format!(
        "{} has {} and the earlier plan needed {} there",
        device.name,
        amounts::have(available.min(device.available)),
        amounts::need(needed)
    ))
}

/// Returns the refusal of a model that does not fit: what it needs, what there is, and what would
/// help.
pub(crate) fn does_not_fit(
    request: &Request,
    options: &Options,
    kinds: &[TensorKind],
    formats: &[Format],
    items: &[Item],
    bins: &[Bin],
) -> Refusal {
    let sum = |of: fn(&Item) -> u64| items.iter().map(of).fold(0, u64::saturating_add);
    let (weights, cache) = (sum(|item| item.bytes), sum(|item| item.headroom));
    let granularity = bins
        .iter()
        .map(|bin| bin.granularity.max(1))
        .min()
        .unwrap_or(1);
    let weights = weights
        .checked_next_multiple_of(granularity)
        .unwrap_or(u64::MAX);
    let need = weights.saturating_add(cache);
    let usable = |bin: &Bin| bin.capacity.saturating_sub(bin.reserve);
    let have = bins.iter().map(usable).fold(0, u64::saturating_add);
    let largest = bins.iter().map(usable).max().unwrap_or(0);

    let mut message = format!("the model needs {} (", amounts::need(need));
    message += &format!("weights {}", amounts::need(weights));
    if cache > 0 {
        message += &format!(", KV cache and logits {}", amounts::need(cache));
    }
    message += &format!(
        ") and the {} can take {}",
        devices(bins.len()),
        amounts::have(have)
    );
    if options.reserve > 0 {
        message += &format!(
            " besides the reserve of {} each",
            amounts::need(options.reserve)
        );
    }
    let missing = need.saturating_sub(have);
    if missing > 0 {
        message += &format!(": {} are missing", amounts::need(missing));
    }
    let biggest = items.iter().enumerate().max_by_key(|(_, item)| item.bytes);
    let missing = match biggest {
        _ if missing > 0 => missing,
        Some((t, item)) if item.bytes.saturating_add(item.headroom) > largest => {
            message += &format!(
                ", but `{}` alone takes {}",
                request.tensors[t].name,
                amounts::need(item.bytes)
            );
            item.bytes.saturating_add(item.headroom) - largest
        }
        _ => {
            // Together there is enough, but not where a tensor would go.
            let more = place::missing_on_each(bins, items).unwrap_or(0);
            let each = amounts::need(more);
            message += &format!(", but no arrangement fits each device: {each} more on each would");
            more
        }
    };
    message += "; another device";
    if cache > 0 {
        message += " or a smaller `context` or `batch`";
    }
    if options.reserve > 0 {
        message += " or a smaller `reserve`";
    }
    if !options.formats.quantize_experts && kinds.contains(&TensorKind::Expert) {
        message += " or `experts=nf4`";
    }
    // Only where it is enough: somebody would try it.
    let saved = double_quantization_saves(request, formats, items);
    if saved > 0 && saved >= missing {
        message += &format!(" or `double-quant=true` (saves {})", amounts::need(saved));
    }
    message += " would help";
    if let Some(earlier) = earlier_failure(request) {
        message += &format!(" ({earlier})");
    }
    Refusal::does_not_fit(message, (missing > 0).then_some(missing))
}

fn devices(count: usize) -> String {
    if count == 1 {
        "device".into()
    } else {
        format!("{count} devices")
    }
}

fn double_quantization_saves(request: &Request, formats: &[Format], items: &[Item]) -> u64 {
    let mut sizer = Sizer::new();
    let mut saved = 0u64;
    for ((tensor, format), item) in request.tensors.iter().zip(formats).zip(items) {
        if let Format::Nf4(nf4) = *format
            && item.bytes > 0
        {
            let double = Format::Nf4(Nf4Format {
                double_quantized: true,
                ..nf4
            });
            let then = sizer
                .size(tensor, double)
                .map_or(item.bytes, |size| size.padded);
            saved = saved.saturating_add(item.bytes.saturating_sub(then));
        }
    }
    saved
}
