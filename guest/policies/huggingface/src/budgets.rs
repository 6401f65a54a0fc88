//! How many bytes each device may take: what the user allows or what is free, balanced.

use serde_json::{Map, Value};
use tightfit_guest::settings::Settings;
use tightfit_guest::{Refusal, Request};

use crate::model::Model;
use crate::options::{Library, Options, Strategy};
use crate::sizes::Sizes;

/// A place where something can go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Place {
    /// An accelerator, counted among the accelerators.
    Gpu(u32),
    Cpu,
    /// What has room nowhere else.
    Disk,
}

/// Bytes per place, accelerators in their order and then the processor. What is not in it is not
/// used.
pub(crate) type Budgets = Vec<(Place, f64)>;

/// What a quantizer leaves of every budget, for buffers that are made while quantizing.
const QUANTIZER_LEAVES: f64 = 0.90;
/// What is left of a budget that the user did not state.
const UNSTATED_LEAVES: f64 = 0.9;

/// Budgets as they are handed to the placement.
pub(crate) fn budgets(
    request: &Request,
    settings: &Settings<'_>,
    model: &Model<'_>,
    sizes: &Sizes,
    options: &Options,
) -> Result<Budgets, Refusal> {
    let available = available(request);
    let stated = parse(settings, &available)?;
    let is_stated = stated.is_some();
    let mut budgets = match stated {
        Some(stated) if options.library == Library::Transformers => stated
            .into_iter()
            .map(|(place, bytes)| match place {
                Place::Gpu(gpu) => (place, bytes.min(available.gpus[gpu as usize])),
                _ => (place, bytes),
            })
            .collect(),
        Some(stated) => stated,
        None => free(&available, options.library),
    };
    if options.strategy != Strategy::Sequential {
        balance(&mut budgets, model, sizes, options, is_stated)?;
    }
    if sizes.quantized {
        for (_, bytes) in &mut budgets {
            *bytes *= QUANTIZER_LEAVES;
        }
    }
    Ok(budgets)
}

/// For the log: whole bytes by device.
pub(crate) fn as_json(budgets: &Budgets) -> String {
    let entry = |(place, bytes): &(Place, f64)| match place {
        Place::Gpu(gpu) => format!("\"{gpu}\":{bytes:.0}"),
        Place::Cpu => format!("\"cpu\":{bytes:.0}"),
        Place::Disk => format!("\"disk\":{bytes:.0}"),
    };
    let entries: Vec<String> = budgets.iter().map(entry).collect();
    format!("{{{}}}", entries.join(","))
}

#[derive(Debug)]
struct Available {
    gpus: Vec<f64>,
    cpu: Option<f64>,
}

fn available(request: &Request) -> Available {
    let mut found = Available {
        gpus: Vec::new(),
        cpu: None,
    };
    for (device, bytes) in request.devices.iter().zip(request.available()) {
        if device.is_accelerator() {
            found.gpus.push(bytes as f64);
        } else if found.cpu.is_none() {
            found.cpu = Some(bytes as f64);
        }
    }
    found
}

fn free(available: &Available, library: Library) -> Budgets {
    let gpus = available.gpus.iter().enumerate();
    let mut budgets: Budgets = gpus
        .map(|(gpu, &bytes)| (Place::Gpu(gpu as u32), bytes))
        .collect();
    if let Some(cpu) = available.cpu {
        let cpu = match library {
            Library::Accelerate => cpu,
            Library::Transformers => cpu * UNSTATED_LEAVES,
        };
        budgets.push((Place::Cpu, cpu));
    }
    budgets
}

/// Returns the setting `max-memory`, if it has a value.
fn parse(settings: &Settings<'_>, available: &Available) -> Result<Option<Budgets>, Refusal> {
    const NAME: &str = "max-memory";
    let text = settings.text(NAME);
    if text.is_empty() {
        return Ok(None);
    }
    let wanted = "a JSON object of devices (0, 1, ..., cpu) and bytes, for example \
                  {\"0\":\"20GiB\",\"cpu\":\"60GiB\"}";
    let Ok(object) = serde_json::from_str::<Map<String, Value>>(text) else {
        return Err(settings.bad(NAME, wanted));
    };
    let mut budgets = Budgets::new();
    for (key, value) in &object {
        let place = match key.as_str() {
            "cpu" => Place::Cpu,
            // It is there anyway and has no end.
            "disk" => continue,
            number => match number.parse::<u32>() {
                Ok(gpu) if (gpu as usize) < available.gpus.len() => Place::Gpu(gpu),
                Ok(_) => {
                    let count = available.gpus.len();
                    let allowed = format!("for the {count} accelerators that there are, from 0");
                    return Err(settings.bad(NAME, &allowed));
                }
                Err(_) => return Err(settings.bad(NAME, wanted)),
            },
        };
        let bytes = bytes(value).ok_or_else(|| {
            let allowed = "in bytes, or with a unit: GiB, MiB, KiB, GB, MB or KB";
            settings.bad(NAME, allowed)
        })?;
        budgets.push((place, bytes));
    }
    budgets.sort_by_key(|(place, _)| *place);
    // `0` and `00` are two keys and one device.
    if budgets.windows(2).any(|pair| pair[0].0 == pair[1].0) {
        return Err(settings.bad(NAME, "an object that names a device once"));
    }
    Ok(Some(budgets))
}

/// Returns a size as accelerate reads it: decimal units with a small `b` are bits.
fn bytes(value: &Value) -> Option<f64> {
    let text = match value {
        Value::Number(number) => return number.as_u64().map(|bytes| bytes as f64),
        Value::String(text) => text.trim(),
        _ => return None,
    };
    let units = [
        ("GIB", (1u64 << 30) as f64),
        ("MIB", (1u64 << 20) as f64),
        ("KIB", 1024.0),
        ("GB", 1e9),
        ("MB", 1e6),
        ("KB", 1e3),
    ];
    let upper = text.to_ascii_uppercase();
    let (unit, scale) = units.into_iter().find(|(unit, _)| upper.ends_with(unit))?;
    let number: f64 = text[..text.len() - unit.len()].trim().parse().ok()?;
    let mut bytes = (number * scale).trunc();
    if unit.len() == 2 && text.ends_with('b') {
        bytes = (bytes / 8.0).floor();
    }
    (bytes.is_finite() && bytes >= 0.0).then_some(bytes)
}

/// Caps all accelerators but the last, so that each gets about the same share.
pub(crate) fn balance(
    budgets: &mut Budgets,
    model: &Model<'_>,
    sizes: &Sizes,
    options: &Options,
    is_stated: bool,
) -> Result<(), Refusal> {
    let is_used = |(place, bytes): &(Place, f64)| matches!(place, Place::Gpu(_)) && *bytes > 0.0;
    let used: Vec<usize> = (0..budgets.len())
        .filter(|&i| is_used(&budgets[i]))
        .collect();
    let Some((_, all_but_last)) = used.split_last() else {
        return Ok(());
    };
    let low_0 = options.strategy == Strategy::BalancedLow0 && used.len() > 1;
    if used.len() == 1
        && !is_stated
        && let Some((Place::Gpu(_), first)) = budgets.first_mut()
    {
        *first *= UNSTATED_LEAVES;
    }
    let total = sizes.modules[0];
    let shares = if low_0 { used.len() - 1 } else { used.len() };
    let share = (total / shares as f64).floor() + buffer(model, sizes, options.library);
    for &i in all_but_last {
        let (place, bytes) = &mut budgets[i];
        if !(low_0 && *place == Place::Gpu(0)) {
            *bytes = bytes.min(share);
        }
    }
    if low_0 {
        // By number, as they do: numbers with gaps are an error there too.
        let find = |gpu: u32| {
            budgets
                .iter()
                .position(|(place, _)| *place == Place::Gpu(gpu))
        };
        let gap = || {
            Refusal::bad_setting(
                "setting `strategy` is `balanced_low_0`: `max-memory` must then name the \
                 accelerators from 0 on without a gap",
            )
        };
        let mut others = 0.0;
        for gpu in 1..used.len() as u32 {
            others += budgets[find(gpu).ok_or_else(gap)?].1;
        }
        let first = find(0).ok_or_else(gap)?;
        budgets[first].1 = budgets[first].1.min((total - others).max(0.0));
    }
    Ok(())
}

/// Returns the room on top of a share, so that what cannot be split does not end up on the last
/// device alone.
fn buffer(model: &Model<'_>, sizes: &Sizes, library: Library) -> f64 {
    let tree = &model.tree;
    let largest = match library {
        // Of each class the first; stacks stand for classes.
        Library::Accelerate => {
            let first = tree.modules().filter_map(|stack| {
                let mut children = tree.children(stack).iter();
                children.find(|child| model.blocks[child.index()])
            });
            let blocks = first.map(|&block| sizes.of(block)).fold(0.0, f64::max);
            blocks.max(mean_leaf(model, sizes))
        }
        // Transformers 5.23 takes the largest of all that is placed whole, which an embedding or
        // an output head can be.
        Library::Transformers => {
            let whole = tree.modules().filter(|&module| model.is_whole(module));
            whole.map(|module| sizes.of(module)).fold(0.0, f64::max)
        }
    };
    (1.25 * largest).trunc()
}

/// Returns the mean size of the modules without children that hold something.
fn mean_leaf(model: &Model<'_>, sizes: &Sizes) -> f64 {
    let tree = &model.tree;
    let leaves = tree
        .modules()
        .filter(|&module| tree.children(module).is_empty() && sizes.of(module) > 0.0);
    let (count, sum) = leaves.fold((0u32, 0.0), |(count, sum), leaf| {
        (count + 1, sum + sizes.of(leaf))
    });
    (sum / f64::from(count.max(1))).trunc()
}
