use super::*;
use crate::draw::samples::{decoder, device, tensor};
use tightfit::types::{Format, Placement};

fn map_of(tensors: &[TensorInfo], devices: usize, place: impl Fn(&str) -> Option<u32>) -> String {
    let devices: Vec<_> = (0..devices).map(|index| device(index, 1 << 40)).collect();
    let placements: Vec<Placement> = tensors
        .iter()
        .map(|tensor| Placement {
            device: place(&tensor.name),
            format: Format::Stored,
        })
        .collect();
    let headroom = vec![0; devices.len()];
    let plan = Plan::new(tensors, &[], &devices, &placements, &headroom).unwrap();
    map(tensors, &plan)
}

#[test]
fn layers_are_runs_and_modules_beside_them_are_named() {
    let tensors = decoder(28);
    let text = map_of(&tensors, 2, |name| match layer_of(name) {
        Some((_, 7)) => Some(u32::from(name.contains("norm"))),
        Some((_, layer)) => Some(u32::from(layer > 7)),
        None => Some(u32::from(!name.contains("embed"))),
    });
    assert_eq!(
        text,
        "model.embed_tokens          -> sim:0\n\
         model.layers 0-6, 7 (part)  -> sim:0\n\
         model.layers 7 (part), 8-27 -> sim:1\n\
         model.norm, lm_head         -> sim:1\n"
    );
}

#[test]
fn experts_that_lie_apart_are_named_apart() {
    let mut tensors = decoder(4);
    // Every second layer has some.
    for layer in [1, 3] {
        let name = format!("model.layers.{layer}.mlp.experts.down_proj");
        tensors.push(tensor(&name, &[4, 8, 8]));
    }
    let text = map_of(&tensors, 2, |name| {
        Some(u32::from(name.contains("experts")))
    });
    let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
    assert!(
        lines[1].starts_with("model.layers without experts 0-3 "),
        "{text}"
    );
    assert!(lines[3].starts_with("model.layers experts 1-3 "), "{text}");
    assert!(lines[3].ends_with("-> sim:1"), "{text}");
    // Together they are layers like all others.
    let text = map_of(&tensors, 2, |_| Some(0));
    assert!(text.contains("model.layers 0-3 "), "{text}");
}

#[test]
fn what_is_not_loaded_and_what_is_spilled_is_said() {
    let mut tensors = decoder(2);
    tensors.push(tensor("model.visual.merger.mlp.weight", &[8, 8]));
    tensors.push(tensor("model.visual.blocks.0.attn.weight", &[8, 8]));
    let mut devices = [device(0, 1 << 30), device(1, 1 << 30)];
    devices[1].name = "cpu".to_owned();
    devices[1].kind = tightfit::device::DeviceKind::Cpu;
    let placements: Vec<Placement> = tensors
        .iter()
        .map(|tensor| Placement {
            device: match () {
                () if tensor.name.contains("visual") => None,
                () => Some(u32::from(tensor.name.contains("lm_head"))),
            },
            format: Format::Stored,
        })
        .collect();
    let plan = Plan::new(&tensors, &[], &devices, &placements, &[0; 2]).unwrap();
    let text = map(&tensors, &plan);
    let lines: Vec<(&str, &str)> = text.lines().filter_map(|l| l.split_once("->")).collect();
    let lines: Vec<(&str, &str)> = lines.iter().map(|(a, b)| (a.trim(), b.trim())).collect();
    assert_eq!(
        lines,
        [
            ("model.embed_tokens", "sim:0"),
            ("model.layers 0-1", "sim:0"),
            ("model.norm", "sim:0"),
            ("lm_head", "cpu (spilled)"),
            ("model.visual.blocks 0", "not loaded"),
            ("model.visual", "not loaded"),
        ]
    );
}

#[test]
fn no_model_fills_more_than_a_screen() {
    let long = "a".repeat(5000);
    let hostile: Vec<TensorInfo> = (0..3000u32)
        .map(|i| match i % 3 {
            // Stacks of one layer, layers of one stack that alternate, modules.
            0 => tensor(&format!("{long}{i}\u{202e}.layers.{i}.weight"), &[1]),
            1 => tensor(&format!("layers.{i}.weight"), &[1]),
            _ => tensor(&format!("{long}{i}"), &[1]),
        })
        .collect();
    let turn = std::cell::Cell::new(0);
    let text = map_of(&hostile, 50, |_| {
        turn.set(turn.get() + 1);
        Some(turn.get() % 50)
    });
    assert!(text.lines().count() <= MOST_LINES + 1, "{text}");
    assert!(
        text.lines().all(|line| line.chars().count() < 600),
        "{text}"
    );
    assert!(text.contains(" more\n"), "{text}");
    assert!(!text.contains('\u{202e}'), "{text}");
}
